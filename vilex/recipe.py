"""The settings that a result carries in its PNG, so that the picture can be made again.

What comes out of a file is untrusted: the JSON is capped in size and checked field by field, and it
never names a class or a path to open.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from vilex import __version__
from vilex.config import MAX_PROMPT_CHARS, GenerationConfig

RECIPE_KEY = "vilex"  # keyword of the PNG text chunk
RECIPE_VERSION = 1
MAX_RECIPE_CHARS = 512 * 1024

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "pillow")
_TYPES = {
    "version": int,
    "prompt": str,
    "model": str,
    "generation": dict,
    "dtype": str,
    "device": str,
    "environment": dict,
    "codes": list,
}
_OPTIONAL = {"codes"}
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def build_recipe(
    prompt: str, generation: GenerationConfig, *, model: str, dtype: str, device: str, codes: Sequence[str] = ()
) -> dict[str, Any]:
    """A recipe for `save_png`; `codes` are the copyable words of the prompt's pictures, if they may be shared."""
    recipe = {
        "version": RECIPE_VERSION,
        "prompt": prompt,
        "model": model,
        "generation": generation.to_dict(),
        "dtype": dtype,
        "device": device,
        "environment": environment(),
    }
    return recipe | ({"codes": list(codes)} if codes else {})


def environment() -> dict[str, str]:
    """Version by name of ViLex, Python and the libraries that decide what a picture looks like."""
    versions = {"vilex": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Writes `image` as a PNG with `recipe` in a text chunk; the file appears whole or not at all.

    Raises ValueError when the recipe is not one that `load_recipe` would accept.
    """
    text = json.dumps(dict(recipe))  # plain ASCII, so that tEXt can hold it
    _parse(text, "the recipe")
    info = PngInfo()
    info.add_text(RECIPE_KEY, text)
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_recipe(source: str | Path | bytes | BinaryIO | Image.Image) -> dict[str, Any] | None:
    """The checked recipe of a PNG, or None when the picture carries none (other formats never do).

    Raises ValueError with one sentence when the file cannot be read or the recipe was tampered with.
    """
    name = Path(source).name if isinstance(source, str | Path) else "the picture"
    text = _read_text(source, name)
    return None if text is None else _parse(text, name)


def _read_text(source: str | Path | bytes | BinaryIO | Image.Image, name: str) -> str | None:
    if isinstance(source, Image.Image):
        text = source.info.get(RECIPE_KEY)
    else:
        try:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=["PNG"]) as image:
                text = image.info.get(RECIPE_KEY)  # of the header only: no pixel is decoded
        except UnidentifiedImageError:
            return None
        except (OSError, ValueError, SyntaxError, *_BOMBS) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{name} is not a readable picture: {reason}") from error
    return text if isinstance(text, str) else None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return _checked(_parse_json(text))
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} carries settings that cannot be used: {error}") from error


def _parse_json(text: str) -> Any:
    if len(text) > MAX_RECIPE_CHARS:
        raise ValueError(f"{len(text)} characters, the limit is {MAX_RECIPE_CHARS}")
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _checked(recipe: Any) -> dict[str, Any]:
    if not isinstance(recipe, dict):
        raise ValueError(f"a recipe is a JSON object, got {type(recipe).__name__}")
    if recipe.get("version") != RECIPE_VERSION:
        raise ValueError(f"recipe version {recipe.get('version')!r:.20}, this ViLex reads {RECIPE_VERSION}")
    if unknown := sorted(set(recipe) - set(_TYPES)):
        raise ValueError(f"unknown entry {unknown[0]!r:.40}")
    for key, kind in _TYPES.items():
        if key not in recipe and key not in _OPTIONAL:
            raise ValueError(f"{key} is missing")
        if key in recipe and type(recipe[key]) is not kind:
            raise ValueError(f"{key} must be {kind.__name__}, got {type(recipe[key]).__name__}")
    _check_contents(recipe)
    return recipe


def _check_contents(recipe: dict[str, Any]) -> None:
    if len(recipe["prompt"]) > MAX_PROMPT_CHARS:
        raise ValueError(f"the prompt has {len(recipe['prompt'])} characters, the limit is {MAX_PROMPT_CHARS}")
    for key, texts in (("codes", recipe.get("codes", [])), ("environment", recipe["environment"].values())):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} must hold text only")
    _check_types(recipe["generation"])
    GenerationConfig.from_dict(recipe["generation"])


def _check_types(generation: dict[str, Any]) -> None:
    for field in dataclasses.fields(GenerationConfig):
        value = generation.get(field.name, field.default)
        allowed = (int, float) if isinstance(field.default, float) else (type(field.default),)
        if type(value) not in allowed:
            raise ValueError(f"{field.name} must be {allowed[-1].__name__}, got {type(value).__name__}")
