"""Two models in one app, in a real browser: the choice in the settings leads to the page of the other one."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, expect

from app.handlers import Handlers
from app.ui import Notes, build_demo, launch_options
from tests.e2e.conftest import free_port, open_app, unfold
from tests.e2e.test_app import download, open_settings, set_slider, wait_drawn
from train.presets import PRESETS
from vilex.codes import VilexCode, to_text
from vilex.encoder import build_encoder
from vilex.model import ViLex
from vilex.pipeline import VilexPipeline
from vilex.recipe import load_recipe

assert app


@pytest.fixture
def address(pipeline: VilexPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An app of two tiny random models, "tiny" of 75 tokens and "small" of 16."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    pooler = dataclasses.replace(PRESETS["tiny"].pooler, text_width=8, num_queries=16)
    small = VilexPipeline(pipeline.t2i, ViLex(build_encoder(PRESETS["tiny"].encoder), pooler), "small")
    both = [Handlers(each) for each in (pipeline, small)]
    demo = build_demo(both[0], others=[(both[1], Notes())])
    demo.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **launch_options())
    yield demo.local_url.rstrip("/")
    demo.close()
    for each in both:
        each.engine.close()


def test_the_choice_of_a_model_leads_to_its_page(browser: Browser, address: str, pipeline: VilexPipeline) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = open_app(context.new_page(), address)
        page.locator("#prompt textarea").fill("a red dog")
        expect(page.locator("#small-print")).to_contain_text("Model: tiny.")
        expect(page.locator(".nav-holder")).not_to_be_visible()
        unfold(page, "Adjust picture A")
        source = page.locator("#source-A").get_by_role("textbox")
        source.fill(to_text(VilexCode(torch.ones(2, 8), pipeline.fingerprint)))
        source.press("Enter")
        expect(page.get_by_text("A word of 2 tokens")).to_be_visible()
        open_settings(page)
        set_slider(page, "num-inference-steps", 2)
        page.get_by_label("Model").click()
        page.get_by_role("option", name="small").click()
        page.wait_for_url("**/model-small")
        page.locator("#budget .bar").wait_for()
        expect(page.locator("#small-print")).to_contain_text("Model: small.")
        expect(page.locator("#prompt textarea")).to_have_value("a red dog")  # the browser remembers it for all pages
        unfold(page, "Adjust picture A")
        expect(page.locator("#tokens-A input[type=range]")).to_have_attribute("max", "16")
        open_settings(page)
        set_slider(page, "num-images", 1)
        page.get_by_role("button", name="Generate").click()
        assert load_recipe(download(page, wait_drawn(page, 1)[0])).model == "small"
        page.get_by_label("Model").click()
        page.get_by_role("option", name="tiny").click()
        page.wait_for_url(f"{address}/")
        expect(page.locator("#small-print")).to_contain_text("Model: tiny.")
        expect(page.get_by_text("A word of 2 tokens")).to_be_visible()  # which only this model can read
