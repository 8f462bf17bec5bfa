"""An image kept as a word: `.vilex` files, and short codes to copy, that hold ViLex tokens."""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vilex.config import MAX_TOKENS

FORMAT = "vilex-1"
MAX_BYTES = 4 * 2**20  # 75 tokens of the widest text encoder take 2.5 MB
_TEXT_PREFIX = f"{FORMAT}:"
_MAX_SOURCE = 100  # characters of the source's name that are kept


@dataclass(frozen=True)
class VilexCode:
    """ViLex tokens (N,D) in fp32, the fingerprint of the model they belong to, and the source file's stem."""

    vilex_tokens: Tensor
    fingerprint: str
    source: str = ""


def fingerprint(module: nn.Module) -> str:
    """12 hex digits that tell one set of weights from another.

    Weights count as rounded to fp16, so that they have one fingerprint before saving and after loading.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_code(path: str | Path, vilex_tokens: Tensor, fingerprint: str, source: str = "") -> None:
    """Writes vilex_tokens (N,D) as a `.vilex` file in fp16; of `source` only the file's stem is kept.

    Raises ValueError on tokens of a wrong shape or not finite in fp16.
    """
    Path(path).write_bytes(to_bytes(VilexCode(vilex_tokens, fingerprint, source)))


def load_code(path: str | Path, fingerprint: str | None = None) -> VilexCode:
    """The code in a `.vilex` file; with `fingerprint`, only if the model of that fingerprint made it.

    Raises ValueError on files that are too big, damaged, altered or of another model.
    """
    with open(path, "rb") as file:
        return from_bytes(file.read(MAX_BYTES + 1), fingerprint)


def to_text(code: VilexCode) -> str:
    """A code as one line of text to copy; practical for a few tokens."""
    return _TEXT_PREFIX + base64.urlsafe_b64encode(to_bytes(code)).decode()


def from_text(text: str, fingerprint: str | None = None) -> VilexCode:
    """The code that `to_text` wrote; raises ValueError as `load_code` does."""
    if not text.strip().startswith(_TEXT_PREFIX):
        raise ValueError(f"a code starts with {_TEXT_PREFIX!r}, got {text.strip()[:20]!r}")
    try:
        data = base64.b64decode(text.strip().removeprefix(_TEXT_PREFIX), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the code is damaged: {error}") from error
    return from_bytes(data, fingerprint)


def to_bytes(code: VilexCode) -> bytes:
    """A code as the bytes of a safetensors file."""
    tokens = code.vilex_tokens.detach().to("cpu", torch.float16).contiguous()
    _check_tokens(tokens)
    metadata = {
        "format": FORMAT,
        "fingerprint": code.fingerprint,
        "num_tokens": str(len(tokens)),
        "source": Path(code.source).stem[:_MAX_SOURCE],
        "sha256": _sha256(tokens),
    }
    return save({"vilex_tokens": tokens}, metadata)


def from_bytes(data: bytes, fingerprint: str | None = None) -> VilexCode:
    """The code in the bytes of a `.vilex` file; raises ValueError as `load_code` does."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"the code is larger than {MAX_BYTES} bytes")
    metadata, tensors = _parse(data)
    _check_metadata(metadata, fingerprint)
    tokens = tensors.get("vilex_tokens")
    if tokens is None or len(tensors) > 1:
        raise ValueError("the code is damaged: it must hold one tensor, vilex_tokens")
    _check_tokens(tokens)
    if _sha256(tokens) != metadata["sha256"]:
        raise ValueError("the code is damaged: its checksum does not fit its tokens")
    return VilexCode(tokens.float(), metadata["fingerprint"], metadata["source"][:_MAX_SOURCE])


def _parse(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"this is not a readable .vilex file: {error}") from error
    header_size = int.from_bytes(data[:8], "little")  # safetensors reads metadata from files only
    return json.loads(data[8 : 8 + header_size]).get("__metadata__", {}), tensors


def _check_metadata(metadata: dict[str, str], fingerprint: str | None) -> None:
    missing = {"format", "fingerprint", "num_tokens", "source", "sha256"} - metadata.keys()
    if missing or metadata["format"] != FORMAT:
        raise ValueError(f"this is not a {FORMAT} file: its format is {metadata.get('format', 'not named')[:60]!r}")
    if fingerprint is not None and metadata["fingerprint"] != fingerprint:
        raise ValueError(f"the code was made by {metadata['fingerprint'][:60]!r}, this model is {fingerprint!r}")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or not 1 <= len(tokens) <= MAX_TOKENS or not tokens.shape[1]:
        raise ValueError(f"vilex_tokens must be 1 to {MAX_TOKENS} vectors, got shape {tuple(tokens.shape)}")
    if tokens.dtype != torch.float16 or not tokens.isfinite().all():
        raise ValueError("vilex_tokens must be finite numbers in fp16")


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.view(torch.uint8).numpy().tobytes()).hexdigest()
