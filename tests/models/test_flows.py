"""Models that learn flows: how noise is added and drawn, and sampling along the flow."""

import math

import pytest
import torch
from cases import encode
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning
from vilex.loss import loss_weights
from vilex.sampling import Conditions, build_scheduler, sample_steps


def test_a_flows_timesteps_are_drawn_as_in_its_own_training(sd3):
    timesteps = sd3.draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert timesteps.is_floating_point() and timesteps.min() > 0 and timesteps.max() <= 1000
    assert timesteps.median() == pytest.approx(750, abs=15)  # one half, shifted by 3
    share = (timesteps < 1000 * 3 * 0.269 / (1 + 2 * 0.269)).float().mean()  # a standard deviation below the median
    assert share == pytest.approx(0.159, abs=0.02)
    noisier = sd3.draw_timesteps(4000, torch.Generator().manual_seed(0), shift=3.0)
    assert noisier.max() <= 1000 and noisier.median() == pytest.approx(900, abs=10)  # one half, shifted by 9


def test_a_flow_goes_straight_from_the_picture_to_the_noise(flow):
    latents, noise = torch.rand(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    noisy = flow.add_noise(latents, noise, torch.tensor([0.0, 250.0, 1000.0]))
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(flow.target(latents, noise, torch.tensor([1.0, 2.0, 3.0])), noise - latents)
    assert flow.snr(torch.tensor([250.0, 500.0])).tolist() == pytest.approx([9, 1])
    weights = loss_weights(flow, torch.tensor([100.0, 500.0]), snr_gamma=5.0)
    assert weights.tolist() == pytest.approx([5 * 0.1**2, 0.5**2])  # of x0's error, in units of the velocity's
    assert loss_weights(flow, torch.tensor([100.0, 500.0])).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["dpm++", "ddim", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 9, 61, 100])
def test_an_oracle_gives_the_picture_back_along_a_flow(flow, monkeypatch, name, steps):
    clean = torch.randn(1, *flow.latent_shape, generator=torch.Generator().manual_seed(7))

    def denoise(noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning) -> Tensor:
        return (noisy_latents - clean) / (timesteps / 1000)[:, None, None, None]

    monkeypatch.setattr(flow, "denoise", denoise)
    condition = encode(flow, "dog")
    config = GenerationConfig(num_inference_steps=steps, scheduler=name, guidance_scale=3, num_images=2)
    estimates = [step.latents for step in sample_steps(flow, Conditions(condition, joint=condition), config)]
    assert len(estimates) == steps
    for estimate in estimates:
        torch.testing.assert_close(estimate, clean.expand(2, -1, -1, -1), atol=2e-3, rtol=0)


def test_flux_shifts_by_the_size_of_its_pictures(flux):
    mu = calculate_shift(16)  # an 8x8 latent in tokens of 2x2
    timesteps = flux.draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert timesteps.median() == pytest.approx(1000 / (1 + math.exp(-mu)), abs=15)
    dpm = build_scheduler("dpm++", flux, 5)
    assert dpm.timesteps[1] == pytest.approx(1000 * math.exp(mu) * 0.7992 / (1 + (math.exp(mu) - 1) * 0.7992), abs=0.1)


def test_ddim_along_a_flow_is_eulers_method(sd3):
    a, b = (build_scheduler(name, sd3, 5) for name in ("ddim", "euler"))
    assert torch.equal(a.timesteps, b.timesteps) and a.timesteps[0] == 1000
    dpm = build_scheduler("dpm++", sd3, 5)
    torch.testing.assert_close(dpm.timesteps, dpm.sigmas[:-1] * 1000)
    assert dpm.timesteps[0] > 999
    assert dpm.timesteps[1] == pytest.approx(922.7, abs=0.1)  # 799.2, shifted by 3
