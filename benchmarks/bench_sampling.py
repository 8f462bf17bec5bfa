"""What sampling costs beside the denoiser it cannot do without.

`python -m benchmarks.bench_sampling` prints seconds and, since machines differ, ratios measured in one run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import click
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from vilex.config import GenerationConfig
from vilex.pipeline import VilexPipeline
from vilex.sampling import Conditions, build_generators, build_scheduler, draw_noise, sample, sample_steps

LADDER = (1, 16, 75)
PREVIEW_EVERY = 4  # steps, as the app shows them


@dataclass(frozen=True)
class Bench:
    """One pipeline, one picture and the settings that all measurements share."""

    pipeline: VilexPipeline
    image: Image.Image
    config: GenerationConfig
    repeats: int

    @property
    def conditions(self) -> Conditions:
        tokens = self.pipeline.encode(self.image)[0]
        return self.pipeline.conditions("", [tokens], self.config)

    def seconds(self, *actions: Callable[[], object]) -> list[float]:
        """Median wall time of each action, one after another in turn, so that all meet the same machine."""
        times = [[self._time(action) for action in actions] for _ in range(self.repeats + 1)]
        return [median(column) for column in zip(*times[1:], strict=True)]  # the first round warms up

    def _time(self, action: Callable[[], object]) -> float:
        start = self.now()
        action()
        return self.now() - start

    def now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def denoiser_seconds(self) -> Iterator[list[float]]:
        """A list that collects the seconds of each denoiser call."""
        denoiser, starts, seconds = self.pipeline.t2i.denoiser, [], []
        hooks = (
            denoiser.register_forward_pre_hook(lambda *_: starts.append(self.now())),
            denoiser.register_forward_hook(lambda *_: seconds.append(self.now() - starts[-1])),
        )
        try:
            yield seconds
        finally:
            for hook in hooks:
                hook.remove()


def draw_with_previews(bench: Bench, conditions: Conditions) -> list[Image.Image]:
    """Pictures, after the previews that the app shows."""
    for step in sample_steps(bench.pipeline.t2i, conditions, bench.config):
        if step.index % PREVIEW_EVERY == 0:
            bench.pipeline.decode(step.latents)
    return bench.pipeline.decode(step.latents)


@torch.no_grad()
def draw_with_diffusers(bench: Bench, conditions: Conditions) -> Tensor:
    """Clean latents of the loop that diffusers' documentation shows, with its own scheduler and guidance."""
    t2i, ours = bench.pipeline.t2i, build_scheduler(bench.config.scheduler, bench.pipeline.t2i, 1)
    scheduler = DPMSolverMultistepScheduler.from_config(ours.config)
    scheduler.set_timesteps(bench.config.num_inference_steps, device=bench.pipeline.device)
    condition = conditions.uncond.concatenate([conditions.uncond, conditions.image])
    condition = condition.to(bench.pipeline.device, bench.pipeline.dtype)
    generators = build_generators([bench.config.seed])
    latents = draw_noise(generators, t2i.latent_shape).to(bench.pipeline.device)
    for t in scheduler.timesteps:
        batch = scheduler.scale_model_input(torch.cat([latents] * 2), t).to(bench.pipeline.dtype)
        uncond, image = t2i.denoise(batch, t, condition).float().chunk(2)
        guided = uncond + bench.config.guidance_scale * (image - uncond)
        latents = scheduler.step(guided, t, latents, generator=generators).prev_sample
    return latents


def loop_overhead(bench: Bench) -> float:
    """Wall time of a sample with previews, relative to the sum of its denoiser calls."""
    conditions, ratios = bench.conditions, []
    for _ in range(bench.repeats + 1):
        with bench.denoiser_seconds() as seconds:
            ratios.append(bench._time(partial(draw_with_previews, bench, conditions)) / sum(seconds))
    return median(ratios[1:])


def compare_dtypes(bench: Bench) -> tuple[float, float]:
    """Seconds of one sample in fp32 and in bf16."""
    conditions, dtype = bench.conditions, bench.pipeline.dtype

    def draw_in(dtype: torch.dtype) -> None:
        bench.pipeline.to(bench.pipeline.device, dtype)
        sample(bench.pipeline.t2i, conditions, bench.config)

    fp32, bf16 = bench.seconds(partial(draw_in, torch.float32), partial(draw_in, torch.bfloat16))
    bench.pipeline.to(bench.pipeline.device, dtype)
    return fp32, bf16


def picture() -> Image.Image:
    """256x256 with colour and edges everywhere."""
    bands = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    return Image.merge("RGB", bands)


@click.command()
@click.option("--model", help="Folder, name or hub id of the weights; the default ones without it.")
@click.option("--device", help="cpu, cuda or mps.")
@click.option("--steps", default=20, show_default=True, help="Denoising steps.")
@click.option("--repeats", default=5, show_default=True, help="Measured repetitions; the median counts.")
@click.option("--threads", type=int, help="CPU threads; torch's own choice without it.")
def main(model: str | None, device: str | None, steps: int, repeats: int, threads: int | None) -> None:
    """Prints what sampling at batch 1 costs on this machine."""
    if threads:
        torch.set_num_threads(threads)
    pipeline = VilexPipeline.from_pretrained(model, device=device)
    bench = Bench(pipeline, picture(), GenerationConfig(num_inference_steps=steps), repeats)
    side, threads = pipeline.t2i.image_size, torch.get_num_threads()
    click.echo(f"{pipeline.name}, {side} x {side} pixels, {steps} steps, {pipeline.dtype}, {threads} threads")
    click.echo(f"loop with previews / its denoiser calls: {loop_overhead(bench):.3f}")
    row, one, encode = bench.seconds(
        lambda: list(pipeline.reconstruct(bench.image, LADDER, bench.config)),
        lambda: pipeline.generate("", [bench.image], bench.config),
        lambda: pipeline.encode(bench.image),
    )
    click.echo(f"row of {' / '.join(map(str, LADDER))} tokens: {row:.2f} s")
    click.echo(f"encoding and one picture of 75 tokens: {one:.2f} s, of which encoding {encode:.3f} s")
    conditions = bench.conditions
    ours, theirs = bench.seconds(
        partial(sample, pipeline.t2i, conditions, bench.config), partial(draw_with_diffusers, bench, conditions)
    )
    click.echo(f"our loop / diffusers' loop: {ours / theirs:.3f}")
    fp32, bf16 = compare_dtypes(bench)
    click.echo(f"bf16 / fp32: {bf16 / fp32:.3f} ({bf16:.2f} s, {fp32:.2f} s)")


if __name__ == "__main__":
    main()
