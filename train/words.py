"""Starts encoder and pooler by having them write what the frozen model's own captions of each picture say.

Neither way needs the denoiser, so on a CPU both are many times cheaper than the diffusion loss, which then improves on
what they give.

Spelling: the frozen model already draws "8 rows: blue blue white, ..." for 64 colour words. Before the first diffusion
step, token k learns to equal the word embedding of the k-th piece of that caption. The first tokens, which stand where
"8 rows:" says the same of every picture, are left free: they become the summary that a picture of few tokens is drawn
from.

Saying: of that summary the diffusion loss alone makes what lowers squared errors, which is the palette, in states of
the text encoder that no words have; what is drawn from such states has crowds and figures in it. So the first tokens
learn to be read by the denoiser as the short caption of the picture is, while the others stay what they were.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from train.batches import tabulate
from train.captions import layout_caption, short_captions
from train.data import Pictures, background_colours, batch_indices
from train.distil import Autocast
from train.reading import PromptReader
from vilex.diffusion import TextToImage
from vilex.images import to_levels
from vilex.model import ViLex
from vilex.prompt import compose_leading, embedding_module, special_tokens
from vilex.t2i import Conditioning

log = logging.getLogger(__name__)
CELLS = 8  # 8 rows of 8 colour words take 74 word pieces, close to the 75 tokens
LEAD = 3  # pieces of "8 rows:"
SUMMARIES = (1, 2, 4)  # tokens that say the short caption
_LEARNING_RATE = 1e-3
_STATISTICS_PICTURES = 256
_TOWER_RATE = 3e-4


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


class Sayings:
    """What the denoiser reads of pictures' short captions, and how far the first tokens are from being read so.

    Raises ValueError for a model that does not pool what its text encoder says, as latent models do not.
    """

    def __init__(self, t2i: TextToImage, pictures: Pictures, seed: int) -> None:
        if not t2i.embedded:
            raise ValueError("only our own text-to-image model pools what its text encoder says of a caption")
        self.t2i, self.pictures, self.special = t2i, pictures, special_tokens(t2i.tokenizer)
        pixels, indices = _sample(pictures, seed)
        with torch.no_grad():
            captioned = self._captioned(pixels, indices)
            self.reader = PromptReader(t2i, pixels, captioned, seed)
            self.spreads = [_spread(answer) for answer in self.reader(captioned)]

    @torch.no_grad()
    def wanted(self, pixels: Tensor, indices: Tensor) -> list[Tensor]:
        """What is read of the short captions of pictures int64 (B,), as they look in pixels (B,3,H,W)."""
        return self.reader(self._captioned(pixels, indices))

    def told(self, vilex_tokens: Tensor) -> list[Tensor]:
        """What is read of vilex_tokens (B,N,D) alone."""
        no_words = torch.zeros(len(vilex_tokens), 0, dtype=torch.long, device=vilex_tokens.device)
        length = len(self.special.prefix) + vilex_tokens.shape[1] + len(self.special.suffix)
        prompt = compose_leading(no_words, no_words.bool(), vilex_tokens, self.special, length)
        return self.reader(self.t2i.encode_prompt(prompt))

    def loss(self, vilex_tokens: Tensor, pixels: Tensor, indices: Tensor, step: int) -> Tensor:
        """Squared error of what is read of the first tokens, 1, 2 or 4 by turns, relative to how captions differ; 0-d.

        Half of it is that of the cross-attentions, half that of the pooled states.
        """
        told = self.told(vilex_tokens[:, : SUMMARIES[step % len(SUMMARIES)]])
        pairs = zip(told, self.wanted(pixels, indices), self.spreads, strict=True)
        *answers, pooled = [F.mse_loss(said.float(), wanted.float()) / spread for said, wanted, spread in pairs]
        return (torch.stack(answers).mean() + pooled) / 2

    def _captioned(self, pixels: Tensor, indices: Tensor) -> Conditioning:
        """The short captions of pictures."""
        records = [self.pictures.records[i] for i in indices.tolist()]
        texts = short_captions(records, to_levels(pixels).numpy(force=True))
        table = tabulate([[text] for text in texts], self.t2i.tokenizer, self.t2i.config.context_length)
        rows = torch.arange(len(texts), device=pixels.device)
        return self.t2i.encode_prompt(table.to(pixels.device).prompt(rows, torch.zeros_like(rows), trim=True))


def say_captions(
    model: ViLex,
    before: ViLex,
    sayings: Sayings,
    steps: int,
    batch_size: int,
    seed: int,
    weights: Tensor | None = None,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Trains `model`, whose tokens have a bias each, in place; the loss of each step (steps,).

    It is that of the sayings, and in every other step also how far the later tokens are from those of `before`,
    relative to how these differ. The first tokens start anew from the average word.
    """
    most = max(SUMMARIES)
    pixels, _ = _sample(sayings.pictures, seed)
    with torch.no_grad():
        kept_spread = _spread(before(pixels)[:, most:])
        mean, _ = sayings.t2i.word_statistics()
        model.pooler.token_bias[:most] += mean - model(pixels, most).mean(0)
    optimizer = torch.optim.AdamW(_saying_rates(model), weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.1)
    losses = []
    for step in tqdm(range(steps), mininterval=5):
        pixels, indices = _pictures(sayings.pictures, step, batch_size, seed, weights)
        with_all = step % 2 == 1
        with autocast():
            vilex_tokens = model(pixels, None if with_all else most)
            loss = sayings.loss(vilex_tokens, pixels, indices, step // 2)
            if with_all:
                with torch.no_grad():
                    kept = before(pixels)[:, most:].float()
                loss = loss + F.mse_loss(vilex_tokens[:, most:].float(), kept) / kept_spread
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        losses.append(loss.detach())
    log.info("saying captions: loss %.3f after %d steps", losses[-1], steps)
    return torch.stack(losses)


def _sample(pictures: Pictures, seed: int) -> tuple[Tensor, Tensor]:
    """pixels (S,3,H,W) and indices (S,) of pictures from all over, to measure how much they differ."""
    indices = torch.linspace(0, len(pictures) - 1, min(_STATISTICS_PICTURES, len(pictures))).long()
    return pictures.batch(indices, background_colours(seed, 0, indices)), indices


def _spread(vectors: Tensor) -> Tensor:
    """Mean squared difference of vectors (S,K,D) from their mean over S, per number; 0-d."""
    vectors = vectors.float()
    return (vectors - vectors.mean(0)).square().mean()


def _saying_rates(model: ViLex) -> list[dict]:
    """Groups of parameters: what stands for single tokens learns fast, the tower slowly, lest it forget its teacher."""
    own = [model.pooler.queries, model.pooler.token_bias]
    shared = [p for p in model.pooler.parameters() if all(p is not other for other in own)]
    rates = ((own, 10 * _LEARNING_RATE), (shared, _LEARNING_RATE), (list(model.encoder.parameters()), _TOWER_RATE))
    return [{"params": parameters, "lr": rate} for parameters, rate in rates]


def _batches(
    t2i: TextToImage, pictures: Pictures, steps: int, batch_size: int, seed: int, weights: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """pixels (B,3,H,W) and the word pieces int64 (B,N) of their layout captions, a function of (seed, step)."""
    for step in range(steps):
        pixels, _ = _pictures(pictures, step, batch_size, seed, weights)
        texts = layout_caption(to_levels(pixels).cpu().numpy(), CELLS)
        tokens = t2i.tokenizer(texts, add_special_tokens=False, return_tensors="pt")
        yield pixels, tokens.input_ids.to(pixels.device)


def _pictures(
    pictures: Pictures, step: int, batch_size: int, seed: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """pixels (B,3,H,W) and indices (B,) of a step, a function of (seed, step)."""
    indices = batch_indices(seed, step, batch_size, len(pictures), weights)
    return pictures.batch(indices, background_colours(seed, step, indices)), indices
