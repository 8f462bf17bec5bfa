"""Pictures sorted by likeness to picture A: what is compared, in which order, and what is refused."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import re
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from app.similar import MAX_PICTURES, find

assert app
pytest_plugins = ["tabs"]


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, str]]:
    """Two plain pictures and a file that is none."""
    folder = tmp_path / "cache" / "files"
    folder.mkdir(parents=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return [{"path": str(folder / name), "orig_name": name} for name in ("red.png", "broken.png", "blue.png")]


def test_the_most_alike_come_first_with_their_scores(handlers, cards, files, tmp_path):
    history = [{"image": cards["picture"], "caption": "seed 5"}]
    examples = [tmp_path / "cache" / "turned.png"]
    *working, (found, status) = find(handlers, examples, files, ["history", "examples"], history, **cards)
    assert len(working) == 5 and all("<progress" in status for _, status in working)
    scores = [float(re.match(r"-?[\d.]+", caption)[0]) for _, caption in found]
    assert len(found) == 4 and scores == sorted(scores, reverse=True) and found[0][1] == "1.00 · corner"
    assert {caption.split(" · ")[1] for _, caption in found} == {"corner", "turned", "red", "blue"}
    assert all(image.size == (160, 160) for image, _ in found)
    assert re.search(r"Compared 4 in .* 1 could not be read", status)


def test_only_the_ticked_sources_are_compared(handlers, cards, files, tmp_path):
    history = [{"image": cards["picture"], "caption": "seed 5"}]
    *_, (found, status) = find(handlers, [tmp_path / "cache" / "turned.png"], files[:1], [], history, **cards)
    assert [caption.split(" · ")[1] for _, caption in found] == ["red"] and "could not" not in status


def test_how_much_a_picture_says_does_not_change_what_it_is_like(handlers, cards, files):
    *_, (found, _) = find(handlers, [], [cards["picture"], *files], **cards | {"weight": 0.0})
    assert found[0][1] == "1.00 · corner"


def test_a_code_is_compared_by_the_tokens_it_holds(handlers, cards, files):
    _, code = handlers.encode(picture=cards["picture"], num_tokens=2)
    *_, (found, _) = find(handlers, [], [cards["picture"], *files], word=code)
    assert found[0][1] == "1.00 · corner"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "Picture A is empty"),
        ({"files": None}, "Give pictures to compare with"),
        ({"sources": ["everything"]}, "source must be one of history, examples, got 'everything'"),
        ({"files": [{"path": "a.png"}] * 201}, f"At most {MAX_PICTURES} pictures are compared at once, got 201"),
        ({"files": [{"path": "gone.png"}]}, "None of the files is a readable picture"),
    ],
)
def test_what_cannot_be_compared_is_refused(handlers, cards, files, change, message):
    with pytest.raises(gr.Error, match=message):
        list(find(handlers, [], **{"files": files} | cards | change))


def test_without_weights_nothing_is_compared(empty, files):
    with pytest.raises(gr.Error, match="no weights"):
        list(find(empty, [], files))


def test_a_file_outside_the_cache_is_not_read(handlers, cards, files, tmp_path):
    Image.new("RGB", (40, 30), "green").save(tmp_path / "secret.png")
    outside = {"path": str(tmp_path / "secret.png"), "orig_name": "secret.png"}
    *_, (found, status) = find(handlers, [], [outside, files[0]], ["history"], [{"image": outside}], **cards)
    assert [caption.split(" · ")[1] for _, caption in found] == ["red"] and "2 could not be read" in status
