"""Old files go: gradio forgets those of an output that was left as it is once, which every drawing does."""

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import gradio as gr
from gradio.utils import abspath, get_upload_folder

MOST_SECONDS = 86_400  # that a file is kept
EVERY_SECONDS = 3_600


def start_cleaning(demo: gr.Blocks) -> None:
    """Deletes files of the app's cache once they are a day old, from now on, but for those that the page itself has."""

    def work() -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            with suppress(OSError):  # another app may clean the same folder
                delete_old(abspath(get_upload_folder()), MOST_SECONDS, kept_files(demo))

    threading.Thread(target=work, name="cleanup", daemon=True).start()


def kept_files(demo: gr.Blocks) -> set[str]:
    """Paths of the files that belong to the page, such as its examples."""
    return {path for block in demo.blocks.values() for path in block.keep_in_cache}


def delete_old(folder: Path, most_seconds: float, kept: Collection[str] = ()) -> None:
    """Deletes files below a folder that have lain there for longer, and empty folders that nobody has changed since."""
    oldest = time.time() - most_seconds
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        with suppress(OSError):  # in use, gone meanwhile, or a folder that is not empty
            if path.lstat().st_ctime > oldest or str(path) in kept:  # copies keep another file's mtime
                continue
            path.rmdir() if path.is_dir() else path.unlink()
