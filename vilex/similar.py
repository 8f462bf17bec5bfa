"""The command `vilex similar`: which of many pictures are most like one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from torch import Tensor

from vilex.desk import Desk, InputWord, Source, each_readable, find_inputs, load_pipeline, progress, read_word
from vilex.images import fit_image
from vilex.options import Engine, Output, one_photo, out_option, photo_options, shared, sheet_option
from vilex.words import COMPARED, similar

if TYPE_CHECKING:  # diffusers and transformers take seconds to import: --help and bad input must not wait for them
    from vilex.config import Fit

_SHEET_SIZE = 128  # pixels of a found picture's side


@click.command(name="similar")
@one_photo
@photo_options
@click.option("--count", type=click.IntRange(1), default=8, help="How many of the PHOTOs to name.")
@out_option
@sheet_option
@shared
def find_similar(
    engine: Engine, photo: Source, photos: Sequence[Source], fit: "Fit", count: int, out: Path, sheet: bool
) -> None:  # fmt: skip
    """Name the PHOTOs that are most like the first one, the most alike first.

    Each line is a score, 1 for the same tokens, and a path. --sheet shows them as <stem>-similar-sheet.png.
    """
    asked, inputs = find_inputs([photo]), find_inputs(photos)
    if len(asked) > 1:
        raise ValueError(f"{photo} holds {len(asked)} pictures: give the one that the others are compared with")
    pipeline = load_pipeline(engine)
    read = functools.partial(read_word, pipeline=pipeline, num_tokens=COMPARED, fit=fit)
    [(stem, word)] = [(stem, read(stem, source)) for stem, source in asked.items()]
    tokens, end = _read_tokens(inputs, read)
    names = list(tokens)
    found = {names[i]: score for i, score in similar(word.vilex_tokens, list(tokens.values()), count)}
    for name, score in found.items():
        source = inputs[name]
        click.echo(f"{score:.3f}\t{source if isinstance(source, Path) else name}")
    if sheet:
        out.mkdir(parents=True, exist_ok=True)
        desk = Desk(pipeline, Output(out, sheet=True), None)
        _save_sheet(
            desk, stem, word, {f"{score:.3f} {name}": read(name, inputs[name]) for name, score in found.items()}
        )
    if end:
        raise end


def _read_tokens(
    inputs: Mapping[str, Source], read: Callable[[str, Source], InputWord]
) -> tuple[dict[str, Tensor], click.exceptions.Exit | None]:
    """The tokens of each input by its stem, and how the command is to end when some could not be read."""
    tokens: dict[str, Tensor] = {}
    try:
        with progress(len(inputs)) as advance:
            for name, word in each_readable(inputs, read, advance):
                tokens[name] = word.vilex_tokens  # thousands of pictures would not fit into memory
                advance()
    except click.exceptions.Exit as some_skipped:
        return tokens, some_skipped
    return tokens, None


def _save_sheet(desk: Desk, stem: str, word: InputWord, found: Mapping[str, InputWord]) -> None:
    images = {label: fit_image(each.image, _SHEET_SIZE, each.fit) for label, each in found.items() if each.image}
    if images:  # codes have no picture to show
        desk.save_sheet(f"{stem}-similar", [word], list(images.values()), list(images))
