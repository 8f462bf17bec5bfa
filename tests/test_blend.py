"""The tab Blend: its rows end at the pictures themselves, and what is chosen can be used as a picture."""

from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image

from app.blend import CUTS, Blend
from app.cards import unpack
from vilex.config import GenerationConfig
from vilex.recipe import load_recipe
from vilex.words import graft

pytest_plugins = ["tabs"]
SETTINGS = {"seed": 5, "num_inference_steps": 3}
FADE = {"first": "A", "second": "B", "count": 3, "view": "raw", "embed": False}
GRAFT = {"first": "A", "second": "B", "cut": 2, "row": False, "view": "raw", "embed": False}
ALGEBRA = {"first": "A", "minus": "dog", "plus": "cat", "strength": 1.0, "view": "raw", "embed": False}


@pytest.fixture
def tab(handlers) -> Blend:
    return Blend(handlers)


def fade(tab, cards, **changes):
    return list(tab.cross_fade(**FADE | cards | changes))


def drawn(tab, tokens):
    config = GenerationConfig(**SETTINGS)
    return tab.handlers.pipeline.generate("", [tokens], config).images[0]


def differ(path, image) -> int:
    pairs = zip(Image.open(path).tobytes(), image.tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_a_row_goes_from_one_picture_to_the_other_from_one_noise(tab, cards, picture):
    pictures, words, chosen, status = fade(tab, cards, count=4)[-1]
    assert [caption for _, caption in pictures] == ["0% B", "33% B", "67% B", "100% B"] and chosen is None
    assert [len(tokens) for tokens in words] == [6, 6, 4, 4] and "seed 5" in status
    pipeline = tab.handlers.pipeline
    a, b = pipeline.encode(picture, 6)[0], pipeline.encode(picture.rotate(180), 4)[0]
    for i, tokens in ((0, a), (-1, b)):
        torch.testing.assert_close(words[i], tokens)
        assert differ(pictures[i][0], drawn(tab, tokens)) <= 2
    assert differ(pictures[0][0], drawn(tab, b)) > 2


def test_unfinished_rows_are_previews_and_files_come_last(tab, cards):
    *unfinished, (paths, *_) = fade(tab, cards)
    previews = [update[0] for update in unfinished if update[0] != gr.skip()]
    assert previews and all(isinstance(image, Image.Image) for row in previews for image in row)
    assert {len(row) for row in previews} == {3} and [Path(path).suffix for path, _ in paths] == [".png"] * 3
    assert "step 3 of 3" in unfinished[-1][-1]


def test_a_result_carries_its_word_only_where_the_user_shares_it(tab, cards):
    kept, shared = (load_recipe(fade(tab, cards, embed=share)[-1][0][1][0]) for share in (False, True))
    assert [recipe.images[0].fit for recipe in (kept, shared)] == ["", ""] and not kept.images[0].code
    tokens = shared.images[0].tokens(tab.handlers.pipeline.fingerprint)
    assert len(tokens) == shared.config.num_tokens == 6


@pytest.mark.parametrize(("row", "cuts"), [(False, [2]), (True, sorted({2, *CUTS}))])
def test_a_graft_has_the_first_tokens_of_one_and_the_last_of_the_other(tab, cards, picture, row, cuts):
    pictures, words, _, _ = list(tab.graft(**GRAFT | cards | {"row": row}))[-1]
    assert [caption for _, caption in pictures] == [f"{cut} of A, then B" for cut in cuts]
    a, b = (tab.handlers.pipeline.encode(image)[0] for image in (picture, picture.rotate(180)))
    for tokens, cut in zip(words, cuts, strict=True):
        torch.testing.assert_close(tokens, graft(a, b, cut))
        assert len(tokens) == 75


def test_words_move_every_token_by_their_difference(tab, cards, picture):
    pictures, words, _, _ = list(tab.algebra(**ALGEBRA | cards | {"strength": 0.5}))[-1]
    assert [caption for _, caption in pictures] == ["A", "A - dog + cat"]
    table, tokenizer = (
        tab.handlers.pipeline.t2i.text_encoder.get_input_embeddings().weight,
        tab.handlers.pipeline.t2i.tokenizer,
    )
    dog, cat = (table[tokenizer.convert_tokens_to_ids(word)] for word in ("dog", "cat"))
    torch.testing.assert_close(words[1] - words[0], (0.5 * (cat - dog)).expand(6, -1))


def test_the_chosen_picture_becomes_the_word_of_a_card_and_draws_the_same(tab, cards):
    pictures, words, _, _ = fade(tab, cards)[-1]
    updates = tab.use(words, 1, "C")
    assert [update == gr.skip() for update in updates] == [True, True, False, True]
    code = unpack(updates[2], tab.handlers.pipeline.fingerprint)
    torch.testing.assert_close(code.vilex_tokens, words[1], rtol=1e-3, atol=1e-3)
    used = {"word_3": updates[2], "num_tokens_3": 75} | SETTINGS
    again = list(tab.cross_fade(**FADE | used | {"first": "C", "second": "C"}))[-1]
    assert differ(again[0][0][0], Image.open(pictures[1][0])) <= 2


def test_a_preview_is_no_word_yet(tab, cards):
    *before, last = fade(tab, cards)
    assert {str(words) for gallery, words, _, _ in before if gallery != gr.skip()} == {"()"}
    assert all(words == gr.skip() for gallery, words, _, _ in before if gallery == gr.skip())
    assert len(last[1]) == FADE["count"]
    with pytest.raises(gr.Error, match="Draw the pictures to their end first"):
        tab.use((), 1, "C")
    with pytest.raises(gr.Error, match="Choose one of the pictures first"):
        tab.use((), None, "C")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("cross_fade", {"count": 2}, "count must be between 3 and 9, got 2"),
        ("cross_fade", {"count": 3.5}, "count must be a whole number, got 3.5"),
        ("cross_fade", {"count": float("nan")}, "count must be a number, got nan"),
        ("cross_fade", {"second": "C"}, "Picture C is empty: give it a picture first"),
        ("cross_fade", {"first": "<b>"}, "The picture must be one of A, B, C, D, got '&lt;b&gt;'"),
        ("cross_fade", {"view": "huge"}, "view must be one of enlarged, raw, got 'huge'"),
        ("cross_fade", {"seed": -1}, "seed must be between 0 and"),
        ("graft", {"cut": 76}, "cut must be between 0 and 75, got 76"),
        ("graft", {"cut": None}, "cut must be a number, got None"),
        ("algebra", {"minus": " ", "plus": ""}, "Write words to take away or words to add"),
        ("algebra", {"plus": 3}, "The text to add must be text, got int"),
        ("algebra", {"plus": "x" * 1001}, "The text to add has 1001 characters, the limit is 1000"),
        ("algebra", {"strength": 5}, "strength must be between 0 and 4, got 5"),
        ("algebra", {"strength": float("inf")}, "strength must be a number, got inf"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(tab, cards, function, changes, message):
    defaults = {"cross_fade": FADE, "graft": GRAFT, "algebra": ALGEBRA}[function]
    with pytest.raises(gr.Error) as caught:
        list(getattr(tab, function)(**defaults | cards | changes))
    assert message in caught.value.message


@pytest.mark.parametrize("chosen", [None, 3, -1])
def test_nothing_chosen_is_told(tab, chosen):
    with pytest.raises(gr.Error, match="Choose one of the pictures first"):
        tab.use(tuple(torch.ones(3, 2, 8)), chosen, "A")
    with pytest.raises(gr.Error, match="card must be one of A, B, C, D, got 'E'"):
        tab.use(tuple(torch.ones(3, 2, 8)), 0, "E")


def test_without_weights_the_command_is_named(empty, cards):
    with pytest.raises(gr.Error, match="hf download a/b"):
        list(Blend(empty).cross_fade(**FADE | cards))


def test_closing_stops_the_drawing(tab, cards, monkeypatch):
    calls, denoise = [], tab.handlers.pipeline.t2i.denoise
    monkeypatch.setattr(tab.handlers.pipeline.t2i, "denoise", lambda *args: calls.append(1) or denoise(*args))
    job = tab.cross_fade(**FADE | cards | {"num_inference_steps": 100})
    next(update for update in job if "step" in update[-1])
    job.close()
    at_close = len(calls)
    fade(tab, cards)  # by the same thread, after what it was about
    assert at_close >= 1 and len(calls) <= at_close + 1 + cards["num_inference_steps"]


def test_settings_other_than_tokens_reach_the_drawing(tab, cards):
    recipe = load_recipe(fade(tab, cards, guidance_scale=3.5)[-1][0][0][0])
    expected = GenerationConfig(**SETTINGS | {"guidance_scale": 3.5, "num_tokens": 6, "scheduler": "sde-dpm++"})
    assert recipe.config == expected  # with what "auto" meant
