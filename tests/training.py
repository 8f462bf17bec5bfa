"""What tests of the trainers share: a small table, the command lines, and what a run leaves behind."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState
from builders import build_bert, build_tokenizer
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from train.presets import PRESETS
from train.run import RunOptions, load_data, override
from train.train_t2i import T2IRun, build_model


def write_table(path: Path) -> None:
    """Twelve 32 px pictures of sixteen plain cells; the fourth is cut out."""
    chance, rows = np.random.default_rng(0), []
    for i in range(12):
        cells = chance.integers(0, 256, (4, 4, 3 + (i == 3)), np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((32, 32), Image.Resampling.NEAREST).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{i}.png"}, "source": "emoji", "style": "sketch",
                     "label": "dog" if i % 2 else "cat"})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_files(folder: Path) -> SimpleNamespace:
    """The small table and a random text encoder."""
    write_table(folder / "pictures.parquet")
    tokenizer = build_tokenizer("bert")
    tokenizer.save_pretrained(folder / "text")
    torch.manual_seed(0)
    build_bert(len(tokenizer)).save_pretrained(folder / "text")
    return SimpleNamespace(data=folder / "pictures.parquet", text=folder / "text")


class Teacher(nn.Module):
    """A random stand-in for EfficientNet-lite2: a map (B,5,10,10) of 32 px pictures, and one more from it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net, self.second = nn.Conv2d(3, 5, 4, stride=3), nn.Conv2d(5, 7, 2)
        self.requires_grad_(False)

    def patch_features(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def stages(self, pixels: Tensor) -> list[Tensor]:
        first = self.net(pixels)
        return [first, self.second(first)]


def build_t2i_run(files: SimpleNamespace, out: Path, **settings: float) -> T2IRun:
    """A run of the tiny preset, not started."""
    reset_accelerate()
    tiny = PRESETS["tiny"]
    config = override(tiny.t2i, settings)
    t2i = build_model(tiny, str(files.text), None, config.seed)
    pictures, _ = load_data(32, [files.data])
    return T2IRun(t2i, pictures, None, tiny, config, RunOptions(out, fp32=True))


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    """A tar file of files by name."""
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def write_table_as_shards(table: Path, folder: Path, count: int) -> None:
    """The rows of a table as tar shards of JSON and pictures."""
    folder.mkdir()
    rows = pq.read_table(table).to_pylist()
    for shard in range(count):
        files = {}
        for row in rows[shard::count]:
            image = row.pop("image")
            name = Path(image["path"])
            files |= {f"{name}": image["bytes"], f"{name.stem}.json": json.dumps(row).encode()}
        write_shard(folder / f"{shard}.tar", files)


def reset_accelerate() -> None:
    """accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def invoke(command: click.Command, *arguments: object) -> Result:
    """What a trainer's command line gives."""
    reset_accelerate()
    return CliRunner().invoke(command, [*map(str, arguments)])


def succeed(command: click.Command, *arguments: object) -> Result:
    """The same, and it must have gone well."""
    result = invoke(command, *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def checkpoint(folder: Path) -> dict:
    """What a run saved."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Bit-equal trees of tensors and plain values."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def visible(name: str, parameter: Tensor) -> Tensor:
    """What of a parameter the loss depends on: softmax cancels a key's bias, whose gradient is rounding alone."""
    if name.endswith("qkv.bias"):
        query, _, value = parameter.chunk(3)
        return torch.cat([query, value])
    return parameter[:0] if name.endswith(("to_k.bias", "key.bias")) else parameter
