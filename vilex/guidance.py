"""Classifier-free and text-free guidance as weights of a sum of predictions.

Eq. 1: uncond + w (cond - uncond). Eq. 2: image + t (joint - image). Composed, and with the words by themselves as
one more direction: uncond + w (image - uncond) + t (joint - image) + s (words - uncond). Each is linear in the
predictions, so a branch whose weight is zero is never computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BranchWeights:
    """Weight of each prediction; they sum to 1."""

    uncond: float = 0.0
    image: float = 0.0
    joint: float = 0.0
    words: float = 0.0

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the branches whose weight is not zero."""
        return tuple(name for name in self.__dataclass_fields__ if getattr(self, name))


def branch_weights(
    has_images: bool, has_words: bool, guidance_scale: float, tfg_scale: float, words_scale: float = 0.0
) -> BranchWeights:
    """Weights for what a prompt holds. Source: ViLex (CVPR 2025), Eq. 1 and 2, and their composition.

    words_scale is not in the paper: it adds what the words ask for by themselves, as in Composable Diffusion (Liu et
    al., ECCV 2022). Without an image the words take guidance_scale (Eq. 1); without words, or without an image, the
    other two have no effect.
    """
    w, t, s = guidance_scale, tfg_scale, words_scale
    if has_images and has_words:
        return BranchWeights(uncond=1 - w - s, image=w - t, joint=t, words=s)
    if has_images:
        return BranchWeights(uncond=1 - w, image=w)
    if has_words:
        return BranchWeights(uncond=1 - w, joint=w)
    return BranchWeights(uncond=1.0)


def outside_interval(guidance_scale: float, tfg_scale: float, words_scale: float = 0.0) -> tuple[float, float, float]:
    """The scales at noise levels where guidance is off: plain conditioning, no push beyond it."""
    return 1.0, min(tfg_scale, 1.0), 0.0


def guide(predictions: dict[str, Tensor], weights: BranchWeights) -> Tensor:
    """Weighted sum of the needed predictions, all of one shape; one of weight 1 comes back untouched."""
    names = weights.needed
    if len(names) == 1 and getattr(weights, names[0]) == 1:
        return predictions[names[0]]
    if len(names) == 2:
        first, second = names
        return torch.lerp(predictions[first], predictions[second], getattr(weights, second))
    return torch.stack([getattr(weights, name) * predictions[name] for name in names]).sum(0)
