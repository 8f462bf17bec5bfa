"""Old files of the app's cache are deleted, and no others."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import os
import time

from app import ui
from app.cleanup import MOST_SECONDS, delete_old, kept_files

assert app
pytest_plugins = ["tabs"]


def test_old_files_and_empty_folders_go_and_the_rest_stays(tmp_path, monkeypatch):
    for name in ("a/result.png", "b/result.png", "b/example.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    now, kept = time.time(), {str(tmp_path / "b" / "example.png")}
    steps = [(23, {"a", "a/result.png", "b", "b/result.png", "b/example.png"}), (25, {"a", "b", "b/example.png"})]
    for hours, left in steps:
        monkeypatch.setattr(time, "time", lambda later=now + 3600 * hours: later)
        delete_old(tmp_path, MOST_SECONDS, kept)
        assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} >= left - {"a"}
        assert (tmp_path / "a" / "result.png").exists() == (hours < 24) == (tmp_path / "b" / "result.png").exists()
    delete_old(tmp_path, MOST_SECONDS, kept)
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_a_copy_of_an_old_file_is_new(tmp_path):
    (tmp_path / "example.png").write_bytes(b"1")
    os.utime(tmp_path / "example.png", (0, 0))
    delete_old(tmp_path, 3600)
    assert (tmp_path / "example.png").exists()


def test_the_example_pictures_are_the_pages_own(handlers):
    names = {path.rsplit("/", 1)[1] for path in kept_files(ui.build_demo(handlers))}
    assert set(ui.EXAMPLES) <= names
