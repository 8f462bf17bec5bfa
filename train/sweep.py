"""Draws training pictures at several guidances and steps, and says at which each arm is nearest to real pictures.

    python -m train.sweep --model nano --data pictures64-train-05-of-06.parquet --limit 1000 \
        --guidance 1,1.5,2,3,5 --steps 20 --out runs/sweep

Writes sweep.json, which `train.evaluate --sweep` reads, and sweep.png. Give it training pictures: what is chosen on
held-out ones is not measured on them.
"""

import json
import logging
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click
import matplotlib.pyplot as plt

from train.arms import DEFAULT_ARMS, draw_arm, parse_arms, require_arms
from train.data import load_pictures
from train.judge import Judge
from train.report import LoadPipeline, Numbers, measuring_options, provenance, save_report, scheduler_option
from train.run import usage_errors
from vilex.config import GenerationConfig

log = logging.getLogger(__name__)
SWEPT = ("guidance_scale", "guidance_low", "num_inference_steps")
JUDGED_BY = "fd_vgg"  # the lowest is best
_PANELS = {"fd_vgg": "Fréchet distance (VGG16)", "lpips": "LPIPS (AlexNet)"}


def best_rows(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per arm the settings of the row whose distance is lowest."""
    best = {}
    for row in sorted(rows, key=lambda row: row[JUDGED_BY]):
        best.setdefault(row["arm"], {key: row[key] for key in SWEPT})
    return best


def load_best(path: Path, fingerprint: str) -> dict[str, GenerationConfig]:
    """Per arm its best settings, from a sweep.json.

    Raises ValueError when the file is none or of weights with another fingerprint.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        swept, best, scheduler = report["fingerprint"], report["best"], report["scheduler"]
        settings = {arm: {key: best[arm][key] for key in SWEPT} for arm in best}
        configs = {arm: GenerationConfig(scheduler=scheduler, **settings[arm]) for arm in best}
    except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a sweep.json: it has no best settings") from error
    if swept != fingerprint:
        raise ValueError(f"{path} was made with other weights ({swept}) than those in use ({fingerprint})")
    return configs


def save_figure(rows: Sequence[dict], path: Path) -> None:
    """Both distances against guidance, or against steps where guidance is one value, a line per arm."""
    axis = "guidance_scale" if len({row["guidance_scale"] for row in rows}) > 1 else "num_inference_steps"
    varied = [key for key in ("arm", *SWEPT) if key != axis and len({row[key] for row in rows}) > 1]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(10, 3.6), layout="constrained")
    for plot, (key, title) in zip(axes, _PANELS.items(), strict=True):
        for line, points in group_rows(rows, varied).items():
            points = sorted(points, key=lambda row: row[axis])
            plot.plot([row[axis] for row in points], [row[key] for row in points], marker="o", label=line)
        plot.set(xlabel=axis.replace("_", " "), title=title)
    if varied:
        axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def group_rows(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, list[dict]]:
    """Rows by what they have in common in `keys`, in words."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        label = ", ".join(str(row[k]) if k == "arm" else f"{k.replace('_', ' ')} {row[k]:g}" for k in keys)
        groups.setdefault(label, []).append(row)
    return groups


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Training pictures.")
@click.option("--limit", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--guidance", type=Numbers(0, 20), default="1,1.5,2,3,5", show_default=True, help="guidance_scale.")
@click.option("--low", type=Numbers(0, 1), default="0", show_default=True, help="Values of guidance_low.")
@click.option("--steps", type=Numbers(1, 100, whole=True), default="20", show_default=True, help="Denoising steps.")
@scheduler_option
@click.option("--arms", default=",".join(DEFAULT_ARMS), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    limit: int,
    guidance: list[float],
    low: list[float],
    steps: list[int],
    scheduler: str,
    arms: str,
    batch_size: int,
    out: Path,
) -> None:
    """Sweep guidance and steps on training pictures; write sweep.json and sweep.png."""
    with usage_errors():
        names = parse_arms(arms)
        grid = product(guidance, low, steps)
        configs = [GenerationConfig(scheduler=scheduler, **dict(zip(SWEPT, values, strict=True))) for values in grid]
        pipeline = load()
        require_arms(pipeline, names)
        pictures = load_pictures(list(data), image_size=pipeline.t2i.image_size, limit=limit)
        judge = Judge(pictures, None, str(pipeline.device))
    rows = []
    for name, config in product(names, configs):
        began = time.perf_counter()
        samples = draw_arm(pipeline, pictures, name, config, batch_size)
        seconds = (time.perf_counter() - began) / len(pictures)
        settings = {key: getattr(config, key) for key in SWEPT}
        rows.append({"arm": name} | settings | judge.measure(samples) | {"seconds_per_picture": seconds})
        log.info("%s %s: %s %.2f, LPIPS %.3f", name, settings, JUDGED_BY, rows[-1][JUDGED_BY], rows[-1]["lpips"])
    shared = {"scheduler": pipeline.t2i.pick_scheduler(scheduler), "seed": GenerationConfig.seed}
    report = provenance(pipeline, data) | shared | {"pictures": len(pictures), "best": best_rows(rows), "rows": rows}
    save_report(out / "sweep.json", report)
    save_figure(rows, out / "sweep.png")


if __name__ == "__main__":
    main()
