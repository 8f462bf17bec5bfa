"""Trains the embedded pixel-space text-to-image model.

    accelerate launch -m train.train_t2i --preset nano --data 'pictures64-train-*.parquet' --out runs/t2i

Running the same command again resumes the run exactly. `--init-from` starts from shipped weights instead.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DConditionModel
from torch import Tensor

from train.captions import plain_caption, write_captions
from train.data import Pictures, background_colours, batch_indices, load_pictures, sampling_weights
from train.presets import PRESETS, Preset, TrainConfig, build_unet
from train.state import TrainState, count_flops, parameter_count, step_generator, train
from vilex.checkpoint import load_pretrained
from vilex.config import GenerationConfig, T2IConfig
from vilex.diffusion import Conditioning, TextToImage, build_noise_scheduler, load_t2i
from vilex.images import contact_sheet, to_images
from vilex.minilm import load_text_encoder
from vilex.prompt import ComposedPrompt, compose
from vilex.sampling import Conditions, sample

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class CaptionTable:
    """Token ids of K caption variants per picture: ids int16 (S,K,L), lengths int16 (S,K).

    Variant k of picture i describes it on the background of epoch k, so words and colours agree.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def variants(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> "CaptionTable":
        """The same table on another device."""
        return CaptionTable(self.ids.to(device), self.lengths.to(device))

    def prompt(self, indices: Tensor, variant: Tensor, trim: bool) -> ComposedPrompt:
        """Prompts of a batch, (B,L); with trim, L shrinks to the longest one's length rounded up to 8."""
        ids = self.ids[indices, variant].long()
        lengths = self.lengths[indices, variant].long()
        if trim:
            ids = ids[:, : -(-int(lengths.max()) // 8) * 8]
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return ComposedPrompt(ids, mask, torch.zeros_like(mask))


def tabulate_captions(
    pictures: Pictures, tokenizer: object, config: TrainConfig, context_length: int, workers: int
) -> CaptionTable:
    """Writes and tokenises config.caption_variants captions of every picture."""
    texts = write_captions(
        pictures, config.caption_variants, seed=config.seed, workers=workers, empty_share=config.empty_fraction
    )
    flat = [text for captions in texts for text in captions]
    tokens = tokenizer(flat, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt")
    ids = tokens.input_ids.view(len(texts), config.caption_variants, context_length)  # (S,K,L)
    return CaptionTable(ids.short(), tokens.attention_mask.view_as(ids).sum(2).short())


def draw_batch(
    pictures: Pictures, captions: CaptionTable, config: TrainConfig, weights: Tensor | None, global_step: int,
    process: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B,), caption variants (B,) and pixels (B,3,H,W) of one step, a function of (seed, step)."""
    indices = batch_indices(config.seed, global_step, config.batch_size, len(pictures), weights)[process]
    generator = step_generator(config.seed, global_step, process.start or 0)
    variant = torch.randint(captions.variants, (len(indices),), generator=generator)
    pixels = pictures.batch(indices, background_colours(config.seed, variant, indices))
    device = pixels.device
    return indices.to(device), variant.to(device), pixels


def diffusion_loss(
    t2i: TextToImage,
    denoiser: torch.nn.Module,
    latents: Tensor,
    condition: Conditioning,
    generator: torch.Generator,
    snr_gamma: float = 0.0,
) -> Tensor:
    """Mean squared error of the prediction, 0-d; `denoiser` stands for t2i.denoiser when it is wrapped.

    With snr_gamma, min-SNR weights for v-prediction: min(snr, gamma) / (snr + 1). Source: Hang et al. 2023.
    """
    B, scheduler = len(latents), t2i.scheduler
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (B,), generator=generator, device=latents.device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    prediction = denoiser(
        noisy_latents,
        timesteps,
        encoder_hidden_states=condition.prompt_embeds,
        class_labels=condition.pooled,
        encoder_attention_mask=condition.mask,
        return_dict=False,
    )[0]
    errors = F.mse_loss(prediction.float(), t2i.target(latents, noise, timesteps), reduction="none").mean((1, 2, 3))
    if snr_gamma:
        alpha_bar = scheduler.alphas_cumprod.to(latents.device)[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        errors = errors * snr.clamp(max=snr_gamma) / (snr + 1)
    return errors.mean()


def build_model(preset: Preset, text_encoder: str | None, init_from: Path | None) -> TextToImage:
    """An embedded model whose denoiser is random, or that of the weights in `init_from`."""
    config = T2IConfig(pixel_unshuffle=preset.unet.pixel_unshuffle, context_length=preset.context_length)
    tokenizer, encoder = load_text_encoder(text_encoder or config.text_encoder)
    if init_from is None:
        denoiser = build_unet(preset.unet, encoder.config.hidden_size)
    else:
        denoiser = load_pretrained(UNet2DConditionModel, init_from / "unet")
    return TextToImage(config, tokenizer, encoder, denoiser, build_noise_scheduler())


def sample_prompts(t2i: TextToImage, prompts: Sequence[str], config: GenerationConfig) -> Tensor:
    """One picture (S,3,H,W) in [-1,1] per prompt, picture i from seed config.seed + i."""
    conditions = [t2i.encode_prompt(compose(p, [], t2i.tokenizer, t2i.config.context_length)) for p in ["", *prompts]]
    config = replace(config, num_images=len(prompts))
    return t2i.decode(sample(t2i, Conditions(conditions[0], joint=Conditioning.concatenate(conditions[1:])), config))


def write_grid(t2i: TextToImage, path: Path) -> None:
    """A PNG of the fixed prompts at fixed seeds."""
    images = to_images(sample_prompts(t2i, GRID_PROMPTS, GenerationConfig(guidance_scale=3.0)).float().cpu())
    contact_sheet([images[i : i + 8] for i in range(0, len(images), 8)]).save(path)


def validation_loss(t2i: TextToImage, pictures: Pictures, config: TrainConfig, batch_size: int) -> float:
    """Loss on held-out pictures with their plain captions, the same noise each time."""
    total = 0.0
    for start in range(0, len(pictures), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(pictures)))
        texts = [plain_caption(pictures.records[i]) for i in indices]
        tokens = t2i.tokenizer(texts, padding=True, truncation=True, max_length=t2i.config.context_length)
        ids = torch.tensor(tokens.input_ids)
        mask = torch.tensor(tokens.attention_mask).bool()
        condition = t2i.encode_prompt(ComposedPrompt(ids, mask, torch.zeros_like(mask)))
        latents = t2i.encode(pictures.batch(indices))
        generator = step_generator(config.seed, start, device=latents.device)
        total += diffusion_loss(t2i, t2i.denoiser, latents, condition, generator).item() * len(indices)
    return total / len(pictures)


@click.command()
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="nano", show_default=True)
@click.option("--data", multiple=True, required=True, help="Parquet tables, folders, .tar shards or hub:NAME.")
@click.option("--validation", multiple=True, help="Held-out pictures, read like --data.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--init-from", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A t2i folder.")
@click.option("--text-encoder", help="Folder of MiniLM, instead of the usual places.")
@click.option("--limit", type=int, help="Read only this many pictures.")
@click.option("--max-steps", type=int, help="Instead of the preset's.")
@click.option("--batch-size", type=int, help="Instead of the preset's.")
@click.option("--learning-rate", type=float, help="Instead of the preset's.")
@click.option("--snr-gamma", type=float, help="min-SNR weighting; 0 = off.")
@click.option("--seed", type=int, help="Instead of the preset's.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that write captions.")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Micro-batches per step.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the denoiser.")
@click.option("--fp32", is_flag=True, help="No bf16 autocast.")
@click.option("--dry-run", is_flag=True, help="Print sizes and throughput of a few steps, then stop.")
def main(
    preset: str, data: tuple[str, ...], validation: tuple[str, ...], out: Path, init_from: Path | None,
    text_encoder: str | None, limit: int | None, workers: int, threads: int | None, accumulate: int,
    compiled: bool, fp32: bool, dry_run: bool, **overrides: float | None,
) -> None:
    """Train the embedded text-to-image model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        torch.set_num_threads(threads)
    recipe = PRESETS[preset]
    try:
        config = replace(recipe.t2i, **{k: v for k, v in overrides.items() if v is not None})
        if config.batch_size % accumulate:
            raise ValueError(f"batch_size {config.batch_size} is not a multiple of --accumulate {accumulate}")
        pictures = load_pictures(list(data), image_size=recipe.unet.image_size, limit=limit)
        held_out = load_pictures(list(validation), image_size=recipe.unet.image_size, limit=512) if validation else None
        t2i = build_model(recipe, text_encoder, init_from)
        weights = sampling_weights(pictures.records, recipe.source_weights) if recipe.source_weights else None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    accelerator = Accelerator(
        mixed_precision="no" if fp32 else "bf16", gradient_accumulation_steps=accumulate, cpu=not torch.cuda.is_available()
    )
    run = T2IRun(accelerator, t2i, pictures, held_out, weights, config, out, workers, compiled)
    run.report()
    if not dry_run:
        run.train()


class T2IRun:
    """One training run of a denoiser: what its steps read, and what it writes."""

    def __init__(
        self, accelerator: Accelerator, t2i: TextToImage, pictures: Pictures, held_out: Pictures | None,
        weights: Tensor | None, config: TrainConfig, out: Path, workers: int, compiled: bool,
    ) -> None:
        device = accelerator.device
        self.accelerator, self.config, self.out, self.weights = accelerator, config, out, weights
        self.t2i = t2i.to(device).to(memory_format=torch.channels_last)
        self.pictures, self.held_out = pictures.to(device), held_out and held_out.to(device)
        self.captions = tabulate_captions(pictures, t2i.tokenizer, config, t2i.config.context_length, workers).to(device)
        denoiser = t2i.denoiser.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(
            denoiser.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.model, optimizer = accelerator.prepare(torch.compile(denoiser) if compiled else denoiser, optimizer)
        self.state = TrainState(out, accelerator, denoiser, optimizer, config)

    def loss(self, global_step: int, micro: int) -> Tensor:
        """Loss of one micro-batch on this process."""
        accumulate, process = self.accelerator.gradient_accumulation_steps, self.accelerator.process_index
        share = self.config.batch_size // (accumulate * self.accelerator.num_processes)
        start = (micro * self.accelerator.num_processes + process) * share
        indices, variant, pixels = draw_batch(
            self.pictures, self.captions, self.config, self.weights, global_step, slice(start, start + share)
        )
        device = self.accelerator.device
        with self.accelerator.autocast():
            with torch.no_grad():
                trim = device.type == "cpu"  # fixed shapes are faster on a GPU, short ones on a CPU
                condition = self.t2i.encode_prompt(self.captions.prompt(indices, variant, trim))
            latents = self.t2i.encode(pixels).contiguous(memory_format=torch.channels_last)
            generator = step_generator(self.config.seed, global_step, start + 1, device)
            return diffusion_loss(self.t2i, self.model, latents, condition, generator, self.config.snr_gamma)

    def report(self) -> None:
        """Logs sizes, compute and memory before the first step."""
        parameters = parameter_count(self.t2i.denoiser)
        flops = count_flops(lambda: self.loss(0, 0))
        self.t2i.denoiser.zero_grad()
        data = self.pictures.pixels.nbytes + self.captions.ids.nbytes
        log.info("%d pictures, %.2f GB with %d captions each", len(self.pictures), data / 1e9, self.captions.variants)
        log.info("denoiser: %.2fM parameters; weights, gradients, AdamW and EMA take %.2f GB", parameters / 1e6,
                 parameters * 20 / 1e9)
        per_picture = flops * self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes / self.config.batch_size
        log.info("%.2f GFLOP per picture, %.1f PFLOP for %d steps of %d pictures", per_picture / 1e9,
                 per_picture * self.config.batch_size * self.config.max_steps / 1e15, self.config.max_steps,
                 self.config.batch_size)

    def sample(self) -> dict[str, float]:
        """Writes a grid and returns the validation loss."""
        with self.accelerator.autocast():
            write_grid(self.t2i, self.out / f"samples-{self.state.global_step:06d}.png")
            if self.held_out is None:
                return {}
            return {"validation_loss": validation_loss(self.t2i, self.held_out, self.config, 64)}

    def train(self) -> None:
        """Trains what is left of the run and writes the EMA weights to <out>/t2i."""
        if self.state.resume():
            log.info("resuming at step %d", self.state.global_step)
        train(self.state, self.model, self.loss, self.sample)
        if self.accelerator.is_main_process:
            with self.state.averaged():
                self.t2i.save_pretrained(self.out / "t2i", max_shard_size="15MB")


if __name__ == "__main__":
    main()
