"""Training in two processes equals training in one that takes both shares of each batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import checkpoint, visible

TOLERANCE = 1e-5  # sums in another order differ by about 3e-7
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with both trainers' runs in one and in two processes."""
    folder = tmp_path_factory.mktemp("both-ways")
    script = Path(__file__).with_name("both_ways.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.skipif(not HAS_GLOO, reason="torch is built without gloo")
@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_two_processes_equal_one(kind, runs):
    one, two = checkpoint(runs / kind / "one"), checkpoint(runs / kind / "two")
    assert one["global_step"] == two["global_step"] == 3
    assert losses(runs / kind / "two") == pytest.approx(losses(runs / kind / "one"), abs=TOLERANCE)
    assert one["module"].keys() == two["module"].keys()
    for name, expected in one["module"].items():
        moved = visible(name, two["module"][name]) - visible(name, expected)
        assert not len(moved) or moved.abs().max() < TOLERANCE, name
