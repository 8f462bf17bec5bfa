"""From noise to a picture: scheduler, one generator per image, guidance, and a step at a time.

`sample_steps` is a generator: closing it is how a caller stops within one step.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning, TextToImage
from vilex.flow import FlowModel
from vilex.guidance import BranchWeights, branch_weights, guide, outside_interval

OnStep = Callable[[int, int, Tensor], None]
# algorithm and order; DPM-Solver++ of first order is DDIM, and with fresh noise at each step it is DDPM's own sampler
_SOLVERS = {
    "dpm++": ("dpmsolver++", 2), "sde-dpm++": ("sde-dpmsolver++", 2), "ddim": ("dpmsolver++", 1),
    "ddpm": ("sde-dpmsolver++", 1),
}  # fmt: skip
_LAMBDA_MIN = -5.1  # the cosine schedule's first steps have almost no signal: without it DPM-Solver++ explodes


@dataclass(frozen=True)
class Conditions:
    """One condition per guidance branch, each of batch 1 or of the number of pictures."""

    uncond: Conditioning
    image: Conditioning | None = None
    joint: Conditioning | None = None
    words: Conditioning | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the branches that are there."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def expand(self, num_images: int) -> Self:
        """The same conditions with a row per picture. Raises ValueError when some have another number of rows."""
        branches = {name: getattr(self, name) for name in self.names}
        if wrong := {len(c.prompt_embeds) for c in branches.values()} - {1, num_images}:
            raise ValueError(f"conditions for {max(wrong)} pictures cannot serve {num_images}")
        expanded = {k: c.expand(num_images) if len(c.prompt_embeds) == 1 else c for k, c in branches.items()}
        return replace(self, **expanded)

    def select(self, rows: Tensor) -> Self:
        """The conditions of some pictures, rows int64 (K,), of conditions with a row per picture."""
        return replace(self, **{name: _select(getattr(self, name), rows) for name in self.names})

    @staticmethod
    def concatenate(conditions: Sequence["Conditions"]) -> "Conditions":
        """One batch of several conditions that have the same branches and a row per picture each."""
        names = conditions[0].names
        return Conditions(**{name: Conditioning.concatenate([getattr(c, name) for c in conditions]) for name in names})


@dataclass(frozen=True)
class Step:
    """State after one denoising step: `latents` (B,C,h,w) is the current estimate of the clean picture."""

    index: int
    num_inference_steps: int
    latents: Tensor


class ClippedDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ for pictures: at each step the model makes x0 one that can be, in place of diffusers' threshold."""

    clip: Callable[[Tensor], Tensor]  # the model's

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return self.clip(sample)


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """Euler's method along a flow, with the two members that diffusers gives all other schedulers."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The sample as it is."""
        return sample


def build_scheduler(name: str, t2i: TextToImage, num_inference_steps: int) -> SchedulerMixin:
    """One of diffusers' schedulers with its timesteps set. Raises ValueError for one that does not suit the model."""
    name = t2i.pick_scheduler(name)
    if isinstance(t2i, FlowModel):
        # A model's size is fixed, and with it what its scheduler shifts dynamically
        base = _settings(t2i.scheduler) | {"use_dynamic_shifting": False, "shift": t2i.shift}
        return _flow_scheduler(name, t2i, base, num_inference_steps)
    scheduler = copy.deepcopy(_unset_scheduler(name, t2i.scheduler, t2i.embedded))
    if t2i.embedded:
        scheduler.clip = t2i.clip
    scheduler.set_timesteps(timesteps=trailing_timesteps(scheduler, num_inference_steps))
    return scheduler


def _settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


@lru_cache(maxsize=8)  # diffusers inspects signatures to make one, which takes seven times as long as a copy
def _unset_scheduler(name: str, noise_scheduler: SchedulerMixin, is_embedded: bool) -> SchedulerMixin:
    shared = _settings(noise_scheduler) | {"timestep_spacing": "trailing"}
    if name == "euler":
        return EulerDiscreteScheduler.from_config(shared)
    algorithm_type, solver_order = _SOLVERS[name]
    return ClippedDPMSolver.from_config(
        shared,
        algorithm_type=algorithm_type,
        solver_order=solver_order,
        lambda_min_clipped=_LAMBDA_MIN,
        thresholding=is_embedded,
        sample_max_value=1.0,
    )


def _flow_scheduler(name: str, t2i: FlowModel, base: dict[str, Any], num_inference_steps: int) -> SchedulerMixin:
    if name != "dpm++":  # along a flow DDIM is Euler's method
        scheduler = FlowEuler.from_config(base, stochastic_sampling=False)
        scheduler.set_timesteps(num_inference_steps, sigmas=t2i.euler_sigmas(num_inference_steps))
        return scheduler
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=base["num_train_timesteps"],
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=_SOLVERS[name][1],
        use_flow_sigmas=True,
        flow_shift=base["shift"],
    )
    scheduler.set_timesteps(num_inference_steps)
    scheduler.timesteps = scheduler.sigmas[:-1] * base["num_train_timesteps"]  # which it has rounded down
    return scheduler


def trailing_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> list[int]:
    """Evenly spaced timesteps from the scheduler's noisiest down to one spacing above a clean picture.

    diffusers' own trailing spacing rounds to one timestep too many, the last below 0, for 61, 103, 121 and
    122 steps of 1000; elsewhere it is this one.
    """
    scheduler.set_timesteps(1)
    start = int(scheduler.timesteps[0]) + 1
    spaced = torch.linspace(start, 0, num_inference_steps + 1, dtype=torch.float64)[:-1]
    return (spaced.round().long() - 1).tolist()


def build_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """float32 (B,C,h,w) on the CPU; row i comes from generator i alone."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample_steps(
    t2i: TextToImage, conditions: Conditions, config: GenerationConfig, seeds: list[int] | None = None
) -> Generator[Step, Tensor | None, None]:
    """Denoises one picture per seed, yielding after each step; the last Step holds the result.

    Without `seeds` there are config.num_images of them from config.seed on. What is sent to the generator, rows
    int64 (K,), are the pictures to go on with; the others leave the batch.
    Raises FloatingPointError when the model's output is not finite.
    """
    seeds = seeds or [config.seed + i for i in range(config.num_images)]
    # the denoiser's own `dtype` searches all its parameters
    like = torch.empty(0, device=t2i.device, dtype=next(t2i.denoiser.parameters()).dtype)
    scheduler = build_scheduler(config.scheduler, t2i, config.num_inference_steps)
    conditions = conditions.expand(len(seeds))
    weights = [_weights_at(t, conditions, config, scheduler) for t in scheduler.timesteps]
    batches = {needed: _batch(conditions, needed, like) for needed in {w.needed for w in weights}}
    generators = build_generators(seeds)
    noisy_latents = draw_noise(generators, t2i.latent_shape).to(like.device) * scheduler.init_noise_sigma
    for i, (t, weight) in enumerate(zip(scheduler.timesteps, weights, strict=True)):
        model_input = scheduler.scale_model_input(noisy_latents, t)
        prediction = _predict(t2i, model_input, t, batches[weight.needed], weight)
        if not torch.isfinite(prediction).all():
            raise FloatingPointError(f"the model gave values that are not finite at step {i + 1}; try dtype float32")
        fresh = {"variance_noise": draw_noise(generators, t2i.latent_shape)} if _is_stochastic(scheduler) else {}
        noisy_latents = scheduler.step(prediction, t, noisy_latents, **fresh, return_dict=False)[0]
        last = i + 1 == len(weights)
        estimate = noisy_latents if last else t2i.estimate_clean(model_input, prediction, t)
        kept = yield Step(i, len(weights), estimate)
        if kept is not None:
            kept = kept.to(like.device)
            noisy_latents, conditions = noisy_latents[kept], conditions.select(kept)
            batches = {needed: _batch(conditions, needed, like) for needed in batches}
            generators = [generators[row] for row in kept.tolist()]
            _keep_history(scheduler, kept)


def sample(
    t2i: TextToImage,
    conditions: Conditions,
    config: GenerationConfig,
    on_step: OnStep | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Clean latents (B,C,h,w); on_step(step, num_inference_steps, latents) sees the estimate after each step."""
    for step in sample_steps(t2i, conditions, config, seeds):
        if on_step is not None:
            on_step(step.index, step.num_inference_steps, step.latents)
    return step.latents


def _weights_at(
    timestep: Tensor, conditions: Conditions, config: GenerationConfig, scheduler: SchedulerMixin
) -> BranchWeights:
    level = float(timestep) / scheduler.config.num_train_timesteps
    scales = _scales(conditions, config)
    if not config.guidance_low <= level <= config.guidance_high:
        scales = outside_interval(*scales)
    return branch_weights(conditions.image is not None, conditions.joint is not None, *scales)


def count_branches(conditions: Conditions, config: GenerationConfig) -> int:
    """The most predictions per picture that any step of a sample makes."""
    has_images, has_words = conditions.image is not None, conditions.joint is not None
    inside = _scales(conditions, config)
    return max(len(branch_weights(has_images, has_words, *s).needed) for s in (inside, outside_interval(*inside)))


def _scales(conditions: Conditions, config: GenerationConfig) -> tuple[float, float, float]:
    return config.guidance_scale, config.tfg_scale, 0.0 if conditions.words is None else config.words_scale


def _is_stochastic(scheduler: SchedulerMixin) -> bool:
    return scheduler.config.get("algorithm_type", "").startswith("sde")


def _select(condition: Conditioning, rows: Tensor) -> Conditioning:
    tensors = {f.name: getattr(condition, f.name) for f in fields(condition)}
    return replace(condition, **{k: v[rows.to(v.device)] for k, v in tensors.items() if v is not None})


def _keep_history(scheduler: SchedulerMixin, rows: Tensor) -> None:
    if isinstance(scheduler, DPMSolverMultistepScheduler):  # the others do not look back
        scheduler.model_outputs = [None if x is None else x[rows] for x in scheduler.model_outputs]


def _batch(conditions: Conditions, needed: tuple[str, ...], like: Tensor) -> Conditioning:
    batch = Conditioning.concatenate([getattr(conditions, name) for name in needed])
    return batch.trimmed().to(like.device, like.dtype)


def _predict(
    t2i: TextToImage, model_input: Tensor, timestep: Tensor, condition: Conditioning, weights: BranchWeights
) -> Tensor:
    names = weights.needed
    batch = model_input.repeat(len(names), 1, 1, 1).to(condition.prompt_embeds)  # (branches*B,C,h,w)
    timesteps = torch.full((len(batch),), timestep.item(), device=batch.device)
    predictions = t2i.denoise(batch, timesteps, condition).float().chunk(len(names))
    return guide(dict(zip(names, predictions, strict=True)), weights)
