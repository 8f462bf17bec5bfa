"""From a picture to pictures: encode, compose, sample, decode."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from vilex.checkpoint import find_weights, hub_id, weights_name
from vilex.codes import fingerprint
from vilex.config import (
    DEFAULT_BUDGETS,
    DEFAULT_TOKENS,
    MAX_PROMPT_CHARS,
    MIXING,
    Fit,
    GenerationConfig,
    PolishConfig,
    Range,
    check_range,
)
from vilex.devices import pick_device, pick_dtype, require_offload
from vilex.diffusion import Conditioning, TextToImage, load_t2i
from vilex.images import fit_image, to_images, to_pixels
from vilex.model import ViLex, load_vilex
from vilex.polish import PolishStep, polish_steps, spell
from vilex.prompt import (
    ComposedPrompt,
    compose,
    embedding_module,
    has_words,
    parse_terms,
    words_of,
    words_removed,
)
from vilex.sampling import Conditions, OnStep, Step, sample_steps
from vilex.t2i import INDEX_NAME
from vilex.vocabulary import Vocabulary

OnPolish = Callable[[int, int, float], None]
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

    Without an encoder (vilex is None) it draws from words and from tokens, which `polish` finds for a picture.
    Calls from several threads are safe; the text encoder takes them in turn.
    """

    def __init__(self, t2i: TextToImage, vilex: ViLex | None = None, name: str = "") -> None:
        if vilex is not None and vilex.pooler.config.text_width != t2i.text_width:
            raise ValueError(
                f"the text-to-image model expects tokens of width {t2i.text_width}, "
                f"the pooler gives {vilex.pooler.config.num_queries} x {vilex.pooler.config.text_width}"
            )
        queries, limit = vilex.pooler.config.num_queries if vilex else 0, max(DEFAULT_TOKENS, t2i.max_tokens)
        if queries > limit:  # of the default, a short context cuts the tail
            raise ValueError(f"a prompt of the text-to-image model holds {limit} tokens, the pooler gives {queries}")
        self.t2i, self.vilex, self.name = t2i, vilex and vilex.eval().requires_grad_(False), name

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        text_encoder: str | None = None,
        offload: bool = False,
    ) -> Self:
        """A pipeline from a folder, a name in assets/weights or a hub id; the default weights without one.

        A text-to-image model alone, in diffusers layout, gives a pipeline without an encoder. offload: keep weights in
        the CPU's memory while they are not at work, which saves the device's and costs time.
        Raises ValueError with one sentence when there are none or they do not fit.
        """
        device = pick_device(device)
        number_format = pick_dtype(dtype, device)
        if offload:
            require_offload(device)
        folder = Path(find_weights(model))
        is_bare = (folder / INDEX_NAME).is_file()
        source = (hub_id(folder) or folder) if is_bare else folder / "t2i"
        t2i = load_t2i(source, text_encoder, number_format)
        pipeline = cls(t2i, None if is_bare else load_vilex(folder), weights_name(folder))
        return pipeline.to(device, number_format, offload)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes encoder and pooler, and the text-to-image model under t2i/, as fp16 safetensors and JSON.

        Without an encoder the folder is the text-to-image model's.
        """
        if self.vilex is None:
            self.t2i.save_pretrained(Path(folder))
            return
        self.vilex.save_pretrained(Path(folder))
        self.t2i.save_pretrained(Path(folder) / "t2i")

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None, offload: bool = False) -> Self:
        """The same pipeline on a device, its text-to-image model in `dtype` where that is safe, by default as it is.

        The encoder stays in fp32. offload: as in `from_pretrained`; it cannot be undone.
        """
        if self.vilex is not None:
            self.vilex.to(device)
        self.t2i.cast(dtype or self.dtype)
        if offload:
            self.t2i.offload(torch.device(device))
        else:
            self.t2i.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.t2i.device

    @property
    def dtype(self) -> torch.dtype:
        return self.t2i.denoiser.dtype

    @property
    def is_embedded(self) -> bool:
        """Whether the model draws small pixels rather than latents."""
        return self.t2i.embedded

    @property
    def has_encoder(self) -> bool:
        """Whether pictures can be encoded; without an encoder they can be polished."""
        return self.vilex is not None

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that tie `.vilex` files to these weights; without an encoder, to the space of words."""
        if self.vilex is not None:
            return fingerprint(self.vilex)
        signs = torch.nn.Module()  # which are the same in every dtype
        for i, encoder in enumerate(self.t2i.text_encoders):
            signs.register_buffer(str(i), embedding_module(encoder).weight.signbit())
        return fingerprint(signs)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words that tokens stand among, to weigh, shift and read tokens by."""
        return Vocabulary(self.t2i)

    @property
    def encoder(self) -> ViLex:
        """Encoder and pooler. Raises ValueError, with what to do, when the model has none."""
        if self.vilex is None:
            raise ValueError(
                f"{self.name or 'this model'} has no ViLex weights to read pictures with: train them with python -m "
                "train.train_vilex --t2i FOLDER, or polish the picture into a .vilex file (vilex polish PHOTO; in the "
                "app: Polish picture A)"
            )
        return self.vilex

    @property
    def max_tokens(self) -> int:
        """The most tokens of a picture: the pooler's, or without an encoder what a prompt holds."""
        return self.t2i.max_tokens if self.vilex is None else self.vilex.pooler.config.num_queries

    @property
    def seen_size(self) -> int:
        """Side in pixels of what is seen of a picture: by the encoder, or by the model itself without one."""
        return self.t2i.image_size if self.vilex is None else self.vilex.encoder.image_size

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

        Raises ValueError for a num_tokens above 75 that the pooler does not have, and when there is no encoder.
        """
        num_tokens = min(self.within(num_tokens), self.max_tokens)
        images = [images] if isinstance(images, Image.Image) else list(images)
        return self.encoder(self._pixels(images, fit), num_tokens)

    def polish(
        self,
        image: Image.Image,
        num_tokens: int = DEFAULT_TOKENS,
        steps: int = PolishConfig.num_steps,
        seed: int = 0,
        on_step: OnPolish | None = None,
        *,
        words: str = "",
        fit: Fit = "crop",
    ) -> Tensor:
        """vilex_tokens (N,D), float32, of one picture, improved by gradient steps; the same seed gives the same.

        words: start from them, instead of the encoder's tokens. on_step(step, steps, loss) is called after each step.
        Raises ValueError for a setting out of range and FloatingPointError when the loss is not finite.
        """
        config = PolishConfig(num_tokens, steps, seed)
        for step in self.polish_stream(image, config, words=words, fit=fit):
            if on_step is not None:
                on_step(step.index, step.num_steps, step.loss)
        return step.vilex_tokens

    def polish_stream(
        self, image: Image.Image, config: PolishConfig, *, words: str = "", fit: Fit = "crop"
    ) -> Iterator[PolishStep]:
        """The steps of `polish`; closing the iterator stops within one."""
        num_tokens, size = min(self.within(config.num_tokens), self.max_tokens), self.t2i.image_size
        if words or self.vilex is None:
            start = spell(self.t2i, words, num_tokens)
        else:
            start = self.encode(image, num_tokens, fit)[0]
        pixels = to_pixels([fit_image(image, size, fit)]).to(self.device)  # (1,3,H,W)
        return polish_steps(self.t2i, pixels, start, config)

    @torch.no_grad()
    def attention(self, image: Image.Image, fit: Fit = "crop") -> Tensor:
        """Where on the picture each token's query looked, (N,h,w) over the encoder's patches; each map sums to 1.

        Of the pooler's last block, mean over heads. The map covers what the encoder sees (`fit_image`), and a tower's
        patches know of their neighbours: a hint, not a fact. Raises ValueError when the patches form no grid in
        the shape of what the encoder reads, or there is no encoder.
        """
        patch_tokens = self.encoder.encoder(self._pixels([image], fit))  # (1,P,D_vit)
        maps = self.encoder.pooler.attention_maps(patch_tokens)[0]  # (N,P)
        height, width = self.encoder.encoder.size
        rows = round(math.sqrt(maps.shape[1] * height / width))
        columns = round(rows * width / height)
        if rows * columns != maps.shape[1]:
            raise ValueError(f"the encoder's {maps.shape[1]} patches form no grid to show attention on")
        return maps.unflatten(1, (rows, columns))  # (N,h,w)

    def _pixels(self, images: Sequence[Image.Image], fit: Fit) -> Tensor:
        return to_pixels([fit_image(image, self.seen_size, fit) for image in images]).to(self.device)  # (B,3,H,W)

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
        return self._compose(prompt, [self._tokens(word, num_tokens, fit) for word in images], names)

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
        return to_images(self.t2i.decode(latents).cpu())

    def note(self, prompt: str, images: Sequence[Word], config: GenerationConfig, names: Sequence[str] = ()) -> str:
        """One sentence on what was cut or has no effect, empty when all is well."""
        notes = [self.compose(prompt, images, config.num_tokens, names).note]
        if cut := self.compose(config.negative_prompt).cut_words:
            notes.append(f"the last words of the negative prompt did not fit: {cut!r}")
        is_mixed = bool(images) and has_words(prompt, len(images), names)
        if config.negative_prompt and config.guidance_scale == 1 and not (is_mixed and config.words_scale):
            notes.append("the negative prompt has no effect at guidance 1")
        turned = [called for name, called in MIXING.items() if getattr(config, name) != getattr(GenerationConfig, name)]
        if turned and not is_mixed:
            missing = "words" if images else "an image"
            notes.append(f"{' and '.join(turned)} {'has' if len(turned) == 1 else 'have'} no effect without {missing}")
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
        """The branches of guidance: nothing or the negative prompt; images alone; images and words; words alone.

        words: all tokens (N,D) that each image is to have; config.num_tokens does not cut them.
        """
        joint = self._compose(prompt, words, names)
        image = None
        if words:
            moved = self._moved(prompt, words, names)
            kept = [tokens[:n] for tokens, n in zip(moved, joint.kept, strict=True)]
            image = self._condition(words_removed(prompt, len(words), names), kept)
        is_joint, text = has_words(prompt, len(words), names), words_of(prompt, len(words), names)
        return Conditions(
            uncond=self._condition(config.negative_prompt, []),
            image=image,
            joint=self.t2i.encode_prompt(joint) if is_joint else None,
            words=self._condition(text, []) if words and text and config.words_scale else None,
        )

    def _compose(self, prompt: str, words: Sequence[Tensor], names: Sequence[str]) -> ComposedPrompt:
        if len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARS}")
        moved = self._moved(prompt, words, names)
        return compose(prompt, moved, self.t2i.tokenizer, self.t2i.config.context_length, names)

    def _moved(self, prompt: str, words: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """The words (N,D) as the terms of the prompt move them: `<image> - "snow" + "sand"`."""
        terms = parse_terms(prompt, len(words), names)
        return [self.vocabulary.shift(tokens, own.minus, own.plus) for tokens, own in zip(words, terms, strict=True)]

    def _condition(self, text: str, words: Sequence[Tensor]) -> Conditioning:
        return self.t2i.encode_prompt(compose(text, words, self.t2i.tokenizer, self.t2i.config.context_length))
