"""Dense captions, written from a picture's record and its pixels.

A frozen text-to-image model can only be steered along directions its captions taught it, so a caption says
what is shown, in which style, and where which colour is; wording and completeness vary at random.
"""

import html
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Protocol

import numpy as np
import torch

from train.colours import COLOURS, SHORT_COLOURS, cell_means, colour_shares, name_cells, nearest_colours, summed_area
from train.data import Pictures, Record, background_colours

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance
LAYOUT_SHARE = 0.75  # captions that say where the colours are
GRIDS = {3: 0.35, 4: 0.20, 6: 0.20, 8: 0.25}  # share of each number of cells per side among those
FINE_GRID = 6  # from here on a caption says nothing else about colour
SUBJECT_CHARS = 160  # keeps captions within 120 word pieces; beside a fine grid there is room for half
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"
)  # fmt: skip
_DOMINANT_SHARE = 0.12  # of the picture's area that a colour must cover to be called dominant
_CHUNK = 256  # pictures measured together by one worker

_COLOUR_WORDS = tuple(COLOURS)


class Chance(Protocol):
    """Anything with `random() -> float` in [0,1)."""

    def random(self) -> float: ...


class _First:
    """Takes the first wording and every part: makes the deterministic captions."""

    def random(self) -> float:
        return 0.0


FIRST = _First()


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
    *,
    seed: int,
    index: int,
    epoch: int,
    background: np.ndarray | torch.Tensor | None = None,
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
    pixels = to_uint8(pictures.batch(indices, backgrounds)).numpy(force=True)
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


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of pixels in [-1,1], as `write_caption` takes them."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


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
    subject = _subject(record, chance) if chance.random() < 0.9 else ""
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
    draw, cells = chance.random(), 0
    for cells, share in GRIDS.items():
        draw -= share
        if draw < 0:
            break
    return cells


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
        return _pick(chance, first, f"mostly {first}", f"all {first}")
    if len(rest) == 2 and chance.random() < 0.4:
        return f"{first}, {rest[0]} and {rest[1]}"
    return _pick(chance, f"{first} and {rest[0]}", f"{first} and {rest[0]}", f"mostly {first}")


def _on_background(subject: str, look: Look, chance: Chance) -> str:
    if not look.background or chance.random() >= 0.6:
        return subject
    words = f"{look.background} background"
    return _pick(chance, f"{subject} on {_a(words)}", f"{subject}. {words}") if subject else words


def _tone(look: Look, chance: Chance) -> str:
    words = []
    if look.brightness < 0.3 or look.brightness > 0.75:
        words.append("dark" if look.brightness < 0.3 else "bright")
    if look.contrast < 0.1 or look.contrast > 0.3:
        words.append("low contrast" if look.contrast < 0.1 else "high contrast")
    return ", ".join(words) if chance.random() < 0.2 else ""


def _pick(chance: Chance, *options: str) -> str:
    return options[int(chance.random() * len(options))]


# What the record says, by source


def _subject(record: Record, chance: Chance) -> str:
    return _SUBJECTS.get(record.source, _any_subject)(record, chance)


def _any_subject(record: Record, chance: Chance) -> str:
    if record.captions:
        return _pick(chance, *record.captions).strip(" .")
    if record.artist or record.genre:
        return _painting(record, chance)
    if record.label and record.style:
        return _pick(chance, f"{record.style} of {_a(record.label)}", f"{record.label}, {record.style}")
    return record.label or record.title or record.style


def _photo(record: Record, chance: Chance) -> str:
    label = record.label
    if record.keywords and chance.random() > 0.8:
        label = _pick(chance, *record.keywords)
    thing = _a(label)
    return _pick(chance, f"a photo of {thing}", f"a photo of {thing}", thing, f"photo of {thing}", label,
                 f"a picture of {thing}", f"a photograph of {thing}")  # fmt: skip


def _place(record: Record, chance: Chance) -> str:
    place = _a(record.label)
    return _pick(chance, f"a photo of {place}", f"a photo of {place}", place, record.label, f"a view of {place}",
                 f"{_a(record.label + ' scene')}")  # fmt: skip


def _flower(record: Record, chance: Chance) -> str:
    flower = record.label if record.label.endswith("flower") else f"{record.label} flower"
    return _pick(chance, f"a photo of {_a(flower)}", _a(flower), flower, f"a close-up of {_a(flower)}",
                 f"a photo of {_a(record.label)}")  # fmt: skip


def _emoji(record: Record, chance: Chance) -> str:
    general = next((words for key, words in _EMOJI_STYLES.items() if key in record.style), "flat emoji")
    style = _pick(chance, record.style, record.style, general, general, "emoji")
    label = record.label
    if record.keywords and chance.random() > 0.7:
        label = f"{label}, {_pick(chance, *record.keywords)}"
    return _pick(chance, f"{_a(style)} of {label}", f"{style} of {label}", f"{label}, {style}", f"{label} {style}")


_EMOJI_STYLES = {"3D": "3D emoji", "gradient": "gradient emoji", "blob": "blob emoji", "Streamline": "outline emoji"}


def _drawing(record: Record, chance: Chance) -> str:
    styles = _DRAWING_STYLES.get(record.style, (record.style,))
    style, thing = _pick(chance, *styles), _a(record.label)
    return _pick(chance, f"{_a(style)} of {thing}", f"{style} of {thing}", f"{record.label}, {style}")


_DRAWING_STYLES = {
    "art painting": ("painting", "art painting"),
    "cartoon": ("cartoon", "cartoon drawing"),
    "sketch": ("pencil sketch", "sketch", "line drawing", "black and white sketch"),
}


def _clip_art(record: Record, chance: Chance) -> str:
    words = [_clean(word) for word in (record.label, *record.keywords)]
    words = [word for word in words if word]
    if not words:
        return "clip art"
    label = _pick(chance, words[0], words[0], *words[1:4])
    return _pick(chance, f"clip art of {_a(label)}", f"{label} clip art", f"a clip art picture of {label}",
                 f"{label}, clip art", f"a drawing of {label}")  # fmt: skip


_JUNK = re.compile(r"hash|unsorted|clip ?art|sib?mission|architetto|signs_and_symbols", re.IGNORECASE)


def _clean(word: str) -> str:
    """A file-like name as words, empty when it says nothing."""
    words = html.unescape(word).rpartition(" - ")[2]
    words = re.sub(r"[_#]|\d+\b", " ", words)
    words = " ".join(words.lower().split())
    return "" if _JUNK.search(words) or not re.search(r"[a-z]{2}", words) else words


def _painting(record: Record, chance: Chance) -> str:
    kind = _pick(chance, _kind(record), _medium(record), _kind(record), "painting")
    style = record.style if chance.random() < 0.8 else ""
    adjective = style and chance.random() > 0.6
    words = f"{_adjective(style)} {kind}" if adjective else kind
    words = _pick(chance, _a(words), words)
    if record.title not in ("", "untitled") and chance.random() > 0.7:
        words += f", {record.title},"
    if record.artist and chance.random() < 0.75:
        words += _by(record.artist, chance)
    words = words.rstrip(",")
    return words if adjective or not style else f"{words}, {style}"


def _by(artist: str, chance: Chance) -> str:
    name = artist.partition(" ")[2] or artist if chance.random() > 0.8 else artist
    return _pick(chance, f" by {name}", f" by {name}", f" in the style of {name}")


def _kind(record: Record) -> str:
    return _GENRES.get(record.genre, record.genre or _medium(record))


def _medium(record: Record) -> str:
    return "woodblock print" if record.style == "Ukiyo-e" else _MEDIA.get(record.genre, "oil painting")


_MEDIA = {"sketch and study": "sketch", "illustration": "illustration"}
_GENRES = {
    "landscape": "landscape painting",
    "portrait": "portrait painting",
    "genre painting": "painting of everyday life",
    "cityscape": "painting of a city",
    "sketch and study": "sketch",
    "still life": "still life painting",
}


def _adjective(style: str) -> str:
    """'Impressionist' of 'Impressionism', where the language has such a word."""
    return "Romantic" if style == "Romanticism" else re.sub("ism$", "ist", style)


def _a(noun: str) -> str:
    """The noun with its indefinite article; plurals stay bare."""
    if re.match(r"(an?|the)\b|$", noun) or noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return noun
    vowel = re.match(r"[aeio]|u(?!ni|ke|se|ti)", noun, re.IGNORECASE) and not re.match(r"eu|one\b", noun, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {noun}"


_SUBJECTS: dict[str, Callable[[Record, Chance], str]] = {
    "wikiart": _painting,
    "tiny-imagenet": _photo,
    "caltech101": _photo,
    "miniplaces": _place,
    "flowers102": _flower,
    "emoji": _emoji,
    "pacs": _drawing,
    "openclipart": _clip_art,
}
_PHOTOS = ("tiny-imagenet", "caltech101", "miniplaces", "flowers102", "flickr8k")


# Captions without chance, for evaluation


def plain_caption(record: Record) -> str:
    """What the record says, always in the same words, nothing about colours."""
    return _subject(record, FIRST)


def dense_caption(record: Record, pixels: np.ndarray | torch.Tensor) -> str:
    """The plain caption, the dominant colours and all nine positions, of uint8 pixels (3,H,W)."""
    look = measure(np.asarray(pixels)[None])[0]
    positions = zip(POSITIONS, sum(look.grids[3], []), strict=True)
    layout = ", ".join(f"{position} {colour}" for position, colour in positions)
    return ". ".join(part for part in (plain_caption(record), " and ".join(look.dominant[:2]), layout) if part)


def style_caption(record: Record) -> str:
    """The words for the style only, such as 'oil painting, Impressionism, by Claude Monet'; empty if unknown."""
    if record.source in _PHOTOS:
        return "photo"
    if record.source == "wikiart" or record.artist:
        return ", ".join(filter(None, (_medium(record), record.style, record.artist and f"by {record.artist}")))
    return _DRAWING_STYLES.get(record.style, (record.style,))[0]


def content_caption(record: Record) -> str:
    """The words for what is shown only; empty if unknown."""
    if record.source == "openclipart":
        return next((words for words in map(_clean, (record.label, *record.keywords)) if words), "")
    if record.captions or record.label:
        return record.captions[0] if record.captions else record.label
    return ", ".join(filter(None, (record.genre, record.title)))
