"""The tab History: all results of this page, to look at and to bring back; and what survives a refresh."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import Dependency

from app.link import READ
from app.messages import in_words
from app.panel import Panel
from app.restore import MAX_REMEMBERED, OWN, Page, bring_back, open_file, remember, save_js
from app.studio import Studio

STORAGE_KEY, SECRET = "vilex-page", "vilex"  # fixed, or a restart of the app would forget everybody's page
_REMEMBER = f"""(history, ...results) => {{
  const items = results.flat().filter(Boolean).map((item) => item.image ? item : {{ image: item, caption: null }});
  const isNew = (item) => /vilex-[^/]*[.]png$/.test(item.image?.path ?? "")
    && !(history ?? []).some((old) => old.image.path === item.image.path);
  const stem = (path) => path.match(/vilex-([^/]*?)(-seed-\\d+)?[.]png$/)[1]
    .replaceAll("-", " ").replace(/^1 tokens$/, "1 token");
  const named = (item) => ({{ ...item, caption: item.caption ?? stem(item.image.path) }});
  return [[...items.filter(isNew).map(named), ...(history ?? [])].slice(0, {MAX_REMEMBERED})];  // one output
}}"""
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build_history() -> tuple[gr.Gallery, gr.Button, gr.State]:
    """The gallery of the page's results, newest first, the button that brings one back, and which is picked."""
    gr.Markdown("Results of this page, newest first. They are on this server for a day; your browser keeps the list.")
    history = gr.Gallery(
        label="History", format="png", columns=6, object_fit="contain", interactive=False, elem_id="history",
        buttons=["download", "download_all", "fullscreen"], height="auto", elem_classes="thumbs",
    )  # fmt: skip
    back = gr.Button("Bring back the settings of the picked one", elem_id="bring-back", size="md")
    return history, back, gr.State(None)


def wire_history(
    demo: gr.Blocks, studio: Studio, panel: Panel, page: Page, back: gr.Button, picked: gr.State, results: list[Any]
) -> Dependency:
    """Keeps results in the history, settings in the browser, and brings both back: the event of the page's start."""
    history = page.targets["history"]
    memories, shared = _build_memories(page), [page.targets[name] for name in page.remembered]
    for job in studio.jobs:
        added = job.success(None, [history, *results], history, js=_REMEMBER, **_QUIET)
        # a gallery out of sight tells no change
        added.then(None, shared, memories[0], js=save_js(page.remembered), **_QUIET)
    history.select(_pick, None, picked, queue=False, **_QUIET)
    pictures = [part for card in panel.cards for part in (card.picture, card.word)]
    back.click(partial(_back, page), [picked, *pictures], page.outputs(), preprocess=False, **_QUIET)
    panel.open.upload(partial(_open, page), [panel.open, *pictures], page.outputs(), preprocess=False, **_QUIET)
    for index, (card, extra) in enumerate(zip(panel.cards, panel.extras, strict=True)):
        restored = extra.restore.click(
            partial(_restore, page, index), [card.picture, *pictures], page.outputs(), preprocess=False, **_QUIET
        )  # fmt: skip
        restored.success(lambda: ("", gr.update(visible=False)), None, [card.note, extra.restore], **_QUIET)
    for memory, names in zip(memories, (page.remembered, OWN), strict=True):
        kept = [page.targets[name] for name in names]
        gr.on([part.change for part in kept], None, kept, memory, js=save_js(names), **_QUIET)
    return demo.load(partial(remember, page), [*memories, panel.linked[0]], page.outputs(), js=READ, **_QUIET)


def _build_memories(page: Page) -> list[gr.BrowserState]:
    """What the browser keeps for the pages of all models, and what it keeps for this model's alone."""
    pipeline = page.handlers.pipeline
    keys = (STORAGE_KEY, f"{STORAGE_KEY}-own-{pipeline.name if pipeline else ''}")
    return [gr.BrowserState({}, storage_key=key, secret=SECRET) for key in keys]


def _pick(event: gr.SelectData) -> str:
    return event.value["image"]["path"]  # not its place, which new results move


def _back(page: Page, picked: str | None, *cards: Any) -> tuple:
    with in_words():
        if not picked:
            raise ValueError("Pick a result first")
    return bring_back(page, picked, _filled(cards))


def _open(page: Page, file: dict[str, Any], *cards: Any) -> tuple:
    return open_file(page, file["path"], _filled(cards))


def _restore(page: Page, index: int, picture: dict[str, Any], *cards: Any) -> tuple:
    filled = [is_filled and i != index for i, is_filled in enumerate(_filled(cards))]
    return bring_back(page, picture["path"], filled, {index})


def _filled(cards: Sequence[Any]) -> list[bool]:
    """Which cards hold something, of the picture and the word of each."""
    return [bool(picture or word) for picture, word in zip(cards[::2], cards[1::2], strict=True)]
