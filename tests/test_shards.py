"""Shards read while training: each picture once per epoch, whoever reads it, as a function of (seed, step)."""

import io
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from builders import build_tokenizer
from PIL import Image
from training import write_shard

from train.batches import draw_variants, tabulate
from train.captions import write_caption, write_captions
from train.data import load_pictures
from train.presets import TrainConfig
from train.shards import ShardBatches, ShardLoader, Shards, load_shards, stream_indices

SIZES = (5, 3, 9, 1)  # pictures of the shards


def picture(number: int) -> bytes:
    """A file in one plain colour of its own; every fourth is half transparent."""
    file = io.BytesIO()
    colour = (7 * number, 255 - 7 * number, 90, 128 if number % 4 == 0 else 255)
    Image.new("RGBA", (24, 16), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four shards of 18 pictures with labels and texts, beside samples without a picture."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate(SIZES):
        files = {"000.txt": b"no picture"}
        for row in range(size):
            files[f"dir/{row:03d}.json"] = json.dumps({"label": f"thing {number}"}).encode()
            files[f"dir/{row:03d}.png"] = picture(number)
            files[f"dir/{row:03d}.txt"] = f"picture {number}".encode()
            number += 1
        write_shard(folder / f"{shard:02d}.tar", files)
    return folder


def build_loader(shards: Shards, workers: int = 0, processes: int = 1, process: int = 0, accumulate: int = 1):
    size = 6 // (processes * accumulate)

    def share(micro: int) -> slice:
        first = (micro * processes + process) * size
        return slice(first, first + size)

    tokenize = partial(tabulate, tokenizer=build_tokenizer("bert"), context_length=24)
    write = partial(write_caption, seed=3, empty_share=0.0)
    batches = ShardBatches(shards, TrainConfig(batch_size=6, seed=3), 2, share, write, tokenize)
    return ShardLoader(batches, accumulate, workers)


def test_shards_hold_what_is_read_whole_into_memory(folder):
    shards, pictures = load_shards([folder], image_size=8), load_pictures(folder, image_size=8)
    assert len(shards) == len(pictures) == 18 and shards.sizes.tolist() == list(SIZES)
    order = torch.tensor([17, 0, 8, 4, 5, 16])
    read = shards.read(order)
    assert read.records == [pictures.records[i] for i in order]
    assert read.records[0].captions == ("picture 17",) and read.records[0].label == "thing 17"
    backgrounds = torch.rand(6, 3) * 2 - 1
    assert torch.equal(shards.batch(order, backgrounds), pictures.batch(order, backgrounds))


@pytest.mark.parametrize("window", [1, 3, 16])
def test_each_picture_comes_once_per_epoch_and_epochs_differ(window, monkeypatch):
    monkeypatch.setattr("train.shards.WINDOW", window)
    sizes = np.array(SIZES)
    epochs = torch.cat([stream_indices(1, step, 4, sizes) for step in range(9)]).view(2, 18).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(18))] * 2
    assert epochs[0] != epochs[1]
    assert stream_indices(2, 0, 18, sizes).tolist() != epochs[0]


def test_a_window_of_shards_is_finished_before_the_next(monkeypatch):
    monkeypatch.setattr("train.shards.WINDOW", 1)
    shard_of = np.repeat(range(4), SIZES)[stream_indices(0, 0, 18, np.array(SIZES)).numpy()]
    assert (np.diff(shard_of) != 0).sum() == 3
    assert len(stream_indices(0, 0, 5, np.array([2]))) == 5  # several epochs in one step


@pytest.mark.parametrize("workers, accumulate", [(0, 1), (2, 1), (1, 3)])
def test_two_processes_with_workers_read_what_one_reads_and_nothing_else(workers, accumulate, folder):
    shards = load_shards([folder], image_size=8)
    alone = build_loader(shards)
    halves = [build_loader(shards, workers, 2, process, accumulate) for process in range(2)]
    seen = []
    for step in range(3):
        expected = alone.batch(step, 0)
        parts = [half.batch(step, micro) for micro in range(accumulate) for half in halves]
        assert torch.equal(torch.cat([part.pixels for part in parts]), expected.pixels)
        assert torch.equal(torch.cat([part.captions.ids for part in parts]), expected.captions.ids)
        seen += stream_indices(3, step, 6, shards.sizes).tolist()
    assert sorted(seen) == list(range(18))


def test_a_batch_can_be_asked_for_again_and_from_any_step(folder):
    shards = load_shards([folder], image_size=8)
    first, later = build_loader(shards), build_loader(shards)
    again = first.batch(0, 0)
    assert first.batch(0, 0) is again
    for step in (1, 2):
        expected = first.batch(step, 0)
    assert torch.equal(later.batch(2, 0).pixels, expected.pixels)


def test_texts_and_backgrounds_of_shards_are_those_of_tables(folder):
    """A caption says what is seen, so the background of a cut-out picture is told as it was laid."""
    shards = load_shards([folder], image_size=8)
    batch = build_loader(shards).batch(0, 0)
    indices = stream_indices(3, 0, 6, shards.sizes)
    pictures = load_pictures(folder, image_size=8)
    texts = write_captions(pictures, 2, seed=3, empty_share=0.0)
    variants = draw_variants(2, TrainConfig(batch_size=6, seed=3), 0)
    expected = [[texts[i][v]] for i, v in zip(indices, variants, strict=True)]
    assert torch.equal(batch.captions.ids, tabulate(expected, build_tokenizer("bert"), 24).ids)


def test_a_picture_that_cannot_be_read_gives_way_to_its_neighbour(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", {"0.png": picture(1), "1.png": picture(2)[:40], "2.png": picture(3)})
    shards = load_shards([tmp_path], image_size=4)
    assert [record.key for record in shards.read(torch.arange(3)).records] == ["a.tar:0", "a.tar:2", "a.tar:2"]
    assert "the next picture stands in: a.tar:1 is not a readable picture" in caplog.text
    write_shard(tmp_path / "a.tar", {"0.png": b"nothing"})
    with pytest.raises(ValueError, match="a.tar holds no picture that can be read"):
        load_shards([tmp_path], image_size=4).read(torch.tensor([0]))


def test_a_limit_cuts_shards_and_the_fingerprint_tells(folder):
    whole, cut = load_shards([folder], 8), load_shards([folder], 8, limit=6)
    assert cut.sizes.tolist() == [5, 1]
    assert re.fullmatch(r"6 pictures in 2 shards \([0-9a-f]{12}\)", cut.fingerprint())
    assert whole.fingerprint() != cut.fingerprint() == load_shards([folder], 8, limit=6).fingerprint()


def test_what_is_no_shard_is_refused(folder, tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="--stream reads .tar shards alone, got '.*a.parquet'"):
        load_shards([folder, tmp_path], 8)
    write_shard(tmp_path / "b.tar", {"0.txt": b"words"})
    with pytest.raises(ValueError, match="no pictures found in"):
        load_shards([tmp_path / "b.tar"], 8)
