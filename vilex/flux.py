"""Frozen models of Flux's kind: a transformer over packed latents, CLIP's pooled vector, and T5's states."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from vilex.flow import FlowModel, context_of
from vilex.prompt import ComposedPrompt
from vilex.t2i import Conditioning

GUIDANCE = 3.5  # what a model with distilled guidance is told, the default of diffusers' pipeline
_T5_LENGTH = {True: 512, False: 256}  # positions T5's prompts are padded to, with and without distilled guidance
_PATCH = 2  # latents per side that make one of the transformer's tokens


class Flux(FlowModel):
    """FLUX.1: CLIP gives the pooled vector that steers every block, T5 the states.

    T5 reads all ViLex tokens and words, CLIP the first 75 of them. A model with distilled guidance (dev) is told
    GUIDANCE; guidance_scale is true guidance on top, 1 for none. Levels of noise are shifted by the size of the
    picture, which is fixed here.
    Latents are (B,C,h,w) outside; the transformer reads them as tokens of 2 x 2.
    """

    pipeline_class = "FluxPipeline"
    text_classes = (CLIPTextModel, T5EncoderModel)
    denoiser_class = FluxTransformer2DModel
    fp32_parts = ("text_encoder_2",)  # T5

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
    ) -> None:
        self.t5_length = _T5_LENGTH[bool(denoiser.config.guidance_embeds)]
        length = context_of(*tokenizers, self.t5_length)
        super().__init__(tokenizers, text_encoders, denoiser, scheduler, vae, length)
        side = torch.arange(self.latent_shape[1] // _PATCH, dtype=torch.float32)
        self.register_buffer("places", torch.cartesian_prod(torch.zeros(1), side, side), False)  # (h/2*w/2,3)

    @property
    def image_size(self) -> int:
        return self.vae.config.sample_size  # the transformer names no size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of the VAE's space."""
        side = self.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.denoiser.config.in_channels // _PATCH**2, side, side

    @property
    def shift(self) -> float:
        """How far levels of noise are shifted towards more of it, 1 for not at all.

        With dynamic shifting its logarithm grows evenly with the number of the transformer's tokens.
        """
        settings = self.scheduler.config
        if not settings.use_dynamic_shifting:
            return settings.shift
        sizes = settings.base_image_seq_len, settings.max_image_seq_len
        slope = (settings.max_shift - settings.base_shift) / (sizes[1] - sizes[0])
        mu = settings.base_shift + slope * (len(self.places) - sizes[0])
        return math.exp(mu) if settings.time_shift_type == "exponential" else mu

    def euler_sigmas(self, num_inference_steps: int) -> list[float]:
        """Levels of noise for Euler's method before they are shifted: evenly down to one spacing above none."""
        return [1 - i / num_inference_steps for i in range(num_inference_steps)]

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """T5's states, and what CLIP pools; gradients reach `prompt.vectors`."""
        for_clip, for_t5 = self.split_vectors(prompt)
        pooled = self._read_clip(0, prompt, for_clip).pooler_output  # (B,E)
        return Conditioning(self._read_t5(1, prompt, for_t5, self.t5_length), pooled)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w); timesteps float (B,) in (0,1000]."""
        network = self.denoiser if denoiser is None else denoiser
        (B, _, h, w), like = noisy_latents.shape, noisy_latents
        is_told = self.denoiser.config.guidance_embeds
        tokens = network(
            hidden_states=F.pixel_unshuffle(noisy_latents, _PATCH).flatten(2).mT,  # (B,h/2*w/2,4C)
            encoder_hidden_states=condition.prompt_embeds,
            pooled_projections=condition.pooled,
            timestep=self._sigmas(timesteps).to(like),
            guidance=torch.full((B,), GUIDANCE, device=like.device) if is_told else None,
            img_ids=self.places,
            txt_ids=self.places.new_zeros(condition.prompt_embeds.shape[1], 3),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(tokens.mT.unflatten(2, (h // _PATCH, w // _PATCH)), _PATCH)
