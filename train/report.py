"""What all measuring scripts share: the model's options, and what their JSON says about a measurement."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from train.data import sha256
from train.run import start
from vilex.images import contact_sheet, from_levels, to_images
from vilex.pipeline import VilexPipeline
from vilex.recipe import environment

LoadPipeline = Callable[[], VilexPipeline]

_OPTIONS = (
    click.option("--model", help="Weights: a folder, a name in assets/weights or a hub id."),
    click.option("--device", help="cpu, cuda, ..."),
    click.option("--dtype", help="float32, bfloat16, float16."),
    click.option("--threads", type=int, help="CPU threads of torch."),
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to."),
)


def measuring_options(command: Callable) -> Callable:
    """Options for the model and --out; the command gets `load`, which gives the pipeline, in place of the former."""

    @functools.wraps(command)
    def run(model: str | None, device: str | None, dtype: str | None, threads: int | None, **given: Any) -> None:
        start(threads)
        command(load=lambda: VilexPipeline.from_pretrained(model, device=device, dtype=dtype), **given)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


def describe(pipeline: VilexPipeline, tables: Sequence[str]) -> dict[str, Any]:
    """The model, the tables it was measured on and the versions of what measured it."""
    return {
        "model": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "tables": {Path(table).name: sha256(table) for table in tables if Path(table).is_file()},
        "environment": environment(),
    }


def save_sheet(path: Path, samples: Mapping[str, Tensor], count: int) -> None:
    """A PNG with a row for each of the first pictures, a column for each of `samples`, levels (S,3,H,W) uint8."""
    columns = [to_images(from_levels(levels[:count])) for levels in samples.values()]
    contact_sheet(list(zip(*columns, strict=True)), column_labels=list(samples)).save(path)


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON, and the folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
