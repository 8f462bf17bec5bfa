"""What training ViLex by a preset costs before a GPU is rented: memory, pictures per second and GPU-hours.

    python -m train.plan --preset sd21 --gpus 8

Floating-point operations and the tensors that the backward pass needs are counted on the real code and the published
settings of the networks, with tensors that have shapes but no data. What the counts cannot say is assumed, and printed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import click
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from train.memory import checkpoint_gradients, count_kept
from train.presets import PRESETS, TrainConfig
from train.published import PUBLISHED, build_published
from train.state import count_flops, parameter_count
from vilex.diffusion import TextToImage
from vilex.encoder import build_encoder
from vilex.loss import Noise, diffusion_loss
from vilex.model import ViLex
from vilex.prompt import compose_leading, special_tokens

Build = Callable[[], tuple[TextToImage, ViLex]]
_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Cost:
    """Of one picture: operations and bytes kept for the backward pass; of all: bytes kept, and parameters."""

    flops: float
    kept_per_picture: float
    kept_once: float  # such as low-precision copies of the weights
    frozen: int
    trained: int


@dataclass(frozen=True)
class Machine:
    """Assumptions about GPUs and what joins them."""

    memory: float = 80e9  # bytes
    flops: float = 790e12  # per second, as dense bf16 products reach on an H100 or H200
    share: float = 0.35  # of it that training reaches
    within_node: float = 400e9  # bytes per second and GPU
    between_nodes: float = 50e9
    headroom: float = 1.1  # memory taken for each byte counted


@dataclass(frozen=True)
class Plan:
    """A way to train on a number of GPUs; micro_batch 0 when not even one picture fits."""

    gpus: int
    micro_batch: int
    accumulate: int
    memory: float  # bytes per GPU
    step_seconds: float

    def images_per_second(self, config: TrainConfig) -> float:
        """Over all GPUs."""
        return config.batch_size / self.step_seconds

    def gpu_hours(self, config: TrainConfig) -> float:
        """Of the whole run."""
        return self.gpus * config.max_steps * self.step_seconds / 3600


def measure_cost(build: Build, checkpointed: bool = False, precision: torch.dtype = torch.bfloat16) -> Cost:
    """The cost of training what `build` makes, without its weights or the time that training takes."""
    with torch.device("meta"), patch.object(nn.Module, "to", lambda module, *_, **__: module):  # no data to move
        t2i, model = build()
    t2i.scheduler = type(t2i.scheduler).from_config(t2i.scheduler.config)  # its tables are small and needed
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (t2i, model):
            module.to_empty(device="cpu")
        if checkpointed:
            checkpoint_gradients(t2i)
        (_, one), (flops, two) = (count_step(t2i, model, size, precision) for size in (1, 2))
    frozen = sum(parameter.numel() for parameter in t2i.parameters())
    return Cost(flops / 2, two - one, 2 * one - two, frozen, parameter_count(model))


def count_step(t2i: TextToImage, model: ViLex, batch_size: int, precision: torch.dtype) -> tuple[float, int]:
    """Operations of one step forward and back, and bytes kept beside the parameters."""
    parameters = [*t2i.parameters(), *model.parameters()]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32), count_kept(parameters) as kept:
        flops = count_flops(lambda: step_loss(t2i, model, batch_size))
    return flops, kept.total


def step_loss(t2i: TextToImage, model: ViLex, batch_size: int) -> Tensor:
    """The loss of pictures that are their tokens alone, all that fit; its value says nothing."""
    special, length = special_tokens(t2i.tokenizer), t2i.config.context_length
    room = length - len(special.prefix) - len(special.suffix)
    pixels = torch.zeros(batch_size, 3, t2i.image_size, t2i.image_size)
    vilex_tokens = model(pixels, min(room, model.pooler.config.num_queries))  # (B,N,D)
    words = torch.zeros(batch_size, 0, dtype=torch.long)
    condition = t2i.encode_prompt(compose_leading(words, words.bool(), vilex_tokens, special, length))
    noise = Noise(torch.zeros(batch_size, *t2i.latent_shape), torch.zeros(batch_size, dtype=torch.long))
    return diffusion_loss(t2i, t2i.denoiser, t2i.encode(pixels), condition, noise)


def make_plan(cost: Cost, config: TrainConfig, machine: Machine, gpus: int) -> Plan:
    """The largest power of 2 as micro-batch that fits, and what it comes to."""
    fitting = [size for size in _sizes(config, gpus) if _memory(cost, machine, gpus, size) <= machine.memory]
    micro_batch = max(fitting, default=0)
    compute = cost.flops * config.batch_size / (gpus * machine.flops * machine.share)
    bandwidth = machine.within_node if gpus <= _GPUS_PER_NODE else machine.between_nodes
    exchange = 2 * (gpus - 1) / gpus * 4 * cost.trained / bandwidth  # a ring passes each gradient twice
    accumulate = config.batch_size // (gpus * micro_batch) if micro_batch else 0
    return Plan(gpus, micro_batch, accumulate, _memory(cost, machine, gpus, micro_batch or 1), compute + exchange)


def _sizes(config: TrainConfig, gpus: int) -> list[int]:
    """Powers of 2 that divide one GPU's share of a batch."""
    if config.batch_size % gpus:
        raise ValueError(f"a batch of {config.batch_size} pictures cannot be shared by {gpus} GPUs")
    share = config.batch_size // gpus
    return [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]


def _memory(cost: Cost, machine: Machine, gpus: int, micro_batch: int) -> float:
    copies = 3 + (gpus > 1)  # weight, gradient and average, and what the gradients are exchanged in
    parameters = 4 * (cost.frozen + copies * cost.trained)
    return machine.headroom * (parameters + cost.kept_once + cost.kept_per_picture * micro_batch)


def build_preset(name: str) -> tuple[TextToImage, ViLex]:
    """The frozen model that a preset is for, and what it trains."""
    preset, t2i = PRESETS[name], build_published(PUBLISHED[name])
    encoder = build_encoder(preset.encoder)
    return t2i, ViLex(encoder, replace(preset.pooler, patch_width=encoder.patch_width, text_width=t2i.text_width))


def describe(plan: Plan, config: TrainConfig) -> str:
    """One row of the table."""
    if not plan.micro_batch:
        return f"{plan.gpus:5d}  does not fit: one picture takes {plan.memory / 1e9:.0f} GB"
    hours = plan.gpu_hours(config)
    return (
        f"{plan.gpus:5d}{plan.micro_batch:13d}{plan.accumulate:12d}{plan.memory / 1e9:12.0f}"
        f"{plan.images_per_second(config):10.0f}{hours:12,.0f}{hours / plan.gpus / 24:10.1f}"
    )


@click.command()
@click.option("--preset", type=click.Choice(sorted(PUBLISHED)), required=True)
@click.option("--gpus", type=click.IntRange(1, 4096), multiple=True, default=(1, 8, 64), show_default=True)
@click.option("--memory", type=click.FloatRange(1), default=80, show_default=True, help="GB per GPU.")
@click.option("--tflops", type=click.FloatRange(1), default=790, show_default=True, help="bf16 products of a GPU.")
@click.option("--share", type=click.FloatRange(0.01, 1), default=0.35, show_default=True, help="Of it that is reached.")
@click.option("--checkpoint-gradients", is_flag=True, help="As of the trainers.")
def main(
    preset: str, gpus: tuple[int, ...], memory: float, tflops: float, share: float, checkpoint_gradients: bool
) -> None:
    """Predict memory, speed and GPU-hours of training ViLex by a preset."""
    config, machine = PRESETS[preset].vilex, Machine(memory=memory * 1e9, flops=tflops * 1e12, share=share)
    cost = measure_cost(lambda: build_preset(preset), checkpoint_gradients)
    try:
        plans = [make_plan(cost, config, machine, count) for count in gpus]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(
        f"{preset}: {cost.trained / 1e6:.0f}M trained and {cost.frozen / 1e6:.0f}M frozen parameters; per picture "
        f"{cost.flops / 1e12:.2f} TFLOP, {cost.kept_per_picture / 1e9:.2f} GB kept\n"
        f"{config.max_steps:,} steps of {config.batch_size} pictures\n"
        f"assumed: {tflops:g} TFLOP/s per GPU in dense bf16 products, of which {share:.0%} is reached; frozen weights "
        f"in fp32; gradients exchanged at {machine.within_node / 1e9:g} GB/s in a node of {_GPUS_PER_NODE}, "
        f"{machine.between_nodes / 1e9:g} between nodes, while nothing else runs; {machine.headroom - 1:.0%} memory "
        "beyond what was counted\n\n"
        " GPUs  micro-batch  accumulate  GB per GPU  images/s   GPU-hours      days"
    )
    for plan in plans:
        click.echo(describe(plan, config))


if __name__ == "__main__":
    main()
