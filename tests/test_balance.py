"""The tab Balance: a map from one noise, row by row, whose places say what their settings were."""

from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from PIL import Image

from app.balance import MOST_STEPS, Balance
from app.cards import MAX_CARDS, card_key, pack
from vilex.codes import VilexCode
from vilex.config import GenerationConfig
from vilex.recipe import load_recipe

pytest_plugins = ["tabs"]
PROMPT = {"prompt": "[A] a red dog"}


@pytest.fixture
def tab(handlers) -> Balance:
    return Balance(handlers)


@pytest.fixture
def one(cards) -> dict:
    """A request with picture A alone."""
    return {name: value for name, value in cards.items() if not name.endswith("_2")}


def test_the_map_fills_row_by_row_and_ends_complete(tab, one):
    updates = list(tab.draw(**PROMPT | one))
    sizes = [len(gallery) for gallery, _ in updates if gallery != gr.skip()]
    assert sizes == sorted(sizes) and set(sizes) == {4, 8, 12, 16}
    captions = [text for _, text in updates[-1][0]]
    assert captions[:5] == [
        "1 token, TFG 0",
        "4 tokens, TFG 0",
        "16 tokens, TFG 0",
        "75 tokens, TFG 0",
        "1 token, TFG 1",
    ]
    assert "seed 5" in updates[-1][1] and any("step 4 of 12" in status for _, status in updates)


def test_a_code_of_few_tokens_is_not_said_to_have_more(tab, pipeline):
    word = {"word": pack(VilexCode(torch.ones(2, 8), pipeline.fingerprint)), "name": "A", "seed": 5}
    captions = [text for _, text in list(tab.draw(**PROMPT | word))[-1][0]]
    assert captions[:4] == ["1 token, TFG 0", "2 tokens, TFG 0", "2 tokens, TFG 0", "2 tokens, TFG 0"]


@pytest.mark.parametrize(("words_scale", "asked", "drawn_in"), [(0.0, 3, 3), (2.0, 50, MOST_STEPS)])
def test_each_thumbnail_is_what_its_settings_draw(tab, one, picture, words_scale, asked, drawn_in):
    one |= {"num_inference_steps": asked}
    gallery = list(tab.draw(**PROMPT | one, words_scale=words_scale))[-1][0]
    for place in (1, 10, 15):
        num_tokens, tfg_scale = tab.cells[place]
        scales = {"tfg_scale": tfg_scale, "words_scale": words_scale}
        config = GenerationConfig(seed=5, num_inference_steps=drawn_in, num_tokens=num_tokens, **scales)
        drawn = tab.handlers.pipeline.generate(PROMPT["prompt"], [picture], config, names=["A"]).images[0]
        path = gallery[place][0]
        pairs = zip(Image.open(path).tobytes(), drawn.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 2, tab.cells[place]
        recipe = load_recipe(path)
        assert (recipe.prompt, recipe.config) == (PROMPT["prompt"], replace(config, scheduler="sde-dpm++"))
        assert [(image.num_tokens, image.code) for image in recipe.images] == [(num_tokens, "")]


@pytest.mark.parametrize(("prompt", "used"), [("<image>, at night", [0]), ("at night", [0, 1]), ("[B] red", [1])])
def test_a_click_takes_both_settings_over_for_the_pictures_in_the_prompt(tab, cards, prompt, used):
    empty = {card_key(name, i): value for i in range(MAX_CARDS) for name, value in (("picture", None), ("word", ""))}
    inputs = {"prompt": prompt} | empty | cards
    *counts, tfg_scale, status = tab.adopt(list(inputs), SimpleNamespace(index=9), *inputs.values())
    assert counts == [4 if i in used else gr.skip() for i in range(MAX_CARDS)]
    assert tfg_scale == 3 and "4 tokens, TFG 3" in status


@pytest.mark.parametrize("prompt", ["", "<image>", "[A]"])
def test_a_map_needs_a_picture_and_words(tab, one, prompt):
    with pytest.raises(gr.Error, match="needs a picture and words"):
        list(tab.draw(prompt, **one))


def test_a_map_without_a_picture_is_refused(tab):
    with pytest.raises(gr.Error, match="needs a picture and words"):
        list(tab.draw("a red dog", seed=5))


def test_a_broken_setting_gets_one_sentence(tab, one):
    with pytest.raises(gr.Error, match="guidance_scale must be between 0 and 20, got 99"):
        list(tab.draw(**PROMPT | one | {"guidance_scale": 99}))
