"""The command `vilex`: pictures to pictures, over files and folders.

Written paths go to stdout; notes, progress and errors to stderr. Exit code 0 means all was done, 1 that a part was
skipped or the model failed, 2 that the input was wrong or nothing could be done.
"""

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from PIL import Image
from torch import Tensor

from vilex import __version__
from vilex.codes import load_code, save_code
from vilex.config import DEFAULT_BUDGETS, MAX_TOKENS, GenerationConfig
from vilex.images import find_images, load_image
from vilex.options import (
    Engine,
    TokenBudgets,
    drawing_options,
    photo_options,
    prompt_option,
    sentence,
    setting_option,
    shared,
)
from vilex.recipe import build_recipe, save_png
from vilex.upsampler import Upsampler, build_upsampler

if TYPE_CHECKING:  # diffusers and transformers take seconds to import: --help and bad input must not wait for them
    from vilex.pipeline import Fit, Generation, VilexPipeline

CODE_SUFFIX = ".vilex"
_MAX_STEM = 60  # characters of an output's name, so that it fits any file system
_SMALL_SIDE = 256  # pixels; models that draw at this size or above need no upsampler
_log = logging.getLogger(__name__)


def load_pipeline(engine: Engine) -> "VilexPipeline":
    """The pipeline of the options --model, --device and --dtype; raises ValueError as `from_pretrained` does."""
    from vilex.pipeline import VilexPipeline

    _silence_libraries()
    return VilexPipeline.from_pretrained(engine.model, device=engine.device, dtype=engine.dtype)


def _silence_libraries() -> None:
    """Hides the bars that diffusers and transformers draw for every file they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Desk:
    """A loaded pipeline and where its pictures go; `sources` are the given files, which are never overwritten."""

    pipeline: "VilexPipeline"
    out: Path
    upsampler: Upsampler | None
    sources: frozenset[Path]

    def save(self, generation: "Generation", *names: str) -> None:
        """Writes one PNG per picture, each with the settings that draw it alone, and echoes its path."""
        _note(names[0], generation.note)
        for i, (image, name) in enumerate(zip(generation.images, names, strict=True)):
            recipe = build_recipe(self.pipeline, generation.prompt, generation.config, index=i)
            path = _target(self.out / f"{name}.png", self.sources)
            save_png(self._enlarge(image), path, recipe)
            _echo_path(path)

    def _enlarge(self, image: Image.Image) -> Image.Image:
        return image if self.upsampler is None or image.width >= _SMALL_SIDE else self.upsampler(image)


def _open_desk(engine: Engine, out: Path, raw: bool, sources: Mapping[str, Path]) -> Desk:
    out.mkdir(parents=True, exist_ok=True)
    pipeline, upsampler = load_pipeline(engine), None if raw else build_upsampler()
    upsampler_name = upsampler.name if upsampler else "no upsampler"
    _log.info("%s on %s in %s, %s", pipeline.name, pipeline.device, pipeline.dtype, upsampler_name)
    return Desk(pipeline, out, upsampler, frozenset(path.resolve() for path in sources.values()))


def _target(path: Path, sources: frozenset[Path]) -> Path:
    if path.resolve() in sources:
        raise ValueError(f"{path} is one of the given files and would be overwritten: choose another --out")
    return path


def _find_inputs(photos: Sequence[Path]) -> dict[str, Path]:
    """File by a stem that no other file has: the second `a` is `a-2`."""
    inputs: dict[str, Path] = {}
    for path in (file for photo in photos for file in _files_of(photo)):
        stem = name = path.stem[:_MAX_STEM]
        taken = {name.casefold() for name in inputs}
        count = 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}-{count}"
        inputs[name] = path
    return inputs


def _files_of(path: Path) -> list[Path]:
    try:
        return find_images([path])
    except ValueError:
        codes = sorted(path.glob(f"[!.]*{CODE_SUFFIX}"))
        if not codes:
            raise
        return codes


def _read_word(path: Path, pipeline: "VilexPipeline", num_tokens: int, fit: "Fit") -> Tensor:
    """vilex_tokens (N,D) of a picture or a .vilex file; raises ValueError with the file's name."""
    if path.suffix.lower() == CODE_SUFFIX:
        word = _read_code(path, pipeline.fingerprint)[:num_tokens]
    else:
        word = pipeline.encode(load_image(path, on_note=_echo_error), num_tokens, fit)[0]
    if len(word) < num_tokens:
        _note(path.name, f"has {len(word)} tokens, fewer than the {num_tokens} asked for")
    return word


def _read_code(path: Path, fingerprint: str) -> Tensor:
    try:
        return load_code(path, fingerprint).vilex_tokens
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_words(
    inputs: Mapping[str, Path], read: Callable[[Path], Tensor], on_skip: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    """(stem, vilex_tokens) of each file that can be read; exits with 1 or 2 at the end if some or all could not."""
    skipped = 0
    for stem, path in inputs.items():
        try:
            word = read(path)
        except (ValueError, OSError) as error:
            _echo_error(f"skipped: {sentence(error)}")
            skipped += 1
            on_skip()
            continue
        yield stem, word
    if skipped:
        raise click.exceptions.Exit(2 if skipped == len(inputs) else 1)


@contextmanager
def _progress(length: int) -> Iterator[Callable[..., None]]:
    """A function that moves a bar on stderr, by one or the count given; without a terminal no bar is drawn."""
    with click.progressbar(length=length, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda count=1: bar.update(count)


def _echo_error(text: str) -> None:
    _clear_line()
    click.echo(text, err=True)


def _echo_path(path: Path) -> None:
    _clear_line()
    click.echo(click.format_filename(path))


def _clear_line() -> None:
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)  # the bar is there; it comes back with its next step


def _note(name: str, text: str) -> None:
    if text:
        _echo_error(f"{name}: {text}")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """ViLex: an image is a word. Pictures become 1 to 75 tokens beside words, and tokens become pictures.

    PHOTO is a picture, a .vilex file of this model, or a folder of pictures (of .vilex files where it holds no
    pictures). A file that cannot be read is skipped and named on stderr. Exit code: 0 all done, 1 some skipped or the
    model failed, 2 wrong input or nothing done.
    """


@main.command()
@photo_options
@click.option(
    "--tokens",
    "budgets",
    type=TokenBudgets(),
    default=",".join(map(str, DEFAULT_BUDGETS)),
    help=f"How many tokens to draw from, each 1 to {MAX_TOKENS}.",
)
@drawing_options
@shared
def reconstruct(
    engine: Engine, config: GenerationConfig, photos: Sequence[Path], fit: "Fit", out: Path, raw: bool,
    budgets: Sequence[int],
) -> None:  # fmt: skip
    """Draw each PHOTO again from few and many tokens.

    All start from the same noise. Written as <stem>-t<tokens>.png.
    """
    inputs = _find_inputs(photos)
    desk = _open_desk(engine, out, raw, inputs)
    read = functools.partial(_read_word, pipeline=desk.pipeline, num_tokens=max(budgets), fit=fit)
    with _progress(len(inputs) * len(budgets)) as advance:
        for stem, word in _read_words(inputs, read, lambda: advance(len(budgets))):
            within = sorted({min(budget, len(word)) for budget in budgets})  # a .vilex file may hold fewer
            for num_tokens, generation in desk.pipeline.reconstruct(word, within, config):
                desk.save(generation, f"{stem}-t{num_tokens}")
                advance()


@main.command()
@photo_options
@setting_option("--count", "num_images", 4)
@setting_option("--tokens", "num_tokens")
@drawing_options
@shared
def vary(engine: Engine, config: GenerationConfig, photos: Sequence[Path], fit: "Fit", out: Path, raw: bool) -> None:
    """Draw new pictures with each PHOTO's content.

    Written as <stem>-seed<seed>.png; the same seed gives the same picture, whatever --count is.
    """
    inputs = _find_inputs(photos)
    desk = _open_desk(engine, out, raw, inputs)
    _draw_each(desk, inputs, "", config, fit, ending="")


@main.command()
@photo_options
@prompt_option
@setting_option("--tfg", "tfg_scale", 3)
@setting_option("--count", "num_images")
@setting_option("--tokens", "num_tokens", 16)
@drawing_options
@shared
def mix(
    engine: Engine, config: GenerationConfig, photos: Sequence[Path], fit: "Fit", out: Path, raw: bool, prompt: str
) -> None:
    """Draw each PHOTO as a word of a prompt.

    In the prompt, <image> stands for the picture: "<image>, in the style of Claude Monet". Without it the picture
    comes first. If the prompt holds more than one, such as "<image> riding <image>" or "<image:2> on <image:1>",
    all PHOTOs are used together in one prompt; otherwise each PHOTO gets its own picture.

    Written as <stem>-mix-seed<seed>.png, with + between several stems.
    """
    inputs = _find_inputs(photos)
    desk = _open_desk(engine, out, raw, inputs)
    from vilex.prompt import count_placeholders

    if count_placeholders(prompt) > 1:
        words = [_read_word(path, desk.pipeline, config.num_tokens, fit) for path in inputs.values()]
        with _progress(config.num_inference_steps) as advance:
            _draw(desk, f"{'+'.join(inputs)[:_MAX_STEM]}-mix", prompt, words, config, advance)
    else:
        _draw_each(desk, inputs, prompt, config, fit, ending="-mix")


@main.command()
@prompt_option
@setting_option("--count", "num_images", 4)
@drawing_options
@shared
def generate(engine: Engine, config: GenerationConfig, out: Path, raw: bool, prompt: str) -> None:
    """Draw pictures from words alone.

    Written as <words>-seed<seed>.png.
    """
    desk = _open_desk(engine, out, raw, {})
    stem = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:_MAX_STEM] or "picture"
    with _progress(config.num_inference_steps) as advance:
        _draw(desk, stem, prompt, [], config, advance)


def _draw_each(
    desk: Desk, inputs: Mapping[str, Path], prompt: str, config: GenerationConfig, fit: "Fit", ending: str
) -> None:
    read = functools.partial(_read_word, pipeline=desk.pipeline, num_tokens=config.num_tokens, fit=fit)
    steps = config.num_inference_steps
    with _progress(len(inputs) * steps) as advance:
        for stem, word in _read_words(inputs, read, lambda: advance(steps)):
            _draw(desk, stem + ending, prompt, [word], config, advance)


def _draw(
    desk: Desk, stem: str, prompt: str, words: Sequence[Tensor], config: GenerationConfig, advance: Callable[[], None]
) -> None:
    generation = desk.pipeline.generate(prompt, words, config, on_step=lambda *_: advance())
    desk.save(generation, *(f"{stem}-seed{config.seed + i}" for i in range(config.num_images)))


@main.command()
@photo_options
@setting_option("--tokens", "num_tokens")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="outputs",
    envvar="VILEX_OUTPUTS",
    show_envvar=True,
    help="File that ends in .vilex, for one PHOTO, or a folder.",
)
@shared
def encode(engine: Engine, config: GenerationConfig, photos: Sequence[Path], fit: "Fit", out: Path) -> None:
    """Keep each PHOTO as a word in a .vilex file.

    The other commands take such a file in place of a picture. Whoever has it can draw what the picture shows.
    """
    inputs = _find_inputs(photos)
    is_file = out.suffix == CODE_SUFFIX
    if is_file and len(inputs) > 1:
        raise ValueError(f"{len(inputs)} pictures need a folder, --out is the file {out}")
    (out.parent if is_file else out).mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(engine)
    sources = frozenset(path.resolve() for path in inputs.values())
    read = functools.partial(_read_word, pipeline=pipeline, num_tokens=config.num_tokens, fit=fit)
    with _progress(len(inputs)) as advance:
        for stem, word in _read_words(inputs, read, advance):
            path = _target(out if is_file else out / f"{stem}{CODE_SUFFIX}", sources)
            save_code(path, word, pipeline.fingerprint, source=inputs[stem].name)
            _echo_path(path)
            advance()
