"""The perceptual loss: what it measures, whom it teaches, and that it is off unless asked for."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import training
from sklearn.datasets import load_sample_image
from torch import Tensor
from training import Teacher, assert_same, build_t2i_run, reset_accelerate, snapshot

from train import perceptual, train_t2i, train_vilex
from train.nets import STAGES_SIZE, EfficientNetLite2, load_efficientnet, resize
from train.perceptual import PerceptualLoss, build_perceptual
from train.presets import PRESETS
from train.run import RunOptions, load_data, override
from train.state import _step
from vilex.images import from_levels
from vilex.loss import diffusion_loss, draw_noise

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    return training.write_files(tmp_path_factory.mktemp("perceptual"))


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    monkeypatch.setattr(perceptual, "load_efficientnet", Teacher)


def test_equal_pictures_are_at_0_and_opposite_features_at_4_a_stage():
    loss = PerceptualLoss(Teacher(), 2, weight=1.0)
    a, b = torch.randn(2, 3, 12, 16, 20)
    assert loss(a, a) == 0 < loss(a, b)
    assert loss(torch.cat([a, b]), a).item() == pytest.approx(loss(b, a).item() / 2)  # two draws of each picture
    assert PerceptualLoss(Teacher(), 2, weight=0.5)(a, b).item() == pytest.approx(loss(a, b).item() / 2)
    maps = iter([[torch.ones(2, 3, 4, 5)], [-torch.ones(2, 3, 4, 5)]])
    assert PerceptualLoss(SimpleNamespace(stages=lambda pixels: next(maps)), 2, 1.0)(a, b).item() == pytest.approx(4)


def test_pictures_are_seen_as_pictures():
    """The latents are folded pixels: the teacher gets them unfolded."""
    seen, pixels = [], torch.randn(2, 3, 12, 20)
    teacher = SimpleNamespace(stages=lambda pixels: seen.append(pixels) or [pixels])
    PerceptualLoss(teacher, 4, 1.0)(F.pixel_unshuffle(pixels, 4), F.pixel_unshuffle(pixels + 1, 4))
    assert torch.equal(seen[0], pixels + 1)
    assert torch.equal(seen[1], pixels)


def test_a_gradient_reaches_the_estimate_alone():
    loss = PerceptualLoss(Teacher(), 2, 1.0)
    a, b = torch.randn(2, 3, 12, 16, 20).unbind()
    a.requires_grad_()
    b.requires_grad_()
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    assert not any(p.requires_grad for p in loss.parameters())


def test_the_real_teacher_has_five_stages_and_sees_small_pictures_larger():
    net, pixels = EfficientNetLite2().eval(), torch.rand(1, 3, 48, 48, requires_grad=True)
    maps = net.stages(pixels)
    assert [m.shape[-1] for m in maps] == [-(-STAGES_SIZE // stride) for stride in (2, 4, 8, 16, 32)]
    maps[-1].sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert net.stages(torch.rand(1, 3, 160, 160))[0].shape[-2:] == (70, 70)


def test_odd_and_even_pixels_weigh_alike():
    """Else what is drawn has a grid of dots: at twice the side they differ by a third, in one stage twofold."""
    teacher = load_efficientnet()
    china = from_levels(torch.tensor(load_sample_image("china.jpg")[:400, 100:500]).permute(2, 0, 1)[None])
    pixels = resize(china, 64)
    blurred = F.avg_pool2d(pixels, 3, 1, padding=1).requires_grad_()
    PerceptualLoss(teacher, 1, 1.0)(blurred, pixels).backward()
    power = torch.stack([blurred.grad[..., y::2, x::2].square().mean() for y in (0, 1) for x in (0, 1)])
    assert power.max() < 1.2 * power.min()


def test_what_is_compared_is_the_x0_of_each_noise(files, tmp_path):
    """A denoiser that predicts just what it should implies the very picture, at every timestep."""
    t2i = build_t2i_run(files, tmp_path).t2i
    latents = torch.randn(2, *t2i.latent_shape)
    condition = train_t2i.Conditioning(torch.randn(2, 3, 16), torch.randn(2, 16))
    noise = draw_noise(t2i, 6, torch.Generator().manual_seed(0))
    thrice = latents.repeat(3, 1, 1, 1)
    t2i.denoise = lambda noisy, timesteps, *_: t2i.target(thrice, noise.values, timesteps)
    compared = []

    def distance(estimate: Tensor, of: Tensor) -> Tensor:
        compared.append((estimate, of))
        return torch.tensor(7.0)

    loss = diffusion_loss(t2i, t2i.denoiser, latents, condition, noise, 0.0, distance)
    assert loss.item() == pytest.approx(7)
    torch.testing.assert_close(compared[0][0], thrice, atol=1e-4, rtol=1e-4)
    assert torch.equal(compared[0][1], latents)


def test_off_there_is_no_teacher(files, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "load_efficientnet", None)  # calling it would fail
    assert build_t2i_run(files, tmp_path).perceptual is None


def test_latents_are_not_pictures():
    with pytest.raises(ValueError, match="perceptual_weight 0.5 needs a model that draws pixels"):
        build_perceptual(SimpleNamespace(embedded=False), 0.5)


def test_tokens_learn_from_it(files, tmp_path):
    t2i = build_t2i_run(files, tmp_path).t2i
    pictures, _ = load_data(32, [files.data])

    def gradient(weight: float) -> Tensor:
        reset_accelerate()
        model, options = train_vilex.build_model(TINY, t2i, seed=0), RunOptions(tmp_path / f"{weight}", fp32=True)
        config = override(TINY.vilex, {"perceptual_weight": weight})
        run = train_vilex.VilexRun(t2i, model, pictures, None, TINY, config, options)
        run.loss(0, 0).backward()
        return torch.cat([p.grad.flatten() for p in run.module.parameters()])

    plain, both = gradient(0.0), gradient(1.0)
    assert (both - plain).norm() > 0.1 * plain.norm() > 0


def test_the_denoiser_learns_from_it_and_the_teacher_does_not(files, tmp_path, monkeypatch):
    def perceptual_alone(*given):
        return diffusion_loss(*given) - diffusion_loss(*given[:-1], None)

    run = build_t2i_run(files, tmp_path, perceptual_weight=1.0, learning_rate=3e-3, warmup_steps=0, max_steps=100)
    plain, both = build_t2i_run(files, tmp_path).loss(0, 0), run.loss(0, 0)
    assert both > plain
    before = snapshot(run.perceptual)
    monkeypatch.setattr(train_t2i, "diffusion_loss", perceptual_alone)
    losses = [_step(run.state, run.model, lambda step, micro: run.loss(0, micro))[0].item() for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0], losses
    assert_same(before, snapshot(run.perceptual))
    assert not any("perceptual" in name or "teacher" in name for name in run.module.state_dict())
