"""The page: what stands where, and what its keys do; each tab lays itself out in the file of its name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from app.about import build_about
from app.balance import build_balance
from app.blend import build_blend
from app.cleanup import EVERY_SECONDS, MOST_SECONDS
from app.compare import build_compare
from app.download import guard_gradio
from app.handlers import Handlers
from app.history import build_history, wire_history
from app.inspector import build_inspector
from app.ladder import build_ladder
from app.link import wire_link
from app.messages import duration
from app.models import page_path
from app.panel import Panel, build_panel
from app.pictures import RANDOM_SEED, build_gallery, build_pictures, build_take
from app.polish import polish_info, seconds_per_step, wire_polish
from app.restore import build_page
from app.similar import build_similar
from app.sources import wire_cards
from app.studio import SILENT, Studio
from app.theme import build_theme
from vilex.config import MIXING, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = (
    "cat.jpg", "coffee.jpg", "rocket.jpg", "astronaut.jpg", "sailboat.png", "cactus.png", "mountains.png", "fruit.png"
)  # fmt: skip
PROMPTS = (
    "<image>, in the style of Claude Monet",
    "<image>, flat emoji",
    "oil painting of <image> by Vincent van Gogh",
    "a photo of a flower. <image>",
)
TABS = {"Blend": build_blend, "Balance": build_balance, "Inspect": build_inspector, "Compare": build_compare}
SLOW_SECONDS = 10  # of a picture, where the page starts with four of them
MAX_WAITING = 60  # requests of all kinds; the engine has a line of its own for those that draw
_SHOW_VIEW = "(view) => { document.body.classList.toggle('as-drawn', view === 'raw') }"


@dataclass(frozen=True)
class Notes:
    """What the page says about the machine and the weights."""

    steps: int = GenerationConfig.num_inference_steps
    seconds_per_step: float | None = None
    device: str = "cpu"
    licence: str = ""

    @property
    def num_images(self) -> int:
        """Pictures at once that the slider starts at: one where each is known to take long."""
        return 1 if self.steps * (self.seconds_per_step or 0) > SLOW_SECONDS else 4


def build_demo(
    handlers: Handlers, notes: Notes = Notes(), others: Sequence[tuple[Handlers, Notes]] = ()
) -> gr.Blocks:  # fmt: skip
    """The page, wired, and one for each other model; `launch(**launch_options())` shows it."""
    guard_gradio()
    names = [each.pipeline.name for each in (handlers, *(other for other, _ in others)) if others]
    with gr.Blocks(
        title="ViLex: an image is a word", analytics_enabled=False, delete_cache=(EVERY_SECONDS, MOST_SECONDS)
    ) as demo:
        _build_page(demo, handlers, notes, names)
    for (other, its_notes), name in zip(others, names[1:], strict=True):
        with demo.route(name, page_path(name), show_in_navbar=False):
            _build_page(demo, other, its_notes, names)
    return demo.queue(max_size=MAX_WAITING)


def _build_page(demo: gr.Blocks, handlers: Handlers, notes: Notes, models: Sequence[str]) -> None:
    header = gr.HTML(_header(handlers, notes), elem_id="header")
    with gr.Row(elem_id="sides"):
        with gr.Column(scale=5, min_width=300, elem_id="left"):
            panel = build_panel(handlers, notes.steps, notes.num_images, _polish_seconds(handlers, notes), models)
        with gr.Column(scale=7, min_width=300, elem_id="right"):
            studio, results, history = _build_results(handlers, panel)
            _build_examples(panel)
    gr.HTML(_footer(handlers, notes), elem_id="small-print")

    def tell_costs() -> tuple[str, Any]:
        late = _of_late(handlers, notes)
        return _header(handlers, late), gr.update(info=polish_info(_polish_seconds(handlers, late)))

    demo.load(tell_costs, None, [header, panel.polish[0]], **SILENT)
    shown = _wire(demo, studio, panel)
    page = build_page(studio, panel, shown, history[0])
    loaded = wire_history(demo, studio, panel, page, *history[1:], results)
    for listen in (loaded.then, panel.view.change):
        listen(None, panel.view, None, js=_SHOW_VIEW, api_visibility="private")
    paths = {name: page_path(name) if i else "" for i, name in enumerate(models)}
    go = f"(name) => {{ location.assign('./' + {json.dumps(paths)}[name]) }}"
    panel.model.input(None, panel.model, None, js=go, api_visibility="private")


def launch_options() -> dict[str, Any]:
    """Arguments of Blocks.launch that belong to this page."""
    return {
        "theme": build_theme(),
        "css_paths": sorted(Path(__file__).parent.glob("*.css")),
        "head": f"<script>{(Path(__file__).parent / 'page.js').read_text(encoding='utf-8')}</script>",
        "show_error": True,
        "max_file_size": "20mb",
        "footer_links": ["api", "settings"],
    }


def _build_results(
    handlers: Handlers, panel: Panel
) -> tuple[Studio, list[Component], tuple[gr.Gallery, gr.Button, gr.State]]:
    """The tabs, where the ladder and the gallery show their results, and the parts of the history."""
    status = gr.HTML("<p>Ready.</p>", label="What is happening", elem_id="status")
    with gr.Tabs(elem_id="tabs") as tabs:
        studio = Studio(
            handlers, panel.cards, panel.prompt, panel.settings, panel.view, panel.embed, status, build_gallery(), tabs
        )  # fmt: skip
        with gr.Tab("Ladder", id="ladder"):
            rungs = build_ladder(studio, panel.arrival)
        with gr.Tab("Pictures", id="pictures"):
            build_pictures(studio, panel.generate, panel.lock)
        for name, build in TABS.items():
            with gr.Tab(name, id=name.lower()):
                build(studio)
        with gr.Tab("History", id="history"):
            history = build_history()
            build_take(studio, "history")
            build_similar(studio, history[0], _example_files())
        with gr.Tab("About", id="about") as about:
            build_about(studio, about)
    return studio, [*rungs, studio.gallery], history


def _build_examples(panel: Panel) -> None:
    with gr.Row(elem_id="examples"):
        pictures = gr.Dataset(
            components=[panel.cards[0].picture], samples=[[str(path)] for path in _example_files()],
            label="Example pictures", elem_id="example-pictures",
        )  # fmt: skip
        pictures.click(None, pictures, None, js="(index) => takeExample(index)", api_visibility="private")
        gr.Examples(
            [[text] for text in PROMPTS], [panel.prompt], label="Example prompts", cache_examples=False,
            api_visibility="private",
        )  # fmt: skip


def _example_files() -> list[Path]:
    return [ROOT / "assets" / "examples" / name for name in EXAMPLES]


def _wire(demo: gr.Blocks, studio: Studio, panel: Panel) -> gr.State:
    """Every event outside the tabs; gives the state of which cards are on the page."""
    handlers, first, extra = studio.handlers, panel.cards[0], panel.extras[0]
    kept = studio.compute(panel.keep.click, handlers.encode, panel.kept, first.inputs(0), api_name="encode")
    studio.say(kept, "Picture A is kept as a word: its file lies under the button.")
    wire_polish(studio, *panel.polish)
    wire_link(studio, panel)
    # A page runs the listeners of one event in the order they were made: what a new picture makes obsolete
    # is cancelled before the picture is looked at, and the change of what the encoder sees starts the rest.
    gr.on(
        [panel.stop.click, first.picture.input, extra.source.submit], None, cancels=studio.jobs,
        api_visibility="private",
    )  # fmt: skip
    shown = wire_cards(handlers, panel)
    inputs = studio.inputs("prompt", "cards")
    counted = [part for name, part in inputs.items() if not name.startswith(("weight", "fit"))]
    gr.on(
        [demo.load, *(part.change for part in counted)], handlers.plan, None,
        [panel.bar, *(panel.settings[name] for name in MIXING)], inputs_kwargs=inputs, trigger_mode="always_last",
        **SILENT,
    )  # fmt: skip
    panel.dice.click(None, None, panel.settings["seed"], js=f"() => {RANDOM_SEED}", api_visibility="private")
    return shown


def _of_late(handlers: Handlers, notes: Notes) -> Notes:
    """What is known of the machine, by what was drawn since the start: at the start it may have been busy."""
    seconds = 2 * handlers.engine.seconds_per_row if handlers.engine else 0.0
    return replace(notes, seconds_per_step=seconds) if seconds and notes.seconds_per_step else notes


def _polish_seconds(handlers: Handlers, notes: Notes) -> float | None:
    known = notes.seconds_per_step
    return None if known is None else seconds_per_step(handlers.pipeline, known)


def _header(handlers: Handlers, notes: Notes) -> str:
    banners = []
    if handlers.problem:
        banners.append(f"<strong>No weights are loaded.</strong> {escape(handlers.problem)}")
    elif handlers.pipeline and not handlers.pipeline.has_encoder:
        banners.append("This model draws from words. Pictures become words of it by “Polish picture A”, slowly.")
    if notes.device == "cpu" and notes.seconds_per_step is not None:
        cost = duration(notes.seconds_per_step * notes.steps)
        banners.append(f"Running on the CPU: about {cost} per picture of {notes.steps} steps on this machine.")
    return (
        "<h1>ViLex</h1><p>A picture becomes a word that stands beside other words. "
        "Drop one in, see what 1, 16 or 75 tokens keep of it, then vary it or write what should change.</p>"
        + "".join(f'<p class="banner" role="note">{text}</p>' for text in banners)
    )


def _footer(handlers: Handlers, notes: Notes) -> str:
    name = f"Model: {escape(handlers.pipeline.name)}. " if handlers.pipeline else ""
    keys = "<kbd>Ctrl</kbd>/<kbd>⌘</kbd> <kbd>Enter</kbd> generates, <kbd>Esc</kbd> stops."
    return f"<p>{name}{escape(notes.licence)} {keys} Results are kept here for a day, then deleted.</p>"
