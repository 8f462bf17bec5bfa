"""Stable Diffusion, SDXL, Stable Diffusion 3, Flux: each behaves as its stock pipeline."""

import pytest
import torch
from builders import build_pipeline
from cases import FLOWS, LONG, PARTS, TEXT, Case, build_case, draw, encode, stock_encode
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from vilex import flux as flux_module
from vilex.config import GenerationConfig
from vilex.diffusion import load_t2i
from vilex.sampling import Conditions, build_generators, sample
from vilex.sampling import draw_noise as draw_latents


def test_every_part_is_the_one_that_diffusers_wrote(case):
    stock = build_pipeline(case.kind)
    for name in PARTS[case.kind]:
        expected, ours = getattr(stock, name).state_dict(), case.t2i.parts()[name].state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXT, "dog", LONG])
def test_words_alone_equal_the_stock_pipelines_own_encoding(case, text):
    expected, _, pooled, _ = stock_encode(case, text, do_classifier_free_guidance=False)
    ours = encode(case.t2i, text)
    assert torch.equal(ours.prompt_embeds, expected)
    assert (ours.pooled is None) == (pooled is None) == (case.kind == "sd")
    assert pooled is None or torch.equal(ours.pooled, pooled)


@torch.no_grad()
def test_nothing_equals_the_stock_pipelines_default_negative(case):
    _, expected, _, pooled = stock_encode(case, TEXT, do_classifier_free_guidance=True)
    ours = encode(case.t2i, "")
    assert torch.equal(ours.prompt_embeds, expected)
    assert pooled is None or torch.equal(ours.pooled, pooled)


@torch.no_grad()
def test_nothing_is_words_to_an_sdxl_that_says_so(tmp_path):
    case = build_case("sdxl", tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("true", "false"))
    expected, _, pooled, _ = stock_encode(case, "", do_classifier_free_guidance=False)
    ours = encode(load_t2i(tmp_path), "")
    assert torch.equal(ours.prompt_embeds, expected) and torch.equal(ours.pooled, pooled)
    assert expected.abs().max() > 0.1


def stock_samples(case: Case, negative: str | None, steps: int) -> Tensor:
    """Latents of seeds 5 and 6 that diffusers' own pipeline draws of TEXT at guidance 3."""
    latents = draw_latents(build_generators([5, 6]), case.t2i.latent_shape)
    shared = {"num_images_per_prompt": 2, "num_inference_steps": steps, "output_type": "latent"}
    if case.kind not in FLOWS and case.kind != "flux-schnell":
        scheduler = EulerDiscreteScheduler.from_config(case.stock.scheduler.config, timestep_spacing="trailing")
        case.stock.scheduler = scheduler
    if not case.kind.startswith("flux"):
        return case.stock(TEXT, latents=latents, guidance_scale=3.0, negative_prompt=negative, **shared).images
    packed = case.stock._pack_latents(latents, *latents.shape)
    drawn = case.stock(
        TEXT, latents=packed, true_cfg_scale=3.0, negative_prompt=negative or "", height=16, width=16,
        guidance_scale=3.5, max_sequence_length=case.t2i.t5_length, **shared,
    ).images  # fmt: skip
    return case.stock._unpack_latents(drawn, 16, 16, case.stock.vae_scale_factor)


@torch.no_grad()
@pytest.mark.parametrize("negative", ["blue cat", None])
@pytest.mark.parametrize("steps", [1, 7])
def test_samples_equal_the_stock_pipelines_own(case, steps, negative):
    expected = stock_samples(case, negative, steps)
    conditions = Conditions(encode(case.t2i, negative or ""), joint=encode(case.t2i, TEXT))
    config = GenerationConfig(seed=5, num_images=2, num_inference_steps=steps, guidance_scale=3.0, scheduler="euler")
    ours, scale = sample(case.t2i, conditions, config), expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, atol=1e-4, rtol=0)
    other = sample(case.t2i, Conditions(conditions.uncond, joint=encode(case.t2i, "a green sketch")), config)
    assert (other - expected).abs().max() / scale > 1e-2  # words matter far more than the tolerance


@torch.no_grad()
def test_a_flux_without_distilled_guidance_draws_as_the_stock_pipeline(tmp_path):
    test_samples_equal_the_stock_pipelines_own(build_case("flux-schnell", tmp_path), 4, "blue cat")


@torch.no_grad()
def test_distilled_guidance_is_told_and_counts(flux, monkeypatch):
    condition = encode(flux, TEXT)
    drawn = draw(flux, condition)
    monkeypatch.setattr(flux_module, "GUIDANCE", 1.0)
    assert (draw(flux, condition) - drawn).abs().max() > 1e-4


@torch.no_grad()
def test_pictures_equal_the_stock_pipelines_own(case):
    latents = torch.randn(2, *case.t2i.latent_shape)
    config = case.stock.vae.config
    expected = case.stock.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample.clamp(-1, 1)
    assert torch.equal(case.t2i.decode(latents), expected)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    again = case.t2i.encode(pixels) / config.scaling_factor + (config.shift_factor or 0)
    torch.testing.assert_close(again, case.stock.vae.encode(pixels).latent_dist.mean)
    assert case.t2i.image_size == 16
