"""The sampling loop: steps, branches, seeds and stopping."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning, TextToImage, build_noise_scheduler
from vilex.prompt import compose
from vilex.sampling import (
    Conditions,
    build_generators,
    build_scheduler,
    count_branches,
    draw_noise,
    sample,
    sample_steps,
)


def encode(t2i: TextToImage, text: str, *vectors: Tensor) -> Conditioning:
    with torch.no_grad():
        return t2i.encode_prompt(compose(text, vectors, t2i.tokenizer, t2i.config.context_length))


@pytest.fixture
def conditions(t2i) -> Conditions:
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    return Conditions(encode(t2i, ""), encode(t2i, "<image>", vectors), encode(t2i, "a <image> dog", vectors))


def spy(t2i: TextToImage) -> list[tuple[int, int]]:
    """(timestep, batch rows) of each call of the denoiser from now on."""
    calls, denoise = [], t2i.denoise

    def counted(noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning) -> Tensor:
        assert len(noisy_latents) == len(timesteps) == len(condition.prompt_embeds)
        calls.append((int(timesteps[0]), len(noisy_latents)))
        return denoise(noisy_latents, timesteps, condition)

    t2i.denoise = counted
    return calls


def oracle(t2i: TextToImage, clean: Tensor) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """A denoiser that knows the clean picture (1,C,h,w)."""

    def denoise(noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning) -> Tensor:
        timesteps = timesteps.long()
        alpha_bar = t2i.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        noise = (noisy_latents - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return t2i.target(clean.expand_as(noise), noise, timesteps)

    return denoise


def recover(t2i: TextToImage, name: str, steps: int, prediction_type: str) -> tuple[Tensor, list[Tensor]]:
    """The oracle's clean picture, and the sampler's estimate after each step."""
    t2i.scheduler = t2i.scheduler.from_config(t2i.scheduler.config, prediction_type=prediction_type)
    clean = torch.rand(1, *t2i.latent_shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
    t2i.denoise = oracle(t2i, clean)
    config = GenerationConfig(num_inference_steps=steps, scheduler=name, guidance_scale=3, num_images=2)
    condition = encode(t2i, "dog")
    return clean, [step.latents for step in sample_steps(t2i, Conditions(condition, joint=condition), config)]


any_steps = given(steps=st.integers(1, 100))
few = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["dpm++", "sde-dpm++", "ddim", "ddpm"])
@few
@any_steps
@example(steps=1)
@example(steps=7)  # does not divide 1000
@example(steps=61)  # diffusers' own spacing has 62 timesteps
def test_an_oracle_gives_the_picture_back_in_pixel_space(t2i, name, prediction_type, steps):
    clean, estimates = recover(t2i, name, steps, prediction_type)
    assert len(estimates) == steps
    for estimate in estimates:
        torch.testing.assert_close(estimate, clean.expand(2, -1, -1, -1), atol=2e-3, rtol=0)
    torch.testing.assert_close(estimates[-1], clean.expand(2, -1, -1, -1), atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", ["dpm++", "sde-dpm++", "ddim", "ddpm", "euler"])
@few
@any_steps
@example(steps=1)
@example(steps=61)
def test_an_oracle_gives_the_picture_back_in_latent_space(stable_diffusion, name, steps):
    clean, estimates = recover(stable_diffusion, name, steps, "epsilon")
    assert len(estimates) == steps
    torch.testing.assert_close(estimates[-1], clean.expand(2, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["dpm++", "sde-dpm++", "ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 20, 61, 200])
def test_sampling_starts_at_pure_noise(t2i, conditions, name, steps):
    timesteps = build_scheduler(name, t2i, steps).timesteps
    assert timesteps[0] >= 990
    assert timesteps[-1] >= 0
    assert len(timesteps.unique()) == steps
    assert timesteps[-1] < 1000 / steps  # and ends a spacing above the clean picture


def test_a_scheduler_that_does_not_suit_is_refused(t2i):
    message = r"scheduler 'euler' does not suit this model, which takes sde-dpm\+\+, ddpm, dpm\+\+, ddim"
    with pytest.raises(ValueError, match=message):
        build_scheduler("euler", t2i, 4)


def test_auto_is_the_best_for_the_model(t2i, stable_diffusion, conditions):
    assert t2i.pick_scheduler("auto") == "sde-dpm++" and stable_diffusion.pick_scheduler("auto") == "dpm++"
    drawn = {
        name: sample(t2i, conditions, GenerationConfig(num_inference_steps=3, scheduler=name))
        for name in ("auto", "sde-dpm++", "ddpm", "dpm++")
    }
    assert torch.equal(drawn["auto"], drawn["sde-dpm++"])
    for other in ("ddpm", "dpm++"):
        assert not torch.allclose(drawn["auto"], drawn[other], atol=0.01)


def test_ddpm_is_the_posterior_of_the_training_noise(t2i, conditions):
    """Against diffusers' DDIM at eta 1, which is DDPM's sampler, with the same fresh noise."""
    clean = torch.rand(1, *t2i.latent_shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
    t2i.denoise = oracle(t2i, clean)
    scheduler = build_scheduler("ddpm", t2i, 5)
    reference = DDIMScheduler.from_config(
        t2i.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    reference.set_timesteps(5)
    scheduler.set_timesteps(timesteps=reference.timesteps.tolist())  # ours are spaced from lambda_min on
    torch.manual_seed(0)
    sample_now, fresh = torch.randn(2, 1, *t2i.latent_shape)
    for t in scheduler.timesteps[1:-1]:  # the last ends at the clean picture
        prediction = t2i.denoise(sample_now, t.expand(1), None)
        scheduler._step_index = None
        a = scheduler.step(prediction, t, sample_now, variance_noise=fresh, return_dict=False)[0]
        b = reference.step(prediction, t, sample_now, eta=1.0, variance_noise=fresh, return_dict=False)[0]
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["sde-dpm++", "ddpm"])
def test_fresh_noise_comes_from_each_pictures_own_seed(t2i, conditions, name):
    config = GenerationConfig(num_inference_steps=4, scheduler=name)
    both = sample(t2i, conditions, config, seeds=[8, 3])
    for i, seed in enumerate((8, 3)):
        torch.testing.assert_close(both[i : i + 1], sample(t2i, conditions, config, seeds=[seed]), atol=1e-4, rtol=0)
    assert not torch.allclose(both[0], both[1], atol=0.01)


def test_what_leaves_the_range_is_clipped_in_pixel_space(t2i, conditions):
    t2i.denoise = oracle(t2i, torch.full((1, *t2i.latent_shape), 3.0))
    for name in ("dpm++", "sde-dpm++", "ddim", "ddpm"):
        latents = sample(t2i, conditions, GenerationConfig(num_inference_steps=3, scheduler=name))
        assert torch.equal(latents, torch.ones_like(latents))


@pytest.mark.parametrize("name", ["dpm++", "sde-dpm++", "ddim", "ddpm"])
def test_estimates_are_cored(t2i, conditions, name):
    """12.75 of 255 levels are a tenth of half the range: so much of a checkerboard is gone, in the middle of it."""
    size = torch.arange(t2i.image_size)
    board = ((size[:, None] + size) % 2 - 0.5).expand(1, 3, -1, -1)
    t2i.denoise = oracle(t2i, t2i.encode(board))
    config = GenerationConfig(num_inference_steps=3, scheduler=name)
    plain = t2i.decode(sample(t2i, conditions, config))
    t2i.config = replace(t2i.config, coring=12.75)
    cored = t2i.decode(sample(t2i, conditions, config))
    torch.testing.assert_close(plain, board, atol=1e-4, rtol=0)
    torch.testing.assert_close(cored[..., 1:-1, 1:-1], 0.8 * board[..., 1:-1, 1:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("guidance_scale", "tfg_scale", "branches"), [(1, 1, 1), (1, 0, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3), (0, 0, 1)]
)
def test_one_call_per_step_with_no_row_of_weight_zero(t2i, conditions, guidance_scale, tfg_scale, branches):
    calls = spy(t2i)
    config = GenerationConfig(num_inference_steps=3, num_images=2, guidance_scale=guidance_scale, tfg_scale=tfg_scale)
    sample(t2i, conditions, config)
    assert [rows for _, rows in calls] == [2 * branches] * 3


def test_guidance_is_off_outside_its_interval(t2i, conditions):
    calls = spy(t2i)
    config = GenerationConfig(num_inference_steps=10, tfg_scale=3, guidance_low=0.3, guidance_high=0.7)
    sample(t2i, conditions, config)
    assert {rows for t, rows in calls if 300 <= t <= 700} == {3}
    assert {rows for t, rows in calls if not 300 <= t <= 700} == {1}


def test_a_closed_interval_is_plain_conditioning(t2i, conditions):
    plain = GenerationConfig(num_inference_steps=3, guidance_scale=1)
    never = GenerationConfig(num_inference_steps=3, guidance_scale=7, guidance_low=1, guidance_high=1)
    assert torch.equal(sample(t2i, conditions, plain), sample(t2i, conditions, never))


def to_levels(t2i: TextToImage, latents: Tensor) -> Tensor:
    return (t2i.decode(latents.float()) + 1) * 127.5


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(t2i, conditions):
    config = GenerationConfig(seed=11, num_images=3, num_inference_steps=4)
    batch = sample(t2i, conditions, config)
    assert torch.equal(batch, sample(t2i, conditions, config))
    for i in range(3):
        alone = sample(t2i, conditions, GenerationConfig(seed=11 + i, num_inference_steps=4))
        assert (to_levels(t2i, alone[0:1]) - to_levels(t2i, batch[i : i + 1])).abs().max() <= 2
    assert (to_levels(t2i, batch[0:1]) - to_levels(t2i, batch[1:2])).abs().mean() > 2


def test_a_picture_in_bfloat16_hardly_depends_on_its_batch(t2i, conditions):
    t2i.denoiser.to(torch.bfloat16)
    batch = sample(t2i, conditions, GenerationConfig(seed=11, num_images=3, num_inference_steps=4))
    assert batch.dtype == torch.float32
    for i in range(3):
        alone = sample(t2i, conditions, GenerationConfig(seed=11 + i, num_inference_steps=4))
        assert (to_levels(t2i, alone[0:1]) - to_levels(t2i, batch[i : i + 1])).abs().mean() <= 1


def test_given_seeds_and_a_condition_per_picture(t2i, conditions):
    both = Conditions(conditions.uncond, Conditioning.concatenate([conditions.image, conditions.joint]))
    config = GenerationConfig(num_inference_steps=3)
    batch = sample(t2i, both, config, seeds=[8, 3])
    for i, (seed, condition) in enumerate([(8, conditions.image), (3, conditions.joint)]):
        alone = sample(t2i, Conditions(conditions.uncond, condition), config, seeds=[seed])
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=0)


def test_noise_of_a_seed_is_the_same_in_every_batch():
    noise = draw_noise(build_generators([4, 2**32 - 1]), (2, 3, 5))
    assert noise.shape == (2, 2, 3, 5)
    assert torch.equal(noise[1:], draw_noise(build_generators([2**32 - 1]), (2, 3, 5)))
    assert not torch.equal(noise[0], noise[1])


def test_closing_stops_at_once(t2i, conditions):
    calls = spy(t2i)
    steps = sample_steps(t2i, conditions, GenerationConfig(num_inference_steps=20))
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2
    assert list(steps) == []


def test_every_step_is_announced_once_with_an_estimate(t2i, conditions):
    seen = []
    config = GenerationConfig(num_inference_steps=5, num_images=2)
    result = sample(t2i, conditions, config, on_step=lambda *step: seen.append(step))
    assert [(index, count) for index, count, _ in seen] == [(i, 5) for i in range(5)]
    assert all(latents.shape == (2, *t2i.latent_shape) for _, _, latents in seen)
    assert seen[-1][2] is result


def test_no_gradient_is_kept(t2i, conditions):
    vectors = torch.randn(5, 8, requires_grad=True)
    condition = t2i.encode_prompt(compose("<image>", [vectors], t2i.tokenizer, 24))
    for step in sample_steps(t2i, Conditions(conditions.uncond, condition), GenerationConfig(num_inference_steps=2)):
        assert not step.latents.requires_grad
        assert torch.is_grad_enabled()  # the caller's own state between steps


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_output_that_is_not_finite_is_reported(t2i, conditions, value):
    t2i.scheduler = build_noise_scheduler()
    t2i.denoise = lambda noisy_latents, timesteps, condition: noisy_latents * value
    with pytest.raises(FloatingPointError, match="values that are not finite at step 1; try dtype float32"):
        sample(t2i, conditions, GenerationConfig(num_inference_steps=3))


@pytest.mark.parametrize("name", ["dpm++", "sde-dpm++", "ddim", "ddpm", "euler"])
def test_pictures_that_leave_the_batch_do_not_change_the_others(stable_diffusion, name):
    t2i, config = stable_diffusion, GenerationConfig(num_inference_steps=6, scheduler=name)
    texts = [encode(t2i, text) for text in ("dog", "cat", "a red house")]
    conditions = Conditions(encode(t2i, ""), joint=Conditioning.concatenate(texts))
    steps = sample_steps(t2i, conditions, config, seeds=[7, 3, 5])
    calls = spy(t2i)
    next(steps)
    next(steps)
    assert len(steps.send(torch.tensor([2, 0])).latents) == 2
    assert len(next(steps).latents) == 2
    last = steps.send(torch.tensor([1]))
    assert [rows for _, rows in calls] == [6, 6, 4, 4, 2]
    *_, last = steps
    alone = sample(t2i, Conditions(conditions.uncond, joint=texts[0]), config, seeds=[7])
    assert (to_levels(t2i, last.latents) - to_levels(t2i, alone)).abs().max() <= 2


def test_the_denoiser_reads_no_more_padding_than_the_longest_prompt_needs(t2i, conditions, monkeypatch):
    lengths, denoise = set(), t2i.denoise

    def noted(noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning) -> Tensor:
        lengths.add(condition.prompt_embeds.shape[1])
        return denoise(noisy_latents, timesteps, condition)

    t2i.denoise = noted
    config = GenerationConfig(num_inference_steps=3, tfg_scale=2)
    trimmed = sample(t2i, conditions, config)
    assert lengths == {16}  # the longest of them takes 9
    monkeypatch.setattr(Conditioning, "trimmed", lambda condition: condition)
    whole = sample(t2i, conditions, config)
    assert lengths == {16, t2i.config.context_length} and t2i.config.context_length > 16
    torch.testing.assert_close(trimmed, whole, atol=1e-4, rtol=0)


def test_conditions_for_another_number_of_pictures_are_refused(t2i, conditions):
    both = Conditions(conditions.uncond, Conditioning.concatenate([conditions.image] * 2))
    with pytest.raises(ValueError, match="conditions for 2 pictures cannot serve 3"):
        next(sample_steps(t2i, both, GenerationConfig(num_images=3)))


@pytest.mark.parametrize(
    ("guidance_scale", "tfg_scale", "branches"),
    [(1, 1, 1), (1, 0.5, 2), (2, 1, 3), (2, 2, 2), (0.5, 0.5, 2), (2, 0, 2)],
)
def test_the_most_branches_of_any_step(t2i, conditions, guidance_scale, tfg_scale, branches):
    config = GenerationConfig(
        guidance_scale=guidance_scale, tfg_scale=tfg_scale, guidance_high=0.5, num_inference_steps=4
    )
    calls = spy(t2i)
    sample(t2i, conditions, config)
    assert count_branches(conditions, config) == branches == max(rows for _, rows in calls)
