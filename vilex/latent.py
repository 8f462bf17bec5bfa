"""Frozen latent models in diffusers layout: Stable Diffusion 1.x / 2.x, SDXL and Stable Diffusion 3.x."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import ModelOutput

from vilex.checkpoint import load_pretrained
from vilex.config import T2IConfig
from vilex.prompt import ComposedPrompt, recompose, shorten, special_tokens
from vilex.t2i import Conditioning, TextToImage, read_words

_ZERO_EMPTY = "force_zeros_for_empty_prompt"  # in model_index.json
T5_LENGTH = 256  # positions that diffusers' Stable Diffusion 3 pads T5's prompts to


class LatentModel(TextToImage):
    """A denoiser between a VAE's halves, and text encoders that read their padding as diffusers has it."""

    text_classes: ClassVar[tuple[type[PreTrainedModel], ...]]
    denoiser_class: ClassVar[type[nn.Module]] = UNet2DConditionModel
    scheduler_class: ClassVar[type[SchedulerMixin]] = DDPMScheduler

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
    def load(cls, folder: Path, index: dict[str, Any]) -> Self:
        """The frozen model in a folder whose model_index.json holds `index`; all weights in fp32."""
        count = len(cls.text_classes)
        encoders = zip(cls.text_classes, _numbered("text_encoder", count), strict=True)
        return cls(
            [AutoTokenizer.from_pretrained(folder / name) for name in _numbered("tokenizer", count)],
            [load_pretrained(kind, folder / name).float() for kind, name in encoders],  # transformers keeps fp16
            load_pretrained(cls.denoiser_class, folder / cls.denoiser_name),
            cls.scheduler_class.from_pretrained(folder / "scheduler"),
            load_pretrained(AutoencoderKL, folder / "vae"),
        )

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
        return (self.vae.encode(pixels).latent_dist.mean - (settings.shift_factor or 0)) * settings.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,h,w) -> pixels (B,3,H,W), clamped to [-1,1]; the inverse of `encode`."""
        settings = self.vae.config
        return self.vae.decode(latents / settings.scaling_factor + (settings.shift_factor or 0)).sample.clamp(-1, 1)

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
        _require_one_vocabulary(*tokenizers)
        special = special_tokens(self.tokenizer)
        self.zero_empty, self._num_special = zero_empty, len(special.prefix) + len(special.suffix)
        size = self.image_size
        self.register_buffer("time_ids", torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32), False)

    @classmethod
    def load(cls, folder: Path, index: dict[str, Any]) -> Self:
        """The frozen model in a folder whose model_index.json holds `index`; all weights in fp32."""
        model = super().load(folder, index)
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


class StableDiffusion3(LatentModel):
    """Stable Diffusion 3.x: a transformer that predicts a flow, two CLIP text encoders and T5.

    All three carry ViLex tokens: CLIP for the pooled vector that steers every block, T5 for most of the states.
    T5 has a vocabulary of its own and no BOS, so it composes the prompt anew. A prompt is as long as T5's context, of
    which CLIP reads the first 75 words and tokens. Noise is added as (1 - s) x0 + s noise, timesteps are 1000 s, and
    s in (0,1] is drawn in training as the model's own was: logit-normal, shifted.
    Source: Esser et al. 2024.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    text_classes = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    denoiser_name, denoiser_class = "transformer", SD3Transformer2DModel
    scheduler_class = FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        t5_length: int = T5_LENGTH,
    ) -> None:
        own, other = (special_tokens(tokenizers[i]) for i in (0, 2))
        around = len(own.prefix) + len(own.suffix) - len(other.prefix) - len(other.suffix)  # CLIP's BOS, which T5 lacks
        super().__init__(tokenizers, text_encoders, denoiser, scheduler, vae, t5_length + around)
        _require_one_vocabulary(*tokenizers[:2])
        if scheduler.config.use_dynamic_shifting:
            raise ValueError("the scheduler shifts its timesteps with the picture's size, which is not supported")
        self.t5_length = t5_length

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """CLIP's states, then T5's, and what both CLIPs pool; gradients reach `prompt.vectors`."""
        *for_clip, for_t5 = self.split_vectors(prompt)
        clips = [self._read_clip(i, prompt, vectors) for i, vectors in enumerate(for_clip)]
        again = recompose(prompt, self.tokenizer, self.tokenizers[2], self.t5_length)
        t5_states = read_words(self.text_encoders[2], again.input_ids, again.slots, for_t5).last_hidden_state
        clip_states = torch.cat([clip.hidden_states[-2] for clip in clips], -1)  # (B,77,D_1+D_2)
        clip_states = F.pad(clip_states, (0, t5_states.shape[-1] - clip_states.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], -1)
        return Conditioning(torch.cat([clip_states, t5_states], 1), pooled)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w); timesteps float (B,) in (0,1000]."""
        network = self.denoiser if denoiser is None else denoiser
        return network(
            noisy_latents,
            encoder_hidden_states=condition.prompt_embeds,
            pooled_projections=condition.pooled,
            timestep=timesteps,
            return_dict=False,
        )[0]

    @property
    def prediction_type(self) -> str:
        return "flow"

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Timesteps float (B,) to train at, on the generator's device."""
        level = torch.randn(batch_size, generator=generator, device=generator.device).sigmoid()
        shift = self.scheduler.config.shift
        return self.scheduler.config.num_train_timesteps * shift * level / (1 + (shift - 1) * level)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """noisy_latents (B,C,h,w) at timesteps float (B,)."""
        sigmas = self._sigmas(timesteps)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Ratio of the variances of signal and noise at these timesteps, in their shape."""
        sigmas = self._sigmas(timesteps)
        return ((1 - sigmas) / sigmas) ** 2

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow's velocity, the same at all timesteps: noise - x0."""
        return noise - latents

    def estimate_clean(self, noisy_latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The x0 (B,C,h,w) that a prediction at `timestep` (0-d) implies: the cheap preview."""
        return noisy_latents - self._sigmas(timestep).to(noisy_latents) * prediction

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.scheduler.config.num_train_timesteps


def _numbered(name: str, count: int) -> list[str]:
    """diffusers' folders of several parts of a kind: name, name_2, name_3."""
    return [name, *(f"{name}_{i}" for i in range(2, count + 1))]


def _require_one_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    if first.get_vocab() != second.get_vocab():
        raise ValueError("the two CLIP tokenizers have different vocabularies; one prompt has to serve both")


def _require_supported(denoiser: nn.Module, vae: AutoencoderKL) -> None:
    settings = denoiser.config
    if settings.in_channels != settings.out_channels:
        raise ValueError(
            f"the denoiser takes {settings.in_channels} channels and gives {settings.out_channels}; "
            "models that fill in or edit pictures are not supported"
        )
    if settings.get("time_cond_proj_dim") is not None or vae.config.get("latents_mean") is not None:
        raise ValueError("distilled guidance (time_cond_proj_dim) and latents of unit variance are not supported")
