"""The command `vilex`: pictures to pictures, over files and folders.

Written paths go to stdout; notes, progress and errors to stderr. Exit code 0 means all was done, 1 that a part was
skipped or the model failed, 2 that the input was wrong or nothing could be done.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from vilex import __version__
from vilex.codes import save_code
from vilex.config import (
    CUT_RANGE,
    DEFAULT_BUDGETS,
    MAX_TOKENS,
    MIX_SCALES,
    GenerationConfig,
    PolishConfig,
    tokens_in_words,
)
from vilex.desk import (
    CODE_SUFFIX,
    MAX_STEM,
    Desk,
    InputWord,
    Source,
    each_readable,
    echo_path,
    find_inputs,
    load_pipeline,
    note,
    open_desk,
    progress,
    read_picture,
    read_recipe,
    read_word,
)
from vilex.options import (
    Engine,
    Output,
    TokenBudgets,
    drawing_options,
    photo_option,
    photo_options,
    prompt_option,
    result_options,
    setting_option,
    shared,
    sharing_options,
    weight_option,
)
from vilex.recipe import build_recipe, differences
from vilex.similar import find_similar
from vilex.words import blend, graft

if TYPE_CHECKING:  # diffusers and transformers take seconds to import: --help and bad input must not wait for them
    from torch import Tensor

    from vilex.config import Fit
    from vilex.pipeline import VilexPipeline
    from vilex.vocabulary import Reading


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """ViLex: an image is a word. Pictures become 1 to 75 tokens beside words, and tokens become pictures.

    PHOTO is a picture, a .vilex file of this model, a copied code that starts with vilex-2:, or a folder of pictures
    (of .vilex files where it holds no pictures). A file that cannot be read is skipped and named on stderr. Exit code:
    0 all done, 1 some skipped or the model failed, 2 wrong input or nothing done.
    """


main.add_command(find_similar)


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
@sharing_options
@shared
def reconstruct(
    engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", output: Output,
    budgets: Sequence[int],
) -> None:  # fmt: skip
    """Draw each PHOTO again from few and many tokens.

    All start from the same noise. Written as <stem>-t<tokens>.png.
    """
    inputs = find_inputs(photos)
    desk = open_desk(engine, output)
    read = functools.partial(read_word, pipeline=desk.pipeline, num_tokens=max(budgets), fit=fit)
    with progress(len(inputs) * len(budgets)) as advance:
        for stem, word in each_readable(inputs, read, lambda: advance(len(budgets))):
            within = sorted({min(budget, len(word.vilex_tokens)) for budget in budgets})  # a code may hold fewer
            images = []
            for num_tokens, generation in desk.pipeline.reconstruct(word.vilex_tokens, within, config):
                images += desk.save(generation, [word], [f"{stem}-t{num_tokens}"])
                advance()
            desk.save_sheet(stem, [word], images, list(map(tokens_in_words, within)))


@main.command()
@photo_options
@setting_option("--count", "num_images", 4)
@setting_option("--tokens", "num_tokens")
@drawing_options
@sharing_options
@shared
def vary(engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", output: Output) -> None:
    """Draw new pictures with each PHOTO's content.

    Written as <stem>-seed<seed>.png; the same seed gives the same picture, whatever --count is.
    """
    inputs = find_inputs(photos)
    desk = open_desk(engine, output)
    _draw_each(desk, inputs, dict.fromkeys(inputs, 1.0), "", config, fit, ending="")


@main.command()
@photo_options
@prompt_option
@setting_option("--tfg", "tfg_scale", MIX_SCALES["tfg_scale"])
@setting_option("--words-scale", "words_scale", MIX_SCALES["words_scale"])
@weight_option
@setting_option("--count", "num_images")
@setting_option("--tokens", "num_tokens")
@drawing_options
@sharing_options
@shared
def mix(
    engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", output: Output, prompt: str,
    weights: Sequence[float],
) -> None:  # fmt: skip
    """Draw each PHOTO as a word of a prompt.

    In the prompt, <image> stands for the picture: "<image>, in the style of Claude Monet". Without it the picture
    comes first. If the prompt holds more than one, such as "<image> riding <image>" or "<image:2> on <image:1>", or
    names a PHOTO, such as "[corgi] riding [bike]" for corgi.jpg and bike.jpg, the PHOTOs that it mentions are used
    together in one prompt; otherwise each PHOTO gets its own picture. <image> - "snow" + "sand" takes words from the
    picture and adds others.

    Written as <stem>-mix-seed<seed>.png, with + between several stems.
    """
    inputs = find_inputs(photos)
    weight_of = _spread(weights, inputs)
    from vilex.prompt import count_placeholders, has_words, unknown_names

    is_named, unknown = any(f"[{stem}]" in prompt for stem in inputs), unknown_names(prompt, list(inputs))
    if len(inputs) > 1 and unknown and not is_named and not count_placeholders(prompt):
        named = ", ".join(f"[{stem}]" for stem in list(inputs)[:5])
        raise ValueError(f"[{unknown[0]}] names none of the pictures; their names are {named}")
    desk = open_desk(engine, output)
    if not has_words(prompt, len(inputs), list(inputs)):  # the command's own scales have no effect: nobody gave them
        source = click.get_current_context().get_parameter_source
        unasked = [name for name in MIX_SCALES if source(name) is ParameterSource.DEFAULT]
        config = dataclasses.replace(config, **{name: getattr(GenerationConfig, name) for name in unasked})
    if count_placeholders(prompt) > 1 or "<image:" in prompt or is_named:
        words = [
            read_word(stem, source, desk.pipeline, config.num_tokens, fit, weight_of[stem])
            for stem, source in inputs.items()
        ]
        with progress(config.num_inference_steps) as advance:
            desk.draw(f"{_joined(inputs)}-mix", prompt, words, config, advance)
    else:
        _draw_each(desk, inputs, weight_of, prompt, config, fit, ending="-mix")


@main.command()
@prompt_option
@setting_option("--count", "num_images", 4)
@drawing_options
@shared
def generate(engine: Engine, config: GenerationConfig, output: Output, prompt: str) -> None:
    """Draw pictures from words alone.

    Written as <words>-seed<seed>.png.
    """
    desk = open_desk(engine, output)
    stem = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:MAX_STEM] or "picture"
    with progress(config.num_inference_steps) as advance:
        desk.draw(stem, prompt, [], config, advance)


def _draw_each(
    desk: Desk, inputs: Mapping[str, Source], weight_of: Mapping[str, float], prompt: str, config: GenerationConfig,
    fit: "Fit", ending: str,
) -> None:  # fmt: skip
    def read(stem: str, source: Source) -> InputWord:
        return read_word(stem, source, desk.pipeline, config.num_tokens, fit, weight_of[stem])

    steps = config.num_inference_steps
    with progress(len(inputs) * steps) as advance:
        for stem, word in each_readable(inputs, read, lambda: advance(steps)):
            desk.draw(stem + ending, prompt, [word], config, advance)


def _spread(weights: Sequence[float], inputs: Mapping[str, Source]) -> dict[str, float]:
    """The weight of each input, of one weight for all or of one for each."""
    if len(weights) not in (1, len(inputs)):
        raise ValueError(f"--weight is given once, or once for each of {len(inputs)} pictures; got {len(weights)}")
    return dict(zip(inputs, weights * (len(inputs) if len(weights) == 1 else 1), strict=True))


def _joined(stems: Mapping[str, Source]) -> str:
    return "+".join(stems)[:MAX_STEM]


@main.command(name="blend")
@photo_options
@click.option("--count", type=click.IntRange(2, 16), default=5, help="Pictures in the row from A to B.")
@click.option("--graft", "cut", type=click.IntRange(0, MAX_TOKENS), help=f"One picture instead: {CUT_RANGE.help}.")
@setting_option("--tokens", "num_tokens")
@drawing_options
@sharing_options
@shared
def blend_row(
    engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", output: Output, count: int,
    cut: int | None,
) -> None:  # fmt: skip
    """Draw a row of pictures from one PHOTO to another, or the content of one with the look of the other.

    Takes two PHOTOs, A and B. All pictures start from the same noise. Written as <A>+<B>-<percent of B>.png, with
    --graft as <A>+<B>-graft<tokens of A>.png.
    """
    inputs = find_inputs(photos)
    if len(inputs) != 2:
        raise ValueError(f"blend takes two pictures, got {len(inputs)}")
    desk, stem = open_desk(engine, output), _joined(inputs)
    first, second = (read_word(*item, desk.pipeline, config.num_tokens, fit) for item in inputs.items())
    row = list(_grafted(first, second, cut) if cut is not None else _blended(first, second, count))
    images = []
    with progress(len(row) * config.num_inference_steps) as advance:
        for label, word in row:
            generation = desk.pipeline.generate("", [word.vilex_tokens], config, on_step=lambda *_: advance())
            images += desk.save(generation, [word], [f"{stem}-{label}"])
    desk.save_sheet(stem, [first, second], images, [label for label, _ in row])


def _blended(first: InputWord, second: InputWord, count: int) -> Iterator[tuple[str, InputWord]]:
    for i in range(count):
        share = i / (count - 1)
        tokens = blend(first.vilex_tokens, second.vilex_tokens, share)
        yield f"{round(100 * share):03d}", InputWord(f"{first.name}+{second.name}", tokens)


def _grafted(first: InputWord, second: InputWord, cut: int) -> Iterator[tuple[str, InputWord]]:
    tokens = graft(first.vilex_tokens, second.vilex_tokens, cut)
    yield f"graft{cut}", InputWord(f"{first.name}+{second.name}", tokens)


@main.command()
@click.argument("pngs", nargs=-1, required=True, metavar="PNG...", type=click.Path(exists=True, path_type=Path))
@photo_option
@result_options
@shared
def redo(engine: Engine, pngs: Sequence[Path], photos: Sequence[Source], output: Output) -> None:
    """Draw pictures again from the settings inside their PNGs.

    A PNG that was drawn with --share-tokens holds all that is needed; the pictures of any other are given by --photo.
    Written as <stem>-redo.png.
    """
    inputs, given = find_inputs(pngs), find_inputs(photos)
    desk = open_desk(engine, output)
    read = functools.partial(read_recipe, pipeline=desk.pipeline, photos=list(given.values()))
    with progress(len(inputs)) as advance:
        for stem, (recipe, words) in each_readable(inputs, read, advance):
            note(inputs[stem].name, differences(recipe, desk.pipeline))
            if given and recipe.images and all(image.code for image in recipe.images):
                note(inputs[stem].name, "it holds the tokens of its pictures, so --photo is not used for it")
            tokens, names = [word.vilex_tokens for word in words], [word.name for word in words]
            [image] = desk.pipeline.generate(recipe.prompt, tokens, recipe.config, names=names).images
            again = build_recipe(desk.pipeline, recipe.prompt, recipe.config, recipe.images)
            desk.write(desk.enlarge(image), f"{stem}-redo", again)
            advance()


@main.command()
@photo_options
@setting_option("--tokens", "num_tokens", 16)
@click.option("--words", "count", type=click.IntRange(1, 20), default=5, help="Words shown for each token.")
@shared
def inspect(engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", count: int) -> None:
    """Show the words nearest to each token of each PHOTO: a hint, not a fact.

    Beside a word stands its similarity, at most 1; the distance to the nearest word is 1 where a token is as far from
    it as words are from one another.
    """
    inputs = find_inputs(photos)
    pipeline = load_pipeline(engine)
    read = functools.partial(read_word, pipeline=pipeline, num_tokens=config.num_tokens, fit=fit)
    for stem, word in each_readable(inputs, read, lambda: None):
        click.echo(_table(stem, pipeline.vocabulary.read(word.vilex_tokens, count)))


def _table(stem: str, readings: Sequence["Reading"]) -> str:
    lines = [stem, "token  distance  nearest words"]
    for i, reading in enumerate(readings, 1):
        words = "  ".join(f"{neighbour.word} {neighbour.similarity:.2f}" for neighbour in reading.neighbours)
        lines.append(f"{i:5d}  {reading.distance:8.1f}  {words}")
    return "\n".join(lines)


_word_out = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="outputs",
    envvar="VILEX_OUTPUTS",
    show_envvar=True,
    help="File that ends in .vilex, for one PHOTO, or a folder.",
)


@main.command()
@photo_options
@setting_option("--tokens", "num_tokens")
@_word_out
@shared
def encode(engine: Engine, config: GenerationConfig, photos: Sequence[Source], fit: "Fit", out: Path) -> None:
    """Keep each PHOTO as a word in a .vilex file.

    The other commands take such a file in place of a picture. Whoever has it can draw what the picture shows.
    """
    inputs = _inputs_for(out, photos)
    pipeline = load_pipeline(engine)
    read = functools.partial(read_word, pipeline=pipeline, num_tokens=config.num_tokens, fit=fit)
    with progress(len(inputs)) as advance:
        for stem, word in each_readable(inputs, read, advance):
            _keep(pipeline, word.vilex_tokens, stem, out, inputs)
            advance()


@main.command()
@photo_options
@setting_option("--tokens", "num_tokens", kind=PolishConfig)
@setting_option("--steps", "num_steps", kind=PolishConfig)
@setting_option("--seed", "seed", kind=PolishConfig)
@click.option("--words", default="", help="Start from these words, not from the encoder's tokens.")
@_word_out
@shared
def polish(engine: Engine, config: PolishConfig, photos: Sequence[Source], fit: "Fit", words: str, out: Path) -> None:
    """Keep each PHOTO, which must be a picture, as a word that was improved for it.

    Gradient steps on the model's own loss start from the encoder's tokens; for a text-to-image model that has no
    encoder, from --words or from the average word.
    """
    inputs = _inputs_for(out, photos)
    pipeline = load_pipeline(engine)
    steps = config.num_steps
    with progress(len(inputs) * steps) as advance:
        for stem, image in each_readable(inputs, read_picture, lambda: advance(steps)):
            tokens = pipeline.polish(
                image, config.num_tokens, steps, config.seed, lambda *_: advance(), words=words, fit=fit
            )
            _keep(pipeline, tokens, stem, out, inputs)


def _inputs_for(out: Path, photos: Sequence[Source]) -> dict[str, Source]:
    """The inputs; the place for their .vilex files is made. Raises ValueError when one file is to hold several."""
    inputs = find_inputs(photos)
    is_file = out.suffix == CODE_SUFFIX
    if is_file and len(inputs) > 1:
        raise ValueError(f"{len(inputs)} pictures need a folder, --out is the file {out}")
    (out.parent if is_file else out).mkdir(parents=True, exist_ok=True)
    return inputs


def _keep(
    pipeline: "VilexPipeline", vilex_tokens: "Tensor", stem: str, out: Path, inputs: Mapping[str, Source]
) -> None:
    path = out if out.suffix == CODE_SUFFIX else out / f"{stem}{CODE_SUFFIX}"
    if path.resolve() in {source.resolve() for source in inputs.values() if isinstance(source, Path)}:
        raise ValueError(f"{path} is one of the given files and would be overwritten: choose another --out")
    save_code(path, vilex_tokens, pipeline.fingerprint, source=f"{stem}{CODE_SUFFIX}")
    echo_path(path)
