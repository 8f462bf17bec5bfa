"""Several models in one app: what is offered, when one is loaded, and that their pages stay apart."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import dataclasses
import json
from pathlib import Path

import gradio as gr
import pytest
import torch

from app import ui
from app.handlers import Handlers
from app.models import LaterPipeline, named_models, other_folders, page_path
from train.presets import PRESETS
from vilex.checkpoint import find_weights
from vilex.encoder import build_encoder
from vilex.model import ViLex
from vilex.pipeline import VilexPipeline

assert app
pytest_plugins = ["tabs"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of all weights, with nano, mini of 16 tokens and broken in it; only the small files are there."""
    pooler = PRESETS["tiny"].pooler.to_dict()
    for name, config in (("nano", {}), ("mini", {"pooler": pooler | {"num_queries": 16}}), ("broken", [])):
        (tmp_path / name / "t2i").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "mini" / "t2i" / "vilex_t2i.json").write_text("{}")
    for module in ("app.models", "vilex.checkpoint"):
        monkeypatch.setattr(f"{module}.WEIGHTS_FOLDER", tmp_path)
    monkeypatch.setattr("vilex.checkpoint.DEFAULT_MODEL", "nano")
    monkeypatch.delenv("VILEX_WEIGHTS", raising=False)
    return tmp_path


@pytest.fixture
def small(t2i) -> VilexPipeline:
    """A second pipeline, whose pictures have at most 16 tokens."""
    torch.manual_seed(2)
    pooler = dataclasses.replace(PRESETS["tiny"].pooler, text_width=8, num_queries=16)
    return VilexPipeline(t2i, ViLex(build_encoder(PRESETS["tiny"].encoder), pooler), "mini")


def test_flags_name_the_models_or_else_the_environment(monkeypatch):
    monkeypatch.setenv("VILEX_WEIGHTS", "a, b/c,")
    assert named_models(()) == ["a", "b/c"] and named_models(("d",)) == ["d"]
    monkeypatch.delenv("VILEX_WEIGHTS")
    assert named_models(()) == []


def test_the_first_of_several_is_the_one_of_the_shell(folders, monkeypatch):
    monkeypatch.setenv("VILEX_WEIGHTS", "mini,nano")
    assert find_weights() == str(folders / "mini")


def test_named_models_come_before_what_else_is_there(folders, tmp_path):
    assert [folder.name for folder in other_folders([])] == ["broken", "mini"]
    assert [folder.name for folder in other_folders(["broken", "nano"])] == ["nano", "mini"]
    elsewhere = tmp_path / "elsewhere" / "nano"
    elsewhere.mkdir(parents=True)
    assert [folder.name for folder in other_folders([str(elsewhere)])] == ["broken", "mini"]
    assert other_folders(["gone"])  # that the first is missing is said on its page


@pytest.mark.parametrize(
    ("named", "message"), [(["nano", "gone"], "no weights at 'gone'"), (["nano", "nano"], "two models would have")]
)
def test_models_that_cannot_be_offered_are_refused(folders, named, message):
    with pytest.raises(ValueError, match=message):
        other_folders(named)


def test_a_model_is_loaded_once_and_not_before_it_is_needed(folders, small):
    loads = []
    later = LaterPipeline(folders / "mini", lambda: loads.append(1) or small)
    assert (later.name, later.max_tokens, later.is_embedded, later.has_encoder) == ("mini", 16, True, True)
    assert not loads
    assert LaterPipeline(folders / "broken", lambda: small).max_tokens == 75
    assert later.fingerprint == small.fingerprint and later.t2i is small.t2i and loads == [1]


def test_a_model_that_cannot_be_loaded_gives_its_sentence_each_time(folders):
    def load() -> VilexPipeline:
        raise ValueError("a weight is missing")

    broken = Handlers(LaterPipeline(folders / "broken", load))
    for _ in range(2):
        assert "a weight is missing" in broken.plan("a dog")[0]
        with pytest.raises(gr.Error, match="a weight is missing"):
            list(broken.generate("a dog", "raw"))
    broken.engine.close()


def test_every_model_has_a_page_with_its_own_limits(handlers, folders, small):
    loads = []
    other = Handlers(LaterPipeline(folders / "mini", lambda: loads.append(1) or small))
    demo = ui.build_demo(handlers, others=[(other, ui.Notes(licence="Terms of mini."))])
    pages = {page: str(_components(demo, page)) for page in ("", "model-mini")}
    assert not loads
    for page, name, count in (("", "tiny", 75), ("model-mini", "mini", 16)):
        sliders = [each["props"] for each in _components(demo, page) if each["props"].get("elem_id") == "tokens-A"]
        assert [slider["maximum"] for slider in sliders] == [count]
        [choice] = [each["props"] for each in _components(demo, page) if each["props"].get("elem_id") == "model"]
        assert choice["value"] == name and choice["visible"] and [n for n, _ in choice["choices"]] == ["tiny", "mini"]
        assert f"Model: {name}." in pages[page]
    assert "Terms of mini." in pages["model-mini"] and "Terms of mini." not in pages[""]
    other.engine.close()


def test_a_single_model_shows_no_choice(handlers):
    demo = ui.build_demo(handlers)
    [choice] = [each["props"] for each in _components(demo, "") if each["props"].get("elem_id") == "model"]
    assert not choice["visible"] and len(demo.pages) == 1


def _components(demo: gr.Blocks, page: str) -> list[dict]:
    config = demo.get_config_file()
    return [each for each in config["components"] if each["id"] in config["page"][page]["components"]]


def test_paths_of_pages_are_plain():
    assert page_path("owner/my model") == "model-owner-my-model"
