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
    result = run(folder, "--guidance", "1,3", "--low", "0,0.5")
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out" / "sweep.json").read_text())
    rows = report["rows"]
    assert len({(r["arm"], *(r[key] for key in sweep.SWEPT)) for r in rows}) == len(rows) == 2 * 2 * 2 * 2
    for arm in ("text", "4"):
        own = [row for row in rows if row["arm"] == arm]
        best = min(own, key=lambda row: row["fd_vgg"])
        assert report["best"][arm] == {key: best[key] for key in sweep.SWEPT}
        assert max(row["fd_vgg"] for row in own) > best["fd_vgg"]  # the settings matter
    loaded = sweep.load_best(folder / "out" / "sweep.json")
    assert {arm: config.guidance_scale for arm, config in loaded.items()} == {
        arm: settings["guidance_scale"] for arm, settings in report["best"].items()
    }
    with Image.open(folder / "out" / "sweep.png") as figure:
        assert figure.width > figure.height


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--guidance", "1,x", "expects numbers between commas, got '1,x'"),
     ("--guidance", "30", "guidance_scale must be between 0 and 20"),
     ("--low", "2", "guidance_low must be between 0 and 1"),
     ("--steps", "1.5", "num_inference_steps must be a whole number")],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_loaded(folder, option, value, message):
    result = run(folder, option, value)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
