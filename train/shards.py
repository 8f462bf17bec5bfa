"""WebDataset shards that are read while training: only where each sample lies is held in memory, 16 bytes a picture.

Which pictures a step takes is a function of (seed, step) here too: each epoch goes through the shards in an order of
its own, a window of them at a time, and through all pictures of a window at random. So every picture comes once per
epoch, whatever the number of processes and workers, each of which reads its own share and nothing else; and a run
resumes exactly, on another number of them too. webdataset's own splitting gives whole shards to processes: what a
step takes would depend on their number, and where shards differ in size some would wait for pictures at the end.
"""

import hashlib
import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from train.batches import Batch, CaptionTable, draw_variants
from train.data import Pictures, background_colours, decode_entry, stack_pictures
from train.presets import TrainConfig
from train.sources import Entry, Record, expand, shard_entry, shard_suffixes
from vilex.images import to_levels

log = logging.getLogger(__name__)
Key = tuple[int, int]  # global_step, micro-batch
# record, uint8 pixels (3,H,W), index, variant, background (3,) or None -> the text beside the picture
Write = Callable[[Record, np.ndarray, int, int, Tensor | None], str]
WINDOW = 16  # shards whose pictures are shuffled together


@dataclass(frozen=True)
class Shards:
    """Pictures in tar files, read when they are asked for; like `Pictures` otherwise.

    spans: int64 (S_i,2) of each file, where its samples begin and end, in bytes.
    """

    paths: list[Path]
    spans: list[np.ndarray]
    image_size: int
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def sizes(self) -> np.ndarray:
        """Pictures in each shard, int64."""
        return np.array([len(spans) for spans in self.spans])

    def to(self, device: torch.device | str) -> "Shards":
        """The same shards with their batches on another device."""
        return replace(self, device=torch.device(device))

    def fingerprint(self) -> str:
        """Their number, and 12 hex digits that change with the places of samples, not with names of files."""
        digest = hashlib.sha256()
        for spans in self.spans:
            digest.update(spans.tobytes())
        return f"{len(self)} pictures in {len(self.paths)} shards ({digest.hexdigest()[:12]})"

    def batch(self, indices: Tensor, backgrounds: Tensor | None = None) -> Tensor:
        """Float pixels (B,3,H,W) in [-1,1], cut-outs laid on `backgrounds` (B,3) in [-1,1], white without them."""
        return self.read(indices).batch(torch.arange(len(indices)), backgrounds).to(self.device)

    def read(self, indices: Tensor) -> Pictures:
        """The pictures int64 (B,), on the CPU; for one that cannot be read its next readable neighbour stands in."""
        ends = self.sizes.cumsum()
        shards = np.searchsorted(ends, indices.numpy(force=True), side="right")
        rows = indices.numpy(force=True) - (ends - self.sizes)[shards]
        found = [self._decode(*place) for place in zip(shards.tolist(), rows.tolist(), strict=True)]
        return stack_pictures([record for record, _ in found], [levels for _, levels in found])

    def _decode(self, shard: int, row: int) -> tuple[Record, np.ndarray]:
        path = self.paths[shard]
        spans = self.spans[shard]
        for start, end in (spans[(row + k) % len(spans)].tolist() for k in range(len(spans))):
            entry = _read_sample(path, start, end)
            levels = decode_entry(entry, self.image_size)
            if not isinstance(levels, ValueError):
                return entry.record, levels
            log.warning("the next picture stands in: %s", levels)
        raise ValueError(f"{path} holds no picture that can be read")


def load_shards(source: Sequence[str], image_size: int, limit: int | None = None) -> Shards:
    """The first `limit` pictures of .tar files, folders of them or patterns; only the headers are read.

    Raises ValueError when there is none, or anything else among them.
    """
    paths = [Path(part) for part in expand(source)]
    if others := [str(path) for path in paths if path.suffix != ".tar"]:
        raise ValueError(f"--stream reads .tar shards alone, got {others[0]!r}")
    with ThreadPoolExecutor() as threads:
        spans = list(threads.map(_find_spans, paths))
    if limit is not None:
        before = np.cumsum([0] + [len(found) for found in spans])
        spans = [found[: max(0, limit - start)] for found, start in zip(spans, before, strict=False)]
    kept = [i for i, found in enumerate(spans) if len(found)]
    if not kept:
        raise ValueError(f"no pictures found in {list(source)!r}")
    return Shards([paths[i] for i in kept], [spans[i] for i in kept], image_size)


def _find_spans(path: Path) -> np.ndarray:
    found, suffixes = [], shard_suffixes()
    with tarfile.open(path) as tar:
        files = (member for member in tar if member.isreg())
        for key, group in groupby(files, lambda member: base_plus_ext(member.name)[0]):
            members = list(group)
            if key is not None and any(base_plus_ext(m.name)[1].lower() in suffixes for m in members):
                found.append((members[0].offset, _end(members[-1])))
    return np.array(found, np.int64).reshape(-1, 2)


def _end(member: tarfile.TarInfo) -> int:
    blocks = -(-member.size // tarfile.BLOCKSIZE)
    return member.offset_data + blocks * tarfile.BLOCKSIZE


def _read_sample(path: Path, start: int, end: int) -> Entry:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    files = tar_file_iterator(io.BytesIO(data + bytes(tarfile.RECORDSIZE)))  # zeros end a tar file
    (sample,) = group_by_keys(file | {"__url__": str(path)} for file in files)
    return shard_entry(sample, path)


def stream_indices(seed: int, global_step: int, batch_size: int, sizes: np.ndarray) -> Tensor:
    """Indices, int64 (B,), of one step: a pure function of the arguments, so that resuming needs no state."""
    positions = np.arange(global_step * batch_size, (global_step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, sizes.sum())
    parts = [_epoch(seed, epoch, offsets[epochs == epoch], sizes) for epoch in np.unique(epochs).tolist()]
    return torch.from_numpy(np.concatenate(parts))


def _epoch(seed: int, epoch: int, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The pictures at ascending offsets of an epoch."""
    shards = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    firsts = sizes.cumsum() - sizes
    ends = np.add.reduceat(sizes[shards], np.arange(0, len(shards), WINDOW)).cumsum()
    windows = np.searchsorted(ends, offsets, side="right")
    parts = []
    for window in np.unique(windows).tolist():
        inside = shards[window * WINDOW : (window + 1) * WINDOW]
        pictures = np.concatenate([firsts[shard] + np.arange(sizes[shard]) for shard in inside])
        np.random.default_rng([seed, epoch, window]).shuffle(pictures)
        parts.append(pictures[offsets[windows == window] - (ends[window] - len(pictures))])
    return np.concatenate(parts)


@dataclass(frozen=True)
class ShardBatches(Dataset):
    """One process's micro-batches of shards, by (global_step, micro): pictures, and one text beside each.

    share: which of a step's pictures a micro-batch takes; write: see Write.
    """

    shards: Shards
    config: TrainConfig
    variants: int
    share: Callable[[int], slice]
    write: Write
    tokenize: Callable[[list[list[str]]], CaptionTable]

    def __getitem__(self, key: Key) -> Batch:
        """On the CPU."""
        (global_step, micro), seed, size = key, self.config.seed, self.config.batch_size
        share = self.share(micro)
        indices = stream_indices(seed, global_step, size, self.shards.sizes)[share]
        variant = draw_variants(self.variants, self.config, global_step)[share]
        pictures, backgrounds = self.shards.read(indices), background_colours(seed, variant, indices)
        rows = torch.arange(len(indices))
        pixels = pictures.batch(rows, backgrounds)
        seen = zip(pictures.records, to_levels(pixels).numpy(), indices.tolist(), variant.tolist(), strict=True)
        under = [colour if cut_out else None for colour, cut_out in zip(backgrounds, pictures.cut_out, strict=True)]
        texts = [[self.write(*picture, background)] for picture, background in zip(seen, under, strict=True)]
        return Batch(rows, torch.zeros_like(rows), pixels, self.tokenize(texts))


class _Keys(Sampler):
    """Keys from one on, without end."""

    def __init__(self, first: Key, following: Callable[[Key], Key]) -> None:
        self.first, self.following = first, following

    def __iter__(self) -> Iterator[Key]:
        key = self.first
        while True:
            yield key
            key = self.following(key)


class ShardLoader:
    """The batches of `ShardBatches` one after the other, read ahead by worker processes."""

    def __init__(self, batches: ShardBatches, accumulate: int, workers: int) -> None:
        self.batches, self.accumulate, self.workers = batches, accumulate, workers
        self._key, self._batch, self._ahead = None, None, iter(())

    def batch(self, global_step: int, micro: int) -> Batch:
        """A micro-batch on its device; asking for another than the last and the next starts the workers anew."""
        key = (global_step, micro)
        if key != self._key:
            if self._key is None or key != self._next(self._key):
                self._ahead = iter(self._load(key))
            self._key, self._batch = key, next(self._ahead).to(self.batches.shards.device)
        return self._batch

    def _next(self, key: Key) -> Key:
        return (key[0], key[1] + 1) if key[1] + 1 < self.accumulate else (key[0] + 1, 0)

    def _load(self, key: Key) -> DataLoader:
        # forked, so that the index of the shards is shared; the workers touch no accelerator
        context = "fork" if self.workers else None
        return DataLoader(
            self.batches, batch_size=None, sampler=_Keys(key, self._next), num_workers=self.workers,
            multiprocessing_context=context, pin_memory=self.batches.shards.device.type == "cuda",
        )  # fmt: skip
