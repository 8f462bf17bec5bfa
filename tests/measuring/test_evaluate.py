"""Evaluation end to end, with a small stand-in for each measuring net."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train import arms, evaluate
from train.data import load_pictures
from train.judge import Judge
from vilex.config import GenerationConfig


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
        whole = arms.draw_arm(pipeline, pictures, arm, config, batch_size=5)
        parts = arms.draw_arm(pipeline, pictures, arm, config, batch_size=2)
        assert (whole.int() - parts.int()).abs().max() <= 2


def test_perfect_samples_measure_zero(folder, stand_ins):
    pictures = load_pictures(folder, image_size=32)
    judge = Judge(pictures, None, "cpu")
    measured = judge.measure(judge.real)
    assert measured["lpips"] == 0
    assert measured["colour_error_16x16"] == 0
    assert measured["colour_error_16x16_other_picture"] > 0.05
    assert measured["fd_vgg"] == pytest.approx(0, abs=1e-5)
    worse = judge.measure(torch.zeros_like(judge.real))
    assert worse["lpips"] > 0
    assert worse["fd_vgg"] > 0.01


def test_kept_samples_are_drawn_once_and_belong_to_their_settings(folder, pipeline, monkeypatch):
    pictures, kept = load_pictures(folder, image_size=32), folder / "kept"
    config = GenerationConfig(num_inference_steps=2)
    first = {arm: arms.draw_arm(pipeline, pictures, arm, config, keep=kept) for arm in ("text", "4")}
    monkeypatch.setattr(arms, "draw", None)  # nothing can be drawn any more
    for arm, samples in first.items():
        assert torch.equal(arms.draw_arm(pipeline, pictures, arm, config, keep=kept), samples)
    with pytest.raises(TypeError):
        arms.draw_arm(pipeline, pictures, "4", GenerationConfig(num_inference_steps=3), keep=kept)
    with torch.no_grad():
        next(pipeline.vilex.parameters()).add_(1)
    del pipeline.fingerprint
    assert torch.equal(arms.draw_arm(pipeline, pictures, "text", config, keep=kept), first["text"])
    with pytest.raises(TypeError):  # another encoder
        arms.draw_arm(pipeline, pictures, "4", config, keep=kept)


def test_each_arm_is_drawn_at_its_best_of_a_sweep(folder, stand_ins):
    best = {
        arm: {"guidance_scale": i + 1.5, "guidance_low": 0.5, "num_inference_steps": 1} for i, arm in enumerate("14")
    }
    (folder / "sweep.json").write_text(json.dumps({"best": best}))
    result = run(folder, "--arms", "1,4", "--sweep", str(folder / "sweep.json"))
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "out" / "metrics.json").read_text())["settings"] == best


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "is not a sweep.json"), ("[1]", "is not a sweep.json"), ("no", "is not a sweep.json"),
     ('{"best": {"1": {"guidance_scale": 99}}}', "guidance_scale must be between 0 and 20, got 99"),
     ('{"best": {"1": {}}}', "has no best settings for 4, it has 1")],
)  # fmt: skip
def test_a_bad_sweep_is_one_sentence(folder, stand_ins, content, message):
    (folder / "sweep.json").write_text(content)
    result = run(folder, "--arms", "1,4", "--sweep", str(folder / "sweep.json"))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
