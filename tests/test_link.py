"""The link that carries the page: what it holds, how long it gets, and what a foreign or altered one says."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import base64
import dataclasses
import json
import zlib
from typing import Any

import gradio as gr
import pytest
from test_restore import Everything, named, saved

from app.cards import unpack
from app.handlers import Handlers
from app.link import MARK, MAX_CHARS, from_link, share, to_link
from app.restore import Page, remember
from vilex.codes import VilexCode, from_text, to_text
from vilex.config import GenerationConfig

assert app
pytest_plugins = ["tabs"]


@pytest.fixture
def page(handlers: Handlers) -> Page:
    return Page(handlers, Everything(), ())


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What toasts say."""
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, title: said.append(text))
    return said


def opened(page: Page, link: object, memory: object = None) -> dict[str, Any]:
    """What changes on a page that a link opens, by name."""
    return named(page, remember(page, memory, link=link))


def packed(text: str) -> str:
    return MARK + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def altered(link: str, change: dict[str, Any]) -> str:
    """The link with other entries in its recipe; those of its first picture and settings are merged."""
    recipe = json.loads(zlib.decompress(base64.urlsafe_b64decode(link.removeprefix(MARK) + "==")))
    for name, value in change.items():
        if name == "image":
            recipe["images"][0] |= value
        elif isinstance(value, dict):
            recipe[name] |= value
        else:
            recipe[name] = value
    return packed(json.dumps(recipe))


def test_a_link_brings_prompt_settings_and_pictures_back(handlers, page, cards, told):
    settings = {"tfg_scale": 2.5, "words_scale": 1.5, "num_images": 3, "negative_prompt": "grün"}
    link, note = share(handlers, "[A] on [B]", **cards, **settings, weight_2=0.5)
    assert link.startswith(MARK) and len(link) <= MAX_CHARS
    assert "prompt, settings and 6 of 6 tokens of A, 4 of 4 tokens of B: who has it" in note
    assert f"It has {len(link):,} characters" in note
    values = opened(page, link)
    assert (values["prompt"], values["name"], values["name_2"], values["lock"]) == ("[A] on [B]", "A", "B", True)
    assert {name: values[name] for name in settings} == settings and values["seed"] == 5
    assert values["shown"] == [True, True, False, False] and values["picture"] is None
    for sent, back in zip(handlers.read_cards(dict(cards) | {"weight_2": 0.5}), ("word", "word_2"), strict=True):
        tokens = unpack(values[back], handlers.pipeline.fingerprint).vilex_tokens
        assert (tokens - sent.vilex_tokens).norm() < 0.01 * sent.vilex_tokens.norm()
    assert told == ["The settings are back, the seed is kept."]


def test_a_link_wins_over_what_the_browser_remembers(handlers, page, cards):
    link, _ = share(handlers, "a red boat", num_inference_steps=2)
    memory = saved(cards["picture"], num_inference_steps=9)
    remembered = opened(page, "", memory)
    assert remembered["prompt"] == "a dog" and remembered["arrival"] == remembered["picture"] != ""
    with_pictures, _ = share(handlers, "", **cards)
    assert "arrival" not in opened(page, with_pictures, memory)  # its word has the ladder drawn
    values = opened(page, link, memory)
    assert values["arrival"] == ""
    assert (values["prompt"], values["view"], values["lock"]) == ("a red boat", "raw", True)
    assert values["num_inference_steps"] == 2


def test_as_many_tokens_as_fit_are_in_the_link_and_no_more(handlers, cards, monkeypatch):
    whole, _ = share(handlers, "", **cards)
    monkeypatch.setattr("app.link.MAX_CHARS", len(whole) - 1)
    link, told = share(handlers, "", **cards)
    assert len(link) < len(whole) and "5 of 6 tokens of A, 4 of 4 tokens of B" in told
    assert [image.num_tokens for image in from_link(link).images] == [5, 4]


def test_a_link_leaves_out_the_content_of_what_its_prompt_leaves_out(handlers, cards):
    link, told = share(handlers, "[B] in snow", **cards)
    assert [bool(image.code) for image in from_link(link).images] == [False, True]
    assert "4 of 4 tokens of B" in told and "of A" not in told


def test_a_link_that_cannot_hold_one_token_of_each_picture_is_not_made(handlers, cards, monkeypatch):
    monkeypatch.setattr("app.link.MAX_CHARS", 300)
    with pytest.raises(gr.Error, match=r"the link would have \d+ characters, the limit is 300"):
        share(handlers, "", **cards)


def test_without_weights_there_is_no_link(empty):
    with pytest.raises(gr.Error, match="no weights"):
        share(empty, "a dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "recipe version 9, this ViLex reads 2"),
        ({"prompt": 3}, "prompt must be str, got int"),
        ({"prompt": "x" * 1001}, "the prompt has 1001 characters, the limit is 1000"),
        ({"config": {"num_inference_steps": 1000}}, "num_inference_steps must be between 1 and 100, got 1000"),
        ({"config": {"wings": 2}}, "unknown entry 'wings'"),
        ({"image": {"weight": 9}}, "weight must be between 0 and 2, got 9"),
        ({"image": {"name": "B"}}, "two pictures are called 'B'"),
        ({"image": {"code": "vilex-2:abc:AAAA"}}, "the code is damaged"),
        ({"image": {"code": "hello"}}, "a code starts with 'vilex-2:'"),
    ],
)
def test_a_link_that_was_tampered_with_gives_one_sentence(handlers, page, cards, warnings, told, change, message):
    link, _ = share(handlers, "", **cards)
    assert opened(page, altered(link, change)) == {} and told == []
    [said] = warnings
    assert said.startswith("This link cannot be opened: ") and message in said


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (MARK, "the link is damaged"),
        (MARK + "not a link", "the link is damaged"),
        (MARK + "é", "the link is damaged"),
        (packed("[]"), "a recipe is a JSON object, got list"),
        (packed("{" * 5000), "cannot be used"),
        (packed(" " * 10**6), "cannot be used"),
        (packed(" " * 10**6 + "{}"), "the link is damaged: it is cut off or too large"),
        (MARK + "x" * MAX_CHARS, "the link has 31007 characters, the limit is 31000"),
    ],
)
def test_what_is_no_link_gives_one_sentence(page, warnings, link, message):
    assert opened(page, link) == {}
    [said] = warnings
    assert message in said


@pytest.mark.parametrize("link", ["", None, 3, ["#vilex="]])
def test_a_page_without_a_link_opens_in_silence(page, warnings, link):
    assert opened(page, link) == {} and warnings == []


def test_a_cut_link_is_refused(handlers, page, cards, warnings):
    link, _ = share(handlers, "", **cards)
    assert opened(page, link[:-40]) == {}
    assert "the link is damaged" in warnings[0]


def test_a_link_of_another_model_is_refused_for_its_pictures_only(handlers, page, cards, warnings, told):
    foreign = {"fingerprint": "0" * 12, "model": "other"}
    words, _ = share(handlers, "a dog", seed=3)
    values = opened(page, altered(words, foreign))
    assert values["prompt"] == "a dog" and "other weights than those in use" in told[0]
    assert warnings == []
    recipe = dataclasses.replace(from_link(share(handlers, "", **cards)[0]), fingerprint="0" * 12)
    image = dataclasses.replace(recipe.images[0], code=_of_another_model(recipe.images[0].code))
    values = opened(page, to_link(dataclasses.replace(recipe, images=(image,))))
    assert values == {} and "the code was made by '000000000000'" in warnings[0]


def _of_another_model(code: str) -> str:
    return to_text(VilexCode(from_text(code).vilex_tokens, "0" * 12))


def test_a_link_keeps_all_settings(handlers):
    config = {
        "guidance_low": 0.25,
        "guidance_high": 0.75,
        "guidance_scale": 3.5,
        "scheduler": "ddim",
        "seed": 2**32 - 5,
    }
    link, _ = share(handlers, "a dog", **config)
    assert from_link(link).config == GenerationConfig(**config)
