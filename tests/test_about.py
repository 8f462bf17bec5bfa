"""The tab About: it says what is known of the weights, and survives cards that are odd or missing."""

import pytest

from app.about import (
    LICENCE_FILE,
    about_weights,
    commands,
    licence_line,
    licences,
    read_card,
    split_limits,
    versions,
    without_weights,
)
from vilex.checkpoint import WEIGHTS_FOLDER
from vilex.cli import main

CARD = """---
license: other
license_name: my-own
base_model: a/<b>
datasets: [one, two]
---
# Name
Intro ![a picture](http://example.com/x.png) here.
## Use
Draw.
## Where it fails
* Everywhere.
## Numbers
Limits of detection.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path


def test_the_card_gives_its_limits_apart_and_fetches_nothing(folder):
    limits, rest = split_limits(read_card(folder).text)
    assert limits == "## Where it fails\n* Everywhere."
    assert "# Name" in rest and "## Numbers\nLimits of detection." in rest and "fails" not in rest
    assert "Intro a picture here." in rest and "example.com" not in rest and "license" not in rest


def test_a_card_without_limits_says_so():
    limits, rest = split_limits("# Name\n## Use\nDraw.")
    assert "names no limits" in limits and rest == "# Name\n## Use\nDraw."


def test_facts_come_from_card_and_model(pipeline, folder):
    html = about_weights(pipeline, read_card(folder))
    for text in (
        "my-own",
        "one, two",
        "tiny",
        "32 x 32 pixels",
        pipeline.fingerprint,
        "cpu, float32",
        "1 to 75, 8 numbers",
    ):
        assert text in html
    assert "a/&lt;b&gt;" in html and "a/<b>" not in html


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "without a model card"),
        (b"---\n: [\n---\nx", "cannot be read"),
        (b"---\n- a\n---\nx", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"just text", "just text"),
        (b"", ""),
    ],
)
def test_odd_cards_break_nothing(pipeline, tmp_path, text, said):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text)
    card = read_card(tmp_path)
    assert said in card.text and "none is named" in about_weights(pipeline, card)


def test_licence_of_the_weights_is_their_own_folders(tmp_path):
    assert "non-commercial research" in licences(None) and "Third-party" in licences(None)
    assert "non-commercial research" not in licences(tmp_path) and "Apache License 2.0" in licences(tmp_path)
    (tmp_path / "LICENSE_WEIGHTS").write_text("Terms of mine.", encoding="utf-8")
    assert "Terms of mine." in licences(tmp_path) and "non-commercial research" not in licences(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("LICENSE_WEIGHTS", "terms", "Licence of the weights: see LICENSE_WEIGHTS in their folder."),
        ("README.md", "---\nlicense: other\nlicense_name: my-own\n---", "Licence of the weights: my-own."),
        ("README.md", "---\nlicense: apache-2.0\n---", "Licence of the weights: apache-2.0."),
        ("README.md", "---\nlicense_link: [3]\n---", "The weights in use name no licence."),
        ("notes.txt", "", "The weights in use name no licence."),
    ],
)
def test_licence_line_comes_from_the_weights_folder(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    assert licence_line(tmp_path) == line


@pytest.mark.parametrize("name", ["mini", "nano"])
def test_the_weights_that_come_with_the_code_are_under_its_licence_for_weights(name):
    folder = WEIGHTS_FOLDER / name
    assert "non-commercial research and personal" in licence_line(folder)
    assert LICENCE_FILE.read_text(encoding="utf-8") in licences(folder)


def test_every_command_and_version_is_named():
    assert all(f"`vilex {name}`" in commands() for name in main.commands) and main.commands
    assert "vilex" in versions() and "torch" in versions()


def test_without_weights_it_says_what_to_do():
    html = without_weights("no weights; get them with: hf download a/<b>")
    assert "hf download a/&lt;b&gt;" in html and "--model" in html
