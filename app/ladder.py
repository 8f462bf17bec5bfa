"""The tab Ladder: one picture rebuilt from few and from many tokens, side by side, from one shared noise."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from gradio.events import Dependency
from PIL import Image

from app.cards import PictureWord, read_card, take_cards
from app.handlers import Handlers, Look, build_config
from app.messages import Clock, duration, finished, in_words, working
from app.pictures import build_versus, compare_two
from app.studio import SAMPLING, SILENT, Studio
from app.workbench import side_by_side
from vilex.config import GenerationConfig, tokens_in_words
from vilex.words import likeness

MAX_RUNGS = 6
DEFAULT_RUNGS = (1, 16, 75)
_BUDGET_CHARS = 60


@dataclasses.dataclass(frozen=True)
class Rung:
    """The components of one token budget."""

    column: gr.Column
    image: gr.Image
    text: gr.HTML
    use: gr.Button


def parse_budgets(text: object, max_tokens: int) -> list[int]:
    """Token budgets of a text such as "1, 4, 16, 75", cheapest first, each once, at most what the pooler has.

    Raises ValueError with the rule for anything else.
    """
    rule = f"Tokens to rebuild from are 1 to {MAX_RUNGS} whole numbers from 1 to {max_tokens}, such as 1, 4, 16"
    if not isinstance(text, str) or not re.fullmatch(r"\s*\d{1,3}(\s*[,;\s]\s*\d{1,3})*\s*", text[:_BUDGET_CHARS]):
        raise ValueError(f"{rule}; got {text!r:.60}")
    budgets = sorted({int(number) for number in re.findall(r"\d+", text)})
    if not 1 <= len(budgets) <= MAX_RUNGS or budgets[0] < 1 or budgets[-1] > max_tokens:
        raise ValueError(f"{rule}; got {text!r:.60}")
    return budgets


def climb(handlers: Handlers, view: str, budgets: str, embed: bool = False, **values: Any) -> Iterator[tuple]:
    """One picture rebuilt from its first tokens, cheapest budget first, from one shared noise.

    `budgets` is a text such as "1, 16, 75". Gives six places for PNGs and six for what is said of them (budget,
    likeness to the picture, time; those without a budget stay empty), and a status line; unfinished ones are previews.
    """
    with in_words():
        pipeline = handlers.ready()
        look = Look(view, embed)
        rungs = parse_budgets(budgets, handlers.max_tokens)
        cards = take_cards(values)
        config = build_config(**values, num_images=1)
        if not cards:
            raise ValueError("Give a picture first")
        word = read_card(pipeline, cards[0], full=True)
        rungs = sorted({min(rung, len(word.vilex_tokens)) for rung in rungs})  # a code may hold few
        clock = Clock(len(_groups(handlers, rungs)) * config.num_inference_steps)
        results: list[Any] = [None] * MAX_RUNGS
        texts = [rung_html(rung) for rung in rungs] + [""] * (MAX_RUNGS - len(rungs))
        for group in _groups(handlers, rungs):
            started, places = clock.seconds, [rungs.index(rung) for rung in group]
            for images, status in _draw(handlers, word, group, config, clock):
                for place, image in zip(places, images or [], strict=bool(images)):
                    results[place] = image
                yield *([*results, *texts] if images else [gr.skip()] * 2 * MAX_RUNGS), status
            for place, path in zip(places, _save(handlers, images, word, group, config, look), strict=True):
                texts[place] = rung_html(rungs[place], _alike(handlers, word, results[place]), clock.seconds - started)
                results[place] = path
            yield *results, *texts, working(f"{tokens_in_words(group[-1])} done", clock.done, clock.total)
        yield *results, *texts, finished(f"Rebuilt in {duration(clock.seconds)} with seed {config.seed}.")


def _groups(handlers: Handlers, rungs: Sequence[int]) -> list[list[int]]:
    """Budgets drawn in one batch: all on a GPU, on a CPU one after the other, so that the first is there early."""
    return [list(rungs)] if handlers.pipeline.device.type != "cpu" else [[rung] for rung in rungs]


def _draw(
    handlers: Handlers, word: PictureWord, group: Sequence[int], config: GenerationConfig, clock: Clock
) -> Iterator[tuple[list[Image.Image] | None, str]]:
    conditions = side_by_side(handlers.pipeline, [[word.vilex_tokens[:rung]] for rung in group], config)
    what = " and ".join(map(tokens_in_words, group))
    return handlers.watch(conditions, config, [config.seed] * len(group), clock, what)


def _save(
    handlers: Handlers,
    images: Sequence[Image.Image],
    word: PictureWord,
    group: Sequence[int],
    config: GenerationConfig,
    look: Look,
) -> list[str]:
    names = [f"vilex-{rung}-tokens-seed-{config.seed}" for rung in group]
    cut = [dataclasses.replace(word, name="", vilex_tokens=word.vilex_tokens[:rung]) for rung in group]
    recipes = [
        handlers.recipe("", dataclasses.replace(config, num_tokens=rung), [part], look.embed)
        for rung, part in zip(group, cut, strict=True)
    ]
    return handlers.save(images, names, recipes, look.view)


def _alike(handlers: Handlers, word: PictureWord, image: Image.Image) -> float | None:
    return None if word.image is None else likeness(handlers.seen(word.image, word.fit), image)


def rung_html(num_tokens: int, alike: float | None = None, seconds: float | None = None) -> str:
    """What is said under a rung: its budget, and likeness and time once they are known."""
    said = [] if alike is None else [f"{alike:.0f} % alike"]
    said += [] if seconds is None else [duration(seconds)]
    return f"<strong>{escape(tokens_in_words(num_tokens))}</strong><span>{escape(' · '.join(said)) or '&nbsp;'}</span>"


def climb_new(handlers: Handlers, picture: Any = None, word: str = "", **values: Any) -> Iterator[tuple]:
    """The same for a picture or a word that has just come, and nothing when it was taken away."""
    if (picture is not None or word) and handlers.pipeline is not None:
        yield from climb(handlers, picture=picture, word=word, **values)


def lay_out(handlers: Handlers, budgets: str, laid_out: Sequence[int]) -> tuple:
    """The columns of these budgets, emptied, under their names; no change when they stand already or are wrong."""
    try:
        rungs = parse_budgets(budgets, handlers.max_tokens)
    except ValueError:  # told when the ladder is asked for
        rungs = list(laid_out)
    if rungs == laid_out:
        return (gr.skip(),) * (4 * MAX_RUNGS + 1)
    missing = MAX_RUNGS - len(rungs)
    columns = [gr.update(visible=i < len(rungs)) for i in range(MAX_RUNGS)]
    texts = [rung_html(rung) for rung in rungs] + [""] * missing
    buttons = [gr.update(value=f"Use {rung}") for rung in rungs] + [gr.skip()] * missing
    return *columns, *[None] * MAX_RUNGS, *texts, *buttons, rungs


def use(index: int, laid_out: Sequence[int]) -> tuple:
    """The token count of that rung and the status."""
    count = laid_out[index]
    return count, finished(f"Picture A now speaks with at most {tokens_in_words(count)}.")


def build_ladder(studio: Studio, arrival: gr.Textbox) -> list[gr.Image]:
    """Lays out the tab and wires it; a change of `arrival` rebuilds picture A. Gives the places of the results."""
    most = studio.handlers.max_tokens
    start = [*(rung for rung in DEFAULT_RUNGS if rung < most), most]
    with gr.Row(elem_id="ladder-bar"):
        budgets = gr.Textbox(
            ", ".join(map(str, start)), label="Tokens to rebuild picture A from", max_length=_BUDGET_CHARS,
            elem_id="budgets", scale=3, min_width=160,
            info="All from one noise. 100 % alike would be the picture itself.",
        )  # fmt: skip
        again = gr.Button("Rebuild", elem_id="reconstruct", scale=1, min_width=90)
    with gr.Row(elem_id="rungs"):
        rungs = [_build_rung(i, start) for i in range(MAX_RUNGS)]
    versus = build_versus("ladder-versus")
    # before what climbs: a page runs the listeners of one event one after the other
    _wire_versus(studio, [again.click, budgets.submit, arrival.change], rungs, versus)
    _wire(studio, arrival, budgets, again, rungs, gr.State(start))
    return [rung.image for rung in rungs]


def _build_rung(index: int, start: Sequence[int]) -> Rung:
    budget = start[index] if index < len(start) else None
    with gr.Column(
        visible=budget is not None, elem_classes="rung", elem_id=f"rung-{index + 1}", min_width=60
    ) as column:
        image = gr.Image(
            label=f"Rung {index + 1}", format="png", type="filepath", interactive=False, min_width=60, show_label=False,
            buttons=["download", "fullscreen"], alt_text=f"The picture rebuilt, rung {index + 1} of the ladder",
        )  # fmt: skip
        text = gr.HTML(rung_html(budget) if budget else "", label=f"About rung {index + 1}", elem_classes="rung-text")
        button = gr.Button(f"Use {budget}", size="sm", min_width=60)
    return Rung(column, image, text, button)


def _wire(
    studio: Studio,
    arrival: gr.Textbox,
    budgets: gr.Textbox,
    again: gr.Button,
    rungs: Sequence[Rung],
    laid_out: gr.State,
) -> None:
    handlers, first = studio.handlers, studio.cards[0]
    outputs = [*(rung.image for rung in rungs), *(rung.text for rung in rungs), studio.status]
    own = {name: part for name, part in first.inputs(0).items() if name in ("picture", "word", "weight", "fit")}
    inputs = own | {"budgets": budgets} | studio.inputs("view", "embed", "seed", *SAMPLING)
    places = [[getattr(rung, part) for rung in rungs] for part in ("column", "image", "text", "use")]
    # before what climbs: a page runs the listeners of one event one after the other
    gr.on(
        [budgets.submit, budgets.blur], partial(lay_out, handlers), [budgets, laid_out], [*sum(places, []), laid_out],
        **SILENT,
    )  # fmt: skip
    asked = partial(gr.on, [again.click, budgets.submit])
    studio.compute(asked, partial(climb, handlers), outputs, inputs, api_name="reconstruct")
    # a picture that comes while another is rebuilt waits until that has ended
    studio.compute(
        arrival.change, partial(climb_new, handlers), outputs, inputs, api_visibility="private",
        trigger_mode="always_last",
    )  # fmt: skip
    for index, rung in enumerate(rungs):
        rung.use.click(partial(use, index), laid_out, [first.num_tokens, studio.status], **SILENT)


def _wire_versus(
    studio: Studio, redrawn: Sequence[Callable[..., Dependency]], rungs: Sequence[Rung], versus: gr.ImageSlider
) -> None:  # fmt: skip
    """A click on a rung lays it over picture A; the slider goes when the ladder is drawn again."""
    first = studio.cards[0]
    for rung in rungs:
        # queued, since only queued events show their errors
        rung.image.select(
            compare_two, [first.picture, rung.image, first.fit], versus,
            show_progress="hidden", preprocess=False, api_visibility="private",
        )  # fmt: skip
    gr.on(redrawn, lambda: gr.update(visible=False), None, versus, **SILENT)
