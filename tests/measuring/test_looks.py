"""The grids to look at: their cells are what the pipeline draws."""

from itertools import chain

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from train import looks
from vilex.config import GenerationConfig


def test_there_are_64_different_prompts_over_eight_kinds():
    assert [len(set(prompts)) for prompts in looks.PROMPTS.values()] == [8] * 8
    assert len(set(chain.from_iterable(looks.PROMPTS.values()))) == 64


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(looks, "GenerationConfig", lambda **kw: GenerationConfig(num_inference_steps=1, **kw))
    monkeypatch.setattr(looks, "TEXTS", ("<image>, red", "<image> on a beach"))
    monkeypatch.setattr(looks, "PROMPTS", {"dog": ("a red dog", "a blue dog")})


def run(folder, *extra):
    arguments = [
        "--pictures",
        str(folder),
        "--out",
        str(folder / "out"),
        "--mixed",
        "0,3",
        "--tfg",
        "0,2",
        "--words-scale",
        "3",
    ]
    return CliRunner().invoke(looks.main, [*arguments, *extra])


def test_all_sheets_are_written(folder, stand_ins, few):
    result = run(folder, "--mix-tokens", "4")
    assert result.exit_code == 0, result.output
    with Image.open(folder / "out" / "looks.png") as sheet:
        assert sheet.width > 13 * 32 and sheet.height > 5 * 32
    with Image.open(folder / "out" / "mixes.png") as sheet:
        assert sheet.width > 8 * 32 and sheet.height > 2 * 32
    with Image.open(folder / "out" / "prompts.png") as sheet:
        assert sheet.width > 2 * 32


def test_a_cell_is_the_pipelines_picture(pipeline, picture, monkeypatch):
    monkeypatch.setattr(looks, "TEXTS", ("<image>, red",))
    config = GenerationConfig(num_inference_steps=1, tfg_scale=3.0)
    sheet = np.asarray(looks.draw_mixes(pipeline, [picture], {"tfg 3": config}))
    drawn = np.asarray(pipeline.generate("<image>, red", [picture], config).images[0])
    windows = np.lib.stride_tricks.sliding_window_view(sheet, drawn.shape)[:, :, 0]
    assert (windows == drawn).all((-3, -2, -1)).any()


def test_a_picture_that_is_not_there_is_named(folder, stand_ins):
    result = run(folder, "--mixed", "0,whale")
    assert result.exit_code == 2
    assert "has no picture whale, it has 0, 1, 2, 3, 4" in " ".join(result.output.split())
