"""The plan counts what a real step does, on networks without weights, and what follows from it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from click.testing import CliRunner

from train.memory import checkpoint_gradients
from train.plan import Cost, Machine, count_step, main, make_plan, measure_cost
from train.presets import TrainConfig
from train.published import PUBLISHED, Published, build_published
from vilex.config import EncoderConfig, PoolerConfig
from vilex.diffusion import TextToImage
from vilex.encoder import build_encoder
from vilex.model import ViLex

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCKS = {
    "block_out_channels": (32, 64), "attention_head_dim": 4, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TINY = {
    "sd": Published(8, {**BLOCKS, "cross_attention_dim": 16}, (TEXT,)),
    "sdxl": Published(
        8, {
            **BLOCKS, "cross_attention_dim": 16 + 24, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8, "use_linear_projection": True,
        },
        (TEXT, TEXT | {"hidden_size": 24}),
    ),
}  # fmt: skip


def build(name: str) -> tuple[TextToImage, ViLex]:
    t2i = build_published(TINY[name])
    encoder = build_encoder(EncoderConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2))
    return t2i, ViLex(encoder, PoolerConfig(width=16, heads=2, num_blocks=2, patch_width=16, text_width=t2i.text_width))


@cache
def predicted(name: str, checkpointed: bool) -> Cost:
    return measure_cost(lambda: build(name), checkpointed, torch.float32)


@pytest.mark.parametrize("name, checkpointed", [("sd", True), ("sdxl", False)])
def test_what_is_predicted_is_what_a_real_step_takes(name, checkpointed):
    cost = predicted(name, checkpointed)
    torch.manual_seed(0)
    t2i, model = build(name)
    if checkpointed:
        checkpoint_gradients(t2i)
    flops, kept = count_step(t2i, model, 3, torch.float32)
    assert flops == 3 * cost.flops
    assert kept == pytest.approx(cost.kept_once + 3 * cost.kept_per_picture, rel=0.01)
    assert cost.frozen == sum(p.numel() for p in t2i.parameters())
    assert cost.trained == sum(p.numel() for p in model.parameters())


def test_checkpointing_is_predicted_to_trade_memory_for_compute():
    plain, checkpointed = predicted("sd", False), predicted("sd", True)
    assert checkpointed.kept_per_picture < 0.7 * plain.kept_per_picture
    assert plain.flops < checkpointed.flops < 1.6 * plain.flops


# Source: the sizes of the weights that the hub holds of these models
PARAMETERS = {
    "sd15": [859_520_964, 123_060_480],
    "sd21": [865_910_724, 340_387_840],
    "sdxl": [2_567_463_684, 123_060_480, 694_659_840],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        t2i = build_published(PUBLISHED[name])
    parts = [t2i.denoiser, *t2i.text_encoders]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == PARAMETERS[name]
    assert sum(p.numel() for p in t2i.vae.parameters()) == 83_653_863
    assert t2i.image_size == {"sd15": 512, "sd21": 768, "sdxl": 1024}[name]
    assert t2i.text_width == {"sd15": 768, "sd21": 1024, "sdxl": 768 + 1280}[name]


COST = Cost(flops=1e12, kept_per_picture=1e9, kept_once=2e9, frozen=10**9, trained=10**8)
CONFIG = TrainConfig(batch_size=64, max_steps=100)
MACHINE = Machine(memory=20e9, flops=100e12, share=0.5, within_node=8e9, between_nodes=1e9, headroom=1.0)


def test_a_plan_fills_the_memory_and_adds_up():
    plan = make_plan(COST, CONFIG, MACHINE, 1)
    assert (plan.micro_batch, plan.accumulate) == (8, 8)  # 4 + 1.2 + 2 + 8 GB; 16 pictures would take 23.2
    assert plan.memory == pytest.approx(15.2e9)
    assert plan.step_seconds == pytest.approx(64 / 50)
    assert plan.images_per_second(CONFIG) == pytest.approx(50)
    assert plan.gpu_hours(CONFIG) == pytest.approx(128 / 3600)


def test_several_gpus_share_the_batch_and_exchange_gradients():
    eight, sixteen = (make_plan(COST, CONFIG, MACHINE, gpus) for gpus in (8, 16))
    assert eight.micro_batch * eight.accumulate == 8 and sixteen.micro_batch * sixteen.accumulate == 4
    assert eight.step_seconds == pytest.approx(8 / 50 + 2 * 7 / 8 * 0.4e9 / 8e9)
    assert sixteen.step_seconds == pytest.approx(4 / 50 + 2 * 15 / 16 * 0.4e9 / 1e9)
    assert eight.memory - make_plan(COST, CONFIG, MACHINE, 1).memory == pytest.approx(0.4e9)


def test_what_does_not_fit_is_said(monkeypatch):
    assert make_plan(COST, CONFIG, replace(MACHINE, memory=8e9), 1).micro_batch == 0
    monkeypatch.setattr("train.plan.measure_cost", lambda build, checkpointed: COST)
    result = CliRunner().invoke(main, ["--preset", "sd15", "--memory", "8", "--gpus", "1"])
    assert result.exit_code == 0 and "does not fit: one picture takes 9 GB" in result.output


def test_the_table_names_its_assumptions(monkeypatch):
    monkeypatch.setattr("train.plan.measure_cost", lambda build, checkpointed: COST)
    result = CliRunner().invoke(main, ["--preset", "sdxl"])
    assert result.exit_code == 0 and "790 TFLOP/s" in result.output and "35%" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[-3:]] == ["1", "8", "64"]


def test_gpus_that_cannot_share_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr("train.plan.measure_cost", lambda build, checkpointed: COST)
    result = CliRunner().invoke(main, ["--preset", "sd15", "--gpus", "3"])
    assert result.exit_code == 2 and "a batch of 2048 pictures cannot be shared by 3 GPUs" in result.output
