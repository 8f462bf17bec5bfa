"""Which device and number format to compute with."""

import os

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, else VILEX_DEVICE, else cuda, mps or cpu, the first there is."""
    name = name or os.environ.get("VILEX_DEVICE")
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here; cpu always is") from error
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The denoiser's dtype of that name, else VILEX_DTYPE, else the fastest that is exact enough on the device."""
    name = name or os.environ.get("VILEX_DTYPE") or _default_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 is for GPUs; on a CPU use float32 or bfloat16")
    return known[name]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is fast: on GPUs that have it and CPUs with AVX-512 for it; others are many times slower in it."""
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def require_offload(device: torch.device) -> None:
    """Raises ValueError on a CPU, which keeps its weights where it computes."""
    if device.type == "cpu":
        raise ValueError("--offload is for GPUs: on a CPU there is nothing to offload from")


def _default_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if has_bf16(device) else "float32"
