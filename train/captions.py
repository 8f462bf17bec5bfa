"""Dense captions, written from a picture's record and its pixels.

A frozen text-to-image model can only be steered along directions its captions taught it, so a caption says
what is shown, in which style, and where which colour is; wording and completeness vary at random.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch

from train.colours import COLOURS, SHORT_COLOURS, cell_means, colour_shares, name_cells, nearest_colours, summed_area
from train.data import Pictures, Record, background_colours
from train.subjects import Chance, pick, plain_caption, subject_words, with_article
from vilex.images import to_levels

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance
LAYOUT_SHARE = 0.75  # captions that say where the colours are
GRIDS = {3: 0.25, 4: 0.10, 6: 0.05, 8: 0.60}  # share of each number of cells per side among those
FINE_GRID = 6  # from here on a caption says nothing else about colour
SUBJECT_CHARS = 160  # keeps captions within 120 word pieces; beside a fine grid there is room for half
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"
)  # fmt: skip
_DOMINANT_SHARE = 0.12  # of the picture's area that a colour must cover to be called dominant
_CHUNK = 256  # pictures measured together by one worker

_COLOUR_WORDS = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class Look:
    """What a caption can say about the pixels; `background` is empty unless the subject is cut out."""

    dominant: tuple[str, ...]
    grids: dict[int, list[list[str]]]
    brightness: float  # mean lightness, 0..1
    contrast: float  # standard deviation of lightness, 0..1
    background: str = ""


def write_caption(
    record: Record,
    pixels: np.ndarray | torch.Tensor,
    index: int,
    epoch: int,
    background: np.ndarray | torch.Tensor | None = None,
    *,
    seed: int,
    empty_share: float = EMPTY_SHARE,
) -> str:
    """The caption of one picture, a pure function of the arguments; pixels are uint8 (3,H,W).

    `background` (3,) in [-1,1] is the colour a cut-out picture was laid on.
    """
    backgrounds = None if background is None else np.asarray(background)[None]
    look = measure(np.asarray(pixels)[None], backgrounds)[0]
    return _compose(record, look, _chance(seed, index, epoch), empty_share)


def write_captions(
    pictures: Pictures, variants: int, *, seed: int = 0, workers: int = 1, empty_share: float = EMPTY_SHARE
) -> list[list[str]]:
    """`variants` captions of each picture; number k is that of epoch k, on `background_colours(seed, k, indices)`."""
    captions = [[""] * variants for _ in pictures.records]
    write = partial(_write_job, seed=seed, empty_share=empty_share)
    for written in _run(write, _jobs(pictures, variants, seed), workers):
        for index, epoch, caption in written:
            captions[index][epoch] = caption
    return captions


@dataclass(frozen=True, slots=True)
class _Job:
    """Pictures that look the same in all of `epochs`."""

    records: list[Record]
    indices: list[int]
    epochs: range
    pixels: np.ndarray
    backgrounds: np.ndarray | None


def _jobs(pictures: Pictures, variants: int, seed: int) -> Iterator[_Job]:
    cut_out = pictures.cut_out.cpu()
    for indices in _chunks(~cut_out):
        yield _job(pictures, indices, range(variants), None)
    for indices in _chunks(cut_out):
        for epoch in range(variants):
            yield _job(pictures, indices, range(epoch, epoch + 1), background_colours(seed, epoch, indices))


def _chunks(mask: torch.Tensor) -> list[torch.Tensor]:
    indices = torch.nonzero(mask).flatten()
    return list(indices.split(_CHUNK)) if len(indices) else []


def _job(pictures: Pictures, indices: torch.Tensor, epochs: range, backgrounds: torch.Tensor | None) -> _Job:
    pixels = to_levels(pictures.batch(indices, backgrounds)).numpy(force=True)
    records = [pictures.records[index] for index in indices.tolist()]
    return _Job(records, indices.tolist(), epochs, pixels, None if backgrounds is None else backgrounds.numpy())


def _write_job(job: _Job, seed: int, empty_share: float) -> list[tuple[int, int, str]]:
    looks = measure(job.pixels, job.backgrounds)
    return [
        (index, epoch, _compose(record, look, _chance(seed, index, epoch), empty_share))
        for record, look, index in zip(job.records, looks, job.indices, strict=True)
        for epoch in job.epochs
    ]


def _run(write: Callable[[_Job], list], jobs: Iterator[_Job], workers: int) -> Iterator[list[tuple[int, int, str]]]:
    if workers <= 1:
        yield from map(write, jobs)
    else:
        # not forked: the caller may hold threads and an accelerator
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(write, jobs)


def _chance(seed: int, index: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, index, epoch]))


# What the pixels say


def measure(pixels: np.ndarray, backgrounds: np.ndarray | None = None) -> list[Look]:
    """The look of each picture of uint8 pixels (B,3,H,W); cut-outs were laid on `backgrounds` (B,3) in [-1,1]."""
    sums = summed_area(pixels)
    shares = colour_shares(name_cells(sums, 16))  # (B,K)
    grids = {cells: _grid_words(sums, cells) for cells in GRIDS}
    lightness = cell_means(sums, 16).mean(-1).reshape(len(pixels), -1) / 255  # (B,256)
    names = _background_names(len(pixels), backgrounds)
    return [
        Look(
            _dominant(shares[i]),
            {cells: words[i].tolist() for cells, words in grids.items()},
            float(lightness[i].mean()),
            float(lightness[i].std()),
            names[i],
        )
        for i in range(len(pixels))
    ]


def _grid_words(sums: np.ndarray, cells: int) -> np.ndarray:
    names = SHORT_COLOURS if cells > 3 else COLOURS  # in rows, where a cell ends must be plain to see
    return np.array(list(names), object)[name_cells(sums, cells, names)]  # (B,cells,cells)


def _dominant(shares: np.ndarray) -> tuple[str, ...]:
    """Up to three colours, largest first; always one."""
    order = np.argsort(-shares, kind="stable")[:3]
    return tuple(_COLOUR_WORDS[i] for rank, i in enumerate(order) if rank == 0 or shares[i] >= _DOMINANT_SHARE)


def _background_names(count: int, backgrounds: np.ndarray | None) -> list[str]:
    if backgrounds is None:
        return [""] * count
    return [_COLOUR_WORDS[i] for i in nearest_colours((np.asarray(backgrounds) + 1) * 127.5)]


# Putting a caption together


def _compose(record: Record, look: Look, chance: Chance, empty_share: float) -> str:
    if chance.random() < empty_share:
        return ""
    cells = _grid_size(chance)
    fine = cells >= FINE_GRID
    subject = subject_words(record, chance) if chance.random() < 0.9 else ""
    subject = textwrap.shorten(subject, SUBJECT_CHARS // (1 + fine), placeholder="")
    parts = [_on_background(subject, look, chance)]
    if not fine:
        parts += [_dominant_words(look, chance), _tone(look, chance)]
    if chance.random() < 0.15:
        parts.reverse()
    # rows of one-piece words go first, so that a cell stands at a fixed position of the sequence
    parts.insert(0 if cells > 3 else len(parts), _layout(look, cells, chance))
    return ". ".join(part for part in parts if part) or look.dominant[0]


def _grid_size(chance: Chance) -> int:
    """Cells per side of the layout to write, 0 for none."""
    if chance.random() >= LAYOUT_SHARE:
        return 0
    draw = chance.random()
    reached = itertools.accumulate(GRIDS.values())
    return next((cells for cells, share in zip(GRIDS, reached, strict=True) if draw < share), max(GRIDS))


def _rows(rows: list[list[str]]) -> str:
    return f"{len(rows)} rows: " + ", ".join(" ".join(row) for row in rows)


def layout_caption(pixels: np.ndarray, cells: int) -> list[str]:
    """Rows of colour words, each one word piece, for each picture of uint8 pixels (B,3,H,W); cells is 4, 6 or 8."""
    return [_rows(words.tolist()) for words in _grid_words(summed_area(pixels), cells)]


def _layout(look: Look, cells: int, chance: Chance) -> str:
    if cells == 0:
        return ""
    rows = look.grids[cells]
    if cells > 3:
        return _rows(rows)
    words = [f"{position} {colour}" for position, colour in zip(POSITIONS, sum(rows, []), strict=True)]
    count = len(words) if chance.random() < 0.5 else 1 + int(chance.random() * len(words))
    order = sorted(range(len(words)), key=lambda _: chance.random())[:count]
    if chance.random() < 0.5:
        order.sort()
    return ", ".join(words[i] for i in order)


def _dominant_words(look: Look, chance: Chance) -> str:
    if chance.random() >= 0.5:
        return ""
    first, *rest = look.dominant
    if not rest:
        return pick(chance, first, f"mostly {first}", f"all {first}")
    if len(rest) == 2 and chance.random() < 0.4:
        return f"{first}, {rest[0]} and {rest[1]}"
    return pick(chance, f"{first} and {rest[0]}", f"{first} and {rest[0]}", f"mostly {first}")


def _on_background(subject: str, look: Look, chance: Chance) -> str:
    if not look.background or chance.random() >= 0.6:
        return subject
    words = f"{look.background} background"
    return pick(chance, f"{subject} on {with_article(words)}", f"{subject}. {words}") if subject else words


def _tone(look: Look, chance: Chance) -> str:
    words = []
    if look.brightness < 0.3 or look.brightness > 0.75:
        words.append("dark" if look.brightness < 0.3 else "bright")
    if look.contrast < 0.1 or look.contrast > 0.3:
        words.append("low contrast" if look.contrast < 0.1 else "high contrast")
    return ", ".join(words) if chance.random() < 0.2 else ""


def short_captions(records: Sequence[Record], pixels: np.ndarray) -> list[str]:
    """The plain caption and the dominant colours of each picture, of uint8 pixels (B,3,H,W)."""
    return [". ".join(_short(record, look)) for record, look in zip(records, measure(pixels), strict=True)]


def dense_caption(record: Record, pixels: np.ndarray | torch.Tensor) -> str:
    """The plain caption, the dominant colours and all nine positions, of uint8 pixels (3,H,W)."""
    look = measure(np.asarray(pixels)[None])[0]
    positions = zip(POSITIONS, sum(look.grids[3], []), strict=True)
    layout = ", ".join(f"{position} {colour}" for position, colour in positions)
    return ". ".join([*_short(record, look), layout])


def _short(record: Record, look: Look) -> list[str]:
    return list(filter(None, (plain_caption(record), " and ".join(look.dominant[:2]))))
