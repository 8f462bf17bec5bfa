"""A part of the tab History: which of many pictures are most like picture A, by their tokens."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app.cards import NAMES, Upload, stem
from app.handlers import Handlers, check_choice
from app.messages import Clock, duration, finished, in_words
from app.restore import cached
from app.studio import Studio
from app.workbench import read_one
from vilex.images import fit_image, load_image
from vilex.words import COMPARED, similar

MAX_PICTURES = 200  # compared at once
SHOWN = 24
SOURCES = {"history": "Results of this page", "examples": "Example pictures"}
_THUMBNAIL = 160  # pixels of a side


def find(
    handlers: Handlers,
    examples: Sequence[Path],
    files: Sequence[Upload] | None = None,
    sources: Sequence[str] | None = None,
    history: Sequence[dict[str, Any]] | None = None,
    **values: Any,
) -> Iterator[tuple]:
    """The pictures most like picture A, with a score under each, 1 for the same tokens; and a status line.

    files: pictures to compare with; sources: "history" adds the results of the page, "examples" its examples.
    """
    with in_words():
        pipeline, word = handlers.ready(), read_one(handlers, values | {"weight": 1.0}, NAMES[0], full=True)
        files = _gather(examples, files or [], sources or [], history or [])
        tokens, images, names, clock = [], [], [], Clock(len(files))
        for i, (path, name) in enumerate(files, 1):
            if path and (image := _open(path)) is not None:
                tokens.append(pipeline.encode(image, COMPARED, word.fit)[0])
                images.append(fit_image(image, _THUMBNAIL, word.fit))
                names.append(name)
            yield gr.skip(), clock.at(i, "Comparing")
        if not images:
            raise ValueError("None of the files is a readable picture")
        found = similar(word.vilex_tokens, tokens, SHOWN)
        yield [(images[i], f"{score:.2f} · {names[i]}") for i, score in found], finished(_told(clock, len(images)))


def _gather(
    examples: Sequence[Path], files: Sequence[Upload], sources: Sequence[str], history: Sequence[dict[str, Any]]
) -> list[tuple[str | None, str]]:
    """Path and name of the files to compare with; no path for one that is gone, or outside gradio's cache.

    Raises ValueError when there are none or too many.
    """
    for source in sources:
        check_choice(source, SOURCES, "source")
    uploads = list(files)
    uploads += [item["image"] for item in history] if "history" in sources else []
    found = [(cached(upload), stem(upload)) for upload in uploads]
    found += [(str(path), path.stem) for path in examples] if "examples" in sources else []
    if not found:
        raise ValueError("Give pictures to compare with: drop some, or tick a source that has some")
    if len(found) > MAX_PICTURES:
        raise ValueError(f"At most {MAX_PICTURES} pictures are compared at once, got {len(found)}")
    return found


def _open(path: str) -> Image.Image | None:
    try:
        return load_image(path)
    except ValueError:  # one file that is no picture must not spoil a folder
        return None


def _told(clock: Clock, count: int) -> str:
    skipped = clock.done - count
    left_out = f" {skipped} could not be read." if skipped else ""
    return f"Compared {count} in {duration(clock.seconds)}; the most alike come first.{left_out}"


def build_similar(studio: Studio, history: gr.Gallery, examples: Sequence[Path]) -> None:
    """Lays out this part of the tab and wires it."""
    with gr.Accordion("Which pictures are most like picture A?", open=False, elem_id="similar"):
        files = gr.File(
            label=f"Pictures to compare with, up to {MAX_PICTURES}", file_count="multiple", file_types=["image"],
            height=120, elem_id="similar-files",
        )  # fmt: skip
        with gr.Row():
            sources = gr.CheckboxGroup(
                [(label, name) for name, label in SOURCES.items()], value=list(SOURCES), label="Also compare with",
                min_width=220, scale=3,
            )  # fmt: skip
            button = gr.Button("Sort by likeness", variant="primary", min_width=140, elem_id="sort-alike")
        gr.HTML(
            finished(
                f"The score compares the first {COMPARED} tokens; 1 is the same. A small model tells colours and where "
                "they are, not things."
            ),
            label="What the score says",
        )
        found = gr.Gallery(
            label=f"The {SHOWN} most alike", format="png", columns=6, object_fit="contain", interactive=False,
            height="auto", elem_id="alike", elem_classes="thumbs", buttons=["fullscreen"],
        )  # fmt: skip
    inputs = studio.cards[0].inputs(0) | {"files": files, "sources": sources, "history": history}
    fn = partial(find, studio.handlers, examples)
    studio.compute(button.click, fn, [found, studio.status], inputs, api_name="similar")
