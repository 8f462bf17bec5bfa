"""From a picture to pictures: encode, compose, sample, decode."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor

from vilex.checkpoint import find_weights, weights_name
from vilex.codes import fingerprint
from vilex.config import DEFAULT_BUDGETS, DEFAULT_TOKENS, MAX_PROMPT_CHARS, GenerationConfig, Range, check_range
from vilex.diffusion import Conditioning, TextToImage, load_t2i
from vilex.images import fit_image, to_images, to_pixels
from vilex.model import ViLex, load_vilex
from vilex.prompt import ComposedPrompt, compose, embedding_module, has_words, words_removed
from vilex.sampling import Conditions, OnStep, Step, sample_steps
from vilex.words import Reading, nearest_words, weigh, word_distance

Fit = Literal["crop", "pad"]
Word = Image.Image | Tensor  # a picture, or its ViLex tokens (N,D)


@dataclass(frozen=True)
class Generation:
    """Pictures of one request, at the model's own size, with what made them.

    note: one sentence on what did not fit the context or has no effect, empty when all is well.
    """

    images: list[Image.Image]
    prompt: str
    config: GenerationConfig
    note: str = ""


class VilexPipeline:
    """A frozen text-to-image model and the encoder that writes pictures as its words.

    Calls from several threads are safe; the text encoder takes them in turn.
    """

    def __init__(self, t2i: TextToImage, vilex: ViLex, name: str = "") -> None:
        if vilex.pooler.config.text_width != t2i.text_width:
            raise ValueError(
                f"the text-to-image model expects tokens of width {t2i.text_width}, "
                f"the pooler gives {vilex.pooler.config.num_queries} x {vilex.pooler.config.text_width}"
            )
        queries, limit = vilex.pooler.config.num_queries, max(DEFAULT_TOKENS, t2i.max_tokens)
        if queries > limit:  # of the default, a short context cuts the tail
            raise ValueError(f"a prompt of the text-to-image model holds {limit} tokens, the pooler gives {queries}")
        self.t2i, self.vilex, self.name = t2i, vilex.eval().requires_grad_(False), name

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        text_encoder: str | None = None,
    ) -> Self:
        """A pipeline from a folder, a name in assets/weights or a hub id; the default weights without one.

        Raises ValueError with one sentence when there are none or they do not fit.
        """
        folder = Path(find_weights(model))
        pipeline = cls(load_t2i(folder / "t2i", text_encoder), load_vilex(folder), weights_name(folder))
        device = pick_device(device)
        return pipeline.to(device, pick_dtype(dtype, device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes encoder and pooler, and the text-to-image model under t2i/, as fp16 safetensors and JSON."""
        self.vilex.save_pretrained(Path(folder))
        self.t2i.save_pretrained(Path(folder) / "t2i")

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same pipeline on a device; `dtype` is the denoiser's, kept without it, and all else stays in fp32."""
        self.vilex.to(device)
        self.t2i.to(device)
        torch.nn.Module.to(self.t2i.denoiser, dtype=dtype or self.dtype, memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        return self.t2i.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.t2i.denoiser.dtype

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that tie `.vilex` files to these weights."""
        return fingerprint(self.vilex)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a picture: the pooler's."""
        return self.vilex.pooler.config.num_queries

    def within(self, num_tokens: int | None) -> int:
        """A budget of tokens as it is; all there are without one. Raises ValueError for more than there can be."""
        if num_tokens is None:
            return self.max_tokens
        # What is usual may be asked of a pooler that has less
        check_range("num_tokens", num_tokens, Range(1, max(self.max_tokens, DEFAULT_TOKENS)))
        return num_tokens

    @torch.no_grad()
    def encode(
        self, images: Image.Image | Sequence[Image.Image], num_tokens: int | None = None, fit: Fit = "crop"
    ) -> Tensor:
        """vilex_tokens (B,N,D), float32, of one picture or several; N is at most what the pooler has, and that without
        num_tokens.

        Raises ValueError for a num_tokens above 75 that the pooler does not have.
        """
        num_tokens = min(self.within(num_tokens), self.max_tokens)
        images = [images] if isinstance(images, Image.Image) else list(images)
        return self.vilex(self._pixels(images, fit), num_tokens)

    @torch.no_grad()
    def attention(self, image: Image.Image, fit: Fit = "crop") -> Tensor:
        """Where on the picture each token's query looked, (N,h,w) over the encoder's patches; each map sums to 1.

        Of the pooler's last block, mean over heads. The map covers what the encoder sees (`fit_image`), and a tower's
        patches know of their neighbours: a hint, not a fact. Raises ValueError when the patches form no grid in
        the shape of what the encoder reads.
        """
        patch_tokens = self.vilex.encoder(self._pixels([image], fit))  # (1,P,D_vit)
        maps = self.vilex.pooler.attention_maps(patch_tokens)[0]  # (N,P)
        height, width = self.vilex.encoder.size
        rows = round(math.sqrt(maps.shape[1] * height / width))
        columns = round(rows * width / height)
        if rows * columns != maps.shape[1]:
            raise ValueError(f"the encoder's {maps.shape[1]} patches form no square to show attention on")
        return maps.unflatten(1, (rows, columns))  # (N,h,w)

    def weigh(self, vilex_tokens: Tensor, weight: float) -> Tensor:
        """vilex_tokens (N,D) that say more or less: 0 is the average word of the text encoder, 1 leaves them alone.

        Raises ValueError for a weight outside 0..2.
        """
        return weigh(vilex_tokens, weight, self._average_word.to(vilex_tokens))

    @cached_property
    def _average_word(self) -> Tensor:
        return self.t2i.word_statistics()[0]

    def read(self, vilex_tokens: Tensor, count: int = 5) -> list[Reading]:
        """A Reading with `count` words of each of vilex_tokens (N,D): a hint, not a fact.

        With several text encoders the first one's words count, and its columns of the tokens.
        """
        table, tokenizer = embedding_module(self.t2i.text_encoder).weight, self.t2i.tokenizer
        tokens = vilex_tokens[:, : self.t2i.text_widths[0]]
        nearest = nearest_words(tokens, table, tokenizer, count)
        distances = word_distance(tokens, table, tokenizer).tolist()
        return [Reading(tuple(words), distance) for words, distance in zip(nearest, distances, strict=True)]

    def _pixels(self, images: Sequence[Image.Image], fit: Fit) -> Tensor:
        size = self.vilex.encoder.image_size
        return to_pixels([fit_image(image, size, fit) for image in images]).to(self.device)  # (B,3,H,W)

    def compose(
        self,
        prompt: str,
        images: Sequence[Word] = (),
        num_tokens: int | None = None,
        names: Sequence[str] = (),
        fit: Fit = "crop",
    ) -> ComposedPrompt:
        """The prompt as token ids and slots: what of the words and pictures fits, before anything is drawn.

        Raises ValueError for a prompt that is too long or names a picture that is not there.
        """
        if len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARS}")
        tokens = [self._tokens(word, num_tokens, fit) for word in images]
        return compose(prompt, tokens, self.t2i.tokenizer, self.t2i.config.context_length, names)

    @torch.no_grad()
    def stream(
        self,
        prompt: str = "",
        images: Sequence[Word] = (),
        config: GenerationConfig | None = None,
        *,
        names: Sequence[str] = (),
        fit: Fit = "crop",
    ) -> Iterator[Step]:
        """Denoising step by step; closing the iterator stops within one step, `decode` turns a Step into pictures."""
        config = config or GenerationConfig()
        words = [self._tokens(word, config.num_tokens, fit) for word in images]
        conditions = self.conditions(prompt, words, config, names)
        return sample_steps(self.t2i, conditions, config)

    def generate(
        self,
        prompt: str = "",
        images: Sequence[Word] = (),
        config: GenerationConfig | None = None,
        *,
        names: Sequence[str] = (),
        fit: Fit = "crop",
        on_step: OnStep | None = None,
    ) -> Generation:
        """config.num_images pictures of a prompt in which `<image>` stands for the given pictures.

        Picture i depends on config.seed + i alone, not on its batch. on_step(step, num_inference_steps,
        latents) sees an estimate after each step. Raises ValueError for what the prompt gets wrong and
        FloatingPointError when the model's output is not finite.
        """
        config = config or GenerationConfig()
        words = [self._tokens(word, config.num_tokens, fit) for word in images]
        for step in self.stream(prompt, words, config, names=names):
            if on_step is not None:
                on_step(step.index, step.num_inference_steps, step.latents)
        return Generation(self.decode(step.latents), prompt, config, self.note(prompt, words, config, names))

    def reconstruct(
        self,
        image: Word,
        budgets: Sequence[int] = DEFAULT_BUDGETS,
        config: GenerationConfig | None = None,
        *,
        fit: Fit = "crop",
    ) -> Iterator[tuple[int, Generation]]:
        """(budget, Generation) per token budget, cheapest first, all from one shared noise."""
        config = config or GenerationConfig()
        tokens = self._tokens(image, max(budgets), fit)
        for budget in sorted(budgets):
            yield budget, self.generate("", [tokens], replace(config, num_tokens=budget))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """latents (B,C,h,w) as pictures."""
        if self.t2i.vae is not None:
            latents = latents.to(self.t2i.vae.dtype)
        return to_images(self.t2i.decode(latents).float().cpu())

    def note(self, prompt: str, images: Sequence[Word], config: GenerationConfig, names: Sequence[str] = ()) -> str:
        """One sentence on what was cut or has no effect, empty when all is well."""
        notes = [self.compose(prompt, images, config.num_tokens, names).note]
        if cut := self.compose(config.negative_prompt).cut_words:
            notes.append(f"the last words of the negative prompt did not fit: {cut!r}")
        if config.negative_prompt and config.guidance_scale == 1:
            notes.append("the negative prompt has no effect at guidance 1")
        if config.tfg_scale != 1 and not images:
            notes.append("text-free guidance has no effect without an image")
        elif config.tfg_scale != 1 and not has_words(prompt, len(images), names):
            notes.append("text-free guidance has no effect without words")
        return "; ".join(note for note in notes if note)

    def _tokens(self, word: Word, num_tokens: int | None, fit: Fit) -> Tensor:
        """vilex_tokens (N,D) of a picture, or the first of tokens that are given."""
        if isinstance(word, Tensor):
            if word.ndim != 2 or not len(word) or word.shape[1] != self.t2i.text_width:
                raise ValueError(f"expects tokens of width {self.t2i.text_width}, got shape {tuple(word.shape)}")
            return word[: self.within(num_tokens)].to(self.device)
        return self.encode(word, num_tokens, fit)[0]

    def conditions(
        self, prompt: str, words: Sequence[Tensor], config: GenerationConfig, names: Sequence[str] = ()
    ) -> Conditions:
        """The branches of guidance: nothing or the negative prompt; images alone; images and words."""
        joint = self.compose(prompt, words, config.num_tokens, names)
        image = None
        if words:
            kept = [tokens[:n] for tokens, n in zip(words, joint.kept, strict=True)]
            image = self._condition(words_removed(prompt, len(words), names), kept)
        is_joint = has_words(prompt, len(words), names)
        return Conditions(
            uncond=self._condition(config.negative_prompt, []),
            image=image,
            joint=self.t2i.encode_prompt(joint) if is_joint else None,
        )

    def _condition(self, text: str, words: Sequence[Tensor]) -> Conditioning:
        return self.t2i.encode_prompt(compose(text, words, self.t2i.tokenizer, self.t2i.config.context_length))


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, else VILEX_DEVICE, else cuda, mps or cpu, the first there is."""
    name = name or os.environ.get("VILEX_DEVICE")
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here; cpu always is") from error
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The denoiser's dtype of that name, else VILEX_DTYPE, else the fastest that is exact enough on the device."""
    name = name or os.environ.get("VILEX_DTYPE") or _default_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 is for GPUs; on a CPU use float32 or bfloat16")
    return known[name]


def _default_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "float16"
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False) if device.type == "cpu" else False
    return "bfloat16" if has_bf16 else "float32"
