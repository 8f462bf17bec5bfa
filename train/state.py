"""The state of a training run and the loop around it, shared by train_t2i and train_vilex.

Everything a step draws is a function of (seed, step), so a run resumes exactly by running the same
command again, on another number of processes too: the checkpoint holds weights, EMA, optimiser and step,
and no random state.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from train.presets import TrainConfig
from train.sharding import fill, gather, split_like

Loss = Callable[[int, int], Tensor]  # (global_step, micro_step) -> mean loss of that micro-batch
CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
MAY_CHANGE = {"max_steps", "sample_every", "save_every", "log_every"}  # settings that a resumed run may change


def lr_schedule(config: TrainConfig, global_step: int) -> float:
    """Factor on the learning rate: linear warm-up, then cosine to 0 at max_steps."""
    if global_step < config.warmup_steps:
        return (global_step + 1) / config.warmup_steps
    progress = (global_step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_generator(seed: int, global_step: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on seed, step and stream number alone; streams 0 to 1008 of all steps differ."""
    mixed = (seed * 1_000_003 + global_step) * 1_009 + stream
    return torch.Generator(device).manual_seed(mixed % 2**63)


class TrainState:
    """Trained module, its EMA and its optimiser, in one folder on disk.

    folder/checkpoint.pt is replaced atomically; folder/metrics.jsonl gets one line per logged step.
    inputs: what the run reads and must find again when it is resumed, by name, as fingerprints.
    shown: a whole copy of the module for samples and weights, where FSDP splits the module itself.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        inputs: Mapping[str, str],
        shown: nn.Module | None = None,
    ) -> None:
        self.folder, self.accelerator, self.config, self.inputs = folder, accelerator, config, dict(inputs)
        self.ema = EMAModel(
            module.parameters(), decay=0.9999, use_ema_warmup=True, power=config.ema_power, foreach=True
        )
        self.ema.to(accelerator.device)
        self.module, self.optimizer, self.shown = module, optimizer, shown
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.global_step = 0

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT_NAME

    def due(self, every: int) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens after this step."""
        return self.global_step % every == 0 or self.global_step == self.config.max_steps

    def resume(self) -> bool:
        """Whether a checkpoint was there and has been loaded.

        Raises ValueError if it is of other settings, inputs or another network.
        """
        if not self.path.is_file():
            return False
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        self._require_same(saved)
        try:
            self.module.load_state_dict(split_like(saved["module"], self.module.state_dict()))
        except RuntimeError as error:
            raise ValueError(f"{self.folder} holds a run of another network; give another --out") from error
        self.optimizer.load_state_dict(split_like(saved["optimizer"], self.optimizer.state_dict()))
        self.ema.load_state_dict(split_like(saved["ema"], self.ema.state_dict()))
        self.ema.to(self.accelerator.device)
        self.global_step = saved["global_step"]
        return True

    def _require_same(self, saved: Mapping[str, Any]) -> None:
        before = asdict(TrainConfig()) | saved["config"]  # a setting that came later had its default
        changed = {k for k, v in asdict(self.config).items() if before[k] != v} - MAY_CHANGE
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(sorted(changed))}); "
                "give another --out or the same settings"
            )
        if "inputs" not in saved:
            raise ValueError(f"{self.folder} holds a run that does not say what data it reads; give another --out")
        for name, now in self.inputs.items():
            if (before := saved["inputs"].get(name)) != now:
                raise ValueError(
                    f"{self.folder} holds a run whose {name} was {before}, now it is {now}; "
                    f"give another --out or the same {name}"
                )

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then takes its place; every process must call it.

        Raises FloatingPointError on weights that are not finite, so that the last good checkpoint stays.
        """
        networks = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        networks = gather(networks)
        if not self.accelerator.is_main_process:
            return
        if not all(tensor.isfinite().all() for tensor in networks["module"].values()):
            raise FloatingPointError(f"weights are not finite at step {self.global_step}; lower the learning rate")
        about = {"global_step": self.global_step, "config": asdict(self.config), "inputs": self.inputs}
        temporary = self.path.with_suffix(".tmp")
        torch.save(networks | about, temporary)
        temporary.replace(self.path)

    def open_log(self) -> None:
        """Makes the folder; lines of metrics.jsonl from after the checkpoint go, since they will be written again."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_NAME
        lines = (
            path.read_text(encoding="utf-8").splitlines(keepends=True) if self.global_step and path.is_file() else []
        )
        kept = [line for line in lines if json.loads(line)["global_step"] <= self.global_step]
        path.write_text("".join(kept), encoding="utf-8")

    def log_metrics(self, **metrics: float) -> None:
        """One line of metrics.jsonl."""
        if self.accelerator.is_main_process:
            line = {"global_step": self.global_step, "images_seen": self.global_step * self.config.batch_size} | metrics
            with open(self.folder / METRICS_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps({k: round(v, 7) for k, v in line.items()}) + "\n")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While active the module, or the copy that is shown of it, holds the EMA weights; for every process."""
        with self._copied() if self.shown is not None else self._swapped():
            yield

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self.ema.store(self.module.parameters())
        self.ema.copy_to(self.module.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.module.parameters())

    @contextmanager
    def _copied(self) -> Iterator[None]:
        fill(self.shown, self.ema.shadow_params)
        self.shown.to(self.accelerator.device)
        try:
            yield
        finally:
            self.shown.to("cpu")  # where it waits, so that it takes no room beside the split one


class _Meter:
    """Mean loss and speed since it was last restarted."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.restart()

    def restart(self) -> None:
        self.since, self.total = self.state.global_step, torch.zeros((), device=self.state.accelerator.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the steps so far out of the speed, but not out of the loss."""
        self.timed_since, self.started = self.state.global_step, time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Mean loss over all processes, and pictures per second. Raises FloatingPointError unless it is finite."""
        steps, timed = (self.state.global_step - first for first in (self.since, self.timed_since))
        loss = self.state.accelerator.reduce(self.total / steps, "mean").item()  # waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.state.global_step}; lower the learning rate")
        return loss, timed * self.state.config.batch_size / (time.perf_counter() - self.started)


def train(
    state: TrainState,
    model: nn.Module,
    loss: Loss,
    on_sample: Callable[[], dict[str, float]],
    flops_per_picture: float,
    minutes: float | None = None,
) -> None:
    """Runs the steps that are left, or with `minutes` as many as fit into them.

    model: the module as prepared by accelerate (it may be wrapped or compiled); on_sample writes sample
    grids under the EMA weights and returns metrics for the log.
    """
    config, meter = state.config, _Meter(state)
    ends = None if minutes is None else time.perf_counter() + 60 * minutes
    if ends is not None:  # a guess until the speed is known, of a run that may have got further before
        state.config = replace(config, max_steps=2 * state.global_step or config.max_steps)
    pace: float | None = None  # pictures per second, smoothed, lest the learning rate jump with the machine's moods
    state.open_log()
    first = state.global_step
    if first == 0:
        _sample(state, on_sample)
        meter.restart()
    with _progress(state) as bar:
        while state.global_step < state.config.max_steps:
            value, grad_norm = _step(state, model, loss)
            meter.total += value
            bar.update()
            if state.due(config.log_every):
                speed = _log(state, meter, bar, grad_norm, flops_per_picture)
                if ends is not None:
                    pace = speed if pace is None else 0.8 * pace + 0.2 * speed
                    bar.total = _fit_steps(state, ends - time.perf_counter(), pace)
                meter.restart()
            elif state.global_step == first + 1:
                meter.restart_clock()  # the first step compiles, which says nothing about the speed of the others
            if state.due(config.sample_every):
                _sample(state, on_sample)
                meter.restart()
            if state.due(config.save_every):
                state.save()
                meter.restart()


def _progress(state: TrainState) -> tqdm:
    hidden = not state.accelerator.is_main_process
    return tqdm(total=state.config.max_steps, initial=state.global_step, disable=hidden, mininterval=5)


def _step(state: TrainState, model: nn.Module, loss: Loss) -> tuple[Tensor, Tensor]:
    """One optimiser step: its mean loss and gradient norm, both left on the device."""
    factor = lr_schedule(state.config, state.global_step)
    for group, rate in zip(state.optimizer.param_groups, state.base_rates, strict=True):
        group["lr"] = rate * factor
    accelerator, total = state.accelerator, 0.0
    for micro in range(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            value = loss(state.global_step, micro)
            accelerator.backward(value)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), state.config.grad_clip)
            state.optimizer.step()
            state.optimizer.zero_grad()
            total = total + value.detach()
    state.ema.step(state.module.parameters())
    state.global_step += 1
    return total / accelerator.gradient_accumulation_steps, grad_norm


def _fit_steps(state: TrainState, seconds: float, speed: float) -> int:
    """Ends the run after as many steps as all processes can take in the seconds left, at pictures per second."""
    steps = torch.tensor(max(0.0, seconds) * speed / state.config.batch_size, device=state.accelerator.device)
    left = math.floor(state.accelerator.reduce(steps, "mean").item())
    state.config = replace(state.config, max_steps=max(1, state.global_step + left))
    return state.config.max_steps


def _log(state: TrainState, meter: _Meter, bar: tqdm, grad_norm: Tensor, flops_per_picture: float) -> float:
    """Writes a line of metrics; returns pictures per second."""
    loss, speed = meter.read()
    rate = lr_schedule(state.config, state.global_step - 1) * state.base_rates[0]
    state.log_metrics(
        loss=loss, grad_norm=float(grad_norm), learning_rate=rate, images_per_second=speed,
        tflops=speed * flops_per_picture / 1e12,
    )  # fmt: skip
    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
    return speed


def _sample(state: TrainState, on_sample: Callable[[], dict[str, float]]) -> None:
    with state.averaged(), torch.no_grad(), _all_threads(state.accelerator):
        if state.accelerator.is_main_process:
            state.log_metrics(**on_sample())
        state.accelerator.wait_for_everyone()


@contextmanager
def _all_threads(accelerator: Accelerator) -> Iterator[None]:
    """On a CPU the first process computes with the threads of all others too, which wait."""
    threads = torch.get_num_threads()
    if accelerator.is_main_process and accelerator.device.type == "cpu":
        torch.set_num_threads(threads * accelerator.num_processes)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_CPU_ATTENTION = {  # which torch does not count of itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(run: Callable[[], Tensor]) -> float:
    """Floating-point operations of one forward and backward pass of `run`, which returns a loss."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run().backward()
    return float(counter.get_total_flops())


def parameter_count(module: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
