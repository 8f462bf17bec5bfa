"""Polish: a picture's tokens, improved for this one picture by gradient steps on the frozen model's own loss.

Textual inversion that starts at the encoder's answer, or at words where there is no encoder.
Source: Gal et al. 2022 (An Image is Worth One Word); TailDrop, so that every prefix of the tokens gains, is ViLex's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vilex.config import PolishConfig
from vilex.loss import Noise, diffusion_loss
from vilex.prompt import compose, embedding_module, tokenize
from vilex.t2i import Conditioning, TextToImage

NOISE_DRAWS = 16  # noises of one step, in one call of the denoiser
_LATENT_DRAWS = 4  # of models that are too large for more
_SHIFT = 5.0  # of the timesteps: in small pictures prompts decide at the noisiest ones alone
LEARNING_RATE = 0.6  # in standard deviations of the word embeddings
_BETAS = (0.9, 0.99)  # a few dozen steps are too few for Adam's usual memory of 1000
_POOL = 64  # timesteps drawn for each one that is used


@dataclass(frozen=True)
class PolishStep:
    """State after one gradient step: vilex_tokens (N,D) fp32, and the loss before it."""

    index: int
    num_steps: int
    vilex_tokens: Tensor
    loss: float


@torch.enable_grad()
def polish_steps(t2i: TextToImage, pixels: Tensor, vilex_tokens: Tensor, config: PolishConfig) -> Iterator[PolishStep]:
    """Improves vilex_tokens (N,D) for pixels (1,3,H,W) in [-1,1], yielding after each step; the last has the result.

    A function of config.seed; closing it stops within one step. No token becomes longer than the longest was, or than
    a word is.
    Raises ValueError for an offloaded model and FloatingPointError when the loss is not finite.
    """
    if t2i.is_offloaded:
        raise ValueError("gradients cannot pass an offloaded model: polish without --offload")
    generator, like = torch.Generator().manual_seed(config.seed), next(t2i.denoiser.parameters())
    latents = t2i.encode(pixels).detach().expand(2, -1, -1, -1)  # for all tokens, and for the first of them
    # T5's words are a hundred times longer than CLIP's: each column is learnt in units of its own words' spread
    scale = t2i.word_statistics()[1].to(pixels.device)  # (D,)
    values = (vilex_tokens.detach().to(scale) / scale).requires_grad_()  # (N,D)
    longest = max(values.detach().norm(dim=1).max().item(), len(scale) ** 0.5)  # the latter is a word's
    optimizer = torch.optim.Adam([values], lr=LEARNING_RATE, betas=_BETAS)
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
    scaler = torch.amp.GradScaler(pixels.device.type, enabled=like.dtype == torch.float16)
    for index in range(config.num_steps):
        kept = _taildrop(len(values), generator)
        condition = Conditioning.concatenate([_read(t2i, values[:count] * scale) for count in (len(values), kept)])
        condition = condition.to(like.device, like.dtype)
        loss = diffusion_loss(t2i, t2i.denoiser, latents, condition, _draw_noise(t2i, generator, pixels.device))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is not finite at step {index + 1}; try dtype float32")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        lr_schedule.step()
        values.data.renorm_(2, 0, longest)
        yield PolishStep(index, config.num_steps, values.detach() * scale, loss.item())


def _taildrop(num_tokens: int, generator: torch.Generator) -> int:
    """How many tokens are kept; the count's logarithm is uniform, since the first tokens matter most."""
    return round(num_tokens ** torch.rand((), generator=generator).item())


def _read(t2i: TextToImage, vilex_tokens: Tensor) -> Conditioning:
    return t2i.encode_prompt(compose("", [vilex_tokens], t2i.tokenizer, t2i.config.context_length))


def _draw_noise(t2i: TextToImage, generator: torch.Generator, device: torch.device) -> Noise:
    """Noises of one step. Their timesteps are the model's own, shifted, one out of each equal share of them."""
    draws, shift = _num_draws(t2i), _SHIFT if t2i.embedded else 1.0
    pool = t2i.draw_timesteps(draws * _POOL, generator, shift).sort().values
    places = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    values = torch.randn(draws, *t2i.latent_shape, generator=generator)
    return Noise(values.to(device), pool[(places * len(pool)).long()].to(device))


def polish_rows(t2i: TextToImage) -> int:
    """The work of one step, in rows of a denoiser call: on frozen weights a gradient costs about another pass."""
    return 2 * _num_draws(t2i)


def _num_draws(t2i: TextToImage) -> int:
    return NOISE_DRAWS if t2i.embedded else _LATENT_DRAWS


@torch.no_grad()
def spell(t2i: TextToImage, words: str, num_tokens: int) -> Tensor:
    """vilex_tokens (num_tokens,D) that say these words, as far as they fit; the rest are the average word."""
    return torch.cat([_spelled(t2i, i, words, num_tokens) for i in range(len(t2i.text_encoders))], 1)


def _spelled(t2i: TextToImage, index: int, words: str, num_tokens: int) -> Tensor:
    table = embedding_module(t2i.text_encoders[index]).weight.float()  # (V,D_i)
    ids = tokenize(t2i.tokenizers[index], words).input_ids[:num_tokens]
    return torch.cat([table[ids], table.mean(0).expand(num_tokens - len(ids), -1)])
