"""The same picture, settings and seed give the same result from app, API, command line and PNG; 20 steps, real weights.

In fp32: in bf16 the smallest difference, such as another number of threads, can grow to three levels of 255 on average.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from tests.e2e.conftest import MODEL, ROOT, START_SECONDS, Server, serve
from tests.e2e.test_app import CACTUS

PROMPT = "<image>, in the style of Claude Monet"
SETTINGS = {
    "seed": 11, "num_inference_steps": 20, "tfg_scale": 2, "view": "raw", "prompt": PROMPT, "num_tokens": 16,
}  # fmt: skip
EXACT = {"VILEX_DTYPE": "float32"}
FLAGS = ("--model", MODEL, "--steps", "20", "--raw", "--tokens", "16", "--tfg", "2", "--prompt", PROMPT)


def levels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def apart(first: Path | str, second: Path | str) -> float:
    """Mean difference of two pictures in levels of 255."""
    return float(np.abs(levels(first) - levels(second)).mean())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("exact"), **EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def drawn(server: Server) -> list[str]:
    """Two pictures that the app drew in one request."""
    return draw(server, num_images=2, embed=True)


def draw(server: Server, **changes: Any) -> list[str]:
    client = Client(server.url, verbose=False)
    gallery, *_ = client.predict(picture=handle_file(str(CACTUS)), **SETTINGS | changes, api_name="/generate")
    return [item["image"] for item in gallery]


def run(*arguments: str | Path) -> None:
    command, environment = [sys.executable, "-m", "vilex", *map(str, arguments)], os.environ | EXACT
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    assert result.returncode == 0, result.stderr


def test_a_request_repeated_is_equal_and_a_picture_alone_is_alike(server: Server, drawn: list[str]) -> None:
    again = draw(server, num_images=2)
    assert [levels(path).tolist() for path in again] == [levels(path).tolist() for path in drawn]
    [alone] = draw(server, num_images=1, seed=12)
    assert apart(alone, drawn[1]) <= 1 < apart(alone, drawn[0])


def test_the_command_line_draws_what_the_app_draws(server: Server, tmp_path: Path) -> None:
    drawn = draw(server, num_images=2)
    run("mix", CACTUS, *FLAGS, "--seed", "11", "--count", "2", "--out", tmp_path)
    for ours, theirs in zip(sorted(tmp_path.glob("*.png")), drawn, strict=True):
        assert apart(ours, theirs) <= 0.05


def redone(png: Path | str, *arguments: str | Path, out: Path) -> Path:
    run("redo", png, "--model", MODEL, *arguments, "--raw", "--out", out)
    [again] = out.glob("*.png")
    return again


def test_a_png_is_drawn_again_from_its_photo(server: Server, tmp_path: Path) -> None:
    first, second = draw(server, num_images=2)
    again = redone(second, "--photo", CACTUS, out=tmp_path)
    assert apart(again, second) <= 0.05 < apart(again, first)


def test_a_png_is_drawn_again_from_its_tokens(drawn: list[str], tmp_path: Path) -> None:
    """Which are rounded to one byte a number."""
    again = redone(drawn[1], out=tmp_path)
    assert apart(again, drawn[1]) <= 1 < apart(again, drawn[0])
