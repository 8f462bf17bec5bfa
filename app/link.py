"""A link that carries the page: prompt, settings and the first tokens of each picture, all of it behind the #.

Browsers send that part to no server, so it stands in no log of addresses. What comes out of a link is untrusted.
"""

import base64
import dataclasses
import zlib
from bisect import bisect
from collections.abc import Sequence
from functools import partial
from typing import Any

from app.cards import PictureWord, names_of
from app.handlers import Handlers, text_of
from app.messages import finished, in_words
from app.panel import Panel
from app.studio import SAMPLING, Studio
from vilex.config import tokens_in_words
from vilex.prompt import mentioned
from vilex.recipe import Recipe, from_json, to_json

MARK = "#vilex="
MAX_CHARS = 31_000  # of the part behind the address: the whole stays below the 32 kB that address bars show
_MAX_UNPACKED = 10**6  # bytes of its JSON; zlib could make 8 MB of a link
_COPY = """async (part, note) => {
  const link = location.origin + location.pathname + part;
  const copied = await navigator.clipboard?.writeText(link).then(() => true, () => false);
  return [link, note + (copied ? "<p>It is copied.</p>" : "<p>Copy it from the box above.</p>")];
}"""
# The link goes out of the address once it is read, lest a refresh undo what the user does next; and a link that is
# pasted into the address of an open page changes only what is behind the #, for which no browser loads anything
READ = f"""(memory, own) => {{
  const isLink = () => location.hash.startsWith("{MARK}");
  const part = isLink() ? location.hash : "";
  if (part) history.replaceState(history.state, "", location.pathname + location.search);
  addEventListener("hashchange", () => {{ if (isLink()) location.reload(); }});
  return [memory, own, part];
}}"""


def wire_link(studio: Studio, panel: Panel) -> None:
    """Has the button make the link and copy it."""
    inputs = studio.inputs("prompt", "cards", "num_images", "tfg_scale", "seed", *SAMPLING, "words_scale")
    made = studio.compute(
        panel.link.click, partial(share, studio.handlers), panel.linked, inputs, api_visibility="private"
    )  # fmt: skip
    studio.say(made, "The link to this page is made.")
    made.success(None, panel.linked, panel.linked, js=_COPY, show_progress="hidden", api_visibility="private")


def share(handlers: Handlers, prompt: str, **values: Any) -> tuple[str, str]:
    """The part of an address that brings the page back, with as many tokens as fit, and what it holds, as HTML.

    Raises gr.Error where not even one token of each picture fits.
    """
    with in_words():
        handlers.ready()
        prompt, (words, config) = text_of(prompt), handlers.read(values)

        def write(count: int) -> str:
            cut = [dataclasses.replace(word, vilex_tokens=word.vilex_tokens[:count]) for word in words]
            recipe = handlers.recipe(prompt, config, cut, share=True)
            shown = dataclasses.replace(config, scheduler=recipe.config.scheduler)  # all pictures, not the first alone
            return to_link(dataclasses.replace(recipe, config=shown))

        most = max((len(word.vilex_tokens) for word in words), default=1)
        count = bisect(range(1, most + 1), MAX_CHARS, key=lambda count: len(write(count)))
        if not count:
            raise ValueError(
                f"the link would have {len(write(1))} characters, the limit is {MAX_CHARS}: "
                "take pictures away or shorten the prompt"
            )
        used = mentioned(prompt, len(words), names_of(words))
        link = write(count)
        return link, finished(_told([word for i, word in enumerate(words) if i in used], count, len(link)))


def _told(words: Sequence[PictureWord], count: int, size: int) -> str:
    lengths = [len(word.vilex_tokens) for word in words]
    held = [
        f"{min(count, length)} of {tokens_in_words(length)} of {word.name or 'the picture'}"
        for word, length in zip(words, lengths, strict=True)
    ]
    if not held:
        return "The link holds prompt and settings."
    return (
        f"The link holds prompt, settings and {', '.join(held)}: who has it has the pictures' content. It has {size:,} "
        "characters; should a chat or mail cut it, take fewer tokens."
    )


def to_link(recipe: Recipe) -> str:
    """A recipe as the part of an address behind the page's own."""
    return MARK + base64.urlsafe_b64encode(zlib.compress(to_json(recipe).encode(), 9)).decode().rstrip("=")


def from_link(part: str) -> Recipe:
    """The recipe that `to_link` wrote. Raises ValueError with one sentence when it is damaged or was tampered with."""
    if len(part) > MAX_CHARS:
        raise ValueError(f"the link has {len(part)} characters, the limit is {MAX_CHARS}")
    text, unpacker = part.removeprefix(MARK), zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), _MAX_UNPACKED)
    except (ValueError, zlib.error) as error:
        raise ValueError("the link is damaged: a part is missing or altered") from error
    if not unpacker.eof:
        raise ValueError("the link is damaged: it is cut off or too large")
    return from_json(data.decode("utf-8", "replace"), "the link")
