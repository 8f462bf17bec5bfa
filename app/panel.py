"""The left side of the page: picture cards, the prompt with its budget bar, the buttons, and all settings folded."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from app.cards import MAX_CARDS, MAX_NAME_CHARS, NAMES
from app.download import ON_SPACES
from app.handlers import MAX_COPIED, NO_PICTURE, VIEWS, Handlers
from app.polish import build_polish
from app.presets import build_presets, wire_presets
from app.studio import Card
from vilex.config import FITS, MAX_PROMPT_CHARS, MIX_SCALES, SCHEDULERS, WEIGHT_RANGE, GenerationConfig, range_of
from vilex.diffusion import EmbeddedModel

EMPTY_CARD = "Drop a picture here\n- or -\nClick to choose one"
WORD_CARD = "This card holds a word\n- or -\nDrop a picture here to replace it"
_FIT_LABELS = ("Its centre", "Its left or top", "Its right or bottom", "All of it, on white")
_SOURCE = "Code of a picture, then Enter" if ON_SPACES else "Address (https://...) or code, then Enter"


@dataclass(frozen=True)
class CardExtras:
    """The parts of a card that no other tab needs."""

    source: gr.Textbox
    restore: gr.Button
    remove: gr.Button


@dataclass(frozen=True)
class Panel:
    """Everything a user can turn."""

    cards: list[Card]
    extras: list[CardExtras]
    arrival: gr.Textbox  # changes when picture A is to be rebuilt
    add: gr.Button
    open: gr.UploadButton
    prompt: gr.Textbox
    bar: gr.HTML
    generate: gr.Button
    stop: gr.Button
    settings: dict[str, Component]
    lock: gr.Checkbox
    dice: gr.Button
    view: gr.Radio
    embed: gr.Checkbox
    keep: gr.Button
    kept: list[Component]
    polish: tuple[gr.Slider, gr.Button]
    link: gr.Button
    linked: list[Component]
    model: gr.Dropdown


def build_panel(
    handlers: Handlers, steps: int, num_images: int, polish_seconds: float | None, models: Sequence[str] = ()
) -> Panel:
    """The left side, not yet wired; `models` are the names to choose from, the first the app's own.

    polish_seconds: of one step, None where it is not known.
    """
    with gr.Row(elem_id="cards"):
        built = [_build_card(handlers, i) for i in range(MAX_CARDS)]
    arrival = gr.Textbox("", label="Arrival of picture A", elem_classes="unseen")
    with gr.Row(elem_id="card-buttons"):
        add = gr.Button("Add a picture", size="sm", elem_id="add", min_width=120)
        opened = gr.UploadButton(
            "Open a .vilex or PNG", size="sm", elem_id="open", file_types=[".vilex", ".png"], min_width=120
        )
    prompt = gr.Textbox(
        "", label="Prompt", placeholder="<image>, in the style of Claude Monet", lines=2, max_length=MAX_PROMPT_CHARS,
        info='<image> or [A] stands for the picture; <image> - "snow" + "sand" moves it. Empty: variations.',
        elem_id="prompt",
    )  # fmt: skip
    bar = gr.HTML(label="Slots of the prompt", elem_id="budget")
    settings: dict[str, Component] = {}
    settings["tfg_scale"] = slider(
        "tfg_scale", "Words against picture (TFG)", step=0.1, value=MIX_SCALES["tfg_scale"], maximum=10, info=NO_PICTURE
    )
    settings["words_scale"] = slider(
        "words_scale", "Words by themselves", step=0.1, value=MIX_SCALES["words_scale"], maximum=10, info=NO_PICTURE
    )
    settings["num_images"] = slider(
        "num_images", "Pictures at once", value=num_images, step=1, info="Each from a seed of its own"
    )
    with gr.Row(elem_id="buttons"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100, scale=3)
        stop = gr.Button("Stop", elem_id="stop", min_width=60, scale=1)
    with gr.Column(elem_id="settings"):
        preset, more, lock, dice, view, embed, model = _build_settings(handlers, steps, models)
        keep, kept, polish = _build_keeping(polish_seconds)
        link, linked = _build_linking()
    settings |= more
    wire_presets(preset, settings)
    cards, extras = [card for card, _ in built], [extra for _, extra in built]
    return Panel(
        cards, extras, arrival, add, opened, prompt, bar, generate, stop, settings, lock, dice, view, embed,
        keep, kept, polish, link, linked, model,
    )  # fmt: skip


def _build_card(handlers: Handlers, index: int) -> tuple[Card, CardExtras]:
    letter = NAMES[index]
    with gr.Column(visible=index == 0, elem_classes="card", elem_id=f"card-{letter}", min_width=150) as panel:
        picture = gr.Image(
            label=f"Picture {letter}", type="filepath", image_mode=None, format="png", elem_classes="picture",
            sources=["upload", "clipboard", "webcam"], height=230, elem_id="picture" if not index else None,
            buttons=["fullscreen"], webcam_options=gr.WebcamOptions(mirror=False), alt_text=f"Your picture {letter}",
            placeholder=EMPTY_CARD,
        )  # fmt: skip
        word = gr.Textbox("", label=f"Code of picture {letter}", elem_id=f"word-{letter}", elem_classes="unseen")
        note = gr.HTML("", label=f"About picture {letter}", elem_classes="card-note")
        restore = gr.Button("Bring its settings back", size="sm", visible=False)
        remove = gr.Button(f"Remove picture {letter}", size="sm", visible=index > 0)
        with gr.Accordion(f"Adjust picture {letter}", open=False, elem_classes="adjust"):
            num_tokens = slider(
                "num_tokens", f"Tokens of {letter}", step=1, value=handlers.max_tokens, maximum=handlers.max_tokens,
                info="Few keep palette and light, many what is where", elem_id=f"tokens-{letter}",
            )  # fmt: skip
            weight = gr.Slider(
                WEIGHT_RANGE.minimum, WEIGHT_RANGE.maximum, 1, step=0.05, label=f"Weight of {letter}", min_width=120,
                info="0 says nothing, 1 is the picture as it is", elem_id=f"weight-{letter}",
            )  # fmt: skip
            with gr.Row(elem_classes="sight"):
                seen = gr.Image(
                    label=f"What the encoder sees of {letter}", format="png", interactive=False, height=96,
                    min_width=96, scale=0, buttons=[], elem_classes="seen", show_label=False,
                    elem_id="seen" if not index else None, alt_text=f"Picture {letter} as the encoder sees it",
                )  # fmt: skip
                fit = gr.Radio(
                    list(zip(_FIT_LABELS, FITS, strict=True)), value=FITS[0], scale=1, min_width=120,
                    label="What the encoder sees", elem_id=f"fit-{letter}",
                )  # fmt: skip
            name = gr.Textbox(
                letter, label="Name in the prompt", info=f"Write it in brackets: [{letter}]", max_length=MAX_NAME_CHARS
            )
            source = gr.Textbox("", label=_SOURCE, elem_id=f"source-{letter}")
    return Card(panel, picture, word, name, weight, num_tokens, fit, seen, note), CardExtras(source, restore, remove)


def _build_settings(
    handlers: Handlers, steps: int, models: Sequence[str]
) -> tuple[gr.Dropdown, dict[str, Component], gr.Checkbox, gr.Button, gr.Radio, gr.Checkbox, gr.Dropdown]:
    more: dict[str, Component] = {}
    with gr.Accordion("Settings", open=False, elem_id="more"):
        model = gr.Dropdown(
            list(models), value=handlers.pipeline.name if models else None, label="Model", filterable=False,
            visible=len(models) > 1, elem_id="model",
            info="Opens its page. Codes and .vilex files of a picture belong to the model that made them.",
        )  # fmt: skip
        preset = build_presets()
        with gr.Row(elem_id="seeds"):
            more["seed"] = gr.Number(0, label="Seed", precision=None, minimum=0, min_width=110, scale=1, elem_id="seed")
            lock = gr.Checkbox(False, label="Keep this seed", container=False, min_width=120, scale=1, elem_id="lock")
            dice = gr.Button("New seed", size="md", min_width=90, scale=1, elem_id="dice")
        more["num_inference_steps"] = slider(
            "num_inference_steps", "Steps", value=steps, step=1, maximum=100, info="Few are quick, many are clean"
        )
        more["guidance_scale"] = slider("guidance_scale", "Guidance", step=0.1)
        more["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", max_length=MAX_PROMPT_CHARS,
            info="What to move away from; the higher the guidance, the farther",
        )  # fmt: skip
        views = list(zip(["Enlarged", "As drawn"], VIEWS, strict=True))
        view = gr.Radio(views, value=VIEWS[0], label="Size of results", elem_id="view")
        embed = gr.Checkbox(
            False, label="Put the pictures' tokens into my PNGs", elem_id="embed",
            info="Then a result alone can be made again. Who gets such a PNG gets the pictures' content.",
        )  # fmt: skip
        with gr.Accordion("Sampler", open=False):
            more["scheduler"] = gr.Dropdown(
                schedulers(handlers), value=GenerationConfig.scheduler, label="Scheduler", filterable=False
            )
            more["guidance_low"] = slider("guidance_low", "Guidance from noise level", step=0.05)
            more["guidance_high"] = slider("guidance_high", "Guidance to noise level", step=0.05)
    return preset, more, lock, dice, view, embed, model


def _build_keeping(polish_seconds: float | None) -> tuple[gr.Button, list[Component], tuple[gr.Slider, gr.Button]]:
    with gr.Accordion("Keep picture A as a word", open=False, elem_id="keeping"):
        gr.Markdown("The word holds the tokens of the picture: who has it has the picture's content.")
        keep = gr.Button("Make the word", size="md", elem_id="keep")
        word = gr.File(label="The picture as a .vilex file", interactive=False, height=90)
        code = gr.Textbox(
            label="The picture as a code to copy", interactive=False, buttons=["copy"], lines=2, elem_id="code",
            info=f"Only for {MAX_COPIED} tokens or fewer: turn “Tokens of A” down to get one",
        )  # fmt: skip
        polish = build_polish(polish_seconds)
    return keep, [word, code], polish


def _build_linking() -> tuple[gr.Button, list[Component]]:
    with gr.Accordion("Link to this page", open=False, elem_id="linking"):
        gr.Markdown(
            "A link holds prompt, settings, seed and the first tokens of each picture, as many as fit into 32 kB, "
            "behind the # of the address, where no server's log sees them. Who has it has the pictures' content."
        )
        link = gr.Button("Copy a link to this page", size="md", elem_id="link")
        address = gr.Textbox(label="The link", interactive=False, buttons=["copy"], lines=2, max_lines=3)
        note = gr.HTML("", label="What the link holds", elem_id="link-note")
    return link, [address, note]


def slider(
    name: str, label: str, *, step: float, value: float | None = None, maximum: float | None = None, info: str = "",
    elem_id: str | None = None,
) -> gr.Slider:  # fmt: skip
    """A slider with the range, help and default of a setting."""
    bounds = range_of(GenerationConfig, name)
    return gr.Slider(
        bounds.minimum, maximum or bounds.maximum, getattr(GenerationConfig, name) if value is None else value,
        step=step, label=label, info=info or bounds.help, elem_id=elem_id or name.replace("_", "-"), min_width=140,
    )  # fmt: skip


def schedulers(handlers: Handlers) -> list[str]:
    """What the page offers, by the model's kind alone: it may not be loaded yet."""
    is_embedded = handlers.pipeline is None or handlers.pipeline.is_embedded
    return ["auto", *EmbeddedModel.schedulers] if is_embedded else list(SCHEDULERS)
