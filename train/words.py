"""Starts encoder and pooler by having them spell the frozen model's own caption of each picture.

The frozen model already draws "8 rows: blue blue white, ..." for 64 colour words. Before the first diffusion
step, token k learns to equal the word embedding of the k-th piece of that caption. It needs neither denoiser nor
text encoder, so on a CPU it is many times cheaper than the diffusion loss, which then improves on the words. The first
tokens, which stand where "8 rows:" says the same of every picture, are left to that loss: they become the summary that
a picture of few tokens is drawn from.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from train.captions import layout_caption
from train.data import Pictures, background_colours, batch_indices
from train.distil import Autocast
from vilex.diffusion import TextToImage
from vilex.images import to_levels
from vilex.model import ViLex
from vilex.prompt import embedding_module

log = logging.getLogger(__name__)
CELLS = 8  # 8 rows of 8 colour words take 74 word pieces, close to the 75 tokens
LEAD = 3  # pieces of "8 rows:"
_LEARNING_RATE = 1e-3


def spell_captions(
    model: ViLex,
    t2i: TextToImage,
    pictures: Pictures,
    steps: int,
    batch_size: int,
    seed: int,
    weights: Tensor | None = None,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Trains `model` in place; the loss of each step (steps,), relative to the variance of word embeddings.

    autocast is entered in each step, since it keeps the weights that it has cast until it is left.
    Raises ValueError for a model whose words are split among several text encoders.
    """
    if len(t2i.text_encoders) > 1:
        raise ValueError(f"only a model with one text encoder can be spelled to, this one has {len(t2i.text_encoders)}")
    table = embedding_module(t2i.text_encoder).weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps + 1)
    losses = []
    for pixels, ids in tqdm(_batches(t2i, pictures, steps, batch_size, seed, weights), total=steps, mininterval=5):
        with autocast():
            vilex_tokens = model(pixels)[:, LEAD : ids.shape[1]]  # (B,N-3,D)
        loss = F.mse_loss(vilex_tokens.float(), table[ids[:, LEAD:]]) / table.var()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        losses.append(loss.detach())
    log.info("spelling captions: relative error %.3f after %d steps", losses[-1], steps)
    return torch.stack(losses)


def _batches(
    t2i: TextToImage, pictures: Pictures, steps: int, batch_size: int, seed: int, weights: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """pixels (B,3,H,W) and the word pieces int64 (B,N) of their layout captions, a function of (seed, step)."""
    for step in range(steps):
        indices = batch_indices(seed, step, batch_size, len(pictures), weights)
        pixels = pictures.batch(indices, background_colours(seed, step, indices))  # (B,3,H,W)
        texts = layout_caption(to_levels(pixels).cpu().numpy(), CELLS)
        tokens = t2i.tokenizer(texts, add_special_tokens=False, return_tensors="pt")
        yield pixels, tokens.input_ids.to(pixels.device)
