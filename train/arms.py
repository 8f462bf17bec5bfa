"""The ways to describe a picture to the text-to-image model that are measured, and samples drawn from each.

S stands for the number of pictures.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
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
from vilex.config import DEFAULT_BUDGETS, MAX_TOKENS, GenerationConfig
from vilex.diffusion import Conditioning
from vilex.images import to_levels
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose, compose_leading, special_tokens
from vilex.sampling import Conditions, sample
from vilex.t2i import TextToImage

WORD_ARMS = ("text", "dense")
DEFAULT_ARMS = (*WORD_ARMS, *map(str, DEFAULT_BUDGETS))
Describe = Callable[[Tensor], Conditions]  # indices (B,) of pictures -> conditions with a row for each


def parse_arms(arms: str) -> list[str]:
    """Names of the arms; raises ValueError unless each is "text", "dense" or a number of tokens."""
    names = [name.strip() for name in arms.split(",")]
    for name in names:
        if name not in WORD_ARMS and not (name.isdecimal() and 1 <= int(name) <= MAX_TOKENS):
            raise ValueError(f"an arm is text, dense or a number of tokens from 1 to {MAX_TOKENS}, got {name!r}")
    return names


class Conditioner:
    """Turns pictures and texts into conditions, one per picture."""

    def __init__(self, pipeline: VilexPipeline) -> None:
        self.pipeline, self.t2i = pipeline, pipeline.t2i
        self.special = special_tokens(self.t2i.tokenizer)

    def words(self, texts: Sequence[str]) -> Conditions:
        """Texts alone, B of them."""
        table = tabulate([[text] for text in texts], self.t2i.tokenizer, self.t2i.config.context_length)
        first = torch.arange(len(texts))
        prompt = table.to(self.pipeline.device).prompt(first, first * 0, trim=False)
        return Conditions(self._empty(), joint=self.t2i.encode_prompt(prompt))

    def pixels(self, pixels: Tensor, num_tokens: int) -> Conditions:
        """The first tokens of pixels (B,3,H,W) alone."""
        return self.tokens(self.pipeline.encoder(pixels.to(self.pipeline.device), num_tokens))

    def tokens(self, vilex_tokens: Tensor) -> Conditions:
        """vilex_tokens (B,N,D) alone."""
        return Conditions(self._empty(), image=self._read(vilex_tokens))

    def mixes(self, pixels: Tensor, num_tokens: int, words: str) -> Conditions:
        """The first tokens of pixels (B,3,H,W), with and without the same words after them."""
        vilex_tokens = self.pipeline.encoder(pixels.to(self.pipeline.device), num_tokens)
        return Conditions(self._empty(), self._read(vilex_tokens), self._read(vilex_tokens, words))

    def _read(self, vilex_tokens: Tensor, words: str = "") -> Conditioning:
        ids = self.t2i.tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids.long()  # (1,W)
        ids = ids.to(vilex_tokens.device).expand(len(vilex_tokens), -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        length = self.t2i.config.context_length
        return self.t2i.encode_prompt(compose_leading(ids, mask, vilex_tokens, self.special, length))

    def _empty(self) -> Conditioning:
        return self.t2i.encode_prompt(compose("", [], self.t2i.tokenizer, self.t2i.config.context_length))


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
    """One sample per picture, levels (S,3,H,W) uint8 on the CPU; picture i takes seed config.seed + i."""
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
    """Samples of one arm, as `draw`; with a folder to `keep` them in, the same ones are not drawn twice."""
    if keep is None:
        return draw(pipeline.t2i, describe_arm(pipeline, pictures, arm), len(pictures), config, batch_size, arm)
    drawn_by = [fingerprint(part) for part in (pipeline.t2i.denoiser, *pipeline.t2i.text_encoders)]
    settings = [drawn_by, str(pipeline.dtype), pictures.fingerprint(), config.to_dict()]
    settings += [pipeline.fingerprint] if arm not in WORD_ARMS else []
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = keep / f"{arm}-{digest}.safetensors"
    if path.is_file():
        return load_file(path)["samples"]
    samples = draw_arm(pipeline, pictures, arm, config, batch_size)
    keep.mkdir(parents=True, exist_ok=True)
    save_file({"samples": samples}, path)
    return samples
