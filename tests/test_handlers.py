"""The app's handlers on a tiny random pipeline, without a browser."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image, ImageChops

from app import budget, ladder, pictures, polish, ui
from app.cards import CardInput, pack, pack_polished, read_card, take_cards, unpack
from app.handlers import Handlers, build_config, measure
from vilex.codes import VilexCode, from_text, load_code
from vilex.config import GenerationConfig
from vilex.pipeline import VilexPipeline
from vilex.recipe import load_recipe

assert app
STEPS = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def handlers(pipeline: VilexPipeline) -> Iterator[Handlers]:
    handlers = Handlers(pipeline)
    yield handlers
    handlers.engine.close()


@pytest.fixture
def upload(picture: Image.Image, cache: Path) -> dict[str, str]:
    picture.save(cache / "my corner.png")
    return {"path": str(cache / "my corner.png"), "orig_name": "my corner.png"}


@pytest.fixture
def calls(pipeline: VilexPipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the denoiser's calls."""
    seen, denoise = [], pipeline.t2i.denoise
    monkeypatch.setattr(pipeline.t2i, "denoise", lambda x, *rest: seen.append(len(x)) or denoise(x, *rest))
    return seen


def rebuild(handlers: Handlers, upload: dict, **changes: object) -> list[tuple]:
    settings = {"fit": "crop", "view": "raw", "seed": 5, "num_inference_steps": STEPS, "budgets": "1, 16, 75"}
    return list(ladder.climb(handlers, picture=upload, **settings | changes))


def draw(handlers: Handlers, upload: dict | None, prompt: object = "", **changes: object) -> list[tuple]:
    settings = {"fit": "crop", "view": "raw", "seed": 5, "num_inference_steps": STEPS, "num_images": 2} | changes
    return list(handlers.generate(**{"prompt": prompt, "picture": upload} | settings))


def is_skipped(value: object) -> bool:
    return value == gr.skip()


def test_the_ladder_fills_in_its_rungs_cheapest_first(handlers, upload):
    updates = rebuild(handlers, upload)
    paths, texts, status = updates[-1][:6], updates[-1][6:12], updates[-1][12]
    assert [load_recipe(path).config.num_tokens for path in paths[:3]] == [1, 16, 75]
    assert paths[3:] == (None,) * 3 and texts[3:] == ("",) * 3
    assert all(re.search(r"\d+ % alike · \d", text) for text in texts[:3])
    assert "seed 5" in status and "<progress" not in status
    first_path = next(i for i, update in enumerate(updates) if isinstance(update[0], str))
    assert all(update[1] is None or is_skipped(update[1]) for update in updates[: first_path + 1])


def test_reconstructions_are_the_pipelines_own(handlers, upload, picture):
    paths = rebuild(handlers, upload)[-1][:3]
    config = GenerationConfig(seed=5, num_inference_steps=STEPS)
    expected = [generation.images[0] for _, generation in handlers.pipeline.reconstruct(picture, [1, 16, 75], config)]
    assert [Image.open(path).tobytes() for path in paths] == [image.tobytes() for image in expected]


def test_rungs_in_one_batch_are_those_drawn_one_by_one(handlers, upload, monkeypatch):
    one_by_one = rebuild(handlers, upload)[-1][:3]
    monkeypatch.setattr(ladder, "_groups", lambda _, rungs: [list(rungs)])
    together = rebuild(handlers, upload)[-1][:3]
    for path, other in zip(one_by_one, together, strict=True):
        difference = ImageChops.difference(Image.open(path), Image.open(other))
        assert max(high for _, high in difference.getextrema()) <= 2


@pytest.mark.parametrize(("text", "budgets"), [("4", [4]), ("75, 1;4 16", [1, 4, 16, 75]), (" 3,3 ", [3])])
def test_budgets_are_read_as_written(text, budgets):
    assert ladder.parse_budgets(text, 75) == budgets


@pytest.mark.parametrize("text", ["", "many", "0", "76", "1.5", "-1", "1,,2", "1 2 3 4 5 6 7", None, "9" * 99, "<b>"])
def test_budgets_that_cannot_be_are_refused(handlers, upload, calls, text):
    with pytest.raises(gr.Error, match="Tokens to rebuild from are 1 to 6 whole numbers from 1 to 75") as error:
        rebuild(handlers, upload, budgets=text)
    assert not calls and "<b>" not in error.value.message


def test_new_budgets_get_their_columns_and_bad_or_equal_ones_change_nothing(handlers):
    columns = ladder.lay_out(handlers, "1, 4", [1, 16, 75])
    assert [column["visible"] for column in columns[:6]] == [True, True, False, False, False, False]
    assert columns[-1] == [1, 4] and [button.get("value") for button in columns[18:20]] == ["Use 1", "Use 4"]
    for text in ("1,16 75", "many"):
        assert all(map(is_skipped, ladder.lay_out(handlers, text, [1, 16, 75])))


def test_what_was_said_of_the_last_ladder_goes_with_its_pictures_and_not_before(handlers, upload):
    updates = rebuild(handlers, upload)
    first = next(i for i, update in enumerate(updates) if not is_skipped(update[0]))
    assert all(is_skipped(part) for update in updates[:first] for part in update[:-1]) and updates[first][0] is not None
    texts = updates[first][ladder.MAX_RUNGS : -1]
    assert texts[:3] == tuple(map(ladder.rung_html, (1, 16, 75))) and "alike" not in "".join(texts)


def test_use_sets_the_tokens_of_the_picture_that_was_rebuilt():
    count, status = ladder.use(1, [1, 16])
    assert count == 16 and "Picture A now speaks with at most 16 tokens" in status


def test_status_counts_steps_and_time(handlers, upload):
    waiting, *statuses, _ = [update[-1] for update in draw(handlers, upload)]
    assert "Starting" in waiting and "<progress" in waiting
    assert [re.search(r"step (\d) of 3 · \d+\.\d s left", status)[1] for status in statuses] == ["1", "2", "3"]


def test_generate_gives_the_pictures_of_their_seeds_with_recipes(handlers, upload, picture):
    pictures, seed, status = draw(handlers, upload, "<image> in style of monet")[-1]
    assert seed == 5 and status.startswith("<p>Drawn in")
    assert [caption for _, caption in pictures] == ["seed 5", "seed 6"]
    recipes = [load_recipe(path) for path, _ in pictures]
    assert [recipe.config.seed for recipe in recipes] == [5, 6]
    assert {recipe.prompt for recipe in recipes} == {"<image> in style of monet"}
    assert {(i.name, i.num_tokens, i.fit, i.code) for r in recipes for i in r.images} == {("", 75, "crop", "")}
    config = GenerationConfig(seed=5, num_inference_steps=STEPS, num_images=2)
    expected = handlers.pipeline.generate("<image> in style of monet", [picture], config).images
    assert [Image.open(path).tobytes() for path, _ in pictures] == [image.tobytes() for image in expected]


def test_words_alone_and_a_picture_alone_are_enough(handlers, upload):
    assert len(draw(handlers, None, "a red dog")[-1][0]) == 2
    assert len(draw(handlers, upload)[-1][0]) == 2


@pytest.mark.parametrize(("prompt", "scales"), [("<image>", (1.0, 0.0)), ("<image>, a red dog", (6.0, 2.0))])
def test_where_the_sliders_of_words_are_greyed_they_say_nothing(handlers, upload, prompt, scales):
    pictures, _, status = draw(handlers, upload, prompt, tfg_scale=6.0, words_scale=2.0)[-1]
    config = load_recipe(pictures[0][0]).config
    assert (config.tfg_scale, config.words_scale) == scales and "no effect" not in status


def test_where_there_is_nothing_to_draw_the_page_stays_where_it_is():
    for asked in (("a dog", None, ""), ("", None, "word"), ("", {"path": "photo.png"}, "")):
        assert pictures.show_tab(*asked)[0].selected == "pictures"
    assert all(map(is_skipped, pictures.show_tab(" ", None, "")))


def test_what_did_not_fit_is_said(handlers, upload):
    status = draw(handlers, upload, "dog " * 30)[-1][-1]
    assert "Image 1 keeps 1 of 75 tokens; the last words did not fit" in status


def test_enlarged_results_are_enlarged(handlers, upload):
    large = Handlers(handlers.pipeline, lambda image: image.resize((128, 128)))
    assert {Image.open(path).size for path, _ in draw(large, upload, view="enlarged")[-1][0]} == {(128, 128)}
    assert {Image.open(path).size for path, _ in draw(large, upload, view="raw")[-1][0]} == {(32, 32)}


def test_each_request_has_a_folder_of_its_own_in_the_cache(handlers, upload, cache):
    folders = {Path(path).parent for _ in range(2) for path, _ in draw(handlers, upload)[-1][0]}
    assert len(folders) == 2 and {folder.parent for folder in folders} == {cache}


def test_encode_writes_tokens_for_this_model(handlers, upload, picture):
    path, text = handlers.encode(picture=upload, fit="pad", num_tokens=7)
    code = load_code(path, handlers.pipeline.fingerprint)
    assert Path(path).name == "my-corner.vilex" and code.vilex_tokens.shape == (7, 8)
    assert torch.equal(code.vilex_tokens, handlers.pipeline.encode(picture, 7, "pad")[0].half().float())
    assert not torch.equal(code.vilex_tokens, handlers.pipeline.encode(picture, 7)[0].half().float())
    assert text == ""
    _, text = handlers.encode(picture=upload, fit="pad", num_tokens=2)
    assert from_text(text, handlers.pipeline.fingerprint).vilex_tokens.shape == (2, 8)


@pytest.mark.parametrize("name", ["climb", "generate"])
def test_closing_stops_within_one_step(handlers, upload, calls, caplog, name):
    caplog.set_level("INFO", "app")
    shared = {"picture": upload, "fit": "crop", "view": "raw", "seed": 0, "num_inference_steps": 100}
    starts = {
        "climb": lambda: ladder.climb(handlers, budgets="1, 2", **shared),
        "generate": lambda: handlers.generate(prompt="a dog", **shared),
    }
    job = starts[name]()
    next(job), next(job), next(job)
    job.close()
    at_close = len(calls)
    draw(handlers, upload)  # by the same thread, after what it was about
    assert len(calls) <= at_close + 1 + STEPS
    assert re.search(r"stopped after step \d+ of 100", caplog.text)


def card(index: int, picture: object, **changes: object) -> dict[str, object]:
    values = {"picture": picture} | changes
    return {name if not index else f"{name}_{index + 1}": value for name, value in values.items()}


def test_cards_are_words_with_names_weights_and_counts_of_their_own(handlers, upload, picture):
    values = card(0, upload, name="corgi", num_tokens=3) | card(2, upload, name="bike", num_tokens=5, weight=0.5)
    words = handlers.read_cards(values | {"seed": 1})
    assert [(word.name, word.num_tokens, word.weight) for word in words] == [("corgi", 3, 1.0), ("bike", 5, 0.5)]
    plain = handlers.pipeline.encode(picture, 5)[0]
    assert torch.allclose(words[0].vilex_tokens, plain[:3], atol=1e-6)
    mean = handlers.pipeline.t2i.word_statistics()[0]
    assert torch.allclose(words[1].vilex_tokens, mean + 0.5 * (plain - mean), atol=1e-6)


def test_named_pictures_stand_where_the_prompt_names_them(handlers, upload, picture):
    values = card(0, upload, name="A", num_tokens=2) | card(1, upload, name="B", num_tokens=3)
    drawn = [Image.open(path).tobytes() for path, _ in draw(handlers, upload, "[B] beside [A]", **values)[-1][0]]
    tokens, config = handlers.pipeline.encode(picture)[0], GenerationConfig(3, 2, 5, STEPS)
    expected = handlers.pipeline.generate("[B] beside [A]", [tokens[:2], tokens[:3]], config, names=["A", "B"])
    assert drawn == [image.tobytes() for image in expected.images]
    bar, *_ = handlers.plan("[B] beside [A]", **values)
    assert "<mark>B</mark> <span>beside</span> <mark>A</mark>" in bar
    assert "5 slots for the pictures (B 3, A 2), 1 for words" in bar


def test_a_code_takes_the_place_of_a_picture(handlers, upload):
    path, _ = handlers.encode(picture=upload, num_tokens=7)
    word = pack(load_code(path))
    [read] = handlers.read_cards({"word": word})
    assert read.num_tokens == 7 and read.image is None and read.source == "my-corner"
    assert "7 slots for the picture" in handlers.plan("", word=word)[0]
    results = [draw(handlers, **kind)[-1][0] for kind in ({"upload": None, "word": word}, {"upload": upload})]
    assert [len(result) for result in results] == [2, 2]


@pytest.mark.parametrize("embed", [False, True])
def test_a_ladders_pngs_hold_the_tokens_only_when_asked(handlers, upload, embed):
    paths = rebuild(handlers, upload, embed=embed)[-1][: ladder.MAX_RUNGS]
    assert [bool(load_recipe(path).images[0].code) for path in paths if path] == [embed] * 3


def test_a_ladder_from_a_code_has_no_more_rungs_than_the_code_tokens(handlers):
    word = pack(VilexCode(torch.ones(2, 8), handlers.pipeline.fingerprint))
    *places, _ = rebuild(handlers, None, word=word)[-1]
    paths, texts = places[: ladder.MAX_RUNGS], places[ladder.MAX_RUNGS :]
    assert [load_recipe(path).images[0].num_tokens for path in paths if path] == [1, 2]
    assert [re.search("<strong>(.*)</strong>", text)[1] for text in texts if text] == ["1 token", "2 tokens"]


def test_a_picture_drawn_from_a_word_does_not_say_that_a_photo_gives_it(handlers, upload):
    code = VilexCode(torch.ones(2, 8), handlers.pipeline.fingerprint)
    polished = pack_polished(code, upload, "crop")
    for picture, word, fit in ((None, pack(code), ""), (upload, polished, ""), (upload, "", "crop")):
        [(path, _), _] = draw(handlers, picture, word=word)[-1][0]
        assert load_recipe(path).images[0].fit == fit


def test_a_code_of_another_model_is_refused(handlers):
    with pytest.raises(gr.Error, match="the code was made by 'other'"):
        draw(handlers, None, word=pack(VilexCode(torch.zeros(2, 8), "other")))


BAD_CARDS = [
    ({"name": "a]"}, "a picture's name has 1 to 80 characters and neither square nor angle brackets; got 'a]'"),
    ({"name": 7}, "a picture's name has 1 to 80 characters"),
    ({"name": "x" * 81}, "a picture's name has 1 to 80 characters"),
    ({"name": "A", "picture_2": {"path": "x"}, "name_2": "A"}, "two pictures are called 'A'"),
    ({"weight": 2.5}, "weight must be between 0 and 2, got 2.5"),
    ({"weight": math.nan}, "weight must be a number, got nan"),
    ({"num_tokens": 1.5}, "num_tokens must be a whole number, got 1.5"),
    ({"picture": None, "word": "hello"}, "a code starts with"),
    ({"picture": None, "word": "vilex-file:???"}, "the code is damaged"),
    ({"picture": None, "word": 7}, "a picture's code must be text, got int"),
    ({"picture": "/etc/passwd"}, "The file must be an upload that is still on this server"),
    ({"picture": {"path": "/etc/passwd"}}, "The file must be an upload that is still on this server"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CARDS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_bad_cards_are_refused_before_anything_is_drawn(handlers, upload, calls, changes, message):
    with pytest.raises(gr.Error) as error:
        draw(handlers, upload, **changes)
    assert error.value.message.startswith(message)
    assert not calls


def test_taking_cards_leaves_the_other_settings(upload):
    values = card(1, upload) | {"seed": 3}
    assert [found.picture for found in take_cards(values)] == [upload] and values == {"seed": 3}


BAD_NUMBERS = [
    ({"seed": math.nan}, "seed must be a number, got nan"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"seed": None}, "seed must be a number, got None"),
    ({"seed": -1}, "seed must be between 0 and"),
    ({"seed": 2**32 - 1, "num_images": 4}, "seed + num_images must not exceed 2^32"),
    ({"num_images": 17}, "num_images must be between 1 and 16, got 17"),
    ({"num_images": True}, "num_images must be a number, got True"),
    ({"num_tokens": 0}, "num_tokens must be between 1 and 511, got 0"),
    ({"num_tokens": 76}, "num_tokens must be between 1 and 75, got 76"),
    ({"num_tokens": "many"}, "num_tokens must be a number, got 'many'"),
    ({"tfg_scale": math.inf}, "tfg_scale must be a number, got inf"),
    ({"seed": 10**400}, "seed must be between 0 and 4.29497e+09, got 1000"),
    ({"num_inference_steps": 10**9}, "num_inference_steps must be between 1 and 100"),
    ({"guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low 0.8 must not exceed guidance_high 0.2"),
    ({"scheduler": "magic"}, "scheduler must be one of auto, dpm++, sde-dpm++, ddim, ddpm, euler, got 'magic'"),
    ({"scheduler": "euler"}, "scheduler 'euler' does not suit this model"),
    ({"negative_prompt": "x" * 1001}, "The negative prompt has 1001 characters, the limit is 1000"),
    ({"negative_prompt": 3}, "The negative prompt must be text, got int"),
    ({"prompt": "x" * 10_000}, "The prompt has 10000 characters, the limit is 1000"),
    ({"prompt": None}, "The prompt must be text, got NoneType"),
    ({"prompt": "<image:2>"}, "&lt;image:2&gt; asks for an image that is not there"),
    ({"fit": "squeeze"}, "fit must be one of crop, start, end, pad, got 'squeeze'"),
    ({"view": "huge"}, "view must be one of enlarged, raw, got 'huge'"),
    ({"volume": 11}, "GenerationConfig has no setting 'volume'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_NUMBERS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_bad_settings_are_refused_before_anything_is_drawn(handlers, upload, calls, changes, message):
    with pytest.raises(gr.Error) as error:
        draw(handlers, upload, **changes)
    assert error.value.message.startswith(message)
    assert not calls


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "empty.png", "empty.png is not a readable picture: it is empty"),
        (b"no picture", "<b>.png", "&lt;b&gt;.png is not a readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg", "drawing.svg is not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "eps.png", "eps.png is not a readable picture"),
    ],
)
def test_bad_files_give_one_sentence(handlers, cache, content, name, message):
    (cache / name).write_bytes(content)
    upload = {"path": str(cache / name)}
    for call in (lambda: rebuild(handlers, upload), lambda: handlers.look(upload, "crop")):
        with pytest.raises(gr.Error) as error:
            call()
        assert error.value.message.startswith(message)


def test_no_picture_is_said_and_not_a_defect(handlers):
    for call in (lambda: rebuild(handlers, None), lambda: handlers.encode()):
        with pytest.raises(gr.Error, match="Give a picture first"):
            call()
    with pytest.raises(gr.Error, match="Give a picture, words, or both"):
        draw(handlers, None, "  ")
    assert list(ladder.climb_new(handlers, None, view="raw", budgets="1")) == []
    assert handlers.look(None, "crop") is None


def test_a_defect_gives_a_number_that_is_in_the_log_and_the_next_request_works(handlers, upload, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(VilexPipeline, "encode", lambda *_: 1 / 0)
        with pytest.raises(gr.Error, match="Something went wrong; the log has the details") as error:
            draw(handlers, upload)
    number = error.value.message.split()[-1]
    assert number in caplog.text and "ZeroDivisionError" in caplog.text and "division" not in error.value.message
    assert len(draw(handlers, upload)[-1][0]) == 2


def test_look_is_what_the_encoder_sees(handlers, upload):
    crop, pad = handlers.look(upload, "crop"), handlers.look(upload, "pad")
    assert crop.size == pad.size == (32, 32)
    assert pad.getpixel((16, 1)) == (255, 255, 255) and crop.getpixel((1, 1)) == (255, 0, 0)


def card_input(num_tokens: int = 6, name: str = "") -> CardInput:
    return CardInput({"path": "x"}, "", name, 1.0, num_tokens, "crop")


def test_budget_counts_the_slots_of_pictures_and_words(pipeline):
    spent = budget.spend(pipeline, "<image> a red dog", [card_input()])
    assert [(part.kind, part.text, part.slots) for part in spent.parts] == [
        ("image", "image", 6), ("word", "a", 1), ("word", "red", 1), ("word", "dog", 1)
    ]  # fmt: skip
    assert (spent.capacity, spent.free) == (22, 13)
    assert "6 slots for the picture, 3 for words, 13 of 22 free" in budget.to_html(spent)


def test_words_taken_from_a_picture_cost_no_slots(pipeline):
    spent = budget.spend(pipeline, '[A] - "red" + "blue", a dog', [card_input(name="A"), card_input(4, name="B")])
    assert [(part.text, part.slots) for part in spent.parts] == [
        ('A - "red" + "blue"', 6), (",", 1), ("a", 1), ("dog", 1)
    ]  # fmt: skip
    html = budget.to_html(spent)
    assert "A - &quot;red&quot; + &quot;blue&quot;: 6 slots" in html and "[B] is not in the prompt" in html


def test_a_name_that_no_picture_has_is_told(pipeline):
    spent = budget.spend(pipeline, "[corgi] beside [A] or [corgi]", [card_input(4, name="A"), card_input(4, name="B")])
    assert spent.note == "[B] is not in the prompt; [corgi] is no picture's name: it is read as words"
    assert budget.spend(pipeline, "[A], [B]", [card_input(4, name="A"), card_input(4, name="B")]).note == ""


def test_a_prompt_moves_its_picture_and_a_recipe_draws_it_again(handlers, upload):
    asked = {"view": "raw", "picture": upload, "num_tokens": 6, "num_inference_steps": 2, "embed": True}
    plain, moved = (list(handlers.generate(f"<image>{end}", **asked))[-1][0][0][0] for end in ("", ' + "blue"'))
    recipe = load_recipe(moved)
    assert recipe.prompt == '<image> + "blue"' and Image.open(plain).tobytes() != Image.open(moved).tobytes()
    assert recipe.images[0].code == load_recipe(plain).images[0].code  # the picture's own tokens, moved by the prompt
    bar, *sliders = handlers.plan('<image> + "blue"', picture=upload)
    assert "0 words" in bar and [slider["interactive"] for slider in sliders] == [False, False]
    assert "was written with other terms" in handlers.plan('<image> <image> + "blue"', picture=upload)[0]


def test_budget_strikes_out_the_words_that_do_not_fit(pipeline):
    html = budget.to_html(budget.spend(pipeline, "dog " * 22 + "cat", [card_input()]))
    assert html.count("<del>") == 2 and "<del>cat</del>" in html and "the last words did not fit" in html


def test_a_word_of_which_pieces_remain_is_shown_as_partly_cut(pipeline, monkeypatch):
    monkeypatch.setattr(budget, "_words", lambda *_: [("doggish", 20), ("undogged", 3)])
    spent = budget.spend(pipeline, "dog " * 23, [card_input(1)])
    assert (spent.parts[-1].slots, spent.parts[-1].asked, spent.free) == (1, 3, 0)
    html = budget.to_html(spent)
    assert "partly cut" in html and "1 of 3 pieces of this word fit" in html and "<del>" not in html


def test_nothing_a_user_writes_becomes_html(handlers, upload):
    prompt = '<script>alert("1")</script> <img src=x onerror=alert(2)> ' + "dog " * 20
    bar, *_ = handlers.plan(prompt, picture=upload)
    assert not re.search(r"<(script|img)", bar) and "onerror" in bar
    assert 'title="&quot;: 1 slot"' in bar
    assert not re.search(r"<(script|img)", draw(handlers, upload, prompt)[-1][-1])


@pytest.mark.parametrize(
    ("has_picture", "prompt", "works"),
    [(True, "<image> a dog", True), (True, "", False), (True, "<image>", False), (False, "a dog", False)],
)
def test_the_sliders_of_words_are_greyed_with_a_reason(handlers, upload, has_picture, prompt, works):
    _, *sliders = handlers.plan(prompt, picture=upload if has_picture else None)
    assert [slider["interactive"] for slider in sliders] == [works, works]
    assert ["Has no effect" in slider["info"] for slider in sliders] == [not works, not works]


def test_a_prompt_that_cannot_be_is_explained_under_it(handlers, upload):
    bar, *sliders = handlers.plan("<image:3>", picture=upload)
    assert "&lt;image:3&gt; asks for an image that is not there" in bar and all(map(is_skipped, sliders))


def test_without_weights_every_button_names_the_command():
    handlers = Handlers(None, problem="no weights; get them with: hf download a/b")
    for call in (rebuild, draw, lambda handlers, picture: handlers.encode(picture=picture)):
        with pytest.raises(gr.Error, match="hf download a/b"):
            call(handlers, None)
    assert "weights" in handlers.plan("a")[0]
    html = str(ui.build_demo(handlers).get_config_file())
    assert "No weights are loaded" in html and "hf download a/b" in html


def test_whole_numbers_arrive_as_int():
    config = build_config(num_inference_steps=4.0, seed=7.0)
    assert (config.num_inference_steps, config.seed) == (4, 7) and type(config.seed) is int


def test_measure_takes_some_time(pipeline):
    assert 0 < measure(pipeline) < 60
    assert 0 < measure(VilexPipeline(pipeline.t2i)) < 60


# Polish, and models without an encoder


def improve(handlers: Handlers, upload: dict | None, steps: object = STEPS, **card: object) -> list[tuple]:
    return list(polish.polish(handlers, picture=upload, polish_steps=steps, **card))


def test_polishing_ends_as_a_word_that_draws(handlers, upload, pipeline, picture):
    updates = improve(handlers, upload, fit="pad")
    word, status = updates[-1]
    assert status.startswith("<p>Polished in ") and all(is_skipped(update[0]) for update in updates[:-1])
    assert "Polishing · step 2 of 3 · " in "".join(status for _, status in updates)
    code = unpack(word, pipeline.fingerprint)
    assert code.source == "my-corner"
    assert torch.equal(code.vilex_tokens, pipeline.polish(picture, steps=STEPS, fit="pad").half().float())
    assert len(draw(handlers, None, word=word)[-1][0]) == 2


def test_a_polished_picture_is_drawn_from_its_word_and_is_still_there(handlers, upload):
    word = improve(handlers, upload)[-1][0]
    card = take_cards({"picture": upload, "word": word, "num_tokens": 75})[0]
    read = read_card(handlers.pipeline, card, full=True)
    assert torch.equal(read.vilex_tokens, unpack(word).vilex_tokens)
    assert not torch.equal(read.vilex_tokens, read_card(handlers.pipeline, replace(card, word="")).vilex_tokens)
    assert read.image is not None and read.source == "my-corner" and not read.is_encoded
    [refitted] = take_cards({"picture": upload, "word": word, "fit": "pad"})
    assert refitted.is_encoded  # since the word was polished for the other fit
    assert "22 slots for the picture" in handlers.plan("", picture=upload, word=word)[0]


@pytest.mark.parametrize(("has_picture", "steps", "message"), [
    (False, STEPS, "Give picture A first: a word without its picture cannot be polished"),
    (True, 0, "polish_steps must be between 1 and 1000, got 0"),
    (True, "many", "polish_steps must be a number, got 'many'"),
])  # fmt: skip
def test_what_cannot_be_polished_is_told(handlers, upload, has_picture, steps, message):
    with pytest.raises(gr.Error, match=message):
        improve(handlers, upload if has_picture else None, steps)


@pytest.mark.parametrize(("seconds_per_step", "num_images"), [(None, 4), (0.1, 4), (3.0, 1)])
def test_a_page_whose_pictures_take_long_starts_with_one(handlers, seconds_per_step, num_images):
    parts = ui.build_demo(handlers, ui.Notes(20, seconds_per_step)).config["components"]
    [slider] = [part["props"] for part in parts if part["props"].get("elem_id") == "num-images"]
    assert slider["value"] == num_images


@pytest.mark.parametrize(("seconds", "told"), [(None, "and take longer"), (0.3, "and take about 4.8 s each")])
def test_a_page_tells_what_polishing_costs_before_it_begins(handlers, seconds, told):
    parts = ui.build_demo(handlers, ui.Notes(seconds_per_step=seconds)).config["components"]
    [slider] = [part["props"] for part in parts if part["props"].get("elem_id") == "polish-steps"]
    assert slider["info"].endswith(told)


def test_a_model_without_encoder_offers_polish_and_draws_words(pipeline, upload):
    handlers = Handlers(VilexPipeline(pipeline.t2i, name="bare"))
    shown = [str(part["props"].get("value")) for part in ui.build_demo(handlers).config["components"]]
    assert any("This model draws from words." in text for text in shown)
    assert handlers.look(upload, "crop").size == (32, 32) and handlers.max_tokens == 22
    with pytest.raises(gr.Error, match="bare has no ViLex weights to read pictures with: .* Polish picture A"):
        draw(handlers, upload)
    assert len(draw(handlers, None, "a dog")[-1][0]) == 2
    word, spelt = (improve(handlers, upload, prompt=prompt)[-1][0] for prompt in ("", "a red dog. <image>"))
    expected = handlers.pipeline.polish(Image.open(upload["path"]), 22, steps=STEPS, words="a red dog.")
    assert torch.equal(unpack(spelt).vilex_tokens, expected.half().float())
    both = {"name": "A", "picture_2": upload, "name_2": "B", "prompt": "[A] a red dog. [B]"}
    assert torch.equal(unpack(improve(handlers, upload, **both)[-1][0]).vilex_tokens, unpack(spelt).vilex_tokens)
    assert not torch.equal(unpack(word).vilex_tokens, unpack(spelt).vilex_tokens)
    assert len(draw(handlers, None, "<image> on the beach", word=word)[-1][0]) == 2
    handlers.engine.close()


def test_page_offers_named_endpoints_that_share_one_queue(handlers):
    demo = ui.build_demo(handlers, ui.Notes(steps=4))
    names = {f.api_name for f in demo.fns.values() if f.api_visibility == "public" and f.api_name}
    assert names >= {"reconstruct", "generate", "encode", "polish"}
    compute = [f for f in demo.fns.values() if f.concurrency_id == "compute"]
    assert len(compute) >= 4 and len({f.concurrency_limit for f in compute}) == 1
    described = demo.get_api_info()["named_endpoints"]
    parameters = {parameter["parameter_name"] for parameter in described["/generate"]["parameters"]}
    assert {f.name for f in fields(GenerationConfig)} | {"picture", "picture_4", "name_2", "weight_3"} <= parameters
    assert all(f.fn.__doc__ or f.fn.func.__doc__ for f in demo.fns.values() if f.api_name in names)
    assert demo.delete_cache == (3600, 86400)
