"""Polish: picture A's tokens improved for this one picture, which its card then holds beside it."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import gradio as gr

from app.cards import names_of, open_upload, pack_polished, stem, take_cards
from app.engine import Waiting
from app.handlers import Handlers, text_of
from app.messages import Clock, duration, finished, in_words, waiting
from app.studio import Studio
from app.workbench import read_whole
from vilex.codes import VilexCode
from vilex.config import PolishConfig, range_of
from vilex.pipeline import VilexPipeline
from vilex.polish import polish_rows
from vilex.prompt import words_of

MAX_STEPS = 200  # of the slider; clients of the API may ask for more


def polish(handlers: Handlers, polish_steps: int, prompt: str = "", **values: Any) -> Iterator[tuple]:
    """All tokens of a picture, improved by that many gradient steps on the model's own loss.

    Where the model has no encoder they start as the words of the prompt, or as the average word without any.
    Gives the word that then says what the picture shows, as text for the card's code, and a status line.
    """
    with in_words():
        pipeline = handlers.ready()
        steps = read_whole("polish_steps", polish_steps, range_of(PolishConfig, "num_steps"))
        if values.get("picture") is None:
            raise ValueError("Give picture A first: a word without its picture cannot be polished")
        cards = take_cards(values)
        card, names = cards[0], names_of(cards)  # A, since it has a picture
        words = "" if pipeline.has_encoder else words_of(text_of(prompt), len(names), names)
        image, clock = open_upload(card.picture), Clock(steps)
        config = PolishConfig(pipeline.max_tokens, steps)
        with closing(handlers.engine.polish(image, config, card.fit, words)) as events:
            for event in events:
                if isinstance(event, Waiting):
                    yield gr.skip(), waiting(event.position, event.seconds, clock)
                else:
                    yield gr.skip(), clock.at(event.index + 1, "Polishing")
        code = VilexCode(event.vilex_tokens, pipeline.fingerprint, stem(card.picture))
        done = f"Polished in {duration(clock.seconds)}: picture A is drawn from its polished tokens now."
        yield pack_polished(code, card.picture, card.fit), finished(done)


def seconds_per_step(pipeline: VilexPipeline, seconds: float) -> float:
    """Seconds that a step of polishing takes where one of drawing a picture, with guidance, takes `seconds`."""
    return seconds * polish_rows(pipeline.t2i) / 2


def polish_info(seconds: float | None) -> str:
    """What more steps are good for and what they cost."""
    cost = "take longer" if seconds is None else f"take about {duration(seconds)} each"
    return f"More fit the tokens closer to this one picture, and {cost}"


def build_polish(seconds: float | None = None) -> tuple[gr.Slider, gr.Button]:
    """How many steps, of so many seconds if that is known, and the button."""
    bounds = range_of(PolishConfig, "num_steps")
    steps = gr.Slider(
        bounds.minimum, MAX_STEPS, PolishConfig.num_steps, step=1, label="Steps of polishing", elem_id="polish-steps",
        info=polish_info(seconds),
    )  # fmt: skip
    return steps, gr.Button("Polish picture A", size="md", elem_id="polish")


def wire_polish(studio: Studio, steps: gr.Slider, button: gr.Button) -> None:
    """The button; what it found comes into card A beside its picture."""
    first = studio.cards[0]
    inputs = studio.inputs("cards", "prompt") | {"polish_steps": steps}
    outputs = [first.word, studio.status]
    studio.compute(button.click, partial(polish, studio.handlers), outputs, inputs, api_name="polish")
