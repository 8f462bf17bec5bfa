"""Files of finished models, and what is fetched of them from the hub."""

import json
from pathlib import Path

import pytest
import torch
from builders import build_pipeline, build_tokenizer
from cases import KINDS, PARTS, TEXT, draw, encode
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from vilex import checkpoint, diffusion
from vilex.diffusion import load_t2i
from vilex.latent import StableDiffusionXL
from vilex.pipeline import VilexPipeline


def test_saved_models_come_back(case, tmp_path):
    case.t2i.save_pretrained(tmp_path, dtype=torch.float32)
    loaded = load_t2i(tmp_path)
    assert type(loaded) is type(case.t2i)
    expected = case.t2i.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        for text in (TEXT, ""):
            assert torch.equal(encode(loaded, text).prompt_embeds, encode(case.t2i, text).prompt_embeds)
        assert torch.equal(draw(loaded, encode(loaded, TEXT)), draw(case.t2i, encode(case.t2i, TEXT)))
    stock = type(case.stock).from_pretrained(tmp_path)
    assert stock.config.get("force_zeros_for_empty_prompt") == case.stock.config.get("force_zeros_for_empty_prompt")


def test_files_do_not_say_where_a_model_was_read_from(case, tmp_path):
    case.t2i.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*.json") if str(case.folder) in path.read_text()]


def test_files_hold_fp16_and_models_compute_in_fp32(case, tmp_path):
    case.t2i.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    loaded = load_t2i(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in KINDS for part in PARTS[kind]])
def test_a_missing_weight_of_any_part_is_refused(kind, part, tmp_path):
    build_pipeline(kind).save_pretrained(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(path)
    key = sorted(weights)[-1]
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} does not fit .* is missing from the file"):
        load_t2i(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_scheduler_that_shifts_with_the_size_is_refused(tmp_path):
    build_pipeline("sd3").save_pretrained(tmp_path)
    edit_json(tmp_path / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="shifts its timesteps with the picture's size, which is not supported"):
        load_t2i(tmp_path)


def test_tokenizers_of_two_vocabularies_are_refused(tmp_path):
    build_pipeline("sdxl").save_pretrained(tmp_path)
    build_tokenizer("bert").save_pretrained(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="the two CLIP tokenizers have different vocabularies"):
        load_t2i(tmp_path)


def test_an_inpainting_denoiser_is_refused(tmp_path):
    pipeline = build_pipeline("sd")
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 9 channels and gives 4; models that fill in or edit pictures"):
        load_t2i(tmp_path)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache on this machine with one commit of owner/tiny-sdxl, as a download leaves it."""
    commit = "a" * 40
    repository = tmp_path / "models--owner--tiny-sdxl"
    build_pipeline("sdxl").save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_found_offline(hub):
    assert isinstance(load_t2i("owner/tiny-sdxl"), StableDiffusionXL)
    assert isinstance(load_t2i(Path("owner/tiny-sdxl")), StableDiffusionXL)


def test_a_hub_id_of_a_model_alone_gives_a_pipeline_without_encoder(hub):
    pipeline = VilexPipeline.from_pretrained("owner/tiny-sdxl", device="cpu", dtype="float32")
    assert (pipeline.name, pipeline.vilex) == ("owner/tiny-sdxl", None)
    assert isinstance(pipeline.t2i, StableDiffusionXL)


@pytest.fixture
def asked(hub, monkeypatch) -> list[list[str]]:
    """The patterns of files that are asked of the hub."""
    patterns: list[list[str]] = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return snapshot_download(hub_id, allow_patterns=allow_patterns)

    for module in (checkpoint, diffusion):
        monkeypatch.setattr(module, "snapshot_download", fetch)
    return patterns


def test_weights_of_a_model_alone_are_left_to_what_loads_its_kind(asked):
    checkpoint.find_weights("owner/tiny-sdxl")
    ours = ["config.json", "vilex.safetensors", "t2i/unet/diffusion_pytorch_model.safetensors", "README.md"]
    others = ["unet/diffusion_pytorch_model.safetensors", "sd_xl_base_1.0.safetensors", "vilex.bin"]
    assert list(filter_repo_objects(ours + others, allow_patterns=asked[0])) == ours


def test_only_what_is_read_is_fetched(asked):
    """Files as the hub has them of SDXL: no twin in fp16, no other framework's, no folder of another use."""
    load_t2i("owner/tiny-sdxl")
    wanted = [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json",
        "text_encoder/model.safetensors", "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]  # fmt: skip
    others = [
        "README.md", "sd_xl_base_1.0.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/model.onnx",
        "text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/openvino_model.bin",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "vae_1_0/config.json",
        "vae_1_0/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects(wanted + others, allow_patterns=asked[-1])) == wanted
    assert asked[0] == ["model_index.json"]


@pytest.mark.parametrize("name", ["owner/missing", "owner/tiny sdxl", "nowhere", "/no/such/folder", "a/b/c"])
def test_what_is_neither_a_folder_nor_at_the_hub_is_named(hub, name):
    with pytest.raises(ValueError, match=f"^{name} holds no text-to-image model: [^\n]+$"):
        load_t2i(name)
