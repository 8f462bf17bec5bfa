"""Evaluation end to end, with a small stand-in for each measuring net."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import train.evaluate as evaluate
from train.data import load_pictures
from train.nets import Extractor
from vilex.config import GenerationConfig


class TinyNet(Extractor):
    size = 8
    description = "mean colours"

    def __init__(self, key):
        super().__init__()
        self.key = key

    def features(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)  # (B,12)

    def logits(self, features):
        return features * 4


class TinyLpips(nn.Module):
    def forward(self, pixels, reference):
        return (pixels - reference).square().mean((1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        Image.new("RGB", (32, 32), (40 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(["red dog", "green cat"][i % 2])
    return tmp_path


@pytest.fixture
def stand_ins(monkeypatch, pipeline):
    monkeypatch.setattr(evaluate, "load_vgg", lambda: TinyNet("vgg"))
    monkeypatch.setattr(evaluate, "load_efficientnet", lambda: TinyNet("eff"))
    monkeypatch.setattr(evaluate, "load_lpips", lambda net: TinyLpips())
    monkeypatch.setattr(evaluate.VilexPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)


def run(folder, *extra):
    arguments = ["--data", str(folder), "--steps", "1", "--out", str(folder / "out"), "--arms", "text,dense,1,4"]
    return CliRunner().invoke(evaluate.main, [*arguments, *extra])


def test_metrics_figure_and_samples_are_written(folder, stand_ins):
    result = run(folder, "--gallery", str(folder))
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "metrics.json").read_text())
    assert set(report["arms"]) == {"text", "dense", "1", "4"}
    assert report["pictures"] == 5
    assert report["measures"][0].startswith("FD-vgg: mean colours")
    assert {"fd_vgg", "kid_vgg", "fd_eff", "is_eff", "lpips", "colour_error_16x16"} <= set(report["arms"]["4"])
    assert report["real_floor"]["fd_vgg"] == pytest.approx(0, abs=1e-5)  # the gallery is the same folder here
    ratio = report["arms"]["4"]["lpips"] / report["arms"]["text"]["lpips"]
    assert report["ratios"]["lpips_4_over_text"] == pytest.approx(ratio)
    with Image.open(folder / "out" / "samples.png") as sheet:
        assert sheet.width > 5 * 32
    with Image.open(folder / "out" / "metrics.png") as figure:
        assert figure.width > figure.height


@pytest.mark.parametrize("arms", ["foo", "1,512", "0", "text,"])
def test_bad_arms_are_refused_before_anything_is_loaded(folder, arms):
    result = CliRunner().invoke(evaluate.main, ["--data", str(folder), "--out", str(folder), "--arms", arms])
    assert result.exit_code == 2
    assert "an arm is text, dense or a number of tokens from 1 to 511" in result.output


def test_more_tokens_than_the_weights_have_are_refused_before_anything_is_drawn(folder, stand_ins):
    result = run(folder, "--arms", "1,76")
    assert result.exit_code == 2 and not (folder / "out").exists()
    assert "num_tokens must be between 1 and 75, got 76" in " ".join(result.output.split())


def test_a_bad_path_is_one_sentence(folder):
    result = CliRunner().invoke(evaluate.main, ["--model", "/nowhere", "--data", str(folder), "--out", str(folder)])
    assert result.exit_code == 2
    assert "no weights at '/nowhere'" in result.output


def test_a_sample_depends_on_its_picture_and_seed_not_on_its_batch(folder, pipeline):
    pictures = load_pictures(folder, image_size=32)
    config = GenerationConfig(num_inference_steps=2)
    for arm in ("text", "dense", "4"):
        whole = evaluate.draw_arm(pipeline, pictures, arm, config, batch_size=5).samples
        parts = evaluate.draw_arm(pipeline, pictures, arm, config, batch_size=2).samples
        assert (whole.int() - parts.int()).abs().max() <= 2


def test_perfect_samples_measure_zero(folder, stand_ins):
    pictures = load_pictures(folder, image_size=32)
    judge = evaluate.Judge(pictures, None, "cpu")
    measured = judge.measure(judge.real)
    assert measured["lpips"] == 0
    assert measured["colour_error_16x16"] == 0
    assert measured["colour_error_16x16_other_picture"] > 0.05
    assert measured["fd_vgg"] == pytest.approx(0, abs=1e-5)
    worse = judge.measure(torch.zeros_like(judge.real))
    assert worse["lpips"] > 0
    assert worse["fd_vgg"] > 0.01
