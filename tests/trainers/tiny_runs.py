"""Runs of both trainers at width 8: their command lines, the runs themselves, and single steps of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import training
from click.testing import Result
from torch import Tensor
from training import reset_accelerate

from train import train_t2i, train_vilex
from train.presets import PRESETS
from train.run import RunOptions, load_data, override
from train.state import _step
from vilex.diffusion import load_t2i

TINY = PRESETS["tiny"]
MAINS = {"t2i": train_t2i.main, "vilex": train_vilex.main}
QUIET = ["--fp32"]  # bf16 would blur what is compared


class Interrupted(Exception):
    pass


def arguments(kind: str, files: SimpleNamespace, out: Path) -> list[str]:
    shared = ["--preset", "tiny", "--data", str(files.data), "--text-encoder", str(files.text), "--out", str(out)]
    return shared + QUIET + (["--t2i", str(files.t2i)] if kind == "vilex" else [])


def invoke(kind: str, files: SimpleNamespace, out: Path, *more: str) -> Result:
    return training.invoke(MAINS[kind], *arguments(kind, files, out), *more)


def succeed(kind: str, files: SimpleNamespace, out: Path, *more: str) -> Result:
    return training.succeed(MAINS[kind], *arguments(kind, files, out), *more)


def build_run(kind: str, files: SimpleNamespace, out: Path, accumulate: int = 1, **settings: float):
    """A run that is ready for its first step."""
    reset_accelerate()
    config = override(getattr(TINY, kind), settings)
    pictures, _ = load_data(32, [files.data])
    options = RunOptions(out, accumulate, fp32=True)
    if kind == "t2i":
        t2i = train_t2i.build_model(TINY, str(files.text), None, config.seed)
        return train_t2i.T2IRun(t2i, pictures, None, TINY, config, options)
    t2i = load_t2i(files.t2i, str(files.text))
    model = train_vilex.build_model(TINY, t2i, seed=config.seed)
    return train_vilex.VilexRun(t2i, model, pictures, None, TINY, config, options)


def take_steps(run, count: int, fixed_step: int | None = None) -> list[float]:
    """Losses of optimiser steps; with fixed_step, all on that step's pictures, noise and token count."""

    def loss(global_step: int, micro: int) -> Tensor:
        return run.loss(global_step if fixed_step is None else fixed_step, micro)

    return [_step(run.state, run.model, loss)[0].item() for _ in range(count)]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
