"""Encoders: our ViT and open_clip's towers, each with its own preprocessing, and what they refuse."""

import dataclasses
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from vilex import towers as tower_module
from vilex.checkpoint import load_module, save_module
from vilex.config import EncoderConfig, PoolerConfig
from vilex.encoder import build_encoder
from vilex.pooler import VilexPooler

OWN = EncoderConfig(image_size=24, patch_size=4, width=10, layers=3, heads=2)
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
CLIP = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
POOL = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
TOWERS = {
    "tiny-clip": CLIP,
    "tiny-coca": CLIP | POOL,
    "tiny-timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "tiny-timm-avg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
    "tiny-resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "tiny-conv": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    "tiny-wide": CLIP | {"image_size": [32, 48]},
}
SHAPES = {"tiny-clip": (32, 16, 64), "tiny-coca": (32, 16, 64), "tiny-timm": (160, 100, 64)}  # size, P, D_vit


@pytest.fixture(scope="module", autouse=True)
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    for name, vision in TOWERS.items():
        model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(model))
    open_clip.add_model_config(folder)


def _pixels(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_own_vit_shapes():
    encoder = build_encoder(OWN)
    assert (encoder.image_size, encoder.num_patches, encoder.patch_width, encoder.config) == (24, 36, 10, OWN)
    assert encoder(_pixels(24, 24)).shape == encoder(_pixels(17, 50)).shape == (2, 36, 10)


def test_patches_run_row_by_row():
    """With no blocks between, a patch token depends on its own patch only."""
    encoder = build_encoder(OWN)
    encoder.tower.blocks = nn.Sequential()
    pixels = _pixels(24, 24, batch=1)
    changed = pixels.clone()
    changed[:, :, 4:8, 12:16] *= -1  # second row, fourth column of six
    moved = (encoder(changed) - encoder(pixels)).abs().amax((0, 2))
    assert moved.nonzero().flatten().tolist() == [6 + 3]


@pytest.mark.parametrize("name", SHAPES)
def test_open_clip_towers_give_their_own_patch_tokens(name):
    encoder = build_encoder(EncoderConfig(open_clip=name))
    assert (encoder.image_size, encoder.num_patches, encoder.patch_width) == SHAPES[name]
    assert encoder(_pixels(31, 45)).shape == (2, *SHAPES[name][1:])


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-timm", "tiny-timm-avg", "tiny-wide"])
def test_parity_with_the_whole_open_clip_model(name, tmp_path):
    torch.manual_seed(1)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    encoder = build_encoder(EncoderConfig(open_clip=name), pretrained=str(tmp_path / "whole.pt")).eval()
    pixels = _pixels(*encoder.size)
    preprocess = model.visual.preprocess_cfg
    mean, std = (torch.tensor(preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = model.visual.forward_intermediates(
        ((pixels + 1) / 2 - mean) / std, indices=1, output_fmt="NLC", normalize_intermediates=True
    )["image_intermediates"][0]
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


def test_a_tower_that_is_not_square_reads_all_of_a_picture():
    encoder = build_encoder(EncoderConfig(open_clip="tiny-wide"))
    assert (encoder.size, encoder.image_size, encoder.num_patches) == ((32, 48), 48, 4 * 6)
    pixels = _pixels(48, 48)
    expected = F.interpolate(pixels, (32, 48), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(encoder._preprocess(pixels), expected * encoder.scale + encoder.shift)


def test_a_tower_of_open_clip_reads_another_size():
    for name, patch in (("tiny-clip", 8), ("tiny-timm", 16)):
        encoder = build_encoder(EncoderConfig(open_clip=name, tower_size=(64, 64)))
        assert (encoder.image_size, encoder.num_patches) == (64, (64 // patch) ** 2)


def test_coca_patch_tokens_are_those_its_pooler_reads():
    encoder = build_encoder(EncoderConfig(open_clip="tiny-coca"))
    torch.manual_seed(2)
    model = open_clip.create_model("tiny-coca").visual.eval()
    read = []
    model.attn_pool.attn.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[1]), with_kwargs=True)
    kept = {key: model.state_dict().get(key) for key in encoder.tower.visual.state_dict()}
    kept |= {f"ln_post.{key}": tensor for key, tensor in model.attn_pool.ln_k.state_dict().items()}
    encoder.tower.visual.load_state_dict(kept)
    pixels = _pixels(32, 32)
    model(encoder._preprocess(pixels))
    torch.testing.assert_close(encoder(pixels), read[0][:, 1:])


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-timm"])
@pytest.mark.parametrize("size", [(90, 41), (300, 220)])
def test_preprocessing_equals_that_of_open_clip(name, size):
    encoder = build_encoder(EncoderConfig(open_clip=name))
    image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB").rotate(20)
    image = image.point(lambda value: 64 + value // 2)  # Pillow cuts overshoots after each pass: leave them room
    settings = encoder.tower.visual.preprocess_cfg | {"resize_mode": "squash"}
    expected = image_transform_v2(PreprocessCfg(**settings), is_train=False)(image)
    pixels = pil_to_tensor(image)[None] / 127.5 - 1
    error = (encoder._preprocess(pixels)[0] - expected).abs() * torch.tensor(settings["std"]).view(3, 1, 1)
    assert error.max() < 2 / 255  # it also rounds to 8 bits after each pass


def test_normalisation_follows_the_config():
    encoder = build_encoder(EncoderConfig(image_size=8, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 0.2)))
    pixels = _pixels(8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(encoder._preprocess(pixels), ((pixels + 1) / 2 - mean) / std)
    assert torch.equal(build_encoder(OWN)._preprocess(_pixels(24, 24)), _pixels(24, 24))


def test_normalisation_travels_with_the_weights(tmp_path):
    """A tower is fine-tuned from pretrained weights and rebuilt without them."""
    trained = build_encoder(dataclasses.replace(OWN, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 0.2)))
    rebuilt = build_encoder(OWN)
    save_module(trained, tmp_path)
    load_module(rebuilt, tmp_path)
    assert torch.equal(rebuilt(_pixels(17, 30)), trained(_pixels(17, 30)))


@pytest.mark.parametrize(
    ("name", "pretrained", "mean"),
    [
        ("ViT-B-16-SigLIP", "webli", 0.5),
        ("ViT-B-16-SigLIP", None, 0.5),
        ("ViT-B-16-SigLIP", "/some/file.safetensors", 0.5),
        ("ViT-L-14", "openai", 0.48145466),
        ("ViT-L-14", "laion2b_s32b_b82k", 0.5),
    ],
)
def test_published_preprocessing_is_that_of_the_tag_or_the_architecture(name, pretrained, mean):
    assert tower_module._published_preprocess(name, pretrained)["mean"][0] == mean


def test_resizing_is_antialiased():
    """A one-pixel checkerboard is grey from far away; plain sampling would make stripes of it."""
    board = torch.ones(1, 3, 96, 96)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    small = build_encoder(OWN)._preprocess(board)[..., 4:-4, 4:-4]
    assert small.abs().max() < 0.02
    assert F.interpolate(board, (24, 24), mode="nearest").abs().min() == 1


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-coca", "tiny-timm", "tiny-timm-avg", ""])
def test_every_parameter_and_query_gets_a_gradient(name):
    encoder = build_encoder(EncoderConfig(open_clip=name) if name else OWN)
    pooler = VilexPooler(PoolerConfig(num_queries=5, num_blocks=1, width=8, heads=2, patch_width=encoder.patch_width))
    pooler(encoder(_pixels(20, 30))).square().sum().backward()
    assert pooler.queries.grad.abs().sum(1).gt(0).all()
    assert [key for key, weight in encoder.named_parameters() if weight.grad is None] == []


def test_result_does_not_depend_on_memory_format():
    encoder = build_encoder(OWN)
    expected = encoder(_pixels(33, 47))
    encoder = encoder.to(memory_format=torch.channels_last)
    result = encoder(_pixels(33, 47).to(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_weights_take_single_precision_pixels():
    assert build_encoder(OWN).to(torch.bfloat16)(_pixels(33, 47)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("tiny-resnet", None, "tiny-resnet has no patch tokens: its tower is a ModifiedResNet"),
        ("tiny-conv", None, "tiny-conv has no patch tokens: its tower is a ConvNeXt"),
        ("no-such-tower", None, "open_clip cannot build 'no-such-tower'"),
        ("tiny-clip", "no-such-tag", "open_clip cannot build 'tiny-clip' with pretrained='no-such-tag'"),
        ("", "webli", "pretrained='webli' needs a tower of open_clip"),
    ],
)
def test_towers_that_cannot_serve_are_refused_by_name(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderConfig(open_clip=name), pretrained)
