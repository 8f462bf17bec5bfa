"""The diffusion loss of both trainers and of Polish, and the noise it is measured with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilex.diffusion import Conditioning, TextToImage

Distance = Callable[[Tensor, Tensor], Tensor]  # of K draws (K*B,C,h,w), one after the other, from latents (B,C,h,w)
MAX_X0_WEIGHT = 10.0  # reached where the noise's standard deviation is 0.32


@dataclass(frozen=True)
class Noise:
    """What is added to the latents of a batch: values (B,C,h,w), at timesteps (B,), int64 or of a flow float."""

    values: Tensor
    timesteps: Tensor

    def rows(self, share: slice) -> "Noise":
        """The noise of some of the batch's pictures."""
        return Noise(self.values[share], self.timesteps[share])

    @staticmethod
    def concatenate(draws: Sequence["Noise"]) -> "Noise":
        """Several draws as one, in order."""
        return Noise(torch.cat([d.values for d in draws]), torch.cat([d.timesteps for d in draws]))


def draw_noise(t2i: TextToImage, batch_size: int, generator: torch.Generator, shift: float = 1.0) -> Noise:
    """Standard normal noise at timesteps as the model draws them, shifted, on the generator's device."""
    values = torch.randn(batch_size, *t2i.latent_shape, generator=generator, device=generator.device)
    return Noise(values, t2i.draw_timesteps(batch_size, generator, shift))


def diffusion_loss(
    t2i: TextToImage,
    denoiser: nn.Module,
    latents: Tensor,
    condition: Conditioning,
    noise: Noise,
    snr_gamma: float = 0.0,
    perceptual: Distance | None = None,
) -> Tensor:
    """Mean squared error of the prediction, 0-d; `denoiser` stands for t2i.denoiser when it is wrapped.

    latents (B,C,h,w) and their condition serve each draw when the noise holds several, one after the other. The
    denoiser reads noisy latents in the dtype of the condition. `perceptual` is added: how far the x0 that each
    prediction implies is from the latents.
    """
    draws = len(noise.timesteps) // len(latents)
    pictures, latents = latents, latents.repeat(draws, 1, 1, 1)
    condition = Conditioning.concatenate([condition] * draws)
    noisy_latents = t2i.add_noise(latents, noise.values, noise.timesteps)
    told = noisy_latents.to(condition.prompt_embeds)
    prediction = t2i.denoise(told, noise.timesteps, condition, denoiser).float()
    target = t2i.target(latents, noise.values, noise.timesteps)
    errors = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))  # (B,)
    loss = (errors * loss_weights(t2i, noise.timesteps, snr_gamma)).mean()
    if perceptual is None:
        return loss
    return loss + perceptual(t2i.estimate_clean(noisy_latents, prediction, noise.timesteps), pictures)


def loss_weights(t2i: TextToImage, timesteps: Tensor, snr_gamma: float = 0.0) -> Tensor:
    """Weights (B,) of squared errors at these timesteps.

    Without snr_gamma they are 1, except where x0 is predicted: snr + 1 makes its error that of v, up to a bound,
    since the last traces of noise would drown the rest. With it, min(snr, gamma) in units of x0's error.
    Source: Hang et al. 2023 (min-SNR).
    """
    snr = t2i.snr(timesteps)
    per_x0 = {
        "v_prediction": snr + 1,
        "epsilon": snr,
        "sample": torch.ones_like(snr),
        "flow": (snr.sqrt() + 1) ** 2,  # the noise's inverse variance, as for v
    }
    if snr_gamma:
        return snr.clamp(max=snr_gamma) / per_x0[t2i.prediction_type]
    return (snr + 1).clamp(max=MAX_X0_WEIGHT) if t2i.prediction_type == "sample" else torch.ones_like(snr)
