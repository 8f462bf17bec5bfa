"""Textual inversion as a rival: free vectors for each picture by gradient steps, with the time that takes.

    python -m train.invert --model nano --data pictures64-val-00-of-01.parquet --limit 32 --out runs/invert

Writes inversion.json, and inversion.png with the pictures as inversion, our encoder and Polish redraw them. Pictures
are inverted side by side, which does not change their vectors: each has its own loss and noises, and Adam treats each
number alone. Source: Gal et al. 2022, An Image is Worth One Word.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from train.arms import Conditioner, arm_configs, describe_arm, draw, parse_arms, require_arms
from train.data import Pictures, load_pictures
from train.judge import Judge
from train.report import LoadPipeline, Numbers, measuring_options, provenance, save_report, save_sheet
from train.run import usage_errors
from train.subjects import content_caption
from vilex.config import MAX_TOKENS, Config, GenerationConfig, PolishConfig, Range, check_range, range_of, setting
from vilex.images import to_images
from vilex.loss import Noise, diffusion_loss, draw_noise
from vilex.pipeline import VilexPipeline
from vilex.polish import spell
from vilex.sampling import build_generators
from vilex.t2i import TextToImage

log = logging.getLogger(__name__)
SHEET_PICTURES = 8
TIMESTEP_SHIFT = 5.0  # of embedded models, as in the training of our encoder
MAX_STEPS = 10_000


@dataclass(frozen=True)
class InversionConfig(Config):
    """How pictures are inverted."""

    learning_rate: float = setting(0.3, 1e-4, 100, "in standard deviations of the word embeddings")
    draws: int = setting(4, 1, 64, "noises per picture and step")
    batch_size: int = setting(16, 1, 1024, "pictures inverted side by side")
    seed: int = setting(0, 0, 2**32 - 1, "32-bit seed of the noises of the first picture; picture i takes seed + i")


@torch.enable_grad()
def invert(
    conditioner: Conditioner, pixels: Tensor, start: Tensor, steps: int, config: InversionConfig, first: int = 0
) -> Iterator[Tensor]:
    """Vectors (B,N,D) for pixels (B,3,H,W) in [-1,1] after each of so many steps of Adam from `start` (B,N,D).

    first: number of the first picture, which says what noises it gets.
    Raises FloatingPointError when the loss is not finite.
    """
    t2i, like = conditioner.t2i, next(conditioner.t2i.denoiser.parameters())
    scale = t2i.word_statistics()[1].to(pixels.device)  # (D,)
    values = (start.to(scale) / scale).requires_grad_()  # (B,N,D)
    optimizer = torch.optim.Adam([values], lr=config.learning_rate)
    scaler = torch.amp.GradScaler(pixels.device.type, enabled=like.dtype == torch.float16)
    generators = build_generators(range(config.seed + first, config.seed + first + len(pixels)))
    latents = t2i.encode(pixels).detach()
    for step in range(steps):
        condition = conditioner.read(values * scale).to(like.device, like.dtype)
        loss = diffusion_loss(t2i, t2i.denoiser, latents, condition, _noise(t2i, generators, config.draws))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is not finite at step {step + 1}; try --dtype float32")
        optimizer.zero_grad()
        scaler.scale(loss * len(pixels)).backward()  # each picture's own mean
        scaler.step(optimizer)
        scaler.update()
        yield values.detach() * scale


def _noise(t2i: TextToImage, generators: Sequence[torch.Generator], draws: int) -> Noise:
    """Noises of a step, the first of each picture, then the second of each."""
    shift = TIMESTEP_SHIFT if t2i.embedded else 1.0
    own = [draw_noise(t2i, draws, generator, shift) for generator in generators]
    values = torch.stack([noise.values for noise in own], 1).flatten(0, 1)  # (draws*B,C,h,w)
    timesteps = torch.stack([noise.timesteps for noise in own], 1).flatten()
    return Noise(values.to(t2i.device), timesteps.to(t2i.device))


def invert_all(
    pipeline: VilexPipeline, pictures: Pictures, num_tokens: int, snapshots: Sequence[int], config: InversionConfig
) -> dict[int, tuple[Tensor, float]]:
    """Vectors (S,N,D) of all pictures, and the seconds per picture, after each number of steps in `snapshots`.

    Each picture starts at the words for what it shows.
    """
    conditioner, found = Conditioner(pipeline), {steps: [] for steps in snapshots}
    seconds = dict.fromkeys(snapshots, 0.0)
    for indices in torch.arange(len(pictures)).split(config.batch_size):
        words = [content_caption(pictures.records[i]) for i in indices]
        start = torch.stack([spell(pipeline.t2i, text, num_tokens) for text in words])
        pixels = pictures.batch(indices).to(pipeline.device)
        began = _now()
        for step, vectors in enumerate(invert(conditioner, pixels, start, max(snapshots), config, int(indices[0])), 1):
            if step in found:
                found[step].append(vectors)
                seconds[step] += _now() - began
        log.info("%d vectors: %d of %d pictures", num_tokens, int(indices[-1]) + 1, len(pictures))
    return {steps: (torch.cat(found[steps]), seconds[steps] / len(pictures)) for steps in snapshots}


def polish_all(pipeline: VilexPipeline, pictures: Pictures, steps: int, seed: int) -> tuple[Tensor, float]:
    """Our tokens (S,N,D) of all pictures, as many as there are, polished, and the seconds per picture."""
    found, began = [], _now()
    for i, image in enumerate(to_images(pictures.batch(torch.arange(len(pictures))))):
        found.append(pipeline.polish(image, pipeline.max_tokens, steps, seed + i))
        log.info("polished: %d of %d pictures", i + 1, len(pictures))
    return torch.stack(found), (_now() - began) / len(pictures)


@torch.no_grad()
def encoding_seconds(pipeline: VilexPipeline, pictures: Pictures, repeats: int = 5) -> float:
    """Seconds that our encoder takes for one picture alone."""
    pixels = pictures.batch(torch.arange(1)).to(pipeline.device)
    pipeline.encoder(pixels)
    began = _now()
    for _ in range(repeats):
        pipeline.encoder(pixels)
    return (_now() - began) / repeats


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_ways(
    pipeline: VilexPipeline,
    pictures: Pictures,
    found: dict[str, Tensor],
    arms: dict[str, GenerationConfig],
    config: GenerationConfig,
) -> dict[str, Tensor]:
    """Levels (S,3,H,W) uint8 by way: vectors (S,N,D) that were found, by name, and arms of train.arms."""
    conditioner, count, t2i = Conditioner(pipeline), len(pictures), pipeline.t2i
    free = {
        name: draw(t2i, lambda rows, vectors=vectors: conditioner.tokens(vectors[rows]), count, config, label=name)
        for name, vectors in found.items()
    }
    return free | {
        arm: draw(t2i, describe_arm(pipeline, pictures, arm), count, own, label=arm) for arm, own in arms.items()
    }


@click.command()
@measuring_options
@click.option("--data", multiple=True, required=True, help="Held-out pictures.")
@click.option("--limit", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--tokens", type=Numbers(1, MAX_TOKENS, whole=True), default="1,16", show_default=True, help="Vectors.")
@click.option(
    "--snapshots",
    type=Numbers(1, MAX_STEPS, whole=True),
    default="100,500",
    show_default=True,
    help="Gradient steps after which to draw.",
)
@click.option("--learning-rate", type=float, default=InversionConfig.learning_rate, show_default=True)
@click.option(
    "--draws", type=int, default=InversionConfig.draws, show_default=True, help="Noises per picture and step."
)
@click.option(
    "--batch-size", type=int, default=InversionConfig.batch_size, show_default=True, help="Inverted together."
)
@click.option("--seed", type=int, default=InversionConfig.seed, show_default=True)
@click.option(
    "--polish",
    type=click.IntRange(0, int(range_of(PolishConfig, "num_steps").maximum)),
    default=0,
    show_default=True,
    help="Gradient steps of Polish, which also improves our encoder's tokens, for as many of them as --arms has.",
)
@click.option("--arms", default="text,dense,1,16,75", show_default=True, help="Of train.evaluate, to compare with.")
@click.option("--guidance", type=float, default=GenerationConfig.guidance_scale, show_default=True)
@click.option("--steps", type=int, default=GenerationConfig.num_inference_steps, show_default=True, help="Of drawing.")
def main(
    load: LoadPipeline,
    data: tuple[str, ...],
    limit: int,
    tokens: list[int],
    snapshots: list[int],
    polish: int,
    arms: str,
    guidance: float,
    steps: int,
    out: Path,
    **settings: float,
) -> None:
    """Invert pictures by gradient steps and compare; write inversion.json and inversion.png."""
    with usage_errors():
        inversion, names = InversionConfig(**settings), parse_arms(arms)
        counts = [int(name) for name in names if name.isdigit()]
        if polish and not counts:
            raise ValueError(f"--polish needs a number of tokens in --arms, got {arms!r}")
        config = GenerationConfig(num_inference_steps=steps, guidance_scale=guidance)
        pipeline = load()
        require_arms(pipeline, names)
        for count in tokens:  # free ones, which need no encoder
            check_range("tokens", count, Range(1, pipeline.t2i.max_tokens))
        pictures = load_pictures(list(data), image_size=pipeline.t2i.image_size, limit=limit)
        judge = Judge(pictures, None, str(pipeline.device))
    found, seconds = {}, {}
    for count in tokens:
        results = invert_all(pipeline, pictures, count, snapshots, inversion)
        for taken, (vectors, time_each) in results.items():
            name = f"{count} free, {taken} steps"
            found[name], seconds[name] = vectors, time_each
    if polish:
        vectors, time_each = polish_all(pipeline, pictures, polish, inversion.seed)
        for count in counts:
            name = f"{count} polished, {polish} steps"
            found[name], seconds[name] = vectors[:, :count], time_each
    if pipeline.has_encoder:
        seconds |= dict.fromkeys(map(str, counts), encoding_seconds(pipeline, pictures))
    samples = draw_ways(pipeline, pictures, found, arm_configs(names, config), config)
    rows = {name: {"seconds": seconds.get(name, 0.0)} | judge.closeness(levels) for name, levels in samples.items()}
    drawn = {"guidance_scale": guidance, "num_inference_steps": steps, "pictures": len(pictures)}
    save_report(out / "inversion.json", provenance(pipeline, data) | asdict(inversion) | drawn | {"ways": rows})
    save_sheet(out / "inversion.png", {"input": judge.real} | samples, SHEET_PICTURES)
    for name, row in rows.items():
        log.info("%s: %.2f s, LPIPS %.3f", name, row["seconds"], row["lpips"])


if __name__ == "__main__":
    main()
