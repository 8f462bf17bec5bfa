"""The tab Blend: cross-fades of two pictures, the content of one with the look of the other, and word algebra."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from torch import Tensor

from app.cards import NAMES, pack
from app.handlers import VIEWS, Handlers, check_choice, text_of
from app.messages import Clock, duration, finished, in_words
from app.studio import SAMPLING, Studio
from app.workbench import card_choice, read_one, read_settings, read_whole, recipes_of, side_by_side
from vilex.codes import VilexCode
from vilex.config import MAX_PROMPT_CHARS, GenerationConfig, Range, check_range
from vilex.words import blend, graft

CUTS = (1, 4, 16, 40)  # first tokens of A in a row of grafts
COUNT_RANGE = Range(3, 9, "Pictures from the first to the second, both included")
STRENGTH_RANGE = Range(0.0, 4.0, "How far the words move the picture")
_MAX_CAPTION = 60  # characters


@dataclass(frozen=True)
class Blend:
    """The tab's functions. Those that draw give a gallery, the words drawn, None for the choice, and a status line."""

    handlers: Handlers

    def cross_fade(self, first: str, second: str, count: int, view: str, embed: bool, **values: Any) -> Iterator[tuple]:
        """A row of `count` pictures from one card to another, drawn from one noise; cards are named A to D."""
        with in_words():
            self.handlers.ready()
            config, count = self._settings(view, values), read_whole("count", count, COUNT_RANGE)
            shares = [i / (count - 1) for i in range(count)]
            a, b = (read_one(self.handlers, values, card).vilex_tokens for card in (first, second))
            words = {f"{share:.0%} {second}": blend(a, b, share) for share in shares}
            yield from self._draw(words, config, view, embed, "Blending")

    def graft(
        self, first: str, second: str, cut: int, row: bool, view: str, embed: bool, **values: Any
    ) -> Iterator[tuple]:
        """The first `cut` tokens of one card, then the last of another: content, then look. `row` adds other cuts."""
        with in_words():
            self.handlers.ready()
            config = self._settings(view, values)
            cuts = sorted({read_whole("cut", cut, Range(0, self.handlers.max_tokens)), *(CUTS if row else ())})
            a, b = (read_one(self.handlers, values, card, full=True).vilex_tokens for card in (first, second))
            words = {f"{cut} of {first}, then {second}": _grafted(a, b, cut) for cut in cuts}
            yield from self._draw(words, config, view, embed, "Grafting")

    def algebra(
        self, first: str, minus: str, plus: str, strength: float, view: str, embed: bool, **values: Any
    ) -> Iterator[tuple]:
        """A card as it is, and with words taken from it and added to it: <image> - snow + sand."""
        with in_words():
            pipeline, config = self.handlers.ready(), self._settings(view, values)
            check_range("strength", strength, STRENGTH_RANGE)
            minus, plus = text_of(minus, "text to take away").strip(), text_of(plus, "text to add").strip()
            if not minus and not plus:
                raise ValueError("Write words to take away or words to add")
            tokens = read_one(self.handlers, values, first).vilex_tokens
            moved = pipeline.vocabulary.shift(tokens, minus, plus, strength)
            formula = " ".join([first, *([f"- {minus}"] if minus else []), *([f"+ {plus}"] if plus else [])])
            yield from self._draw({first: tokens, formula[:_MAX_CAPTION]: moved}, config, view, embed, "Moving")

    def use(self, words: Sequence[Tensor], chosen: int | None, target: str) -> list[Any]:
        """The `word` of every card, unchanged but for the card of that letter, which gets the chosen one."""
        with in_words():
            check_choice(target, NAMES, "card")
            if chosen is not None and not words:
                raise ValueError("Draw the pictures to their end first: these were stopped on the way")
            if chosen is None or not 0 <= chosen < len(words):
                raise ValueError("Choose one of the pictures first: click it")
            word = pack(VilexCode(words[chosen], self.handlers.ready().fingerprint, "blend"))
            return [word if name == target else gr.skip() for name in NAMES]

    def _settings(self, view: str, values: dict[str, Any]) -> GenerationConfig:
        check_choice(view, VIEWS, "view")
        return read_settings(values)

    def _draw(
        self, words: dict[str, Tensor], config: GenerationConfig, view: str, embed: bool, what: str
    ) -> Iterator[tuple]:
        """Pictures of words (N,D) by their captions, all from one noise."""
        pipeline, tokens, clock = self.handlers.ready(), list(words.values()), Clock(config.num_inference_steps)
        conditions = side_by_side(pipeline, [[each] for each in tokens], config)
        for images, status in self.handlers.watch(conditions, config, [config.seed] * len(tokens), clock, what):
            shown = (gr.skip(),) * 3 if images is None else (images, (), None)  # previews are no words yet
            yield *shown, status
        recipes = recipes_of(pipeline, tokens, config, embed)
        names = [f"vilex-{what.lower()}-{i}-seed-{config.seed}" for i in range(1, len(tokens) + 1)]
        paths = self.handlers.save(images, names, recipes, view)
        status = finished(f"Drawn in {duration(clock.seconds)} with seed {config.seed}. Click a picture to choose it.")
        yield list(zip(paths, words, strict=True)), tuple(each.cpu() for each in tokens), None, status


def _grafted(first: Tensor, second: Tensor, cut: int) -> Tensor:
    tokens = graft(first, second, cut)
    if not len(tokens):
        raise ValueError(f"at cut {cut} nothing is left: the second picture has {len(second)} tokens")
    return tokens


def select(event: gr.SelectData) -> int:
    """The place of the picture that was clicked."""
    return event.index


def build_blend(studio: Studio) -> None:
    """Lays out the tab and wires it."""
    tab = Blend(studio.handlers)
    with gr.Row():
        first, second = card_choice("From, or content of"), card_choice("To, or look of", NAMES[1])
    fade, count = _build_cross_fade()
    join, cuts = _build_graft(studio.handlers.max_tokens)
    move, terms = _build_algebra()
    gallery = gr.Gallery(
        label="Blends", format="png", columns=5, object_fit="contain", interactive=False, height="auto",
        elem_id="blends", elem_classes="thumbs", buttons=["download", "download_all", "fullscreen"],
        allow_preview=False,
    )  # fmt: skip
    words, chosen = gr.State(()), gr.State(None)
    outputs, one = [gallery, words, chosen, studio.status], {"first": first}
    shared = one | studio.inputs("cards", "view", "embed", "seed", *SAMPLING)
    two = shared | {"second": second}
    studio.compute(fade.click, tab.cross_fade, outputs, two | count, api_name="blend")
    studio.compute(join.click, tab.graft, outputs, two | cuts, api_name="graft")
    studio.compute(move.click, tab.algebra, outputs, shared | terms, api_name="algebra")
    gallery.select(select, None, chosen, show_progress="hidden", queue=False, api_visibility="private")
    _build_use(studio, tab, words, chosen)


def _build_cross_fade() -> tuple[gr.Button, dict[str, Component]]:
    with gr.Accordion("From one to the other", open=True):
        count = gr.Slider(
            COUNT_RANGE.minimum, COUNT_RANGE.maximum, 5, step=1, label="Pictures in the row", info=COUNT_RANGE.help
        )
        return gr.Button("Blend", variant="primary"), {"count": count}


def _build_graft(max_tokens: int) -> tuple[gr.Button, dict[str, Component]]:
    with gr.Accordion("Content of one, look of the other", open=False):
        gr.Markdown(
            "The first tokens of one picture, then the last of the other. The ladder shows what few tokens hold."
        )
        with gr.Row():
            cut = gr.Slider(
                0, max_tokens, min(16, max_tokens), step=1, label="Cut", min_width=180, scale=3,
                info="Tokens of the first; the rest are the second's",
            )  # fmt: skip
            row = gr.Checkbox(True, label=f"Also {', '.join(map(str, CUTS))}", min_width=140, scale=1)
        return gr.Button("Graft", variant="primary"), {"cut": cut, "row": row}


def _build_algebra() -> tuple[gr.Button, dict[str, Component]]:
    with gr.Accordion("Take words away, add words", open=False):
        gr.Markdown("Moves every token of the first picture. Best give both: “snow” away, “sand” added.")
        with gr.Row():
            words = {"max_length": MAX_PROMPT_CHARS, "min_width": 140, "max_lines": 1}
            minus = gr.Textbox("", label="Take away", placeholder="snow", **words)
            plus = gr.Textbox("", label="Add", placeholder="sand", **words)
        strength = gr.Slider(
            STRENGTH_RANGE.minimum, STRENGTH_RANGE.maximum, 1, step=0.1, label="Strength", info=STRENGTH_RANGE.help
        )
        return gr.Button("Move it", variant="primary"), {"minus": minus, "plus": plus, "strength": strength}


def _build_use(studio: Studio, tab: Blend, words: gr.State, chosen: gr.State) -> None:
    target = card_choice("Put the chosen picture into", NAMES[2])
    button = gr.Button("Use as a picture")
    outputs = [card.word for card in studio.cards]
    # queued, since only queued events show their errors
    button.click(tab.use, [words, chosen, target], outputs, show_progress="hidden", api_visibility="private")
