"""Ours equals the stock libraries' own code: prompts bit for bit, samples to rounding."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from vilex.config import GenerationConfig
from vilex.diffusion import TextToImage
from vilex.prompt import compose
from vilex.sampling import Conditions, build_generators, draw_noise, sample

TEXT = "a red dog on the beach , monet style"
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


def encode(t2i: TextToImage, text: str):
    return t2i.encode_prompt(compose(text, [], t2i.tokenizer, t2i.config.context_length))


@pytest.fixture
def stock(stable_diffusion, tmp_path: Path) -> StableDiffusionPipeline:
    stable_diffusion.save_pretrained(tmp_path, dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_words_alone_equal_stock_bert_with_mean_pooling(t2i):
    batch = t2i.tokenizer(TEXT, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        states = t2i.text_encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask[..., None].float()
        ours = encode(t2i, TEXT)
    assert torch.equal(ours.prompt_embeds, states)
    assert torch.equal(ours.pooled, (states * mask).sum(1) / mask.sum(1))
    assert torch.equal(ours.mask, batch.attention_mask.bool())


@pytest.mark.parametrize("text", [TEXT, "", "dog " * 22])
def test_words_alone_equal_stable_diffusions_own_encoding(stable_diffusion, stock, text):
    with torch.no_grad():
        expected, _ = stock.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        ours = encode(stable_diffusion, text)
    assert torch.equal(ours.prompt_embeds, expected)
    assert ours.pooled is None and ours.mask is None


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 3.0), (4, 1.0), (20, 3.0)])
def test_samples_equal_stable_diffusions_own(stable_diffusion, stock, name, steps, guidance_scale):
    stock.scheduler = SCHEDULERS[name].from_config(
        stable_diffusion.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    noise = draw_noise(build_generators([5, 6]), stable_diffusion.latent_shape)
    expected = stock(
        TEXT, num_images_per_prompt=2, latents=noise, num_inference_steps=steps, guidance_scale=guidance_scale,
        negative_prompt="blue cat", output_type="latent",
    ).images  # fmt: skip
    config = GenerationConfig(
        seed=5, num_images=2, num_inference_steps=steps, guidance_scale=guidance_scale, scheduler=name
    )
    with torch.no_grad():
        conditions = Conditions(encode(stable_diffusion, "blue cat"), joint=encode(stable_diffusion, TEXT))
    ours = sample(stable_diffusion, conditions, config)
    scale = expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, atol=2e-5, rtol=0)
