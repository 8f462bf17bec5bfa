"""The tab About: what the weights in use are, may be used for and cannot do, and how to call them without the page."""

import re
from collections.abc import Iterable
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import yaml
from huggingface_hub import ModelCard
from torch import nn

from app import table
from app.messages import in_words
from app.studio import Studio
from vilex.cli import main as command_line
from vilex.pipeline import VilexPipeline
from vilex.recipe import environment

_ROOT = Path(__file__).resolve().parent.parent
LICENCE_FILE = _ROOT / "LICENSE_WEIGHTS"  # of the weights that come with the code
_SHOWN = {"base_model": "Builds on", "datasets": "Trained on", "language": "Language of the words", "tags": "Tags"}
_LIMITS = re.compile(r"^## [^\n]*\b(?:fails?|limits?|limitations|cannot)\b.*?(?=^## |\Z)", re.I | re.M | re.S)
_NO_CARD = "---\n{}\n---\nThese weights come without a model card (README.md)."
_PICTURE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")


_ALWAYS = (
    "* Nearest words and maps of where a token looked are hints, not facts.\n"
    "* A word of a picture (`.vilex`, code) works with these weights only, and who has it has the picture's content."
)


def build_about(studio: Studio, tab: gr.Tab) -> None:
    """Lays out the tab; the facts come when it is opened, since a model may not be loaded before."""
    pipeline, folder = studio.handlers.pipeline, studio.handlers.folder
    if pipeline is None:
        gr.HTML(without_weights(studio.handlers.problem), label="What to do")
    else:
        card = read_card(folder) if folder else ModelCard(_NO_CARD)
        limits, rest = split_limits(card.text)
        known = gr.HTML("", label="The weights in use", elem_id="facts")
        tab.select(partial(_facts, pipeline, card), None, known, show_progress="hidden", api_visibility="private")
        gr.Markdown(f"## What it cannot do\n{_ALWAYS}\n\n{limits}", elem_id="limits")
        with gr.Accordion("Model card", open=False):
            gr.Markdown(rest, elem_id="model-card")
    with gr.Accordion("From a shell and from other programs", open=False):
        gr.Markdown(commands())
    with gr.Accordion("Licences", open=False):
        gr.Markdown(licences(folder), elem_id="licences")
    with gr.Accordion("Versions", open=False):
        gr.HTML(versions(), label="Versions")


def read_card(folder: Path) -> ModelCard:
    """The model card of a weights folder; without one, or with one that cannot be read, a card that says so."""
    path = folder / "README.md"
    if not path.is_file():
        return ModelCard(_NO_CARD)
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return ModelCard("---\n{}\n---\nThe model card of these weights (README.md) cannot be read.")


def split_limits(text: str) -> tuple[str, str]:
    """The card's sections on what fails, and all the others, as Markdown that fetches no picture."""
    text = _PICTURE.sub(r"\1", text)
    limits = "\n".join(_LIMITS.findall(text)).strip()
    return limits or "The model card of these weights names no limits.", _LIMITS.sub("", text).strip()


def facts(pipeline: VilexPipeline, card: ModelCard) -> list[tuple[str, str]]:
    """Rows of a table on the weights: their name, licence, size and what they run on."""
    t2i, own = pipeline.t2i, card.data.to_dict()
    sizes = {"denoiser": t2i.denoiser, "text encoders (frozen)": t2i.text_encoders}
    if pipeline.vilex is not None:
        sizes = {"encoder and pooler": pipeline.vilex} | sizes
    rows = [
        ("Name", pipeline.name or "without a name"),
        ("Licence", _licence_name(own) or "none is named"),
        ("Parameters", ", ".join(f"{name} {_millions(module)}" for name, module in sizes.items())),
        ("Picture as drawn", f"{t2i.image_size} x {t2i.image_size} pixels"),
        ("Tokens of a picture", f"1 to {pipeline.max_tokens}, {t2i.text_width} numbers each"),
        ("Slots of a prompt", f"{t2i.max_tokens}, for pictures and words"),
        ("Fingerprint", pipeline.fingerprint),
        ("Device and number format", f"{pipeline.device.type}, {str(pipeline.dtype).removeprefix('torch.')}"),
    ]
    return rows + [(label, _text(own[key])) for key, label in _SHOWN.items() if own.get(key)]


def _facts(pipeline: VilexPipeline, card: ModelCard) -> str:
    with in_words():
        return about_weights(pipeline, card)


def about_weights(pipeline: VilexPipeline, card: ModelCard) -> str:
    """The facts as an HTML table."""
    return table.to_html("The weights in use", ("", ""), facts(pipeline, card))


def without_weights(problem: str) -> str:
    """What to do when there are none, as HTML."""
    return (
        f"<p>No weights are loaded: {escape(problem)}</p><p>Put a folder of weights into <code>assets/weights</code>, "
        "or start the app with <code>--model FOLDER</code>. To train your own, see “Train your own” in README.md.</p>"
    )


def versions() -> str:
    """The versions that decide what a picture looks like, as an HTML table."""
    return table.to_html("Versions", ("Software", "Version"), environment().items())


def commands() -> str:
    """How to call the same from a shell and from other programs, as Markdown."""
    names = "\n".join(
        f"| `vilex {name}` | {command.get_short_help_str(100)} |" for name, command in command_line.commands.items()
    )
    return (
        f"| Command | What it does |\n|---|---|\n{names}\n\nEach explains itself with `--help`. "
        "This page answers other programs too:\n\n```python\nfrom gradio_client import Client\n\n"
        'client = Client("http://127.0.0.1:7860")  # the address of this page\nclient.view_api()  # every call and '
        "its settings\n```"
    )


def licences(folder: Path | None) -> str:
    """The licences of code, weights and third parties, as Markdown."""
    weights = LICENCE_FILE if folder is None else licence_file(folder)
    texts = [path.read_text(encoding="utf-8") for path in (weights, _ROOT / "THIRD_PARTY.md") if path]
    return "\n\n".join(["The code of ViLex is under the Apache License 2.0 (`LICENSE`).", *texts])


def licence_file(folder: Path) -> Path | None:
    """The text of the licence of weights: their own LICENSE_WEIGHTS, or ours where their model card links to it."""
    own = folder / "LICENSE_WEIGHTS"
    if own.is_file():
        return own
    linked = read_card(folder).data.to_dict().get("license_link")
    is_ours = isinstance(linked, str) and (folder / linked).resolve() == LICENCE_FILE
    return LICENCE_FILE if is_ours and LICENCE_FILE.is_file() else None


def licence_line(folder: Path) -> str:
    """One line on the licence of the weights in a folder: of ours what it allows, else what they or their card name."""
    file, data = licence_file(folder), read_card(folder).data.to_dict()
    if file == LICENCE_FILE:
        terms = "non-commercial research and personal, educational and artistic study"
        return f"The weights and what they draw are for {terms}: share, do not sell (LICENSE_WEIGHTS)."
    named = _licence_name(data) or ("see LICENSE_WEIGHTS in their folder" if file else "")
    return f"Licence of the weights: {named}." if named else "The weights in use name no licence."


def _licence_name(data: dict[str, object]) -> str:
    return _text(data.get("license_name") or data.get("license") or "")


def _text(value: object) -> str:
    is_list = isinstance(value, Iterable) and not isinstance(value, str | dict)
    return ", ".join(map(str, value)) if is_list else str(value)


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M"
