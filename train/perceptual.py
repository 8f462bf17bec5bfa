"""Perceptual loss: the x0 that a denoiser's prediction implies should look like the picture to a trained network.

Squared error alone is least for the mean of all that could be there, which is a blur that no picture looks like.
Sources: Lin and Yang 2024, Diffusion Model with Perceptual Loss; Ma et al. 2026, PixelGen; the distance is that of
LPIPS (Zhang et al. 2018, Eq. 1) without its weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.nets import EfficientNetLite2, load_efficientnet
from vilex.t2i import TextToImage


class PerceptualLoss(nn.Module):
    """Distance of pictures as a frozen teacher sees them, which must not judge the result afterwards.

    pixel_unshuffle: how the embedded model folds pixels into channels.
    """

    def __init__(self, teacher: EfficientNetLite2, pixel_unshuffle: int, weight: float) -> None:
        super().__init__()
        self.teacher, self.pixel_unshuffle, self.weight = teacher, pixel_unshuffle, weight

    def forward(self, estimate: Tensor, latents: Tensor) -> Tensor:
        """`weight` times the distance of K draws (K*B,C,h,w), one after the other, from pictures (B,C,h,w); 0-d.

        Per stage the mean over positions of the squared distance of unit vectors along the channels, 0 to 4.
        """
        with torch.no_grad():
            wanted = [seen.repeat(len(estimate) // len(latents), 1, 1, 1) for seen in self._stages(latents)]
        pairs = zip(self._stages(estimate), wanted, strict=True)
        return self.weight * torch.stack([_distance(a, b) for a, b in pairs]).sum()

    def _stages(self, latents: Tensor) -> list[Tensor]:
        return self.teacher.stages(F.pixel_shuffle(latents, self.pixel_unshuffle))


def build_perceptual(t2i: TextToImage, weight: float) -> PerceptualLoss | None:
    """The loss with EfficientNet-lite2 as the teacher; None where its weight is 0.

    Raises ValueError for a latent model, FileNotFoundError where the teacher is missing.
    """
    if not weight:
        return None
    if not t2i.embedded:
        raise ValueError(f"perceptual_weight {weight:g} needs a model that draws pixels, this one draws latents")
    return PerceptualLoss(load_efficientnet(), t2i.config.pixel_unshuffle, weight)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    difference = F.normalize(a.float(), dim=1, eps=1e-6) - F.normalize(b.float(), dim=1, eps=1e-6)
    return difference.square().sum(1).mean()  # (B,C,h,w) -> 0-d
