"""What brings a page back: recipes, .vilex files and what a browser remembers, on a tiny random pipeline."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

from dataclasses import replace
from functools import partial
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from app import pictures, restore, sources
from app.cards import CARD_FIELDS, MAX_CARDS, card_key, pack, pack_polished, take_cards, unpack
from app.handlers import Handlers
from app.link import to_link
from app.models import LaterPipeline
from app.panel import EMPTY_CARD, WORD_CARD
from app.restore import Page
from vilex.codes import load_code
from vilex.config import MIXING, GenerationConfig
from vilex.images import load_image
from vilex.pipeline import VilexPipeline
from vilex.prompt import mentioned, parse
from vilex.recipe import load_recipe, save_png

assert app
pytest_plugins = ["tabs"]


@pytest.fixture
def upload(handlers: Handlers, picture: Image.Image, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "cache" / "up" / "corner.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return {"path": str(path), "orig_name": "corner.png"}


class Everything(dict):
    """A stand-in for the page's components: any name is one."""

    def __init__(self) -> None:
        cards = [card_key(name, i) for name in CARD_FIELDS for i in range(MAX_CARDS)]
        more = [f"{kind}_{i}" for kind in ("panel", "seen") for i in range(MAX_CARDS)]
        settings = [name for name in GenerationConfig.__dataclass_fields__ if name != "num_tokens"]
        rest = ["prompt", "view", "embed", "lock", "gallery", "history", "shown", "add", "arrival"]
        super().__init__((name, None) for name in [*rest, *cards, *more, *settings])


@pytest.fixture
def page(handlers: Handlers) -> Page:
    return Page(handlers, Everything(), ())


def named(page: Page, updates: tuple) -> dict[str, object]:
    """What changes, by name."""
    return {name: value for name, value in zip(page.targets, updates, strict=True) if value != gr.skip()}


EMPTY = [False] * MAX_CARDS
MISSING = "Picture A is not in the file: drop it in again, unless the card still holds it."


def draw(handlers: Handlers, upload: dict, **changes: object) -> str:
    settings = {"view": "raw", "seed": 5, "num_inference_steps": 2, "num_images": 1} | changes
    [(path, _)] = list(handlers.generate(prompt="[corgi] a dog", picture=upload, name="corgi", **settings))[-1][0]
    return path


def test_a_result_with_tokens_is_drawn_again_from_itself(handlers, page, upload, told):
    path = draw(handlers, upload, embed=True, weight=0.5, num_tokens=3, tfg_scale=2.0)
    values = named(page, restore.bring_back(page, path, EMPTY, cleared={0}))
    assert values["prompt"] == "[corgi] a dog" and values["tfg_scale"] == 2.0 and values["lock"] is True
    assert (values["name"], values["weight"], values["num_tokens"], values["picture"]) == ("corgi", 1.0, 3, None)
    assert "num_images" not in values
    settings = {name: values[name] for name in ("seed", "num_inference_steps", "tfg_scale")} | {"num_images": 1}
    again = handlers.generate(prompt=values["prompt"], word=values["word"], name="corgi", view="raw", **settings)
    [(again_path, _)] = list(again)[-1][0]
    difference = [abs(a - b) for a, b in zip(*(Image.open(p).tobytes() for p in (path, again_path)), strict=True)]
    assert max(difference) <= 6  # a code is rounded to one byte a number
    assert told == ["The settings are back, the seed is kept."]


@pytest.mark.parametrize(
    ("prompt", "restored"),
    [("", "[A]"), ("a dog", "[A] a dog"), ("<image> a dog", "<image> a dog"), ("[A] a dog", "[A] a dog")],
)
def test_pictures_that_a_result_was_drawn_without_stay_and_stay_out(handlers, page, upload, told, prompt, restored):
    one = {"num_images": 1, "num_inference_steps": 1}
    [(path, _)] = list(handlers.generate(prompt, "raw", picture=upload, name="A", **one))[-1][0]
    values = named(page, restore.bring_back(page, path, [True, True, False, False]))
    assert values["prompt"] == restored and values["shown"] == [True, True, False, False]
    assert not values.keys() & {"picture", "seen_1", *(card_key(name, 1) for name in CARD_FIELDS if name != "name")}
    assert values["name_2"] == "B" and told == ["The settings are back, the seed is kept. " + MISSING]
    assert mentioned(values["prompt"], 2, ["A", "B"]) == {0}


@pytest.mark.parametrize("prompt", ["<image> and <image>", "[B] a dog", "a [B] <image>"])
def test_pictures_go_that_would_come_into_a_result(handlers, page, upload, told, prompt):
    one = {"num_images": 1, "num_inference_steps": 1}
    [(path, _)] = list(handlers.generate(prompt, "raw", picture=upload, name="A", **one))[-1][0]
    values = named(page, restore.bring_back(page, path, [True, True, False, False]))
    assert values["prompt"] == prompt and values["picture_2"] is None and values["shown"][1] is False
    assert "Pictures that it was drawn without went." in told[0]


def test_a_result_of_more_pictures_than_there_are_cards_comes_back_as_far_as_it_can(handlers, page, upload, told):
    recipe = load_recipe(draw(handlers, upload))
    many = replace(recipe, prompt="", images=recipe.images * 6)
    save_png(Image.new("RGB", (8, 8)), Path(upload["path"]).with_name("many.png"), many)
    values = named(page, restore.bring_back(page, str(Path(upload["path"]).with_name("many.png")), EMPTY))
    assert values["shown"] == [True] * MAX_CARDS and told[0].count("is not in the file") == MAX_CARDS


def test_pictures_go_where_a_result_was_drawn_from_words_alone(handlers, page, told):
    [(path, _)] = list(handlers.generate("a dog", "raw", num_images=1, num_inference_steps=1))[-1][0]
    values = named(page, restore.bring_back(page, path, [False, True, False, False]))
    assert values["prompt"] == "a dog" and values["picture_2"] is None and values["word_2"] == ""
    assert told[0].endswith("Pictures that it was drawn without went.")


def test_a_result_without_tokens_says_that_its_picture_is_missing(handlers, page, upload, told):
    path = draw(handlers, upload, weight=0.5, num_tokens=3)
    assert all(not image.code for image in load_recipe(path).images)
    values = named(page, restore.bring_back(page, path, EMPTY))
    assert (values["weight"], values["num_tokens"]) == (0.5, 3) and "picture" not in values
    assert "Picture A is not in the file" in told[0]
    assert named(page, restore.bring_back(page, path, EMPTY, cleared={0}))["picture"] is None


@pytest.mark.parametrize(
    ("name", "kept"),
    [("two words", "two words"), ("20240312_101010", "20240312_101010"), ("photo.v1", "photo.v1"), ("a[1]", "A"),
     ("", "A"), ("x" * 81, "A")],
)  # fmt: skip
def test_names_of_files_come_back_where_a_prompt_can_use_them(handlers, page, upload, told, name, kept):
    recipe = load_recipe(draw(handlers, upload))
    images = tuple(replace(recipe.images[0], name=each) for each in (name, "corgi"))
    values = restore.from_recipe(handlers, replace(recipe, images=images))
    assert (values["name"], values["name_2"]) == (kept, "corgi")
    for card in take_cards({"picture": upload, "name": kept}):
        assert parse(f"[{kept}] at night", 1, [card.name]) == [0, " at night"]


def test_a_result_of_tokens_that_no_picture_gives_asks_for_the_word(handlers, page, upload, told):
    word = pack_polished(load_code(handlers.encode(picture=upload, num_tokens=2)[0]), upload, "pad")
    values = named(page, restore.bring_back(page, draw(handlers, upload, word=word, fit="pad"), EMPTY))
    assert "fit" not in values and "word" not in values  # so that the card goes on with its polished picture
    assert told[0].endswith(
        "Picture A is not in the file: it was a word, open that again, unless the card still holds it."
    )


def test_a_vilex_file_goes_to_the_first_empty_card(handlers, page, upload, told):
    path, _ = handlers.encode(picture=upload, num_tokens=7)
    values = named(page, restore.open_file(page, path, [True, False, False, False]))
    assert set(values) == {"word_2", "num_tokens_2"} and values["num_tokens_2"] == 7
    assert told == ["Picture B is now a word of 7 tokens."]
    assert unpack(values["word_2"]).vilex_tokens.equal(load_code(path).vilex_tokens)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.vilex", b"nothing", "a.vilex: this is not a readable .vilex file"),
        ("plain.png", None, "plain.png carries no settings; to use it as a picture, drop it on a picture card"),
        ("broken.png", b"", "broken.png carries no settings"),
    ],
)
def test_a_file_that_brings_nothing_is_named(page, upload, name, content, message):
    path = Path(upload["path"]).with_name(name)
    path.write_bytes(Path(upload["path"]).read_bytes() if content is None else content)
    with pytest.raises(gr.Error) as error:
        restore.open_file(page, str(path), [False] * 4)
    assert error.value.message.startswith(message)


def saved(upload: dict, **changes: object) -> dict[str, object]:
    defaults = {"picture": None, "word": "", "name": "", "weight": 1, "num_tokens": 75, "fit": "crop"}
    cards = {card_key(name, i): value for i in range(MAX_CARDS) for name, value in defaults.items()}
    settings = {k: v for k, v in GenerationConfig().to_dict().items() if k != "num_tokens"}
    page = {"prompt": "a dog", "view": "raw", "embed": False, "lock": True, "gallery": None, "history": []}
    return page | settings | cards | {"picture": upload, "seed": 9} | changes


def test_a_refresh_brings_prompt_settings_pictures_and_results_back(handlers, page, upload):
    result = {"image": {"path": draw(handlers, upload)}, "caption": "seed 5"}
    word = pack(load_code(handlers.encode(picture=upload, num_tokens=2)[0]))
    values = named(page, restore.remember(page, saved(upload, gallery=[result], word_3=word)))
    assert (values["prompt"], values["seed"], values["lock"], values["view"]) == ("a dog", 9, True, "raw")
    assert values["picture"] == upload["path"] and values["seen_0"].size == (32, 32)
    assert values["shown"] == [True, False, True, False] and values["word_3"] == word
    assert values["gallery"] == [(result["image"]["path"], "seed 5")]


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ({"prompt": 3}, {"prompt": ""}), ({"prompt": "x" * 2000}, {"prompt": ""}), ({"seed": "1"}, "seed"),
        ({"seed": None}, "seed"), ({"view": "huge"}, "view"), ({"weight": 9}, "weight"), ({"fit": []}, "fit"),
        ({"name_2": "<b>"}, "name_2"), ({"num_tokens": None}, "num_tokens"), ({"word": 7}, "word"),
        ({"guidance_low": 0.9, "guidance_high": 0.1}, "guidance_high"), ({"gallery": [3]}, {"gallery": []}),
        ({"gallery": [{"image": None}]}, {"gallery": []}), ({"history": "all"}, {"history": []}),
    ],
)  # fmt: skip
def test_a_value_that_does_not_hold_costs_only_itself(page, upload, changes, dropped):
    """Such as a name or a number that is half typed, or what another version or somebody else wrote."""
    whole = named(page, restore.remember(page, saved(upload)))
    values = named(page, restore.remember(page, saved(upload, **changes)))
    expected = whole | (dropped if isinstance(dropped, dict) else {})
    expected |= {name: value for name, value in changes.items() if name == "guidance_low"}
    expected = {name: value for name, value in expected.items() if name != dropped}
    seen, before = values.pop("seen_0"), expected.pop("seen_0")
    assert values == expected and seen.tobytes() == before.tobytes()


def test_a_file_that_is_no_picture_costs_only_itself(page, upload):
    bad = Path(upload["path"]).with_name("bad.png")
    bad.write_bytes(b"nothing")
    values = named(page, restore.remember(page, saved({"path": str(bad)}, picture_2=upload)))
    assert values["prompt"] == "a dog" and values["picture"] is None and values["picture_2"] == upload["path"]
    assert values["shown"] == [True, True, False, False]


@pytest.mark.parametrize("memory", [None, {}, [], "text"])
def test_no_memory_is_a_fresh_page(page, memory):
    assert named(page, restore.remember(page, memory)) == {}


def test_what_another_models_page_remembers_is_made_to_fit(handlers, page, upload):
    word = pack(load_code(handlers.encode(picture=upload, num_tokens=2)[0]))
    values = named(page, restore.remember(page, saved(upload, scheduler="euler", num_tokens=150, word=word)))
    assert (values["scheduler"], values["num_tokens"]) == ("auto", handlers.max_tokens)
    assert values["picture"] == upload["path"] and values["word"] == ""  # which would take the picture away


def test_a_result_of_another_model_comes_back_as_far_as_it_can(handlers, page, upload, told):
    recipe = load_recipe(draw(handlers, upload))
    other = replace(recipe, config=replace(recipe.config, scheduler="euler"), fingerprint="other", model="sd15")
    link = to_link(replace(other, images=()))
    values = named(page, restore.remember(page, saved(upload), link=link))
    assert (values["scheduler"], values["prompt"], values["history"]) == ("auto", "[corgi] a dog", [])
    assert "Drawn by 'sd15' with other weights" in told[0]


def test_a_model_that_cannot_be_loaded_keeps_what_is_remembered(upload, page, tmp_path):
    def load() -> VilexPipeline:
        raise ValueError("a weight is missing")

    handlers = Handlers(LaterPipeline(tmp_path, load))
    values = named(replace(page, handlers=handlers), restore.remember(replace(page, handlers=handlers), saved(upload)))
    assert values["prompt"] == "a dog" and values["seed"] == 9
    handlers.engine.close()


def test_a_result_without_words_leaves_the_sliders_of_words_alone(handlers, page, upload, told):
    recipe = load_recipe(draw(handlers, upload))
    assert set(MIXING) <= restore.from_recipe(handlers, recipe).keys()
    for other in (replace(recipe, prompt="<image>"), replace(recipe, images=())):
        assert not set(MIXING) & restore.from_recipe(handlers, other).keys()


def test_words_come_from_the_memory_of_this_models_page(handlers, page, upload):
    word = pack(load_code(handlers.encode(picture=upload, num_tokens=2)[0]))
    values = named(page, restore.remember(page, saved(upload), {"word_2": word}))
    assert values["word_2"] == word and values["prompt"] == "a dog" and values["shown"][1]
    assert set(named(page, restore.remember(page, {}, {"word": word}))) >= {"word", "shown"}


def test_a_memory_of_an_older_page_brings_back_what_it_has(page):
    values = named(page, restore.remember(page, {"prompt": "alone"}))
    assert values["prompt"] == "alone" and values["picture"] is None and "seed" not in values


def test_files_outside_the_cache_are_never_given_out(page, upload, tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(Path(upload["path"]).read_bytes())
    crooked = str(Path(upload["path"]).parent / ".." / ".." / "secret.png")
    for path in (str(outside), crooked, "/etc/passwd", "gone.png"):
        values = named(
            page, restore.remember(page, saved({"path": path}, gallery=[{"image": {"path": path}, "caption": ""}]))
        )
        assert values["picture"] is None and values["gallery"] == []
    assert restore.cached(upload) == upload["path"]


def test_requests_that_name_files_of_the_server_are_refused(handlers, page, upload, tmp_path):
    (tmp_path / "secret.png").write_bytes(Path(draw(handlers, upload)).read_bytes())
    (tmp_path / "secret.vilex").write_bytes(Path(handlers.encode(picture=upload)[0]).read_bytes())
    secret, word = str(tmp_path / "secret.png"), str(tmp_path / "secret.vilex")
    linked = Path(upload["path"]).with_name("linked.png")
    linked.symlink_to(secret)
    requests = [
        lambda: handlers.look({"path": secret}, "crop"),
        lambda: handlers.look({"path": str(linked)}, "crop"),
        lambda: handlers.look({"path": "gone\0.png"}, "crop"),
        lambda: pictures.compare(handlers, [{"image": {"path": secret}}], upload, "crop", 0),
        lambda: restore.bring_back(page, secret, EMPTY),
        lambda: restore.open_file(page, secret, [False] * 4),
        lambda: restore.open_file(page, word, [False] * 4),
    ]
    for request in requests:
        with pytest.raises(gr.Error, match="The file must be an upload that is still on this server"):
            request()


def test_a_dropped_result_offers_its_settings(handlers, upload):
    picture, seen, word, note, button = sources.arrive(handlers, upload, "pad")
    assert picture == gr.skip() and seen.size == (32, 32) and (word, note) == ("", "") and button["visible"] is False
    *_, note, button = sources.arrive(handlers, {"path": draw(handlers, upload)}, "crop")
    assert "settings that made it" in note and button["visible"] is True


def test_a_card_says_when_the_encoder_sees_only_a_part(handlers, upload):
    assert "Only 67% of its length is used" in sources.arrive(handlers, upload, "crop")[3]  # of 48x32 pixels
    assert "Only 67% of its length is used" in sources.refit(handlers, upload, "crop")[2]
    with Image.open(upload["path"]) as picture:
        picture.resize((40, 36)).save(upload["path"])
    assert sources.arrive(handlers, upload, "crop")[3] == ""


def test_a_scan_that_browsers_do_not_show_comes_as_a_png_of_the_same_pixels(handlers, upload):
    scan = Path(upload["path"]).with_suffix(".tiff")
    with Image.open(upload["path"]) as picture:
        picture.save(scan)
    shown, seen, *_ = sources.arrive(handlers, {"path": str(scan)}, "crop")
    assert Path(shown).suffix == ".png" and load_image(shown).tobytes() == load_image(scan).tobytes()
    assert handlers.look({"path": shown}, "crop").tobytes() == seen.tobytes()


def test_a_card_says_what_was_done_to_its_file(handlers, upload):
    frames = [Image.new("RGBA", (20, 20), (255, 255, 255, alpha)) for alpha in (0, 255)]
    frames[0].paste("white", (4, 4, 9, 9))
    frames[0].save(upload["path"], save_all=True, append_images=frames[1:])
    note = sources.arrive(handlers, upload, "crop")[3]
    assert "corner.png has several frames or pages; the first one is used." in note
    assert "corner.png is white on nothing: it is laid on grey." in note


def test_a_code_shows_its_card_and_a_foreign_one_is_refused(handlers, upload):
    path, text = handlers.encode(picture=upload, num_tokens=2)
    _, picture, seen, word, *_ = sources.fetch(handlers, f"  {text}\n", "crop")
    assert picture is seen is None  # a picture in the card is not rebuilt once more
    picture, panel, shown, add, seen, _, note, _ = sources.word_arrives(handlers, 1, word, [True, False, False, False])
    assert (picture["value"], picture["placeholder"]) == (None, WORD_CARD) and panel["visible"]
    assert shown == [True, True, False, False] and add["visible"]
    assert "A word of 2 tokens" in note and seen is None
    with pytest.raises(gr.Error, match="a code starts with"):
        sources.fetch(handlers, "hello", "crop")
    assert sources.word_arrives(handlers, 1, "hello", [True] * 4)[5] == ""
    assert sources.word_arrives(handlers, 1, "", shown)[0] == gr.update(placeholder=EMPTY_CARD)


def test_a_polished_word_leaves_the_picture_in_its_card_until_it_is_fitted_anew(handlers, upload):
    word = pack_polished(load_code(handlers.encode(picture=upload, num_tokens=2)[0]), upload, "crop")
    arrives = partial(sources.word_arrives, handlers, 0, word, [True, False, False, False])
    picture, _, shown, _, seen, _, note, _ = arrives(upload, "crop")
    assert picture == seen == gr.skip() and shown == [True, False, False, False]
    assert "Polished: 2 tokens fitted to this picture." in note
    seen, kept, note = sources.refit(handlers, upload, "pad")
    assert seen.size == (32, 32) and (kept, note) == ("", "")
    assert sources.refit(handlers, None, "pad") == (gr.skip(),) * 3  # a word without a picture stays
    with pytest.warns(UserWarning, match="the picture has changed since its tokens were polished"):
        assert arrives(upload, "pad")[5:7] == ("", "")  # which changed while it was polished
    assert arrives(None, "crop")[6] == "<p>A word of 2 tokens, made from corner.</p>"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///etc/passwd", "an address starts with http:// or https://"),
        ("ftp://example.org/a.png", "an address starts with http:// or https://"),
        ("http://127.0.0.1:7860/a.png", "'127.0.0.1' is not a host that can be reached from here"),
        ("http://[::1]/a.png", "'::1' is not a host"),
        ("http://169.254.169.254/latest/meta-data", "'169.254.169.254' is not a host"),
        ("http://0x7f000001/a.png", "is not a host"),
        ("http://", "an address starts with"),
    ],
)
def test_addresses_of_this_machine_and_its_network_are_refused(handlers, address, message):
    with pytest.raises(gr.Error) as error:
        sources.fetch(handlers, address, "crop")
    assert message in error.value.message


def test_cards_come_one_by_one_and_go(handlers):
    *panels, shown, add = sources.show_next([True, False, True, False])
    assert shown == [True, True, True, False] and add["visible"] and panels[1]["visible"]
    *_, shown, add = sources.show_next(shown)
    assert shown == [True] * 4 and not add["visible"]
    picture, panel, shown, add, *_, name, weight, num_tokens, fit = sources.remove(2, 75, shown)
    assert (name, weight, num_tokens, fit) == ("C", 1, 75, "crop")
    assert picture is None and not panel["visible"] and shown == [True, True, False, True] and add["visible"]
