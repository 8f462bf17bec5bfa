"""How a prompt's slots are spent, as HTML: images, each word, and what is free. Every text in it is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import torch

from vilex.pipeline import VilexPipeline
from vilex.prompt import parse, special_tokens, tokenize


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt: an image or one word, its slots, and whether it was cut."""

    kind: Literal["image", "word"]
    text: str
    slots: int
    cut: bool = False


@dataclass(frozen=True)
class Budget:
    """The parts of a prompt in reading order, the slots there are, and what did not fit in one sentence."""

    parts: list[Part]
    capacity: int
    note: str = ""

    def count(self, kind: str) -> int:
        """Slots taken by images or by words."""
        return sum(part.slots for part in self.parts if part.kind == kind and not part.cut)

    @property
    def free(self) -> int:
        return self.capacity - self.count("image") - self.count("word")


def spend(pipeline: VilexPipeline, prompt: str, num_images: int, num_tokens: int) -> Budget:
    """The budget of a prompt with pictures of num_tokens each; no picture needs to be encoded for it.

    Raises ValueError as VilexPipeline.compose does.
    """
    tokens = torch.zeros(num_tokens, pipeline.t2i.text_width)
    composed = pipeline.compose(prompt, [tokens] * num_images, num_tokens)
    special = special_tokens(pipeline.t2i.tokenizer)
    capacity = pipeline.t2i.config.context_length - len(special.prefix) - len(special.suffix)
    parts, words_left = [], composed.num_words
    for segment in parse(prompt, num_images):
        if isinstance(segment, int):
            parts.append(Part("image", f"image {segment + 1}" if num_images > 1 else "image", composed.kept[segment]))
            continue
        for text, slots in _words(pipeline, segment):
            parts.append(Part("word", text, slots, cut=slots > words_left))
            words_left = max(0, words_left - slots)
    return Budget(parts, capacity, composed.note)


def _words(pipeline: VilexPipeline, text: str) -> list[tuple[str, int]]:
    """Each word of the text as the user wrote it, and the tokens it takes."""
    encoding = tokenize(pipeline.t2i.tokenizer, text)
    indices = encoding.word_ids()
    spans = {i: encoding.word_to_chars(i) for i in indices}
    return [(text[span.start : span.end], indices.count(i)) for i, span in spans.items()]


def to_html(budget: Budget) -> str:
    """A bar of coloured slots, the same in words, and the prompt with its cut words struck through."""
    cells = [_cell(part) for part in budget.parts if not part.cut]
    cells.append(f'<i class="free" style="flex-grow:{budget.free}"></i>')
    return (
        f'<div class="budget"><div class="bar" role="img" aria-label="{escape(summary(budget))}">{"".join(cells)}</div>'
        f'<p class="legend">{_legend(budget)}</p>{_reading(budget.parts)}{_note(budget.note)}</div>'
    )


def summary(budget: Budget) -> str:
    """The budget in one sentence, for screen readers."""
    image, words = budget.count("image"), budget.count("word")
    return f"{image} slots for the picture, {words} for words, {budget.free} of {budget.capacity} free"


def _cell(part: Part) -> str:
    title = escape(f"{part.text}: {part.slots} {'slot' if part.slots == 1 else 'slots'}")
    return f'<i class="{part.kind}" style="flex-grow:{part.slots}" title="{title}"></i>'


def _legend(budget: Budget) -> str:
    counts = {"image": budget.count("image"), "word": budget.count("word"), "free": budget.free}
    names = {"image": "picture", "word": "words", "free": f"free of {budget.capacity}"}
    return " ".join(f'<span><b class="{kind}"></b>{count} {names[kind]}</span>' for kind, count in counts.items())


def _reading(parts: Sequence[Part]) -> str:
    if not any(part.kind == "word" for part in parts):
        return ""
    marks = {"image": "mark", "word": "span"}
    words = (f"<{tag}>{escape(p.text)}</{tag}>" for p in parts for tag in ["del" if p.cut else marks[p.kind]])
    return f'<p class="reading">{" ".join(words)}</p>'


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>' if note else ""
