"""Fixtures of the tests of the app's tabs: the handlers over a tiny random pipeline, and two cards with pictures."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app import restore
from app.handlers import Handlers
from vilex.pipeline import VilexPipeline

assert app


@pytest.fixture
def handlers(pipeline: VilexPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handlers]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    handlers = Handlers(pipeline)
    yield handlers
    handlers.engine.close()


@pytest.fixture
def empty() -> Handlers:
    """Without weights."""
    return Handlers(None, problem="no weights; get them with: hf download a/b")


@pytest.fixture
def cards(picture: Image.Image, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a request: the picture in A, with 6 tokens, the picture turned in B, with 4; seed 5, 3 steps."""
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    picture.save(folder / "corner.png")
    picture.rotate(180).save(folder / "turned.png")
    a, b = ({"path": str(folder / name), "orig_name": name} for name in ("corner.png", "turned.png"))
    settings = {"seed": 5, "num_inference_steps": 3}
    return {"picture": a, "num_tokens": 6, "picture_2": b, "num_tokens_2": 4, "name": "A", "name_2": "B"} | settings


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page remarks when it brings something back."""
    remarks: list[str] = []
    monkeypatch.setattr(restore, "tell", remarks.append)
    return remarks
