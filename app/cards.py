"""Picture cards read into words: which are in use, what each is called, how much it says and in how many tokens."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from vilex.codes import VilexCode, from_bytes, from_text, to_bytes
from vilex.config import DEFAULT_TOKENS, WEIGHT_RANGE, GenerationConfig, check_range, range_of
from vilex.images import check_fit, load_image
from vilex.pipeline import VilexPipeline

MAX_CARDS = 4
NAMES = ("A", "B", "C", "D")  # of the cards, until the user names them
_DEFAULTS = {"picture": None, "word": "", "name": "", "weight": 1.0, "num_tokens": DEFAULT_TOKENS, "fit": "crop"}
CARD_FIELDS = tuple(_DEFAULTS)
_FILE = "vilex-file:"
_POLISHED = "vilex-polished:"  # then the mark of the picture beside it, which stays there, and its file
MAX_NAME_CHARS = 80
_NAME = re.compile(rf"[^][<>\n]{{1,{MAX_NAME_CHARS}}}")  # what a prompt can have in brackets

Upload = dict[str, Any] | None  # what gradio knows of an uploaded file; its path lies inside gradio's cache


@dataclass(frozen=True)
class CardInput:
    """What one card says, checked, before its picture is opened."""

    picture: Upload
    word: str
    name: str
    weight: float
    num_tokens: int
    fit: str

    @property
    def is_encoded(self) -> bool:
        """Whether its tokens are the encoder's of its picture: not its word's, nor polished for this picture."""
        return self.picture is not None and not is_polished(self.word, self.picture, self.fit)


@dataclass(frozen=True)
class PictureWord:
    """A card as a word of the prompt: vilex_tokens (N,D), cut and weighed; image is None where it came as a code.

    is_encoded: whether the encoder gives these tokens for the image.
    """

    name: str
    vilex_tokens: Tensor
    weight: float
    num_tokens: int
    fit: str
    image: Image.Image | None
    source: str
    is_encoded: bool


def card_key(name: str, index: int) -> str:
    """The argument that holds a field of card `index`, from 0: picture, picture_2, picture_3, ..."""
    return name if index == 0 else f"{name}_{index + 1}"


def take_cards(values: dict[str, Any]) -> list[CardInput]:
    """The cards in use; all cards' fields are taken out of `values`.

    Raises ValueError for a name, weight, token count or way to fit that cannot be.
    """
    taken = [{f: values.pop(card_key(f, i), default) for f, default in _DEFAULTS.items()} for i in range(MAX_CARDS)]
    cards = [check_card(CardInput(**card)) for card in taken if card["picture"] is not None or card["word"]]
    names = [card.name for card in cards if card.name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two pictures are called {twice!r}: each needs a name of its own")
    return cards


def check_card(card: CardInput) -> CardInput:
    """The card itself. Raises ValueError with one sentence for what cannot be."""
    if not isinstance(card.word, str):
        raise ValueError(f"a picture's code must be text, got {type(card.word).__name__}")
    if not isinstance(card.name, str) or (card.name and not _NAME.fullmatch(card.name)):
        rule = f"1 to {MAX_NAME_CHARS} characters and neither square nor angle brackets"
        raise ValueError(f"a picture's name has {rule}; got {card.name!r:.60}")
    check_range("weight", card.weight, WEIGHT_RANGE)
    check_range("num_tokens", card.num_tokens, range_of(GenerationConfig, "num_tokens"))
    if card.num_tokens != int(card.num_tokens):
        raise ValueError(f"num_tokens must be a whole number, got {card.num_tokens!r}")
    check_fit(card.fit)
    return card


def read_card(pipeline: VilexPipeline, card: CardInput, full: bool = False) -> PictureWord:
    """The card as a word; `full` gives all tokens the pooler or the code has.

    Raises ValueError for a file that is no picture and a code that is damaged or of another model.
    """
    count = None if full else int(card.num_tokens)
    image = None if card.picture is None else open_upload(card.picture)
    if card.is_encoded:
        tokens, source = pipeline.encode(image, count, card.fit)[0], stem(card.picture)
    else:
        code = unpack(card.word, pipeline.fingerprint)
        tokens, source = code.vilex_tokens[:count].to(pipeline.device), clean(code.source) or "word"
    tokens = pipeline.vocabulary.weigh(tokens, card.weight)
    return PictureWord(card.name, tokens, card.weight, len(tokens), card.fit, image, source, card.is_encoded)


def pack(code: VilexCode) -> str:
    """A code as a card's `word`: the whole file as text, since a code to copy is rounded."""
    return _FILE + _packed(code)


def pack_polished(code: VilexCode, picture: Upload, fit: str) -> str:
    """A code as the `word` of a card whose picture it was polished for, and which it stands beside."""
    return f"{_POLISHED}{_mark(picture, fit)}:{_packed(code)}"


def was_polished(word: str) -> bool:
    """Whether a card's `word` was polished for some picture."""
    return word.startswith(_POLISHED)


def is_polished(word: str, picture: Upload, fit: str) -> bool:
    """Whether a card's `word` was polished for that picture as it is fitted. Raises ValueError when it is gone."""
    return picture is not None and was_polished(word) and word.startswith(f"{_POLISHED}{_mark(picture, fit)}:")


def _packed(code: VilexCode) -> str:
    return base64.b64encode(to_bytes(code)).decode()


def _mark(picture: Upload, fit: str) -> str:
    path = Path(upload_path(picture.get("path")))  # which is a new one after a refresh
    return hashlib.sha256(f"{path.name} {path.stat().st_size} {fit}".encode()).hexdigest()[:12]


def unpack(word: str, fingerprint: str | None = None) -> VilexCode:
    """The code of a card's `word`, which is packed or a code to copy. Raises ValueError for one that is neither."""
    if not word.startswith((_FILE, _POLISHED)):
        return from_text(word, fingerprint)
    try:
        return from_bytes(base64.b64decode(word.rpartition(":")[2], validate=True), fingerprint)
    except binascii.Error as error:
        raise ValueError(f"the code is damaged: {error}") from error


def usable_name(name: str, index: int) -> str:
    """The name itself, or the letter of card `index` where the prompt cannot use it."""
    return name if _NAME.fullmatch(name) else NAMES[index]


def names_of(words: Sequence[CardInput | PictureWord]) -> list[str]:
    """The names that the prompt may use, one per picture, empty where there is none."""
    return [word.name for word in words]


def open_upload(picture: Upload, on_note: Callable[[str], None] | None = None) -> Image.Image:
    """The decoded picture; `on_note` as in `load_image`. Raises ValueError when it is none."""
    return load_image(upload_path(picture.get("path") if isinstance(picture, dict) else None), on_note=on_note)


def upload_path(path: object) -> str:
    """The path itself, resolved. Raises ValueError unless it lies in gradio's cache.

    A request may name any file: gradio checks only the paths of those that it wraps itself.
    """
    if isinstance(path, str) and "\0" not in path:
        real = Path(path).resolve()
        if real.is_relative_to(Path(get_upload_folder()).resolve()) and real.is_file():
            return str(real)
    raise ValueError("The file must be an upload that is still on this server: give it again")


def stem(picture: dict[str, Any]) -> str:
    """The name of an uploaded file, clean and without its ending."""
    return clean(Path(str(picture.get("orig_name") or picture["path"])).stem) or "picture"


def clean(text: str) -> str:
    """A text in letters, digits and dashes, fit for a file's name."""
    return re.sub(r"[^\w-]+", "-", text)[:60].strip("-")
