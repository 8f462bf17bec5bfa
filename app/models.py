"""The models of one app: the first is loaded at its start, any other when somebody first opens its page."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vilex.checkpoint import WEIGHTS_FOLDER, find_weights, weights_name
from vilex.config import DEFAULT_TOKENS, PoolerConfig
from vilex.diffusion import CONFIG_NAME as EMBEDDED_MARK
from vilex.model import CONFIG_NAME
from vilex.pipeline import VilexPipeline

_log = logging.getLogger(__name__)


class LaterPipeline:
    """Stands in for the VilexPipeline of a folder until anything beyond these is asked of it, then `load` gives it.

    name, max_tokens, is_embedded and has_encoder, by which a page is laid out, come from the folder's small files.
    """

    def __init__(self, folder: Path, load: Callable[[], VilexPipeline]) -> None:
        self.name = weights_name(folder)
        self.max_tokens = _max_tokens(folder)
        self.is_embedded = (folder / "t2i" / EMBEDDED_MARK).is_file()
        self.has_encoder = (folder / CONFIG_NAME).is_file()
        self._load, self._lock, self._pipeline = load, threading.Lock(), None

    def __getattr__(self, name: str) -> Any:
        """The pipeline's own. Raises ValueError when it cannot be loaded; the next request tries again."""
        if name.startswith("_"):
            raise AttributeError(name)
        with self._lock:
            if self._pipeline is None:
                _log.info("loading %s", self.name)
                self._pipeline = self._load()
        return getattr(self._pipeline, name)


def _max_tokens(folder: Path) -> int:
    try:
        pooler = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["pooler"]
        return PoolerConfig.from_dict(pooler).num_queries
    except (OSError, ValueError, KeyError, TypeError):  # told when it is loaded
        return DEFAULT_TOKENS


def named_models(models: Sequence[str]) -> list[str]:
    """The models that flags name, else those of VILEX_WEIGHTS with commas between them; the first is the page's own."""
    named = models or os.environ.get("VILEX_WEIGHTS", "").split(",")
    return [name.strip() for name in named if name.strip()]


def other_folders(named: Sequence[str]) -> list[Path]:
    """The folders of all named models but the first, then of what else lies in assets/weights.

    Raises ValueError for a named one that is not there, and for two of one name.
    """
    chosen = [Path(find_weights(name)) for name in named[1:]]
    taken = [page_path(weights_name(folder)) for folder in chosen]
    try:
        taken.append(page_path(weights_name(Path(find_weights(next(iter(named), None))))))
    except ValueError:  # the page itself says that the first is missing
        _log.debug("the first model is missing")
    if twice := next((path for path in taken if taken.count(path) > 1), None):
        raise ValueError(
            f"two models would have the page {twice!r}: name each once, and rename a folder if they differ"
        )
    found = sorted(file.parent for file in WEIGHTS_FOLDER.glob(f"*/{CONFIG_NAME}"))
    return chosen + [folder for folder in found if page_path(folder.name) not in taken]


def page_path(name: str) -> str:
    """The part of the address at which a model that is not the first has its page."""
    return "model-" + re.sub(r"[^A-Za-z0-9.-]+", "-", name)
