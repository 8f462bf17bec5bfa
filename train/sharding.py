"""What FSDP splits among processes: gathered for checkpoints and pictures, split again when a run is resumed.

A checkpoint always holds whole tensors, so a run goes on with FSDP or without, on any number of processes.
"""

from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def gather(tree: Any) -> Any:
    """The same dictionaries and lists with split tensors whole and on the CPU; every process must call it."""
    return recursively_apply(lambda value: value.full_tensor().cpu(), tree, test_type=_is_split)


def split_like(tree: Any, like: Any) -> Any:
    """The same dictionaries and lists with each tensor split as its counterpart in `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tree.to(like.device), like.device_mesh, like.placements)
    if isinstance(like, dict):
        return {key: split_like(value, like.get(key)) for key, value in tree.items()}
    if isinstance(like, list):
        return [split_like(*pair) for pair in zip(tree, like, strict=True)]
    return tree


@torch.no_grad()
def fill(module: nn.Module, values: list[Tensor]) -> None:
    """Copies tensors, split or not, into a whole module's parameters; every process must call it."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(gather(value))


@torch.no_grad()
def start_adafactor(optimizer: torch.optim.Optimizer) -> None:
    """Adafactor's state of split parameters, split in their way.

    Adafactor would make whole tensors, which cannot be mixed with split ones.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        squares = {"exp_avg_sq": parameter}
        if parameter.ndim > 1:
            squares = {"exp_avg_sq_row": parameter.mean(-1), "exp_avg_sq_col": parameter.mean(-2)}
        optimizer.state[parameter] = {"step": 0, "RMS": 0} | {name: _zeros(like) for name, like in squares.items()}


def _zeros(like: DTensor) -> DTensor:
    """Zeros split as `like`; whole where each process holds a part of every sum."""
    placements = [Replicate() if place.is_partial() else place for place in like.placements]
    return torch.zeros_like(like.redistribute(placements=placements))


def _is_split(value: object) -> bool:
    return isinstance(value, DTensor)
