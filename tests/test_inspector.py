"""The tab Inspect: its table names words that are there, its map lies where the token looked."""

import re

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from app.cards import pack, pack_polished
from app.handlers import Handlers
from app.inspector import Inspector, attention_of, legend, overlay, words_table
from app.workbench import read_one
from vilex.codes import VilexCode
from vilex.pipeline import VilexPipeline
from vilex.recipe import load_recipe

pytest_plugins = ["tabs"]
A = {"card": "A", "token": 0}


@pytest.fixture
def tab(handlers) -> Inspector:
    return Inspector(handlers)


def leave_out(tab, cards, token, **changes):
    return list(tab.leave_out(**A | cards | {"view": "raw", "embed": False, "token": token} | changes))


def test_every_token_has_its_words_and_its_map(tab, cards):
    words, picture, said, status = tab.inspect(**A | cards)
    assert words.count('<th scope="row">') == 6 and words.count("<td>") == 6 * 4
    assert picture.size == (384, 384) and "The mean token looked" in said and "6 tokens of picture A" in status


def test_the_table_names_the_word_that_a_token_is(pipeline):
    table = pipeline.t2i.text_encoder.get_input_embeddings().weight
    ids = pipeline.t2i.tokenizer.convert_tokens_to_ids(["dog", "monet"])
    rows = re.findall(
        r'<th scope="row">(\d)</th><td>([^<]*)</td>.*?<td>([^<]*)</td></tr>', words_table(pipeline, table[ids])
    )
    assert rows == [("1", "dog 1.00", "0.0"), ("2", "monet 1.00", "0.0")]


def test_words_of_the_vocabulary_cannot_become_html(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.t2i.tokenizer, "convert_ids_to_tokens", lambda ids: ["<script>"] * len(ids))
    assert "<script>" not in (html := words_table(pipeline, torch.ones(2, 8))) and "&lt;script&gt;" in html


def test_the_map_is_that_of_the_token_in_shares(tab, cards, pipeline):
    word = read_one(tab.handlers, cards, "A")
    maps = pipeline.attention(word.image, "crop")[:6]
    places = maps[0].numel()
    np.testing.assert_allclose(attention_of(pipeline, word, 2), maps[1].numpy() * places, rtol=1e-5)
    np.testing.assert_allclose(attention_of(pipeline, word, 0), maps.mean(0).numpy() * places, rtol=1e-5)
    assert attention_of(pipeline, word, 3).mean() == pytest.approx(1, abs=1e-4)


def test_the_brightest_place_is_where_the_token_looked():
    heat = np.full((3, 3), 0.5, np.float32)
    heat[2, 0] = 5.0
    shown = np.asarray(overlay(Image.new("RGB", (90, 90), "grey"), heat).convert("L"), np.float32)
    means = shown.reshape(3, 30, 3, 30).mean((1, 3))
    assert np.unravel_index(means.argmax(), means.shape) == (2, 0)
    assert "most where it is yellow (5.0 times" in legend(heat, 7) and legend(heat, 7).startswith("Token 7")


def test_an_even_map_is_even_and_keeps_the_picture():
    even = np.asarray(overlay(Image.new("RGB", (40, 20), "grey"), np.ones((2, 2), np.float32)))
    assert even.shape == (20, 40, 3) and (even == even[0, 0]).all()
    half = Image.new("RGB", (40, 20), "black")
    half.paste("white", (0, 0, 20, 20))
    shown = np.asarray(overlay(half, np.ones((2, 2), np.float32)).convert("L"), np.float32)
    assert shown[:, :20].mean() > shown[:, 20:].mean() + 50


def test_a_card_that_came_as_a_code_has_words_but_no_map(tab, pipeline):
    code = {"word": pack(VilexCode(torch.ones(2, 8), pipeline.fingerprint))}
    words, picture, said, _ = tab.inspect(**A | code)
    assert words.count('<th scope="row">') == 2 and picture is None and "came as a code" in said
    assert tab.look(**A | code)[0] is None


def test_a_polished_picture_of_a_model_without_encoder_has_words_but_no_map(handlers, cards):
    bare = Handlers(VilexPipeline(handlers.pipeline.t2i, name="bare"))
    code = VilexCode(torch.ones(2, 8), bare.pipeline.fingerprint)
    word = {"picture": cards["picture"], "word": pack_polished(code, cards["picture"], "crop")}
    words, picture, said, _ = Inspector(bare).inspect(**A | word)
    assert words.count('<th scope="row">') == 2 and picture is None and "has no encoder" in said
    bare.engine.close()


@pytest.mark.parametrize("embed", [False, True])
def test_pngs_hold_the_tokens_only_when_asked(tab, cards, embed):
    pictures = leave_out(tab, cards, 2, embed=embed)[-1][0]
    assert [bool(load_recipe(path).images[0].code) for path, _ in pictures] == [embed] * 2


def test_another_token_gives_another_map(tab, cards):
    (first, said), (second, _) = (tab.look(**A | cards | {"token": token}) for token in (1, 2))
    assert "Token 1 looked" in said and first.tobytes() != second.tobytes()


def test_a_token_is_left_out_beside_the_whole_from_one_noise(tab, cards, pipeline, picture):
    pictures, status = leave_out(tab, cards, 2)[-1]
    assert [caption for _, caption in pictures] == ["all 6 tokens", "without token 2"]
    assert re.search(r"The two are \d+ % alike", status)
    tokens = pipeline.encode(picture, 6)[0]
    from vilex.config import GenerationConfig

    config = GenerationConfig(seed=5, num_inference_steps=3)
    for (path, _), kept in zip(pictures, (tokens, tokens[[0, 2, 3, 4, 5]]), strict=True):
        drawn = pipeline.generate("", [kept], config).images[0]
        assert np.abs(np.asarray(Image.open(path), int) - np.asarray(drawn, int)).max() <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": 7}, "token must be at most 6, the tokens of this picture, got 7"),
        ({"token": -1}, "token must be between 0 and 75, got -1"),
        ({"token": 1.5}, "token must be a whole number, got 1.5"),
        ({"token": "1"}, "token must be a number, got &#x27;1&#x27;"),
        ({"card": "D"}, "Picture D is empty"),
    ],
)
def test_bad_input_gets_one_sentence(tab, cards, changes, message):
    for function in (tab.inspect, tab.look):
        with pytest.raises(gr.Error) as caught:
            function(**A | cards | changes)
        assert message.replace("&#x27;", "'") in caught.value.message


@pytest.mark.parametrize(
    ("token", "changes", "message"),
    [
        (0, {}, "Choose a token to leave out"),
        (7, {}, "cannot leave out token 7 of 6"),
        (1, {"num_tokens": 1}, "cannot leave out token 1 of 1"),
        (1, {"view": ""}, "view must be one of"),
    ],
)
def test_what_cannot_be_left_out_is_told(tab, cards, token, changes, message):
    with pytest.raises(gr.Error, match=message):
        leave_out(tab, cards, token, **changes)
