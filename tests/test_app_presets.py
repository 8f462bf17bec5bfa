"""The app's presets of settings."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import gradio as gr
import pytest

from app.presets import OWN, PRESETS, settings_of
from vilex.config import GenerationConfig

assert app


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_settings_in_their_ranges(name):
    config = GenerationConfig(**PRESETS[name])
    assert settings_of(name) == (config.num_images, config.num_inference_steps, config.guidance_scale)


@pytest.mark.parametrize("name", [OWN, "nonsense", None])
def test_no_preset_changes_nothing(name):
    assert settings_of(name) == (gr.skip(),) * 3
