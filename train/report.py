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
from train.sources import expand
from vilex.config import SCHEDULERS, GenerationConfig, Range, check_range
from vilex.images import contact_sheet, from_levels, to_images
from vilex.pipeline import VilexPipeline
from vilex.recipe import environment


class Numbers(click.ParamType):
    """Numbers between commas, each within a range."""

    name = "numbers"

    def __init__(self, minimum: float, maximum: float, whole: bool = False) -> None:
        self.range, self.whole = Range(minimum, maximum), whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float] | list[int]:
        """The numbers; click names the option when there is something else."""
        if not isinstance(value, str):
            return value
        try:
            numbers = [int(part) if self.whole else float(part) for part in value.split(",")]
            for number in numbers:
                check_range("a number", number, self.range)
        except ValueError:
            kind = "whole numbers" if self.whole else "numbers"
            bounds = f"{self.range.minimum:g} and {self.range.maximum:g}"
            self.fail(f"expects {kind} between {bounds} with commas between them, got {value!r}", param, ctx)
        return numbers


LoadPipeline = Callable[[], VilexPipeline]

_OPTIONS = (
    click.option("--model", help="Weights: a folder, a name in assets/weights or a hub id."),
    click.option("--device", help="cpu, cuda, ..."),
    click.option("--dtype", help="float32, bfloat16, float16."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch."),
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to."),
)
scheduler_option = click.option(
    "--scheduler", type=click.Choice(SCHEDULERS), default=GenerationConfig.scheduler, show_default=True
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


def provenance(pipeline: VilexPipeline, tables: Sequence[str]) -> dict[str, Any]:
    """The model, the tables it was measured on and the versions of what measured it."""
    return {
        "model": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "tables": table_hashes(tables),
        "environment": environment(),
    }


def table_hashes(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each file that the sources stand for, by its name."""
    return {Path(part).name: sha256(part) for part in expand(sources) if Path(part).is_file()}


def save_sheet(path: Path, samples: Mapping[str, Tensor], count: int) -> None:
    """A PNG with a row for each of the first pictures, a column for each of `samples`, levels (S,3,H,W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [to_images(from_levels(levels[:count])) for levels in samples.values()]
    contact_sheet(list(zip(*columns, strict=True)), column_labels=list(samples)).save(path)


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON, and the folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
