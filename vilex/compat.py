"""Lets a CPU build of torch work beside a torchvision wheel that was built for CUDA.

The compiled part of such a torchvision does not load, and then `import torchvision` fails with
"operator torchvision::nms does not exist", and with it open_clip, timm, diffusers and transformers.
Declaring the two operator schemas that torchvision registers Python code for is enough: ViLex calls
neither operator.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def declare_torchvision_ops() -> bool:
    """True when the schemas had to be declared, False when torchvision is absent or works.

    Must run before the first import of torchvision; a second call does nothing.
    """
    if _libraries or _torchvision_loads():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return True


def _torchvision_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        for extension in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(extension))
    except OSError:
        return False
    return True
