"""The one face of frozen text-to-image models: prompts in, predictions of a denoiser out."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, SchedulerMixin
from diffusers.hooks import apply_group_offloading
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from vilex.checkpoint import require_finite
from vilex.config import T2IConfig
from vilex.prompt import ComposedPrompt, embedding_module, override_embeddings, round_up, special_tokens

INDEX_NAME = "model_index.json"


def shift_level(level: Tensor, shift: float) -> Tensor:
    """Noise levels in 0..1, moved towards 1 by a shift above 1. Source: Esser et al. 2024 (SD3), section 5.3.2."""
    return shift * level / (1 + (shift - 1) * level)


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

    def trimmed(self) -> Self:
        """Without padding that no row needs; without a mask padding is read, and stays."""
        if self.mask is None:
            return self
        length = round_up(int(self.mask.sum(1).max()))
        return replace(self, prompt_embeds=self.prompt_embeds[:, :length], mask=self.mask[:, :length])

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


class TextToImage(nn.Module, ABC):
    """A frozen denoiser with its text encoders, tokenizers, noise schedule and, for latent models, VAE.

    Subclasses say how a prompt is read and in what space the denoiser works. Noise is added as
    sqrt(a) x0 + sqrt(1 - a) noise, where a is the scheduler's alphas_cumprod, unless a subclass says otherwise.
    """

    pipeline_class: ClassVar[str]  # in model_index.json
    denoiser_name: ClassVar[str] = "unet"  # its folder
    # that suit it, the best first
    schedulers: ClassVar[tuple[str, ...]] = ("dpm++", "sde-dpm++", "ddim", "ddpm", "euler")

    def __init__(
        self,
        config: T2IConfig,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizers, self.scheduler = config, tuple(tokenizers), scheduler
        self.text_encoders, self.denoiser, self.vae = nn.ModuleList(text_encoders), denoiser, vae
        self.is_offloaded = False
        self.requires_grad_(False).eval()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that prompts are composed with."""
        return self.tokenizers[0]

    @property
    def text_encoder(self) -> PreTrainedModel:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def embedded(self) -> bool:
        """Whether this is our own pixel-space model."""
        return self.vae is None

    def pick_scheduler(self, name: str) -> str:
        """The scheduler of this name, "auto" being the best. Raises ValueError for one that does not suit the model."""
        if name != "auto" and name not in self.schedulers:
            raise ValueError(f"scheduler {name!r} does not suit this model, which takes {', '.join(self.schedulers)}")
        return self.schedulers[0] if name == "auto" else name

    @property
    def device(self) -> torch.device:
        """Where it computes, which with offloading is not where its weights are."""
        if self.is_offloaded:
            return get_module_execution_device(self.denoiser)
        return next(self.denoiser.parameters()).device

    def cast(self, dtype: torch.dtype) -> None:
        """Has it compute in a dtype, as far as that is safe; here the denoiser alone."""
        nn.Module.to(self.denoiser, dtype=dtype, memory_format=torch.channels_last)

    def offload(self, device: torch.device) -> None:
        """Keeps the weights in the CPU's memory and brings each layer to the device only while it computes.

        Gradients cannot pass, since layers are gone when they come back. diffusers' offloading of whole networks is
        no choice here: a network that starts sends another away, which may be at work in another thread.
        """
        for network in (*self.text_encoders, self.denoiser, self.vae):
            if network is not None:
                apply_group_offloading(network, device, torch.device("cpu"), offload_type="leaf_level")
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))
        self.is_offloaded = True

    @property
    def text_widths(self) -> list[int]:
        """Width of each text encoder's word embeddings."""
        return [embedding_module(encoder).embedding_dim for encoder in self.text_encoders]

    @property
    def text_width(self) -> int:
        """Width D of a ViLex token: the text encoders' embedding widths, side by side."""
        return sum(self.text_widths)

    @property
    def max_tokens(self) -> int:
        """Positions that a prompt has for words and ViLex tokens."""
        special = special_tokens(self.tokenizer)
        return self.config.context_length - len(special.prefix) - len(special.suffix)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of the space the denoiser works in."""
        config = self.denoiser.config
        return config.out_channels, config.sample_size, config.sample_size

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the pictures it draws, in pixels."""

    @abstractmethod
    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """Runs the frozen text encoders; gradients reach `prompt.vectors`."""

    @abstractmethod
    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w) for noisy_latents (B,C,h,w) at timesteps (B,).

        `denoiser` stands for the model's own when that is wrapped or compiled.
        """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [-1,1] -> latents (B,C,h,w), the mean for a VAE."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,h,w) -> pixels (B,3,H,W), clamped to [-1,1]; the inverse of `encode`."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow"."""
        return self.scheduler.config.prediction_type

    def draw_timesteps(self, batch_size: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        """Timesteps (B,) to train at, on the generator's device; a shift above 1 draws noisier ones more often."""
        count = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (batch_size,), generator=generator, device=generator.device)
        return (count * shift_level((timesteps + 0.5) / count, shift)).long()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """noisy_latents (B,C,h,w) at timesteps (B,)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Ratio of the variances of signal and noise at these timesteps, in their shape."""
        alpha_bar = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict: the noise, x0, or v = sqrt(a) noise - sqrt(1 - a) x0."""
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise if self.prediction_type == "epsilon" else latents

    def estimate_clean(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The x0 (B,C,h,w) that a prediction at timesteps, (B,) or 0-d, implies: the cheap preview."""
        if self.prediction_type == "sample":
            return prediction
        alpha_bar = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps.long()].to(noisy_latents)
        alpha_bar = alpha_bar.view(-1, 1, 1, 1)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "epsilon":
            return (noisy_latents - noise * prediction) / signal
        return signal * noisy_latents - noise * prediction

    def word_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (D,), of the word embeddings that ViLex tokens stand among."""
        tables = [embedding_module(encoder).weight.float() for encoder in self.text_encoders]
        return torch.cat([table.mean(0) for table in tables]), torch.cat([table.std(0) for table in tables])

    def split_vectors(self, prompt: ComposedPrompt) -> list[Tensor]:
        """Each text encoder's columns of the prompt's ViLex tokens, (S,D_i)."""
        vectors = torch.empty(0, self.text_width) if prompt.vectors is None else prompt.vectors
        return list(vectors.to(self.device).split(self.text_widths, dim=-1))

    def save_pretrained(self, folder: Path, max_shard_size: str = "45MB", dtype: torch.dtype = torch.float16) -> None:
        """Writes the diffusers layout; the embedded model's text encoder is named, not copied.

        Raises ValueError when a weight is not finite in `dtype`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = self.parts()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                narrow = nn.Module.to(copy.deepcopy(part), dtype)  # diffusers' own `to` warns about casts
                require_finite(narrow.state_dict(), folder / name)
                if isinstance(narrow, ConfigMixin):
                    narrow.register_to_config(_name_or_path="")  # else the folder that it was read from
                narrow.save_pretrained(folder / name, max_shard_size=max_shard_size)
            else:
                part.save_pretrained(folder / name)
        classes = {name: type(part) for name, part in parts.items()}
        index = {"_class_name": self.pipeline_class} | self._pipeline_settings()
        index |= {name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in classes.items()}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def parts(self) -> dict[str, Any]:
        """What is written, by folder."""
        return {self.denoiser_name: self.denoiser, "scheduler": self.scheduler}

    def _pipeline_settings(self) -> dict[str, Any]:
        """Settings of the diffusers pipeline that stand in model_index.json."""
        return {}


def read_words(
    text_encoder: PreTrainedModel, input_ids: Tensor, slots: Tensor, vectors: Tensor, **options: Any
) -> ModelOutput:
    """What a text encoder makes of ids int64 (B,L) with `vectors` (S,D) at slots bool (B,L)."""
    device = get_module_execution_device(text_encoder)
    # Words alone take the override's lock too, or they would read the vectors of another thread
    with override_embeddings(text_encoder, slots.to(device), vectors):
        return text_encoder(input_ids.to(device), **options)
