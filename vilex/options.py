"""What the commands of `vilex` share: their options, and errors as one sentence with an exit code."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from vilex.codes import TEXT_PREFIX
from vilex.config import FITS, MAX_TOKENS, WEIGHT_RANGE, Config, GenerationConfig, PolishConfig, range_of

_log = logging.getLogger(__name__)


class Refusal(click.ClickException):
    """Wrong input: one sentence without the usage text, exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Engine:
    """Which model runs where; None leaves the choice to the environment and the machine."""

    model: str | None
    device: str | None
    dtype: str | None
    offload: bool = False


@dataclass(frozen=True)
class Output:
    """Where pictures go and what goes with them."""

    out: Path
    raw: bool = False
    share_tokens: bool = False
    sheet: bool = False


def sentence(error: Exception) -> str:
    """What an error says, with the file's name if it is about one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns what a user can mend into one sentence; --verbose logs where it came from."""
    try:
        yield
    except BrokenPipeError:
        raise  # click ends quietly when the reader of stdout is gone
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        advice = "; try a smaller --count" if isinstance(error, torch.OutOfMemoryError) else ""
        raise click.ClickException(f"{str(error).splitlines()[0]}{advice}") from error
    except (ValueError, OSError) as error:
        _log.info("refused", exc_info=True)
        raise Refusal(sentence(error)) from error


def setting_option(
    flag: str, name: str, default: float | None = None, kind: type[Config] = GenerationConfig
) -> Callable:
    """A click option with the range, help and default of a field of a config."""
    bounds, usual = range_of(kind, name), kind.__dataclass_fields__[name].default
    whole = isinstance(usual, int)
    ends = (bounds.minimum, bounds.maximum)
    number = click.IntRange(*map(int, ends)) if whole else click.FloatRange(*ends)
    return click.option(flag, name, type=number, default=usual if default is None else default, help=bounds.help)


def _stack(*decorators: Callable) -> Callable:
    return lambda command: functools.reduce(lambda wrapped, add: add(wrapped), reversed(decorators), command)


class Photo(click.Path):
    """A file or folder as a path, or a copied code, which stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, which must exist, or the code."""
        is_code = isinstance(value, str) and value.strip().startswith(TEXT_PREFIX)
        return value if is_code else super().convert(value, param, ctx)


_photo = Photo(exists=True, path_type=Path)
one_photo = click.argument("photo", type=_photo)
model_options = _stack(
    click.option("--model", help="Folder, name in assets/weights or hub id; else VILEX_WEIGHTS, else the default."),
    click.option("--device", help="cpu, cuda, cuda:1, mps; else VILEX_DEVICE, else the fastest there is."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of the denoiser; else VILEX_DTYPE, else the fastest that is exact enough.",
    ),
    click.option(
        "--offload", is_flag=True, help="Keep weights off the GPU while they are not at work: slower, smaller."
    ),
    click.option("-v", "--verbose", is_flag=True, help="Log what is done to stderr."),
)
photo_options = _stack(
    click.argument("photos", nargs=-1, required=True, metavar="PHOTO...", type=_photo),
    click.option(
        "--fit",
        type=click.Choice(FITS),
        default="crop",
        help="How a picture becomes square: cut to its centre (crop), to its left or top (start), to its right or "
        "bottom (end), or white added (pad).",
    ),
)
out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="outputs",
    envvar="VILEX_OUTPUTS",
    show_envvar=True,
    help="Folder for the pictures, made if needed. Other files there are kept: a name that is taken gets -2, -3 ...",
)
result_options = _stack(
    click.option("--raw", is_flag=True, help="Save the model's own pixels, without the upsampler."), out_option
)
drawing_options = _stack(
    setting_option("--seed", "seed"),
    setting_option("--steps", "num_inference_steps"),
    setting_option("--guidance", "guidance_scale"),
    result_options,
)
sheet_option = click.option("--sheet", is_flag=True, help="Also save all pictures of a PHOTO in one, <stem>-sheet.png.")
sharing_options = _stack(
    click.option(
        "--share-tokens",
        is_flag=True,
        help="Write the PHOTOs' tokens into the PNGs, for redo. Whoever has them can draw what the PHOTOs show.",
    ),
    sheet_option,
)
weight_option = click.option(
    "--weight",
    "weights",
    type=click.FloatRange(WEIGHT_RANGE.minimum, WEIGHT_RANGE.maximum),
    multiple=True,
    default=(1.0,),
    help=f"For all PHOTOs, or once for each in order: {WEIGHT_RANGE.help}.",
)
photo_option = click.option(
    "--photo", "photos", multiple=True, type=_photo, help="For a picture whose tokens are not inside; in their order."
)
prompt_option = click.option("--prompt", required=True, help="What the picture shows, in words.")


def shared(command: Callable) -> Callable:
    """Adds the options of every command, hands over `engine`, `config` and `output`, makes errors one sentence."""

    @model_options
    @functools.wraps(command)
    def wrapped(
        model: str | None, device: str | None, dtype: str | None, offload: bool, verbose: bool, **values: Any
    ) -> None:
        if verbose:
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("vilex").setLevel(logging.INFO)
        with one_sentence():
            kind = PolishConfig if "num_steps" in values else GenerationConfig
            if settings := _take(kind, values):
                values["config"] = kind(**settings)
            if "raw" in values:
                values["output"] = Output(**_take(Output, values))
            command(engine=Engine(model, device, dtype, offload), **values)

    return wrapped


def _take(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {name: values.pop(name) for name in kind.__dataclass_fields__ if name in values}


class TokenBudgets(click.ParamType):
    """Numbers of tokens with commas between them, as a sorted tuple without repeats."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers of a text such as `1,4,16,75`."""
        try:
            budgets = sorted({int(part) for part in value.split(",")})
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,4,16.", param, ctx)
        if budgets[0] < 1 or budgets[-1] > MAX_TOKENS:
            self.fail(f"{value!r}: every number must be between 1 and {MAX_TOKENS}.", param, ctx)
        return tuple(budgets)
