"""Training pictures from tables, folders, tar shards and hub data sets, and batches as functions of (seed, step).

S stands for the number of pictures loaded.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
CAPTION_COLUMNS = ("captions", "caption", "text")
WHITE_SHARE = 0.5  # of the backgrounds of cut-out pictures; the rest are plain random colours
_CHUNK = 2048  # pictures decoded together: bounds the encoded bytes held in memory


@dataclass(frozen=True, slots=True)
class Record:
    """What is known in words about one picture; `key` is stable across runs, such as 'file.parquet:12'."""

    key: str
    source: str
    captions: tuple[str, ...] = ()
    label: str = ""
    keywords: tuple[str, ...] = ()
    style: str = ""
    artist: str = ""
    genre: str = ""
    title: str = ""
    year: int | None = None
    bbox: tuple[int, ...] = ()


class _Entry(NamedTuple):
    record: Record
    data: bytes | Path


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures with their records.

    pixels: uint8 (S,3,H,W), multiplied by alpha, so that colours hidden under transparency are gone.
    alpha: uint8 (A,1,H,W) of the cut-out pictures only; row 0 is opaque and stands for all others.
    alpha_rows: int64 (S,), the row of each picture in `alpha`.
    """

    pixels: Tensor
    records: list[Record]
    alpha: Tensor
    alpha_rows: Tensor

    def __len__(self) -> int:
        return len(self.records)

    @property
    def cut_out(self) -> Tensor:
        """Bool (S,): which pictures have a transparent background."""
        return self.alpha_rows > 0

    def to(self, device: torch.device | str) -> "Pictures":
        """The same pictures with their tensors on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("pixels", "alpha", "alpha_rows")}
        return dataclasses.replace(self, **moved)

    def batch(self, indices: Tensor, backgrounds: Tensor | None = None) -> Tensor:
        """Float pixels (B,3,H,W) in [-1,1], cut-outs laid on `backgrounds` (B,3) in [-1,1], white without them."""
        device = self.pixels.device
        indices = indices.to(device)
        if backgrounds is None:
            backgrounds = torch.ones(len(indices), 3)
        colours = self.pixels[indices].float() / 127.5  # (B,3,H,W)
        alpha = self.alpha[self.alpha_rows[indices]].float() / 255  # (B,1,H,W)
        plain = backgrounds.to(device, torch.float32)[:, :, None, None] + 1  # (B,3,1,1), [0,2] like colours
        return (colours + (1 - alpha) * plain - 1).clamp(-1, 1)


def load_pictures(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    image_size: int,
    limit: int | None = None,
    sources: Mapping[str, float] | None = None,
) -> Pictures:
    """The first `limit` pictures of `source`, cropped to the centre square and resized to `image_size` pixels.

    `source` is one or a list of: Parquet tables, .tar shards (WebDataset), folders of pictures, folders of
    tables or shards, globs, or `hub:<name>`. With `sources`, only pictures of sources with a share above 0
    are loaded.

    Raises: ValueError when nothing is found, or a picture cannot be read.
    """
    entries: Iterator[_Entry] = (entry for part in _parts(source) for entry in _read(part))
    if sources is not None:
        wanted = {name for name, share in sources.items() if share > 0}
        entries = (entry for entry in entries if entry.record.source in wanted)
    return _collect(islice(entries, limit), image_size, source)


def _collect(entries: Iterator[_Entry], image_size: int, source: Any) -> Pictures:
    records, pixels, alphas = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while chunk := list(islice(entries, _CHUNK)):
            decoded = np.stack(list(threads.map(partial(_decode, image_size=image_size), chunk)))  # (n,4,H,W)
            records += [entry.record for entry in chunk]
            pixels.append(torch.from_numpy(decoded[:, :3].copy()))
            alphas.append([alpha if alpha.min() < 255 else None for alpha in decoded[:, 3:].copy()])
    if not records:
        raise ValueError(f"no pictures found in {source!r}")
    alpha, alpha_rows = _stack_alpha([row for rows in alphas for row in rows], image_size)
    return Pictures(torch.cat(pixels), records, alpha, alpha_rows)


def _stack_alpha(rows: list[np.ndarray | None], image_size: int) -> tuple[Tensor, Tensor]:
    opaque = np.full((1, image_size, image_size), 255, np.uint8)
    is_cut_out = np.array([row is not None for row in rows])
    stacked = np.stack([opaque, *(row for row in rows if row is not None)])  # (A,1,H,W)
    return torch.from_numpy(stacked), torch.from_numpy(np.cumsum(is_cut_out) * is_cut_out)


def _decode(entry: _Entry, image_size: int) -> np.ndarray:
    """uint8 (4,H,W): colours multiplied by alpha, and alpha."""
    try:
        with Image.open(BytesIO(entry.data) if isinstance(entry.data, bytes) else entry.data) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{entry.record.key} is not a readable picture: {error}") from error
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGBa")).transpose(2, 0, 1)


# Where pictures come from


def _parts(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Files, folders of pictures and hub names, in a fixed order."""
    if not isinstance(source, (str, os.PathLike)):
        return [part for one in source for part in _parts(one)]
    name = os.fspath(source)
    if name.startswith("hub:"):
        return [name]
    if Path(name).is_dir():
        inside = sorted(str(path) for suffix in ("*.parquet", "*.tar") for path in Path(name).glob(suffix))
        return inside or [name]
    found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
    if not found:
        raise ValueError(f"no such file, folder or pattern: {name!r}")
    return found


def _read(part: str) -> Iterator[_Entry]:
    if part.startswith("hub:"):
        return _read_hub(part.removeprefix("hub:"))
    path = Path(part)
    if path.is_dir():
        return _read_files(path, sorted(path.rglob("*")))
    if path.suffix == ".parquet":
        return _read_table(path)
    if path.suffix == ".tar":
        return _read_shard(path)
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return _read_files(path.parent, [path])
    raise ValueError(f"{part!r} must be a .parquet table, a .tar shard, a folder or a picture")


def _read_table(path: Path) -> Iterator[_Entry]:
    import pyarrow.parquet as pq

    row = 0
    for batch in pq.ParquetFile(path).iter_batches(_CHUNK):
        if "image" not in batch.schema.names:
            raise ValueError(f"{path.name} must have a column 'image', it has {', '.join(batch.schema.names)}")
        for fields in batch.to_pylist():
            image = fields.pop("image")
            yield _Entry(_record(f"{path.name}:{row}", path.stem, fields), _encoded(image, path.parent))
            row += 1


def _encoded(image: Any, folder: Path) -> bytes | Path:
    """The file of a column that holds bytes or {bytes, path}."""
    if isinstance(image, bytes):
        return image
    return image["bytes"] or folder / image["path"]


def _read_files(folder: Path, paths: Iterable[Path]) -> Iterator[_Entry]:
    described = _metadata(folder / "metadata.jsonl")
    for path in paths:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            name = path.relative_to(folder).as_posix()
            captions = path.with_suffix(".txt")
            fields = dict(described.get(name, {}))
            if captions.is_file():
                fields["captions"] = _lines(captions.read_text(encoding="utf-8"))
            yield _Entry(_record(name, folder.resolve().name, fields), path)


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in _lines(path.read_text(encoding="utf-8"))]
    return {row["file_name"]: row for row in rows}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_shard(path: Path) -> Iterator[_Entry]:
    import webdataset

    suffixes = [suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES]
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        data = next((sample[suffix] for suffix in suffixes if suffix in sample), None)
        if data is not None:
            fields = json.loads(sample.get("json", b"{}"))
            if "txt" in sample:
                fields["captions"] = _lines(sample["txt"].decode("utf-8"))
            yield _Entry(_record(f"{path.name}:{sample['__key__']}", path.stem, fields), data)


def _read_hub(name: str) -> Iterator[_Entry]:
    import datasets

    table = datasets.load_dataset(name, split="train")
    columns = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"hub data set {name!r} must have a column of pictures, it has {', '.join(table.features)}")
    labels = {c: f for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for row, fields in enumerate(table.cast_column(columns[0], datasets.Image(decode=False))):
        image = fields.pop(columns[0])
        fields |= {c: f.int2str(fields[c]).replace("_", " ") for c, f in labels.items() if fields[c] is not None}
        yield _Entry(_record(f"{name}:{row}", name, fields), _encoded(image, Path()))


def _record(key: str, source: str, fields: Mapping[str, Any]) -> Record:
    """A record from the columns it knows; missing ones stay empty."""
    captions = next((fields[column] for column in CAPTION_COLUMNS if fields.get(column)), ())
    words = {name: str(fields[name]).strip() for name in _WORD_FIELDS if fields.get(name) not in (None, "")}
    return Record(
        key=key,
        **{"source": source, **words},
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
        keywords=tuple(fields.get("keywords") or ()),
        year=fields.get("year"),
        bbox=tuple(fields.get("bbox") or ()),
    )


_WORD_FIELDS = ("source", "label", "style", "artist", "genre", "title")


# Which pictures, on which background, at which step


def sampling_weights(records: Sequence[Record], weights: Mapping[str, float]) -> Tensor:
    """Probability of each picture, float64 (S,), such that each source's share is in proportion to `weights`.

    Raises: ValueError for a source without pictures, a negative weight, or no weight above 0.
    """
    counts = Counter(record.source for record in records)
    if unknown := sorted(set(weights) - set(counts)):
        raise ValueError(f"no pictures of source {', '.join(unknown)}; there are {', '.join(sorted(counts))}")
    if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
        raise ValueError(f"source weights must be at least 0 and not all 0, got {dict(weights)}")
    share = {source: weight / sum(weights.values()) / counts[source] for source, weight in weights.items()}
    return torch.tensor([share.get(record.source, 0.0) for record in records], dtype=torch.float64)


def batch_indices(
    seed: int, global_step: int, batch_size: int, num_pictures: int, weights: Tensor | None = None
) -> Tensor:
    """Indices, int64 (B,), of one step: a pure function of the arguments, so that resuming needs no state.

    Without `weights` every picture comes once per epoch, in an order of that epoch; with them pictures are
    drawn with replacement.
    """
    if weights is not None:
        generator = np.random.default_rng([seed, global_step])
        return torch.from_numpy(generator.choice(num_pictures, batch_size, p=weights.numpy()))
    positions = np.arange(global_step * batch_size, (global_step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_pictures)
    indices = [_order(seed, epoch, num_pictures)[offsets[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    return torch.from_numpy(np.concatenate(indices))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_pictures: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_pictures)


def background_colours(seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Plain colours, float32 (B,3) in [-1,1], white for half of them: a pure function of (seed, index, epoch).

    `epoch` is one number, or one per picture, (B,).
    """
    epochs = np.asarray(torch.as_tensor(epoch).cpu(), dtype=np.uint64)
    picture = _mix(_mix(_mix(np.uint64([seed])) + epochs) + np.asarray(indices.cpu(), dtype=np.uint64))  # (B,)
    draws = _mix(picture[:, None] + np.arange(4, dtype=np.uint64)) / 2.0**64  # (B,4) in [0,1]
    colours = np.where(draws[:, :1] < WHITE_SHARE, 1.0, 2 * draws[:, 1:] - 1)  # (B,3)
    return torch.from_numpy(colours.astype(np.float32))


def _mix(values: np.ndarray) -> np.ndarray:
    """64 well mixed bits of each number. Source: Steele et al. 2014, SplitMix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal digest of a file, for the model card."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
