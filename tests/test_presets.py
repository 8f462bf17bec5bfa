"""Presets fit together, and those of Stable Diffusion train on a tiny random one with a tiny tower of open_clip."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import training
from training import assert_same, checkpoint, reset_accelerate, snapshot

from train import train_t2i, train_vilex
from train.presets import PAPER_SCHEDULE, PRESETS
from vilex.config import EncoderConfig
from vilex.encoder import build_encoder
from vilex.pipeline import VilexPipeline

LATENT = ("sd15", "sd21", "sdxl")
TOWER = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_pooler_reads_what_the_encoder_gives(name):
    preset = PRESETS[name]
    if preset.encoder.open_clip:
        vision = open_clip.get_model_config(preset.encoder.open_clip)["vision_cfg"]
        with torch.device("meta"):  # shapes alone: the real one takes 1.7 GB
            width = timm.create_model(vision["timm_model_name"], pretrained=False).embed_dim
    else:
        width = build_encoder(preset.encoder).patch_width
    assert preset.pooler.patch_width == width


@pytest.mark.parametrize("name", LATENT)
def test_stable_diffusion_follows_the_papers_schedule_from_a_trained_tower(name):
    preset = PRESETS[name]
    assert preset.encoder_init == "open_clip:webli"
    assert "webli" in open_clip.list_pretrained_tags_by_model(preset.encoder.open_clip)
    wanted = {"batch_size": 2048, "learning_rate": 3e-4, "encoder_learning_rate": 1e-5, "warmup_steps": 10_000}
    assert {key: getattr(preset.vilex, key) for key in wanted} == wanted
    assert preset.pooler.num_blocks == 5 and preset.pooler.num_queries == 75


@pytest.mark.parametrize("name", LATENT)
def test_train_t2i_has_nothing_to_train_for_a_finished_model(name, tmp_path):
    result = training.invoke(train_t2i.main, "--preset", name, "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    sentence = f"preset {name} takes a finished text-to-image model; those to train are of mini, nano, tiny"
    assert sentence in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "init_from", "default", "tag"),
    [
        (None, None, "open_clip:webli", "webli"),
        (None, Path("weights"), "open_clip:webli", None),
        ("random", None, "open_clip:webli", None),
        ("open_clip:laion", None, "open_clip:webli", "laion"),
        (None, None, "random", None),
    ],
)
def test_the_presets_start_of_the_tower_gives_way_to_what_is_asked_for(given, init_from, default, tag):
    assert train_vilex.read_encoder_init(given, None, init_from, 0, default) == (None, tag)


@pytest.fixture
def tower(tmp_path) -> Path:
    """The weights of a whole open_clip model whose shape open_clip knows as tiny-tower."""
    (tmp_path / "tiny-tower.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    torch.manual_seed(5)
    torch.save(open_clip.create_model("tiny-tower").state_dict(), tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


@pytest.fixture
def small(monkeypatch, tower):
    """sd15 with a tiny tower and pooler and two steps; no weight decay, so that only gradients move weights."""
    preset = PRESETS["sd15"]
    pooler = replace(preset.pooler, num_blocks=1, width=8, heads=2, patch_width=64)
    schedule = replace(PAPER_SCHEDULE, batch_size=4, max_steps=2, warmup_steps=1, weight_decay=0, log_every=1)
    changed = replace(
        preset,
        encoder=EncoderConfig(open_clip="tiny-tower"),
        pooler=pooler,
        vilex=schedule,
        encoder_init=f"open_clip:{tower}",
    )
    monkeypatch.setitem(PRESETS, "sd15", changed)
    short = train_vilex.GenerationConfig
    monkeypatch.setattr(train_vilex, "GenerationConfig", lambda **kw: short(**kw, num_inference_steps=1))
    reset_accelerate()
    return changed


def test_sd15_trains_tower_and_pooler_through_stable_diffusion(small, stable_diffusion, tower, tmp_path, monkeypatch):
    stable_diffusion.save_pretrained(tmp_path / "sd", dtype=torch.float32)
    training.write_table(tmp_path / "pictures.parquet")
    loaded, load = [], train_vilex.load_t2i
    monkeypatch.setattr(train_vilex, "load_t2i", lambda *a: loaded.append(load(*a)) or loaded[0])
    flags = ("--preset", "sd15", "--t2i", tmp_path / "sd", "--data", tmp_path / "pictures.parquet", "--fp32")
    training.succeed(train_vilex.main, *flags, "--out", tmp_path / "out")

    assert_same(snapshot(load(tmp_path / "sd")), snapshot(loaded[0]))
    after = checkpoint(tmp_path / "out")["module"]
    before = build_encoder(small.encoder, str(tower)).state_dict()
    patches = "tower.visual.conv1.weight"
    assert not torch.equal(after[f"encoder.{patches}"], before[patches])
    assert torch.allclose(after[f"encoder.{patches}"], before[patches], atol=1e-4)  # it started from the file
    assert after["pooler.out.weight"].shape == (stable_diffusion.text_width, 8)
    pipeline = VilexPipeline.from_pretrained(str(tmp_path / "out" / "weights"), device="cpu", dtype="float32")
    assert pipeline.vilex.encoder.config.open_clip == "tiny-tower"
    assert (tmp_path / "out" / "ladder-000002.png").is_file()


def test_gradient_reaches_the_tower_and_no_frozen_part(small, stable_diffusion, tower, tmp_path, monkeypatch):
    stable_diffusion.save_pretrained(tmp_path / "sd", dtype=torch.float32)
    training.write_table(tmp_path / "pictures.parquet")
    runs = []

    def note(run: train_vilex.VilexRun) -> None:
        run.loss(0, 0).backward()
        runs.append(run)

    monkeypatch.setattr(train_vilex.VilexRun, "run", note)
    flags = ("--preset", "sd15", "--t2i", tmp_path / "sd", "--data", tmp_path / "pictures.parquet", "--fp32")
    training.succeed(train_vilex.main, *flags, "--out", tmp_path / "out")
    tower_gradients = [p.grad for p in runs[0].module.encoder.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in tower_gradients)
    assert all(parameter.grad is None for parameter in runs[0].t2i.parameters())
