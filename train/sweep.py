"""Draws training pictures at several guidances and steps, and says at which each arm is nearest to real pictures.

    python -m train.sweep --model nano --data pictures64-train-05-of-06.parquet --limit 1000 \
        --guidance 1,1.5,2,3,5 --steps 10 --out runs/sweep

Writes sweep.json, which `train.evaluate --sweep` reads, and sweep.png. Held-out pictures are never used to choose.
"""

import json
import logging
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click
import matplotlib.pyplot as plt

from train.arms import DEFAULT_ARMS, draw_arm, parse_arms
from train.data import load_pictures
from train.judge import Judge
from train.report import LoadPipeline, describe, measuring_options, save_report
from train.run import usage_errors
from vilex.config import GenerationConfig

log = logging.getLogger(__name__)
SWEPT = ("guidance_scale", "guidance_low", "num_inference_steps")
JUDGED_BY = "fd_vgg"  # the lowest is best
_PANELS = {"fd_vgg": "Fréchet distance (VGG16)", "lpips": "LPIPS (AlexNet)"}


def parse_numbers(text: str) -> list[float]:
    """Numbers between commas; raises ValueError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expects numbers between commas, got {text!r}") from error


def best_rows(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per arm the settings of the row whose distance is lowest."""
    best = {}
    for row in sorted(rows, key=lambda row: row[JUDGED_BY]):
        best.setdefault(row["arm"], {key: row[key] for key in SWEPT})
    return best


def load_best(path: Path) -> dict[str, GenerationConfig]:
    """Per arm its best settings, from a sweep.json. Raises ValueError when the file is none."""
    try:
        best = json.loads(path.read_text(encoding="utf-8"))["best"]
        return {arm: GenerationConfig.from_dict(settings) for arm, settings in best.items()}
    except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a sweep.json: it has no best settings") from error


def write_figure(rows: Sequence[dict], path: Path) -> None:
    """Both distances against guidance, or against steps where guidance is one value, a line per arm."""
    axis = "guidance_scale" if len({row["guidance_scale"] for row in rows}) > 1 else "num_inference_steps"
    others = [key for key in SWEPT if key != axis]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(10, 3.6), layout="constrained")
    for plot, (key, title) in zip(axes, _PANELS.items(), strict=True):
        for line in dict.fromkeys((row["arm"], *(row[other] for other in others)) for row in rows):
            points = [row for row in rows if (row["arm"], *(row[other] for other in others)) == line]
            label = line[0] + "".join(f", on above {row:g}" for row in line[1:2] if row)
            plot.plot([row[axis] for row in points], [row[key] for row in points], marker="o", label=label)
        plot.set(xlabel=axis.replace("_", " "), title=title)
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Training pictures.")
@click.option("--limit", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--guidance", default="1,1.5,2,3,5", show_default=True, help="Values of guidance_scale.")
@click.option("--low", default="0", show_default=True, help="Values of guidance_low.")
@click.option("--steps", default="10", show_default=True, help="Numbers of denoising steps.")
@click.option("--arms", default=",".join(DEFAULT_ARMS), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    limit: int,
    guidance: str,
    low: str,
    steps: str,
    arms: str,
    batch_size: int,
    out: Path,
) -> None:
    """Sweep guidance and steps on training pictures; write sweep.json and sweep.png."""
    with usage_errors():
        names = parse_arms(arms)
        grid = product(*map(parse_numbers, (guidance, low, steps)))
        configs = [GenerationConfig.from_dict(dict(zip(SWEPT, values, strict=True))) for values in grid]
        pipeline = load()
        pictures = load_pictures(list(data), image_size=pipeline.t2i.image_size, limit=limit)
    judge, rows = Judge(pictures, None, str(pipeline.device), quick=True), []
    for name, config in product(names, configs):
        began = time.perf_counter()
        samples = draw_arm(pipeline, pictures, name, config, batch_size)
        seconds = (time.perf_counter() - began) / len(pictures)
        settings = {key: getattr(config, key) for key in SWEPT}
        rows.append({"arm": name} | settings | judge.measure(samples) | {"seconds_per_picture": seconds})
        log.info("%s %s: %s %.2f, LPIPS %.3f", name, settings, JUDGED_BY, rows[-1][JUDGED_BY], rows[-1]["lpips"])
    report = describe(pipeline, data) | {"pictures": len(pictures), "best": best_rows(rows), "rows": rows}
    save_report(out / "sweep.json", report)
    write_figure(rows, out / "sweep.png")


if __name__ == "__main__":
    main()
