"""Grids of pictures that nobody trained on: redrawn from few and many tokens, and mixed with words.

    python -m train.looks --model nano --out assets/weights/nano

Writes looks.png, a row per picture: the input, then three seeds of each number of tokens; mixes.png, a row per text and
for each picture a column per text-free guidance, then per guidance by the words alone with the text-free guidance that
mixes start with; and prompts.png, what the text-to-image model draws from 64 prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image

from train.arms import WORDS_GUIDANCE, require_arms
from train.prompts import PROMPTS
from train.report import LoadPipeline, Numbers, measuring_options
from train.run import usage_errors
from vilex.config import MIX_SCALES, GenerationConfig, token_budgets
from vilex.images import contact_sheet, find_images, fit_image, load_image
from vilex.pipeline import VilexPipeline

EXAMPLES = Path(__file__).parent.parent / "assets" / "examples"
TEXTS = (
    "<image>, in the style of Claude Monet",
    "<image>, in the style of Hokusai",
    "<image>, Google Noto emoji",
    "<image>, pencil sketch",
    "<image> on a beach",
    "<image> at night",
)
SEEDS = 3


def draw_looks(pipeline: VilexPipeline, images: Sequence[Image.Image], config: GenerationConfig) -> Image.Image:
    """A sheet: each picture, then SEEDS samples of each of the model's budgets of tokens."""
    budgets = token_budgets(pipeline.max_tokens)
    rows = []
    for image in images:
        rebuilt = pipeline.reconstruct(image, budgets, replace(config, num_images=SEEDS))
        rows.append([_small(pipeline, image), *(drawn for _, result in rebuilt for drawn in result.images)])
    labels = ["input"] + [str(n) if i == 0 else "" for n in budgets for i in range(SEEDS)]
    return contact_sheet(rows, column_labels=labels)


def draw_mixes(
    pipeline: VilexPipeline, images: Sequence[Image.Image], columns: dict[str, GenerationConfig]
) -> Image.Image:
    """A sheet: a row per text; for each picture the input and a sample with each of the settings, of one seed."""
    rows = []
    for text in TEXTS:
        row = []
        for image in images:
            drawn = [pipeline.generate(text, [image], config).images[0] for config in columns.values()]
            row += [_small(pipeline, image), *drawn]
        rows.append(row)
    labels = ["input", *columns] * len(images)
    return contact_sheet(rows, row_labels=TEXTS, column_labels=labels)


def draw_prompts(pipeline: VilexPipeline, config: GenerationConfig) -> Image.Image:
    """A sheet: a row per kind of PROMPTS, all from one seed."""
    rows = [[pipeline.generate(prompt, [], config).images[0] for prompt in prompts] for prompts in PROMPTS.values()]
    return contact_sheet(rows, row_labels=list(PROMPTS))


def _small(pipeline: VilexPipeline, image: Image.Image) -> Image.Image:
    return fit_image(image, pipeline.t2i.image_size, "crop")


@click.command()
@measuring_options
@click.option("--pictures", type=click.Path(exists=True, path_type=Path), default=EXAMPLES, help="A folder.")
@click.option("--mixed", default="sailboat,cat,fruit,coffee", show_default=True, help="Pictures to mix with words.")
@click.option("--mix-tokens", type=int, default=75, show_default=True, help="Tokens of a picture beside words.")
@click.option("--tfg", type=Numbers(0, 20), default="0,1,3,6", show_default=True, help="Values of tfg_scale.")
@click.option("--words-scale", type=Numbers(0, 20), default="3,6", show_default=True, help="Values of words_scale.")
def main(
    load: LoadPipeline,
    pictures: Path,
    mixed: str,
    mix_tokens: int,
    tfg: list[float],
    words_scale: list[float],
    out: Path,
) -> None:
    """Draw looks.png, mixes.png and prompts.png."""
    with usage_errors():
        config = GenerationConfig(num_tokens=mix_tokens, tfg_scale=0.0)
        columns = {f"tfg {scale:g}": replace(config, tfg_scale=scale) for scale in tfg}
        columns |= {f"words {s:g}": replace(config, **MIX_SCALES | {"words_scale": s}) for s in words_scale}
        images = {path.stem: load_image(path) for path in find_images([pictures])}
        chosen = [name.strip() for name in mixed.split(",")]
        if missing := [name for name in chosen if name not in images]:
            raise ValueError(f"{pictures} has no picture {', '.join(missing)}, it has {', '.join(images)}")
        pipeline = load()
        require_arms(pipeline, [str(mix_tokens)])
    out.mkdir(parents=True, exist_ok=True)
    draw_looks(pipeline, list(images.values()), GenerationConfig()).save(out / "looks.png")
    draw_mixes(pipeline, [images[name] for name in chosen], columns).save(out / "mixes.png")
    draw_prompts(pipeline, GenerationConfig(guidance_scale=WORDS_GUIDANCE)).save(out / "prompts.png")


if __name__ == "__main__":
    main()
