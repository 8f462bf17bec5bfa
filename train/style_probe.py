"""Measures whether words beside a picture change its style, and how much of the picture is left.

    python -m train.style_probe --model nano --data pictures64-train-05-of-06.parquet \
        --validation pictures64-val-00-of-01.parquet --out runs/styles

A linear probe on VGG16 learns six styles from training pictures. Then held-out pictures are mixed with each style's
words, "<image>, pencil sketch", at several text-free guidances. Writes styles.json, styles.png and, for the last of the
settings, styles-samples.png.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import click
import matplotlib.pyplot as plt
import torch
from sklearn.metrics import recall_score
from sklearn.pipeline import Pipeline
from torch import Tensor

from train.arms import Conditioner, Describe, draw, draw_arm
from train.data import Pictures, load_pictures
from train.judge import Judge
from train.measures import extract_features, fit_probe
from train.report import LoadPipeline, describe, measuring_options, save_report, save_sheet
from train.run import usage_errors
from train.subjects import content_caption, kind_caption
from train.sweep import parse_numbers
from vilex.config import GenerationConfig
from vilex.images import to_levels
from vilex.pipeline import VilexPipeline

log = logging.getLogger(__name__)
STYLES = ("photo", "oil painting", "pencil sketch", "cartoon", "flat emoji", "3D emoji")
SHEET_PICTURES = 3


def pick_styles(pictures: Pictures, per_style: int) -> tuple[Tensor, Tensor]:
    """Indices int64 (T,) of the first pictures of each style, and their styles' numbers.

    Raises ValueError when a style has none.
    """
    kinds = [kind_caption(record) for record in pictures.records]
    found = {style: [i for i, kind in enumerate(kinds) if kind == style][:per_style] for style in STYLES}
    if missing := [style for style, indices in found.items() if not indices]:
        raise ValueError(f"there are no pictures of the style {', '.join(missing)}")
    labels = [i for i, style in enumerate(STYLES) for _ in found[style]]
    return torch.tensor([index for indices in found.values() for index in indices]), torch.tensor(labels)


class StyleProbe:
    """Tells styles apart by the judge's VGG16 features."""

    def __init__(self, judge: Judge, pictures: Pictures, per_style: int) -> None:
        self.judge = judge
        self.probe: Pipeline = fit_probe(*self._features(pictures, per_style))

    def score(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Share recognised of each style that is asked, and the mean over styles as "accuracy"."""
        asked = sorted(set(labels.tolist()))
        recalls = recall_score(labels, self.probe.predict(features.numpy()), labels=asked, average=None)
        return {"accuracy": float(recalls.mean())} | {STYLES[i]: float(r) for i, r in zip(asked, recalls, strict=True)}

    def score_real(self, pictures: Pictures, per_style: int) -> dict[str, float]:
        """The same on real pictures."""
        return self.score(*self._features(pictures, per_style))

    def score_drawn(self, samples: dict[str, Tensor]) -> dict[str, float]:
        """The same on levels (S,3,H,W) uint8 that were to be of each style."""
        features = [
            extract_features(self.judge.nets[0], levels, device=self.judge.device) for levels in samples.values()
        ]
        labels = [torch.full((len(rows),), STYLES.index(style)) for rows, style in zip(features, samples, strict=True)]
        return self.score(torch.cat(features), torch.cat(labels))

    def _features(self, pictures: Pictures, per_style: int) -> tuple[Tensor, Tensor]:
        indices, labels = pick_styles(pictures, per_style)
        levels = to_levels(pictures.batch(indices).cpu())
        return extract_features(self.judge.nets[0], levels, device=self.judge.device), labels


def describe_mix(pipeline: VilexPipeline, pictures: Pictures, num_tokens: int, style: str) -> Describe:
    """Pictures with a style's words after them."""
    conditioner = Conditioner(pipeline)
    return lambda indices: conditioner.mixes(pictures.batch(indices), num_tokens, f", {style}")


def describe_words(pipeline: VilexPipeline, pictures: Pictures, style: str) -> Describe:
    """What the pictures show, in words, with a style's words after them."""
    conditioner, contents = Conditioner(pipeline), [content_caption(record) for record in pictures.records]
    return lambda indices: conditioner.words([f"{contents[i]}, {style}".strip(", ") for i in indices])


def draw_styles(
    pipeline: VilexPipeline, pictures: Pictures, describe: Callable[[str], Describe], config: GenerationConfig
) -> dict[str, Tensor]:
    """Levels (S,3,H,W) uint8 by style, of all pictures as `describe` gives them that style."""
    return {style: draw(pipeline.t2i, describe(style), len(pictures), config, label=style) for style in STYLES}


def others(pictures: Pictures, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the samples whose picture had the style already."""
    kinds = [kind_caption(record) for record in pictures.records]
    return {s: levels[torch.tensor([kind != s for kind in kinds])] for s, levels in samples.items()}


def measure_mixes(probe: StyleProbe, pictures: Pictures, samples: dict[str, Tensor]) -> dict[str, float]:
    """Styles recognised, and mean LPIPS to the pictures."""
    real = probe.judge.real
    lpips = sum(probe.judge.lpips_to(real, levels) for levels in samples.values()) / len(samples)
    return probe.score_drawn(others(pictures, samples)) | {"lpips": lpips}


def write_figure(rows: Sequence[dict], levels: Mapping[str, float], path: Path) -> None:
    """Accuracy and LPIPS over text-free guidance, a line per number of tokens; `levels` are dashed."""
    titles = {"accuracy": "style recognised", "lpips": "LPIPS to the picture"}
    figure, axes = plt.subplots(1, len(titles), figsize=(9, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for num_tokens in dict.fromkeys(row["num_tokens"] for row in rows):
            points = [row for row in rows if row["num_tokens"] == num_tokens]
            values = [row[key] for row in points]
            axis.plot([row["tfg_scale"] for row in points], values, marker="o", label=f"{num_tokens} tokens")
        axis.axhline(levels[key], linestyle="--", color="gray")
        axis.set(xlabel="text-free guidance", title=title)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Training pictures, which the probe learns from.")
@click.option("--validation", multiple=True, required=True, help="Held-out pictures.")
@click.option("--per-style", type=click.IntRange(min=2), default=150, show_default=True, help="Real pictures of each.")
@click.option("--limit", type=click.IntRange(min=2), default=40, show_default=True, help="Pictures to mix.")
@click.option("--tokens", default="16,75", show_default=True, help="Tokens of a picture beside words.")
@click.option("--tfg", default="0,1,2,3,6", show_default=True, help="Values of tfg_scale.")
@click.option("--guidance", type=float, default=GenerationConfig().guidance_scale, show_default=True)
@click.option("--steps", type=int, default=10, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    per_style: int,
    limit: int,
    tokens: str,
    tfg: str,
    guidance: float,
    steps: int,
    out: Path,
) -> None:
    """Measure how words beside a picture change its style; write styles.json, styles.png and styles-samples.png."""
    with usage_errors():
        base = {"guidance_scale": guidance, "num_inference_steps": steps}
        configs = [
            GenerationConfig.from_dict(base | {"num_tokens": n, "tfg_scale": t})
            for n, t in product(*map(parse_numbers, (tokens, tfg)))
        ]
        pipeline = load()
        for config in configs:
            pipeline.within(config.num_tokens)
        size = pipeline.t2i.image_size
        training = load_pictures(list(data), image_size=size)
        held_out = load_pictures(list(validation), image_size=size)
        pictures = load_pictures(list(validation), image_size=size, limit=limit)
        judge = Judge(pictures, None, str(pipeline.device), quick=True)
        probe = StyleProbe(judge, training, per_style)
        real = probe.score_real(held_out, per_style)
    random_pair = judge.lpips_to(judge.real, judge.real.roll(1, 0))
    plain = GenerationConfig.from_dict(base)
    most = str(min(pipeline.max_tokens, pipeline.t2i.max_tokens))
    rebuilt = judge.lpips_to(judge.real, draw_arm(pipeline, pictures, most, plain))
    rows = []
    for config in configs:
        mixed = partial(describe_mix, pipeline, pictures, config.num_tokens)
        samples = draw_styles(pipeline, pictures, mixed, config)
        row = {"num_tokens": config.num_tokens, "tfg_scale": config.tfg_scale} | measure_mixes(probe, pictures, samples)
        rows.append(row | {"kept": (random_pair - row["lpips"]) / (random_pair - rebuilt)})
        log.info("%s", rows[-1])
    words = probe.score_drawn(draw_styles(pipeline, pictures, partial(describe_words, pipeline, pictures), plain))
    report = describe(pipeline, (*data, *validation)) | base | {
        "pictures": len(pictures), "real_pictures": real, "words_alone": words, "mixes": rows,
        "lpips_of_two_pictures": random_pair, "lpips_rebuilt": rebuilt,
    }  # fmt: skip
    save_report(out / "styles.json", report)
    write_figure(rows, {"accuracy": real["accuracy"], "lpips": random_pair}, out / "styles.png")
    save_sheet(out / "styles-samples.png", {"input": judge.real} | samples, SHEET_PICTURES)


if __name__ == "__main__":
    main()
