"""Whether train.plan's counts tell how training time grows: small models of several sizes, on the CPU.

`python -m benchmarks.bench_plan` prints operations counted without weights, seconds per step as measured, and their
ratio, which stays the same as far as the counts tell the time.
"""

import statistics
import time
from functools import partial

import click
import torch

from train.plan import measure_cost, step_loss
from train.published import Published, build_published
from vilex.config import EncoderConfig, PoolerConfig
from vilex.diffusion import TextToImage
from vilex.encoder import build_encoder
from vilex.model import ViLex

SIZES = ((32, 8), (32, 16), (96, 16), (160, 16))  # width of the U-Net's first blocks, side of its latents
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(width: int, side: int) -> tuple[TextToImage, ViLex]:
    """A model in Stable Diffusion's shape, for pictures of eight times that side."""
    shape = {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "cross_attention_dim": 256}
    t2i = build_published(Published(side, shape, (TEXT,)))
    encoder = build_encoder(EncoderConfig(width=192, layers=4, heads=6, patch_size=8))
    return t2i, ViLex(encoder, PoolerConfig(text_width=256))


def measure_step(width: int, side: int, batch_size: int, repeats: int) -> float:
    """Median seconds of a step forward and back."""
    t2i, model = build(width, side)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step_loss(t2i, model, batch_size).backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@click.command()
@click.option("--batch-size", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(batch_size: int, repeats: int, threads: int) -> None:
    """Compare predicted operations with measured seconds."""
    torch.set_num_threads(threads)
    for size in SIZES:
        cost = measure_cost(partial(build, *size), precision=torch.float32)
        gflop, seconds = cost.flops * batch_size / 1e9, measure_step(*size, batch_size, repeats)
        click.echo(
            f"width {size[0]:3d}, latents {size[1]:2d}: {gflop:6.1f} GFLOP predicted, {seconds:6.3f} s measured, "
            f"{gflop / seconds:6.1f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
