"""Training through finished models, and the number formats that they compute in."""

import copy
from functools import partial

import pytest
import torch
import training
from cases import FLOWS, PARTS, TEXT, draw, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train import train_vilex
from train.batches import tabulate
from vilex.config import GenerationConfig
from vilex.diffusion import load_t2i
from vilex.loss import diffusion_loss, draw_noise
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose_leading, special_tokens


def test_thirty_steps_on_one_batch_halve_the_loss(case):
    t2i = copy.deepcopy(case.t2i)
    t2i.denoiser.requires_grad_(True).train()
    captions = tabulate([["a red dog"], ["blue cat"]], t2i.tokenizer, t2i.config.context_length)
    prompt = captions.prompt(torch.arange(2), torch.zeros(2).long(), trim=False)
    vectors = torch.randn(2, 3, t2i.text_width, requires_grad=True)
    latents = t2i.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    noise = draw_noise(t2i, 2, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([*t2i.denoiser.parameters(), vectors], lr=1e-2)
    losses = []
    for _ in range(31):
        ids, mask = prompt.input_ids[:, 1:5], prompt.attention_mask[:, 2:6]
        leading = compose_leading(ids, mask, vectors, special_tokens(t2i.tokenizer), t2i.config.context_length)
        loss = diffusion_loss(t2i, t2i.denoiser, latents, t2i.encode_prompt(leading), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (vectors.grad.abs().sum((0, 1)) > 0).all()


def test_what_was_trained_through_a_model_draws_after_loading(case, tmp_path, picture, monkeypatch):
    training.write_table(tmp_path / "pictures.parquet")
    monkeypatch.setattr(train_vilex, "GenerationConfig", partial(GenerationConfig, num_inference_steps=1))
    flags = ("--preset", "tiny", "--t2i", case.folder, "--data", tmp_path / "pictures.parquet", "--fp32")
    training.succeed(train_vilex.main, *flags, "--max-steps", 2, "--out", tmp_path / "out")
    loaded = [
        VilexPipeline.from_pretrained(str(tmp_path / "out" / "weights"), device="cpu", dtype="float32")
        for _ in range(2)
    ]
    assert not torch.equal(loaded[0].encode(picture), loaded[0].encode(picture.rotate(180)))
    config = GenerationConfig(num_inference_steps=2, num_tokens=5)
    drawn = [pipeline.generate("<image> dog", [picture], config).images[0].tobytes() for pipeline in loaded]
    assert drawn[0] == drawn[1]


def test_a_step_in_mixed_precision_is_close_to_one_in_fp32(case):
    t2i, pixels = case.t2i, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vectors = torch.randn(3, t2i.text_width, generator=torch.Generator().manual_seed(3), requires_grad=True)
    noise = draw_noise(t2i, 2, torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        condition = encode(t2i, "a <image> dog", vectors).expand(2)
        return diffusion_loss(t2i, t2i.denoiser, t2i.encode(pixels), condition, noise)

    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss()
    mixed.backward()
    assert mixed.dtype == torch.float32 and vectors.grad.abs().sum() > 0
    assert mixed.item() == pytest.approx(loss().item(), rel=0.05)


def test_a_denoiser_in_bfloat16_draws_nearly_the_same(case):
    t2i = copy.deepcopy(case.t2i)
    with torch.no_grad():
        condition = encode(t2i, TEXT)
    expected = draw(t2i, condition)
    t2i.denoiser.to(torch.bfloat16)
    drawn = draw(t2i, condition)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - expected).abs().mean() < 0.05 * expected.std()


@torch.no_grad()
def test_an_offloaded_model_draws_the_same_and_passes_no_gradient(case, picture):
    t2i = load_t2i(case.folder)
    expected, pixels = draw(t2i, encode(t2i, TEXT)), torch.rand(1, 3, 16, 16) * 2 - 1
    latents, tokens = t2i.encode(pixels), torch.randn(2, t2i.text_width)
    t2i.offload(torch.device("cpu"))
    assert torch.equal(draw(t2i, encode(t2i, TEXT)), expected)
    assert torch.equal(t2i.encode(pixels), latents) and t2i.decode(latents).shape == (1, 3, 16, 16)
    assert encode(t2i, "a <image>", tokens).prompt_embeds.isfinite().all()
    with pytest.raises(ValueError, match="gradients cannot pass an offloaded model: polish without --offload"):
        VilexPipeline(t2i).polish(picture, 2, steps=1)


def test_parts_compute_in_the_dtype_asked_for_where_that_is_safe(case):
    fp32 = {"sd": set(), "sdxl": {"vae"}, "sd3": {"text_encoder_3"}, "flux": {"text_encoder_2"}}[case.kind]
    t2i = load_t2i(case.folder, dtype=torch.bfloat16)
    for name in PARTS[case.kind]:
        wanted = torch.float32 if name in fp32 else torch.bfloat16
        assert {p.dtype for p in t2i.parts()[name].parameters()} == {wanted}
    whole = load_t2i(case.folder)
    whole.cast(torch.bfloat16)
    assert all(torch.equal(tensor, t2i.state_dict()[name]) for name, tensor in whole.state_dict().items())
    pipeline = VilexPipeline(t2i)
    assert pipeline.fingerprint == VilexPipeline(case.t2i).fingerprint
    drawn = pipeline.generate("a <image>", [torch.randn(3, t2i.text_width)], GenerationConfig(num_inference_steps=2))
    assert drawn.images[0].size == (16, 16)
    assert t2i.encode(torch.rand(1, 3, 16, 16)).dtype == t2i.word_statistics()[0].dtype == torch.float32


@settings(max_examples=20)
@given(level=st.floats(0.02, 1), seed=st.integers(0, 99))
def test_the_clean_picture_follows_from_noise_and_target(case, level, seed):
    t2i, generator = case.t2i, torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(2, *t2i.latent_shape, generator=generator) for _ in range(2))
    timesteps = torch.tensor([level * 999, 500.0])
    timesteps = timesteps if case.kind in FLOWS else timesteps.long()
    noisy, target = t2i.add_noise(latents, noise, timesteps), t2i.target(latents, noise, timesteps)
    estimate = t2i.estimate_clean(noisy, target, timesteps)
    torch.testing.assert_close(estimate, latents, atol=1e-3, rtol=1e-3)
    assert torch.equal(estimate[:1], t2i.estimate_clean(noisy[:1], target[:1], timesteps[0]))
