"""The tab Inspect: what the tokens of a picture say, where they come from, what each is for. Hints, not facts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from app import table
from app.cards import PictureWord
from app.handlers import VIEWS, Handlers, check_choice
from app.messages import Clock, duration, finished, in_words
from app.studio import SAMPLING, Studio
from app.workbench import card_choice, read_one, read_settings, read_whole, recipes_of, side_by_side
from vilex.config import Range, tokens_in_words
from vilex.images import fit_image
from vilex.pipeline import VilexPipeline
from vilex.words import likeness, without

NEAREST = 3  # words shown of each token
_ALL = "0 is the mean of all"
_SHOWN_SIZE = 384  # pixels of the overlay's side
_RAMP = np.array([(0, 32, 77), (124, 123, 120), (255, 234, 70)], np.float32)  # dark blue to yellow, as in cividis
_OPACITY = 0.65
_HINT = "The nearest words are a hint, not a fact: most tokens lie far from every word."


@dataclass(frozen=True)
class Inspector:
    """The tab's functions."""

    handlers: Handlers

    def inspect(self, card: str, token: int, **values: Any) -> tuple[str, Image.Image | None, str, str]:
        """Nearest words of a card's tokens, where on the picture `token` (0: the mean) looked, and two remarks."""
        with in_words():
            pipeline, token = self.handlers.ready(), self._read(token)
            word = read_one(self.handlers, values, card)
            status = finished(f"Read {tokens_in_words(len(word.vilex_tokens))} of picture {card}.")
            return words_table(pipeline, word.vilex_tokens), *where(pipeline, word, token), status

    def look(self, card: str, token: int, **values: Any) -> tuple[Image.Image | None, str]:
        """Where on the picture another token looked, and what the colours mean."""
        with in_words():
            pipeline, token = self.handlers.ready(), self._read(token)
            return where(pipeline, read_one(self.handlers, values, card), token)

    def leave_out(self, card: str, token: int, view: str, embed: bool, **values: Any) -> Iterator[tuple]:
        """A card drawn from all its tokens and from all but one, from one noise; gives two PNGs and a status line."""
        with in_words():
            pipeline, config = self.handlers.ready(), read_settings(values)
            check_choice(view, VIEWS, "view")
            if (token := self._read(token)) == 0:
                raise ValueError("Choose a token to leave out: 0 stands for the mean of all")
            whole = read_one(self.handlers, values, card).vilex_tokens
            pair, clock = [whole, without(whole, token - 1)], Clock(config.num_inference_steps)
            conditions = side_by_side(pipeline, [[each] for each in pair], config)
            for images, status in self.handlers.watch(conditions, config, [config.seed] * 2, clock, "Drawing two"):
                yield gr.skip() if images is None else images, status
            names = [f"vilex-whole-seed-{config.seed}", f"vilex-without-{token}-seed-{config.seed}"]
            paths = self.handlers.save(images, names, recipes_of(pipeline, pair, config, embed), view)
            captions = [f"all {len(whole)} tokens", f"without token {token}"]
            alike = f"The two are {likeness(*images):.0f} % alike; drawn in {duration(clock.seconds)}."
            yield list(zip(paths, captions, strict=True)), finished(alike)

    def _read(self, token: Any) -> int:
        return read_whole("token", token, Range(0, self.handlers.max_tokens, _ALL))


def words_table(pipeline: VilexPipeline, vilex_tokens: Tensor) -> str:
    """Per token of vilex_tokens (N,D) its nearest words and its distance to the nearest, as an HTML table."""
    rows = [
        [i, *(f"{near.word} {near.similarity:.2f}" for near in reading.neighbours), f"{reading.distance:.1f}"]
        for i, reading in enumerate(pipeline.vocabulary.read(vilex_tokens, NEAREST), 1)
    ]
    header = ["Token", "First", "Second", "Third", "Distance"]
    return table.to_html(
        "Words nearest to each token, with their similarity (1 is the same direction), and the distance to the "
        "nearest (1 is as far as words lie from one another)", header, rows,
    )  # fmt: skip


def where(pipeline: VilexPipeline, word: PictureWord, token: int) -> tuple[Image.Image | None, str]:
    """The picture coloured by where a token looked, and in HTML what the colours mean; no picture for a code."""
    _check_token(token, word)
    if word.image is None:
        return None, finished("It came as a code: there is no picture to look at.")
    if not pipeline.has_encoder:
        return None, finished("This model has no encoder, so there is no map of where a token looked.")
    heat = attention_of(pipeline, word, token)
    return overlay(fit_image(word.image, _SHOWN_SIZE, word.fit), heat), finished(legend(heat, token))


def attention_of(pipeline: VilexPipeline, word: PictureWord, token: int) -> np.ndarray:
    """How much each place of the picture was looked at, float32 (h,w), as multiples of an even share.

    `token` counts from 1; 0 is the mean of all tokens of the word.
    """
    maps = pipeline.attention(word.image, word.fit)[: len(word.vilex_tokens)]  # (N,h,w)
    heat = maps[token - 1] if token else maps.mean(0)  # (h,w)
    return (heat * heat.numel()).float().cpu().numpy()


def _check_token(token: int, word: PictureWord) -> None:
    if token > len(word.vilex_tokens):
        raise ValueError(f"token must be at most {len(word.vilex_tokens)}, the tokens of this picture, got {token}")


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey under colours from dark blue, where `heat` (h,w) is least, to yellow, where it is most.

    The colours differ in lightness too, so that nobody needs to tell red from green. A heat that is the same
    everywhere is dark blue.
    """
    span = float(heat.max() - heat.min())
    scaled = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC))
    places = np.linspace(0, 1, len(_RAMP))
    colours = np.stack([np.interp(smooth, places, channel) for channel in _RAMP.T], axis=-1)  # (H,W,3)
    tint = Image.fromarray(colours.round().astype(np.uint8))
    return Image.blend(image.convert("L").convert("RGB"), tint, _OPACITY)


def legend(heat: np.ndarray, token: int) -> str:
    """What the colours mean, in one sentence, with the range of `heat` in multiples of an even share."""
    who = f"Token {token}" if token else "The mean token"
    return (
        f"{who} looked most where it is yellow ({heat.max():.1f} times an even share) and least where it is dark blue "
        f"({heat.min():.1f} times)."
    )


def build_inspector(studio: Studio) -> None:
    """Lays out the tab and wires it."""
    tab, count = Inspector(studio.handlers), studio.handlers.max_tokens
    with gr.Row():
        card = card_choice("Picture to inspect")
        token = gr.Slider(0, count, 0, step=1, label="Token", info=_ALL, min_width=220, elem_id="token")
    with gr.Row():
        look = gr.Button("Inspect", variant="primary", min_width=100, elem_id="inspect")
        leave = gr.Button("Draw without this token", min_width=160)
    gr.HTML(finished(_HINT), label="About the words")
    with gr.Row():
        with gr.Column(scale=2, min_width=220):
            sight = gr.Image(
                label="Where it looked", format="png", interactive=False, buttons=["download", "fullscreen"],
                alt_text="The picture, coloured by where the token looked", elem_id="sight-map",
            )  # fmt: skip
            said = gr.HTML("", label="What the colours mean")
        with gr.Column(scale=3, min_width=260):
            words = gr.HTML("", label="Words nearest to each token", elem_id="nearest")
    pair = gr.Gallery(
        label="With and without the token", format="png", columns=2, object_fit="contain", interactive=False,
        height="auto", elem_id="left-out", elem_classes="thumbs", buttons=["download", "fullscreen"],
    )  # fmt: skip
    chosen = {"card": card, "token": token}
    read = studio.inputs("cards") | chosen
    studio.compute(look.click, tab.inspect, [words, sight, said, studio.status], read, api_name="inspect")
    studio.compute(token.release, tab.look, [sight, said], read, api_visibility="private")
    drawn = studio.inputs("cards", "view", "embed", "seed", *SAMPLING) | chosen
    studio.compute(leave.click, tab.leave_out, [pair, studio.status], drawn, api_name="leave_out")
