"""Textual inversion: it learns, pictures side by side do not touch each other, and the report holds every way."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train import invert
from train.arms import Conditioner
from train.data import load_pictures
from vilex.loss import diffusion_loss


@pytest.fixture
def start(pipeline):
    table = pipeline.t2i.text_encoders[0].embeddings.word_embeddings.weight
    return table[5:7].detach()[:, None].repeat(1, 3, 1)  # (2,3,D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_lower_their_pictures_own_loss(folder, pipeline, start, dtype):
    pipeline.to("cpu", dtype)
    pictures, conditioner = load_pictures(folder, image_size=32), Conditioner(pipeline)
    pixels = pictures.batch(torch.arange(2))
    *_, last = invert.invert(conditioner, pixels, start, 40, 0.3, 4, seed=0)
    noise = invert._noise(pipeline.t2i, 2, 64, torch.Generator().manual_seed(9))

    def loss(vectors):
        condition = conditioner.tokens(vectors).image.to("cpu", dtype)
        return diffusion_loss(pipeline.t2i, pipeline.t2i.denoiser, pixels_latents, condition, noise).item()

    pixels_latents = pipeline.t2i.encode(pixels)
    assert last.shape == start.shape
    assert loss(last) < loss(start)
    assert all(not parameter.grad_fn for parameter in pipeline.t2i.denoiser.parameters())


def test_one_pictures_gradient_does_not_reach_another(folder, pipeline, start):
    """With the noise held, a batch gives each picture the vectors that it gets alone."""
    pictures, conditioner = load_pictures(folder, image_size=32), Conditioner(pipeline)
    noise = invert.draw_noise(pipeline.t2i, 2, torch.Generator().manual_seed(0))
    pixels = pictures.batch(torch.arange(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invert, "_noise", lambda *args: noise)
        *_, both = invert.invert(conditioner, pixels, start, 3, 0.3, 1, seed=0)
        patch.setattr(invert, "_noise", lambda *args: noise.rows(slice(1, 2)))
        *_, alone = invert.invert(conditioner, pixels[1:], start[1:], 3, 0.3, 1, seed=0)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-3)
    assert (both - start).abs().min(2).values.max() > 0


def test_every_way_is_in_the_report(folder, stand_ins):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--steps", "1", "--draws", "1", "--limit", "3"]
    more = ["--tokens", "1,2", "--snapshots", "1,2", "--arms", "text,1", "--batch-size", "2"]
    result = CliRunner().invoke(invert.main, arguments + more)
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "inversion.json").read_text())
    free = [f"{n} free, {steps} steps" for n in (1, 2) for steps in (1, 2)]
    assert list(report["ways"]) == [*free, "text", "1"]
    assert 0 < report["ways"][free[0]]["seconds"] < report["ways"][free[1]]["seconds"]
    assert report["ways"]["1"]["seconds"] > 0 == report["ways"]["text"]["seconds"]
    lpips = {name: row["lpips"] for name, row in report["ways"].items()}
    assert lpips[free[0]] != lpips[free[1]] and lpips[free[0]] != lpips["1"]
    with Image.open(folder / "out" / "inversion.png") as sheet:
        assert sheet.width > 7 * 32


@pytest.mark.parametrize(("option", "value"), [("--tokens", "x"), ("--arms", "foo"), ("--snapshots", "")])
def test_bad_lists_are_refused_before_anything_is_loaded(folder, option, value):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), option, value]
    assert CliRunner().invoke(invert.main, arguments).exit_code == 2
