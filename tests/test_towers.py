"""Towers of timm and transformers: each library's own patch tokens, from small random models and no download."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from vilex.config import EncoderConfig, PoolerConfig
from vilex.encoder import PatchEncoder, build_encoder
from vilex.model import ViLex, load_vilex
from vilex.pooler import VilexPooler
from vilex.towers import read_tower

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SMALL | {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
NAFLEX = SMALL | {"intermediate_size": 32, "patch_size": 8, "num_patches": 16}
TEXT = SMALL | {"intermediate_size": 32, "vocab_size": 50}
DINO = SMALL | {"image_size": 56, "patch_size": 8}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]
SQUARE = {"image_mean": MEAN, "image_std": STD, "size": {"height": 32, "width": 32}}
CROPPED = SQUARE | {"size": {"shortest_edge": 64}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
FLEXIBLE = {"image_mean": MEAN, "image_std": STD, "patch_size": 8, "max_num_patches": 256}

MODELS = {
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), CROPPED),
    "whole clip": (lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)), CROPPED),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)), SQUARE),
    "whole siglip": (lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)), SQUARE),
    "siglip2": (lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)), FLEXIBLE),
    "whole siglip2": (lambda: Siglip2Model(Siglip2Config(vision_config=NAFLEX, text_config=TEXT)), FLEXIBLE),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO)), CROPPED),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO)), CROPPED),
}


def pixels_of(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write_model(name: str, folder: Path) -> PreTrainedModel:
    """A random model and its preprocessing, as a hub repository has them."""
    build, preprocess = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():  # at their usual start, attention and positions hardly tell
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return model


def load(text: str, **changes: object) -> PatchEncoder:
    config, pretrained = read_tower(text)
    return build_encoder(EncoderConfig(**config.to_dict() | changes), pretrained).eval()


def normalised(pixels: Tensor) -> Tensor:
    return ((pixels + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def own_tokens(name: str, model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Patch tokens as the library's documentation gets them."""
    vision, inputs = getattr(model, "vision_model", model), normalised(pixels)
    if "siglip2" in name:
        height, width = (side // 8 for side in pixels.shape[-2:])
        patches = torch.stack([convert_image_to_patches(each, 8) for each in inputs])
        mask, shapes = torch.ones(2, height * width).long(), torch.tensor([[height, width]] * 2)
        return vision(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    if "siglip" in name:
        return vision(inputs, interpolate_pos_encoding=True).last_hidden_state
    if "clip" in name:
        return vision.post_layernorm(vision(inputs, interpolate_pos_encoding=True).last_hidden_state[:, 1:])
    return vision(inputs).last_hidden_state[:, 1 if name == "dinov2" else 5 :]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transformers_towers_give_the_librarys_own_patch_tokens(name, tmp_path):
    model = write_model(name, tmp_path)
    encoder = load(f"hf:{tmp_path}")
    assert (encoder.size, encoder.num_patches, encoder.patch_width) == ((32, 32), 16, 16)
    pixels = pixels_of(32, 32)
    torch.testing.assert_close(encoder(pixels), own_tokens(name, model, pixels), atol=1e-5, rtol=1e-4)
    wide = load(f"hf:{tmp_path}", tower_size=(24, 40))  # 3 x 5 patches, fewer than the model's own positions
    pixels = pixels_of(24, 40)
    torch.testing.assert_close(wide(pixels), own_tokens(name, model, pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "dinov2", "registers"])
def test_patches_run_row_by_row_and_every_parameter_gets_a_gradient(name, tmp_path):
    write_model(name, tmp_path)
    encoder = load(f"hf:{tmp_path}").train()
    pooler = VilexPooler(PoolerConfig(num_queries=5, num_blocks=1, width=8, heads=2, patch_width=16))
    pooler(encoder(pixels_of(20, 30))).square().sum().backward()
    assert [key for key, weight in encoder.named_parameters() if weight.grad is None] == []
    layers = encoder.tower.model.encoder
    vars(layers)["_modules"]["layer" if hasattr(layers, "layer") else "layers"] = nn.ModuleList()
    pixels, changed = pixels_of(32, 32), pixels_of(32, 32)
    changed[:, :, 8:16, 24:32] *= -1  # second row, last column of four
    moved = (encoder(changed) - encoder(pixels)).abs().amax((0, 2))
    assert moved.gt(1e-4).nonzero().flatten().tolist() == [4 + 3]


def test_trained_weights_need_neither_hub_nor_folder(tmp_path):
    write_model("whole siglip", tmp_path / "tower")
    encoder = load(f"hf:{tmp_path / 'tower'}")
    shutil.rmtree(tmp_path / "tower")
    model = ViLex(encoder, PoolerConfig(num_queries=3, num_blocks=1, width=8, heads=2, patch_width=16, text_width=7))
    model.save_pretrained(tmp_path / "weights", torch.float32)
    loaded = load_vilex(tmp_path / "weights")
    assert loaded.encoder.config == encoder.config
    assert torch.equal(loaded(pixels_of(20, 30)), model.eval()(pixels_of(20, 30)))


@pytest.mark.parametrize(("key", "loss"), [("post_layernorm.weight", "missing"), ("text", "")])
def test_a_tower_is_loaded_strictly_and_the_text_encoder_beside_it_does_not_matter(key, loss, tmp_path):
    write_model("whole clip", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if key not in name}
    save_file(weights, path, metadata={"format": "pt"})
    if not loss:
        assert load(f"hf:{tmp_path}").num_patches == 16
        return
    with pytest.raises(ValueError, match="CLIPVisionModel: .*post_layernorm.weight is missing from the file"):
        load(f"hf:{tmp_path}")


# timm


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("test_vit", (), 1),
        ("test_vit", (48, 80), 1),
        ("test_vit4", (), 1),
        ("vit_small_patch14_dinov2", (28, 42), 1),
        ("eva02_tiny_patch14_224", (28, 28), 1),
        ("deit_tiny_distilled_patch16_224", (32, 32), 2),
    ],
)
def test_timm_towers_give_the_librarys_own_patch_tokens(name, size, prefix, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **({"img_size": size} if size else {})).eval()
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    encoder = load(f"timm:{name}:{tmp_path / 'whole.safetensors'}", tower_size=size)
    assert encoder.size == (size or model.pretrained_cfg["input_size"][1:])
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = pixels_of(*encoder.size)
    expected = model.forward_features(((pixels + 1) / 2 - mean) / std)
    assert model.num_prefix_tokens == prefix
    torch.testing.assert_close(encoder(pixels), expected[:, prefix:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_vit4"])
def test_every_parameter_of_a_timm_tower_gets_a_gradient(name):
    encoder = build_encoder(EncoderConfig(timm=name))
    encoder(pixels_of(20, 30)).square().sum().backward()
    assert [key for key, weight in encoder.named_parameters() if weight.grad is None] == []


def test_preprocessing_is_that_of_the_weights_timm_names():
    published = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    encoder = build_encoder(EncoderConfig(timm="vit_tiny_patch16_224.augreg_in21k_ft_in1k", tower_size=(32, 32)))
    assert published.mean == (0.5, 0.5, 0.5) and encoder.size == (32, 32)
    pixels = pixels_of(32, 32)
    assert torch.equal(encoder._preprocess(pixels), pixels)


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:no_such_vit", "timm knows no tower 'no_such_vit'"),
        ("timm:hf-hub", "timm knows no tower 'hf-hub'"),
        ("timm:test_vit.no_such_tag", "timm cannot build 'test_vit.no_such_tag': Invalid pretrained tag"),
        ("timm:test_vit:/no/such/file", "no weights of test_vit at '/no/such/file'"),
        ("hf:/no/such/folder", "'/no/such/folder' holds no tower of transformers"),
        ("timm:", "a tower is open_clip:NAME:TAG, timm:NAME, timm:NAME:FILE or hf:ID, got 'timm:'"),
        ("keras:vit", "a tower is open_clip:NAME:TAG, timm:NAME, timm:NAME:FILE or hf:ID, got 'keras:vit'"),
    ],
)
def test_towers_that_cannot_serve_are_refused_in_one_sentence(text, message):
    with pytest.raises(ValueError) as error:
        load(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("resnet18", "ResNet"), ("test_convnext", "ConvNeXt")])
def test_networks_of_feature_maps_are_refused(name, kind):
    with pytest.raises(ValueError, match=f"{name} has no patch tokens: its tower is a {kind}"):
        build_encoder(EncoderConfig(timm=name))


def test_models_of_other_kinds_are_refused(tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SQUARE))
    with pytest.raises(ValueError, match="a tower of transformers is one of clip_vision_model, .*, got 'vit'"):
        load(f"hf:{tmp_path}")
    write_model("clip", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CROPPED | {"image_std": None}))
    with pytest.raises(ValueError, match="the preprocessing of .* has no image_std"):
        load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transformers": "owner/name"}, "transformers must be an object with settings, got 'owner/name'"),
        ({"transformers": {"model_type": "vit"}}, "is one of clip_vision_model, .*, got 'vit'"),
        ({"transformers": {"model_type": ["dinov2"]}}, r"is one of clip_vision_model, .*, got \['dinov2'\]"),
        ({"transformers": DINO | {"model_type": "dinov2", "auto_map": {}}}, "Dinov2Model has no setting 'auto_map'"),
        (
            {"transformers": DINO | {"model_type": "dinov2", "attn_implementation": "owner/kernel"}},
            "Dinov2Model has no setting 'attn_implementation'",
        ),
        ({"transformers": {"model_type": "dinov2", "hidden_size": "8"}}, "cannot build a Dinov2Model: .*hidden_size"),
        ({"timm": "test_vit", "open_clip": "ViT-B-16"}, "an encoder has one tower, got open_clip and timm"),
        ({"timm": "test_vit", "tower_size": (64,)}, r"tower_size must be empty or .* between 8 and 4096, got \(64,\)"),
        ({"timm": "test_vit", "tower_size": (64, 4)}, r"a width between 8 and 4096, got \(64, 4\)"),
        ({"transformers": {"model_type": "dinov2"}, "tower_size": ()}, "a tower of transformers needs its tower_size"),
    ],
)
def test_a_config_that_names_no_known_tower_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderConfig.from_dict({"tower_size": (32, 32)} | values))
