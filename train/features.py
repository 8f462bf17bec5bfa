"""What a trained network sees in pictures, as targets on a grid of patches."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data import RESIDENT_BYTES, Pictures, background_colours
from train.shards import Shards

Teacher = Callable[[Tensor], Tensor]  # pixels (B,3,H,W) in [-1,1] -> feature map (B,F,h,w)
_STATISTICS_PICTURES = 256  # enough for a channel's mean and deviation: each gives hundreds of positions
_STATISTICS_EPOCH = 2**32 - 1  # of backgrounds, apart from those of any step
_CHUNK = 256  # pictures that the teacher sees together


class TeacherFeatures:
    """A teacher's map, averaged to a grid of patches, each channel with mean 0 and deviation 1 over pictures."""

    def __init__(self, teacher: Teacher, side: int, pixels: Tensor) -> None:
        self.teacher, self.side = teacher, side
        self.mean, self.std = torch.zeros(()), torch.ones(())
        features = torch.cat([self(batch) for batch in pixels.split(64)])  # (S,P,F)
        self.mean, self.std = features.mean((0, 1)), features.std((0, 1)).clamp(min=1e-4)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Targets (B,P,F), row by row from the top left, of pixels (B,3,H,W) in [-1,1]."""
        grid = F.adaptive_avg_pool2d(self.teacher(pixels).float(), self.side)  # (B,F,side,side)
        features = grid.flatten(2).mT  # (B,P,F)
        return (features - self.mean.to(features)) / self.std.to(features)


def teacher_features(teacher: Teacher, side: int, pictures: Pictures, seed: int) -> TeacherFeatures:
    """The teacher's features on a grid of `side` x `side`, standardised over a sample of the pictures."""
    rows = torch.linspace(0, len(pictures) - 1, min(_STATISTICS_PICTURES, len(pictures))).long()
    pixels = pictures.batch(rows, background_colours(seed, _STATISTICS_EPOCH, rows))
    return TeacherFeatures(teacher, side, pixels)


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


def table_fits(features: TeacherFeatures, pictures: Pictures | Shards, variants: int) -> bool:
    """Whether a FeatureTable of them can be held; of shards it cannot."""
    if isinstance(pictures, Shards):
        return False
    numbers = count_looks(pictures, variants) * features.side**2 * len(features.mean)
    return numbers * torch.bfloat16.itemsize <= RESIDENT_BYTES


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
