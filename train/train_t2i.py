"""Trains the embedded pixel-space text-to-image model.

    python -m train.train_t2i --preset nano --data 'pictures64-train-*.parquet' --out runs/t2i

Running the same command again resumes the run exactly; `accelerate launch --config_file train/configs/ddp.yaml -m` in
place of `python -m` trains on several GPUs. `--init-from` starts from shipped weights instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from train.align import AlignedDenoiser, alignment_loss, bottleneck_side
from train.batches import Batch, tabulate
from train.captions import write_caption, write_captions
from train.data import Pictures
from train.features import FeatureTable, TeacherFeatures, table_fits, teacher_features
from train.nets import load_efficientnet
from train.presets import PRESETS, Preset, TrainConfig, build_unet
from train.run import RunOptions, TrainingRun, load_data, override, start, training_options, usage_errors
from train.state import step_generator
from train.subjects import plain_caption
from vilex.config import GenerationConfig, T2IConfig
from vilex.diffusion import Conditioning, EmbeddedModel, TextToImage, build_noise_scheduler, load_t2i
from vilex.images import contact_sheet, to_images
from vilex.loss import Noise, diffusion_loss, draw_noise
from vilex.minilm import load_text_encoder
from vilex.prompt import compose
from vilex.sampling import Conditions, sample

_LENGTH_GROUPS = 4  # of a batch's captions
GRID_PROMPTS = (
    "a photo of a goldfish. orange and dark green",
    "a photo of a beach. top left light blue, top light blue, top right light blue, bottom beige",
    "a landscape painting by Claude Monet, Impressionism",
    "a portrait by Rembrandt, Baroque",
    "a Google Noto emoji of a red apple. red on white",
    "a flat emoji of a smiling face. yellow",
    "a pencil sketch of a horse",
    "a photo of a sunflower. yellow and green",
    "a cartoon of a dog",
    "Ukiyo-e by Katsushika Hokusai",
    "an abstract painting. red, black and white",
    "a photo of a forest path. green",
    "clip art of a house",
    "a 3D emoji of a blue whale",
    "top left red, top red, top right red, center white, bottom left blue, bottom blue, bottom right blue",
    "",
)


def build_model(preset: Preset, text_encoder: str | None, init_from: Path | None, seed: int) -> TextToImage:
    """An embedded model whose denoiser is random, or the one saved in `init_from`.

    Raises ValueError when that one does not draw pictures of the preset's size from embedded text.
    """
    if init_from is not None:
        return _load_model(preset, text_encoder, init_from)
    config = T2IConfig(
        pixel_unshuffle=preset.unet.pixel_unshuffle,
        position_frequencies=preset.unet.position_frequencies,
        token_frequencies=preset.unet.token_frequencies,
        prompt_scale=preset.unet.prompt_scale,
        context_length=preset.context_length,
    )
    tokenizer, encoder = load_text_encoder(text_encoder or config.text_encoder)
    torch.manual_seed(seed)
    denoiser = build_unet(preset.unet, encoder.config.hidden_size)
    scheduler = build_noise_scheduler(prediction_type=preset.unet.prediction_type)
    return EmbeddedModel(config, tokenizer, encoder, denoiser, scheduler)


def trainable_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError when its text-to-image model is a finished one."""
    if PRESETS[name].unet is None:
        others = ", ".join(sorted(other for other, preset in PRESETS.items() if preset.unet))
        raise ValueError(f"preset {name} takes a finished text-to-image model; those to train are of {others}")
    return PRESETS[name]


def _load_model(preset: Preset, text_encoder: str | None, folder: Path) -> TextToImage:
    t2i = load_t2i(folder, text_encoder)
    if not t2i.embedded:
        raise ValueError(f"{folder} is not an embedded pixel-space model, the only kind that is trained here")
    if t2i.image_size != preset.unet.image_size:
        raise ValueError(f"{folder} draws pictures of {t2i.image_size} px, the preset's have {preset.unet.image_size}")
    rescale_prompts(t2i, preset.unet.prompt_scale)
    return t2i


@torch.no_grad()
def rescale_prompts(t2i: EmbeddedModel, prompt_scale: float) -> None:
    """Takes up another prompt_scale without a change to what the model draws: only how fast it learns changes."""
    factor = t2i.config.prompt_scale / prompt_scale
    for name, weight in t2i.denoiser.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.mul_(factor)
    t2i.config = replace(t2i.config, prompt_scale=prompt_scale)


def sample_prompts(t2i: TextToImage, prompts: Sequence[str], config: GenerationConfig) -> Tensor:
    """One picture (S,3,H,W) in [-1,1] per prompt, picture i from seed config.seed + i."""
    conditions = [t2i.encode_prompt(compose(p, [], t2i.tokenizer, t2i.config.context_length)) for p in ["", *prompts]]
    config = replace(config, num_images=len(prompts))
    return t2i.decode(sample(t2i, Conditions(conditions[0], joint=Conditioning.concatenate(conditions[1:])), config))


def write_grid(t2i: TextToImage, path: Path) -> None:
    """A PNG of the fixed prompts at fixed seeds."""
    images = to_images(sample_prompts(t2i, GRID_PROMPTS, GenerationConfig(guidance_scale=3.0)).float().cpu())
    contact_sheet([images[i : i + 8] for i in range(0, len(images), 8)]).save(path)


def validation_loss(t2i: TextToImage, pictures: Pictures, config: TrainConfig, batch_size: int = 64) -> float:
    """Loss on held-out pictures with their plain captions, the same noise each time."""
    total = 0.0
    for first in range(0, len(pictures), batch_size):
        indices = torch.arange(first, min(first + batch_size, len(pictures)))
        texts = tabulate(
            [[plain_caption(pictures.records[i])] for i in indices], t2i.tokenizer, t2i.config.context_length
        )
        prompt = texts.prompt(torch.arange(len(indices)), torch.zeros_like(indices), trim=True)
        condition = t2i.encode_prompt(prompt)
        latents = t2i.encode(pictures.batch(indices))
        noise = draw_noise(t2i, len(indices), step_generator(config.seed, first, device=latents.device))
        total += diffusion_loss(t2i, t2i.denoiser, latents, condition, noise).item() * len(indices)
    return total / len(pictures)


class T2IRun(TrainingRun):
    """Trains the denoiser; the text encoder is frozen."""

    def __init__(
        self,
        t2i: TextToImage,
        pictures: Pictures,
        held_out: Pictures | None,
        preset: Preset,
        config: TrainConfig,
        options: RunOptions,
        workers: int = 1,
    ) -> None:
        super().__init__(t2i, pictures, held_out, preset, config, options)
        if self.split:
            raise ValueError("FSDP splits what train_vilex trains; train_t2i's denoiser is small: use ddp.yaml")
        settings = {"seed": config.seed, "empty_share": config.empty_fraction}
        write_all = partial(write_captions, variants=config.caption_variants, workers=workers, **settings)
        self.read_texts(config.caption_variants, write_all, partial(write_caption, **settings))
        module = t2i.denoiser
        if config.align_weight:
            self.teacher = self._load_teacher()
            self.targets = self._build_targets()
            module = AlignedDenoiser(t2i.denoiser, len(self.teacher.mean), config.seed)
        module.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.attach(module, optimizer, ("text encoder", self.t2i.text_encoder), self.compiled(module))

    def _load_teacher(self) -> TeacherFeatures:
        net = load_efficientnet().to(self.device, memory_format=torch.channels_last)
        return teacher_features(net.patch_features, bottleneck_side(self.t2i.denoiser), self.pictures, self.config.seed)

    def _build_targets(self) -> Callable[[Batch], Tensor]:
        """What the features (B,P,F) of a batch should be: from a table where pictures come many times and it fits."""
        if self.device.type == "cpu" or not table_fits(self.teacher, self.pictures, self.config.caption_variants):
            return lambda batch: self.teacher(batch.pixels)
        with self.accelerator.autocast():
            table = FeatureTable(self.teacher, self.pictures, self.config.caption_variants, self.config.seed)
        return lambda batch: table(batch.indices, batch.variant)

    def batch_loss(self, batch: Batch, noise: Noise, global_step: int) -> Tensor:
        """Diffusion loss of pictures under their dense captions, and what teachers add to it."""
        condition = self._condition(batch)
        latents = self.t2i.encode(batch.pixels).contiguous(memory_format=torch.channels_last)
        loss = diffusion_loss(self.t2i, self.model, latents, condition, noise, self.config.snr_gamma, self.perceptual)
        if not self.config.align_weight:
            return loss
        return loss + self.config.align_weight * alignment_loss(self.module.told, self.targets(batch))

    @torch.no_grad()
    def _condition(self, batch: Batch) -> Conditioning:
        """What the denoiser reads of the captions; where prompts are trimmed, texts of like length go together."""
        groups = batch.captions.by_length(batch.indices, batch.variant, _LENGTH_GROUPS if self.trim else 1)
        encoded = [
            self.t2i.encode_prompt(batch.captions.prompt(batch.indices[rows], batch.variant[rows], self.trim))
            for rows in groups
        ]
        longest = max(condition.prompt_embeds.shape[1] for condition in encoded)
        return Conditioning.concatenate([c.padded(longest) for c in encoded]).rows(torch.cat(groups).argsort())

    def sample(self) -> dict[str, float]:
        """A grid of fixed prompts, and the validation loss."""
        write_grid(self.t2i, self.options.out / f"samples-{self.state.global_step:06d}.png")
        if self.held_out is None:
            return {}
        return {"validation_loss": validation_loss(self.t2i, self.held_out, self.config)}

    def save_weights(self) -> None:
        """Writes <out>/t2i in diffusers layout."""
        self.t2i.save_pretrained(self.options.out / "t2i")


@click.command()
@training_options
@click.option("--init-from", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A t2i folder.")
@click.option("--snr-gamma", type=float, help="min-SNR weighting; 0 = off.")
@click.option("--caption-variants", type=int, help="Captions written per picture, instead of the preset's.")
@click.option("--align-weight", type=float, help="Of aligning features with EfficientNet-lite2's; 0 = off.")
def main(
    preset: str,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    stream: int | None,
    limit: int | None,
    out: Path,
    text_encoder: str | None,
    init_from: Path | None,
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
    """Train the embedded text-to-image model."""
    start(threads)
    with usage_errors():
        recipe = trainable_preset(preset)
        config = override(recipe.t2i, overrides, minutes)
        pictures, held_out = load_data(recipe.unet.image_size, data, validation, limit, stream, workers)
        t2i = build_model(recipe, text_encoder, init_from, config.seed)
        options = RunOptions(out, accumulate, compiled, fp32, dry_run, checkpoint_gradients, stream, minutes)
        run = T2IRun(t2i, pictures, held_out, recipe, config, options, workers)
        run.resume()
    run.run()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
