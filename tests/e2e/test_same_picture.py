"""The same picture, settings and seed give the same result from app, API, command line and PNG; 20 steps, real weights.

The bounds are those of bf16: what is drawn in batches of other sizes differs by a level of 255 on average.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gradio_client import Client, handle_file
from PIL import Image

from tests.e2e.conftest import MODEL, Server
from tests.e2e.test_app import CACTUS
from vilex.cli import main

PROMPT = "<image>, in the style of Claude Monet"
# DDPM: in bfloat16 a picture alone and in a batch come 1.2 levels apart by sde-dpm++, which fp32 tests elsewhere
SETTINGS = {
    "seed": 11, "num_inference_steps": 20, "tfg_scale": 2, "view": "raw", "prompt": PROMPT, "num_tokens": 16,
    "scheduler": "ddpm",
}  # fmt: skip
FLAGS = ("--model", MODEL, "--steps", "20", "--raw", "--tokens", "16", "--tfg", "2", "--prompt", PROMPT)


def levels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def apart(first: Path | str, second: Path | str) -> float:
    """Mean difference of two pictures in levels of 255."""
    return float(np.abs(levels(first) - levels(second)).mean())


@pytest.fixture(scope="module")
def drawn(server: Server) -> list[str]:
    """Two pictures that the app drew in one request."""
    return draw(server, num_images=2, embed=True)


def draw(server: Server, **changes: Any) -> list[str]:
    client = Client(server.url, verbose=False)
    gallery, *_ = client.predict(picture=handle_file(str(CACTUS)), **SETTINGS | changes, api_name="/generate")
    return [item["image"] for item in gallery]


def run(*arguments: str | Path) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def test_a_request_repeated_is_equal_and_a_picture_alone_is_alike(server: Server, drawn: list[str]) -> None:
    again = draw(server, num_images=2)
    assert [levels(path).tolist() for path in again] == [levels(path).tolist() for path in drawn]
    [alone] = draw(server, num_images=1, seed=12)
    assert apart(alone, drawn[1]) <= 1 < apart(alone, drawn[0])


def test_the_command_line_draws_what_the_app_draws(server: Server, tmp_path: Path) -> None:
    drawn = draw(server, num_images=2, scheduler="auto")
    run("mix", CACTUS, *FLAGS, "--seed", "11", "--count", "2", "--out", tmp_path)
    for ours, theirs in zip(sorted(tmp_path.glob("*.png")), drawn, strict=True):
        assert apart(ours, theirs) <= 1


def test_a_png_is_drawn_again_from_its_photo_and_from_its_tokens(drawn: list[str], tmp_path: Path) -> None:
    run("redo", drawn[1], "--model", MODEL, "--photo", CACTUS, "--raw", "--out", tmp_path / "photo")
    run("redo", drawn[1], "--model", MODEL, "--raw", "--out", tmp_path / "tokens")
    for folder, bound in (("photo", 1), ("tokens", 3)):  # tokens in a PNG are rounded to one byte a number
        [again] = (tmp_path / folder).glob("*.png")
        assert apart(again, drawn[1]) <= bound < apart(again, drawn[0])
