"""Measures a model on a held-out table: text -> image, the picture described in words, and 1/4/16/75 tokens.

    python -m train.evaluate --model nano --data pictures64-val-00-of-01.parquet --out assets/weights/nano

Writes metrics.json, metrics.png and samples.png. One sample per picture and arm, never enlarged. With `--sweep`, each
arm is drawn at its own best guidance as train.sweep found it.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import matplotlib.pyplot as plt

from train.arms import DEFAULT_ARMS, WORDS_GUIDANCE, arm_configs, draw_arm, parse_arms, require_arms
from train.data import load_pictures
from train.judge import Judge
from train.report import LoadPipeline, measuring_options, provenance, save_report, save_sheet, scheduler_option
from train.run import usage_errors
from train.sweep import SWEPT, load_best
from vilex.config import GenerationConfig

log = logging.getLogger(__name__)
SHEET_PICTURES = 12


def best_configs(names: Sequence[str], sweep: Path, fingerprint: str) -> dict[str, GenerationConfig]:
    """How each arm is drawn at its best; raises ValueError for an arm that the sweep lacks."""
    best = load_best(sweep, fingerprint)
    if missing := [name for name in names if name not in best]:
        raise ValueError(f"{sweep} has no best settings for {', '.join(missing)}, it has {', '.join(best)}")
    return {name: best[name] for name in names}


def ratios(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures that tell whether tokens matter, relative to text -> image as in the paper's table."""
    text = metrics["text"]
    budgets = [name for name in metrics if name.isdigit()]
    result = {f"fd_vgg_{n}_over_text": metrics[n]["fd_vgg"] / text["fd_vgg"] for n in budgets}
    result |= {f"lpips_{n}_over_text": metrics[n]["lpips"] / text["lpips"] for n in budgets}
    most = metrics[max(budgets, key=int)]
    result["colour_error_16x16_over_other_picture"] = (
        most["colour_error_16x16"] / most["colour_error_16x16_other_picture"]
    )
    return result


def save_figure(metrics: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Fréchet distance, LPIPS and colour error against the number of tokens, with text -> image as a line."""
    panels = {"fd_vgg": "Fréchet distance (VGG16)", "lpips": "LPIPS (AlexNet)", "colour_error_16x16": "colour error"}
    budgets = sorted(int(name) for name in metrics if name.isdigit())
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        axis.plot(budgets, [metrics[str(n)][key] for n in budgets], marker="o", color="black", label="ViLex tokens")
        for name, style in (("text", "--"), ("dense", ":")):
            if name in metrics:
                axis.axhline(metrics[name][key], linestyle=style, color="gray", label=f"{name} -> image")
        axis.set(xscale="log", xticks=budgets, xticklabels=budgets, xlabel="tokens", title=title)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Held-out pictures.")
@click.option("--gallery", multiple=True, help="Training pictures: for real/real floors and class accuracy.")
@click.option("--gallery-limit", type=click.IntRange(min=2), default=6000, show_default=True)
@click.option("--limit", type=click.IntRange(min=2), help="Use only this many held-out pictures.")
@click.option("--steps", type=int, help=f"Denoising steps, {GenerationConfig.num_inference_steps} by default.")
@click.option("--guidance", type=float, help=f"{GenerationConfig.guidance_scale:g} by default.")
@click.option("--text-guidance", type=float, help=f"For the arms of words alone, {WORDS_GUIDANCE:g} by default.")
@click.option(
    "--sweep",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A sweep.json: its scheduler and each arm's own best guidance and steps, in place of those options.",
)
@scheduler_option
@click.option("--taught", is_flag=True, help="EfficientNet-lite2 has taught these weights, so it does not judge them.")
@click.option("--arms", default=",".join(DEFAULT_ARMS), show_default=True)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder of samples, to go on from.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    gallery: tuple[str, ...],
    gallery_limit: int,
    limit: int | None,
    steps: int | None,
    guidance: float | None,
    text_guidance: float | None,
    sweep: Path | None,
    scheduler: str,
    taught: bool,
    arms: str,
    keep: Path | None,
    batch_size: int,
    out: Path,
) -> None:
    """Measure a model on held-out pictures and write metrics.json, metrics.png and samples.png."""
    with usage_errors():
        names = parse_arms(arms)
        given = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": scheduler}
        config = GenerationConfig(**{key: value for key, value in given.items() if value is not None})
        configs = arm_configs(names, config, WORDS_GUIDANCE if text_guidance is None else text_guidance)
        told = (steps, guidance, text_guidance, scheduler) != (None, None, None, GenerationConfig.scheduler)
        if sweep and told:
            raise ValueError("--sweep says how to draw, scheduler included: leave the other options out")
        pipeline = load()
        configs = best_configs(names, sweep, pipeline.fingerprint) if sweep else configs
        require_arms(pipeline, names)
        size = pipeline.t2i.image_size
        pictures = load_pictures(list(data), image_size=size, limit=limit)
        training = load_pictures(list(gallery), image_size=size, limit=gallery_limit) if gallery else None
        judge = Judge(pictures, training, str(pipeline.device), both=not taught)
    began = time.perf_counter()
    samples = {name: draw_arm(pipeline, pictures, name, configs[name], batch_size, keep) for name in names}
    metrics = {name: judge.measure(levels) for name, levels in samples.items()}
    report = {
        **provenance(pipeline, (*data, *gallery)),
        "pictures": len(pictures),
        "scheduler": pipeline.t2i.pick_scheduler(configs[names[0]].scheduler),
        "seed": GenerationConfig.seed,
        "settings": {name: {key: getattr(config, key) for key in SWEPT} for name, config in configs.items()},
        "measures": [net.label("FD") for net in judge.nets] + ["LPIPS v0.1, AlexNet"],
        "real_floor": judge.real_floor(),
        "arms": metrics,
        "ratios": ratios(metrics) if "text" in metrics and any(map(str.isdigit, metrics)) else {},
        "seconds": round(time.perf_counter() - began),
    }
    save_report(out / "metrics.json", report)
    save_sheet(out / "samples.png", {"input": judge.real} | samples, SHEET_PICTURES)
    if any(map(str.isdigit, metrics)):
        save_figure(metrics, out / "metrics.png")
    log.info("%s", json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    main()
