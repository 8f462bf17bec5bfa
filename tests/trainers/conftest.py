"""Twelve pictures and tiny models that both trainers' tests read."""

from types import SimpleNamespace

import pytest
import torch
from builders import build_bert, build_tokenizer
from tiny_runs import TINY
from training import reset_accelerate, write_table

from train import train_t2i, train_vilex


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Sample grids of two steps and two prompts: what they show is random here anyway."""
    for module in (train_t2i, train_vilex):
        config = module.GenerationConfig
        monkeypatch.setattr(module, "GenerationConfig", lambda c=config, **kw: c(**kw, num_inference_steps=2))
    monkeypatch.setattr(train_t2i, "GRID_PROMPTS", ("a red dog", ""))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A table of twelve pictures, a text encoder, and a random text-to-image model."""
    folder = tmp_path_factory.mktemp("train")
    write_table(folder / "pictures.parquet")
    write_table(folder / "held-out.parquet")
    tokenizer = build_tokenizer("bert")
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "text")
    build_bert(len(tokenizer)).save_pretrained(folder / "text")
    torch.manual_seed(0)
    t2i = train_t2i.build_model(TINY, str(folder / "text"), None, seed=0)
    with torch.no_grad():  # a random denoiser hardly listens to its prompt
        t2i.denoiser.class_embedding.linear_1.weight.mul_(30)
        t2i.denoiser.conv_out.weight.mul_(2)
        for name, parameter in t2i.denoiser.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                parameter.mul_(5)
    t2i.save_pretrained(folder / "t2i", dtype=torch.float32)
    paths = {"data": "pictures.parquet", "held_out": "held-out.parquet", "text": "text", "t2i": "t2i"}
    return SimpleNamespace(**{name: folder / path for name, path in paths.items()})
