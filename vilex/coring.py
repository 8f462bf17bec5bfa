"""Coring: the faint part of a picture's finest checkerboard goes, the strong part stays.

A denoiser that has learnt for a short time takes what is left of the noise for texture, and weaves it into even areas.
Most of it is in the one band that real pictures hardly use.
Sources: Donoho 1995, De-noising by soft-thresholding; Simoncelli and Adelson 1996, Noise removal via Bayesian wavelet
coring.
"""

import torch.nn.functional as F
from torch import Tensor


def finest_checkerboard(pixels: Tensor) -> Tensor:
    """What of pixels (B,3,H,W) alternates from pixel to pixel across and down: second differences, (B,3,H,W)."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    return padded.diff(n=2, dim=-1).diff(n=2, dim=-2) / 16


def core(pixels: Tensor, strength: float) -> Tensor:
    """Pixels (B,3,H,W) without as much of their finest checkerboard as `strength`, in units of the pixels."""
    return pixels - finest_checkerboard(pixels).clamp(-strength, strength)
