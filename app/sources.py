"""How pictures come into their cards: dropped, by address, as a code; and how cards come and go."""

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency
from PIL import Image

from app.cards import NAMES, Upload, is_polished, open_upload, pack, unpack, was_polished
from app.download import download
from app.handlers import Handlers
from app.messages import finished, in_words, sentence
from app.panel import EMPTY_CARD, WORD_CARD, CardExtras, Panel
from app.studio import Card
from vilex.config import FITS, tokens_in_words
from vilex.images import CENTRINGS, MAX_DECODES, decode_image
from vilex.recipe import load_recipe

_LOOK = {
    "show_progress": "hidden", "concurrency_limit": MAX_DECODES, "concurrency_id": "look", "api_visibility": "private",
}  # fmt: skip
MOST_CUT = 0.2  # of a picture's longer side: where the encoder's crop takes more, the card says so
_HIDDEN_BY_BROWSERS = frozenset({".tif", ".tiff", ".heic", ".heif"})
MAX_FETCHES = 8  # at once, apart from the pictures that are looked at: an address may be slow
Shown = list[bool]  # which cards are on the page


def wire_cards(handlers: Handlers, panel: Panel) -> gr.State:
    """Every event of the cards themselves; gives the state that holds which cards are on the page."""
    shown = gr.State([index == 0 for index in range(len(panel.cards))])
    for index, (card, extra) in enumerate(zip(panel.cards, panel.extras, strict=True)):
        _wire_card(handlers, card, extra, index, shown, panel)
    panels = [card.panel for card in panel.cards]
    panel.add.click(show_next, shown, [*panels, shown, panel.add], queue=False, **_quiet())
    return shown


def _quiet() -> dict[str, Any]:
    return {"show_progress": "hidden", "api_visibility": "private"}


def _wire_card(
    handlers: Handlers, card: Card, extra: CardExtras, index: int, shown: gr.State, panel: Panel
) -> None:  # fmt: skip
    # queued, since only queued events show their errors; `input` comes once per picture, `change` sometimes twice
    sight = [card.seen, card.word, card.note, extra.restore]
    arrivals = [
        card.picture.input(
            partial(arrive, handlers),
            [card.picture, card.fit],
            [card.picture, *sight],
            preprocess=False,
            trigger_mode="always_last",
            **_LOOK,
        ),
        card.fit.input(
            partial(refit, handlers),
            [card.picture, card.fit],
            [card.seen, card.word, card.note],
            preprocess=False,
            **_LOOK,
        ),
        extra.source.submit(
            partial(fetch, handlers),
            [extra.source, card.fit],
            [extra.source, card.picture, *sight],
            **(_LOOK | {"concurrency_limit": MAX_FETCHES, "concurrency_id": "fetch"}),
        ),
    ]
    hold = f"(picture) => holdPicture({index}, picture)"
    for arrival in (arrivals[0], arrivals[2]):
        arrival.success(None, card.picture, None, js=hold, **_quiet())
    card.picture.change(None, card.picture, None, js=f"(picture) => picture ?? holdPicture({index}, null)", **_quiet())
    arrivals[0].failure(None, None, card.picture, js=f"() => heldPicture({index})", **_quiet())
    word_came = card.word.change(
        partial(word_arrives, handlers, index), [card.word, shown, card.picture, card.fit],
        [card.picture, card.panel, shown, panel.add, *sight], preprocess=False, **_LOOK,
    )  # fmt: skip
    if index == 0:
        for arrival in arrivals:
            announce(arrival, card.picture, panel.arrival)
        announce(word_came, card.word, panel.arrival, in_sight=True)  # else it is in the way of what is drawn next
    removed = extra.remove.click(
        partial(remove, index, handlers.max_tokens), shown,
        [card.picture, card.panel, shown, panel.add, *sight, card.name, card.weight, card.num_tokens, card.fit],
        queue=False, **_quiet(),
    )  # fmt: skip
    removed.success(None, None, None, js=f"() => holdPicture({index}, null)", **_quiet())  # it is out of sight


def announce(event: Dependency, held: Component, arrival: gr.Textbox, in_sight: bool = False) -> None:
    """Has picture A rebuilt after the event, if there is what is `held`; in_sight: only where the ladder is seen.

    What is folded away is not in the page, so its changes go unnoticed.
    """
    seen = ' && document.getElementById("rungs")?.offsetParent' if in_sight else ""
    changed = f"(held, old) => held{seen} ? String(Math.random()) : old"
    event.success(None, [held, arrival], arrival, js=changed, **_quiet())


def arrive(handlers: Handlers, picture: Upload, fit: str) -> tuple:
    """A new picture as browsers show it, how the encoder sees it, no word, a note, whether it brings settings back."""
    seen, note, has_recipe = _see(handlers, picture, fit)
    return as_shown(picture), seen, "", note, gr.update(visible=has_recipe)


def refit(handlers: Handlers, picture: Upload, fit: str) -> tuple:
    """What the encoder sees of a picture that is fitted anew, no word polished for the old view, and a note."""
    if picture is None:
        return gr.skip(), gr.skip(), gr.skip()
    seen, note, _ = _see(handlers, picture, fit)
    return seen, "", note


def as_shown(picture: Upload) -> Any:
    """The path of a PNG of a picture that browsers do not show, such as a TIFF; no change for any other."""
    path = Path(picture["path"]) if picture else None
    if path is None or path.suffix.lower() not in _HIDDEN_BY_BROWSERS:
        return gr.skip()
    decode_image(path).save(shown := path.with_suffix(".png"))
    return str(shown)


def _see(handlers: Handlers, picture: Upload, fit: str) -> tuple[Image.Image | None, str, bool]:
    with in_words():
        if picture is None:
            return None, "", False
        notes: list[str] = []
        image = open_upload(picture, lambda note: notes.append(f"{note}."))
        share = min(image.size) / max(image.size)
        if fit in CENTRINGS and share < 1 - MOST_CUT:
            notes.append(
                f"Only {share:.0%} of its length is used: “Adjust picture” can move the crop or keep all of it."
            )
        has_recipe = carries_recipe(picture["path"])
        notes += ["This picture carries the settings that made it."] if has_recipe else []
        return handlers.seen(image, fit), "".join(map(finished, notes)), has_recipe


def carries_recipe(path: str) -> bool:
    """Whether a file is a PNG with settings that can be used."""
    try:
        return load_recipe(path) is not None
    except ValueError:
        return False


def fetch(handlers: Handlers, source: str, fit: str) -> tuple:
    """The picture at an address, or the word of a code: emptied source, picture, then what `arrive` gives of it."""
    with in_words():
        text = source.strip()
        if not text:
            return (gr.skip(),) * 6
        if not text.lower().startswith(("http:", "https:", "ftp:", "file:")):
            word = pack(unpack(text, handlers.ready().fingerprint))
            return "", None, None, word, gr.skip(), gr.skip()
        path = download(text)
        shown, *sight = arrive(handlers, {"path": path}, fit)
        return "", shown if isinstance(shown, str) else path, *sight


def word_arrives(
    handlers: Handlers, index: int, word: str, shown: Shown, picture: Upload = None, fit: str = "crop"
) -> tuple:
    """The card when a code has come into it: it is shown, says what it holds, and keeps only its own picture."""
    if not word:
        return gr.update(placeholder=EMPTY_CARD), *(gr.skip(),) * 7
    shown = [is_shown or i == index for i, is_shown in enumerate(shown)]
    try:
        code = unpack(word, handlers.ready().fingerprint)
        polished = is_polished(word, picture, fit)
        if picture is not None and not polished and was_polished(word):
            raise ValueError("the picture has changed since its tokens were polished: polish it again")
    except ValueError as error:
        gr.Warning(sentence(str(error)).message, title="That did not work")
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip(), "", "", gr.update(visible=False)
    size = tokens_in_words(len(code.vilex_tokens))
    origin = f", made from {code.source}" if code.source else ""
    note, kept, seen = f"A word of {size}{origin}.", gr.update(value=None, placeholder=WORD_CARD), None
    if polished:
        note, kept, seen = f"Polished: {size} fitted to this picture. Give it again to go back.", gr.skip(), gr.skip()
    add = gr.update(visible=not all(shown))
    return kept, gr.update(visible=True), shown, add, seen, gr.skip(), finished(note), gr.update(visible=False)


def show_next(shown: Shown) -> tuple:
    """The first card that is not on the page, if any: updates of all panels, the new state, the add button."""
    shown = list(shown)
    if not all(shown):
        shown[shown.index(False)] = True
    return *(gr.update(visible=is_shown) for is_shown in shown), shown, gr.update(visible=not all(shown))


def remove(index: int, max_tokens: int, shown: Shown) -> tuple:
    """The card emptied, taken off the page and at its usual settings again."""
    shown = [is_shown and i != index for i, is_shown in enumerate(shown)]
    hidden = gr.update(visible=False)
    return None, hidden, shown, gr.update(visible=True), None, "", "", hidden, NAMES[index], 1, max_tokens, FITS[0]
