"""The words of a caption that come from a picture's record: what is shown, by whom, in which style.

Each source of pictures has its own wording; chance picks among several.
"""

import html
import re
from collections.abc import Callable
from typing import Protocol

from train.data import Record


class Chance(Protocol):
    """Anything with `random() -> float` in [0,1)."""

    def random(self) -> float: ...


class _First:
    """Takes the first wording and every part: makes the deterministic captions."""

    def random(self) -> float:
        return 0.0


FIRST = _First()


def pick(chance: Chance, *options: str) -> str:
    """One of the options, each as likely."""
    return options[int(chance.random() * len(options))]


def subject_words(record: Record, chance: Chance) -> str:
    """What a picture shows, in the words of its source."""
    return _SUBJECTS.get(record.source, _any_subject)(record, chance)


def _any_subject(record: Record, chance: Chance) -> str:
    if record.captions:
        return pick(chance, *record.captions).strip(" .")
    if record.artist or record.genre:
        return _painting(record, chance)
    if record.label and record.style:
        return pick(chance, f"{record.style} of {with_article(record.label)}", f"{record.label}, {record.style}")
    return record.label or record.title or record.style


def _photo(record: Record, chance: Chance) -> str:
    label = record.label
    if record.keywords and chance.random() > 0.8:
        label = pick(chance, *record.keywords)
    thing = with_article(label)
    return pick(chance, f"a photo of {thing}", f"a photo of {thing}", thing, f"photo of {thing}", label,
                 f"a picture of {thing}", f"a photograph of {thing}")  # fmt: skip


def _place(record: Record, chance: Chance) -> str:
    place = with_article(record.label)
    return pick(chance, f"a photo of {place}", f"a photo of {place}", place, record.label, f"a view of {place}",
                 f"{with_article(record.label + ' scene')}")  # fmt: skip


def _flower(record: Record, chance: Chance) -> str:
    flower = record.label if record.label.endswith("flower") else f"{record.label} flower"
    a_flower = with_article(flower)
    return pick(chance, f"a photo of {a_flower}", a_flower, flower, f"a close-up of {a_flower}",
                f"a photo of {with_article(record.label)}")  # fmt: skip


def _emoji(record: Record, chance: Chance) -> str:
    general = _emoji_kind(record.style)
    style = pick(chance, record.style, record.style, general, general, "emoji")
    label = _unnumbered(record.label)
    if record.keywords and chance.random() > 0.7:
        label = f"{label}, {pick(chance, *record.keywords)}"
    return pick(
        chance, f"{with_article(style)} of {label}", f"{style} of {label}", f"{label}, {style}", f"{label} {style}"
    )


def _emoji_kind(style: str) -> str:
    return next((words for key, words in _EMOJI_STYLES.items() if key in style), "flat emoji")


_EMOJI_STYLES = {"3D": "3D emoji", "gradient": "gradient emoji", "blob": "blob emoji", "Streamline": "outline emoji"}


def _drawing(record: Record, chance: Chance) -> str:
    styles = _DRAWING_STYLES.get(record.style, (record.style,))
    style, thing = pick(chance, *styles), with_article(record.label)
    return pick(chance, f"{with_article(style)} of {thing}", f"{style} of {thing}", f"{record.label}, {style}")


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
    label = pick(chance, words[0], words[0], *words[1:4])
    return pick(chance, f"clip art of {with_article(label)}", f"{label} clip art", f"a clip art picture of {label}",
                 f"{label}, clip art", f"a drawing of {label}")  # fmt: skip


_JUNK = re.compile(r"hash|unsorted|clip ?art|sib?mission|architetto|signs_and_symbols", re.IGNORECASE)


def _clean(word: str) -> str:
    """A file-like name as words, empty when it says nothing."""
    words = html.unescape(word).rpartition(" - ")[2]
    words = re.sub(r"[_#]|\d+\b", " ", words)
    words = " ".join(words.lower().split())
    return "" if _JUNK.search(words) or not re.search(r"[a-z]{2}", words) else words


def _painting(record: Record, chance: Chance) -> str:
    kind = pick(chance, _kind(record), _medium(record), _kind(record), "painting")
    style = record.style if chance.random() < 0.8 else ""
    adjective = style and chance.random() > 0.6
    words = f"{_adjective(style)} {kind}" if adjective else kind
    words = pick(chance, with_article(words), words)
    if record.title not in _NO_TITLES and chance.random() > 0.7:
        words += f", {record.title},"
    if record.artist and chance.random() < 0.75:
        words += _by(record.artist, chance)
    words = words.rstrip(",")
    return words if adjective or not style else f"{words}, {style}"


_NO_TITLES = ("", "untitled", "unknown title")


def _by(artist: str, chance: Chance) -> str:
    name = artist.partition(" ")[2] or artist if chance.random() > 0.8 else artist
    return pick(chance, f" by {name}", f" by {name}", f" in the style of {name}")


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


def with_article(noun: str) -> str:
    """The noun with its indefinite article; plurals stay bare."""
    if re.match(r"(an?|the)\b|$", noun) or noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return noun
    vowel = re.match(r"[aeio]|u(?!ni|ke|se|ti)|hour", noun, re.IGNORECASE) and not re.match(
        r"eu|one\b", noun, re.IGNORECASE
    )
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
PHOTOS = ("tiny-imagenet", "caltech101", "miniplaces", "flowers102", "flickr8k")


def plain_caption(record: Record) -> str:
    """What the record says, always in the same words, nothing about colours."""
    return subject_words(record, FIRST)


def style_caption(record: Record) -> str:
    """The words for the style only, such as 'oil painting, Impressionism, by Claude Monet'; empty if unknown."""
    if record.source in PHOTOS:
        return "photo"
    if record.source == "wikiart" or record.artist:
        return ", ".join(filter(None, (_medium(record), record.style, record.artist and f"by {record.artist}")))
    return _DRAWING_STYLES.get(record.style, (record.style,))[0]


def kind_caption(record: Record) -> str:
    """The kind of picture in general words, such as 'photo', 'oil painting' or 'flat emoji'; empty if unknown."""
    return _emoji_kind(record.style) if record.source == "emoji" else style_caption(record).partition(",")[0]


def content_caption(record: Record) -> str:
    """The words for what is shown only; empty if unknown."""
    if record.source == "openclipart":
        return next((words for words in map(_clean, (record.label, *record.keywords)) if words), "")
    if record.captions or record.label:
        return record.captions[0] if record.captions else _unnumbered(record.label)
    title = "" if record.title in _NO_TITLES else record.title
    return ", ".join(filter(None, (_CONTENTS.get(record.genre, record.genre), title)))


# of genres whose name says how a picture is made, in words that the captions above have too
_CONTENTS = {"genre painting": "everyday life", "cityscape": "city", "sketch and study": ""}


def _unnumbered(label: str) -> str:
    return re.sub(r" \d+$", "", label)  # of an emoji set, such as "watermelon 1"
