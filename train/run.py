"""What both trainers share: command-line options, loading, the run's pictures, and the road from start to end."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from torch import Tensor, nn

from train.batches import Batch, CaptionTable, draw_batch, tabulate
from train.data import Pictures, Record, load_pictures, sampling_weights
from train.memory import checkpoint_gradients
from train.perceptual import build_perceptual
from train.presets import PRESETS, Preset, TrainConfig
from train.sharding import start_adafactor
from train.shards import ShardBatches, ShardLoader, Shards, Write, load_shards
from train.sources import require_apart
from train.state import TrainState, count_flops, parameter_count, step_generator, train
from vilex.codes import fingerprint
from vilex.devices import has_bf16
from vilex.diffusion import TextToImage
from vilex.loss import Noise, draw_noise

log = get_logger(__name__)  # speaks on the main process only
MAX_HELD_OUT = 512  # pictures of the validation loss
_BYTES_PER_PARAMETER = 20  # fp32 weight, gradient, two moments, EMA
_NOISE_STREAM = 1  # of step_generator


@dataclass(frozen=True)
class RunOptions:
    """How and where to train, beside what the TrainConfig says."""

    out: Path
    accumulate: int = 1
    compiled: bool = False
    fp32: bool = False
    dry_run: bool = False
    checkpoint_gradients: bool = False
    stream: int | None = None  # workers that read shards while training
    minutes: float | None = None  # of the loop, in place of max_steps


_OPTIONS = (
    click.option(
        "--preset",
        type=click.Choice(sorted(PRESETS)),
        default="nano",
        show_default=True,
        help="tiny: tests; nano: a CPU; mini: one GPU; midi: at 256 px; sd15, sd21, sdxl, sd3: Stable Diffusion with "
        "SigLIP, for a GPU node.",
    ),
    click.option(
        "--data", multiple=True, required=True, help="Parquet tables, folders, .tar shards, hub:NAME[@SPLIT]."
    ),
    click.option("--validation", multiple=True, help="Held-out pictures, read like --data."),
    click.option(
        "--stream",
        metavar="WORKERS",
        type=click.IntRange(min=0),
        help="Read .tar shards while training, with so many workers per process, instead of holding all pictures.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Read only this many pictures."),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
    click.option("--text-encoder", help="Folder of MiniLM, instead of the usual places."),
    click.option("--max-steps", type=int, help="Instead of the preset's."),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        help="Instead of --max-steps: as many steps as fit. Loading comes before, saving after.",
    ),
    click.option("--batch-size", type=int, help="Instead of the preset's."),
    click.option("--learning-rate", type=float, help="Instead of the preset's."),
    click.option("--perceptual-weight", type=float, help="Of how unlike x0 looks to EfficientNet-lite2; 0 = off."),
    click.option("--warmup-steps", type=int, help="Instead of the preset's."),
    click.option("--timestep-shift", type=float, help="Above 1 the noisier timesteps are drawn more often."),
    click.option("--seed", type=int, help="Instead of the preset's."),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Processes that decode pictures and write captions.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch."),
    click.option(
        "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Micro-batches per step."
    ),
    click.option("--compile", "compiled", is_flag=True, help="torch.compile the denoiser."),
    click.option("--fp32", is_flag=True, help="No bf16 autocast, which is off anyway where it is slow."),
    click.option(
        "--checkpoint-gradients", is_flag=True, help="Less memory: compute the frozen networks' states twice."
    ),
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
    torch.backends.cudnn.benchmark = True  # a run's shapes stay the same
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def usage_errors() -> Iterator[None]:
    """What a user got wrong, in one sentence and with exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error


def build_accelerator(batch_size: int, accumulate: int, fp32: bool) -> Accelerator:
    """On a GPU if there is one; in bf16 unless fp32 is asked for or the device is slow in bf16.

    Raises ValueError when a step's pictures cannot be shared out evenly among processes and micro-batches.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(
        mixed_precision="no" if fp32 or not has_bf16(device) else "bf16",
        gradient_accumulation_steps=accumulate,
        cpu=device.type == "cpu",
    )
    processes = accelerator.num_processes
    if batch_size % (accumulate * processes):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulate x processes ({accumulate} x {processes})"
        )
    return accelerator


def override(config: TrainConfig, overrides: dict[str, float | None], minutes: float | None = None) -> TrainConfig:
    """The preset's settings with those given on the command line.

    Raises ValueError when one is out of range, or when both minutes and max_steps say where to end.
    """
    if minutes is not None and overrides.get("max_steps") is not None:
        steps = overrides["max_steps"]
        raise ValueError(f"--minutes {minutes:g} and --max-steps {steps} both say where to end: give one")
    return replace(config, **{k: v for k, v in overrides.items() if v is not None})


def load_data(
    image_size: int,
    data: Sequence[str],
    validation: Sequence[str] = (),
    limit: int | None = None,
    stream: int | None = None,
    workers: int = 1,
) -> tuple[Pictures | Shards, Pictures | None]:
    """Training pictures, in shards with `stream`, and the held-out ones if any.

    Raises ValueError when they share a file, folder or hub data set, and for workers beside those of `stream`.
    """
    require_apart(data, validation)
    if stream is not None and workers > 1:
        raise ValueError(f"--stream {stream} has workers of its own: leave --workers {workers} out")
    held_out = load_pictures(list(validation), image_size=image_size, limit=MAX_HELD_OUT) if validation else None
    if stream is not None:
        return load_shards(data, image_size, limit), held_out
    return load_pictures(list(data), image_size=image_size, limit=limit, workers=workers), held_out


def source_weights(records: Sequence[Record], shares: Mapping[str, float]) -> Tensor | None:
    """Probability of each picture (S,) by its source's share; None, all alike, if a source has no share."""
    sources = {record.source for record in records}
    if not sources <= shares.keys():
        return None
    return sampling_weights(records, {source: share for source, share in shares.items() if source in sources})


class TrainingRun(ABC):
    """One run: pictures and captions on the device, a trained module, and the loop around it."""

    module: nn.Module  # what is trained
    captions: CaptionTable | None = None  # of pictures in memory
    stream: ShardLoader | None = None  # of pictures in shards

    def __init__(
        self,
        t2i: TextToImage,
        pictures: Pictures | Shards,
        held_out: Pictures | None,
        preset: Preset,
        config: TrainConfig,
        options: RunOptions,
    ) -> None:
        self.config, self.options = config, options
        self.accelerator = build_accelerator(config.batch_size, options.accumulate, options.fp32)
        self.device = self.accelerator.device
        self.t2i = t2i.to(self.device).to(memory_format=torch.channels_last)
        if options.checkpoint_gradients:
            checkpoint_gradients(self.t2i)
        perceptual = build_perceptual(self.t2i, config.perceptual_weight)
        self.perceptual = perceptual and self.compiled(perceptual.to(self.device, memory_format=torch.channels_last))
        streamed = isinstance(pictures, Shards)
        self.weights = None if streamed else source_weights(pictures.records, preset.source_weights)
        if self.weights is None and preset.source_weights:
            why = "shards are read in turn" if streamed else "some are of sources that the preset has no share for"
            log.info("all pictures weigh alike: %s", why)
        self.pictures, self.held_out = pictures.to(self.device), held_out and held_out.to(self.device)

    def read_texts(self, variants: int, write_all: Callable[[Pictures], list[list[str]]], write: Write) -> None:
        """Prepares the texts beside the pictures: of all now, or of shards' when they are read."""
        tokenize = partial(tabulate, tokenizer=self.t2i.tokenizer, context_length=self.t2i.config.context_length)
        if isinstance(self.pictures, Shards):
            batches = ShardBatches(self.pictures, self.config, variants, self.share, write, tokenize)
            self.stream = ShardLoader(batches, self.options.accumulate, self.options.stream)
        else:
            self.captions = tokenize(write_all(self.pictures)).to(self.device)

    def attach(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: tuple[str, nn.Module],
        model: nn.Module | None = None,
    ) -> None:
        """Hands the trained module, or `model` around it, and its optimiser to accelerate and to the run's state.

        frozen: what is read but not trained, with its name.
        """
        shown = copy.deepcopy(module).cpu() if self.split else None
        self.module = module if shown is None else shown
        self.model, optimizer = self.accelerator.prepare(module if model is None else model, optimizer)
        if self.split:
            start_adafactor(optimizer)
        inputs = {"data": self.pictures.fingerprint(), frozen[0]: fingerprint(frozen[1])}
        self.state = TrainState(self.options.out, self.accelerator, module, optimizer, self.config, inputs, shown)

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, compiled with --compile; sampling keeps the plain one, whose shapes vary."""
        return torch.compile(network) if self.options.compiled else network

    @abstractmethod
    def batch_loss(self, batch: Batch, noise: Noise, global_step: int) -> Tensor:
        """Mean loss of a batch, 0-d; what else is random comes from (seed, global_step)."""

    @abstractmethod
    def sample(self) -> dict[str, float]:
        """Writes sample grids and returns metrics; runs under the EMA weights."""

    @abstractmethod
    def save_weights(self) -> None:
        """Writes the trained weights; runs under the EMA weights."""

    @property
    def split(self) -> bool:
        """Whether FSDP splits the trained module among the processes; `module` is then a whole copy of it."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def trim(self) -> bool:
        """Whether prompts are cut to the longest of the batch: fixed shapes are faster on a GPU and when compiled.

        Latent models read their padding, so there it stays.
        """
        return self.device.type == "cpu" and self.t2i.embedded and not self.options.compiled

    @property
    def micro_size(self) -> int:
        """Pictures of one micro-batch on one process."""
        return self.config.batch_size // (self.options.accumulate * self.accelerator.num_processes)

    def share(self, micro: int) -> slice:
        """Which of a step's pictures are this process's in one micro-batch."""
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * self.micro_size
        return slice(first, first + self.micro_size)

    def draw(self, global_step: int, micro: int) -> Batch:
        """The pictures of one micro-batch on this process, and their texts."""
        if self.stream is not None:
            return self.stream.batch(global_step, micro)
        return draw_batch(self.pictures, self.captions, self.config, self.weights, global_step, self.share(micro))

    def loss(self, global_step: int, micro: int) -> Tensor:
        """Loss of one micro-batch on this process: a share of the step's pictures and of its noise."""
        batch, share = self.draw(global_step, micro), self.share(micro)
        generator = step_generator(self.config.seed, global_step, _NOISE_STREAM, self.device)
        # drawn for the whole step, so that a run does not depend on how its batches are split
        size, shift = self.config.batch_size, self.config.timestep_shift
        draws = [draw_noise(self.t2i, size, generator, shift) for _ in range(self.config.noise_draws)]
        noise = Noise.concatenate([draw.rows(share) for draw in draws])
        with self.accelerator.autocast():
            return self.batch_loss(batch, noise, global_step)

    def report(self) -> None:
        """Logs sizes, compute and memory before the first step."""
        with torch.compiler.set_stance("force_eager"):  # compiled code hides its operations
            self.flops_per_picture = count_flops(lambda: self.loss(self.state.global_step, 0)) / self.micro_size
        self.model.zero_grad()
        config, parameters = self.config, parameter_count(self.module)
        self._report_data()
        log.info("on %s, mixed precision: %s", self.device, self.accelerator.mixed_precision)
        log.info(
            "%.2fM trained parameters; with gradients, optimiser and EMA up to %.2f GB",
            parameters / 1e6,
            parameters * _BYTES_PER_PARAMETER / 1e9,
        )
        log.info(
            "%.2f GFLOP per picture, %.3f PFLOP for %d steps of %d pictures",
            self.flops_per_picture / 1e9,
            self.flops_per_picture * config.batch_size * config.max_steps / 1e15,
            config.max_steps,
            config.batch_size,
        )

    def _report_data(self) -> None:
        if self.stream is not None:
            log.info("%s, read while training", self.pictures.fingerprint())
            return
        stored = self.pictures.pixels.nbytes + self.captions.ids.nbytes
        log.info("%d pictures, %.2f GB with %d texts each", len(self.pictures), stored / 1e9, self.captions.variants)

    def resume(self) -> None:
        """Takes up the run in --out, if there is one. Raises ValueError when it has other settings or inputs."""
        if self.state.resume():
            log.info("resuming at step %d", self.state.global_step)

    def run(self) -> None:
        """Trains what is left of the run and writes its weights; with dry_run only reports."""
        self.report()
        if self.options.dry_run:
            return
        train(self.state, self.model, self.loss, self._sample, self.flops_per_picture, self.options.minutes)
        with self.state.averaged(), self._evaluating():
            if self.accelerator.is_main_process:
                self.save_weights()
            self.accelerator.wait_for_everyone()

    def _sample(self) -> dict[str, float]:
        with self._evaluating(), self.accelerator.autocast():
            return self.sample()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.module.eval()
        try:
            yield
        finally:
            self.module.train().requires_grad_(True)  # a pipeline freezes its parts
