"""Sweeps: every combination is a row, and the best of each arm is the nearest to real pictures."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from train import sweep


def run(folder, *extra):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--arms", "text,4", "--steps", "1,2"]
    return CliRunner().invoke(sweep.main, [*arguments, *extra])


def test_all_combinations_are_measured_and_the_best_kept(folder, stand_ins):
    result = run(folder, "--guidance", "1,3", "--low", "0,0.5", "--scheduler", "ddim")
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "sweep.json").read_text())
    rows = report["rows"]
    assert len({(r["arm"], *(r[key] for key in sweep.SWEPT)) for r in rows}) == len(rows) == 2 * 2 * 2 * 2
    for arm in ("text", "4"):
        own = [row for row in rows if row["arm"] == arm]
        best = min(own, key=lambda row: row["fd_vgg"])
        assert report["best"][arm] == {key: best[key] for key in sweep.SWEPT}
        assert max(row["fd_vgg"] for row in own) > best["fd_vgg"]  # the settings matter
    assert report["scheduler"] == "ddim"
    loaded = sweep.load_best(folder / "out" / "sweep.json", report["fingerprint"])
    assert {arm: config.guidance_scale for arm, config in loaded.items()} == {
        arm: settings["guidance_scale"] for arm, settings in report["best"].items()
    }
    assert {config.scheduler for config in loaded.values()} == {"ddim"}
    with Image.open(folder / "out" / "sweep.png") as figure:
        assert figure.width > figure.height


def test_lines_are_named_by_what_tells_them_apart():
    rows = [
        {"arm": arm, "guidance_scale": 2.0, "guidance_low": low, "num_inference_steps": steps}
        for arm in ("text", "4") for low in (0.0, 0.5) for steps in (5, 10)
    ]  # fmt: skip
    groups = sweep.group_rows(rows, ["arm", "guidance_low"])
    names = ["text, guidance low 0", "text, guidance low 0.5", "4, guidance low 0", "4, guidance low 0.5"]
    assert list(groups) == names
    assert all([row["num_inference_steps"] for row in points] == [5, 10] for points in groups.values())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--guidance", "1,x", "numbers between 0 and 20 with commas between them, got '1,x'"),
     ("--guidance", "30", "numbers between 0 and 20 with commas between them, got '30'"),
     ("--low", "nan", "numbers between 0 and 1 with commas between them, got 'nan'"),
     ("--steps", "1.5", "whole numbers between 1 and 100 with commas between them, got '1.5'"),
     ("--arms", "1,foo", "an arm is text, dense or a number of tokens")],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_loaded(folder, option, value, message):
    result = run(folder, option, value)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_more_tokens_than_a_prompt_holds_are_refused(folder, stand_ins):
    result = run(folder, "--arms", "75")
    assert result.exit_code == 2
    assert "num_tokens must be between 1 and 22, got 75" in " ".join(result.output.split())
