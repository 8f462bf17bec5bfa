"""Presets fit together, and those of Stable Diffusion train on a tiny random one with a tiny tower of open_clip."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import training
from builders import build_bert, build_tokenizer
from PIL import Image
from safetensors.torch import save_file
from training import assert_same, checkpoint, reset_accelerate, snapshot

from app.handlers import VIEWS, Handlers
from train import train_t2i, train_vilex
from train.encoder_init import EncoderInit
from train.presets import PAPER_SCHEDULE, PRESETS
from vilex.config import EncoderConfig, GenerationConfig
from vilex.encoder import build_encoder
from vilex.pipeline import VilexPipeline
from vilex.upsampler import LanczosUpsampler

LATENT = ("sd15", "sd21", "sdxl", "sd3")
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
    assert preset.pooler.num_blocks == 5 and preset.pooler.num_queries == (150 if name == "sd3" else 75)


@pytest.mark.parametrize("name", LATENT)
def test_train_t2i_has_nothing_to_train_for_a_finished_model(name, tmp_path):
    result = training.invoke(train_t2i.main, "--preset", name, "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    sentence = f"preset {name} takes a finished text-to-image model; those to train are of midi, mini, nano, tiny"
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
    assert train_vilex.read_encoder_init(given, None, init_from, 0, default) == EncoderInit(pretrained=tag)


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


def test_midi_trains_and_draws_at_256_pixels(tmp_path, monkeypatch):
    midi, tiny = PRESETS["midi"], PRESETS["tiny"]
    assert midi.unet.image_size == midi.encoder.image_size == 256
    narrow = replace(
        midi,
        unet=replace(midi.unet, widths=(8, 8, 8), heads=2, norm_num_groups=4, layers_per_block=1),
        encoder=replace(midi.encoder, width=8, layers=1, heads=2),
        pooler=replace(midi.pooler, num_blocks=1, width=8, heads=2, patch_width=8),
        t2i=tiny.t2i,
        vilex=tiny.vilex,
    )
    monkeypatch.setitem(PRESETS, "midi", narrow)
    for trainer in (train_t2i, train_vilex):
        short = trainer.GenerationConfig
        monkeypatch.setattr(trainer, "GenerationConfig", lambda short=short, **kw: short(num_inference_steps=1, **kw))
    monkeypatch.setattr(train_t2i, "GRID_PROMPTS", train_t2i.GRID_PROMPTS[:2])
    monkeypatch.setattr(train_vilex, "LADDER_PICTURES", 2)
    tokenizer = build_tokenizer("bert")
    tokenizer.save_pretrained(tmp_path / "text")
    build_bert(len(tokenizer)).save_pretrained(tmp_path / "text")
    training.write_table(tmp_path / "pictures.parquet")
    flags = ("--preset", "midi", "--data", tmp_path / "pictures.parquet", "--text-encoder", tmp_path / "text")
    flags += ("--max-steps", 1, "--fp32")
    training.succeed(train_t2i.main, *flags, "--out", tmp_path / "t2i")
    training.succeed(train_vilex.main, *flags, "--t2i", tmp_path / "t2i" / "t2i", "--out", tmp_path / "vilex")

    weights, text = str(tmp_path / "vilex" / "weights"), str(tmp_path / "text")
    pipeline = VilexPipeline.from_pretrained(weights, device="cpu", dtype="float32", text_encoder=text)
    assert pipeline.t2i.prediction_type == "sample" and pipeline.t2i.latent_shape == (192, 32, 32)
    picture = Image.new("RGB", (300, 200), "red")
    assert pipeline.attention(picture).shape == (75, 16, 16)
    drawn = pipeline.generate("<image>", [picture], GenerationConfig(num_inference_steps=1))
    assert drawn.images[0].size == (256, 256)
    for view in VIEWS:
        assert Handlers(pipeline, LanczosUpsampler()).at_size(drawn.images[0], view).size == (256, 256)


def test_another_librarys_tower_takes_the_place_of_the_presets(small, stable_diffusion, tmp_path):
    stable_diffusion.save_pretrained(tmp_path / "sd", dtype=torch.float32)
    training.write_table(tmp_path / "pictures.parquet")
    torch.manual_seed(6)
    before = timm.create_model("test_vit", img_size=32, num_classes=0).state_dict()
    save_file(before, tmp_path / "whole.safetensors")
    flags = ("--preset", "sd15", "--t2i", tmp_path / "sd", "--data", tmp_path / "pictures.parquet", "--fp32")
    flags += ("--encoder-init", f"timm:test_vit:{tmp_path / 'whole.safetensors'}", "--encoder-size", 32)
    training.succeed(train_vilex.main, *flags, "--max-steps", 1, "--out", tmp_path / "out")

    after = checkpoint(tmp_path / "out")["module"]["encoder.tower.trunk.patch_embed.proj.weight"]
    assert not torch.equal(after, before["patch_embed.proj.weight"])
    assert torch.allclose(after, before["patch_embed.proj.weight"], atol=1e-4)  # it started from the file
    pipeline = VilexPipeline.from_pretrained(str(tmp_path / "out" / "weights"), device="cpu", dtype="float32")
    encoder = pipeline.vilex.encoder
    assert (encoder.config.timm, encoder.size, encoder.num_patches) == ("test_vit", (32, 32), 4)


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
