"""Nothing is lost: a result's recipe, or what the browser remembers, brings prompt, settings and pictures back."""

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.components import Component
from PIL import Image

from app.cards import (
    CARD_FIELDS,
    MAX_CARDS,
    NAMES,
    CardInput,
    card_key,
    check_card,
    is_polished,
    pack,
    upload_path,
    usable_name,
)
from app.handlers import VIEWS, Handlers, Look, text_of
from app.link import from_link
from app.messages import in_words, sentence, tell
from app.panel import Panel, schedulers
from app.studio import Studio
from vilex.codes import load_code
from vilex.config import DEFAULT_TOKENS, MAX_PROMPT_CHARS, MIXING, GenerationConfig, tokens_in_words
from vilex.prompt import has_words, mentioned
from vilex.recipe import Recipe, RecipeImage, differences, load_recipe

_log = logging.getLogger(__name__)
MAX_REMEMBERED = 60  # results
OWN = ("num_images", *(card_key("word", i) for i in range(MAX_CARDS)))  # what each model's page remembers for itself
Values = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Page:
    """The components that can be brought back, by name; `remembered` are those kept for the pages of all models."""

    handlers: Handlers
    targets: dict[str, Component]
    remembered: tuple[str, ...]

    def outputs(self) -> list[Any]:
        """The components in the order of `fill`."""
        return list(self.targets.values())

    def fill(self, values: Mapping[str, Any]) -> tuple:
        """One update per output: the value where there is one."""
        assert not set(values) - set(self.targets), set(values) - set(self.targets)
        return tuple(values.get(name, gr.skip()) for name in self.targets)


def save_js(names: Sequence[str]) -> str:
    """JavaScript that makes one object of the values of components by these names."""
    return f"(...values) => Object.fromEntries({json.dumps(names)}.map((name, i) => [name, values[i]]))"


def build_page(studio: Studio, panel: Panel, shown: gr.State, history: gr.Gallery) -> Page:
    """All that can be brought back on this page."""
    kept = {"prompt": panel.prompt, "view": panel.view, "embed": panel.embed, "lock": panel.lock, **panel.settings}
    kept |= studio.inputs("cards") | {"gallery": studio.gallery, "history": history}
    panels = {f"panel_{i}": card.panel for i, card in enumerate(panel.cards)}
    seen = {f"seen_{i}": card.seen for i, card in enumerate(panel.cards)}
    rest = {"shown": shown, "add": panel.add, "arrival": panel.arrival}
    return Page(studio.handlers, kept | panels | seen | rest, tuple(name for name in kept if name not in OWN))


def from_recipe(
    handlers: Handlers, recipe: Recipe, cleared: Collection[int] = (), filled: Sequence[bool] = (False,) * MAX_CARDS
) -> Values:
    """The page's values for drawing that picture again; cards in `cleared` lose their pictures.

    A picture whose tokens the recipe does not carry stays the one in its card. Further cards that are `filled` stay
    too, unless the prompt would take them in; one that mentions no picture then names the recipe's own.
    """
    prompt, kept = _kept(recipe, filled)
    values: Values = {"prompt": prompt, "lock": True} | {card_key("name", i): NAMES[i] for i in kept}
    values |= {k: v for k, v in recipe.config.to_dict().items() if k != "num_tokens"}
    if not recipe.images or not has_words(recipe.prompt, len(recipe.images), [image.name for image in recipe.images]):
        for name in MIXING:  # which had no effect: the sliders stay where they are
            del values[name]
    values["scheduler"] = _usable_scheduler(handlers, recipe.config.scheduler)
    images = recipe.images[:MAX_CARDS]
    for i in set(range(MAX_CARDS)) - kept:
        values |= _card_values(handlers, i, images[i] if i < len(images) else None, i in cleared)
    shown = [i < max(1, len(images)) or i in kept for i in range(MAX_CARDS)]
    return values | _layout(shown)


def _kept(recipe: Recipe, filled: Sequence[bool]) -> tuple[str, set[int]]:
    """The prompt, and the cards beyond the recipe's own that can stay beside it, under their letters."""
    names = [usable_name(image.name, i) for i, image in enumerate(recipe.images[:MAX_CARDS])]
    kept = {i for i in range(len(names), MAX_CARDS) if filled[i]}
    if not kept:
        return recipe.prompt, kept
    prompt = recipe.prompt
    if not any(mark in prompt for mark in "<["):  # it mentions no picture, and would take in any
        prompt = " ".join([*(f"[{name}]" for name in names), prompt]).strip()
    everyone = [*names, *(NAMES[i] for i in sorted(kept))]
    is_same = mentioned(prompt, len(everyone), everyone) == mentioned(recipe.prompt, len(names), names)
    if not is_same or len(set(everyone)) < len(everyone) or len(prompt) > MAX_PROMPT_CHARS:
        return recipe.prompt, set()
    return prompt, kept


def _usable_scheduler(handlers: Handlers, name: str) -> str:
    return name if name in schedulers(handlers) else "auto"


def _card_values(handlers: Handlers, index: int, image: RecipeImage | None, is_cleared: bool) -> Values:
    own: Values = {}
    if image is not None:
        own |= {"num_tokens": min(image.num_tokens, handlers.max_tokens), "name": usable_name(image.name, index)}
        own["weight"] = 1.0 if image.code else image.weight  # a code has it in it
        own |= {"fit": image.fit} if image.fit and not image.code else {}
    if image is None or image.code or is_cleared:
        own |= {"picture": None, "word": image.code if image else ""}
    values = {card_key(name, index): value for name, value in own.items()}
    return values | ({f"seen_{index}": None} if "picture" in own else {})


def _layout(shown: list[bool]) -> Values:
    panels = {f"panel_{i}": gr.update(visible=is_shown) for i, is_shown in enumerate(shown)}
    return panels | {"shown": shown, "add": gr.update(visible=not all(shown))}


def _tell_restored(recipe: Recipe, handlers: Handlers, source: str = "file", filled: Sequence[bool] = ()) -> None:
    """Says what is back, and not in the status line, which belongs to what is being drawn."""
    text = "The settings are back, the seed is kept."
    if any(filled[len(recipe.images) :]) and not _kept(recipe, filled)[1]:
        text += " Pictures that it was drawn without went."
    used = mentioned(recipe.prompt, len(recipe.images), [image.name for image in recipe.images])
    images = enumerate(recipe.images[:MAX_CARDS])
    lost = {NAMES[i]: image.fit for i, image in images if i in used and not image.code}
    again = "again, unless the card still holds it"
    for name, fit in lost.items():
        how = f"drop it in {again}" if fit else f"it was a word, open that {again}"
        text += f" Picture {name} is not in the {source}: {how}."
    other = differences(recipe, handlers.pipeline) if handlers.pipeline else ""
    tell(f"{text} {other}.".replace(" .", "") if other else text)


def open_file(page: Page, path: str, filled: list[bool]) -> tuple:
    """What a file brings: a .vilex file a word for the first empty card, a PNG with a recipe all of its settings.

    `filled`: which cards hold something.
    """
    with in_words():
        path = upload_path(path)
        name = Path(path).name
        if name.lower().endswith(".vilex"):
            return page.fill(_word_values(page.handlers, path, filled))
        recipe = load_recipe(path)
        if recipe is None:
            raise ValueError(f"{name} carries no settings; to use it as a picture, drop it on a picture card")
        return _restored(page, recipe, filled=filled)


def _word_values(handlers: Handlers, path: str, filled: list[bool]) -> Values:
    try:
        code = load_code(path, handlers.ready().fingerprint)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error
    index = filled.index(False) if not all(filled) else MAX_CARDS - 1
    count = len(code.vilex_tokens)
    tell(f"Picture {NAMES[index]} is now a word of {tokens_in_words(count)}.")
    return {card_key("word", index): pack(code), card_key("num_tokens", index): count}


def bring_back(page: Page, path: str, filled: Sequence[bool], cleared: Collection[int] = ()) -> tuple:
    """The settings of a result; `filled`: which cards hold something. Raises gr.Error where it carries none."""
    with in_words():
        recipe = load_recipe(upload_path(path))
        if recipe is None:
            raise ValueError(f"{Path(path).name} carries no settings")
        return _restored(page, recipe, filled, cleared)


def _restored(page: Page, recipe: Recipe, filled: Sequence[bool], cleared: Collection[int] = ()) -> tuple:
    _tell_restored(recipe, page.handlers, filled=filled)
    values = from_recipe(page.handlers, recipe, cleared, filled)
    del values["num_images"]  # a result is one of those that were drawn at once
    return page.fill(values)


def remember(page: Page, saved: object, own: object = None, link: object = "") -> tuple:
    """What the browser remembers of this page, as far as it still holds, under what the link holds that opened it.

    saved: of the pages of all models; own: of this model's.
    Nothing of either is taken on trust; a value that does not hold costs only itself.
    """
    known = {name: value for each in (saved, own) if isinstance(each, dict) for name, value in each.items()}
    values = _remembered(page.handlers, known) if known else {}
    values |= _linked(page.handlers, link) if isinstance(link, str) and link else {}
    if "picture" in values and not values.get("word"):  # a word tells of itself
        values["arrival"] = str(values["picture"] or "")
    return page.fill(values)


def _linked(handlers: Handlers, link: str) -> Values:
    try:
        recipe = from_link(link)
        values = from_recipe(handlers, recipe)
        handlers.read_cards(dict(values))  # as a request would: codes of another model are refused here
        _tell_restored(recipe, handlers, "link")
    except ValueError as error:
        text = f"This link cannot be opened: {error}"
        gr.Warning(sentence(text).message, title="That did not work")
        return {}
    return values


def _remembered(handlers: Handlers, saved: Values) -> Values:
    names = [f.name for f in dataclasses.fields(GenerationConfig) if f.name != "num_tokens"]
    values = _take(GenerationConfig(), {name: saved[name] for name in names if name in saved})
    values |= {"scheduler": _usable_scheduler(handlers, values.get("scheduler", "auto"))}
    values |= _take(Look(VIEWS[0], False), {name: saved[name] for name in ("view", "embed") if name in saved})
    values |= {"lock": saved.get("lock") is True, "prompt": _prompt(saved.get("prompt"))}
    shown = [True] + [False] * (MAX_CARDS - 1)
    for i in range(MAX_CARDS):
        card = _remembered_card(handlers, saved, i)
        shown[i] |= bool(card[card_key("picture", i)] or card.get(card_key("word", i)))
        values |= card
    results = {name: _results(saved.get(name)) for name in ("gallery", "history")}
    return values | _layout(shown) | results


def _remembered_card(handlers: Handlers, saved: Values, index: int) -> Values:
    keys = {name: card_key(name, index) for name in CARD_FIELDS}
    start = CardInput(None, "", "", 1.0, DEFAULT_TOKENS, "crop")
    card = _take(start, {name: saved[key] for name, key in keys.items() if key in saved}, check_card)
    path, seen = _seen(handlers, card.get("picture"), card.get("fit", start.fit))
    if path and card.get("word") and not is_polished(card["word"], {"path": path}, card.get("fit", start.fit)):
        card["word"] = ""  # the picture came later: a word that comes takes it away
    if "num_tokens" in card:
        card["num_tokens"] = min(card["num_tokens"], handlers.max_tokens)
    return {keys[name]: value for name, value in card.items()} | {keys["picture"]: path, f"seen_{index}": seen}


def _take(start: T, saved: Mapping[str, Any], check: Callable[[T], T] = lambda taken: taken) -> Values:
    """The saved fields of `start` that hold, each beside those before it; for the others the page keeps its own."""
    held: Values = {}
    for name, value in saved.items():
        try:
            start = check(dataclasses.replace(start, **{name: value}))
            held[name] = getattr(start, name)
        except (ValueError, TypeError) as error:  # half typed, of another version, or tampered with
            _log.info("not remembered: %s", error)
    return held


def _prompt(saved: object) -> str:
    try:
        return text_of(saved)
    except ValueError:
        return ""


def _seen(handlers: Handlers, picture: object, fit: str) -> tuple[str | None, Image.Image | None]:
    """The path of a remembered picture and what the encoder sees of it; neither when it is gone or no picture."""
    try:
        path = cached(picture)
        return path, handlers.look({"path": path}, fit) if path else None
    except gr.Error:  # one bad file must not cost the rest of the page
        return None, None


def _results(items: object) -> list[tuple[str, str]]:
    listed = items[:MAX_REMEMBERED] if isinstance(items, list) else []
    found = [(cached(item.get("image")), str(item.get("caption") or "")) for item in listed if isinstance(item, dict)]
    return [(path, caption) for path, caption in found if path]


def cached(file: object) -> str | None:
    """The path of a file that lies in gradio's cache; None for all others, and for one that is gone."""
    try:
        return upload_path(file.get("path") if isinstance(file, dict) else None)
    except ValueError:
        return None
