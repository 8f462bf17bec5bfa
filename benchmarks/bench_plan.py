"""Whether train.plan's counts tell how training time grows: two sizes of a small model, on the CPU.

`python -m benchmarks.bench_plan` prints seconds per step as measured, beside the operations counted without weights.
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
from vilex.model import ViLex

WIDTHS = (64, 128)  # of the U-Net's first blocks
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(width: int) -> tuple[TextToImage, ViLex]:
    """A model in Stable Diffusion's shape, for pictures of 128 px."""
    shape = {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "cross_attention_dim": 256}
    t2i = build_published(Published(16, shape, (TEXT,)))
    encoder = EncoderConfig(width=192, layers=4, heads=6, patch_size=8)
    return t2i, ViLex(encoder, PoolerConfig(text_width=256))


def measure_step(width: int, batch_size: int, repeats: int) -> float:
    """Median seconds of a step forward and back."""
    t2i, model = build(width)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step_loss(t2i, model, batch_size).backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@click.command()
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(batch_size: int, repeats: int, threads: int) -> None:
    """Compare predicted operations with measured seconds."""
    torch.set_num_threads(threads)
    flops = [measure_cost(partial(build, width), precision=torch.float32).flops * batch_size for width in WIDTHS]
    seconds = [measure_step(width, batch_size, repeats) for width in WIDTHS]
    for width, work, time_taken in zip(WIDTHS, flops, seconds, strict=True):
        click.echo(f"width {width}: {work / 1e9:.1f} GFLOP predicted, {time_taken:.3f} s measured")
    click.echo(f"ratio: {flops[1] / flops[0]:.2f} predicted, {seconds[1] / seconds[0]:.2f} measured")


if __name__ == "__main__":
    main()
