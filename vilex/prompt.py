"""Prompts in which pictures are words: [BOS] ... v1..vn ... words ... [EOS].

An image is a run of placeholder ids in an ordinary token sequence; the vectors replace their embeddings
inside the frozen text encoder. The placeholder is an existing word id below EOS, so that CLIP's pooling
at the largest id keeps finding EOS; which positions are slots is a mask, never read back from the ids.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

_TERM = r'\s*([-−–+])\s*["“”]([^"“”]+)["“”]'  # phones write other dashes and quotes than keyboards
_SLOT = re.compile(rf"(?:<image(?::(\d+))?>|\[([^][<>]+)\])((?:{_TERM})*)")
_MOST_NAMED = 80  # characters of the words that did not fit, in a message
_override_lock = threading.RLock()


@dataclass(frozen=True)
class ComposedPrompt:
    """Token ids with slots for ViLex tokens, ready for a text encoder.

    input_ids int64 (B,L); attention_mask bool (B,L); slots bool (B,L), True where a ViLex token stands;
    vectors (S,D), the tokens in row-major order of their slots; kept: tokens kept of each image;
    cut_words: what did not fit, empty when everything did; num_words: word tokens kept; segments: of one prompt,
    its words as written and the counts of slots between them, in reading order; names: of the images, as far as they
    have any; unknown: names in brackets that no image has.
    """

    input_ids: Tensor
    attention_mask: Tensor
    slots: Tensor
    vectors: Tensor | None = None
    kept: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()
    num_words: int = 0
    cut_words: str = ""
    segments: tuple[str | int, ...] = ()
    names: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One sentence on what was cut, left out or not understood, empty when nothing was."""
        parts = [
            f"{self._label(i)} keeps {kept} of {asked} tokens" if kept else f"{self._label(i)} is not in the prompt"
            for i, (kept, asked) in enumerate(zip(self.kept, self.asked, strict=True))
            if kept < asked
        ]
        parts += [f"[{name}] is no picture's name: it is read as words" for name in self.unknown]
        if self.cut_words:
            more = " ..." if len(self.cut_words) > _MOST_NAMED else ""
            parts.append(f"the last words did not fit: {self.cut_words[:_MOST_NAMED] + more!r}")
        return "; ".join(parts)

    def _label(self, index: int) -> str:
        name = self.names[index] if index < len(self.names) else ""
        return f"[{name}]" if name else f"image {index + 1}"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a tokenizer puts around a text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    placeholder: int


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """BOS/CLS, EOS/SEP and padding ids of a tokenizer, and an ordinary id to hold images' places."""
    body = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
    reserved = set(tokenizer.all_special_ids) | {tokenizer.pad_token_id, 0}
    placeholder = next(i for i in range(len(tokenizer)) if i not in reserved)
    suffix = whole[start + len(body) :]
    return SpecialTokens(tuple(whole[:start]), tuple(suffix), tokenizer.pad_token_id, placeholder)


@dataclass(frozen=True)
class Terms:
    """Words that a prompt takes from an image and adds to it, as in `<image> - "snow" + "sand"`."""

    minus: str = ""
    plus: str = ""

    def __str__(self) -> str:
        return "".join(f' {sign} "{words}"' for sign, words in (("-", self.minus), ("+", self.plus)) if words)


def parse(text: str, num_images: int, names: Sequence[str] = ()) -> list[str | int]:
    """Text runs and image indices in reading order.

    `<image:2>` is the second image, `[corgi]` the one of that name; a plain `<image>` takes the images in
    turn and stays with the last. Where the text mentions no image, all go first, as in the paper's [v, c]; where it
    mentions some, the others are left out. The terms of an image are no text. Raises ValueError for a number without
    an image; brackets that name none are ordinary words.
    """
    segments: list[str | int] = []
    end = 0
    for match, index in _mentions(text, num_images, names):
        segments += [text[end : match.start()], index]
        end = match.end()
    segments.append(text[end:])
    if not any(isinstance(s, int) for s in segments):
        segments = [*range(num_images), *segments]
    return [s for s in segments if not isinstance(s, str) or s.strip()]


def _mentions(text: str, num_images: int, names: Sequence[str]) -> Iterator[tuple[re.Match, int]]:
    """Each place where the text stands for an image, its terms included, and which image it is."""
    turn = 0
    for match in _SLOT.finditer(text):
        number, name = match[1], match[2]
        if name is not None and name not in names:
            continue
        index = names.index(name) if name else int(number) - 1 if number else min(turn, num_images - 1)
        if not 0 <= index < num_images:
            how_many = f"the prompt has {num_images}" if num_images else "give a picture"
            raise ValueError(f"{match.group()} asks for an image that is not there: {how_many}")
        turn += not (name or number)
        yield match, index


def mentioned(text: str, num_images: int, names: Sequence[str] = ()) -> set[int]:
    """Which images stand in the prompt: those it mentions, or all where it mentions none."""
    return {s for s in parse(text, num_images, names) if isinstance(s, int)}


def parse_terms(text: str, num_images: int, names: Sequence[str] = ()) -> list[Terms]:
    """The terms of each image; several of one sign are read as one text.

    Raises ValueError as `parse` does, and for an image that stands in the prompt once with other terms than before.
    """
    found: dict[int, Terms] = {}
    for match, index in _mentions(text, num_images, names):
        parts = [("+" if sign == "+" else "-", words.strip()) for sign, words in re.findall(_TERM, match[3])]
        terms = Terms(*(" ".join(words for own, words in parts if own == sign) for sign in "-+"))
        if found.setdefault(index, terms) != terms:
            raise ValueError(f"{match.group()} was written with other terms before: a picture has the same everywhere")
    return [found.get(i, Terms()) for i in range(num_images)]


def tokenize(tokenizer: PreTrainedTokenizerBase, words: str) -> BatchEncoding:
    """Word pieces of a text without BOS or EOS; a "[SEP]" in it is ordinary text."""
    return tokenizer(words, add_special_tokens=False, split_special_tokens=True)


def count_placeholders(text: str) -> int:
    """How many times the text stands for an image by `<image>` or `<image:2>`."""
    return sum(match.group(2) is None for match in _SLOT.finditer(text))


def words_of(text: str, num_images: int, names: Sequence[str] = ()) -> str:
    """The prompt's words without its images, nor the commas that parted them."""
    return " ".join(s.strip() for s in parse(text, num_images, names) if isinstance(s, str)).strip(" ,;:")


def words_removed(text: str, num_images: int, names: Sequence[str] = ()) -> str:
    """The prompt with its images in the same order and no words: the v of [v, c]."""
    return "".join(f"<image:{s + 1}>" for s in parse(text, num_images, names) if isinstance(s, int))


def has_words(text: str, num_images: int, names: Sequence[str] = ()) -> bool:
    """Whether anything but images stands in the prompt."""
    return any(isinstance(s, str) for s in parse(text, num_images, names))


def fit_budget(
    lengths: Sequence[int], occurrences: Sequence[int], num_words: int, capacity: int
) -> tuple[list[int], int]:
    """Tokens kept of each image and of the words: the longest image gives up its tail first, down to one
    token each; only then the last words go. An image that does not occur keeps none.
    """
    kept = [length if times else 0 for length, times in zip(lengths, occurrences, strict=True)]

    def total() -> int:
        return sum(k * n for k, n in zip(kept, occurrences, strict=True))

    while total() + num_words > capacity and max(kept, default=1) > 1:
        kept[kept.index(max(kept))] -= 1
    return kept, max(0, min(num_words, capacity - total()))


def compose(
    text: str,
    vilex_tokens: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    names: Sequence[str] = (),
) -> ComposedPrompt:
    """One prompt (B=1) from words and images.

    vilex_tokens: one (N,D) tensor per image, N free; names: those that `[name]` may use, one per image.
    Raises ValueError when the images do not fit at one token each, or the text names one that is not there.
    """
    special = special_tokens(tokenizer)
    segments = parse(text, len(vilex_tokens), names)
    runs = [s if isinstance(s, int) else tokenize(tokenizer, s).input_ids for s in segments]
    occurrences = [runs.count(i) for i in range(len(vilex_tokens))]
    capacity = context_length - len(special.prefix) - len(special.suffix)
    if sum(occurrences) > capacity:
        raise ValueError(f"{sum(occurrences)} images do not fit into {capacity} positions")
    asked = tuple(len(tokens) for tokens in vilex_tokens)
    words = [word for run in runs if isinstance(run, list) for word in run]
    kept, num_words = fit_budget(asked, occurrences, len(words), capacity)
    row, slots = _lay_out(runs, kept, num_words, special)
    padding = [False] * (context_length - len(row))
    vectors = [vilex_tokens[run][: kept[run]] for run in runs if isinstance(run, int)]
    return ComposedPrompt(
        input_ids=torch.tensor([row + [special.pad] * len(padding)]),
        attention_mask=torch.tensor([[True] * len(row) + padding]),
        slots=torch.tensor([slots + padding]),
        vectors=torch.cat(vectors) if vectors else None,
        kept=tuple(kept),
        asked=asked,
        num_words=num_words,
        cut_words=tokenizer.decode(words[num_words:]).strip(),
        segments=tuple(kept[s] if isinstance(s, int) else s for s in segments),
        names=tuple(names),
        unknown=unknown_names(text, names) if vilex_tokens else (),
    )


def unknown_names(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """What stands in brackets in the prompt and is no image's name."""
    found = [match[2] for match in _SLOT.finditer(text) if match[2] is not None]
    return tuple(dict.fromkeys(name for name in found if name not in names))


def _lay_out(
    runs: Sequence[int | list[int]], kept: Sequence[int], num_words: int, special: SpecialTokens
) -> tuple[list[int], list[bool]]:
    """Ids of one unpadded row, and which of them are slots."""
    row, slots = list(special.prefix), [False] * len(special.prefix)
    for run in runs:
        is_image = isinstance(run, int)
        ids = [special.placeholder] * kept[run] if is_image else run[:num_words]
        num_words -= 0 if is_image else len(ids)
        row += ids
        slots += [is_image] * len(ids)
    return row + list(special.suffix), slots + [False] * len(special.suffix)


def round_up(length: int, multiple: int = 8) -> int:
    """The next multiple of it; attention on GPUs is fastest at lengths that are multiples of 8."""
    return -(-length // multiple) * multiple


def compose_leading(
    word_ids: Tensor, word_mask: Tensor, vilex_tokens: Tensor, special: SpecialTokens, context_length: int
) -> ComposedPrompt:
    """A batch of [v, c] prompts from words that are tokenised already; no Python per row.

    word_ids int64 (B,W) without special tokens and word_mask bool (B,W), True on words, which come first in
    each row; vilex_tokens (B,N,D). The last words of a row that does not fit are cut.
    """
    B, W = word_ids.shape
    N, device = vilex_tokens.shape[1], word_ids.device
    start = len(special.prefix) + N
    room = context_length - start - len(special.suffix)
    words = word_mask.sum(1).clamp(max=room)  # (B,)
    input_ids = torch.full((B, context_length), special.pad, dtype=word_ids.dtype, device=device)
    for i, prefix_id in enumerate(special.prefix):  # no tensor of them: an accelerator would wait for the copy
        input_ids[:, i] = prefix_id
    input_ids[:, len(special.prefix) : start] = special.placeholder
    input_ids[:, start : start + min(W, room)] = word_ids[:, :room]
    position = torch.arange(context_length, device=device)
    end = (start + words)[:, None]  # (B,1)
    input_ids = torch.where(position < end, input_ids, special.pad)
    for offset, suffix_id in enumerate(special.suffix):
        input_ids = torch.where(position == end + offset, suffix_id, input_ids)
    slots = ((position >= len(special.prefix)) & (position < start)).expand(B, -1)
    mask = position < end + len(special.suffix)
    return ComposedPrompt(input_ids, mask, slots, vilex_tokens.flatten(0, 1) if N else None)


def shorten(prompt: ComposedPrompt, special: SpecialTokens, context_length: int) -> ComposedPrompt:
    """The first positions of each row for an encoder of a shorter context, closed by its suffix where it was cut.

    prompt.vectors loses those whose slots are cut off.
    """
    if prompt.input_ids.shape[1] <= context_length:
        return prompt
    end = context_length - len(special.suffix)
    is_cut = prompt.attention_mask.sum(1, keepdim=True) > context_length  # (B,1)
    position = torch.arange(prompt.input_ids.shape[1], device=prompt.slots.device)
    slots = prompt.slots & (position < context_length) & ~(is_cut & (position >= end))  # (B,L)
    input_ids = prompt.input_ids[:, :context_length].clone()
    for offset, suffix_id in enumerate(special.suffix):
        input_ids[is_cut[:, 0], end + offset] = suffix_id
    vectors = None if prompt.vectors is None else prompt.vectors[slots[prompt.slots].to(prompt.vectors.device)]
    short = slice(context_length)
    return ComposedPrompt(input_ids, prompt.attention_mask[:, short], slots[:, short], vectors)


def recompose(
    prompt: ComposedPrompt, source: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> ComposedPrompt:
    """The same words and vectors as another tokenizer writes them, all slots kept.

    What `compose` wrote is read as it was given, the words that it cut included; a batch's words are decoded from
    the ids of its `source` tokenizer. Raises ValueError when the slots alone do not fit.
    """
    special = special_tokens(tokenizer)
    segments = [prompt.segments] if prompt.segments else _read_back(prompt, source)
    composed = [_compose_row(row, tokenizer, special, context_length) for row in segments]
    ids, slots = zip(*composed, strict=True)
    padding = [context_length - len(row) for row in ids]
    return ComposedPrompt(
        input_ids=torch.tensor([row + [special.pad] * n for row, n in zip(ids, padding, strict=True)]),
        attention_mask=torch.tensor([[True] * len(row) + [False] * n for row, n in zip(ids, padding, strict=True)]),
        slots=torch.tensor([row + [False] * n for row, n in zip(slots, padding, strict=True)]),
        vectors=prompt.vectors,
    )


def _read_back(prompt: ComposedPrompt, tokenizer: PreTrainedTokenizerBase) -> list[list[str | int]]:
    """Segments of each row: decoded words and counts of slots."""
    special, rows = special_tokens(tokenizer), []
    lengths = prompt.attention_mask.sum(1).tolist()
    for ids, slots, length in zip(prompt.input_ids.tolist(), prompt.slots.tolist(), lengths, strict=True):
        body = slice(len(special.prefix), length - len(special.suffix))
        runs = [(k, [i for i, _ in run]) for k, run in groupby(zip(ids[body], slots[body], strict=True), itemgetter(1))]
        rows.append([len(run) if is_slot else tokenizer.decode(run) for is_slot, run in runs])
    return rows


def _compose_row(
    segments: Sequence[str | int], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, context_length: int
) -> tuple[list[int], list[bool]]:
    """Ids of one unpadded row, and which of them are slots; the last words that do not fit are cut."""
    counts, runs = [s for s in segments if isinstance(s, int)], []
    for segment in segments:
        is_image = isinstance(segment, int)
        runs.append(sum(isinstance(r, int) for r in runs) if is_image else tokenize(tokenizer, segment).input_ids)
    room = context_length - len(special.prefix) - len(special.suffix) - sum(counts)
    if room < 0:
        raise ValueError(f"{sum(counts)} image tokens do not fit into a context of {context_length} positions")
    return _lay_out(runs, counts, room, special)


def embedding_module(text_encoder: PreTrainedModel) -> nn.Module:
    """The embedding table that forward looks words up in.

    T5's `get_input_embeddings()` is another module than the one its encoder calls.
    """
    inner = getattr(text_encoder, "encoder", None)
    return inner.embed_tokens if hasattr(inner, "embed_tokens") else text_encoder.get_input_embeddings()


@contextmanager
def override_embeddings(text_encoder: PreTrainedModel, slots: Tensor, vectors: Tensor) -> Iterator[None]:
    """While active, one forward pass of the encoder reads `vectors` (S,D) at `slots` (B,L).

    Raises RuntimeError at the end unless the embedding table was read exactly once.
    """
    calls = 0

    def write(module: nn.Module, args: tuple, token_embeds: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if not len(vectors):
            return token_embeds
        order = slots.flatten().cumsum(0).sub(1).clamp(min=0)  # (B*L,), of the vectors
        spread = vectors.to(token_embeds.dtype).index_select(0, order).view_as(token_embeds)
        return torch.where(slots[..., None], spread, token_embeds)  # masked_scatter would have an accelerator wait

    with _override_lock:
        handle = embedding_module(text_encoder).register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()
    if calls != 1:
        raise RuntimeError(f"the text encoder read its embedding table {calls} times, expected once")
