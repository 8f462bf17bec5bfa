"""The ways to describe a picture to the text-to-image model that are measured, and samples drawn from each.

S stands for the number of pictures.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from train.batches import tabulate
from train.captions import dense_caption
from train.data import Pictures
from train.subjects import plain_caption
from vilex.codes import fingerprint
from vilex.config import DEFAULT_BUDGETS, MAX_TOKENS, GenerationConfig, Range, check_range
from vilex.diffusion import Conditioning
from vilex.images import to_levels
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose, compose_leading, special_tokens, tokenize, words_of
from vilex.sampling import Conditions, sample
from vilex.t2i import TextToImage

WORD_ARMS = ("text", "dense")
WORDS_GUIDANCE = 3.0  # guidance_scale of words alone, unless told
DEFAULT_ARMS = (*WORD_ARMS, *map(str, DEFAULT_BUDGETS))
Describe = Callable[[Tensor], Conditions]  # indices (B,) of pictures -> conditions with a row for each


def parse_arms(arms: str) -> list[str]:
    """Names of the arms, each once; raises ValueError unless each is "text", "dense" or a number of tokens."""
    names = [name.strip() for name in arms.split(",")]
    for name in names:
        if name not in WORD_ARMS and not (name.isdecimal() and 1 <= int(name) <= MAX_TOKENS):
            raise ValueError(f"an arm is text, dense or a number of tokens from 1 to {MAX_TOKENS}, got {name!r}")
    return list(dict.fromkeys(str(int(name)) if name.isdecimal() else name for name in names))


def require_arms(pipeline: VilexPipeline, names: Sequence[str]) -> None:
    """Raises ValueError for a number of tokens that the model cannot give."""
    most = min(pipeline.max_tokens, pipeline.t2i.max_tokens)
    for name in filter(str.isdecimal, names):
        check_range("num_tokens", int(name), Range(1, most))
    if any(name.isdecimal() for name in names):
        pipeline.encoder  # noqa: B018  says what to do when there is none


def arm_configs(
    names: Sequence[str], config: GenerationConfig, words_guidance: float = WORDS_GUIDANCE
) -> dict[str, GenerationConfig]:
    """How each arm is drawn: words alone at a guidance of their own."""
    return {n: replace(config, guidance_scale=words_guidance) if n in WORD_ARMS else config for n in names}


class Conditioner:
    """Turns pictures and texts into conditions, one per picture."""

    def __init__(self, pipeline: VilexPipeline) -> None:
        self.pipeline, self.t2i = pipeline, pipeline.t2i
        self.special = special_tokens(self.t2i.tokenizer)

    @cached_property
    def empty(self) -> Conditioning:
        """The condition of no words, of one row."""
        return self.t2i.encode_prompt(compose("", [], self.t2i.tokenizer, self.t2i.config.context_length))

    def words(self, texts: Sequence[str]) -> Conditions:
        """Texts alone, B of them."""
        table = tabulate([[text] for text in texts], self.t2i.tokenizer, self.t2i.config.context_length)
        first = torch.arange(len(texts))
        prompt = table.to(self.pipeline.device).prompt(first, first * 0, trim=False)
        return Conditions(self.empty, joint=self.t2i.encode_prompt(prompt))

    def pixels(self, pixels: Tensor, num_tokens: int) -> Conditions:
        """The first tokens of pixels (B,3,H,W) alone."""
        return self.tokens(self.pipeline.encoder(pixels.to(self.pipeline.device), num_tokens))

    def tokens(self, vilex_tokens: Tensor) -> Conditions:
        """vilex_tokens (B,N,D) alone."""
        return Conditions(self.empty, image=self.read(vilex_tokens))

    def mixes(self, pixels: Tensor, num_tokens: int, words: str) -> Conditions:
        """The first tokens of pixels (B,3,H,W), with and without the same words after them, and those words alone.

        The words have precedence.
        """
        room = self.t2i.max_tokens - len(tokenize(self.t2i.tokenizer, words).input_ids)
        vilex_tokens = self.pipeline.encoder(pixels.to(self.pipeline.device), max(1, min(num_tokens, room)))
        alone = self.words([words_of(words, 0)]).joint.expand(len(pixels))
        return Conditions(self.empty, self.read(vilex_tokens), self.read(vilex_tokens, words), alone)

    def read(self, vilex_tokens: Tensor, words: str = "") -> Conditioning:
        """The condition of vilex_tokens (B,N,D) with the same words after each row; gradients reach the tokens."""
        ids = torch.tensor(tokenize(self.t2i.tokenizer, words).input_ids, device=vilex_tokens.device).long()  # (W,)
        ids = ids.expand(len(vilex_tokens), -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        length = self.t2i.config.context_length
        return self.t2i.encode_prompt(compose_leading(ids, mask, vilex_tokens, self.special, length))


def describe_arm(pipeline: VilexPipeline, pictures: Pictures, arm: str) -> Describe:
    """How an arm describes pictures: "text" by plain words, "dense" by our caption code, a number by so many tokens."""
    conditioner = Conditioner(pipeline)

    def plain(indices: Tensor) -> Conditions:
        return conditioner.words([plain_caption(pictures.records[i]) for i in indices])

    def dense(indices: Tensor) -> Conditions:
        seen = to_levels(pictures.batch(indices)).cpu()
        return conditioner.words([dense_caption(pictures.records[i], p) for i, p in zip(indices, seen, strict=True)])

    def tokens(indices: Tensor) -> Conditions:
        return conditioner.pixels(pictures.batch(indices), int(arm))

    return {"text": plain, "dense": dense}.get(arm, tokens)


@torch.no_grad()
def draw(
    t2i: TextToImage, describe: Describe, count: int, config: GenerationConfig, batch_size: int = 64, label: str = ""
) -> Tensor:
    """One sample per picture, levels (S,3,H,W) uint8 on the CPU; picture i takes seed config.seed + i.

    Raises FloatingPointError when the model's output is not finite.
    """
    drawn = []
    for indices in tqdm(torch.arange(count).split(batch_size), desc=label, mininterval=5):
        latents = sample(t2i, describe(indices), config, seeds=(config.seed + indices).tolist())
        drawn.append(to_levels(t2i.decode(latents).cpu()))
    return torch.cat(drawn)


def draw_arm(
    pipeline: VilexPipeline,
    pictures: Pictures,
    arm: str,
    config: GenerationConfig,
    batch_size: int = 64,
    keep: Path | None = None,
) -> Tensor:
    """Samples of one arm, as `draw`; with a folder to `keep` them in, the same ones are not drawn twice.

    The folder does not know when the code that writes captions or draws has changed: empty it then.
    """
    if keep is None:
        return draw(pipeline.t2i, describe_arm(pipeline, pictures, arm), len(pictures), config, batch_size, arm)
    path = keep / f"{arm}-{_settings_digest(pipeline, pictures, arm, config)}.safetensors"
    if path.is_file():
        return load_file(path)["samples"]
    samples = draw_arm(pipeline, pictures, arm, config, batch_size)
    keep.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({"samples": samples}, unfinished)
    os.replace(unfinished, path)
    return samples


def _settings_digest(pipeline: VilexPipeline, pictures: Pictures, arm: str, config: GenerationConfig) -> str:
    """12 hex digits of all that decides the samples but the code."""
    t2i = pipeline.t2i
    config = replace(config, scheduler=t2i.pick_scheduler(config.scheduler))
    settings = [fingerprint(t2i), t2i.config.to_dict(), str(pipeline.dtype), pictures.fingerprint(), config.to_dict()]
    settings += [pipeline.fingerprint] if arm not in WORD_ARMS else []
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
