"""Textual inversion: it learns, pictures side by side do not touch each other, and the report holds every way."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train.arms import Conditioner
from train.data import load_pictures
from train.invert import InversionConfig, invert, main
from vilex.diffusion import Conditioning
from vilex.loss import diffusion_loss, draw_noise


@pytest.fixture
def start(pipeline):
    table = pipeline.t2i.text_encoders[0].embeddings.word_embeddings.weight
    return table[5:7].detach()[:, None].repeat(1, 3, 1)  # (2,3,D)


CONFIG = InversionConfig(learning_rate=0.3, draws=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_lower_their_pictures_own_loss(folder, pipeline, start, dtype):
    pipeline.to("cpu", dtype)
    t2i, conditioner = pipeline.t2i, Conditioner(pipeline)
    pixels = load_pictures(folder, image_size=32).batch(torch.arange(2))
    *_, last = invert(conditioner, pixels, start, 40, CONFIG)
    noise, latents = draw_noise(t2i, 64, torch.Generator().manual_seed(9), 5.0), t2i.encode(pixels)

    def losses(vectors):
        conditions = conditioner.read(vectors).to("cpu", dtype)
        return [
            diffusion_loss(t2i, t2i.denoiser, latents[i : i + 1], select(conditions, i), noise).item() for i in (0, 1)
        ]

    assert last.shape == start.shape
    assert all(after < before for after, before in zip(losses(last), losses(start), strict=True))
    assert all(parameter.grad is None for parameter in t2i.parameters())


def select(condition, row):
    return Conditioning(*(None if x is None else x[row : row + 1] for x in vars(condition).values()))


def test_a_pictures_vectors_do_not_depend_on_its_batch(folder, pipeline, start):
    pixels = load_pictures(folder, image_size=32).batch(torch.arange(2))
    *_, both = invert(Conditioner(pipeline), pixels, start, 3, CONFIG)
    *_, alone = invert(Conditioner(pipeline), pixels[1:], start[1:], 3, CONFIG, first=1)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-3)
    assert (both - start).abs().amax(2).min() > 0  # every vector has moved


def test_a_loss_that_is_not_finite_is_reported(folder, pipeline, start, monkeypatch):
    pixels = load_pictures(folder, image_size=32).batch(torch.arange(2))
    with torch.no_grad():
        pipeline.t2i.denoiser.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        next(invert(Conditioner(pipeline), pixels, start, 3, CONFIG))


def test_every_way_is_in_the_report(folder, stand_ins):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--steps", "1", "--draws", "1", "--limit", "3"]
    more = ["--tokens", "1,2", "--snapshots", "1,2", "--arms", "text,1,4", "--batch-size", "2", "--polish", "2"]
    result = CliRunner().invoke(main, arguments + more)
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "inversion.json").read_text())
    free = [f"{n} free, {steps} steps" for n in (1, 2) for steps in (1, 2)]
    polished = [f"{n} polished, 2 steps" for n in (1, 4)]
    assert list(report["ways"]) == [*free, *polished, "text", "1", "4"]
    assert report["ways"][polished[0]]["seconds"] == report["ways"][polished[1]]["seconds"] > 0
    assert 0 < report["ways"][free[0]]["seconds"] < report["ways"][free[1]]["seconds"]
    assert report["ways"]["1"]["seconds"] > 0 == report["ways"]["text"]["seconds"]
    lpips = {name: row["lpips"] for name, row in report["ways"].items()}
    assert len({lpips[name] for name in (free[0], free[1], *polished, "1", "4")}) == 6
    with Image.open(folder / "out" / "inversion.png") as sheet:
        assert sheet.width > 7 * 32


def test_a_model_without_encoder_is_inverted_too(folder, stand_ins, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "vilex", None)
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--steps", "1", "--draws", "1", "--limit", "2"]
    result = CliRunner().invoke(main, [*arguments, "--tokens", "1", "--snapshots", "1", "--arms", "text"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*arguments, "--tokens", "300", "--arms", "text"])
    assert result.exit_code == 2 and "tokens must be between 1 and 22, got 300" in " ".join(result.output.split())


def test_polish_needs_to_know_how_many_tokens_to_draw(folder):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--polish", "3", "--arms", "text"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "--polish needs a number of tokens in --arms, got 'text'" in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--tokens", "x", "whole numbers between 1 and 511"), ("--tokens", "0", "whole numbers between 1 and 511"),
     ("--snapshots", "", "whole numbers between 1 and 10000"), ("--snapshots", "1.5", "whole numbers between 1"),
     ("--arms", "foo", "an arm is text, dense or a number"), ("--draws", "0", "draws must be between 1 and 64, got 0"),
     ("--learning-rate", "-1", "learning_rate must be between 0.0001 and 100, got -1"),
     ("--seed", "4294967296", "seed must be between 0 and"), ("--polish", "1001", "not in the range 0<=x<=1000")],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_loaded(folder, option, value, message):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), option, value]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
