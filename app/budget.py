"""How a prompt's slots are spent, as HTML: images, each word, and what is free. Every text in it is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import torch

from app.cards import CardInput, unpack
from vilex.pipeline import VilexPipeline
from vilex.prompt import parse, parse_terms, tokenize


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt: an image or one word, the slots it has, and those it asked for."""

    kind: Literal["image", "word"]
    text: str
    slots: int
    asked: int


@dataclass(frozen=True)
class Budget:
    """The parts of a prompt in reading order, the slots there are, and what did not fit in one sentence."""

    parts: list[Part]
    capacity: int
    note: str = ""

    def count(self, kind: str) -> int:
        """Slots taken by images or by words."""
        return sum(part.slots for part in self.parts if part.kind == kind)

    @property
    def free(self) -> int:
        return self.capacity - self.count("image") - self.count("word")


def spend(pipeline: VilexPipeline, prompt: str, cards: Sequence[CardInput]) -> Budget:
    """The budget of a prompt with pictures; no picture needs to be encoded for it.

    Raises ValueError as VilexPipeline.compose does.
    """
    names = [card.name for card in cards]
    tokens = [torch.zeros(_asked(pipeline, card), pipeline.t2i.text_width) for card in cards]
    composed = pipeline.compose(prompt, tokens, names=names)
    parts, words_left = [], composed.num_words
    terms = parse_terms(prompt, len(cards), names)
    for segment in parse(prompt, len(cards), names):
        if isinstance(segment, int):
            label = names[segment] or (f"image {segment + 1}" if len(cards) > 1 else "image")
            parts.append(Part("image", f"{label}{terms[segment]}", composed.kept[segment], composed.asked[segment]))
            continue
        for text, asked in _words(pipeline, segment):
            parts.append(Part("word", text, min(asked, words_left), asked))
            words_left -= parts[-1].slots
    return Budget(parts, pipeline.t2i.max_tokens, composed.note)


def _asked(pipeline: VilexPipeline, card: CardInput) -> int:
    most = pipeline.max_tokens if card.is_encoded else len(unpack(card.word).vilex_tokens)
    return min(int(card.num_tokens), most)


def _words(pipeline: VilexPipeline, text: str) -> list[tuple[str, int]]:
    """Each word of the text as the user wrote it, and the tokens it takes."""
    encoding = tokenize(pipeline.t2i.tokenizer, text)
    indices = encoding.word_ids()
    spans = {i: encoding.word_to_chars(i) for i in indices}
    return [(text[span.start : span.end], indices.count(i)) for i, span in spans.items()]


def to_html(budget: Budget) -> str:
    """A bar of coloured slots, the same in words, and the prompt with its cut words struck through."""
    cells = [_cell(part) for part in budget.parts if part.slots]
    cells.append(f'<i class="free" style="flex-grow:{budget.free}"></i>')
    return (
        f'<div class="budget"><div class="bar" role="img" aria-label="{escape(summary(budget))}">{"".join(cells)}</div>'
        f'<p class="legend">{_legend(budget)}</p>{_reading(budget.parts)}{note_html(budget.note)}</div>'
    )


def summary(budget: Budget) -> str:
    """The budget in one sentence, for screen readers."""
    image, words = budget.count("image"), budget.count("word")
    pictures = _pictures(budget)
    return f"{image} slots for the {pictures}, {words} for words, {budget.free} of {budget.capacity} free"


def _pictures(budget: Budget) -> str:
    labels = {part.text: part.slots for part in budget.parts if part.kind == "image"}
    if len(labels) < 2:
        return "picture"
    return f"pictures ({', '.join(f'{label} {slots}' for label, slots in labels.items())})"


def _cell(part: Part) -> str:
    title = escape(f"{part.text}: {part.slots} {'slot' if part.slots == 1 else 'slots'}")
    return f'<i class="{part.kind}" style="flex-grow:{part.slots}" title="{title}"></i>'


def _legend(budget: Budget) -> str:
    counts = {"image": budget.count("image"), "word": budget.count("word"), "free": budget.free}
    names = {"image": _pictures(budget), "word": "words", "free": f"free of {budget.capacity}"}
    return " ".join(
        f'<span><b class="{kind}"></b>{count} {escape(names[kind])}</span>' for kind, count in counts.items()
    )


def _reading(parts: Sequence[Part]) -> str:
    if not any(part.kind == "word" for part in parts):
        return ""
    return f'<p class="reading">{" ".join(map(_word, parts))}</p>'


def _word(part: Part) -> str:
    text = escape(part.text)
    if part.kind == "image":
        return f"<mark>{text}</mark>"
    if not part.slots:
        return f"<del>{text}</del>"
    if part.slots < part.asked:
        title = f"{part.slots} of {part.asked} pieces of this word fit"
        return f'<span class="part" title="{title}">{text}<small> partly cut</small></span>'
    return f"<span>{text}</span>"


def note_html(note: str) -> str:
    """A remark under the bar; nothing for an empty one."""
    return f'<p class="note">{escape(note)}</p>' if note else ""
