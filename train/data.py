"""Training pictures from tables, folders, tar shards and hub data sets, and batches as functions of (seed, step).

S stands for the number of pictures loaded.
"""

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from train.sources import Entry, Record, read_entries
from vilex.images import decode_image

log = logging.getLogger(__name__)
WHITE_SHARE = 0.5  # of the backgrounds of cut-out pictures; the rest are plain random colours
RESIDENT_BYTES = 16e9  # of pixels, or of a teacher's features, that an accelerator holds; of more, a batch at a time
_CHUNK = 2048  # pictures decoded together: bounds the files held in memory


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures with their records.

    pixels: uint8 (S,3,H,W), multiplied by alpha, so that colours hidden under transparency are gone.
    alpha: uint8 (A,1,H,W) of the cut-out pictures only; row 0 is opaque and stands for all others.
    alpha_rows: int64 (S,), the row of each picture in `alpha`.
    device: where batches go.
    """

    pixels: Tensor
    records: list[Record]
    alpha: Tensor
    alpha_rows: Tensor
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def cut_out(self) -> Tensor:
        """Bool (S,): which pictures have a transparent background."""
        return self.alpha_rows > 0

    def to(self, device: torch.device | str) -> "Pictures":
        """The same pictures with their batches on another device, and all their tensors unless they are too many."""
        names = ("pixels", "alpha", "alpha_rows") if self.pixels.nbytes <= RESIDENT_BYTES else ()
        moved = {name: getattr(self, name).to(device) for name in names}
        return dataclasses.replace(self, **moved, device=torch.device(device))

    def fingerprint(self) -> str:
        """Their number, and 12 hex digits that change with any pixel, word or order, not with names of files."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        for tensor in (self.pixels, self.alpha, self.alpha_rows):
            digest.update(tensor.numpy(force=True))
        for record in self.records:
            digest.update(repr(dataclasses.replace(record, key="")).encode())
        return f"{len(self)} pictures ({digest.hexdigest()[:12]})"

    def batch(self, indices: Tensor, backgrounds: Tensor | None = None) -> Tensor:
        """Float pixels (B,3,H,W) in [-1,1], cut-outs laid on `backgrounds` (B,3) in [-1,1], white without them."""
        indices = indices.to(self.pixels.device, non_blocking=True)
        if backgrounds is None:
            backgrounds = torch.ones(len(indices), 3)
        colours = self.pixels[indices].to(self.device).float() / 127.5  # (B,3,H,W)
        alpha = self.alpha[self.alpha_rows[indices]].to(self.device).float() / 255  # (B,1,H,W)
        plain = (
            backgrounds.to(self.device, torch.float32, non_blocking=True)[:, :, None, None] + 1
        )  # (B,3,1,1), [0,2] like colours
        return (colours + (1 - alpha) * plain - 1).clamp(-1, 1)


def load_pictures(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    image_size: int,
    limit: int | None = None,
    sources: Mapping[str, float] | None = None,
    workers: int = 1,
) -> Pictures:
    """The first `limit` pictures of `source`, cropped to the centre square and resized to `image_size` pixels.

    `source` is one or a list of: Parquet tables, .tar shards (WebDataset), folders of pictures, folders of
    tables or shards, globs, or `hub:<name>`. With `sources`, only pictures of sources with a share above 0
    are loaded. Pictures that cannot be read are named in the log and left out. More than one of `workers` are
    processes: threads that decode pictures this small wait for each other.

    Raises: ValueError when nothing is found or nothing of it can be read.
    """
    entries, wanted = read_entries(source), sorted(name for name, share in (sources or {}).items() if share > 0)
    if sources is not None:
        entries = (entry for entry in entries if entry.record.source in wanted)
    of_sources = f" of {', '.join(wanted)}" if wanted else ""
    return _collect(islice(entries, limit), image_size, f"{of_sources} found in {source!r}", workers)


def _collect(entries: Iterator[Entry], image_size: int, where: str, workers: int) -> Pictures:
    records, levels, broken = [], [], []
    with _executor(workers) as executor:
        while chunk := list(islice(entries, _CHUNK)):
            decoded = executor.map(partial(decode_entry, image_size=image_size), chunk, chunksize=32)
            for entry, found in zip(chunk, decoded, strict=True):
                if isinstance(found, ValueError):
                    log.warning("left out: %s", found)
                    broken.append(str(found))
                else:
                    records.append(entry.record)
                    levels.append(found)
    if not records:
        raise ValueError(f"no pictures{where}" + (f": {broken[0]}" if broken else ""))
    return stack_pictures(records, levels)


def _executor(workers: int) -> Executor:
    if workers <= 1:
        return ThreadPoolExecutor(os.cpu_count())
    return ProcessPoolExecutor(workers, get_context("spawn"))  # not forked: the caller may hold threads


def stack_pictures(records: list[Record], levels: Sequence[np.ndarray]) -> Pictures:
    """Pictures of what `decode_entry` gave, at least one."""
    alphas = [part[3:] if len(part) > 3 else None for part in levels]
    colours = torch.from_numpy(np.stack([part[:3] for part in levels]))
    return Pictures(colours, records, *_stack_alpha(alphas, colours.shape[-1]))


def _stack_alpha(rows: list[np.ndarray | None], image_size: int) -> tuple[Tensor, Tensor]:
    opaque = np.full((1, image_size, image_size), 255, np.uint8)
    is_cut_out = np.array([row is not None for row in rows])
    stacked = np.stack([opaque, *(row for row in rows if row is not None)])  # (A,1,H,W)
    return torch.from_numpy(stacked), torch.from_numpy(np.cumsum(is_cut_out) * is_cut_out)


def decode_entry(entry: Entry, image_size: int) -> np.ndarray | ValueError:
    """uint8 (3 or 4,H,W): colours multiplied by alpha, and alpha unless opaque; or what is wrong with the file."""
    try:
        image = decode_image(entry.data, name=entry.record.key).convert("RGBA")
    except ValueError as error:
        return error
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    levels = np.asarray(image.convert("RGBa")).transpose(2, 0, 1)
    return levels[: 4 if levels[3].min() < 255 else 3].copy()


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
        return torch.from_numpy(_cumulated(weights).searchsorted(generator.random(batch_size), side="right"))
    positions = np.arange(global_step * batch_size, (global_step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_pictures)
    indices = [_order(seed, epoch, num_pictures)[offsets[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    return torch.from_numpy(np.concatenate(indices))


@lru_cache(maxsize=2)
def _cumulated(weights: Tensor) -> np.ndarray:
    # as numpy's `choice` does for itself, at each call
    sums = weights.numpy(force=True).cumsum()
    return sums / sums[-1]


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
