"""Frozen latent models that predict a flow: what they share, and Stable Diffusion 3.x."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from vilex.latent import LatentModel, require_one_vocabulary
from vilex.prompt import ComposedPrompt, recompose, special_tokens
from vilex.t2i import Conditioning, read_words, shift_level

T5_LENGTH = 256  # positions that diffusers' Stable Diffusion 3 pads T5's prompts to


class FlowModel(LatentModel):
    """A transformer that predicts the flow from the picture to the noise.

    Noise is added as (1 - s) x0 + s noise, timesteps are 1000 s, and s in (0,1] is drawn in training as such models'
    own was: logit-normal, shifted. Source: Esser et al. 2024.
    """

    denoiser_name = "transformer"
    schedulers = ("dpm++", "ddim", "euler")
    scheduler_class = FlowMatchEulerDiscreteScheduler

    @property
    def shift(self) -> float:
        """How far levels of noise are shifted towards more of it, 1 for not at all."""
        return self.scheduler.config.shift

    def euler_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """Levels of noise for Euler's method before they are shifted; None for the scheduler's own."""
        return None

    @property
    def prediction_type(self) -> str:
        return "flow"

    def draw_timesteps(self, batch_size: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
        """Timesteps float (B,) to train at, on the generator's device; `shift` comes on top of the model's own."""
        level = torch.randn(batch_size, generator=generator, device=generator.device).sigmoid()
        return self.scheduler.config.num_train_timesteps * shift_level(level, self.shift * shift)

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

    def estimate_clean(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The x0 (B,C,h,w) that a prediction at timesteps, (B,) or 0-d, implies: the cheap preview."""
        return noisy_latents - self._sigmas(timesteps).to(noisy_latents).view(-1, 1, 1, 1) * prediction

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.scheduler.config.num_train_timesteps

    def _read_t5(self, index: int, prompt: ComposedPrompt, vectors: Tensor, length: int) -> Tensor:
        """T5's states (B,length,D) of the prompt, written anew by its own tokenizer."""
        again = recompose(prompt, self.tokenizer, self.tokenizers[index], length)
        return read_words(self.text_encoders[index], again.input_ids, again.slots, vectors).last_hidden_state


class StableDiffusion3(FlowModel):
    """Stable Diffusion 3.x: two CLIP text encoders and T5.

    All three carry ViLex tokens: CLIP for the pooled vector that steers every block, T5 for most of the states.
    T5 has a vocabulary of its own and no BOS, so it composes the prompt anew. A prompt is as long as T5's context, of
    which CLIP reads the first 75 words and tokens.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    text_classes = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    denoiser_class = SD3Transformer2DModel
    fp32_parts = ("text_encoder_3",)  # T5

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[PreTrainedModel],
        denoiser: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        t5_length: int = T5_LENGTH,
    ) -> None:
        length = context_of(tokenizers[0], tokenizers[2], t5_length)
        super().__init__(tokenizers, text_encoders, denoiser, scheduler, vae, length)
        require_one_vocabulary(*tokenizers[:2])
        if scheduler.config.use_dynamic_shifting:
            raise ValueError("the scheduler shifts its timesteps with the picture's size, which is not supported")
        self.t5_length = t5_length

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """CLIP's states, then T5's, and what both CLIPs pool; gradients reach `prompt.vectors`."""
        *for_clip, for_t5 = self.split_vectors(prompt)
        clips = [self._read_clip(i, prompt, vectors) for i, vectors in enumerate(for_clip)]
        t5_states = self._read_t5(2, prompt, for_t5, self.t5_length)  # (B,256,D_3)
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


def context_of(clip: PreTrainedTokenizerBase, t5: PreTrainedTokenizerBase, t5_length: int) -> int:
    """Positions of a prompt of CLIP's that holds as many words and tokens as T5's of t5_length: T5 has no BOS."""
    own, other = special_tokens(clip), special_tokens(t5)
    return t5_length + len(own.prefix) + len(own.suffix) - len(other.prefix) - len(other.suffix)
