"""Strict loading: whatever is wrong with a file is an error with a sentence, never a random weight."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from vilex import checkpoint
from vilex.checkpoint import find_weights, load_module, load_pretrained, save_module, weights_name

UNET = dict(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    attention_head_dim=2, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
)  # fmt: skip
TEXT = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
CLIP = TEXT | dict(bos_token_id=48, eos_token_id=49)
MODELS = {
    "unet": (UNet2DConditionModel, lambda: UNet2DConditionModel(**UNET), "conv_in.weight"),
    "bert": (BertModel, lambda: BertModel(BertConfig(**TEXT)), "embeddings.word_embeddings.weight"),
    "clip": (CLIPTextModel, lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), "final_layer_norm.weight"),
}


class Pair(nn.Module):
    def __init__(self, rows: int = 3, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(rows, 5, dtype=dtype))
        self.out = nn.Linear(5, 2, dtype=dtype)
        self.register_buffer("count", torch.tensor(70_001))


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """(loader, model, name of a weight, folder, weight file)"""
    loader, build, key = MODELS[request.param]
    model = build()
    model.save_pretrained(tmp_path)
    return loader, model, key, tmp_path, next(tmp_path.glob("*.safetensors"))


def test_pretrained_loads_every_weight(saved):
    loader, model, _, folder, _ = saved
    loaded = load_pretrained(loader, folder).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, key: w.pop(key), "is missing from the file"),
        (lambda w, key: w.update({"extra.weight": torch.ones(3)}), "extra.weight in the file is unknown to the model"),
        (lambda w, key: w.update({key: torch.ones(2, 7)}), "expects .*, file has 2 x 7"),
        (lambda w, key: w.update({key: w[key] * torch.nan}), "not finite"),
    ],
)
def test_pretrained_refuses_a_file_that_does_not_fit(saved, change, message):
    loader, _, key, folder, file = saved
    weights = load_file(file)
    change(weights, next(name for name in weights if name.endswith(key)))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_pretrained(loader, folder)


def test_pretrained_ignores_only_what_it_is_told_to(tmp_path):
    BertModel(BertConfig(**TEXT), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pooler.dense.weight is missing"):
        load_pretrained(BertModel, tmp_path)
    assert load_pretrained(BertModel, tmp_path, ignore=("pooler.",)).config.hidden_size == 8


def test_pretrained_accepts_the_position_ids_of_old_files(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"embeddings.position_ids": torch.arange(512)}, file, metadata={"format": "pt"})
    load_pretrained(BertModel, tmp_path)


def test_pretrained_refuses_pickles_and_damaged_files(saved):
    loader, _, _, folder, file = saved
    file.write_bytes(b"not a header at all" * 9)
    with pytest.raises(ValueError, match="cannot be loaded from"):
        load_pretrained(loader, folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        load_pretrained(loader, folder)


@pytest.mark.parametrize("max_shard_size", ["45MB", 40])
def test_save_and_load_are_inverse(tmp_path, max_shard_size):
    module, other = Pair(), Pair()
    save_module(module, tmp_path, "pair", max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if max_shard_size == "45MB" else 4)
    load_module(other, tmp_path, "pair")
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (module, other)), strict=True))


def test_half_on_disk_is_single_in_memory(tmp_path):
    module, other = Pair(), Pair()
    save_module(module, tmp_path, dtype=torch.float16)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert on_disk["queries"].dtype == torch.float16
    load_module(other, tmp_path)
    assert other.queries.dtype == torch.float32
    assert torch.equal(other.queries, module.queries.half().float())
    assert other.count == 70_001


def test_tied_tensors_survive(tmp_path):
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    save_module(module, tmp_path)
    load_module(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), tmp_path)


def test_two_modules_share_a_folder(tmp_path):
    save_module(Pair(), tmp_path, "encoder")
    save_module(Pair(rows=4), tmp_path, "pooler", max_shard_size=40)
    load_module(Pair(), tmp_path, "encoder")
    load_module(Pair(rows=4), tmp_path, "pooler")


BAD_FILES = [
    (lambda t: t.update(queries=torch.ones(16, 4)), "queries: expects 3 x 5, file has 16 x 4"),
    (lambda t: t.pop("queries"), "queries is missing from the file"),
    (lambda t: t.update(more=torch.ones(1)), "more in the file is unknown to the model"),
    (lambda t: t["out.bias"].fill_(torch.inf), "out.bias in .* holds values that are not finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_module_refuses_a_file_that_does_not_fit_and_stays_unchanged(tmp_path, change, message):
    tensors = dict(Pair().state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    module = Pair()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_module(module, tmp_path)
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_long_lists_are_cut(tmp_path):
    save_file({f"extra{i}": torch.ones(1) for i in range(9)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="extra4 in the file .*; and 4 more like it$"):
        load_module(nn.Module(), tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_module(Pair(), tmp_path, max_shard_size=40)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="holds 3 of 4 shards"):
        load_module(Pair(), tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "weights.pth", "model.pt"])
def test_module_refuses_pickles(tmp_path, name):
    torch.save(Pair().state_dict(), tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} is a pickle"):
            load_module(Pair(), path)


def test_module_refuses_absent_and_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="no pooler.safetensors in"):
        load_module(Pair(), tmp_path, "pooler")
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_module(Pair(), tmp_path)


def test_save_refuses_what_the_dtype_cannot_hold(tmp_path):
    module = Pair()
    module.queries.data[1, 2] = 1e6
    with pytest.raises(ValueError, match="queries in .* not finite"):
        save_module(module, tmp_path, dtype=torch.float16)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder, no VILEX_WEIGHTS, and a hub that answers nothing."""

    def offline(hub_id: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(checkpoint, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    monkeypatch.delenv("VILEX_WEIGHTS", raising=False)
    return tmp_path / "weights"


def test_weights_are_found_in_the_documented_order(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda hub_id, **_: f"hub:{hub_id}")
    (weights / "mini").mkdir(parents=True)
    assert find_weights() == str(weights / "mini")
    (weights / "nano").mkdir()
    monkeypatch.setenv("VILEX_WEIGHTS", "nano")
    assert find_weights() == str(weights / "nano")
    assert find_weights(str(tmp_path)) == str(tmp_path)
    assert find_weights("someone/else") == "hub:someone/else"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            None,
            "no weights at .*mini: name a folder or a hub id with --model or VILEX_WEIGHTS, .*"
            "hf download OWNER/NAME --local-dir .*mini$",
        ),
        ("nowhere", "no weights at 'nowhere': give a folder"),
        ("./some/folder", "no weights at './some/folder'"),
        ("someone/else", "hf download someone/else"),
    ],
)
def test_absent_weights_give_one_sentence(weights, model, message):
    with pytest.raises(ValueError, match=message):
        find_weights(model)


def test_no_hub_is_asked_for_weights_that_nobody_named(weights, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda hub_id, **_: asked.append(hub_id))
    with pytest.raises(ValueError, match="no weights at"):
        find_weights()
    assert not asked


@pytest.mark.parametrize(
    ("folder", "name"),
    [("weights/nano", "nano"), ("hub/models--vilex--vilex-nano/snapshots/0a1b2c", "vilex/vilex-nano")],
)
def test_a_hub_download_is_named_by_its_id_not_its_commit(folder, name):
    assert weights_name(Path(folder)) == name
