"""Measures a model on a held-out table: text -> image, the picture described in words, and 1/4/16/75 tokens.

    python -m train.evaluate --model nano --data pictures64-val-00-of-01.parquet --out assets/weights/nano

Writes metrics.json and metrics.png. One 64x64 sample per picture and arm, never enlarged.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from train.batches import tabulate
from train.captions import dense_caption
from train.data import Pictures, Record, load_pictures, sha256
from train.measures import (
    extract_features,
    frechet_distance,
    grid_colour_error,
    inception_score,
    kernel_distance,
    knn_accuracy,
)
from train.nets import Extractor, load_efficientnet, load_lpips, load_vgg
from train.run import start, usage_errors
from train.subjects import plain_caption
from vilex.config import DEFAULT_BUDGETS, MAX_TOKENS, GenerationConfig
from vilex.diffusion import Conditioning
from vilex.images import contact_sheet, from_levels, to_images, to_levels
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose, compose_leading, special_tokens
from vilex.recipe import environment
from vilex.sampling import Conditions, sample

log = logging.getLogger(__name__)
COLOUR_GRIDS = (4, 16)
LABEL_SOURCES = ("tiny-imagenet", "caltech101", "flowers102", "miniplaces")  # whose labels a gallery can judge
SHEET_PICTURES = 12


@dataclass(frozen=True)
class Arm:
    """Samples (S,3,H,W) uint8 of one way to describe the held-out pictures."""

    name: str
    samples: Tensor


class Classes(NamedTuple):
    """Which of some pictures, and which of a gallery, have a class that the gallery shows; and what it is, int64."""

    asked: list[int]
    labels: Tensor
    known: list[int]
    known_labels: Tensor


def match_classes(records: Sequence[Record], gallery: Sequence[Record]) -> Classes:
    """Numbers for the labels of LABEL_SOURCES in a gallery, and the pictures whose label is among them."""
    names = sorted({r.label for r in gallery if r.source in LABEL_SOURCES})
    number = {name: i for i, name in enumerate(names)}
    known = [i for i, r in enumerate(gallery) if r.source in LABEL_SOURCES]
    asked = [i for i, r in enumerate(records) if r.source in LABEL_SOURCES and r.label in number]
    labels = torch.tensor([number[records[i].label] for i in asked])
    return Classes(asked, labels, known, torch.tensor([number[gallery[i].label] for i in known]))


def parse_arms(arms: str) -> list[str]:
    """Names of the arms; raises ValueError unless each is "text", "dense" or a number of tokens."""
    names = [name.strip() for name in arms.split(",")]
    for name in names:
        if name not in ("text", "dense") and not (name.isdecimal() and 1 <= int(name) <= MAX_TOKENS):
            raise ValueError(f"an arm is text, dense or a number of tokens from 1 to {MAX_TOKENS}, got {name!r}")
    return names


class Conditioner:
    """Turns held-out pictures into one condition per way of describing them."""

    def __init__(self, pipeline: VilexPipeline) -> None:
        self.pipeline, self.t2i = pipeline, pipeline.t2i
        self.special = special_tokens(self.t2i.tokenizer)

    def words(self, texts: Sequence[str]) -> Conditions:
        """Texts alone, B of them."""
        table = tabulate([[text] for text in texts], self.t2i.tokenizer, self.t2i.config.context_length)
        first = torch.arange(len(texts))
        return Conditions(self._empty(), joint=self.t2i.encode_prompt(table.prompt(first, first * 0, trim=False)))

    def tokens(self, pixels: Tensor, num_tokens: int) -> Conditions:
        """The pictures' own first tokens alone."""
        vilex_tokens = self.pipeline.encoder(pixels.to(self.pipeline.device), num_tokens)
        none = torch.zeros(len(pixels), 0, dtype=torch.long, device=vilex_tokens.device)
        prompt = compose_leading(none, none.bool(), vilex_tokens, self.special, self.t2i.config.context_length)
        return Conditions(self._empty(), image=self.t2i.encode_prompt(prompt))

    def _empty(self) -> Conditioning:
        return self.t2i.encode_prompt(compose("", [], self.t2i.tokenizer, self.t2i.config.context_length))


@torch.no_grad()
def draw_arm(pipeline: VilexPipeline, pictures: Pictures, arm: str, config: GenerationConfig, batch_size: int) -> Arm:
    """One sample per picture; `arm` is "text", "dense" or a token count. Picture i takes seed config.seed + i."""
    conditioner, drawn = Conditioner(pipeline), []
    for start_index in tqdm(range(0, len(pictures), batch_size), desc=arm, mininterval=5):
        indices = torch.arange(start_index, min(start_index + batch_size, len(pictures)))
        pixels = pictures.batch(indices)
        records = [pictures.records[i] for i in indices]
        if arm == "text":
            conditions = conditioner.words([plain_caption(record) for record in records])
        elif arm == "dense":
            seen = to_levels(pixels).cpu()
            conditions = conditioner.words([dense_caption(r, p) for r, p in zip(records, seen, strict=True)])
        else:
            conditions = conditioner.tokens(pixels, int(arm))
        seeds = (config.seed + indices).tolist()
        latents = sample(pipeline.t2i, conditions, config, seeds=seeds)
        drawn.append(to_levels(pipeline.t2i.decode(latents).cpu()))
    return Arm(arm, torch.cat(drawn))


class Judge:
    """The measuring nets and what they see in the real pictures."""

    def __init__(self, pictures: Pictures, gallery: Pictures | None, device: str) -> None:
        self.device = device
        self.nets: list[Extractor] = [load_vgg(), load_efficientnet()]
        self.lpips = load_lpips("alex").to(device)
        self.real = to_levels(pictures.batch(torch.arange(len(pictures))).cpu())
        self.real_features = {net.key: extract_features(net, self.real, device=device) for net in self.nets}
        self.records, self.gallery = pictures.records, gallery
        self.gallery_features = self._gallery_features() if gallery else {}

    def _gallery_features(self) -> dict[str, Tensor]:
        pixels = to_levels(self.gallery.batch(torch.arange(len(self.gallery))).cpu())
        return {net.key: extract_features(net, pixels, device=self.device) for net in self.nets}

    def measure(self, samples: Tensor) -> dict[str, float]:
        """All measures of uint8 samples (S,3,H,W), sample i belonging to held-out picture i."""
        result = {}
        for net in self.nets:
            features = extract_features(net, samples, device=self.device)
            result |= self._distances(net, features)
        result["lpips"] = self._lpips(samples)
        generated, real = from_levels(samples), from_levels(self.real)
        for cells in COLOUR_GRIDS:
            result[f"colour_error_{cells}x{cells}"] = grid_colour_error(generated, real, cells)
            shuffled = grid_colour_error(generated, real.roll(1, 0), cells)
            result[f"colour_error_{cells}x{cells}_other_picture"] = shuffled
        return result

    def real_floor(self) -> dict[str, float]:
        """Distances of as many disjoint real pictures as there are samples: the best that can be reached."""
        count = len(self.real)
        if self.gallery is None or len(self.gallery) < count:
            return {}
        floor = {}
        for net in self.nets:
            gallery, real = self.gallery_features[net.key][:count], self.real_features[net.key]
            floor[f"fd_{net.key}"] = frechet_distance(gallery, real)
            floor[f"kid_{net.key}"] = kernel_distance(gallery, real)
        return floor | self._class_accuracy(self.nets[0], self.real_features[self.nets[0].key])

    def _distances(self, net: Extractor, features: Tensor) -> dict[str, float]:
        real = self.real_features[net.key]
        result = {
            f"fd_{net.key}": frechet_distance(features, real),
            f"kid_{net.key}": kernel_distance(features, real),
        }
        if self.gallery is not None and len(self.gallery) >= len(features):
            disjoint = self.gallery_features[net.key][: len(features)]
            result[f"fd_{net.key}_disjoint"] = frechet_distance(features, disjoint)
        if net.key == "eff":
            probabilities = net.logits(features.to(self.device)).softmax(1).cpu()
            result["is_eff"] = inception_score(probabilities)
        else:
            result |= self._class_accuracy(net, features)
        return result

    def _class_accuracy(self, net: Extractor, features: Tensor) -> dict[str, float]:
        """k-NN accuracy of the labels the samples were asked to show, judged by training pictures."""
        if self.gallery is None:
            return {}
        classes = match_classes(self.records, self.gallery.records)
        if len(classes.known) < 10 or not classes.asked:
            return {}
        gallery = self.gallery_features[net.key][classes.known]
        return {"class_accuracy": knn_accuracy(features[classes.asked], classes.labels, gallery, classes.known_labels)}

    @torch.no_grad()
    def _lpips(self, samples: Tensor) -> float:
        pairs = zip(samples.split(64), self.real.split(64), strict=True)
        distances = [self.lpips(from_levels(a).to(self.device), from_levels(b).to(self.device)).cpu() for a, b in pairs]
        return torch.cat(distances).mean().item()


def ratios(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
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


def write_sheet(arms: Sequence[Arm], real: Tensor, path: Path) -> None:
    """A PNG: a row per held-out picture, the input and one sample of each arm."""
    count = min(SHEET_PICTURES, len(real))
    columns = [to_images(from_levels(pixels[:count])) for pixels in (real, *(arm.samples for arm in arms))]
    contact_sheet(list(zip(*columns, strict=True)), column_labels=["input", *(arm.name for arm in arms)]).save(path)


def write_figure(metrics: dict[str, dict[str, float]], path: Path) -> None:
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
@click.option("--model", help="Weights: a folder, a name in assets/weights or a hub id.")
@click.option("--data", multiple=True, required=True, help="Held-out pictures.")
@click.option("--gallery", multiple=True, help="Training pictures: for real/real floors and class accuracy.")
@click.option("--gallery-limit", type=click.IntRange(min=2), default=6000, show_default=True)
@click.option("--limit", type=click.IntRange(min=2), help="Use only this many held-out pictures.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--guidance", type=float, default=GenerationConfig().guidance_scale, show_default=True)
@click.option("--text-guidance", type=float, default=3.0, show_default=True, help="For the arms of words alone.")
@click.option("--arms", default=",".join(["text", "dense", *map(str, DEFAULT_BUDGETS)]), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", help="cpu, cuda, ...")
@click.option("--dtype", help="float32, bfloat16, float16.")
@click.option("--threads", type=int, help="CPU threads of torch.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str | None,
    data: tuple[str, ...],
    gallery: tuple[str, ...],
    gallery_limit: int,
    limit: int | None,
    steps: int,
    guidance: float,
    text_guidance: float,
    arms: str,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    out: Path,
) -> None:
    """Measure a model on held-out pictures and write metrics.json, metrics.png and samples.png."""
    start(threads)
    with usage_errors():
        names = parse_arms(arms)
        config = GenerationConfig(num_inference_steps=steps, guidance_scale=guidance)
        words_config = replace(config, guidance_scale=text_guidance)
        pipeline = VilexPipeline.from_pretrained(model, device=device, dtype=dtype)
        for name in filter(str.isdigit, names):
            pipeline.within(int(name))
        size = pipeline.t2i.image_size
        pictures = load_pictures(list(data), image_size=size, limit=limit)
        training = load_pictures(list(gallery), image_size=size, limit=gallery_limit) if gallery else None
        judge = Judge(pictures, training, str(pipeline.device))
    began, drawn = time.perf_counter(), []
    for name in names:
        drawn.append(draw_arm(pipeline, pictures, name, config if name.isdigit() else words_config, batch_size))
    metrics = {arm.name: judge.measure(arm.samples) for arm in drawn}
    report = {
        "model": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        "pictures": len(pictures),
        "tables": {Path(path).name: sha256(path) for path in data if Path(path).is_file()},
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_scale_of_words": text_guidance,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "measures": [net.label("FD") for net in judge.nets] + ["LPIPS v0.1, AlexNet"],
        "real_floor": judge.real_floor(),
        "arms": metrics,
        "ratios": ratios(metrics) if "text" in metrics and any(map(str.isdigit, metrics)) else {},
        "seconds": round(time.perf_counter() - began),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_sheet(drawn, judge.real, out / "samples.png")
    if any(map(str.isdigit, metrics)):
        write_figure(metrics, out / "metrics.png")
    log.info("%s", json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    main()
