"""The nets that judge samples, and what they see in the real pictures that the samples belong to.

S stands for the number of pictures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.data import Pictures, Record
from train.measures import (
    extract_features,
    frechet_distance,
    grid_colour_error,
    inception_score,
    kernel_distance,
    knn_accuracy,
)
from train.nets import Extractor, load_efficientnet, load_lpips, load_vgg
from vilex.images import from_levels, to_levels

COLOUR_GRIDS = (4, 16)
_CHUNK = 64
LABEL_SOURCES = ("tiny-imagenet", "caltech101", "flowers102", "miniplaces")  # whose labels a gallery can judge


class Classes(NamedTuple):
    """Which of some pictures, and which of a gallery, have a class that the gallery shows; and what it is, int64."""

    asked: list[int]
    labels: Tensor
    known: list[int]
    known_labels: Tensor


def match_classes(records: Sequence[Record], gallery: Sequence[Record]) -> Classes:
    """Numbers for the labels of LABEL_SOURCES in a gallery, and the pictures whose label is among them."""
    names = sorted({r.label for r in gallery if r.source in LABEL_SOURCES})
    number = {name: i for i, name in enumerate(names)}
    known = [i for i, r in enumerate(gallery) if r.source in LABEL_SOURCES]
    asked = [i for i, r in enumerate(records) if r.source in LABEL_SOURCES and r.label in number]
    labels = torch.tensor([number[records[i].label] for i in asked])
    return Classes(asked, labels, known, torch.tensor([number[gallery[i].label] for i in known]))


def _levels(pictures: Pictures) -> Tensor:
    chunks = torch.arange(len(pictures)).split(_CHUNK)  # of which float copies are made
    return torch.cat([to_levels(pictures.batch(indices)).cpu() for indices in chunks])  # (S,3,H,W)


class Judge:
    """The measuring nets and what they see in the real pictures."""

    def __init__(self, pictures: Pictures, gallery: Pictures | None, device: str, both: bool = False) -> None:
        """both: EfficientNet-lite2 judges beside VGG16 and LPIPS; it must not judge what it has taught.

        Raises ValueError for one picture, FileNotFoundError where a net is missing.
        """
        if len(pictures) < 2:
            raise ValueError("distances need at least 2 pictures, got 1")
        self.device = device
        self.nets: list[Extractor] = [load_vgg(), load_efficientnet()] if both else [load_vgg()]
        self.lpips = load_lpips("alex").to(device)
        self.real = _levels(pictures)
        self.real_features = {net.key: extract_features(net, self.real, device=device) for net in self.nets}
        self.records, self.gallery = pictures.records, gallery
        self.gallery_features = self._gallery_features() if gallery else {}

    def _gallery_features(self) -> dict[str, Tensor]:
        pixels = _levels(self.gallery)
        return {net.key: extract_features(net, pixels, device=self.device) for net in self.nets}

    def measure(self, samples: Tensor) -> dict[str, float]:
        """All measures of uint8 samples (S,3,H,W), sample i belonging to picture i."""
        result = {}
        for net in self.nets:
            features = extract_features(net, samples, device=self.device)
            result |= self._distances(net, features)
        return result | self.closeness(samples)

    def closeness(self, samples: Tensor) -> dict[str, float]:
        """LPIPS and colour errors of uint8 samples (S,3,H,W), sample i belonging to picture i."""
        result = {"lpips": self.lpips_to(self.real, samples)}
        generated, real = from_levels(samples), from_levels(self.real)
        for cells in COLOUR_GRIDS:
            result[f"colour_error_{cells}x{cells}"] = grid_colour_error(generated, real, cells)
            shuffled = grid_colour_error(generated, real.roll(1, 0), cells)
            result[f"colour_error_{cells}x{cells}_other_picture"] = shuffled
        return result

    def real_floor(self) -> dict[str, float]:
        """Distances of as many disjoint real pictures as there are samples: the best that can be reached."""
        count = len(self.real)
        if self.gallery is None or len(self.gallery) < count:
            return {}
        floor = {}
        for net in self.nets:
            gallery, real = self.gallery_features[net.key][:count], self.real_features[net.key]
            floor[f"fd_{net.key}"] = frechet_distance(gallery, real)
            floor[f"kid_{net.key}"] = kernel_distance(gallery, real)
        return floor | self._class_accuracy(self.nets[0], self.real_features[self.nets[0].key])

    def _distances(self, net: Extractor, features: Tensor) -> dict[str, float]:
        real = self.real_features[net.key]
        result = {
            f"fd_{net.key}": frechet_distance(features, real),
            f"kid_{net.key}": kernel_distance(features, real),
        }
        if self.gallery is not None and len(self.gallery) >= len(features):
            disjoint = self.gallery_features[net.key][: len(features)]
            result[f"fd_{net.key}_disjoint"] = frechet_distance(features, disjoint)
        if net.key == "eff":
            probabilities = net.logits(features.to(self.device)).softmax(1).cpu()
            result["is_eff"] = inception_score(probabilities)
        else:
            result |= self._class_accuracy(net, features)
        return result

    def _class_accuracy(self, net: Extractor, features: Tensor) -> dict[str, float]:
        """k-NN accuracy of the labels the samples were asked to show, judged by training pictures."""
        if self.gallery is None:
            return {}
        classes = match_classes(self.records, self.gallery.records)
        if len(classes.known) < 10 or not classes.asked:
            return {}
        gallery = self.gallery_features[net.key][classes.known]
        return {"class_accuracy": knn_accuracy(features[classes.asked], classes.labels, gallery, classes.known_labels)}

    @torch.no_grad()
    def lpips_to(self, reference: Tensor, samples: Tensor) -> float:
        """Mean LPIPS of levels (S,3,H,W) uint8 to as many others."""
        pairs = zip(samples.split(64), reference.split(64), strict=True)
        distances = [self.lpips(from_levels(a).to(self.device), from_levels(b).to(self.device)).cpu() for a, b in pairs]
        return torch.cat(distances).mean().item()
