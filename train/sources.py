"""Where training pictures come from: tables, folders, tar shards and hub data sets, one encoded file after another."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vilex.images import SUFFIXES

_CAPTION_COLUMNS = ("captions", "caption", "text", "answers", "answer")
_WORD_COLUMNS = ("source", "label", "style", "artist", "genre", "title", "question")
_ROWS = 2048  # of a table, read together: bounds the encoded bytes held in memory


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
    question: str = field(default="", repr=False)  # out of the fingerprint of data, which older runs hold


class Entry(NamedTuple):
    """A picture that is not decoded yet: its record, and its file as bytes or a path."""

    record: Record
    data: bytes | Path


def read_entries(source: str | os.PathLike | Sequence[str | os.PathLike]) -> Iterator[Entry]:
    """All pictures of `source`, in a fixed order; see `load_pictures` for what it may be.

    Raises: ValueError when a part of it does not exist or is of no known kind.
    """
    return (entry for part in expand(source) for entry in _read(part))


def expand(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Files, folders of pictures and hub names that a source stands for, in a fixed order.

    A hub name may end in @ and a split; without, the pictures are those of `train`.
    Raises: ValueError when a part of it does not exist.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [part for one in source for part in expand(one)]
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


def require_apart(data: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises ValueError when a file, folder or hub data set is in both."""
    if both := sorted({_place(part) for part in expand(data)} & {_place(part) for part in expand(held_out)}):
        raise ValueError(f"{both[0]} is both in --data and in --validation: what is learnt cannot be held out")


def _place(part: str) -> str:
    if part.startswith("hub:"):
        return part if "@" in part else f"{part}@train"
    return str(Path(part).resolve())


def _read(part: str) -> Iterator[Entry]:
    if part.startswith("hub:"):
        return _read_hub(part.removeprefix("hub:"))
    path = Path(part)
    if path.is_dir():
        return _read_files(path, sorted(path.rglob("*")))
    if path.suffix == ".parquet":
        return _read_table(path)
    if path.suffix == ".tar":
        return _read_shard(path)
    if path.suffix.lower() in SUFFIXES:
        return _read_files(path.parent, [path])
    raise ValueError(f"{part!r} must be a .parquet table, a .tar shard, a folder or a picture")


def _read_table(path: Path) -> Iterator[Entry]:
    import pyarrow.parquet as pq

    row = 0
    for batch in pq.ParquetFile(path).iter_batches(_ROWS):
        if "image" not in batch.schema.names:
            raise ValueError(f"{path.name} must have a column 'image', it has {', '.join(batch.schema.names)}")
        for fields in batch.to_pylist():
            image = fields.pop("image")
            yield Entry(_record(f"{path.name}:{row}", path.stem, fields), _encoded(image, path.parent))
            row += 1


def _encoded(image: Any, folder: Path) -> bytes | Path:
    """The file of a column that holds bytes or {bytes, path}; no bytes where the row is empty."""
    if not image or isinstance(image, bytes):
        return image or b""
    return image["bytes"] or folder / (image["path"] or "")


def _read_files(folder: Path, paths: Iterable[Path]) -> Iterator[Entry]:
    described = _metadata(folder / "metadata.jsonl")
    for path in paths:
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            name = path.relative_to(folder).as_posix()
            captions = path.with_suffix(".txt")
            fields = dict(described.get(name, {}))
            if captions.is_file():
                fields["captions"] = _lines(captions.read_text(encoding="utf-8"))
            yield Entry(_record(name, folder.resolve().name, fields), path)


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in _lines(path.read_text(encoding="utf-8"))]
    return {row["file_name"]: row for row in rows}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_shard(path: Path) -> Iterator[Entry]:
    import webdataset

    for sample in webdataset.WebDataset(str(path), shardshuffle=False, nodesplitter=None):  # every process reads all
        if entry := shard_entry(sample, path):
            yield entry


def shard_suffixes() -> list[str]:
    """Endings of the pictures in a shard, without the dot; where a sample has several, the first counts."""
    return [suffix.removeprefix(".") for suffix in sorted(SUFFIXES)]


def shard_entry(sample: Mapping[str, Any], path: Path) -> Entry | None:
    """The picture of a WebDataset sample from the shard `path`, with its text and JSON; None where there is none."""
    data = next((sample[suffix] for suffix in shard_suffixes() if suffix in sample), None)
    if data is None:
        return None
    fields = json.loads(sample.get("json", b"{}"))
    if "txt" in sample:
        fields["captions"] = _lines(sample["txt"].decode("utf-8"))
    return Entry(_record(f"{path.name}:{sample['__key__']}", path.stem, fields), data)


def _read_hub(part: str) -> Iterator[Entry]:
    import datasets

    name, _, split = part.partition("@")
    table = datasets.load_dataset(name, split=split or "train")
    columns = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"hub data set {name!r} must have a column of pictures, it has {', '.join(table.features)}")
    labels = {c: f for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for row, fields in enumerate(table.cast_column(columns[0], datasets.Image(decode=False))):
        image = fields.pop(columns[0])
        fields |= {c: f.int2str(fields[c]).replace("_", " ") for c, f in labels.items() if fields[c] is not None}
        yield Entry(_record(f"{name}:{row}", name, fields), _encoded(image, Path()))


def _record(key: str, source: str, fields: Mapping[str, Any]) -> Record:
    """A record from the columns it knows; missing ones stay empty."""
    captions = next((fields[column] for column in _CAPTION_COLUMNS if fields.get(column)), ())
    words = {name: str(fields[name]).strip() for name in _WORD_COLUMNS if fields.get(name) not in (None, "")}
    return Record(
        key=key,
        **{"source": source, **words},
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
        keywords=tuple(fields.get("keywords") or ()),
        year=fields.get("year"),
        bbox=tuple(fields.get("bbox") or ()),
    )
