"""Trains ViLex: a vision tower and a pooler that write pictures as words of a frozen text-to-image model.

    accelerate launch -m train.train_vilex --preset nano --t2i runs/t2i/t2i --data 'pictures64-train-*.parquet' \
        --out runs/vilex

The loss is the diffusion loss of the frozen model; gradients pass through its denoiser and text encoder to
the tokens. Half of the batches hold the image alone, half the image with words. Source: ViLex (CVPR 2025).
"""

import logging
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from train.batches import Batch, CaptionTable, tabulate
from train.captions import content_caption, plain_caption, style_caption
from train.data import Pictures
from train.presets import PRESETS, Preset, TrainConfig
from train.run import RunOptions, TrainingRun, load_data, override, start, training_options
from train.state import step_generator
from train.train_t2i import diffusion_loss
from vilex.config import DEFAULT_BUDGETS, GenerationConfig
from vilex.diffusion import TextToImage, load_t2i
from vilex.images import contact_sheet, to_images
from vilex.model import ViLex, load_vilex
from vilex.pipeline import VilexPipeline
from vilex.pooler import sample_num_tokens
from vilex.prompt import ComposedPrompt, compose_leading, embedding_module, special_tokens

log = logging.getLogger(__name__)
LADDER_PICTURES = 8
_TOKENS_STREAM, _WORDS_STREAM = 1001, 1002  # of step_generator; every process draws the same


def tabulate_words(pictures: Pictures, t2i: TextToImage) -> CaptionTable:
    """Three texts per picture to stand beside it: its style, its content, both; so that words can override."""
    texts = [(style_caption(r), content_caption(r), plain_caption(r)) for r in pictures.records]
    return tabulate(texts, t2i.tokenizer, t2i.config.context_length)


def build_optimizer(model: ViLex, config: TrainConfig) -> Adafactor:
    """Adafactor at two fixed rates, the pooler's first.

    Without transformers' relative steps and without scaling by each parameter's RMS, which at these rates
    would hardly move the pooler.
    """
    groups = [
        {"params": list(model.pooler.parameters()), "lr": config.learning_rate},
        {"params": list(model.encoder.parameters()), "lr": config.encoder_learning_rate},
    ]
    return Adafactor(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False,
        warmup_init=False,
    )  # fmt: skip


class VilexRun(TrainingRun):
    """Trains encoder and pooler; denoiser and text encoder are frozen."""

    def __init__(
        self, t2i: TextToImage, model: ViLex, pictures: Pictures, held_out: Pictures | None, preset: Preset,
        config: TrainConfig, options: RunOptions,
    ) -> None:
        super().__init__(t2i, pictures, held_out, preset, config, options)
        self.captions = tabulate_words(pictures, t2i).to(self.device)
        self.special = special_tokens(t2i.tokenizer)
        self.ladder = held_out or pictures
        model = model.to(self.device).requires_grad_(True).train()
        self.attach(model, build_optimizer(model, config))

    def batch_loss(self, batch: Batch, global_step: int, generator: torch.Generator) -> Tensor:
        """Diffusion loss under the pictures' own tokens, with or without words, after TailDrop."""
        seed = self.config.seed
        num_tokens = sample_num_tokens(step_generator(seed, global_step, _TOKENS_STREAM), self._max_tokens)
        joint = torch.rand((), generator=step_generator(seed, global_step, _WORDS_STREAM)) < self.config.joint_fraction
        vilex_tokens = self.model(batch.pixels, num_tokens)  # (B,N,D)
        condition = self.t2i.encode_prompt(self.prompt(batch, vilex_tokens, bool(joint)))
        latents = self.t2i.encode(batch.pixels).contiguous(memory_format=torch.channels_last)
        return diffusion_loss(self.t2i, self.t2i.denoiser, latents, condition, generator, self.config.snr_gamma)

    @property
    def _max_tokens(self) -> int:
        room = self.t2i.config.context_length - len(self.special.prefix) - len(self.special.suffix)
        return min(self.module.pooler.config.num_queries, room)

    def prompt(self, batch: Batch, vilex_tokens: Tensor, joint: bool) -> ComposedPrompt:
        """[v] or [v, c] of a batch."""
        ids, mask = self.captions.rows(batch.indices, batch.variant, trim=True)
        first, last = len(self.special.prefix), len(self.special.suffix)
        words = ids[:, first:], mask[:, first + last :]  # the mask loses its last True, the special suffix
        words = (words[0][:, : words[1].shape[1]], words[1])
        if not joint:
            words = (words[0][:, :0], words[1][:, :0])
        length = self.t2i.config.context_length
        if self.trim:
            length = min(length, first + last + vilex_tokens.shape[1] + words[0].shape[1])
        return compose_leading(*words, vilex_tokens, self.special, length)

    def sample(self) -> dict[str, float]:
        """Ladders of fixed pictures at fixed seeds; on held-out pictures the loss per token budget."""
        pipeline = VilexPipeline(self.t2i, self.module)
        write_ladders(pipeline, self.ladder, self.options.out / f"ladder-{self.state.global_step:06d}.png")
        if self.held_out is None:
            return {}
        return {f"validation_loss_{n}": self.validation_loss(n) for n in DEFAULT_BUDGETS if n <= self._max_tokens}

    @torch.no_grad()
    def validation_loss(self, num_tokens: int, batch_size: int = 64) -> float:
        """Loss on held-out pictures from their first tokens alone, the same noise each time."""
        total = 0.0
        for start_index in range(0, len(self.held_out), batch_size):
            indices = torch.arange(start_index, min(start_index + batch_size, len(self.held_out)))
            pixels = self.held_out.batch(indices)
            tokens = self.module(pixels, num_tokens)
            empty = torch.zeros(len(indices), 0, dtype=torch.long, device=self.device)
            length = num_tokens + len(self.special.prefix) + len(self.special.suffix)
            condition = self.t2i.encode_prompt(compose_leading(empty, empty.bool(), tokens, self.special, length))
            generator = step_generator(self.config.seed, start_index, device=self.device)
            loss = diffusion_loss(self.t2i, self.t2i.denoiser, self.t2i.encode(pixels), condition, generator)
            total += loss.item() * len(indices)
        return total / len(self.held_out)

    def save_weights(self) -> None:
        """Writes a folder that VilexPipeline.from_pretrained reads."""
        VilexPipeline(self.t2i, self.module).save_pretrained(self.options.out / "weights")
        self.module.requires_grad_(True).train()


@torch.no_grad()
def write_ladders(pipeline: VilexPipeline, pictures: Pictures, path: Path) -> None:
    """A PNG: a row per picture, the input and its reconstructions from each budget, seed fixed."""
    count = min(LADDER_PICTURES, len(pictures))
    inputs = to_images(pictures.batch(torch.arange(count)).cpu())
    room = pipeline.t2i.config.context_length - 2
    budgets = [n for n in DEFAULT_BUDGETS if n <= room]
    config = GenerationConfig(guidance_scale=2.0)
    rows = [[image, *(g.images[0] for _, g in pipeline.reconstruct(image, budgets, config))] for image in inputs]
    contact_sheet(rows, column_labels=["input", *map(str, budgets)]).save(path)


def build_model(preset: Preset, t2i: TextToImage, init_from: Path | None, seed: int) -> ViLex:
    """Encoder and pooler of a preset, random or from saved weights; tokens start where words are."""
    if init_from is not None:
        return load_vilex(init_from)
    torch.manual_seed(seed)
    model = ViLex(preset.encoder, preset.pooler)
    table = embedding_module(t2i.text_encoder).weight
    model.pooler.init_output(table.mean(0), table.std(0))
    return model


@click.command()
@training_options
@click.option("--t2i", "t2i_folder", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder of the frozen text-to-image model.")
@click.option("--init-from", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A weights folder.")
@click.option("--encoder-learning-rate", type=float, help="Of the vision tower.")
def main(
    preset: str, data: tuple[str, ...], validation: tuple[str, ...], limit: int | None, out: Path,
    text_encoder: str | None, t2i_folder: Path, init_from: Path | None, workers: int, threads: int | None,
    accumulate: int, compiled: bool, fp32: bool, dry_run: bool, **overrides: float | None,
) -> None:
    """Train encoder and pooler of ViLex."""
    start(threads)
    recipe = PRESETS[preset]
    try:
        config = override(recipe.vilex, accumulate, overrides)
        t2i = load_t2i(t2i_folder, text_encoder)
        pictures, held_out = load_data(recipe, data, validation, limit)
        model = build_model(recipe, t2i, init_from, config.seed)
        options = RunOptions(out, workers, accumulate, compiled, fp32, dry_run)
        VilexRun(t2i, model, pictures, held_out, recipe, config, options).run()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
