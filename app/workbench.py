"""What the tabs beside the ladder share: which picture is meant, and several pictures from one noise."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import gradio as gr
from torch import Tensor

from app.cards import CARD_FIELDS, MAX_CARDS, NAMES, PictureWord, card_key, names_of, take_cards
from app.handlers import Handlers, build_config, text_of
from vilex.config import GenerationConfig, Range, check_range
from vilex.pipeline import VilexPipeline
from vilex.prompt import mentioned
from vilex.recipe import Recipe, build_recipe, build_recipe_image
from vilex.sampling import Conditions
from vilex.t2i import Conditioning


def card_choice(label: str, value: str = NAMES[0]) -> gr.Radio:
    """A choice among the picture cards."""
    return gr.Radio(NAMES, value=value, label=label, min_width=220)


def read_one(handlers: Handlers, values: Mapping[str, Any], card: object, full: bool = False) -> PictureWord:
    """The card of that letter as a word; `full` gives all tokens there are.

    Raises ValueError for a letter that no card has, and for a card that is empty or wrong.
    """
    if card not in NAMES:
        raise ValueError(f"The picture must be one of {', '.join(NAMES)}, got {card!r}")
    keys = {field: card_key(field, NAMES.index(card)) for field in CARD_FIELDS}
    words = handlers.read_cards({field: values[key] for field, key in keys.items() if key in values}, full)
    if not words:
        raise ValueError(f"Picture {card} is empty: give it a picture first")
    return words[0]


def tokens_of_used(count: int, prompt: str, values: Mapping[str, Any]) -> list[Any]:
    """The token count for each card whose picture stands in the prompt, no change for the others."""
    held = [i for i in range(MAX_CARDS) if any(values[card_key(field, i)] for field in ("picture", "word"))]
    used = {held[i] for i in mentioned(text_of(prompt), len(held), names_of(take_cards(dict(values))))}
    return [count if i in used else gr.skip() for i in range(MAX_CARDS)]


def read_settings(values: Mapping[str, Any]) -> GenerationConfig:
    """The settings among the arguments of a request, checked; token counts are the cards' own."""
    names = {field.name for field in fields(GenerationConfig)} - {"num_tokens", "num_images"}
    return build_config(**{name: values[name] for name in names & values.keys()})


def read_whole(name: str, value: Any, bounds: Range) -> int:
    """The value as int. Raises ValueError unless it is a whole number within the bounds."""
    check_range(name, value, bounds)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def side_by_side(
    pipeline: VilexPipeline,
    rows: Sequence[Sequence[Tensor]],
    config: GenerationConfig,
    prompt: str = "",
    names: Sequence[str] = (),
) -> Conditions:
    """One prompt with other pictures in each row, as one batch: with one seed for all, they share their noise."""
    each = [pipeline.conditions(prompt, words, config, names) for words in rows]
    branches = {
        branch: Conditioning.concatenate([getattr(conditions, branch) for conditions in each])
        for branch in ("image", "joint", "words")
        if getattr(each[0], branch) is not None
    }
    return Conditions(each[0].uncond, **branches)


def recipes_of(pipeline: VilexPipeline, words: Sequence[Tensor], config: GenerationConfig, share: bool) -> list[Recipe]:
    """A recipe per word (N,D) that was drawn by itself; `share` writes the word into it."""
    return [
        build_recipe(
            pipeline, "", replace(config, num_tokens=len(tokens)),
            [build_recipe_image(pipeline, "", tokens, fit="", share=bool(share))],
        )
        for tokens in words
    ]  # fmt: skip
