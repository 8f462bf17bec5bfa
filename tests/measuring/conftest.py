"""Five pictures, and small stand-ins for the measuring nets."""

from pathlib import Path

import pytest
from judging import TinyLpips, TinyNet
from PIL import Image

from train import judge
from vilex.pipeline import VilexPipeline


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five plain pictures with captions."""
    for i in range(5):
        Image.new("RGB", (32, 32), (40 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(["red dog", "green cat"][i % 2])
    return tmp_path


@pytest.fixture
def stand_ins(monkeypatch, pipeline) -> None:
    """Every measuring script gets the tiny pipeline and the tiny nets."""
    monkeypatch.setattr(judge, "load_vgg", lambda: TinyNet("vgg"))
    monkeypatch.setattr(judge, "load_efficientnet", lambda: TinyNet("eff"))
    monkeypatch.setattr(judge, "load_lpips", lambda net: TinyLpips())
    monkeypatch.setattr(VilexPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
