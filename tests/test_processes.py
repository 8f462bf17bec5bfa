"""Training in two processes, with or without FSDP, equals training in one that takes both shares of each batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import assert_same, checkpoint, visible

from train.sharding import gather, split_like
from vilex.model import load_vilex

TOLERANCE = 1e-5  # sums in another order differ by about 3e-7
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with both trainers' runs in one process, in two, and in one after the other."""
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
@pytest.mark.parametrize(
    "kind, how",
    [("t2i", "two"), ("t2i", "stream-two"), ("vilex", "two"), ("vilex", "one-two"), ("vilex", "one-split"),
     ("vilex", "split-one")],
)  # fmt: skip
def test_more_processes_equal_one(kind, how, runs):
    """one-two: two steps in one process, then the run is resumed in two; split: two processes with FSDP.

    stream: pictures of shards, each process with a worker that reads its share; the run in two is resumed once.
    """
    alone = "stream-one" if how.startswith("stream") else "one"
    one, other = checkpoint(runs / kind / alone), checkpoint(runs / kind / how)
    assert one["global_step"] == other["global_step"] == 4
    assert losses(runs / kind / how) == pytest.approx(losses(runs / kind / alone), abs=TOLERANCE)
    assert one["module"].keys() == other["module"].keys()
    for name, expected in one["module"].items():
        moved = visible(name, other["module"][name]) - visible(name, expected)
        assert not len(moved) or moved.abs().max() < TOLERANCE, name


@pytest.mark.skipif(not HAS_GLOO, reason="torch is built without gloo")
@pytest.mark.parametrize("how", ["one-split", "split-one"])
def test_weights_of_a_split_run_are_whole(how, runs):
    expected, written = (load_vilex(runs / "vilex" / name / "weights").state_dict() for name in ("one", how))
    for name, tensor in expected.items():
        difference = visible(name, written[name]) - visible(name, tensor)
        assert not len(difference) or difference.abs().max() < 2e-3, name  # they are in half precision


@pytest.mark.skipif(not HAS_GLOO, reason="torch is built without gloo")
def test_two_processes_train_one_row_after_the_other(runs):
    rows = json.loads((runs / "ablate" / "two" / "ablations.json").read_text())
    assert list(rows) == ["blocks-2", "image-only"] and all(row["steps"] == 2 for row in rows.values())


def test_split_trees_keep_what_is_not_split():
    tree = {"module": {"a": torch.ones(2)}, "list": [torch.zeros(1), 3], "step": 4}
    assert_same(gather(tree), tree)
    assert_same(split_like(tree, {"module": {"a": torch.ones(2)}, "list": [0, 1]}), tree)
