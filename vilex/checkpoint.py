"""Finding, loading and saving weights; every load is strict, and nothing is ever unpickled."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vilex.config import DEFAULT_MODEL

WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "weights"
MAX_SHARD_SIZE = "45MB"
# Weights of ViLex and tokenizers, never pickles; `load_t2i` fetches what it needs of a repository of diffusers itself
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.md", "vilex*.safetensors", "t2i/*.safetensors"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_NAMED = 5  # tensors an error message lists before it only counts


def find_weights(model: str | None = None) -> str:
    """The folder of a model: `model`, else the first of VILEX_WEIGHTS, else the default in the checkout.

    `model` is a folder, the name of a folder in assets/weights, or a hub id, which is downloaded, of a repository of
    diffusers only its small files; nothing is downloaded that was not named.
    Raises ValueError with the command that gets the weights when there are none.
    """
    wanted = model or os.environ.get("VILEX_WEIGHTS", "").split(",")[0].strip()  # the app takes several
    if wanted:
        return _resolve(wanted)
    default = WEIGHTS_FOLDER / DEFAULT_MODEL
    if not default.is_dir():
        raise ValueError(
            f"no weights at {default}: name a folder or a hub id with --model or VILEX_WEIGHTS, "
            f"or put some there with: hf download OWNER/NAME --local-dir {default}"
        )
    return str(default)


def weights_name(folder: Path) -> str:
    """The name of a model's folder; of a hub download, whose folder is a commit, the hub id."""
    return hub_id(folder) or folder.name


def hub_id(folder: Path) -> str:
    """The hub id of a folder that is a hub download, empty for any other."""
    is_download = folder.parent.name == "snapshots"
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/") if is_download else ""


def _resolve(wanted: str) -> str:
    for folder in (Path(wanted).expanduser(), WEIGHTS_FOLDER / wanted):
        if folder.is_dir():
            return str(folder)
    if wanted.count("/") == 1 and wanted[0] not in "./~":
        return _download(wanted)
    raise ValueError(f"no weights at {wanted!r}: give a folder, a name in {WEIGHTS_FOLDER}, or a hub id owner/name")


def _download(hub_id: str) -> str:
    try:
        return snapshot_download(hub_id, allow_patterns=_DOWNLOADED)
    except (OSError, HFValidationError) as error:
        target = WEIGHTS_FOLDER / hub_id.split("/")[-1].removeprefix("vilex-")
        command = f"hf download {hub_id} --local-dir {target}"
        raise ValueError(f"no weights for {hub_id} on this machine or at the hub; get them with: {command}") from error


def load_pretrained(loader: type, folder: str | Path, *, ignore: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """The model that diffusers' or transformers' `loader.from_pretrained` reads, every weight from the file.

    Both libraries fill absent weights with random values and only log it. `ignore` lists beginnings of
    tensor names that may be absent or left over, such as "pooler." of a BERT whose pooler is not used.
    Raises ValueError on absent files, on missing, unexpected, misshapen or non-finite weights, and on pickles.
    """
    _refuse_pickles(Path(folder) / kwargs.get("subfolder", ""))
    kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(folder, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{loader.__name__} cannot be loaded from {folder}: {error}") from error
    problems = _shape_problems((key, wants, has) for key, has, wants in info["mismatched_keys"])
    problems += _key_problems(info["missing_keys"], info["unexpected_keys"], ignore)
    problems += [str(message) for message in info["error_msgs"]]
    _raise_if_any(problems, f"{folder} does not fit {type(model).__name__}")
    require_finite(model.state_dict(), folder, ignore)
    return model


def load_module(module: nn.Module, path: str | Path, name: str = "model") -> None:
    """Fills `module` with the safetensors at `path`, cast to the module's own dtypes.

    `path` is a file, or a folder holding `<name>.safetensors` or its numbered shards and their index.
    Raises ValueError on missing, unexpected, misshapen or non-finite tensors, and on pickles; the module
    is then unchanged.
    """
    tensors = _read(_weight_files(Path(path), name))
    own = module.state_dict()
    shared = own.keys() & tensors.keys()
    problems = _shape_problems((key, own[key].shape, tensors[key].shape) for key in shared)
    problems += _key_problems(own.keys() - shared, tensors.keys() - shared, ())
    _raise_if_any(problems, f"{path} does not fit {type(module).__name__}")
    require_finite(tensors, path)
    module.load_state_dict(tensors)


def save_module(
    module: nn.Module,
    folder: str | Path,
    name: str = "model",
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes the module's tensors to `folder`, the floating ones as `dtype` when that is given.

    Raises ValueError when a tensor is not finite in that dtype.
    """
    tensors = {key: _stored(tensor, dtype) for key, tensor in module.state_dict().items()}
    require_finite(tensors, folder)
    pattern = f"{name}{{suffix}}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=max_shard_size)


def require_finite(tensors: Mapping[str, Tensor], source: str | Path, ignore: tuple[str, ...] = ()) -> None:
    """Raises ValueError that names the first tensor of a file or folder with NaN or infinity in it."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not key.startswith(ignore) and not tensor.isfinite().all():
            raise ValueError(f"{key} in {source} holds values that are not finite")


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # A copy, because safetensors refuses or drops tensors that share memory.
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()


def _weight_files(path: Path, name: str) -> list[Path]:
    if path.suffix in _PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code when read; convert it to safetensors")
    if path.is_file():
        return [path]
    single, shards = path / f"{name}.safetensors", sorted(path.glob(f"{name}-[0-9]*-of-[0-9]*.safetensors"))
    if single.is_file():
        return [single]
    if shards:
        return _complete(shards)
    _refuse_pickles(path)
    raise ValueError(f"no {name}.safetensors in {path}")


def _complete(shards: list[Path]) -> list[Path]:
    expected = int(shards[0].stem.rsplit("-", 1)[1])
    if len(shards) != expected:
        raise ValueError(f"{shards[0].parent} holds {len(shards)} of {expected} shards of its weights")
    return shards


def _refuse_pickles(folder: Path) -> None:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file for file in files if file.suffix in _PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{pickles[0]} is a pickle, which can run code when read; convert it to safetensors")


def _read(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    return tensors


def _shape_problems(shapes: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> list[str]:
    wrong = sorted((key, tuple(wants), tuple(has)) for key, wants, has in shapes if tuple(wants) != tuple(has))
    return _shorten([f"{key}: expects {_times(wants)}, file has {_times(has)}" for key, wants, has in wrong])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _key_problems(missing: Iterable[str], unexpected: Iterable[str], ignore: tuple[str, ...]) -> list[str]:
    absent = [f"{key} is missing from the file" for key in sorted(missing) if not key.startswith(ignore)]
    extra = [f"{key} in the file is unknown to the model" for key in sorted(unexpected) if not key.startswith(ignore)]
    return _shorten(absent) + _shorten(extra)


def _shorten(problems: list[str]) -> list[str]:
    hidden = len(problems) - _MAX_NAMED
    return [*problems[:_MAX_NAMED], f"and {hidden} more like it"] if hidden > 0 else problems


def _raise_if_any(problems: list[str], what: str) -> None:
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
