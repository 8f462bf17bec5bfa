"""Starts a vision tower from a teacher: its patch tokens learn to tell the patch features of a trained network.

A small ViT learns slowly through a frozen text-to-image model; here it first gets dense, cheap targets.
What was the teacher must not judge the result afterwards.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import Pictures, background_colours, batch_indices
from train.features import FeatureTable, Teacher, table_fits, teacher_features
from train.state import step_generator
from vilex.config import Config, setting
from vilex.encoder import PatchEncoder

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class DistilConfig(Config):
    """Settings of one distillation."""

    steps: int = setting(1000, 1, 1_000_000)
    batch_size: int = setting(64, 1, 65536, "pictures per step")
    learning_rate: float = setting(1e-3, 0, 1, "largest, after warm-up and before the cosine")
    weight_decay: float = setting(0.05, 0, 1)
    warmup_fraction: float = setting(0.05, 0, 1, "of the steps")
    seed: int = setting(0, 0, 2**32 - 1)


def distil_encoder(
    encoder: PatchEncoder,
    teacher: Teacher,
    pictures: Pictures,
    config: DistilConfig,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    autocast: Autocast = nullcontext,
) -> None:
    """Trains the encoder in place, deterministically; the linear head on top of it is thrown away.

    Where pictures come more than once and memory allows, the teacher is asked once for each, on one background.
    on_step(step, steps, loss) sees the loss, 0-d, after each step. autocast is entered in each step, since it keeps
    the weights that it has cast until it is left.
    Raises ValueError when the encoder's patches are not a square grid.
    """
    features = teacher_features(teacher, grid_side(encoder), pictures, config.seed)
    head = _build_head(encoder, len(features.mean), config.seed).to(pictures.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step))
    table, variant = None, torch.zeros(config.batch_size, dtype=torch.long, device=pictures.device)
    if config.steps * config.batch_size > len(pictures) and table_fits(features, pictures, 1):
        with autocast():
            table = FeatureTable(features, pictures, 1, config.seed)
    for step in range(config.steps):
        indices = batch_indices(config.seed, step, config.batch_size, len(pictures))
        pixels = pictures.batch(indices, background_colours(config.seed, step if table is None else 0, indices))
        with autocast():
            predictions = head(encoder(pixels))
            targets = features(pixels) if table is None else table(indices.to(pictures.device), variant)
        loss = distillation_loss(predictions.float(), targets.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, config.steps, loss.detach())
    encoder.zero_grad()


def distillation_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error plus cosine distance per patch, both (B,P,F); 0-d, 0 when they are equal."""
    return F.mse_loss(predictions, targets) + (1 - F.cosine_similarity(predictions, targets, dim=-1)).mean()


def grid_side(encoder: PatchEncoder) -> int:
    """Patches per side. Raises ValueError when they are not a square grid."""
    side = math.isqrt(encoder.num_patches)
    if side**2 != encoder.num_patches:
        raise ValueError(f"distillation needs a square grid of patches, the encoder gives {encoder.num_patches}")
    return side


def _build_head(encoder: PatchEncoder, width: int, seed: int) -> nn.Linear:
    head = nn.Linear(encoder.patch_width, width)
    nn.init.normal_(head.weight, std=encoder.patch_width**-0.5, generator=step_generator(seed, 0))
    nn.init.zeros_(head.bias)
    return head


def _rate(config: DistilConfig, step: int) -> float:
    """Linear warm-up, then cosine to 0."""
    warmup = round(config.warmup_fraction * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
