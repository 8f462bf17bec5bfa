"""Frozen latent models in diffusers layout: what they share, and Stable Diffusion 1.x / 2.x and XL."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from vilex.checkpoint import load_pretrained
from vilex.config import T2IConfig
from vilex.prompt import ComposedPrompt, shorten, special_tokens
from vilex.t2i import Conditioning, TextToImage, read_words

_vae_lock = threading.Lock()  # lest an offloaded layer is sent away that another thread is using
_ZERO_EMPTY = "force_zeros_for_empty_prompt"  # in model_index.json


class LatentModel(TextToImage):
    """A denoiser between a VAE's halves, and text encoders that read their padding as diffusers has it."""

    text_classes: ClassVar[tuple[type[PreTrainedModel], ...]]
    denoiser_class: ClassVar[type[nn.Module]] = UNet2DConditionModel
    scheduler_class: ClassVar[type[SchedulerMixin]] = DDPMScheduler
    fp32_parts: ClassVar[tuple[str, ...]] = ()  # that overflow in fp16

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        context_length: int | None = None,
    ) -> None:
        positions = text_encoders[0].config.max_position_embeddings
        self.clip_length = min(tokenizers[0].model_max_length, positions)
        config = T2IConfig(context_length=context_length or self.clip_length, text_encoder="")
        super().__init__(config, tokenizers, text_encoders, denoiser, scheduler, vae)
        _require_supported(denoiser, vae)

    @classmethod
    def load(cls, folder: Path, index: dict[str, Any], dtype: torch.dtype = torch.float32) -> Self:
        """The frozen model in a folder whose model_index.json holds `index`, parts in `dtype` if safe."""
        count = len(cls.text_classes)

        def read(kind: type, name: str) -> nn.Module:
            return load_pretrained(kind, folder / name, dtype=cls.safe_dtype(name, dtype))

        return cls(
            [AutoTokenizer.from_pretrained(folder / name) for name in _numbered("tokenizer", count)],
            [read(*part) for part in zip(cls.text_classes, _numbered("text_encoder", count), strict=True)],
            read(cls.denoiser_class, cls.denoiser_name),
            cls.scheduler_class.from_pretrained(folder / "scheduler"),
            read(AutoencoderKL, "vae"),
        )

    @classmethod
    def safe_dtype(cls, part: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a part of a model that computes in `dtype`."""
        return torch.float32 if part in cls.fp32_parts else dtype

    def cast(self, dtype: torch.dtype) -> None:
        """Has it compute in a dtype, each part where that is safe."""
        for name, part in self.parts().items():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype=self.safe_dtype(name, dtype), memory_format=torch.channels_last)

    @classmethod
    def part_names(cls) -> list[str]:
        """The folders that `load` reads."""
        count = len(cls.text_classes)
        texts = _numbered("text_encoder", count) + _numbered("tokenizer", count)
        return [cls.denoiser_name, "scheduler", "vae", *texts]

    def parts(self) -> dict[str, Any]:
        """Networks, scheduler and tokenizers, by folder."""
        values = chain([self.denoiser, self.scheduler, self.vae], self.text_encoders, self.tokenizers)
        return dict(zip(self.part_names(), values, strict=True))

    @property
    def image_size(self) -> int:
        return self.denoiser.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [-1,1] -> latents (B,C,h,w), the mean of the VAE's distribution."""
        settings = self.vae.config
        with _vae_lock:
            mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean.float()
        return (mean - (settings.shift_factor or 0)) * settings.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,h,w) -> pixels (B,3,H,W), clamped to [-1,1]; the inverse of `encode`."""
        settings = self.vae.config
        latents = latents / settings.scaling_factor + (settings.shift_factor or 0)
        with _vae_lock:
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def _read_clip(self, index: int, prompt: ComposedPrompt, vectors: Tensor) -> ModelOutput:
        """What one of the CLIP encoders makes of what it has positions for, padded as its own tokenizer does."""
        prompt = shorten(replace(prompt, vectors=vectors), special_tokens(self.tokenizer), self.clip_length)
        ids = prompt.input_ids.where(prompt.attention_mask, self.tokenizers[index].pad_token_id)
        return read_words(self.text_encoders[index], ids, prompt.slots, prompt.vectors, output_hidden_states=True)


class StableDiffusion(LatentModel):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose last states the U-Net reads."""

    pipeline_class = "StableDiffusionPipeline"
    text_classes = (CLIPTextModel,)

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """The last states of all positions; gradients reach `prompt.vectors`."""
        (vectors,) = self.split_vectors(prompt)
        return Conditioning(self._read_clip(0, prompt, vectors).last_hidden_state)  # (B,L,D)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w); timesteps int64 (B,)."""
        network = self.denoiser if denoiser is None else denoiser
        return network(noisy_latents, timesteps, encoder_hidden_states=condition.prompt_embeds, return_dict=False)[0]


class StableDiffusionXL(LatentModel):
    """Stable Diffusion XL: two CLIP text encoders of one vocabulary, side by side.

    An empty prompt is all zeros where the pipeline says so, as it was in training. Pictures are told to be whole:
    as large as they are drawn, and not cropped.
    Source: Podell et al. 2023.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    text_classes = (CLIPTextModel, CLIPTextModelWithProjection)
    fp32_parts = ("vae",)

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        zero_empty: bool = True,
    ) -> None:
        super().__init__(tokenizers, text_encoders, denoiser, scheduler, vae)
        require_one_vocabulary(*tokenizers)
        special = special_tokens(self.tokenizer)
        self.zero_empty, self._num_special = zero_empty, len(special.prefix) + len(special.suffix)
        size = self.image_size
        self.register_buffer("time_ids", torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32), False)

    @classmethod
    def load(cls, folder: Path, index: dict[str, Any], dtype: torch.dtype = torch.float32) -> Self:
        """The frozen model in a folder whose model_index.json holds `index`, parts in `dtype` if safe."""
        model = super().load(folder, index, dtype)
        model.zero_empty = index.get(_ZERO_EMPTY, True)
        return model

    def _pipeline_settings(self) -> dict[str, Any]:
        return {_ZERO_EMPTY: self.zero_empty}

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """Both encoders' states before the last layer, and what the second pools; gradients reach `prompt.vectors`."""
        outputs = [self._read_clip(i, prompt, vectors) for i, vectors in enumerate(self.split_vectors(prompt))]
        states, pooled = torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1].text_embeds  # (B,L,D), (B,E)
        if self.zero_empty:
            is_empty = (prompt.attention_mask.sum(1) <= self._num_special).to(states.device)  # (B,)
            states, pooled = states.masked_fill(is_empty[:, None, None], 0), pooled.masked_fill(is_empty[:, None], 0)
        return Conditioning(states, pooled)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w); timesteps int64 (B,)."""
        network = self.denoiser if denoiser is None else denoiser
        return network(
            noisy_latents,
            timesteps,
            encoder_hidden_states=condition.prompt_embeds,
            added_cond_kwargs={
                "text_embeds": condition.pooled,
                "time_ids": self.time_ids.expand(len(noisy_latents), -1),
            },
            return_dict=False,
        )[0]


def _numbered(name: str, count: int) -> list[str]:
    """diffusers' folders of several parts of a kind: name, name_2, name_3."""
    return [name, *(f"{name}_{i}" for i in range(2, count + 1))]


def require_one_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless both tokenizers read the same ids."""
    if first.get_vocab() != second.get_vocab():
        raise ValueError("the two CLIP tokenizers have different vocabularies; one prompt has to serve both")


def _require_supported(denoiser: nn.Module, vae: AutoencoderKL) -> None:
    settings = denoiser.config
    if settings.out_channels not in (None, settings.in_channels):
        raise ValueError(
            f"the denoiser takes {settings.in_channels} channels and gives {settings.out_channels}; "
            "models that fill in or edit pictures are not supported"
        )
    if settings.get("time_cond_proj_dim") is not None or vae.config.get("latents_mean") is not None:
        raise ValueError("distilled guidance (time_cond_proj_dim) and latents of unit variance are not supported")
