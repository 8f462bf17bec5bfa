"""Settings with their ranges and units; flags, sliders and the JSON beside the weights come from here.

Every config is a frozen dataclass whose numeric fields carry their range, so that one `validate`
serves them all and names field, value and rule.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

DEFAULT_TOKENS = 75  # the paper's 77 positions less BOS and EOS
MAX_TOKENS = 511  # of any model: 512 positions of T5 less EOS; each model has its own limit
DEFAULT_BUDGETS = (1, 4, 16, 75)  # tokens per rung of the ladder, the columns of the paper's table
MAX_PROMPT_CHARS = 1000
DEFAULT_MODEL = "mini"
# how a picture becomes square: its centre, its left or top, its right or bottom, or all of it with edges added
Fit = Literal["crop", "start", "end", "pad"]
FITS: tuple[Fit, ...] = get_args(Fit)
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Range:
    """Closed range of a numeric setting."""

    minimum: float
    maximum: float
    help: str = ""


def check_range(name: str, value: Any, bounds: Range) -> None:
    """Raises ValueError, with name and rule, unless `value` is a finite number within the bounds."""
    if problem := _outside(name, value, bounds):
        raise ValueError(problem)


def setting(default: Any, minimum: float, maximum: float, help: str = "") -> Any:
    """A dataclass field with a range."""
    return field(default=default, metadata={"range": Range(minimum, maximum, help)})


def range_of(config_class: type, name: str) -> Range:
    """The declared range of a field of a config class."""
    return config_class.__dataclass_fields__[name].metadata["range"]


def tokens_in_words(count: int) -> str:
    """A number of tokens in words."""
    return "1 token" if count == 1 else f"{count} tokens"


def token_budgets(max_tokens: int) -> tuple[int, ...]:
    """The ladder of a model that gives at most `max_tokens`: the default budgets below, then all of its tokens."""
    return (*(budget for budget in DEFAULT_BUDGETS if budget < max_tokens), max_tokens)


WEIGHT_RANGE = Range(0.0, 2.0, "how much a picture says: 0 is the average word, 1 the picture as it is")
SHARE_RANGE = Range(0.0, 1.0, "share of the second picture")
CUT_RANGE = Range(0, MAX_TOKENS, "tokens of the first picture; the rest are the second's")


class Config:
    """Base of all configs: range checks at construction, JSON in and out."""

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        problems = [problem for f in fields if (problem := _problem(f, getattr(self, f.name)))]
        if problems := problems or self.rules():  # rules compute with values that hold by themselves
            raise ValueError("; ".join(problems))
        for f in fields:
            if _is_whole(f):  # a slider's 4.0
                object.__setattr__(self, f.name, int(getattr(self, f.name)))

    def rules(self) -> list[str]:
        """Sentences for broken rules that concern more than one field."""
        return []

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A config from parsed JSON; raises ValueError on a name that is not a field."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @classmethod
    def load_json(cls, path: Path) -> Self:
        """A config from a JSON file."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _is_whole(f: dataclasses.Field) -> bool:
    return "range" in f.metadata and isinstance(f.default, int)


def _problem(f: dataclasses.Field, value: Any) -> str | None:
    bounds: Range | None = f.metadata.get("range")
    if bounds is None:
        return f"{f.name} must be text, got {value!r}" if f.type is str and not isinstance(value, str) else None
    if problem := _outside(f.name, value, bounds):
        return problem
    return f"{f.name} must be a whole number, got {value!r}" if _is_whole(f) and value != int(value) else None


def _outside(name: str, value: Any, bounds: Range) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        return f"{name} must be a number, got {value!r}"
    if not bounds.minimum <= value <= bounds.maximum:
        return f"{name} must be between {bounds.minimum:g} and {bounds.maximum:g}, got {value!r:.40}"
    return None


@dataclass(frozen=True)
class GenerationConfig(Config):
    """What a user can turn in one request."""

    num_tokens: int = setting(DEFAULT_TOKENS, 1, MAX_TOKENS, "ViLex tokens kept of each image")
    num_images: int = setting(1, 1, 16, "pictures per request; picture i uses seed + i")
    seed: int = setting(0, 0, 2**32 - 1, "32-bit seed of the first picture")
    num_inference_steps: int = setting(12, 1, 100, "denoising steps; Stable Diffusion wants about 20")
    guidance_scale: float = setting(1.5, 0.0, 20.0, "classifier-free guidance, 1 = plain conditioning")
    tfg_scale: float = setting(1.0, 0.0, 20.0, "text-free guidance: 0 = no joint prompt, 1 = plain joint")
    guidance_low: float = setting(0.0, 0.0, 1.0, "guidance is on while t/T is at least this")
    guidance_high: float = setting(1.0, 0.0, 1.0, "guidance is on while t/T is at most this")
    scheduler: str = "auto"
    negative_prompt: str = ""
    words_scale: float = setting(0.0, 0.0, 20.0, "guidance by the words alone, beside an image: 0 = none")

    def rules(self) -> list[str]:
        broken = []
        if self.scheduler not in SCHEDULERS:
            broken.append(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        if len(self.negative_prompt) > MAX_PROMPT_CHARS:
            length = len(self.negative_prompt)
            broken.append(f"negative_prompt has {length} characters, the limit is {MAX_PROMPT_CHARS}")
        if self.seed + self.num_images > 2**32:
            broken.append(f"seed + num_images must not exceed 2^32, got {self.seed} + {self.num_images}")
        if self.guidance_low > self.guidance_high:
            broken.append(f"guidance_low {self.guidance_low:g} must not exceed guidance_high {self.guidance_high:g}")
        return broken


# settings that weigh words against pictures, and what they are called
MIXING = {"tfg_scale": "text-free guidance", "words_scale": "guidance by the words alone"}
# where the words of a mix show with the weights that come with the code
MIX_SCALES = {"tfg_scale": 2.0, "words_scale": 6.0}
SCHEDULERS = ("auto", "dpm++", "sde-dpm++", "ddim", "ddpm", "euler")


@dataclass(frozen=True)
class PolishConfig(Config):
    """How a picture's tokens are improved for this one picture."""

    num_tokens: int = setting(DEFAULT_TOKENS, 1, MAX_TOKENS, "tokens to improve")
    num_steps: int = setting(40, 1, 1000, "gradient steps")
    seed: int = setting(0, 0, 2**32 - 1, "32-bit seed of the noises")


@dataclass(frozen=True)
class EncoderConfig(Config):
    """A vision tower giving patch tokens (B,P,D).

    `open_clip` or `timm` names a tower of that library, `transformers` holds the settings of one, model_type among
    them; without any the ViT of the fields from image_size on is built. tower_size is the height and width that a
    library's tower reads in pixels, its own where empty.
    """

    open_clip: str = ""
    timm: str = ""
    transformers: dict[str, Any] = field(default_factory=dict, hash=False)
    tower_size: tuple[int, ...] = ()
    image_size: int = setting(64, 8, 1024, "pixels")
    patch_size: int = setting(8, 2, 64, "pixels")
    width: int = setting(192, 8, 4096)
    layers: int = setting(6, 1, 64)
    heads: int = setting(6, 1, 64)
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels in [0,1]
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def rules(self) -> list[str]:
        broken = []
        if self.image_size % self.patch_size:
            broken.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            broken.append(f"width {self.width} is not a multiple of heads {self.heads}")
        return broken + self._broken_tower()

    def _broken_tower(self) -> list[str]:
        broken, named = [], [name for name in ("open_clip", "timm", "transformers") if getattr(self, name)]
        if len(named) > 1:
            broken.append(f"an encoder has one tower, got {' and '.join(named)}")
        sides = self.tower_size
        if sides and (len(sides) != 2 or not all(isinstance(side, int) and 8 <= side <= 4096 for side in sides)):
            broken.append(f"tower_size must be empty or a height and a width between 8 and 4096, got {sides!r}")
        if not isinstance(self.transformers, dict):
            broken.append(f"transformers must be an object with settings, got {self.transformers!r}")
        if self.transformers and not sides:
            broken.append("a tower of transformers needs its tower_size")
        return broken


@dataclass(frozen=True)
class PoolerConfig(Config):
    """Learned queries cross-attending to patch tokens; the paper's default is 5 blocks."""

    num_queries: int = setting(DEFAULT_TOKENS, 1, MAX_TOKENS)
    num_blocks: int = setting(5, 1, 8)
    width: int = setting(192, 8, 4096)
    heads: int = setting(6, 1, 64)
    patch_width: int = setting(192, 8, 8192, "width of the encoder's patch tokens")
    text_width: int = setting(384, 4, 16384, "width of the word embeddings")
    token_bias: bool = False  # one of each token's own, beside the one that all share

    def rules(self) -> list[str]:
        return [f"width {self.width} is not a multiple of heads {self.heads}"] if self.width % self.heads else []


@dataclass(frozen=True)
class T2IConfig(Config):
    """What the embedded pixel-space model needs beside its U-Net's and scheduler's own JSON."""

    pixel_unshuffle: int = setting(1, 1, 16, "pixels per side folded into channels")
    position_frequencies: int = setting(0, 0, 8, "waves per axis that tell the denoiser where it is")
    token_frequencies: int = setting(0, 0, 64, "waves that tell the denoiser where in the prompt a token stands")
    prompt_scale: float = setting(1.0, 0.1, 100, "factor of what the denoiser's cross-attention reads")
    context_length: int = setting(128, 8, 1024, "positions every prompt is padded to")
    coring: float = setting(0.0, 0, 255, "levels of 255 that the finest checkerboard loses at each step of a sample")
    text_encoder: str = MINILM_ID
