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
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vilex import __version__
from vilex.codes import VilexCode, from_text, to_text
from vilex.config import (
    DEFAULT_TOKENS,
    FITS,
    MAX_PROMPT_CHARS,
    MAX_TOKENS,
    WEIGHT_RANGE,
    Config,
    GenerationConfig,
    setting,
)

if TYPE_CHECKING:
    from vilex.pipeline import VilexPipeline

RECIPE_KEY = "vilex"  # keyword of the PNG text chunk
RECIPE_VERSION = 3
_EARLIER_VERSION = 2  # which is read too: it had no words_scale, and used images that its prompt does not mention
MAX_RECIPE_CHARS = 10_000_000  # 255 tokens of Stable Diffusion 3 take 2.1 million
MAX_IMAGES = MAX_TOKENS  # a prompt gives each at least one token
_MAX_CHARS = 200  # of names and versions

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "pillow")
_RECIPE_TYPES = {
    "prompt": str,
    "config": dict,
    "model": str,
    "fingerprint": str,
    "dtype": str,
    "device": str,
    "environment": dict,
    "images": list,
}
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class RecipeImage(Config):
    """One picture of a prompt: under which name, as how many tokens, weighed and fitted how.

    fit is empty when no single picture gives these tokens, as with a blend. `code` holds them as they went into the
    prompt, weight included; it is there only where the user shares them.
    """

    name: str = ""
    num_tokens: int = setting(DEFAULT_TOKENS, 1, MAX_TOKENS)
    weight: float = setting(1.0, WEIGHT_RANGE.minimum, WEIGHT_RANGE.maximum)
    fit: str = "crop"
    code: str = ""

    def rules(self) -> list[str]:
        rule = f"fit must be one of {', '.join(FITS)} or empty"
        broken = [] if self.fit in (*FITS, "") else [f"{rule}, got {self.fit!r:.40}"]
        return broken + _too_long({"name": self.name})

    def tokens(self, fingerprint: str) -> Tensor | None:
        """The tokens (N,D) in the code, None without one. Raises ValueError if damaged or of another model."""
        if not self.code:
            return None
        tokens = from_text(self.code, fingerprint).vilex_tokens
        if len(tokens) != self.num_tokens:
            raise ValueError(f"the code of {self.name!r} has {len(tokens)} tokens, its recipe says {self.num_tokens}")
        return tokens


@dataclass(frozen=True)
class Recipe:
    """All that drew one picture: words, settings, pictures, and the model and machine in use."""

    prompt: str
    config: GenerationConfig
    model: str
    fingerprint: str
    dtype: str
    device: str
    environment: dict[str, str] = field(hash=False)
    images: tuple[RecipeImage, ...] = ()

    def __post_init__(self) -> None:
        broken = [f"the prompt has {len(self.prompt)} characters, the limit is {MAX_PROMPT_CHARS}"]
        broken = broken if len(self.prompt) > MAX_PROMPT_CHARS else []
        broken += _too_long({name: getattr(self, name) for name in ("model", "fingerprint", "dtype", "device")})
        broken += _too_long({"environment": "".join(self.environment)} | self.environment)
        if len(self.images) > MAX_IMAGES:
            broken.append(f"{len(self.images)} images, the limit is {MAX_IMAGES}")
        if broken:
            raise ValueError("; ".join(broken))


def _too_long(texts: dict[str, str]) -> list[str]:
    too_long = [(name, len(text)) for name, text in texts.items() if len(text) > _MAX_CHARS]
    return [f"{name:.40} has {length} characters, the limit is {_MAX_CHARS}" for name, length in too_long]


def build_recipe(
    pipeline: "VilexPipeline",
    prompt: str,
    config: GenerationConfig,
    images: Sequence[RecipeImage] = (),
    *,
    index: int = 0,
) -> Recipe:
    """The recipe of picture `index` of a request: with its own seed, it draws that picture alone."""
    return Recipe(
        prompt=prompt,
        config=dataclasses.replace(
            config,
            seed=config.seed + index,
            num_images=1,
            scheduler=pipeline.t2i.pick_scheduler(config.scheduler),  # "auto" may come to mean another
        ),
        model=pipeline.name[:_MAX_CHARS],
        fingerprint=pipeline.fingerprint,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=pipeline.device.type,
        environment=environment(),
        images=tuple(images),
    )


def build_recipe_image(
    pipeline: "VilexPipeline",
    name: str,
    vilex_tokens: Tensor,
    *,
    weight: float = 1.0,
    fit: str = "crop",
    share: bool = False,
) -> RecipeImage:
    """The entry for vilex_tokens (N,D) as they went into the prompt; `share` writes them into it."""
    code = to_text(VilexCode(vilex_tokens, pipeline.fingerprint)) if share else ""
    return RecipeImage(name[:_MAX_CHARS], len(vilex_tokens), weight, fit, code)


def differences(recipe: Recipe, pipeline: "VilexPipeline") -> str:
    """One sentence on what is other here than where the picture was drawn, empty when nothing is."""
    if recipe.fingerprint != pipeline.fingerprint:
        return f"Drawn by {recipe.model!r} with other weights than those in use: the picture will be another"
    here = build_recipe(pipeline, recipe.prompt, dataclasses.replace(recipe.config, scheduler="auto"))
    there, now = ({"dtype": r.dtype, "device": r.device} | r.environment for r in (recipe, here))
    changed = [name for name in there if name in now and there[name] != now[name] and name != "python"]
    if not changed:
        return ""
    listed = ", ".join(f"{name} {there[name]} (here {now[name]})" for name in changed)
    return f"Drawn with {listed}: small differences are normal"


def environment() -> dict[str, str]:
    """Version by name of ViLex, Python and the libraries that decide what a picture looks like."""
    versions = {"vilex": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def to_json(recipe: Recipe) -> str:
    """A recipe as plain ASCII, which a PNG's tEXt chunk can hold."""
    return json.dumps({"version": RECIPE_VERSION} | dataclasses.asdict(recipe))


def save_png(image: Image.Image, path: str | Path, recipe: Recipe) -> None:
    """Writes `image` as a PNG with `recipe` in a text chunk; the file appears whole or not at all.

    Raises ValueError when the recipe is not one that `load_recipe` would accept.
    """
    text = to_json(recipe)
    from_json(text, "the recipe")
    info = PngInfo()
    info.add_text(RECIPE_KEY, text)
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_recipe(source: str | Path | bytes | BinaryIO | Image.Image) -> Recipe | None:
    """The checked recipe of a PNG, or None when the picture carries none (other formats never do).

    Raises ValueError with one sentence when the file cannot be read or the recipe was tampered with.
    """
    name = Path(source).name if isinstance(source, str | Path) else "the picture"
    text = _read_text(source, name)
    return None if text is None else from_json(text, name)


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


def from_json(text: str, name: str) -> Recipe:
    """The recipe that `to_json` wrote; raises ValueError with one sentence, `name` first, when it was tampered with."""
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


def _checked(values: Any) -> Recipe:
    """A recipe from parsed JSON."""
    if not isinstance(values, dict):
        raise ValueError(f"a recipe is a JSON object, got {type(values).__name__}")
    version = values.pop("version", None)
    if type(version) is int and version == 1:
        raise ValueError("recipe version 1 is of an earlier ViLex and names no pictures: draw the picture anew")
    if type(version) is not int or version not in (_EARLIER_VERSION, RECIPE_VERSION):
        raise ValueError(f"recipe version {version!r:.20}, this ViLex reads {_EARLIER_VERSION} and {RECIPE_VERSION}")
    _check_entries(values, _RECIPE_TYPES, "")
    if version == _EARLIER_VERSION:
        values["config"] |= {"words_scale": 0.0}
    if not all(isinstance(text, str) for text in values["environment"].values()):
        raise ValueError("environment must hold text only")
    config = _build(GenerationConfig, values["config"], "config")
    images = [_build(RecipeImage, image, f"image {i}") for i, image in enumerate(values["images"], 1)]
    recipe = Recipe(**values | {"config": config, "images": tuple(images)})
    return _with_all_images(recipe) if version == _EARLIER_VERSION else recipe


def _with_all_images(recipe: Recipe) -> Recipe:
    """A recipe of the earlier version, which put images that its prompt does not mention first, in words of now."""
    from vilex.prompt import mentioned  # here: it takes seconds to import

    used = mentioned(recipe.prompt, len(recipe.images), [image.name for image in recipe.images])
    left_out = "".join(f"<image:{i + 1}> " for i in range(len(recipe.images)) if i not in used)
    return dataclasses.replace(recipe, prompt=left_out + recipe.prompt)


def _build(kind: type[Config], values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object, got {type(values).__name__}")
    types = {f.name: type(f.default) for f in dataclasses.fields(kind)}
    _check_entries(values, types, f"{name}: ")
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_entries(values: dict[str, Any], types: dict[str, type], where: str) -> None:
    """Every entry is there, none is unknown, each has its type; whole numbers may stand for decimal ones."""
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{where}unknown entry {unknown[0]!r:.40}")
    for name, kind in types.items():
        if name not in values:
            raise ValueError(f"{where}{name} is missing")
        if type(values[name]) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{where}{name} must be {kind.__name__}, got {type(values[name]).__name__}")
