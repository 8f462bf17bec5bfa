"""Memory of the backward pass: what is kept for it, and how to keep less."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vilex.diffusion import TextToImage


def checkpoint_gradients(t2i: TextToImage) -> None:
    """Keeps only what enters the blocks of denoiser and text encoders; the backward pass computes the rest again."""
    t2i.denoiser.enable_gradient_checkpointing()
    for encoder in t2i.text_encoders:
        encoder.activation_checkpointing_enable({"use_reentrant": False})
        for layer in encoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True  # they checkpoint only then; what is inside them stays as it is, without dropout


@dataclass
class Kept:
    """Bytes of the tensors that autograd has kept, each storage once."""

    total: int = 0


@contextmanager
def count_kept(besides: Iterable[Tensor] = ()) -> Iterator[Kept]:
    """Counts what is kept for a backward pass while active, but for some tensors; works on fake ones too."""
    kept, storages = Kept(), {(storage := tensor.untyped_storage())._cdata: storage for tensor in besides}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage  # held, so that no other one takes its place
            kept.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
