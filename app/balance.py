"""The tab Balance: the prompt drawn over token counts and over words against picture; a click takes both over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from app.cards import PictureWord, names_of
from app.handlers import VIEWS, Handlers, Look, text_of
from app.messages import Clock, duration, finished, in_words
from app.studio import SAMPLING, Studio
from app.workbench import read_settings, side_by_side, tokens_of_used
from vilex.config import GenerationConfig, token_budgets, tokens_in_words
from vilex.prompt import has_words

TFG_SCALES = (0.0, 1.0, 3.0, 6.0)
MOST_STEPS = GenerationConfig.num_inference_steps  # of a thumbnail: enough to choose by


@dataclass(frozen=True)
class Balance:
    """The tab's functions."""

    handlers: Handlers

    @property
    def budgets(self) -> tuple[int, ...]:
        """Token counts of the columns."""
        return token_budgets(self.handlers.max_tokens)

    @property
    def cells(self) -> list[tuple[int, float]]:
        """Token count and text-free guidance of each thumbnail, in the order of the gallery."""
        return [(budget, tfg_scale) for tfg_scale in TFG_SCALES for budget in self.budgets]

    def draw(self, prompt: str, embed: bool = False, **values: Any) -> Iterator[tuple]:
        """The prompt with its pictures over few to all tokens and text-free guidance 0 to 6, all from one noise.

        Gives a gallery that fills row by row, and a status line. No more steps are taken than usual.
        """
        with in_words():
            pipeline, prompt, config = self.handlers.ready(), text_of(prompt), self._settings(values)
            words = self.handlers.read_cards(values, full=True)
            names = names_of(words)
            if not words or not has_words(prompt, len(words), names):
                raise ValueError("The map needs a picture and words in the prompt: it weighs one against the other")
            look = Look(VIEWS[1], embed)
            rows = [[replace(w, vilex_tokens=w.vilex_tokens[:budget]) for w in words] for budget in self.budgets]
            conditions = side_by_side(pipeline, [[w.vilex_tokens for w in row] for row in rows], config, prompt, names)
            longest = max(len(word.vilex_tokens) for word in words)  # a code may hold few
            done: list[Image.Image | str] = []
            clock, seeds = Clock(len(TFG_SCALES) * config.num_inference_steps), [config.seed] * len(rows)
            for tfg_scale in TFG_SCALES:
                scaled = replace(config, tfg_scale=tfg_scale)
                for images, status in self.handlers.watch(conditions, scaled, seeds, clock, f"TFG {tfg_scale:g}"):
                    yield gr.skip() if images is None else self._captioned(done + images, longest), status
                done += self._save(images, prompt, scaled, rows, look)
            status = (
                f"Drawn in {duration(clock.seconds)} with seed {config.seed}. Click a picture to take its settings."
            )
            yield self._captioned(done, longest), finished(status)

    def _save(
        self,
        images: list[Image.Image],
        prompt: str,
        config: GenerationConfig,
        rows: list[list[PictureWord]],
        look: Look,
    ) -> list[str]:
        """Paths of the PNGs of one text-free guidance, each with the recipe that draws it from its row of words."""
        counts = [max(len(word.vilex_tokens) for word in row) for row in rows]
        recipes = [
            self.handlers.recipe(prompt, replace(config, num_tokens=count), row, look.embed)
            for count, row in zip(counts, rows, strict=True)
        ]
        names = [f"vilex-{budget}-tokens-tfg-{config.tfg_scale:g}-seed-{config.seed}" for budget in self.budgets]
        return self.handlers.save(images, names, recipes, look.view)

    def adopt(self, names: Sequence[str], event: gr.SelectData, *inputs: Any) -> tuple:
        """The token count for the cards in the prompt, the text-free guidance and a status line of what was clicked.

        inputs: the prompt and the cards' fields, which have these names.
        """
        budget, tfg_scale = self.cells[event.index]
        values = dict(zip(names, inputs, strict=True))
        with in_words():
            counts = tokens_of_used(budget, values.pop("prompt"), values)
        return *counts, tfg_scale, finished(f"Now at {caption(budget, tfg_scale)}.")

    def _settings(self, values: dict[str, Any]) -> GenerationConfig:
        config = read_settings(values)
        return replace(config, num_inference_steps=min(config.num_inference_steps, MOST_STEPS))

    def _captioned(self, images: list[Image.Image | str], longest: int) -> list[tuple[Image.Image | str, str]]:
        cells = zip(images, self.cells, strict=False)
        return [(image, caption(min(budget, longest), tfg_scale)) for image, (budget, tfg_scale) in cells]


def caption(budget: int, tfg_scale: float) -> str:
    """A cell of the map in words."""
    return f"{tokens_in_words(budget)}, TFG {tfg_scale:g}"


def build_balance(studio: Studio) -> None:
    """Lays out the tab and wires it."""
    tab = Balance(studio.handlers)
    gr.Markdown(
        "The prompt at few and many tokens (left to right) and with little and much weight on its words (top to "
        "bottom), small. Click the best one to take over both settings."
    )
    draw = gr.Button("Draw the map", variant="primary", elem_id="map")
    gallery = gr.Gallery(
        label="Tokens (columns) and words against picture (rows)", format="png", columns=len(tab.budgets),
        object_fit="contain", interactive=False, height="auto", elem_id="balance", elem_classes="thumbs",
        allow_preview=False, buttons=["download_all"],
    )  # fmt: skip
    inputs = studio.inputs("cards", "prompt", "embed", "seed", *SAMPLING, "words_scale")
    studio.compute(draw.click, tab.draw, [gallery, studio.status], inputs, api_name="balance")
    taken = [*(card.num_tokens for card in studio.cards), studio.settings["tfg_scale"], studio.status]
    asked = studio.inputs("prompt", "cards")

    def adopt(event: gr.SelectData, *inputs: Any) -> tuple:
        return tab.adopt(list(asked), event, *inputs)

    # queued, since only queued events show their errors
    gallery.select(
        adopt, list(asked.values()), taken, show_progress="hidden", preprocess=False, api_visibility="private"
    )
