"""Loading from each kind of source, cut-outs, and batches as functions of (seed, step)."""

import io
import json
import re
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from training import write_shard

from train import data
from train.data import (
    Pictures,
    Record,
    background_colours,
    batch_indices,
    load_pictures,
    sampling_weights,
    sha256,
)

GREEN, RED = (0, 200, 0), (200, 0, 0)


def encode(image: Image.Image, suffix: str = "webp") -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **({"lossless": True} if suffix == "webp" else {}))
    return file.getvalue()


def halves(alpha: int = 255) -> Image.Image:
    """Green left half; the right half is red with the given alpha, 16 high and 24 wide."""
    pixels = np.zeros((16, 24, 4), np.uint8)
    pixels[:, :12], pixels[:, 12:] = (*GREEN, 255), (*RED, alpha)
    return Image.fromarray(pixels)


def write_table(path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def table(tmp_path):
    row = {"image": {"bytes": encode(halves().convert("RGB")), "path": "a.webp"}, "source": "photos", "label": "wall",
           "captions": ["a wall", "two colours"], "keywords": None, "style": None,
           "year": 1901, "bbox": [1, 2, 3, 4]}  # fmt: skip
    cut = {**row, "image": {"bytes": encode(halves(alpha=0)), "path": "b.webp"}, "source": "icons", "captions": None}
    write_table(tmp_path / "two.parquet", [row, cut])
    return tmp_path / "two.parquet"


def test_table_rows_become_records_and_square_pixels(table):
    pictures = load_pictures(table, image_size=4)
    assert pictures.pixels.shape == (2, 3, 4, 4) and pictures.pixels.dtype == torch.uint8
    assert pictures.records[0] == Record(
        "two.parquet:0", "photos", ("a wall", "two colours"), "wall", year=1901, bbox=(1, 2, 3, 4)
    )
    assert pictures.records[1].source == "icons" and pictures.records[1].captions == ()
    assert pictures.cut_out.tolist() == [False, True]


def test_wide_picture_is_cropped_at_the_centre_not_squashed(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 40:] = GREEN, RED
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert load_pictures(tmp_path, image_size=5).pixels.max() < 40  # the filter sees a little of the sides


def test_colours_hidden_under_transparency_are_gone(table):
    pictures = load_pictures(table, image_size=8)
    assert pictures.pixels[1, 0].max() == 0  # the red of the right half was invisible
    blue = torch.tensor([[0.5, 0.5, 0.5], [-1.0, -1.0, 1.0]])
    pixels = pictures.batch(torch.tensor([0, 1]), blue)
    torch.testing.assert_close(pixels[1, :, 2, 7], torch.tensor([-1.0, -1.0, 1.0]))
    torch.testing.assert_close(pixels[1, :, 2, 0], torch.tensor(GREEN) / 127.5 - 1)
    torch.testing.assert_close(pixels[0, :, 2, 7], torch.tensor(RED) / 127.5 - 1)  # opaque: no background


def test_half_transparent_colours_mix_with_the_background(tmp_path):
    halves(alpha=51).save(tmp_path / "a.png")
    pixels = load_pictures(tmp_path, image_size=8).batch(torch.tensor([0]))
    expected = torch.tensor([0.2 * 200 + 0.8 * 255, 0.8 * 255, 0.8 * 255]) / 127.5 - 1
    torch.testing.assert_close(pixels[0, :, 0, 7], expected, atol=1 / 127.5, rtol=0)


def test_batch_keeps_order_shape_and_range(table):
    pictures = load_pictures([table, table, table], image_size=4)
    pixels = pictures.batch(torch.tensor([5, 0, 2, 4, 1]), torch.full((5, 3), -1.0))
    assert pixels.shape == (5, 3, 4, 4) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(pixels[0], pixels[4]) and torch.equal(pixels[1], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])


def test_limit_and_sources_choose_pictures(table):
    assert len(load_pictures([table, table], image_size=4, limit=3)) == 3
    icons = load_pictures([table, table], image_size=4, sources={"icons": 1.0, "photos": 0.0})
    assert [record.source for record in icons.records] == ["icons", "icons"]


def test_processes_read_what_threads_read(table):
    alone, together = (load_pictures([table, table], image_size=4, workers=workers) for workers in (1, 2))
    assert together.fingerprint() == alone.fingerprint()


def test_table_without_known_columns_takes_file_name_and_text(tmp_path):
    write_table(tmp_path / "own.parquet", [{"image": encode(halves()), "text": "my wall"}])
    assert load_pictures(tmp_path / "*.parquet", image_size=4).records == [Record("own.parquet:0", "own", ("my wall",))]


def test_questions_and_answers_are_read_and_a_question_leaves_the_fingerprint_alone(tmp_path):
    row = {"image": encode(halves()), "answers": ["left", "to the left"]}
    write_table(tmp_path / "asked.parquet", [row | {"question": "where is red?"}])
    write_table(tmp_path / "bare.parquet", [row | {"source": "asked"}])
    asked, bare = (load_pictures(tmp_path / name, image_size=8) for name in ("asked.parquet", "bare.parquet"))
    assert (asked.records[0].question, asked.records[0].captions) == ("where is red?", ("left", "to the left"))
    assert asked.fingerprint() == bare.fingerprint()  # runs of before there were questions go on


def test_folder_takes_captions_from_text_files_and_metadata(tmp_path):
    (tmp_path / "inner").mkdir()
    halves().save(tmp_path / "b.png")
    halves().save(tmp_path / "inner" / "a.png")
    halves().save(tmp_path / "plain.png")
    (tmp_path / "b.txt").write_text("one\n\ntwo \n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "inner/a.png", "text": "three"}) + "\n")
    records = load_pictures(tmp_path, image_size=4).records
    assert {record.key: record.captions for record in records} == {
        "b.png": ("one", "two"), "inner/a.png": ("three",), "plain.png": (),
    }  # fmt: skip
    assert {record.source for record in records} == {tmp_path.name}


def test_picture_turned_by_exif_is_loaded_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 3  # turned by half
    halves().convert("RGB").save(tmp_path / "a.png", exif=exif)
    pixels = load_pictures(tmp_path, image_size=8).pixels
    assert pixels[0, :, 4, 0].tolist() == list(RED)


def test_shard_pairs_pictures_with_text_and_json(tmp_path):
    write_shard(tmp_path / "s.tar", {
        "1.webp": encode(halves()), "1.txt": b"a wall",
        "2.png": encode(halves(), "png"), "2.json": b'{"label": "wall", "source": "walls"}',
        "3.txt": b"no picture",
    })  # fmt: skip
    assert load_pictures(tmp_path, image_size=4).records == [
        Record("s.tar:1", "s", ("a wall",)), Record("s.tar:2", "walls", label="wall"),
    ]  # fmt: skip


def test_each_of_several_processes_reads_a_whole_shard(tmp_path, monkeypatch):
    write_shard(tmp_path / "s.tar", {"1.png": encode(halves(), "png"), "2.png": encode(halves(), "png")})
    alone = load_pictures(tmp_path / "s.tar", image_size=6)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_pictures(tmp_path / "s.tar", image_size=6).records == alone.records


def test_hub_data_set_gives_label_names(monkeypatch):
    labels = datasets.ClassLabel(names=["cat", "polar_bear"])
    features = datasets.Features({"img": datasets.Image(), "label": labels, "text": datasets.Value("string")})
    rows = {"img": [{"bytes": encode(halves()), "path": None}] * 2, "label": [1, 0], "text": ["white", None]}
    asked = []
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    pictures = load_pictures("hub:some/animals", image_size=6)
    load_pictures("hub:some/animals@validation", image_size=6)
    assert asked == [("some/animals", "train"), ("some/animals", "validation")]
    assert pictures.pixels.shape == (2, 3, 6, 6)
    assert pictures.records[0] == Record("some/animals:0", "some/animals", ("white",), "polar bear")
    assert pictures.records[1].label == "cat" and pictures.records[1].captions == ()


def test_a_picture_of_the_asked_size_keeps_its_levels(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (17, 17, 3), np.uint8)
    write_table(tmp_path / "own.parquet", [{"image": encode(Image.fromarray(levels))}])
    assert torch.equal(load_pictures(tmp_path, image_size=17).pixels[0], torch.from_numpy(levels).permute(2, 0, 1))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((20, 20), 30_000, np.uint16)).save(tmp_path / "a.png")
    assert load_pictures(tmp_path, image_size=4).pixels.unique().tolist() == [round(30_000 / 257)]


@pytest.mark.parametrize("suffix", ["tif", "avif", "bmp", "gif"])
def test_every_format_that_the_app_reads_is_found_in_folders_and_shards(suffix, tmp_path):
    write_shard(
        tmp_path / "s.tar", {f"1.{suffix}": encode(halves().convert("RGB"), {"tif": "tiff"}.get(suffix, suffix))}
    )
    halves().convert("RGB").save(tmp_path / f"a.{suffix}")
    for source in (tmp_path / "s.tar", tmp_path / f"a.{suffix}"):
        pixels = load_pictures(source, image_size=8).pixels
        torch.testing.assert_close(pixels[0, :, 4, 0].int(), torch.tensor(GREEN).int(), atol=12, rtol=0)


def bad_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    halves().save(tmp_path / "good.png")
    (tmp_path / "inner" / "bad.png").write_bytes(b"not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"what some systems leave beside a picture")
    return tmp_path, "left out: inner/bad.png is not a readable picture"


def bad_heic(tmp_path):
    halves().save(tmp_path / "good.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    return tmp_path, "left out: phone.heic is "  # a sentence about HEIC or, with pillow-heif, about broken data


def bad_shard(tmp_path):
    write_shard(tmp_path / "s.tar", {"1.png": encode(halves(), "png")[:60], "2.png": encode(halves(), "png")})
    return tmp_path / "s.tar", "left out: s.tar:1 is not a readable picture"


def bad_table(tmp_path):
    tiny = encode(halves().resize((9, 7)))
    write_table(tmp_path / "t.parquet", [{"image": image} for image in (encode(halves()), tiny, None)])
    return tmp_path / "t.parquet", "left out: t.parquet:1 is too small: 9x7 pixels.*left out: t.parquet:2 .* empty"


@pytest.mark.parametrize("make", [bad_folder, bad_heic, bad_shard, bad_table])
def test_a_bad_file_is_named_and_left_out(make, tmp_path, caplog):
    source, message = make(tmp_path)
    pictures = load_pictures(source, image_size=16)
    assert len(pictures) == len(pictures.pixels) == len(pictures.alpha_rows) == 1
    assert pictures.pixels[0, :, 9, 2].tolist() == list(GREEN)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert re.search(message, said), said
    assert "hidden" not in said


def test_nothing_readable_is_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no pictures found in .*: a.jpg is not a readable picture: it is empty"):
        load_pictures(tmp_path, image_size=4)


def test_mistakes_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "notes.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "words.parquet", [{"word": "a"}])
    for source, message in (
        (tmp_path / "missing", "no such file, folder or pattern: .*missing"),
        (tmp_path / "a.png", "a.png is not a readable picture"),
        (tmp_path / "notes.csv", "must be a .parquet table, a .tar shard, a folder or a picture"),
        (tmp_path / "empty", "no pictures found in .*empty"),
        (tmp_path / "words.parquet", "must have a column 'image', it has word"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pictures(source, image_size=4)


def test_epochs_visit_every_picture_once_in_new_orders():
    steps = torch.cat([batch_indices(3, step, 4, 10) for step in range(10)])
    epochs = steps.reshape(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_a_step_depends_on_seed_and_step_alone():
    weights = torch.full((50,), 0.02, dtype=torch.float64)
    for w in (None, weights):
        first = [batch_indices(1, step, 7, 50, w) for step in (0, 1, 9)]
        again = [batch_indices(1, step, 7, 50, w) for step in (9, 1, 0)][::-1]
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first[0], batch_indices(2, 0, 7, 50, w))
    assert not torch.equal(batch_indices(1, 0, 7, 50, weights), batch_indices(1, 1, 7, 50, weights))


def test_a_batch_larger_than_the_data_covers_it():
    assert Counter(batch_indices(0, 2, 9, 3).tolist()) == {0: 3, 1: 3, 2: 3}


def records_of(**counts: int) -> list[Record]:
    return [Record(f"{source}:{i}", source) for source, count in counts.items() for i in range(count)]


def test_each_source_gets_the_share_asked_for():
    records = records_of(a=90, b=10, c=5)
    weights = sampling_weights(records, {"a": 1, "b": 3})
    torch.testing.assert_close(weights.sum().item(), 1.0)
    torch.testing.assert_close(weights[90:100].sum().item(), 0.75)
    drawn = Counter(records[i].source for step in range(20) for i in batch_indices(0, step, 100, 105, weights).tolist())
    assert set(drawn) == {"a", "b"} and abs(drawn["b"] / 2000 - 0.75) < 0.04


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"x": 1}, "no pictures of source x; there are a, b"), ({"a": -1, "b": 2}, "at least 0"), ({"a": 0}, "not all 0")],
)
def test_bad_source_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        sampling_weights(records_of(a=2, b=1), weights)


def test_backgrounds_depend_on_seed_epoch_and_picture_not_on_the_batch():
    indices = torch.arange(4000)
    colours = background_colours(5, 2, indices)
    assert colours.shape == (4000, 3) and colours.dtype == torch.float32
    assert torch.equal(background_colours(5, 2, torch.tensor([77, 3])), colours[[77, 3]])
    mixed = background_colours(5, torch.tensor([2, 7]), torch.tensor([77, 77]))
    assert torch.equal(mixed[0], colours[77])
    for other in (background_colours(6, 2, indices), background_colours(5, 3, indices)):
        assert (other == colours).all(dim=1).float().mean() < 0.3


def test_half_of_the_backgrounds_are_white_and_the_others_fill_the_range():
    colours = background_colours(0, 0, torch.arange(4000))
    white = (colours == 1).all(dim=1)
    assert abs(white.float().mean() - 0.5) < 0.03
    others = colours[~white]
    assert (others.mean(0).abs() < 0.06).all() and others.min() < -0.98 and others.max() > 0.98
    assert torch.corrcoef(others.T).fill_diagonal_(0).abs().max() < 0.06


def test_moving_pictures_keeps_their_pixels(table):
    pictures = load_pictures(table, image_size=4)
    moved = pictures.to("cpu")
    assert isinstance(moved, Pictures)
    assert torch.equal(moved.batch(torch.tensor([1, 0])), pictures.batch(torch.tensor([1, 0])))


@pytest.mark.parametrize(("resident_bytes", "storage"), [(10_000, "meta"), (10, "cpu")])
def test_batches_go_to_the_device_even_if_the_pictures_are_too_many_for_it(resident_bytes, storage, table, monkeypatch):
    monkeypatch.setattr(data, "RESIDENT_BYTES", resident_bytes)
    pictures = load_pictures(table, image_size=4).to("meta")
    assert pictures.pixels.device.type == pictures.alpha.device.type == storage
    assert pictures.batch(torch.tensor([1, 0])).device.type == "meta"


def test_the_fingerprint_tells_pixels_words_and_order_but_not_names_of_files(tmp_path):
    def write(name: str, *rows: tuple[int, str]) -> str:
        encoded = {i: encode(halves(alpha=255 - i)) for i, _ in rows}
        write_table(tmp_path / f"{name}.parquet", [{"image": encoded[i], "label": w, "source": "s"} for i, w in rows])
        return load_pictures(tmp_path / f"{name}.parquet", image_size=16).fingerprint()

    first = write("first", (0, "wall"), (0, "sea"), (9, ""))
    assert re.fullmatch(r"3 pictures \([0-9a-f]{12}\)", first)
    assert write("again", (0, "wall"), (0, "sea"), (9, "")) == first
    others = [
        write("pixels", (1, "wall"), (0, "sea"), (9, "")),
        write("alpha", (0, "wall"), (0, "sea"), (8, "")),
        write("words", (0, "wall"), (0, "see"), (9, "")),
        write("order", (0, "sea"), (0, "wall"), (9, "")),
        write("less", (0, "wall"), (0, "sea")),
    ]
    assert len({first, *others}) == 6


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
