"""What both trainers share: command-line options, loading, the run's pictures, and the road from start to end."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.batches import Batch, CaptionTable, draw_batch
from train.data import Pictures, load_pictures, sampling_weights
from train.presets import PRESETS, Preset, TrainConfig
from train.state import TrainState, count_flops, parameter_count, step_generator, train
from vilex.diffusion import TextToImage

log = logging.getLogger(__name__)
MAX_HELD_OUT = 512  # pictures of the validation loss
_BYTES_PER_PARAMETER = 20  # fp32 weight, gradient, two moments, EMA


@dataclass(frozen=True)
class RunOptions:
    """How and where to train, beside what the TrainConfig says."""

    out: Path
    workers: int = 1
    accumulate: int = 1
    compiled: bool = False
    fp32: bool = False
    dry_run: bool = False


_OPTIONS = (
    click.option("--preset", type=click.Choice(sorted(PRESETS)), default="nano", show_default=True),
    click.option("--data", multiple=True, required=True, help="Parquet tables, folders, .tar shards or hub:NAME."),
    click.option("--validation", multiple=True, help="Held-out pictures, read like --data."),
    click.option("--limit", type=click.IntRange(min=1), help="Read only this many pictures."),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
    click.option("--text-encoder", help="Folder of MiniLM, instead of the usual places."),
    click.option("--max-steps", type=int, help="Instead of the preset's."),
    click.option("--batch-size", type=int, help="Instead of the preset's."),
    click.option("--learning-rate", type=float, help="Instead of the preset's."),
    click.option("--seed", type=int, help="Instead of the preset's."),
    click.option("--workers", type=int, default=1, show_default=True, help="Processes that write captions."),
    click.option("--threads", type=int, help="CPU threads of torch."),
    click.option("--accumulate", type=int, default=1, show_default=True, help="Micro-batches per step."),
    click.option("--compile", "compiled", is_flag=True, help="torch.compile the denoiser."),
    click.option("--fp32", is_flag=True, help="No bf16 autocast."),
    click.option("--dry-run", is_flag=True, help="Log sizes, compute and memory, then stop."),
)


def training_options(command: Callable) -> Callable:
    """The options that every trainer has."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def start(threads: int | None) -> None:
    """Logging and threads of a trainer's process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if threads:
        torch.set_num_threads(threads)


def override(config: TrainConfig, accumulate: int, overrides: dict[str, float | None]) -> TrainConfig:
    """The preset's settings with those given on the command line. Raises ValueError when they do not fit."""
    config = replace(config, **{k: v for k, v in overrides.items() if v is not None})
    if accumulate < 1 or config.batch_size % accumulate:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of accumulate {accumulate}")
    return config


def load_data(
    preset: Preset, data: tuple[str, ...], validation: tuple[str, ...], limit: int | None
) -> tuple[Pictures, Pictures | None]:
    """Training pictures, and the held-out ones if any."""
    size = preset.unet.image_size
    held_out = load_pictures(list(validation), image_size=size, limit=MAX_HELD_OUT) if validation else None
    return load_pictures(list(data), image_size=size, limit=limit), held_out


class TrainingRun(ABC):
    """One run: pictures and captions on the device, a trained module, and the loop around it."""

    module: nn.Module  # what is trained
    captions: CaptionTable

    def __init__(
        self, t2i: TextToImage, pictures: Pictures, held_out: Pictures | None, preset: Preset, config: TrainConfig,
        options: RunOptions,
    ) -> None:
        self.config, self.options = config, options
        self.accelerator = Accelerator(
            mixed_precision="no" if options.fp32 else "bf16",
            gradient_accumulation_steps=options.accumulate,
            cpu=not torch.cuda.is_available(),
        )
        if config.batch_size % (options.accumulate * self.accelerator.num_processes):
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of accumulate x processes "
                f"({options.accumulate} x {self.accelerator.num_processes})"
            )
        self.device = self.accelerator.device
        self.t2i = t2i.to(self.device).to(memory_format=torch.channels_last)
        self.weights = sampling_weights(pictures.records, preset.source_weights) if preset.source_weights else None
        self.pictures, self.held_out = pictures.to(self.device), held_out and held_out.to(self.device)

    def attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hands the trained module and its optimiser to accelerate and to the run's state."""
        model = torch.compile(module) if self.options.compiled else module
        self.module = module
        self.model, optimizer = self.accelerator.prepare(model, optimizer)
        self.state = TrainState(self.options.out, self.accelerator, module, optimizer, self.config)

    @abstractmethod
    def batch_loss(self, batch: Batch, global_step: int, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch, 0-d; all that is random comes from `generator` or from (seed, global_step)."""

    @abstractmethod
    def sample(self) -> dict[str, float]:
        """Writes sample grids and returns metrics; runs under the EMA weights."""

    @abstractmethod
    def save_weights(self) -> None:
        """Writes the trained weights; runs under the EMA weights."""

    @property
    def trim(self) -> bool:
        """Whether prompts are cut to the longest of the batch: fixed shapes are faster on a GPU only."""
        return self.device.type == "cpu"

    def loss(self, global_step: int, micro: int) -> Tensor:
        """Loss of one micro-batch on this process."""
        size = self.config.batch_size // (self.options.accumulate * self.accelerator.num_processes)
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        share = slice(first, first + size)
        batch = draw_batch(self.pictures, self.captions.variants, self.config, self.weights, global_step, share)
        generator = step_generator(self.config.seed, global_step, first + 1, self.device)
        with self.accelerator.autocast():
            return self.batch_loss(batch, global_step, generator)

    def report(self) -> None:
        """Logs sizes, compute and memory before the first step."""
        parameters = parameter_count(self.module)
        pictures = self.config.batch_size / (self.options.accumulate * self.accelerator.num_processes)
        flops = count_flops(lambda: self.loss(0, 0)) / pictures
        self.module.zero_grad()
        stored = self.pictures.pixels.nbytes + self.captions.ids.nbytes
        log.info("%d pictures, %.2f GB with %d texts each", len(self.pictures), stored / 1e9, self.captions.variants)
        log.info("%.2fM trained parameters; with gradients, optimiser and EMA %.2f GB", parameters / 1e6,
                 parameters * _BYTES_PER_PARAMETER / 1e9)
        total = flops * self.config.batch_size * self.config.max_steps
        log.info("%.2f GFLOP per picture, %.3f PFLOP for %d steps of %d pictures", flops / 1e9, total / 1e15,
                 self.config.max_steps, self.config.batch_size)
        self.flops_per_picture = flops

    def run(self) -> None:
        """Trains what is left of the run and writes its weights; with dry_run only reports."""
        self.report()
        if self.options.dry_run:
            return
        if self.state.resume():
            log.info("resuming at step %d", self.state.global_step)
        with torch.random.fork_rng():
            train(self.state, self.model, self.loss, self._sample, self.flops_per_picture)
        if self.accelerator.is_main_process:
            with self.state.averaged():
                self.save_weights()

    def _sample(self) -> dict[str, float]:
        self.module.eval()
        try:
            with self.accelerator.autocast():
                return self.sample()
        finally:
            self.module.train()
