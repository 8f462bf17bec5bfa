"""Feature alignment: the denoiser's bottleneck learns to tell a trained network's features of the clean picture.

A denoiser that is told what is in a picture learns to draw it in fewer steps. The projector that tells is trained
beside the denoiser and thrown away; what was the teacher must not judge the result afterwards.
Source: Yu et al. 2025, Representation Alignment for Generation (REPA).
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

_HIDDEN = 512  # width of the projector


class AlignedDenoiser(nn.Module):
    """A denoiser, called like the one inside, that keeps what its projector told of the last batch.

    told: (B,P,F), row by row from the top left, of the bottleneck's P positions.
    """

    told: Tensor

    def __init__(self, denoiser: UNet2DConditionModel, feature_width: int, seed: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = build_projector(denoiser.config.block_out_channels[-1], feature_width)
        self.projector.to(denoiser.device)
        self._states: list[Tensor] = []
        _keep_output(denoiser.mid_block, self._states)

    def forward(self, *inputs: Tensor, **options: object) -> tuple[Tensor]:
        prediction = self.denoiser(*inputs, **options)
        self.told = self.projector(self._states[0].flatten(2).mT)  # (B,P,F)
        return prediction


def _keep_output(block: nn.Module, kept: list[Tensor]) -> None:
    # a plain function, which a copy of the block shares: one that is copied would take tensors along
    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        kept[:] = [output]  # (B,C,h,w)

    block.register_forward_hook(keep)


def bottleneck_side(denoiser: UNet2DConditionModel) -> int:
    """Positions per side of the denoiser's bottleneck."""
    return denoiser.config.sample_size >> (len(denoiser.config.block_out_channels) - 1)


def build_projector(width: int, feature_width: int) -> nn.Sequential:
    """Three layers from the bottleneck's channels to the teacher's, as in REPA."""
    return nn.Sequential(
        nn.Linear(width, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, feature_width)
    )


def alignment_loss(told: Tensor, features: Tensor) -> Tensor:
    """Mean cosine distance per position, 0-d, 0 to 2.

    told (K*B,P,F) of K noises per picture, one after the other; features (B,P,F) of the pictures.
    """
    features = features.repeat(len(told) // len(features), 1, 1)
    return (1 - F.cosine_similarity(told.float(), features.float(), dim=-1)).mean()
