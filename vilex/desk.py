"""What the commands of `vilex` read and write: pictures and codes in, PNGs and lines of text out."""

import filecmp
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import click
import torch
from PIL import Image
from torch import Tensor

from vilex.codes import from_text, load_code
from vilex.config import GenerationConfig
from vilex.images import contact_sheet, find_images, fit_image, load_image
from vilex.options import Engine, Output, sentence
from vilex.recipe import Recipe, RecipeImage, build_recipe, build_recipe_image, load_recipe, save_png
from vilex.upsampler import SMALL_SIDE, Upsampler, build_upsampler

if TYPE_CHECKING:  # diffusers and transformers take seconds to import: --help and bad input must not wait for them
    from vilex.pipeline import Generation, VilexPipeline

CODE_SUFFIX = ".vilex"
MAX_STEM = 60  # characters of an output's name, so that it fits any file system
_CODE_STEM = "word"  # of a copied code, which has no name
_log = logging.getLogger(__name__)

T = TypeVar("T")
Source = Path | str  # a file, or a copied code


@dataclass(frozen=True)
class InputWord:
    """A given picture as a word of a prompt: vilex_tokens (N,D), weighed; image and fit are empty for a code."""

    name: str
    vilex_tokens: Tensor
    weight: float = 1.0
    fit: str = ""
    image: Image.Image | None = None


@dataclass(frozen=True)
class Desk:
    """A loaded pipeline and where its pictures go."""

    pipeline: "VilexPipeline"
    output: Output
    upsampler: Upsampler | None

    def draw(
        self,
        stem: str,
        prompt: str,
        words: Sequence[InputWord],
        config: GenerationConfig,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes the pictures of a request as <stem>-seed<seed>.png, and their contact sheet if it is asked for."""
        tokens, names = [word.vilex_tokens for word in words], [word.name for word in words]
        generation = self.pipeline.generate(prompt, tokens, config, names=names, on_step=lambda *_: on_step())
        seeds = [config.seed + i for i in range(config.num_images)]
        images = self.save(generation, words, [f"{stem}-seed{seed}" for seed in seeds])
        self.save_sheet(stem, words, images, [f"seed {seed}" for seed in seeds])

    def save(self, generation: "Generation", words: Sequence[InputWord], names: Sequence[str]) -> list[Image.Image]:
        """The pictures as written: one PNG each, with the recipe that draws it alone."""
        note(names[0], generation.note)
        images = [self.enlarge(image) for image in generation.images]
        from vilex.prompt import mentioned

        used = mentioned(generation.prompt, len(words), [word.name for word in words])
        entries = [self._entry(word, generation.config.num_tokens, i in used) for i, word in enumerate(words)]
        for i, (image, name) in enumerate(zip(images, names, strict=True)):
            self.write(image, name, build_recipe(self.pipeline, generation.prompt, generation.config, entries, index=i))
        return images

    def _entry(self, word: InputWord, num_tokens: int, is_used: bool) -> RecipeImage:
        tokens, share = word.vilex_tokens[:num_tokens], self.output.share_tokens and is_used
        return build_recipe_image(self.pipeline, word.name, tokens, weight=word.weight, fit=word.fit, share=share)

    def save_sheet(
        self, stem: str, words: Sequence[InputWord], images: Sequence[Image.Image], labels: Sequence[str]
    ) -> None:
        """Writes <stem>-sheet.png, if it is asked for: the given pictures and the drawn ones in a row."""
        if not self.output.sheet:
            return
        given = {word.name: fit_image(word.image, images[0].width, word.fit) for word in words if word.image}
        sheet = contact_sheet([[*given.values(), *images]], column_labels=[*given, *labels])
        echo_path(place(self.output.out / f"{stem}-sheet.png", sheet.save))

    def write(self, image: Image.Image, name: str, recipe: Recipe) -> None:
        """Writes one picture with its recipe and echoes its path."""
        echo_path(place(self.output.out / f"{name}.png", lambda path: save_png(image, path, recipe)))

    def enlarge(self, image: Image.Image) -> Image.Image:
        """A small picture at the size to look at, unless the model's own pixels are asked for."""
        return image if self.upsampler is None or image.width >= SMALL_SIDE else self.upsampler(image)


def load_pipeline(engine: Engine) -> "VilexPipeline":
    """The pipeline of the options of every command; raises ValueError as `from_pretrained` does."""
    from vilex.pipeline import VilexPipeline

    _silence_libraries()
    return VilexPipeline.from_pretrained(engine.model, device=engine.device, dtype=engine.dtype, offload=engine.offload)


def _silence_libraries() -> None:
    """Hides the bars that diffusers and transformers draw for every file they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def open_desk(engine: Engine, output: Output) -> Desk:
    """A desk over a pipeline that is loaded now."""
    output.out.mkdir(parents=True, exist_ok=True)
    pipeline, upsampler = load_pipeline(engine), None if output.raw else build_upsampler()
    upsampler_name = upsampler.name if upsampler else "no upsampler"
    _log.info("%s on %s in %s, %s", pipeline.name, pipeline.device, pipeline.dtype, upsampler_name)
    return Desk(pipeline, output, upsampler)


def place(path: Path, write: Callable[[Path], None]) -> Path:
    """Has a file written, and gives its path: the next with -2, -3 ... where files with other contents lie."""
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        fresh = Path(folder, path.name)
        write(fresh)
        free, count = path, 1
        while free.exists() and not filecmp.cmp(fresh, free, shallow=False):
            count += 1
            free = path.with_stem(f"{path.stem}-{count}")
        os.replace(fresh, free)
    return free


def find_inputs(photos: Sequence[Source]) -> dict[str, Source]:
    """File or code by a stem that no other has: the second `a` is `a-2`."""
    inputs: dict[str, Source] = {}
    for source in (found for photo in photos for found in _expand(photo)):
        stem = name = source.stem[:MAX_STEM] if isinstance(source, Path) else _CODE_STEM
        taken = {name.casefold() for name in inputs}
        count = 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}-{count}"
        inputs[name] = source
    return inputs


def _expand(photo: Source) -> Sequence[Source]:
    if isinstance(photo, str):
        return [photo]
    try:
        return find_images([photo])
    except ValueError:
        codes = sorted(photo.glob(f"[!.]*{CODE_SUFFIX}"))
        if not codes:
            raise
        return codes


def read_word(
    name: str, source: Source, pipeline: "VilexPipeline", num_tokens: int, fit: str, weight: float = 1.0
) -> InputWord:
    """The first tokens of a picture, a .vilex file or a code; raises ValueError with the file's name."""
    label = source.name if isinstance(source, Path) else name
    if _is_picture(source):
        image = read_picture(name, source)
        tokens = pipeline.encode(image, num_tokens, fit)[0]
    else:
        image, fit, tokens = None, "", _read_code(label, source, pipeline)[:num_tokens]
    if len(tokens) < num_tokens:
        note(label, f"has {len(tokens)} tokens, fewer than the {num_tokens} asked for")
    return InputWord(name, pipeline.vocabulary.weigh(tokens, weight), weight, fit, image)


def read_picture(name: str, source: Source) -> Image.Image:
    """The picture in a file. Raises ValueError for a .vilex file or a code, which has no picture."""
    if not _is_picture(source):
        raise ValueError(f"{source.name if isinstance(source, Path) else name}: a word has no picture to look at")
    return load_image(source, on_note=echo_error)


def _is_picture(source: Source) -> bool:
    return isinstance(source, Path) and source.suffix.lower() != CODE_SUFFIX


def _read_code(label: str, source: Source, pipeline: "VilexPipeline") -> Tensor:
    read = load_code if isinstance(source, Path) else from_text
    try:
        return read(source, pipeline.fingerprint).vilex_tokens.to(pipeline.device)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def read_recipe(
    stem: str, source: Path, pipeline: "VilexPipeline", photos: Sequence[Source]
) -> tuple[Recipe, list[InputWord]]:
    """The recipe of a PNG and the words of its pictures, from the codes inside or else from `photos` in order.

    Raises ValueError with the file's name when there is no recipe, or when there are not as many photos as pictures
    without a code; photos are not read where no picture needs one.
    """
    recipe = load_recipe(source)
    if recipe is None:
        raise ValueError(f"{source.name} carries no settings of ViLex")
    from vilex.prompt import mentioned

    used = mentioned(recipe.prompt, len(recipe.images), [image.name for image in recipe.images])
    missing = sum(not image.code for i, image in enumerate(recipe.images) if i in used)
    if missing and missing != len(photos):
        raise ValueError(
            f"{source.name} does not hold the tokens of its pictures: give {missing} by --photo, got {len(photos)}"
        )
    spare = iter(photos)
    try:
        nothing = torch.zeros(1, pipeline.t2i.text_width)  # of pictures that have no place in the prompt
        return recipe, [
            _word_of(image, pipeline, spare) if i in used else InputWord(image.name, nothing)
            for i, image in enumerate(recipe.images)
        ]
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error


def _word_of(image: RecipeImage, pipeline: "VilexPipeline", photos: Iterator[Source]) -> InputWord:
    """The word of a recipe's picture, from the code inside or else from the next of the photos."""
    tokens = image.tokens(pipeline.fingerprint)
    if tokens is not None:
        return InputWord(image.name, tokens.to(pipeline.device), image.weight, image.fit)
    word = read_word(image.name, next(photos), pipeline, image.num_tokens, image.fit or "crop", image.weight)
    if word.image is not None and not image.fit:
        raise ValueError(f"no single picture gives the tokens of {image.name!r}: give its .vilex file or code")
    return word


def each_readable(
    inputs: Mapping[str, Source], read: Callable[[str, Source], T], on_skip: Callable[[], None]
) -> Iterator[tuple[str, T]]:
    """(stem, what was read) of each input that can be read; exits with 1 or 2 at the end if some or all could not."""
    skipped = 0
    for stem, source in inputs.items():
        try:
            value = read(stem, source)
        except (ValueError, OSError) as error:
            echo_error(f"skipped: {sentence(error)}")
            skipped += 1
            on_skip()
            continue
        yield stem, value
    if skipped:
        raise click.exceptions.Exit(2 if skipped == len(inputs) else 1)


@contextmanager
def progress(length: int) -> Iterator[Callable[..., None]]:
    """A function that moves a bar on stderr, by one or the count given; without a terminal no bar is drawn."""
    with click.progressbar(length=length, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda count=1: bar.update(count)


def echo_error(text: str) -> None:
    """A line on stderr."""
    _clear_line()
    click.echo(text, err=True)


def echo_path(path: Path) -> None:
    """A written path, as a line on stdout."""
    _clear_line()
    click.echo(click.format_filename(path))


def note(name: str, text: str) -> None:
    """A line on stderr about a file, none when there is nothing to say."""
    if text:
        echo_error(f"{name}: {text}")


def _clear_line() -> None:
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)  # the bar is there; it comes back with its next step
