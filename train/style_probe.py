"""Measures whether words beside a picture change its style, and how much of the picture is left.

    python -m train.style_probe --model nano --data pictures64-train-05-of-06.parquet \
        --validation pictures64-val-00-of-01.parquet --out runs/styles

A linear probe on VGG16 learns six styles from training pictures; another learns what the model itself draws of the
styles' words, which is all that a mix can become. Then held-out pictures are mixed with each style's words, "<image>,
pencil sketch", at several guidances. Writes styles.json, styles.png, styles-words.png, what words alone draw, and, for
the last of the settings, styles-samples.png.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import click
import matplotlib.pyplot as plt
import torch
from sklearn.metrics import recall_score
from sklearn.pipeline import Pipeline
from torch import Tensor

from train.arms import WORDS_GUIDANCE, Conditioner, Describe, draw, draw_arm, require_arms
from train.data import Pictures, Record, load_pictures
from train.judge import Judge
from train.measures import extract_features, fit_probe
from train.report import LoadPipeline, Numbers, measuring_options, provenance, save_report, save_sheet
from train.run import usage_errors
from train.subjects import content_caption, kind_caption
from vilex.config import MAX_TOKENS, MIXING, GenerationConfig
from vilex.images import to_levels
from vilex.pipeline import VilexPipeline

log = logging.getLogger(__name__)
STYLES = ("photo", "oil painting", "pencil sketch", "cartoon", "flat emoji", "3D emoji")
SHEET_PICTURES = 6
_OWN_SEED = 2**20  # of what the second probe learns from, apart from all that is measured


def pick_styles(pictures: Pictures, per_style: int) -> tuple[Tensor, Tensor]:
    """Indices int64 (T,) of the first pictures of each style, and int64 (T,) the numbers of their styles.

    Raises ValueError when a style has none.
    """
    kinds = [kind_caption(record) for record in pictures.records]
    found = {style: [i for i, kind in enumerate(kinds) if kind == style][:per_style] for style in STYLES}
    if missing := [style for style, indices in found.items() if not indices]:
        raise ValueError(f"there are no pictures of the style {', '.join(missing)}")
    labels = [i for i, style in enumerate(STYLES) for _ in found[style]]
    return torch.tensor([index for indices in found.values() for index in indices]), torch.tensor(labels)


class StyleProbe:
    """Tells styles apart by the judge's VGG16 features: as they are on pictures, and as the model draws them.

    drawn: levels (S,3,H,W) uint8 by style, from words alone.
    """

    def __init__(self, judge: Judge, pictures: Pictures, per_style: int, drawn: dict[str, Tensor]) -> None:
        self.judge = judge
        self.probe: Pipeline = fit_probe(*self._features(pictures, per_style))
        self.own_probe: Pipeline = fit_probe(*self._drawn_features(drawn))

    def score_real(self, pictures: Pictures, per_style: int) -> dict[str, float]:
        """Share recognised of each style of real pictures, and the mean over styles as "accuracy"."""
        return _recalls(self.probe, *self._features(pictures, per_style))

    def score_drawn(self, samples: dict[str, Tensor]) -> dict[str, float]:
        """The same on levels (S,3,H,W) uint8 that were to be of each style; "own_accuracy" is the second probe's."""
        features, labels = self._drawn_features(samples)
        own = _recalls(self.own_probe, features, labels)["accuracy"]
        return _recalls(self.probe, features, labels) | {"own_accuracy": own}

    def _drawn_features(self, samples: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = [
            extract_features(self.judge.nets[0], levels, device=self.judge.device) for levels in samples.values()
        ]
        labels = [torch.full((len(rows),), STYLES.index(style)) for rows, style in zip(features, samples, strict=True)]
        return torch.cat(features), torch.cat(labels)

    def _features(self, pictures: Pictures, per_style: int) -> tuple[Tensor, Tensor]:
        indices, labels = pick_styles(pictures, per_style)
        levels = to_levels(pictures.batch(indices).cpu())
        return extract_features(self.judge.nets[0], levels, device=self.judge.device), labels


def _recalls(probe: Pipeline, features: Tensor, labels: Tensor) -> dict[str, float]:
    asked = sorted(set(labels.tolist()))
    recalls = recall_score(labels, probe.predict(features.numpy()), labels=asked, average=None)
    return {"accuracy": float(recalls.mean())} | {STYLES[i]: float(r) for i, r in zip(asked, recalls, strict=True)}


def describe_mix(pipeline: VilexPipeline, pictures: Pictures, num_tokens: int, style: str) -> Describe:
    """Pictures with a style's words after them."""
    conditioner = Conditioner(pipeline)
    return lambda indices: conditioner.mixes(pictures.batch(indices), num_tokens, f", {style}")


def describe_words(pipeline: VilexPipeline, records: Sequence[Record], style: str) -> Describe:
    """What pictures show, in words, with a style's words after them."""
    conditioner, contents = Conditioner(pipeline), [content_caption(record) for record in records]
    return lambda indices: conditioner.words([f"{contents[i]}, {style}".strip(", ") for i in indices])


def draw_own_styles(
    pipeline: VilexPipeline, records: Sequence[Record], per_style: int, config: GenerationConfig
) -> dict[str, Tensor]:
    """Levels (S,3,H,W) uint8 by style: what the model draws of its words and of what other records show each time."""
    config, drawn = replace(config, seed=_OWN_SEED), {}
    for i, style in enumerate(STYLES):
        own = records[i :: len(STYLES)][:per_style]
        drawn[style] = draw(pipeline.t2i, describe_words(pipeline, own, style), len(own), config, label=style)
    return drawn


def draw_styles(
    pipeline: VilexPipeline, pictures: Pictures, describe: Callable[[str], Describe], config: GenerationConfig
) -> dict[str, Tensor]:
    """Levels (S,3,H,W) uint8 by style, of all pictures as `describe` gives them that style."""
    return {style: draw(pipeline.t2i, describe(style), len(pictures), config, label=style) for style in STYLES}


def has_other_style(pictures: Pictures) -> dict[str, Tensor]:
    """Bool (S,) by style: which pictures are not of it already. Raises ValueError when all are of one."""
    kinds = [kind_caption(record) for record in pictures.records]
    rows = {style: torch.tensor([kind != style for kind in kinds]) for style in STYLES}
    if same := [style for style, mask in rows.items() if not mask.any()]:
        raise ValueError(f"all pictures to mix are of the style {same[0]}: take more")
    return rows


def measure_styles(probe: StyleProbe, rows: dict[str, Tensor], samples: dict[str, Tensor]) -> dict[str, float]:
    """Styles recognised, and mean LPIPS to the pictures, of the rows that were of another style."""
    kept = {style: levels[rows[style]] for style, levels in samples.items()}
    lpips = [probe.judge.lpips_to(probe.judge.real[rows[style]], levels) for style, levels in kept.items()]
    return probe.score_drawn(kept) | {"lpips": sum(lpips) / len(lpips)}


def save_figure(rows: Sequence[dict], bounds: Mapping[str, float], path: Path) -> None:
    """Accuracies and LPIPS over text-free guidance, a line per tokens and words_scale; `bounds` are dashed."""
    titles = {
        "accuracy": "style recognised, as on pictures", "own_accuracy": "as the model draws it",
        "lpips": "LPIPS to the picture",
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(titles), figsize=(12, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for num_tokens, words_scale in dict.fromkeys((row["num_tokens"], row["words_scale"]) for row in rows):
            points = [row for row in rows if (row["num_tokens"], row["words_scale"]) == (num_tokens, words_scale)]
            label = f"{num_tokens} tokens, words {words_scale:g}"
            axis.plot([row["tfg_scale"] for row in points], [row[key] for row in points], marker="o", label=label)
        axis.axhline(bounds[key], linestyle="--", color="gray")
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
@click.option(
    "--tokens", type=Numbers(1, MAX_TOKENS, whole=True), default="16,75", show_default=True, help="Beside words."
)
@click.option("--tfg", type=Numbers(0, 20), default="0,1,2,3,6", show_default=True, help="Values of tfg_scale.")
@click.option("--words-scale", type=Numbers(0, 20), default="0,4", show_default=True, help="Values of words_scale.")
@click.option("--own-per-style", type=click.IntRange(min=2), default=24, show_default=True, help="Drawn of each.")
@click.option("--guidance", type=float, default=GenerationConfig.guidance_scale, show_default=True)
@click.option("--steps", type=int, default=GenerationConfig.num_inference_steps, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    per_style: int,
    limit: int,
    tokens: list[int],
    tfg: list[float],
    words_scale: list[float],
    own_per_style: int,
    guidance: float,
    steps: int,
    out: Path,
) -> None:
    """Measure how words beside a picture change its style; write styles.json and three pictures of it."""
    with usage_errors():
        plain = GenerationConfig(guidance_scale=guidance, num_inference_steps=steps)
        grid = product(tokens, words_scale, tfg)
        configs = [replace(plain, num_tokens=n, words_scale=s, tfg_scale=t) for n, s, t in grid]
        words_config = replace(plain, guidance_scale=WORDS_GUIDANCE)
        pipeline = load()
        require_arms(pipeline, [str(n) for n in tokens])
        size = pipeline.t2i.image_size
        held_out = load_pictures(list(validation), image_size=size)
        pictures = load_pictures(list(validation), image_size=size, limit=limit)
        rows = has_other_style(pictures)
        judge = Judge(pictures, None, str(pipeline.device))
        training = load_pictures(list(data), image_size=size)
        for checked in (training, held_out):
            pick_styles(checked, per_style)  # refused before anything is drawn
    own = draw_own_styles(pipeline, training.records, own_per_style, words_config)
    probe = StyleProbe(judge, training, per_style, own)
    real = probe.score_real(held_out, per_style)
    random_pair = judge.lpips_to(judge.real, judge.real.roll(1, 0))
    most = str(min(pipeline.max_tokens, pipeline.t2i.max_tokens))
    rebuilt = judge.lpips_to(judge.real, draw_arm(pipeline, pictures, most, plain))
    mixes = []
    for config in configs:
        samples = draw_styles(pipeline, pictures, partial(describe_mix, pipeline, pictures, config.num_tokens), config)
        measured = measure_styles(probe, rows, samples)
        measured["kept"] = (random_pair - measured["lpips"]) / (random_pair - rebuilt)
        mixes.append({key: getattr(config, key) for key in ("num_tokens", *MIXING)} | measured)
        log.info("%s", mixes[-1])
    words = draw_styles(pipeline, pictures, partial(describe_words, pipeline, pictures.records), words_config)
    words_alone = measure_styles(probe, rows, words)
    report = provenance(pipeline, (*data, *validation)) | {
        "guidance_scale": guidance, "num_inference_steps": steps, "pictures": len(pictures), "real_pictures": real,
        "words_alone": words_alone, "mixes": mixes, "lpips_of_two_pictures": random_pair, "lpips_rebuilt": rebuilt,
    }  # fmt: skip
    save_report(out / "styles.json", report)
    bounds = {"accuracy": real["accuracy"], "own_accuracy": words_alone["own_accuracy"], "lpips": random_pair}
    save_figure(mixes, bounds, out / "styles.png")
    save_sheet(out / "styles-words.png", {"input": judge.real} | words, SHEET_PICTURES)
    save_sheet(out / "styles-samples.png", {"input": judge.real} | samples, SHEET_PICTURES)


if __name__ == "__main__":
    main()
