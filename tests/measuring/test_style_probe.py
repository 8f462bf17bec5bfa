"""The style probe end to end on a table whose colours are its styles."""

import io
import json
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train import style_probe
from train.arms import Conditioner
from train.data import load_pictures
from train.judge import Judge
from vilex.config import GenerationConfig
from vilex.images import to_images
from vilex.sampling import sample

RECORDS = {
    "photo": {"source": "caltech101", "label": "dog"},
    "oil painting": {"source": "wikiart", "artist": "monet"},
    "pencil sketch": {"source": "pacs", "style": "sketch", "label": "dog"},
    "cartoon": {"source": "pacs", "style": "cartoon", "label": "cat"},
    "flat emoji": {"source": "emoji", "style": "Twitter flat emoji", "label": "dog"},
    "3D emoji": {"source": "emoji", "style": "Microsoft Fluent 3D emoji", "label": "dog"},
}
COLOURS = ((230, 40, 40), (40, 230, 40), (40, 40, 230), (230, 230, 40), (40, 230, 230), (230, 40, 230))


def write_styles(path, per_style, seed, styles=tuple(RECORDS)):
    chance, rows = np.random.default_rng(seed), []
    for i in range(per_style * len(styles)):
        kind = i % len(styles)
        file = io.BytesIO()
        levels = np.array(COLOURS[kind]) + chance.integers(-20, 20, (32, 32, 3))
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": ""}} | {"style": "", "artist": "", "label": ""}
                    | RECORDS[styles[kind]])  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def tables(tmp_path):
    return write_styles(tmp_path / "train.parquet", 6, 0), write_styles(tmp_path / "val.parquet", 2, 1)


def run(tables, out, *extra):
    data, validation = tables
    arguments = ["--data", str(data), "--validation", str(validation), "--out", str(out), "--steps", "1"]
    grid = ["--limit", "6", "--tokens", "1,4", "--tfg", "0,3", "--words-scale", "0,2", "--own-per-style", "2"]
    return CliRunner().invoke(style_probe.main, [*arguments, *grid, *extra])


def test_the_probe_knows_real_styles_and_rates_mixes(tables, tmp_path, stand_ins):
    result = run(tables, tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "styles.json").read_text())
    assert report["real_pictures"] == dict.fromkeys(("accuracy", *style_probe.STYLES), 1.0)  # colours tell them apart
    settings = [(row["num_tokens"], row["words_scale"], row["tfg_scale"]) for row in report["mixes"]]
    assert settings == list(product((1, 4), (0, 2), (0, 3)))
    random_pair, rebuilt = report["lpips_of_two_pictures"], report["lpips_rebuilt"]
    for row in report["mixes"]:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["own_accuracy"] <= 1
        assert row["kept"] == pytest.approx((random_pair - row["lpips"]) / (random_pair - rebuilt))
    assert len({row["lpips"] for row in report["mixes"][4:]}) == 4  # both scales change the pictures
    for name in ("styles.png", "styles-words.png", "styles-samples.png"):
        with Image.open(tmp_path / "out" / name) as figure:
            assert figure.width > figure.height


def paint(colours, count):
    """Plain levels (S,3,32,32) by style."""
    levels = torch.tensor(colours, dtype=torch.uint8)[:, None, :, None, None].expand(-1, count, 3, 32, 32)
    return dict(zip(style_probe.STYLES, levels, strict=True))


def test_perfect_mixes_are_recognised_and_a_picture_of_the_style_does_not_count(tables, stand_ins):
    pictures, other = load_pictures(tables[1], image_size=32), COLOURS[1:] + COLOURS[:1]
    judge = Judge(pictures, None, "cpu")
    probe = style_probe.StyleProbe(judge, load_pictures(tables[0], image_size=32), 6, paint(other, 6))
    rows = style_probe.has_other_style(pictures)
    assert {int(mask.sum()) for mask in rows.values()} == {len(pictures) - 2}
    painted, as_drawn = paint(COLOURS, len(pictures)), paint(other, len(pictures))
    assert style_probe.measure_styles(probe, rows, painted)["accuracy"] == 1
    assert style_probe.measure_styles(probe, rows, painted)["own_accuracy"] == 0
    assert style_probe.measure_styles(probe, rows, as_drawn)["own_accuracy"] == 1
    swapped = painted | {"photo": painted["cartoon"]}
    assert style_probe.measure_styles(probe, rows, swapped)["photo"] == 0
    same = {style: probe.judge.real for style in style_probe.STYLES}
    assert style_probe.measure_styles(probe, rows, same)["lpips"] == 0


@pytest.mark.parametrize("words_scale", [0.0, 4.0])
def test_a_mix_is_what_the_app_draws(pipeline, picture, words_scale):
    """The batched conditions of the probe against the pipeline's own road."""
    image = picture.resize((32, 32))
    config = GenerationConfig(num_tokens=4, num_inference_steps=2, tfg_scale=3.0, words_scale=words_scale)
    expected = pipeline.generate("<image>, red sketch", [image], config).images[0]
    pixels = pipeline._pixels([image], "crop")
    conditions = Conditioner(pipeline).mixes(pixels, 4, ", red sketch")
    drawn = to_images(pipeline.t2i.decode(sample(pipeline.t2i, conditions, config)))[0]
    assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 2


def test_words_have_precedence_over_the_tail_of_the_tokens(pipeline, picture):
    """A context of 24 has 22 places: for 22 tokens and three words only 19 tokens stay."""
    pixels = pipeline._pixels([picture], "crop")
    conditioner = Conditioner(pipeline)
    full, cut = (conditioner.mixes(pixels, n, ", red sketch") for n in (22, 19))
    assert torch.equal(full.joint.prompt_embeds, cut.joint.prompt_embeds)
    assert full.joint.mask.all()


def test_pictures_that_are_all_of_one_style_are_refused(tmp_path):
    pictures = load_pictures(write_styles(tmp_path / "one.parquet", 3, 0, ("cartoon",)), image_size=32)
    with pytest.raises(ValueError, match="all pictures to mix are of the style cartoon"):
        style_probe.has_other_style(pictures)


def test_a_style_without_pictures_is_named(tables, tmp_path, stand_ins):
    data = write_styles(tmp_path / "few.parquet", 3, 0, ("photo", "cartoon"))
    result = run((data, tables[1]), tmp_path / "out")
    assert result.exit_code == 2
    assert "no pictures of the style oil painting, pencil sketch" in " ".join(result.output.split())
