"""Settings by one choice: what is turned together for a quick look or for a careful drawing."""

import json

import gradio as gr
from gradio.components import Component

from app.studio import SILENT
from vilex.config import GenerationConfig

OWN = "As they are"
_GUIDANCE = GenerationConfig.guidance_scale
PRESETS = {
    "Quick look": {"num_images": 1, "num_inference_steps": 6, "guidance_scale": _GUIDANCE},
    "Four to choose from": {"num_images": 4, "num_inference_steps": 12, "guidance_scale": _GUIDANCE},
    "Closer to picture and words": {"num_images": 4, "num_inference_steps": 12, "guidance_scale": 4.0},
    "Careful": {"num_images": 2, "num_inference_steps": 30, "guidance_scale": _GUIDANCE},
}


def settings_of(name: str) -> tuple[float | dict, ...]:
    """Pictures at once, steps and guidance of a preset; no change for any other name."""
    return tuple(PRESETS[name].values()) if name in PRESETS else (gr.skip(),) * 3


def build_presets() -> gr.Dropdown:
    """The choice."""
    return gr.Dropdown(
        [OWN, *PRESETS], value=OWN, label="Preset", filterable=False, elem_id="preset",
        info="Sets pictures at once, steps and guidance, which can be turned further",
    )  # fmt: skip


def wire_presets(choice: gr.Dropdown, settings: dict[str, Component]) -> None:
    """Has the choice turn the settings, and let go of its name when one of them is turned by hand."""
    turned = [settings[name] for name in next(iter(PRESETS.values()))]
    choice.input(settings_of, choice, turned, **SILENT)
    gr.on([part.input for part in turned], None, None, choice, js=f"() => {json.dumps(OWN)}", **SILENT)
