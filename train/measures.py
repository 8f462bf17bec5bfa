"""Measures of sets of pictures: distances between sets of features, LPIPS pairs, probes, colour layout.

None of the distances compare with published FID, which needs the Inception net: quote `Extractor.label`
beside every number.
"""

from math import comb

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from train.nets import Extractor
from vilex.images import from_levels, to_levels

CHUNK = 1024  # rows of a kernel matrix held at once
RECALL_RANKS = (1, 5, 10)
PROBE_WIDTH = 512  # columns that a linear model gets at most
PROBE_TOLERANCE = 0.01  # at a hundredth of it accuracies moved by 0.1 %, in ten times the time
RIDGE_PENALTIES = tuple(10.0**i for i in range(1, 7))  # scikit-learn takes the best by leaving out one


@torch.no_grad()
def extract_features(
    net: Extractor, pixels: Tensor, batch_size: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """Features (S,F) on the CPU of S pictures, resized by `resize_levels` to the size the net looks at.

    pixels: (S,3,H,W), uint8 in 0..255 or float in [-1,1].
    Raises: ValueError on another shape or no picture.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(f"pixels must have the shape (S,3,H,W) with S at least 1, got {tuple(pixels.shape)}")
    net = net.to(device, memory_format=torch.channels_last)  # a quarter faster on CPUs
    levels = pixels.cpu() if pixels.dtype == torch.uint8 else to_levels(pixels.cpu())
    batches = (resize_levels(batch, net.size).to(device) for batch in levels.split(batch_size))
    return torch.cat([net.features(from_levels(batch)).cpu() for batch in batches])


def resize_levels(levels: Tensor, size: int) -> Tensor:
    """Levels (B,3,size,size) uint8 of levels (B,3,H,W) uint8, the same as Pillow's bicubic gives.

    Rounding and clipping between the two passes are part of the measure: without them KID of
    softened pictures moves by 8 to 17 %.
    """
    return F.interpolate(levels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


# Distances between sets


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features a (S,F) and b (T,F).

    It falls as sets grow: compare equal numbers of pictures only.
    Raises: ValueError on fewer than two pictures, unequal widths or values that are not finite.
    Source: FID (GANs Trained by a Two Time-Scale Update Rule, 2017), Eq. 6.
    """
    a, b = _checked_pair(a, b)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    # the trace of sqrt(A B) is the sum of singular values of any root of A times any root of B
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + root_a.square().sum() + root_b.square().sum() - 2 * overlap).item()


def _covariance_root(features: Tensor) -> Tensor:
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R  # R^T R is the covariance


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased cubic-kernel MMD^2 x 1000 of features a (S,F) and b (T,F); 0 on average for like sets.

    Raises: ValueError as `frechet_distance`.
    Source: KID (Demystifying MMD GANs, ICLR 2018), Eq. 4.
    """
    a, b = _checked_pair(a, b)
    across = _kernel_sum(a, b) / (len(a) * len(b))
    return 1000 * (_mean_off_diagonal(a) + _mean_off_diagonal(b) - 2 * across)


def _mean_off_diagonal(a: Tensor) -> float:
    diagonal = (a.square().mean(1) + 1).pow(3).sum().item()
    return (_kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return sum((rows @ b.T / b.shape[1] + 1).pow(3).sum().item() for rows in a.split(CHUNK))


def _checked_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features must be (S,F) and (T,F) with S and T at least 2, got {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    return a.double(), b.double()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL of p(y|x) from p(y), between 1 and K, for probabilities (S,K).

    Raises: ValueError when rows do not sum to 1.
    Source: Improved Techniques for Training GANs (2016), Sec. 4.
    """
    probabilities = probabilities.double()
    if probabilities.ndim != 2 or not torch.allclose(probabilities.sum(1), torch.ones(()).double(), atol=1e-4):
        raise ValueError(f"probabilities must be (S,K) with rows that sum to 1, got shape {tuple(probabilities.shape)}")
    marginal = torch.special.entr(probabilities.mean(0)).sum()
    conditional = torch.special.entr(probabilities).sum(1).mean()
    return (marginal - conditional).exp().item()


# Probes and layout


def knn_accuracy(features: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 10) -> float:
    """Share of features (S,F) whose k most cosine-similar gallery features (T,F) vote for the right label.

    Raises: ValueError when k exceeds the gallery.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k must be between 1 and the {len(gallery)} features of the gallery, got {k}")
    model = KNeighborsClassifier(k, metric="cosine").fit(gallery.numpy(), gallery_labels.numpy())
    return float(model.score(features.numpy(), labels.numpy()))


def _standardise(features: Tensor) -> list[StandardScaler | PCA]:
    """Steps before a linear model; tokens say much the same, so thousands of columns would only take minutes."""
    is_wide = min(features.shape) > PROBE_WIDTH
    return [StandardScaler(), *([PCA(PROBE_WIDTH, svd_solver="randomized", random_state=0)] if is_wide else [])]


def fit_probe(gallery: Tensor, gallery_labels: Tensor, inverse_penalty: float = 0.01) -> Pipeline:
    """A logistic regression fitted to standardised gallery features (T,F).

    Of more than PROBE_WIDTH features it sees as many principal components.
    inverse_penalty: scikit-learn's C, the inverse strength of the L2 penalty.
    """
    regression = LogisticRegression(C=inverse_penalty, max_iter=1000, tol=PROBE_TOLERANCE)
    return make_pipeline(*_standardise(gallery), regression).fit(gallery.numpy(), gallery_labels.numpy())


def linear_probe(features: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Accuracy on features (S,F) of a probe fitted to gallery features (T,F)."""
    return float(fit_probe(gallery, gallery_labels).score(features.numpy(), labels.numpy()))


def caption_recall(
    features: Tensor, captions: Tensor, owners: Tensor, gallery: Tensor, gallery_captions: Tensor
) -> dict[int, float]:
    """Share of features (S,F) with a caption of theirs among the 1, 5 and 10 nearest of captions (M,E).

    Ridge regression from gallery features (T,F) to gallery_captions (T,E) says where a picture's captions should be,
    and cosines to all captions from there, about the gallery's mean, rank them. owners: int64 (M,), whose each is.
    """
    mean = gallery_captions.mean(0)
    model = make_pipeline(*_standardise(gallery), RidgeCV(RIDGE_PENALTIES))
    model.fit(gallery.numpy(), (gallery_captions - mean).numpy())
    guesses = torch.from_numpy(model.predict(features.numpy())).to(captions)  # (S,E)
    cosines = F.normalize(guesses) @ F.normalize(captions - mean).T  # (S,M)
    ranked = owners[cosines.argsort(1, descending=True)]  # (S,M)
    ranks = (ranked == torch.arange(len(features))[:, None]).int().argmax(1)  # of the first caption of its own
    return {k: (ranks < k).float().mean().item() for k in RECALL_RANKS}


def chance_recall(owners: Tensor) -> dict[int, float]:
    """The recall that captions in random order reach."""
    total, counts = len(owners), torch.bincount(owners).tolist()
    missed = {k: [comb(total - n, k) / comb(total, k) for n in counts] for k in RECALL_RANKS}
    return {k: 1 - sum(misses) / len(misses) for k, misses in missed.items()}


def grid_colour_error(pixels: Tensor, reference: Tensor, cells: int) -> float:
    """RMS difference, 0 to 1 of the full range, of colours averaged over a cells x cells grid.

    pixels, reference: (B,3,H,W) in [-1,1]; their sizes may differ.
    Raises: ValueError when a cell would be smaller than a pixel or the counts differ.
    """
    if pixels.shape[:2] != reference.shape[:2]:
        raise ValueError(f"counts must agree, got shapes {tuple(pixels.shape)} and {tuple(reference.shape)}")
    smallest = min(*pixels.shape[-2:], *reference.shape[-2:])
    if not 1 <= cells <= smallest:
        raise ValueError(f"cells must be between 1 and the {smallest} pixels of the shortest side, got {cells}")
    means = [
        torch.cat([F.adaptive_avg_pool2d(part.double(), cells) for part in each.split(256)])
        for each in (pixels, reference)
    ]
    difference = means[0] - means[1]
    return difference.square().mean().sqrt().item() / 2  # [-1,1] spans 2
