"""Trains ViLex: a vision tower and a pooler that write pictures as words of a frozen text-to-image model.

    python -m train.train_vilex --preset nano --t2i runs/t2i/t2i --data 'pictures64-train-*.parquet' \
        --out runs/vilex

The loss is the diffusion loss of the frozen model; gradients pass through its denoiser and text encoder to
the tokens. Half of the batches hold the image alone, half the image with words. With `--encoder-init teacher`
the tower first learns from a trained network. Source: ViLex (CVPR 2025).

The presets sd15, sd21, sdxl and sd3 follow the paper with Stable Diffusion and SigLIP, on a GPU node and with the hub:

    accelerate launch --config_file train/configs/ddp.yaml -m train.train_vilex --preset sd21 \
        --t2i OWNER/STABLE-DIFFUSION-2-1 --data 'shards/*.tar' --stream 4 --accumulate 16 --out runs/sd21

With another tower, whose weights come from its library:

    --encoder-init open_clip:ViT-SO400M-16-SigLIP2-256:webli
    --encoder-init timm:vit_large_patch14_dinov2.lvd142m --encoder-size 224
    --encoder-init hf:google/siglip2-so400m-patch16-naflex
"""

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.optimization import Adafactor

from train.batches import Batch
from train.data import Pictures, Record
from train.distil import DistilConfig, distil_encoder
from train.encoder_init import read_encoder_init
from train.nets import load_efficientnet
from train.presets import PRESETS, Preset, TrainConfig
from train.run import RunOptions, TrainingRun, load_data, override, start, training_options, usage_errors
from train.state import CHECKPOINT_NAME, step_generator
from train.subjects import content_caption, plain_caption, style_caption
from train.words import Sayings, say_captions, spell_captions
from vilex.config import GenerationConfig, token_budgets
from vilex.diffusion import Conditioning, TextToImage, load_t2i
from vilex.encoder import build_encoder
from vilex.images import contact_sheet, to_images
from vilex.loss import Noise, diffusion_loss, draw_noise
from vilex.model import ViLex, load_vilex
from vilex.pipeline import VilexPipeline
from vilex.pooler import sample_num_tokens
from vilex.prompt import ComposedPrompt, compose, compose_leading, round_up, special_tokens
from vilex.sampling import Conditions, sample

LADDER_PICTURES = 8
_LENGTH_MULTIPLE = 16  # of prompts' lengths where shapes should be few
_MAX_SAID = 64  # pictures of a micro-batch whose short captions are written, by the CPU
_TOKENS_STREAM, _WORDS_STREAM = 1001, 1002  # of step_generator; every process draws the same


def _networks(t2i: TextToImage) -> nn.ModuleList:
    """All that a picture passes, under names that do not depend on the class around it."""
    return nn.ModuleList(part for part in (t2i.denoiser, *t2i.text_encoders, t2i.vae) if part is not None)


def write_words(record: Record) -> list[str]:
    """Three texts to stand beside a picture: its style, its content, both; so that words can override."""
    return [style_caption(record), content_caption(record), plain_caption(record)]


def write_one(record: Record, pixels: np.ndarray, index: int, variant: int, background: Tensor | None) -> str:
    """One of the three texts."""
    return write_words(record)[variant]


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
        self,
        t2i: TextToImage,
        model: ViLex,
        pictures: Pictures,
        held_out: Pictures | None,
        preset: Preset,
        config: TrainConfig,
        options: RunOptions,
        distil: DistilConfig | None = None,
        spell_steps: int = 0,
        say_steps: int = 0,
    ) -> None:
        super().__init__(t2i, pictures, held_out, preset, config, options)
        self.read_texts(3, lambda pictures: [write_words(record) for record in pictures.records], write_one)
        self.special = special_tokens(t2i.tokenizer)
        self._around = len(self.special.prefix) + len(self.special.suffix)
        # counted once: asked at each step, an accelerator would have to wait
        longest = t2i.config.context_length if self.captions is None else int(self.captions.lengths.max())
        self._most_words = longest - self._around
        self.denoiser = self.compiled(self.t2i.denoiser)
        if say_steps:
            model.pooler.add_token_bias()
        model = model.to(self.device).requires_grad_(True).train()
        if not options.dry_run and not (options.out / CHECKPOINT_NAME).is_file():
            settings = (config.batch_size, config.seed, self.weights, self.accelerator.autocast)
            before = copy.deepcopy(model).eval() if say_steps else None
            if distil:
                self._distil(model, distil)
            if spell_steps:
                spell_captions(model, self.t2i, self.pictures, spell_steps, *settings)
                before = copy.deepcopy(model).eval() if say_steps else None
            if say_steps:
                say_captions(model, before, self.sayings, say_steps, *settings)
        optimizer = build_optimizer(model, config)
        frozen = ("text-to-image model", _networks(self.t2i))
        self.attach(model, optimizer, frozen, None if self.split else self.compiled(model))

    def _distil(self, model: ViLex, config: DistilConfig) -> None:
        teacher = load_efficientnet().to(self.device, memory_format=torch.channels_last)
        hidden = not self.accelerator.is_main_process
        with tqdm(total=config.steps, desc="teacher", disable=hidden, mininterval=5) as bar:

            def show(step: int, steps: int, loss: Tensor) -> None:
                if step % 20 == 0 or step + 1 == steps:
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()

            distil_encoder(
                model.encoder, teacher.coarse_features, self.pictures, config, show, self.accelerator.autocast
            )

    def batch_loss(self, batch: Batch, noise: Noise, global_step: int) -> Tensor:
        """Diffusion and perceptual loss under the pictures' own tokens, with or without words, after TailDrop.

        With say_weight also how unlike the short caption the first of them are read.
        """
        seed = self.config.seed
        num_tokens = self._max_tokens
        if self.config.tail_drop:
            num_tokens = sample_num_tokens(step_generator(seed, global_step, _TOKENS_STREAM), num_tokens)
        joint = torch.rand((), generator=step_generator(seed, global_step, _WORDS_STREAM)) < self.config.joint_fraction
        if self.options.compiled and not self.split:  # all of them, in one shape: the first are the same
            vilex_tokens = self.model(batch.pixels)[:, :num_tokens]  # (B,N,D)
        else:
            vilex_tokens = self.model(batch.pixels, num_tokens)  # (B,N,D)
        condition = self.t2i.encode_prompt(self.prompt(batch, vilex_tokens, bool(joint)))
        if self.t2i.embedded and not self.trim:  # the denoiser's shape is fixed, the text encoder's is not
            condition = condition.padded(self.t2i.config.context_length)
        latents = self.t2i.encode(batch.pixels).contiguous(memory_format=torch.channels_last)
        loss = diffusion_loss(
            self.t2i, self.denoiser, latents, condition, noise, self.config.snr_gamma, self.perceptual
        )
        if not self.config.say_weight:
            return loss
        few = slice(_MAX_SAID)
        said = self.sayings.loss(vilex_tokens[few], batch.pixels[few], batch.indices[few], global_step)
        return loss + self.config.say_weight * said

    @cached_property
    def sayings(self) -> Sayings:
        """The short captions that the first tokens learn to say."""
        return Sayings(self.t2i, self.pictures, self.config.seed)

    @cached_property
    def _max_tokens(self) -> int:
        return min(self.module.pooler.config.num_queries, self.t2i.max_tokens)

    def prompt(self, batch: Batch, vilex_tokens: Tensor, joint: bool) -> ComposedPrompt:
        """[v] or [v, c] of a batch."""
        ids, mask = batch.captions.rows(batch.indices, batch.variant, self.trim)
        word_mask = mask[:, self._around :][:, : self._most_words if joint else 0]  # as many True as there are words
        first, count = len(self.special.prefix), word_mask.shape[1]
        word_ids = ids[:, first : first + count]
        length = self.t2i.config.context_length
        if self.t2i.embedded:  # latent models read their padding
            multiple = 1 if self.trim else _LENGTH_MULTIPLE
            length = min(length, round_up(self._around + vilex_tokens.shape[1] + count, multiple))
        return compose_leading(word_ids, word_mask, vilex_tokens, self.special, length)

    @property
    def _budgets(self) -> tuple[int, ...]:
        return token_budgets(self._max_tokens)

    def condition(self, vilex_tokens: Tensor, trim: bool = False) -> Conditioning:
        """What the denoiser reads of pictures alone, each as its vilex_tokens (B,N,D); with trim without padding."""
        no_words = torch.zeros(len(vilex_tokens), 0, dtype=torch.long, device=self.device)
        length = self.t2i.config.context_length
        if trim:
            length = len(self.special.prefix) + vilex_tokens.shape[1] + len(self.special.suffix)
        return self.t2i.encode_prompt(compose_leading(no_words, no_words.bool(), vilex_tokens, self.special, length))

    def sample(self) -> dict[str, float]:
        """Ladders of fixed pictures at fixed seeds; on held-out pictures the loss per token budget."""
        self.write_ladders(self.options.out / f"ladder-{self.state.global_step:06d}.png")
        if self.held_out is None:
            return {}
        return {f"validation_loss_{n}": self.validation_loss(n) for n in self._budgets}

    def write_ladders(self, path: Path) -> None:
        """A PNG: a row per picture, the input and its reconstruction from each budget, seeds fixed."""
        pictures = self.held_out or self.pictures
        rows = torch.linspace(0, len(pictures) - 1, min(LADDER_PICTURES, len(pictures))).long()  # of all sources
        pixels = pictures.batch(rows)
        columns = [pixels, *(self.reconstruct(pixels, n) for n in self._budgets)]
        images = [to_images(column.float().cpu()) for column in columns]
        contact_sheet(list(zip(*images, strict=True)), column_labels=["input", *map(str, self._budgets)]).save(path)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, num_tokens: int) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] drawn from the first tokens of pixels (B,3,H,W), picture i from seed i."""
        nothing = compose("", [], self.t2i.tokenizer, self.t2i.config.context_length)
        conditions = Conditions(self.t2i.encode_prompt(nothing), self.condition(self.module(pixels, num_tokens)))
        config = GenerationConfig(num_images=len(pixels), guidance_scale=2.0)
        return self.t2i.decode(sample(self.t2i, conditions, config))

    @torch.no_grad()
    def validation_loss(self, num_tokens: int) -> float:
        """Loss on held-out pictures from their first tokens alone, the same noise each time."""
        total, batch_size = 0.0, 64 if self.t2i.embedded else 4  # a VAE's states are large
        for first in range(0, len(self.held_out), batch_size):
            pixels = self.held_out.batch(torch.arange(first, min(first + batch_size, len(self.held_out))))
            condition = self.condition(self.module(pixels, num_tokens), self.trim)
            noise = draw_noise(self.t2i, len(pixels), step_generator(self.config.seed, first, device=self.device))
            loss = diffusion_loss(self.t2i, self.t2i.denoiser, self.t2i.encode(pixels), condition, noise)
            total += loss.item() * len(pixels)
        return total / len(self.held_out)

    def save_weights(self) -> None:
        """Writes a folder that VilexPipeline.from_pretrained reads."""
        VilexPipeline(self.t2i, self.module).save_pretrained(self.options.out / "weights")


def build_model(
    preset: Preset, t2i: TextToImage, init_from: Path | None = None, seed: int = 0, pretrained: str | None = None
) -> ViLex:
    """Encoder and pooler of a preset for a text-to-image model, or the ones saved in `init_from`.

    Random but for a tower with the `pretrained` weights of its library; tokens start where words are.
    Raises ValueError when the saved ones do not fit the model.
    """
    if init_from is not None:
        return VilexPipeline(t2i, load_vilex(init_from)).vilex  # refuses another width
    torch.manual_seed(seed)
    encoder = build_encoder(preset.encoder, pretrained)
    model = ViLex(encoder, replace(preset.pooler, patch_width=encoder.patch_width, text_width=t2i.text_width))
    model.pooler.init_output(*t2i.word_statistics())
    return VilexPipeline(t2i, model).vilex  # refuses more tokens than a prompt holds


t2i_option = click.option(
    "--t2i",
    "t2i_folder",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The frozen text-to-image model: a folder in diffusers layout or a hub id.",
)


@click.command()
@training_options
@t2i_option
@click.option("--init-from", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A weights folder.")
@click.option(
    "--encoder-init",
    metavar="random|teacher|open_clip:TAG|open_clip:NAME:TAG|timm:NAME|hf:ID",
    help="Start of the vision tower, instead of the preset's; teacher: distilled from EfficientNet-lite2, with "
    "--init-from too; a NAME or ID, which may be a folder, is another tower in its place.",
)
@click.option("--encoder-size", type=click.IntRange(8, 4096), help="Pixels a side that the tower reads, not its own.")
@click.option("--distil-steps", type=int, help="Steps of --encoder-init teacher.")
@click.option(
    "--spell-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="First let the tokens spell the model's own layout captions, for this many steps.",
)
@click.option(
    "--say-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Then let the first tokens say the picture's short caption and the others what they did, for this many steps.",
)
@click.option("--say-weight", type=float, help="Of how unlike the short caption the first tokens are read; 0 = off.")
@click.option("--encoder-learning-rate", type=float, help="Of the vision tower.")
def main(
    preset: str,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    stream: int | None,
    limit: int | None,
    out: Path,
    text_encoder: str | None,
    t2i_folder: Path,
    init_from: Path | None,
    encoder_init: str | None,
    encoder_size: int | None,
    distil_steps: int | None,
    spell_steps: int,
    say_steps: int,
    workers: int,
    threads: int | None,
    minutes: float | None,
    accumulate: int,
    compiled: bool,
    fp32: bool,
    dry_run: bool,
    checkpoint_gradients: bool,
    **overrides: float | None,
) -> None:
    """Train encoder and pooler of ViLex."""
    start(threads)
    recipe = PRESETS[preset]
    with usage_errors():
        config = override(recipe.vilex, overrides, minutes)
        tower = read_encoder_init(encoder_init, distil_steps, init_from, config.seed, recipe.encoder_init, encoder_size)
        recipe = replace(recipe, encoder=tower.tower(recipe.encoder))
        t2i = load_t2i(t2i_folder, text_encoder)
        pictures, held_out = load_data(t2i.image_size, data, validation, limit, stream, workers)
        if stream is not None and (say_steps or config.say_weight):
            raise ValueError(f"--stream {stream} reads no captions to say: leave --say-steps and --say-weight out")
        if say_steps and not (init_from or spell_steps):
            raise ValueError(f"--say-steps {say_steps} needs tokens to keep: give --init-from or --spell-steps too")
        model = build_model(recipe, t2i, init_from, config.seed, tower.pretrained)
        options = RunOptions(out, accumulate, compiled, fp32, dry_run, checkpoint_gradients, stream, minutes)
        run = VilexRun(t2i, model, pictures, held_out, recipe, config, options, tower.distil, spell_steps, say_steps)
        run.resume()
    run.run()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
