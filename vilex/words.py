"""What can be done with a picture once it is words: arithmetic on ViLex tokens, and how alike two pictures are.

All functions are pure; tokens are (N,D) in the space of the text encoder's word embeddings.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vilex.config import CUT_RANGE, SHARE_RANGE, WEIGHT_RANGE, check_range

COMPARED = 16  # tokens that decide how alike two pictures are; later ones hold finer things
_SHORTLIST = 4  # candidates by token 1 for each picture that is asked for
_CELLS = 8
_HALVING = 14.0  # CIELAB units; of 200 random pairs of photographs half differ by more than 36
_D65 = np.array([0.95047, 1.0, 1.08883], np.float32)
_SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    np.float32,
)


def blend(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Tokens between two pictures: `first` (N,D) at share 0, `second` (M,D) at 1.

    Each token's direction turns evenly and its norm changes evenly. Where one picture has more tokens, the rest of
    them is there, unchanged, while the share leans to that picture, the middle included.
    Raises ValueError for a share outside 0..1.
    """
    check_range("share", share, SHARE_RANGE)
    if share in (0, 1):
        return second if share else first
    common = min(len(first), len(second))
    mixed = _slerp(first[:common], second[:common], share)
    longer, lean = (first, 1 - share) if len(first) > len(second) else (second, share)
    return torch.cat([mixed, longer[common:]]) if lean >= 0.5 else mixed


def _slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    norms = first.norm(dim=-1, keepdim=True), second.norm(dim=-1, keepdim=True)  # (N,1)
    a, b = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    # Half the angle as an arctangent: an arccosine knows small angles badly
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    is_flat = sine.abs() < 1e-4  # parallel, where both agree, or opposite, where no plane to turn in is given
    weights = [torch.where(is_flat, w, (w * angle).sin() / torch.where(is_flat, 1, sine)) for w in (1 - share, share)]
    return (weights[0] * a + weights[1] * b) * torch.lerp(*norms, share)


def graft(first: Tensor, second: Tensor, cut: int) -> Tensor:
    """The first `cut` tokens of `first` (N,D), then those of `second` (M,D) from `cut` on: content, then look.

    A cut beyond one of them takes what it has. Raises ValueError for a cut that is not a whole number in 0..511.
    """
    check_range("cut", cut, CUT_RANGE)
    if cut != int(cut):
        raise ValueError(f"cut must be a whole number, got {cut!r}")
    return torch.cat([first[: int(cut)], second[int(cut) :]])


def weigh(tokens: Tensor, weight: float, mean: Tensor) -> Tensor:
    """Tokens (N,D) moved from the average word `mean` (D,), at weight 0, through themselves, at 1, and beyond.

    Raises ValueError for a weight outside 0..2.
    """
    check_range("weight", weight, WEIGHT_RANGE)
    return tokens if weight == 1 else mean + weight * (tokens - mean)


def without(tokens: Tensor, index: int) -> Tensor:
    """All tokens (N,D) but the one at `index`: (N-1,D). Raises ValueError when it is not there or the only one."""
    if not 0 <= index < len(tokens) or len(tokens) == 1:
        raise ValueError(f"cannot leave out token {index + 1} of {len(tokens)}: at least one other must stay")
    return torch.cat([tokens[:index], tokens[index + 1 :]])


def shift(tokens: Tensor, minus: Tensor | None, plus: Tensor | None, strength: float = 1.0) -> Tensor:
    """Word algebra, `<image> - "snow" + "sand"`: every token (N,D) moved by strength * (plus - minus).

    minus and plus (M,D) are word embeddings, of which the mean counts; either may be None. Best give both: what all
    words have in common then cancels. Raises ValueError for a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength!r}")
    for words, sign in ((minus, -strength), (plus, strength)):
        if words is not None:
            tokens = tokens + sign * words.mean(0)
    return tokens


def similar(vilex_tokens: Tensor, stored: Sequence[Tensor], count: int) -> list[tuple[int, float]]:
    """(index, score) of the `count` of `stored` (N_i,D) most like vilex_tokens (N,D), the most alike first.

    The score is the mean cosine similarity of the first 16 tokens, or as many as both have: 1 for equal ones. It is
    computed for those alone that are closest by token 1, which holds most of a picture, four for each one asked for.
    """
    best = sorted(range(len(stored)), key=lambda i: -_cosine(vilex_tokens, stored[i], 1))[: _SHORTLIST * count]
    scores = {i: _cosine(vilex_tokens, stored[i], COMPARED) for i in best}
    return sorted(scores.items(), key=lambda item: -item[1])[:count]


def _cosine(tokens: Tensor, other: Tensor, count: int) -> float:
    count = min(count, len(tokens), len(other))
    return F.cosine_similarity(tokens[:count], other[:count].to(tokens), dim=-1).mean().item()


def likeness(image: Image.Image, other: Image.Image) -> float:
    """How alike two pictures are in colour and layout: 100 for equal ones, mostly 0 to 30 for unrelated ones.

    Both are averaged over 8x8 boxes, whatever their sizes; with d the mean CIELAB distance (Delta E 1976) of the
    boxes it is 100 * 2**(-d / 14). Compare with what the encoder saw (`fit_image`), not with the whole photograph.
    """
    difference = np.linalg.norm(_box_colours(image) - _box_colours(other), axis=-1).mean()
    return float(100 * 2 ** (-difference / _HALVING))


def _box_colours(image: Image.Image) -> np.ndarray:
    return to_lab(np.asarray(image.convert("RGB").resize((_CELLS, _CELLS), Image.Resampling.BOX)))  # (8,8,3)


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB (D65), float32 (..., 3), of sRGB colours 0..255. Source: CIE 1976, IEC 61966-2-1."""
    srgb = np.asarray(colours, np.float32) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    # einsum, not @: BLAS threads of many worker processes would fight for the cores
    xyz = np.einsum("...c,xc->...x", linear, _SRGB_TO_XYZ) / _D65
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
