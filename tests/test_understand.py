"""Understanding: the probes end to end on small tables, and the measures they rest on."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import build_bert, build_tokenizer, build_vae
from PIL import Image
from training import invoke, succeed

from train import understand
from train.data import load_pictures
from train.measures import caption_recall, chance_recall
from train.understand import embed_sentences, extract_views, pixel_view, vilex_view

WORDS = ("red", "green", "blue", "dog")
ROWS = {
    "pixels, 16x16": 768,
    "encoder, random": 8,
    "encoder after ViLex": 8,
    "+ mean of 75 ViLex tokens": 16,
    "+ first 16 ViLex tokens": 8 + 16 * 8,
}


def write_pictures(path: Path, per_class: int, seed: int) -> None:
    """32 px pictures whose colour says their class and their captions, and one of a source without either."""
    chance, rows = np.random.default_rng(seed), []
    for i in range(2 * 4 * per_class):
        kind, is_labelled = i % 4, i < 4 * per_class
        colour = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 60)][kind])
        file = io.BytesIO()
        Image.fromarray((colour + chance.integers(-30, 30, (32, 32, 3))).astype(np.uint8)).save(file, "png")
        rows.append({
            "image": {"bytes": file.getvalue(), "path": ""},
            "source": "caltech101" if is_labelled else "flickr8k",
            "label": WORDS[kind] if is_labelled else "",
            "captions": [] if is_labelled else [f"a {WORDS[kind]} beach", f"{WORDS[kind]} photo"],
        })  # fmt: skip
    rows.append(rows[0] | {"source": "emoji"})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def files(tmp_path, pipeline) -> SimpleNamespace:
    write_pictures(tmp_path / "train.parquet", 5, 0)
    write_pictures(tmp_path / "val.parquet", 2, 1)
    tokenizer = build_tokenizer("bert")
    torch.manual_seed(0)
    tokenizer.save_pretrained(tmp_path / "text")
    build_bert(len(tokenizer)).save_pretrained(tmp_path / "text")
    pipeline.vilex.save_pretrained(tmp_path / "weights")
    build_vae().save_pretrained(tmp_path / "vae")
    return SimpleNamespace(folder=tmp_path, train=tmp_path / "train.parquet", val=tmp_path / "val.parquet")


def arguments(files: SimpleNamespace, *more: object) -> list[object]:
    tables = ["--data", files.train, "--validation", files.val]
    folder = files.folder
    return ["--model", folder / "weights", *tables, "--text-encoder", folder / "text", "--out", folder / "out", *more]


def test_the_table_is_written_with_all_rows(files):
    extra = ["--before", files.folder / "weights", "--vae", files.folder / "vae"]
    printed = succeed(understand.main, *arguments(files, *extra)).output
    report = json.loads((files.folder / "out" / "understand.json").read_text())
    before = f"encoder before ViLex ({files.folder / 'weights'})"
    widths = {name: row.get("width") for name, row in report["scores"].items()}
    assert widths == ROWS | {before: 8, "VAE latents, 8x8": 4 * 64, "chance": None}
    assert report["pictures"] == {
        "classes": 4, "labelled_train": 20, "labelled_held_out": 8, "captioned_train": 20, "captioned_held_out": 8,
    }  # fmt: skip
    scores = report["scores"]
    assert scores["pixels, 16x16"]["linear_probe"] == 1  # colours tell the classes apart
    assert scores["chance"]["knn"] == 0.25
    same = {name: value for name, value in scores[before].items() if name != "width"}
    assert same == pytest.approx({name: scores["encoder after ViLex"][name] for name in same})  # the same weights
    table = (files.folder / "out" / "understand.md").read_text()
    assert table in printed
    assert table.splitlines()[0] == "| features | width | linear probe | k-NN | R@1 | R@5 | R@10 |"
    assert len(table.splitlines()) == 2 + len(scores)


def test_no_vae_row_without_a_vae(files):
    succeed(understand.main, *arguments(files, "--limit", 12))
    report = json.loads((files.folder / "out" / "understand.json").read_text())
    assert list(report["scores"]) == [*ROWS, "chance"]
    assert report["pictures"]["labelled_train"] == report["pictures"]["captioned_train"] == 12


def test_tables_without_captions_are_refused(files):
    rows = [row for row in pq.read_table(files.val).to_pylist() if row["source"] != "flickr8k"]
    pq.write_table(pa.Table.from_pylist(rows), files.val)
    result = invoke(understand.main, *arguments(files))
    assert result.exit_code == 2
    assert "no pictures of flickr8k found" in " ".join(result.output.split())


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(files, pipeline):
    pictures = load_pictures(files.val, image_size=32)
    views = [pixel_view, vilex_view(pipeline.vilex)]
    whole, parts = (extract_views(views, pictures, batch_size) for batch_size in (64, 3))
    for name, rows in whole.items():
        assert rows.shape[0] == len(pictures)
        assert torch.allclose(rows, parts[name], atol=1e-5), name
    pixels = pictures.batch(torch.arange(2))
    tokens, mean = pipeline.vilex(pixels), pipeline.vilex.encoder(pixels).mean(1)
    expected = torch.cat([mean, tokens[:, :16].flatten(1)], 1)
    assert torch.allclose(whole["+ first 16 ViLex tokens"][:2], expected, atol=1e-5)


def test_sentences_have_length_one_and_their_padding_does_not_matter():
    tokenizer = build_tokenizer("bert")
    encoder = build_bert(len(tokenizer))
    texts = ["red dog", "a photo of a green cat on the beach", "blue"]
    together = embed_sentences(texts, tokenizer, encoder)
    alone = torch.cat([embed_sentences([text], tokenizer, encoder) for text in texts])
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    assert torch.allclose(together, alone, atol=1e-5)


def test_recall_counts_the_first_own_caption_and_chance_is_that_of_random_order():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(200, 6, generator=generator)
    mixing = torch.randn(6, 8, generator=generator)
    features = torch.randn(30, 6, generator=generator)
    owners = torch.arange(60) // 2
    captions = (features @ mixing)[owners]
    recall = caption_recall(features, captions, owners, gallery, gallery @ mixing)
    assert recall == {1: 1.0, 5: 1.0, 10: 1.0}
    strangers = caption_recall(features, captions.roll(30, 0), owners, gallery, gallery @ mixing)
    assert strangers[1] == 0
    assert chance_recall(owners)[1] == pytest.approx(2 / 60)
    assert chance_recall(owners)[5] == pytest.approx(1 - (58 * 57 * 56 * 55 * 54) / (60 * 59 * 58 * 57 * 56))
