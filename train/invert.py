"""Textual inversion as a rival: free vectors for each picture by gradient steps, with the time that takes.

    python -m train.invert --model nano --data pictures64-val-00-of-01.parquet --limit 32 --out runs/invert

Writes inversion.json, and inversion.png with the pictures as inversion and as our encoder redraw them. Pictures are
inverted side by side, which does not change their vectors: each has its own loss, and Adam treats each number alone.
Source: Gal et al. 2022, An Image is Worth One Word.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from train.arms import Conditioner, describe_arm, draw, parse_arms
from train.data import Pictures, load_pictures
from train.judge import Judge
from train.report import LoadPipeline, describe, measuring_options, save_report, save_sheet
from train.run import usage_errors
from train.subjects import content_caption
from train.sweep import parse_numbers
from vilex.config import GenerationConfig
from vilex.loss import Noise, diffusion_loss, draw_noise
from vilex.pipeline import VilexPipeline
from vilex.polish import spell
from vilex.t2i import TextToImage

log = logging.getLogger(__name__)
SHEET_PICTURES = 8
TIMESTEP_SHIFT = 5.0  # of embedded models, as in the training of our encoder


@torch.enable_grad()
def invert(
    conditioner: Conditioner, pixels: Tensor, start: Tensor, steps: int, learning_rate: float, draws: int, seed: int
) -> Iterator[Tensor]:
    """Vectors (B,N,D) for pixels (B,3,H,W) in [-1,1] after each of so many steps of Adam from `start` (B,N,D).

    learning_rate: in standard deviations of the word embeddings. draws: noises per picture and step.
    """
    t2i, like = conditioner.t2i, next(conditioner.t2i.denoiser.parameters())
    scale = t2i.word_statistics()[1].to(pixels.device)  # (D,)
    values = (start.to(scale) / scale).requires_grad_()  # (B,N,D)
    optimizer = torch.optim.Adam([values], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    latents = t2i.encode(pixels).detach()
    for _ in range(steps):
        condition = conditioner.tokens(values * scale).image.to(like.device, like.dtype)
        loss = diffusion_loss(t2i, t2i.denoiser, latents, condition, _noise(t2i, len(pixels), draws, generator))
        optimizer.zero_grad()
        (loss * len(pixels)).backward()  # each picture's own mean
        optimizer.step()
        yield values.detach() * scale


def _noise(t2i: TextToImage, count: int, draws: int, generator: torch.Generator) -> Noise:
    shift = TIMESTEP_SHIFT if t2i.embedded else 1.0
    noise = Noise.concatenate([draw_noise(t2i, count, generator, shift) for _ in range(draws)])
    return Noise(noise.values.to(t2i.device), noise.timesteps.to(t2i.device))


def invert_all(
    pipeline: VilexPipeline, pictures: Pictures, num_tokens: int, snapshots: Sequence[int], batch_size: int,
    learning_rate: float, draws: int, seed: int,
) -> dict[int, tuple[Tensor, float]]:  # fmt: skip
    """Vectors (S,N,D) of all pictures, and the seconds per picture, after each number of steps in `snapshots`.

    Each picture starts at the words for what it shows.
    """
    conditioner, found = Conditioner(pipeline), {steps: [] for steps in snapshots}
    seconds = dict.fromkeys(snapshots, 0.0)
    for indices in torch.arange(len(pictures)).split(batch_size):
        began = time.perf_counter()
        words = [content_caption(pictures.records[i]) for i in indices]
        start = torch.stack([spell(pipeline.t2i, text, num_tokens) for text in words])
        pixels = pictures.batch(indices).to(pipeline.device)
        states = invert(conditioner, pixels, start, max(snapshots), learning_rate, draws, seed + int(indices[0]))
        for step, vectors in enumerate(states, 1):
            if step in found:
                found[step].append(vectors)
                seconds[step] += time.perf_counter() - began
        log.info("%d vectors: %d of %d pictures", num_tokens, int(indices[-1]) + 1, len(pictures))
    return {steps: (torch.cat(found[steps]), seconds[steps] / len(pictures)) for steps in snapshots}


@torch.no_grad()
def encoding_seconds(pipeline: VilexPipeline, pictures: Pictures, repeats: int = 5) -> float:
    """Seconds that our encoder takes for one picture alone."""
    pixels = pictures.batch(torch.arange(1)).to(pipeline.device)
    pipeline.encoder(pixels)
    began = time.perf_counter()
    for _ in range(repeats):
        pipeline.encoder(pixels)
    return (time.perf_counter() - began) / repeats


def draw_ways(
    pipeline: VilexPipeline, pictures: Pictures, found: dict[str, Tensor], arms: Sequence[str], config: GenerationConfig
) -> dict[str, Tensor]:
    """Levels (S,3,H,W) uint8 by way: vectors that were found by name, and arms of train.arms."""
    conditioner = Conditioner(pipeline)
    ways = {name: lambda rows, vectors=vectors: conditioner.tokens(vectors[rows]) for name, vectors in found.items()}
    ways |= {arm: describe_arm(pipeline, pictures, arm) for arm in arms}
    return {name: draw(pipeline.t2i, way, len(pictures), config, label=name) for name, way in ways.items()}


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Held-out pictures.")
@click.option("--limit", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--tokens", default="1,16", show_default=True, help="Free vectors per picture.")
@click.option("--snapshots", default="100,500", show_default=True, help="Gradient steps after which to draw.")
@click.option("--learning-rate", type=float, default=0.3, show_default=True)
@click.option("--draws", type=click.IntRange(min=1), default=4, show_default=True, help="Noises per picture and step.")
@click.option("--arms", default="text,dense,1,16,75", show_default=True, help="Of train.evaluate, to compare with.")
@click.option("--guidance", type=float, default=GenerationConfig().guidance_scale, show_default=True)
@click.option("--steps", type=int, default=10, show_default=True, help="Denoising steps.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Inverted side by side.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    limit: int,
    tokens: str,
    snapshots: str,
    learning_rate: float,
    draws: int,
    arms: str,
    guidance: float,
    steps: int,
    batch_size: int,
    seed: int,
    out: Path,
) -> None:
    """Invert pictures by gradient steps and compare; write inversion.json and inversion.png."""
    with usage_errors():
        counts, kept_steps = ([int(n) for n in parse_numbers(text)] for text in (tokens, snapshots))
        config = GenerationConfig(num_inference_steps=steps, guidance_scale=guidance)
        names = parse_arms(arms)
        pipeline = load()
        pictures = load_pictures(list(data), image_size=pipeline.t2i.image_size, limit=limit)
        judge = Judge(pictures, None, str(pipeline.device), quick=True)
    found, seconds = {}, {}
    for count in counts:
        results = invert_all(pipeline, pictures, count, kept_steps, batch_size, learning_rate, draws, seed)
        for taken, (vectors, time_each) in results.items():
            name = f"{count} free, {taken} steps"
            found[name], seconds[name] = vectors, time_each
    seconds |= dict.fromkeys(filter(str.isdigit, names), encoding_seconds(pipeline, pictures))
    samples = draw_ways(pipeline, pictures, found, names, config)
    rows = {name: {"seconds": seconds.get(name, 0.0)} | judge.closeness(levels) for name, levels in samples.items()}
    settings = {"learning_rate": learning_rate, "draws": draws, "batch_size": batch_size, "seed": seed}
    settings |= {"guidance_scale": guidance, "num_inference_steps": steps, "pictures": len(pictures)}
    save_report(out / "inversion.json", describe(pipeline, data) | settings | {"ways": rows})
    save_sheet(out / "inversion.png", {"input": judge.real} | samples, SHEET_PICTURES)
    for name, row in rows.items():
        log.info("%s: %.1f s, LPIPS %.3f", name, row["seconds"], row["lpips"])


if __name__ == "__main__":
    main()
