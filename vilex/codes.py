"""An image kept as a word: `.vilex` files, and short codes to copy, that hold ViLex tokens.

A copyable code is `vilex-2:<fingerprint>:<base64url>`: count and width of the tokens, one scale in fp16 per token,
its numbers in steps of that scale in int8, and a checksum. One token of width 384 takes 545 characters.
"""

import base64
import binascii
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from vilex.config import MAX_TOKENS

FORMAT = "vilex-1"
MAX_BYTES = 8 * 2**20  # 511 tokens of width 4864, Flux's, take 5 MB
TEXT_PREFIX = "vilex-2:"
_TEXT = re.compile(r"vilex-2:([\w-]{1,64}):([\w-]+)", re.ASCII)
_HEADER = struct.Struct("<BH")  # count, modulo 256, and width
_CHECKSUM_BYTES = 4
_STEPS = 127  # of int8, to either side of zero
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
    """Tokens and fingerprint as one line of text to copy, without the source.

    Each number is rounded to a 127th of its token's largest: the vector is off by less than 1 % where no number is
    more than 3.5 times the typical one (nano: 0.7 % on average). Raises ValueError as `save_code` does.
    """
    tokens = code.vilex_tokens.detach().to("cpu", torch.float16)
    _check_tokens(tokens)
    tokens = tokens.float()
    scales = (tokens.abs().amax(1) / _STEPS).half()  # (N,)
    steps = (tokens / scales.float().clamp_min(1e-9)[:, None]).round().clamp(-_STEPS, _STEPS).to(torch.int8)  # (N,D)
    body = _HEADER.pack(len(tokens) % 256, tokens.shape[1]) + scales.numpy().tobytes() + steps.numpy().tobytes()
    data = body + _short_checksum(code.fingerprint, body)
    text = f"{TEXT_PREFIX}{code.fingerprint}:{base64.urlsafe_b64encode(data).decode().rstrip('=')}"
    if not _TEXT.fullmatch(text):
        raise ValueError(f"a fingerprint is up to 64 letters and digits, got {code.fingerprint[:80]!r}")
    return text


def from_text(text: str, fingerprint: str | None = None) -> VilexCode:
    """The code that `to_text` wrote, spaces and line breaks allowed; raises ValueError as `load_code` does."""
    text = "".join(text.split())
    if not text.startswith(TEXT_PREFIX):
        raise ValueError(f"a code starts with {TEXT_PREFIX!r}, got {text[:20]!r}")
    match = _TEXT.fullmatch(text) if len(text) <= MAX_BYTES else None
    if match is None:
        raise ValueError("the code is damaged: it is cut off or holds characters that no code has")
    owner, data = match[1], _decode(match[2])
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if _short_checksum(owner, body) != checksum:
        raise ValueError("the code is damaged: a part is missing or altered")
    _check_owner(owner, fingerprint)
    return VilexCode(_unpack(body), owner)


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the code is damaged: a part is missing or altered") from error


def _unpack(body: bytes) -> Tensor:
    """Tokens (N,D) of the body of a copyable code."""
    told, width = _HEADER.unpack_from(body) if len(body) >= _HEADER.size else (0, 0)
    count, rest = divmod(len(body) - _HEADER.size, 2 + width)
    if count < 1 or rest or count % 256 != told:
        raise ValueError("the code is damaged: its size does not fit its tokens")
    numbers = torch.frombuffer(bytearray(body[_HEADER.size :]), dtype=torch.uint8)
    scales = numbers[: 2 * count].clone().view(torch.float16).float()  # (N,)
    tokens = numbers[2 * count :].view(torch.int8).view(count, width) * scales[:, None]  # (N,D)
    _check_tokens(tokens.half())
    return tokens


def _short_checksum(fingerprint: str, body: bytes) -> bytes:
    return hashlib.sha256(fingerprint.encode() + body).digest()[:_CHECKSUM_BYTES]


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
        raise ValueError("this is not a readable .vilex file") from error
    header_size = int.from_bytes(data[:8], "little")  # safetensors reads metadata from files only
    return json.loads(data[8 : 8 + header_size]).get("__metadata__", {}), tensors


def _check_metadata(metadata: dict[str, str], fingerprint: str | None) -> None:
    missing = {"format", "fingerprint", "num_tokens", "source", "sha256"} - metadata.keys()
    if missing or metadata["format"] != FORMAT:
        raise ValueError(f"this is not a {FORMAT} file: its format is {metadata.get('format', 'not named')[:60]!r}")
    _check_owner(metadata["fingerprint"], fingerprint)


def _check_owner(owner: str, fingerprint: str | None) -> None:
    if fingerprint is not None and owner != fingerprint:
        raise ValueError(f"the code was made by {owner[:60]!r}, this model is {fingerprint!r}")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or not 1 <= len(tokens) <= MAX_TOKENS or not tokens.shape[1]:
        raise ValueError(f"vilex_tokens must be 1 to {MAX_TOKENS} vectors, got shape {tuple(tokens.shape)}")
    if tokens.dtype != torch.float16 or not tokens.isfinite().all():
        raise ValueError("vilex_tokens must be finite numbers in fp16")


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.view(torch.uint8).numpy().tobytes()).hexdigest()
