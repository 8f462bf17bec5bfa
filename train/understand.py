"""Measures what features of pictures know: linear probe, k-NN and caption retrieval, before and after ViLex training.

    python -m train.understand --model nano --data 'pictures64-train-*.parquet' \
        --validation pictures64-val-00-of-01.parquet --before runs/distilled/weights --out runs/understand

Writes understand.json and understand.md. Nothing is trained but the probes. Source: ViLex (CVPR 2025), section 4.3.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.data import Pictures, load_pictures
from train.judge import LABEL_SOURCES, match_classes
from train.measures import RECALL_RANKS, caption_recall, chance_recall, knn_accuracy, linear_probe
from train.report import table_hashes
from train.run import start, usage_errors
from vilex.checkpoint import find_weights, load_pretrained, weights_name
from vilex.codes import fingerprint
from vilex.config import MINILM_ID
from vilex.diffusion import masked_mean
from vilex.encoder import PatchEncoder, build_encoder
from vilex.minilm import load_text_encoder
from vilex.model import ViLex, load_vilex
from vilex.pipeline import pick_device
from vilex.recipe import environment

log = logging.getLogger(__name__)
CAPTION_SOURCES = ("flickr8k",)  # whose captions people wrote
LEADING_TOKENS = 16  # the paper's, per grid
PIXEL_SIDE = 16
LATENT_SIDE = 8

View = Callable[[Tensor], dict[str, Tensor]]  # pixels (B,3,H,W) in [-1,1] -> features (B,F) by name


# Ways to look at a picture


def pixel_view(pixels: Tensor) -> dict[str, Tensor]:
    """The picture itself, made small."""
    return {f"pixels, {PIXEL_SIDE}x{PIXEL_SIDE}": F.adaptive_avg_pool2d(pixels, PIXEL_SIDE).flatten(1)}


def vae_view(vae: AutoencoderKL) -> View:
    """Means of a VAE's latents, averaged over a grid where there are more."""

    def view(pixels: Tensor) -> dict[str, Tensor]:
        latents = vae.encode(pixels).latent_dist.mean  # (B,C,h,w)
        side = min(LATENT_SIDE, *latents.shape[-2:])
        return {f"VAE latents, {side}x{side}": F.adaptive_avg_pool2d(latents, side).flatten(1)}

    return view


def encoder_view(name: str, encoder: PatchEncoder) -> View:
    """The mean patch token."""
    return lambda pixels: {name: encoder(pixels).mean(1)}


def vilex_view(vilex: ViLex) -> View:
    """The mean patch token alone, and beside ViLex tokens: their mean, or the first of them one after another."""

    def view(pixels: Tensor) -> dict[str, Tensor]:
        patch_tokens = vilex.encoder(pixels)  # (B,P,D_vit)
        vilex_tokens = vilex.pooler(patch_tokens)  # (B,N,D)
        mean, leading = patch_tokens.mean(1), vilex_tokens[:, :LEADING_TOKENS]
        return {
            "encoder after ViLex": mean,
            f"+ mean of {vilex_tokens.shape[1]} ViLex tokens": torch.cat([mean, vilex_tokens.mean(1)], 1),
            f"+ first {leading.shape[1]} ViLex tokens": torch.cat([mean, leading.flatten(1)], 1),
        }

    return view


def build_views(vilex: ViLex, before: Sequence[Path], vae: Path | None, seed: int) -> list[View]:
    """All views, in the order of the table, on the model's device. Raises ValueError when a folder does not fit."""
    device = next(vilex.parameters()).device
    views: list[View] = [pixel_view]
    if vae:
        views.append(vae_view(load_pretrained(AutoencoderKL, vae).to(device).eval()))
    torch.manual_seed(seed)
    views.append(encoder_view("encoder, random", build_encoder(vilex.encoder.config).to(device).eval()))
    for folder in before:
        views.append(encoder_view(f"encoder before ViLex ({folder})", load_vilex(folder).encoder.to(device)))
    return [*views, vilex_view(vilex)]


@torch.no_grad()
def extract_views(views: Sequence[View], pictures: Pictures, batch_size: int = 64) -> dict[str, Tensor]:
    """Features (S,F), float32 on the CPU, of each view."""
    batches = torch.arange(len(pictures)).split(batch_size)
    parts = []
    for indices in tqdm(batches, desc="features", mininterval=5):
        pixels = pictures.batch(indices)
        parts.append({name: rows.float().cpu() for view in views for name, rows in view(pixels).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# What the features are asked


class Split(NamedTuple):
    """Pictures with a class, and pictures with captions."""

    labelled: Pictures
    captioned: Pictures


def load_split(source: Sequence[str], image_size: int, limit: int | None) -> Split:
    """The first `limit` of each kind. Raises ValueError when there is none of a kind."""
    kinds = (dict.fromkeys(names, 1.0) for names in (LABEL_SOURCES, CAPTION_SOURCES))
    return Split(*(load_pictures(list(source), image_size=image_size, limit=limit, sources=kind) for kind in kinds))


@torch.no_grad()
def embed_sentences(
    sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, batch_size: int = 128
) -> Tensor:
    """Embeddings (M,E) of length 1, on the CPU: the mean of the states of all word pieces, as MiniLM is meant to be."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
    rows = torch.empty(len(sentences), text_encoder.config.hidden_size)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        inputs = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(text_encoder.device)
        states = text_encoder(**inputs).last_hidden_state  # (B,L,E)
        rows[chosen] = F.normalize(masked_mean(states, inputs["attention_mask"])).cpu()
    return rows


class Captions(NamedTuple):
    """Embeddings (M,E) of all captions of some pictures, and int64 (M,) whose each is."""

    embeddings: Tensor
    owners: Tensor

    def means(self) -> Tensor:
        """The mean embedding of each picture's captions, (S,E)."""
        counts = torch.bincount(self.owners)
        sums = torch.zeros(len(counts), self.embeddings.shape[1]).index_add_(0, self.owners, self.embeddings)
        return sums / counts[:, None]


class Exam:
    """The questions, the same for all features: classes and captions of training and held-out pictures."""

    def __init__(self, train: Split, held_out: Split, embed: Callable[[Sequence[str]], Tensor]) -> None:
        self.train, self.held_out = train, held_out
        self.classes = match_classes(held_out.labelled.records, train.labelled.records)
        self.train_captions = self._captions(train.captioned, embed).means()
        self.captions = self._captions(held_out.captioned, embed)

    @staticmethod
    def _captions(pictures: Pictures, embed: Callable[[Sequence[str]], Tensor]) -> Captions:
        owned = [(caption, i) for i, record in enumerate(pictures.records) for caption in record.captions]
        texts, owners = zip(*owned, strict=True)
        return Captions(embed(texts), torch.tensor(owners))

    def grade(self, views: Sequence[View]) -> dict[str, dict[str, float]]:
        """Scores, 0 to 1, of each view's features, with their width."""
        splits = (self.train.labelled, self.held_out.labelled, self.train.captioned, self.held_out.captioned)
        features = [extract_views(views, pictures) for pictures in splits]
        return {name: self._grade(*(part[name] for part in features)) for name in tqdm(features[0], desc="probes")}

    def _grade(self, train: Tensor, held_out: Tensor, train_captioned: Tensor, captioned: Tensor) -> dict[str, float]:
        asked, labels, known, known_labels = self.classes
        mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
        train, held_out = ((rows - mean) / std for rows in (train[known], held_out[asked]))
        recall = caption_recall(captioned, *self.captions, train_captioned, self.train_captions)
        return {
            "width": train.shape[1],
            "linear_probe": linear_probe(held_out, labels, train, known_labels),
            "knn": knn_accuracy(held_out, labels, train, known_labels),
        } | {f"recall_{k}": value for k, value in recall.items()}

    def chance(self) -> dict[str, float]:
        """What guessing scores."""
        guess = 1 / len(self.classes.known_labels.unique())
        recall = chance_recall(self.captions.owners)
        return {"linear_probe": guess, "knn": guess} | {f"recall_{k}": value for k, value in recall.items()}

    def counts(self) -> dict[str, int]:
        """Pictures of each part."""
        return {
            "classes": len(self.classes.known_labels.unique()),
            "labelled_train": len(self.train.labelled),
            "labelled_held_out": len(self.classes.asked),
            "captioned_train": len(self.train.captioned),
            "captioned_held_out": len(self.held_out.captioned),
        }


def markdown_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores in percent, a row per kind of features."""
    columns = {"linear_probe": "linear probe", "knn": "k-NN"} | {f"recall_{k}": f"R@{k}" for k in RECALL_RANKS}
    lines = [["features", "width", *columns.values()], ["---"] * (2 + len(columns))]
    for name, row in scores.items():
        lines.append([name, str(row.get("width", "")), *(f"{100 * row[key]:.1f}" for key in columns)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@click.command()
@click.option("--model", help="Weights: a folder, a name in assets/weights or a hub id.")
@click.option("--data", multiple=True, required=True, help="Training pictures, which the probes learn from.")
@click.option("--validation", multiple=True, required=True, help="Held-out pictures.")
@click.option(
    "--before",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weights whose encoder to compare with, such as the distilled one that training started from.",
)
@click.option(
    "--vae", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A VAE's folder (diffusers)."
)
@click.option(
    "--limit", type=click.IntRange(min=10), default=3000, show_default=True, help="Training pictures of each kind."
)
@click.option("--text-encoder", default=MINILM_ID, help="Folder of MiniLM, instead of the usual places.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random encoder.")
@click.option("--device", help="cpu, cuda, ...")
@click.option("--threads", type=int, help="CPU threads of torch.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str | None,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    before: tuple[Path, ...],
    vae: Path | None,
    limit: int,
    text_encoder: str,
    seed: int,
    device: str | None,
    threads: int | None,
    out: Path,
) -> None:
    """Measure what features know before and after ViLex training; write understand.json and understand.md."""
    start(threads)
    began = time.perf_counter()
    with usage_errors():
        folder, where = Path(find_weights(model)), pick_device(device)
        vilex = load_vilex(folder).to(where)
        views = build_views(vilex, before, vae, seed)
        size = vilex.encoder.image_size
        train, held_out = load_split(data, size, limit), load_split(validation, size, None)
        tokenizer, encoder = load_text_encoder(text_encoder)
    encoder.to(where)
    train, held_out = (Split(*(pictures.to(where) for pictures in split)) for split in (train, held_out))
    exam = Exam(train, held_out, lambda texts: embed_sentences(texts, tokenizer, encoder))
    scores = exam.grade(views) | {"chance": exam.chance()}
    report = {
        "model": weights_name(folder),
        "fingerprint": fingerprint(vilex),
        "pictures": exam.counts(),
        "tables": table_hashes((*data, *validation)),
        "seed": seed,
        "scores": scores,
        "seconds": round(time.perf_counter() - began),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "understand.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = markdown_table(scores)
    (out / "understand.md").write_text(table, encoding="utf-8")
    click.echo(table)


if __name__ == "__main__":
    main()
