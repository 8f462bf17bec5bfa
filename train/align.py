"""Feature alignment: the denoiser's bottleneck learns to tell a trained network's features of the clean picture.

A denoiser that is told what is in a picture learns to draw it in fewer steps. The projector that tells is trained
beside the denoiser and thrown away; what was the teacher must not judge the result afterwards.
Source: Yu et al. 2025, Representation Alignment for Generation (REPA).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from train.data import Pictures, background_colours
from train.distil import TeacherFeatures

_CHUNK = 256  # pictures that the teacher sees together
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


class FeatureTable:
    """A teacher's features of all pictures, asked once: on a GPU the teacher takes nearly as long as the denoiser.

    Holds a row per picture, as it looks in its first variant, then the cut-outs' on the backgrounds of each other one.
    """

    def __init__(self, teacher: TeacherFeatures, pictures: Pictures, variants: int, seed: int) -> None:
        self.places = pictures.alpha_rows.to(pictures.device) - 1  # of a picture among the cut-outs; -1 for the others
        everything = torch.arange(len(pictures))
        cut_outs = pictures.cut_out.cpu().nonzero().flatten()
        self.pictures, self.cut_outs = len(everything), len(cut_outs)
        looks = [(indices, v) for v in range(variants) for indices in (cut_outs if v else everything).split(_CHUNK)]
        told = (teacher(pictures.batch(i, background_colours(seed, v, i))).bfloat16() for i, v in looks if len(i))
        self.features = _stack(told, count_looks(pictures, variants))  # (R,P,F)

    def __call__(self, indices: Tensor, variant: Tensor) -> Tensor:
        """Features (B,P,F) of pictures int64 (B,) in their variants int64 (B,)."""
        places = self.places[indices]
        later = self.pictures + (variant - 1) * self.cut_outs + places
        return self.features[torch.where((places >= 0) & (variant > 0), later, indices)].float()


def count_looks(pictures: Pictures, variants: int) -> int:
    """Rows of a FeatureTable."""
    return len(pictures) + (variants - 1) * int(pictures.cut_out.sum())


def _stack(chunks: Iterator[Tensor], count: int) -> Tensor:
    """The rows of all chunks (R,P,F), without a second copy of them on the way."""
    stacked, filled = None, 0
    for chunk in chunks:
        stacked = chunk.new_empty(count, *chunk.shape[1:]) if stacked is None else stacked
        stacked[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert filled == count, f"{filled} looks, not the {count} that were counted"
    return stacked


def alignment_loss(told: Tensor, features: Tensor) -> Tensor:
    """Mean cosine distance per position, 0-d, 0 to 2.

    told (K*B,P,F) of K noises per picture, one after the other; features (B,P,F) of the pictures.
    """
    features = features.repeat(len(told) // len(features), 1, 1)
    return (1 - F.cosine_similarity(told.float(), features.float(), dim=-1)).mean()
