"""What one training step reads: pictures and token ids of captions, both functions of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from train.data import Pictures, background_colours, batch_indices
from train.presets import TrainConfig
from train.state import step_generator
from vilex.prompt import ComposedPrompt, round_up

_CHUNK = 16_384  # texts tokenised together: lists take many times the room of the table


@dataclass(frozen=True)
class CaptionTable:
    """Token ids of K texts per picture: ids int32 (S,K,L), lengths int32 (S,K), special tokens included."""

    ids: Tensor
    lengths: Tensor

    @property
    def variants(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> "CaptionTable":
        """The same table on another device."""
        return CaptionTable(self.ids.to(device), self.lengths.to(device))

    def rows(self, indices: Tensor, variant: Tensor, trim: bool) -> tuple[Tensor, Tensor]:
        """Ids int64 (B,L) and mask bool (B,L); with trim, L is the longest row's length rounded up to 8."""
        ids, lengths = self.ids[indices, variant].long(), self.lengths[indices, variant].long()
        if trim:
            ids = ids[:, : round_up(int(lengths.max()))]
        return ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]

    def by_length(self, indices: Tensor, variant: Tensor, groups: int) -> tuple[Tensor, ...]:
        """Positions int64 of the rows, shortest texts first, in that many groups of nearly equal size."""
        return self.lengths[indices, variant].argsort().chunk(groups)

    def prompt(self, indices: Tensor, variant: Tensor, trim: bool) -> ComposedPrompt:
        """Prompts of words alone, (B,L)."""
        ids, mask = self.rows(indices, variant, trim)
        return ComposedPrompt(ids, mask, torch.zeros_like(mask))


def tabulate(texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, context_length: int) -> CaptionTable:
    """Tokenises K texts for each of S pictures; what is longer than the context is cut."""
    flat = [text for variants in texts for text in variants]
    ids = np.full((len(flat), context_length), tokenizer.pad_token_id, np.int32)
    lengths = np.empty(len(flat), np.int32)
    options = {"truncation": True, "max_length": context_length}
    for first in range(0, len(flat), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        # padded by numpy: the tokenizer's lists of padding would take most of the time
        rows = tokenizer(flat[chunk], return_attention_mask=False, return_token_type_ids=False, **options).input_ids
        lengths[chunk] = [len(row) for row in rows]
        ids[chunk][np.arange(context_length) < lengths[chunk, None]] = list(chain.from_iterable(rows))
    shape = (len(texts), -1)
    return CaptionTable(torch.from_numpy(ids).view(*shape, context_length), torch.from_numpy(lengths).view(shape))


@dataclass(frozen=True)
class Batch:
    """indices int64 (B,) and variants int64 (B,), a row of `captions` each; pixels (B,3,H,W) in [-1,1]."""

    indices: Tensor
    variant: Tensor
    pixels: Tensor
    captions: CaptionTable

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def pin_memory(self) -> "Batch":
        """The same batch where an accelerator copies from fastest; torch's DataLoader asks for it."""
        return replace(self, pixels=self.pixels.pin_memory())


def draw_batch(
    pictures: Pictures,
    captions: CaptionTable,
    config: TrainConfig,
    weights: Tensor | None,
    global_step: int,
    share: slice,
) -> Batch:
    """The `share` of one step's pictures, a function of (seed, step).

    A cut-out picture stands on the background of its caption variant, so words and colours agree.
    """
    indices = batch_indices(config.seed, global_step, config.batch_size, len(pictures), weights)
    variant = draw_variants(captions.variants, config, global_step)
    indices, variant = indices[share], variant[share]
    pixels = pictures.batch(indices, background_colours(config.seed, variant, indices))
    placed = (part.to(pixels.device, non_blocking=True) for part in (indices, variant))
    return Batch(*placed, pixels, captions)


def draw_variants(count: int, config: TrainConfig, global_step: int) -> Tensor:
    """Which of `count` texts stands beside each of a step's pictures, int64 (B,)."""
    return torch.randint(count, (config.batch_size,), generator=step_generator(config.seed, global_step))
