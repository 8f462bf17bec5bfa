"""What the app looks like and which button calls which handler."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.handlers import VIEWS, Handlers, duration, rung_name, times_html
from vilex.checkpoint import WEIGHTS_FOLDER
from vilex.config import MAX_PROMPT_CHARS, SCHEDULERS, GenerationConfig, range_of
from vilex.images import MAX_DECODES

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ("cat.jpg", "coffee.jpg", "rocket.jpg", "sailboat.png", "cactus.png")
PROMPTS = (
    "<image>, in the style of Claude Monet",
    "<image>, flat emoji",
    "oil painting of <image> by Vincent van Gogh",
    "a photo of a flower. <image>",
)
MAX_WAITING = 20  # requests in the queue
_COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 1}
_RANDOM_SEED = "Math.floor(Math.random() * 1e6)"  # short enough to read and to tell
_KEYS = """<script>
document.addEventListener("keydown", (event) => {
  const press = (id) => { event.preventDefault(); document.getElementById(id)?.click(); };
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") press("generate");
  else if (event.key === "Escape" && document.querySelector("#status progress")) press("stop");
});
</script>"""

_STOPPED = """(status) => status.includes("<progress") ? "<p>Stopped.</p>" : status"""

Settings = dict[str, gr.components.Component]  # by field of GenerationConfig


@dataclass(frozen=True)
class Notes:
    """What the page says about the machine and the weights."""

    steps: int = GenerationConfig.num_inference_steps
    seconds_per_step: float | None = None
    device: str = "cpu"
    licence: str = ""


@dataclass
class Controls:
    """Everything a user can turn, on the left."""

    picture: gr.Image
    seen: gr.Image
    fit: gr.Radio
    prompt: gr.Textbox
    bar: gr.HTML
    settings: Settings
    view: gr.Radio
    generate: gr.Button
    reconstruct: gr.Button
    stop: gr.Button
    lock: gr.Checkbox
    dice: gr.Button
    keep: gr.Button
    word: gr.File

    def inputs(self, *names: str) -> dict[str, gr.components.Component]:
        """Components by the name of the handler's argument, then the settings named."""
        own = {"picture": self.picture, "prompt": self.prompt, "fit": self.fit, "view": self.view}
        return {name: own.get(name) or self.settings[name] for name in names}


@dataclass
class Results:
    """What the right side shows."""

    status: gr.HTML
    rungs: list[gr.Image]
    times: gr.HTML
    gallery: gr.Gallery


def build_demo(handlers: Handlers, notes: Notes = Notes()) -> gr.Blocks:
    """The page, wired; `launch(**launch_options())` shows it."""
    with gr.Blocks(title="ViLex: an image is a word", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.HTML(_header(handlers, notes), elem_id="header")
        with gr.Row(elem_id="sides"):
            with gr.Column(scale=5, min_width=300, elem_id="left"):
                controls = _build_controls(handlers, notes)
            with gr.Column(scale=7, min_width=300, elem_id="right"):
                results = _build_results(handlers)
                examples = _build_examples(controls.picture, controls.prompt)
        gr.HTML(_footer(handlers, notes), elem_id="small-print")
        _wire(demo, handlers, controls, results, examples)
    return demo.queue(max_size=MAX_WAITING)


def launch_options() -> dict[str, Any]:
    """Arguments of Blocks.launch that belong to this page."""
    return {
        "theme": build_theme(),
        "css_paths": [Path(__file__).with_name("style.css")],
        "head": _KEYS,
        "show_error": True,
        "max_file_size": "20mb",
        "footer_links": ["api", "settings"],
    }


def build_theme() -> gr.themes.Base:
    """Warm greys and one ink blue; fonts of the system, so that nothing is fetched."""
    stone = gr.themes.Color(
        "#fafaf8", "#f3f2ee", "#e6e4de", "#d3d0c8", "#a8a49a", "#7b776e", "#5b584f", "#45423b", "#2a2824", "#1c1b18",
        "#121110", name="stone",
    )  # fmt: skip
    ink = gr.themes.Color(
        "#eef3f7", "#dbe6ee", "#b9cedd", "#8eb0c7", "#5d8cab", "#3f7190", "#2f5a76", "#264961", "#1f3b4f", "#172c3b",
        "#0f1e29", name="ink",
    )  # fmt: skip
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue=ink, secondary_hue=ink, neutral_hue=stone, font=sans,
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"], radius_size="md",
    )  # fmt: skip
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_large_text_size="*text_md",
        button_large_text_weight="600",
        slider_color="*primary_500",
    )


def weights_licence(folder: Path) -> str:
    """One line on the licence of the weights in a folder: its LICENSE_WEIGHTS, its model card, or ours."""
    own = folder / "LICENSE_WEIGHTS"
    shipped = ROOT / "LICENSE_WEIGHTS"
    if own.is_file() or (folder.resolve().is_relative_to(WEIGHTS_FOLDER) and shipped.is_file()):
        return "The weights are for non-commercial research and personal use (LICENSE_WEIGHTS)."
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("license:", "license_name:"))]
    return f"Licence of the weights: {named[-1]}." if named else "The weights in use name no licence."


def _header(handlers: Handlers, notes: Notes) -> str:
    banners = []
    if handlers.problem:
        banners.append(f"<strong>No weights are loaded.</strong> {escape(handlers.problem)}")
    elif notes.device == "cpu" and notes.seconds_per_step is not None:
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


def _build_controls(handlers: Handlers, notes: Notes) -> Controls:
    picture = gr.Image(
        label="Picture", type="filepath", image_mode=None, format="png", sources=["upload", "clipboard", "webcam"],
        height=250, elem_id="picture", buttons=["fullscreen"],
        webcam_options=gr.WebcamOptions(mirror=False), alt_text="Your picture",
    )  # fmt: skip
    with gr.Row(elem_id="sight"):
        seen = gr.Image(
            label="Seen by the encoder", format="png", interactive=False, height=112, min_width=112, scale=0,
            buttons=[], elem_id="seen", show_label=False, alt_text="The picture as the encoder sees it",
        )  # fmt: skip
        fit = gr.Radio(
            [("Crop to the centre", "crop"), ("Keep all of it", "pad")], value="crop", label="What the encoder sees",
            min_width=150, scale=1, elem_id="fit",
        )  # fmt: skip
    prompt = gr.Textbox(
        "", label="Prompt", placeholder="<image>, in the style of Claude Monet", lines=2, max_length=MAX_PROMPT_CHARS,
        info="<image> stands for the picture. Leave it empty for variations.", elem_id="prompt",
    )  # fmt: skip
    bar = gr.HTML(label="Slots of the prompt", elem_id="budget")
    with gr.Row(elem_id="buttons"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100, scale=2)
        reconstruct = gr.Button("Reconstruct", elem_id="reconstruct", min_width=90, scale=1)
        stop = gr.Button("Stop", elem_id="stop", min_width=60, scale=1)
    with gr.Column(elem_id="settings"):
        settings, lock, dice = _build_settings(handlers)
        more, view = _build_more_settings(handlers, notes)
        keep, word = _build_keeping()
    settings |= more
    return Controls(
        picture, seen, fit, prompt, bar, settings, view, generate, reconstruct, stop, lock, dice, keep, word
    )  # fmt: skip


def _build_settings(handlers: Handlers) -> tuple[Settings, gr.Checkbox, gr.Button]:
    settings: Settings = {}
    settings["num_images"] = _slider("num_images", "Variations", value=4, step=1)
    settings["num_tokens"] = _slider(
        "num_tokens", "Tokens of the picture", value=handlers.max_tokens, step=1, maximum=handlers.max_tokens,
        info="Few keep the subject, many the layout",
    )  # fmt: skip
    settings["tfg_scale"] = _slider("tfg_scale", "Words against picture (TFG)", step=0.1, maximum=10)
    with gr.Row(elem_id="seeds"):
        settings["seed"] = gr.Number(0, label="Seed", precision=None, minimum=0, min_width=110, scale=1, elem_id="seed")
        lock = gr.Checkbox(False, label="Keep this seed", container=False, min_width=120, scale=1, elem_id="lock")
        dice = gr.Button("New seed", size="md", min_width=90, scale=1, elem_id="dice")
    return settings, lock, dice


def _build_more_settings(handlers: Handlers, notes: Notes) -> tuple[Settings, gr.Radio]:
    more: Settings = {}
    with gr.Accordion("More settings", open=False):
        more["num_inference_steps"] = _slider("num_inference_steps", "Steps", value=notes.steps, step=1, maximum=100)
        more["guidance_scale"] = _slider("guidance_scale", "Guidance", step=0.1)
        more["scheduler"] = gr.Dropdown(
            _schedulers(handlers), value=GenerationConfig.scheduler, label="Scheduler", filterable=False
        )
        more["guidance_low"] = _slider("guidance_low", "Guidance from noise level", step=0.05)
        more["guidance_high"] = _slider("guidance_high", "Guidance to noise level", step=0.05)
        more["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", max_length=MAX_PROMPT_CHARS,
            info="What to move away from; has an effect at guidance other than 1",
        )  # fmt: skip
        views = list(zip(["Enlarged", "As drawn"], VIEWS, strict=True))
        view = gr.Radio(views, value=VIEWS[0], label="Size of results", elem_id="view")
    return more, view


def _build_keeping() -> tuple[gr.Button, gr.File]:
    with gr.Accordion("Keep the picture as a word", open=False):
        gr.Markdown("A `.vilex` file holds the tokens of the picture: who has it has the picture's content.")
        keep = gr.Button("Make a .vilex file", size="md", elem_id="keep")
        word = gr.File(label="The picture as a word", interactive=False, height=90)
    return keep, word


def _slider(
    name: str, label: str, *, step: float, value: float | None = None, maximum: float | None = None, info: str = ""
) -> gr.Slider:
    bounds = range_of(GenerationConfig, name)
    return gr.Slider(
        bounds.minimum, maximum or bounds.maximum, getattr(GenerationConfig, name) if value is None else value,
        step=step, label=label, info=info or bounds.help, elem_id=name.replace("_", "-"), min_width=140,
    )  # fmt: skip


def _schedulers(handlers: Handlers) -> list[str]:
    # Euler is for latent models: nothing clips it in pixel space
    is_embedded = handlers.pipeline is None or handlers.pipeline.t2i.embedded
    return [name for name in SCHEDULERS if not (is_embedded and name == "euler")]


def _build_results(handlers: Handlers) -> Results:
    status = gr.HTML("<p>Ready.</p>", label="What is happening", elem_id="status")
    with gr.Row(elem_id="rungs"):
        rungs = [_rung(count) for count in handlers.rungs]
    times = gr.HTML(times_html(handlers.rungs), label="Time of each reconstruction", elem_id="times")
    gallery = gr.Gallery(
        label="Variations and mixes", format="png", columns=4, object_fit="contain", interactive=False,
        elem_id="gallery", buttons=["download", "download_all", "fullscreen"], height="auto",
    )  # fmt: skip
    return Results(status, rungs, times, gallery)


def _rung(num_tokens: int) -> gr.Image:
    name = rung_name(num_tokens)
    return gr.Image(
        label=name, format="png", type="filepath", interactive=False, min_width=90, buttons=["download", "fullscreen"],
        elem_id=f"rung-{num_tokens}", elem_classes="rung", show_label=False,
        alt_text=f"The picture rebuilt from {name}",
    )  # fmt: skip


def _build_examples(picture: gr.Image, prompt: gr.Textbox) -> gr.Examples:
    folder = ROOT / "assets" / "examples"
    pictures = [[str(folder / name)] for name in EXAMPLES]
    hidden = {"cache_examples": False, "api_visibility": "private"}
    examples = gr.Examples(pictures, [picture], label="Example pictures", **hidden)
    gr.Examples([[text] for text in PROMPTS], [prompt], label="Example prompts", **hidden)
    return examples


def _wire(demo: gr.Blocks, handlers: Handlers, controls: Controls, results: Results, examples: gr.Examples) -> None:
    """Every event. Inputs go to handlers unprocessed: gradio would open the file itself and word its own errors."""
    silent = {"show_progress": "hidden", "queue": False, "preprocess": False, "api_visibility": "private"}
    job = {"show_progress": "minimal", "show_progress_on": results.status, "preprocess": False, **_COMPUTE}
    shared = ("num_inference_steps", "guidance_scale", "scheduler", "guidance_low", "guidance_high", "negative_prompt")
    rebuild_inputs = controls.inputs("picture", "fit", "view", "seed", *shared)
    rebuilt = [*results.rungs, results.times, results.status]
    draw_inputs = controls.inputs(
        "picture", "prompt", "fit", "view", "num_images", "num_tokens", "tfg_scale", "seed", *shared
    )

    # A page runs the listeners of one event in the order they were made: what a new picture makes obsolete
    # is cancelled before the picture is looked at, and the change of what the encoder sees starts the rest.
    automatic = controls.seen.change(
        handlers.reconstruct_new, None, rebuilt, inputs_kwargs=rebuild_inputs, api_visibility="private",
        trigger_mode="always_last", **job,
    )  # fmt: skip
    rebuild = controls.reconstruct.click(
        handlers.reconstruct, None, rebuilt, inputs_kwargs=rebuild_inputs, api_name="reconstruct", **job
    )
    draw = controls.generate.click(
        handlers.generate, None, [results.gallery, controls.settings["seed"], results.status],
        inputs_kwargs=draw_inputs, js=_draw_seed(list(draw_inputs).index("seed")), api_name="generate", **job,
    )  # fmt: skip
    controls.keep.click(
        handlers.encode, None, controls.word, inputs_kwargs=controls.inputs("picture", "fit", "num_tokens"),
        api_name="encode", **job,
    )  # fmt: skip
    # `input` comes once per picture, `change` sometimes twice
    gr.on(
        [controls.stop.click, controls.picture.input, examples.dataset.click], None,
        cancels=[automatic, rebuild, draw], api_visibility="private",
    )  # fmt: skip
    for event in (automatic, rebuild, draw):
        _say_stopped(event, results.status)
    # queued, since only queued events show their errors
    for listen in (controls.picture.input, controls.fit.change, examples.load_input_event.then):
        listen(
            handlers.look, [controls.picture, controls.fit], controls.seen, show_progress="hidden", preprocess=False,
            concurrency_limit=MAX_DECODES, concurrency_id="look", api_visibility="private",
        )  # fmt: skip
    gr.on(
        [demo.load, controls.picture.change, controls.prompt.change, controls.settings["num_tokens"].change],
        handlers.plan, [controls.picture, controls.prompt, controls.settings["num_tokens"]],
        [controls.bar, controls.settings["tfg_scale"]], trigger_mode="always_last", **silent,
    )  # fmt: skip
    controls.dice.click(None, None, controls.settings["seed"], js=f"() => {_RANDOM_SEED}", api_visibility="private")
    controls.view.change(
        None, controls.view, js="(view) => { document.body.classList.toggle('as-drawn', view === 'raw') }",
        api_visibility="private",
    )  # fmt: skip


def _say_stopped(event: gr.events.Dependency, status: gr.HTML) -> None:
    """Says so when an event was stopped, once the page takes the next one.

    A page ignores clicks for an event until the server has answered its cancellation. Only then does it report a
    failure, but progress that was under way may still come; the stream of a stopped event then ends as a success.
    """
    for listen in (event.failure, event.success):
        listen(None, status, status, js=_STOPPED, show_progress="hidden", api_visibility="private")


def _draw_seed(position: int) -> str:
    """JavaScript that puts a new seed among the inputs unless the user keeps the old one."""
    return f"""(...inputs) => {{
      if (!document.querySelector("#lock input").checked) inputs[{position}] = {_RANDOM_SEED};
      return inputs;
    }}"""
