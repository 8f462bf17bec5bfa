"""Frozen text-to-image models behind one face: prompts in, noise predictions out.

One class covers the embedded pixel-space model and Stable Diffusion 1.x / 2.x; what differs (pixels or
VAE latents, attention mask and pooled vector or not) is decided once, when the model is loaded.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from vilex.checkpoint import load_pretrained
from vilex.config import T2IConfig
from vilex.minilm import load_text_encoder
from vilex.prompt import ComposedPrompt, override_embeddings

CONFIG_NAME = "vilex_t2i.json"  # marks an embedded model; diffusers ignores it
_EMBEDDED, _LATENT = "VilexTextToImage", "StableDiffusionPipeline"  # classes in model_index.json
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser reads: prompt_embeds (B,L,D), pooled (B,D) or None, mask bool (B,L) or None."""

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def expand(self, batch: int) -> Self:
        """The same condition for every picture of a batch; B must be 1."""
        return replace(self, **{k: v.expand(batch, *v.shape[1:]) for k, v in self._tensors().items()})

    def rows(self, indices: Tensor) -> Self:
        """The conditions at these positions of the batch."""
        return replace(self, **{k: v[indices] for k, v in self._tensors().items()})

    def padded(self, length: int) -> Self:
        """Zeros that the mask hides, up to `length` positions."""
        more = length - self.prompt_embeds.shape[1]
        return replace(self, prompt_embeds=F.pad(self.prompt_embeds, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Moved or cast; the mask stays boolean."""
        moved = {k: v.to(device) if k == "mask" else v.to(device, dtype) for k, v in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {k: v for k in ("prompt_embeds", "pooled", "mask") if (v := getattr(self, k)) is not None}

    @staticmethod
    def concatenate(conditions: list["Conditioning"]) -> "Conditioning":
        """Several conditions as one batch, in order."""
        joined = {k: torch.cat([getattr(c, k) for c in conditions]) for k in conditions[0]._tensors()}
        return Conditioning(**joined)


class TextToImage(nn.Module):
    """A frozen denoiser with its text encoder, tokenizer, noise schedule and, for latent models, VAE."""

    def __init__(
        self,
        config: T2IConfig,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        denoiser: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.scheduler = config, tokenizer, scheduler
        self.text_encoder, self.denoiser, self.vae = text_encoder, denoiser, vae
        self._check_channels()
        self.register_buffer("positions", position_maps(config.position_frequencies, self.latent_shape[1]), False)
        self.requires_grad_(False).eval()

    def _check_channels(self) -> None:
        unet = self.denoiser.config
        expected = unet.out_channels + 4 * self.config.position_frequencies
        if unet.in_channels != expected:
            raise ValueError(f"the denoiser takes {unet.in_channels} channels, its settings make {expected}")

    @property
    def embedded(self) -> bool:
        """Whether this is our own pixel-space model."""
        return self.vae is None

    @property
    def text_width(self) -> int:
        """Width D of a word embedding, and so of a ViLex token."""
        return self.text_encoder.get_input_embeddings().embedding_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of the space the denoiser works in."""
        unet = self.denoiser.config
        return unet.out_channels, unet.sample_size, unet.sample_size

    @property
    def image_size(self) -> int:
        """Side of the pictures it draws, in pixels."""
        factor = self.config.pixel_unshuffle if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.denoiser.config.sample_size * factor

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """Runs the frozen text encoder; gradients reach `prompt.vectors`."""
        device = self.text_encoder.device
        mask = prompt.attention_mask.to(device) if self.embedded else None
        vectors = torch.empty(0, self.text_width) if prompt.vectors is None else prompt.vectors
        # Words alone take the override's lock too, or they would read the vectors of another thread
        with override_embeddings(self.text_encoder, prompt.slots.to(device), vectors.to(device)):
            states = self.text_encoder(prompt.input_ids.to(device), attention_mask=mask).last_hidden_state  # (B,L,D)
        return Conditioning(states, masked_mean(states, mask), mask) if self.embedded else Conditioning(states)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w) for noisy_latents (B,C,h,w) at timesteps int64 (B,).

        `denoiser` stands for the model's own when that is wrapped or compiled.
        """
        network = self.denoiser if denoiser is None else denoiser
        positions = self.positions.to(noisy_latents).expand(len(noisy_latents), -1, -1, -1)
        return network(
            torch.cat([noisy_latents, positions], 1),
            timesteps,
            encoder_hidden_states=condition.prompt_embeds,
            class_labels=condition.pooled,
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [-1,1] -> latents (B,C,h,w), the mean for a VAE."""
        if self.vae is None:
            return F.pixel_unshuffle(pixels, self.config.pixel_unshuffle)
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,h,w) -> pixels (B,3,H,W), clamped to [-1,1]; the inverse of `encode`."""
        if self.vae is None:
            return F.pixel_shuffle(latents, self.config.pixel_unshuffle).clamp(-1, 1)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict: the noise, x0, or v = sqrt(a) noise - sqrt(1 - a) x0."""
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise if prediction_type == "epsilon" else latents

    def save_pretrained(self, folder: Path, max_shard_size: str = "45MB", dtype: torch.dtype = torch.float16) -> None:
        """Writes the diffusers layout; the embedded model's text encoder is named, not copied."""
        folder.mkdir(parents=True, exist_ok=True)
        networks, others = {"unet": self.denoiser}, {"scheduler": self.scheduler}
        if self.vae is None:
            (folder / CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        else:
            networks |= {"vae": self.vae, "text_encoder": self.text_encoder}
            others |= {"tokenizer": self.tokenizer}
        for name, network in networks.items():
            narrow = nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own `to` warns about casts
            narrow.save_pretrained(folder / name, max_shard_size=max_shard_size)
        for name, part in others.items():
            part.save_pretrained(folder / name)
        classes = {name: type(part) for name, part in (networks | others).items()}
        index = {"_class_name": _EMBEDDED if self.embedded else _LATENT}
        index |= {name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in classes.items()}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions that the mask (B,L) keeps: (B,L,D) -> (B,D)."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def position_maps(frequencies: int, size: int) -> Tensor:
    """Cosines and sines of pi 2**k u for the cell centres' x and y, u in [0,1]: (1,4*frequencies,size,size).

    A convolution over pure noise does not know where it is, so without them words for places are learnt slowly.
    Source: Liu et al. 2018 (CoordConv).
    """
    centres = (torch.arange(size) + 0.5) / size
    angles = torch.pi * 2.0 ** torch.arange(frequencies)[:, None] * centres  # (frequencies,size)
    waves = torch.cat([angles.cos(), angles.sin()])[:, None]  # (2*frequencies,1,size)
    across = waves.expand(-1, size, -1)  # (2*frequencies,size,size)
    return torch.cat([across, across.mT])[None]


def build_noise_scheduler(**changes: object) -> DDPMScheduler:
    """The noise schedule of the embedded models."""
    return DDPMScheduler(**SCHEDULER | changes)


def load_t2i(folder: str | Path, text_encoder: str | None = None) -> TextToImage:
    """A frozen model from a folder in diffusers layout.

    text_encoder: a folder to take the embedded model's text encoder from instead of the usual places.
    Raises ValueError when the folder is not such a model or a weight is missing, left over or misshapen.
    """
    folder = Path(folder)
    _require_known(folder)
    try:
        return _load_embedded(folder, text_encoder) if (folder / CONFIG_NAME).is_file() else _load_latent(folder)
    except OSError as error:
        raise ValueError(f"the text-to-image model in {folder} is not complete: {error}") from error


def _require_known(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} holds no text-to-image model: model_index.json is missing")
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind not in (_EMBEDDED, _LATENT):
        raise ValueError(f"{folder} is for {kind}; {_LATENT} (1.x, 2.x) and {_EMBEDDED} are supported")


def _load_embedded(folder: Path, text_encoder: str | None) -> TextToImage:
    config = T2IConfig.load_json(folder / CONFIG_NAME)
    denoiser = load_pretrained(UNet2DConditionModel, folder / "unet")
    tokenizer, encoder = load_text_encoder(text_encoder or config.text_encoder)
    return TextToImage(config, tokenizer, encoder, denoiser, DDPMScheduler.from_pretrained(folder / "scheduler"))


def _load_latent(folder: Path) -> TextToImage:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return TextToImage(
        T2IConfig(context_length=tokenizer.model_max_length, text_encoder=""),
        tokenizer,
        load_pretrained(CLIPTextModel, folder / "text_encoder").float(),  # transformers keeps the file's fp16
        load_pretrained(UNet2DConditionModel, folder / "unet"),
        DDPMScheduler.from_pretrained(folder / "scheduler"),
        load_pretrained(AutoencoderKL, folder / "vae"),
    )
