"""Stable Diffusion, SDXL, Stable Diffusion 3, Flux: each loads from diffusers' files and behaves as its pipeline."""

import copy
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import training
from builders import build_pipeline, build_tokenizer
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.balance import Balance
from app.handlers import Handlers
from train import train_vilex
from train.batches import tabulate
from train.presets import PRESETS
from train.train_vilex import build_model
from vilex import checkpoint, diffusion
from vilex import flux as flux_module
from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning, TextToImage, load_t2i
from vilex.latent import StableDiffusionXL
from vilex.loss import diffusion_loss, draw_noise, loss_weights
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose, compose_leading, embedding_module, recompose, special_tokens
from vilex.sampling import Conditions, build_scheduler, sample, sample_steps
from vilex.sampling import draw_noise as draw_latents
from vilex.t2i import read_words

TEXT = "a red dog on the beach , monet style"
LONG = "dog cat " * 30
KINDS = ("sd", "sdxl", "sd3", "flux")
FLOWS = ("sd3", "flux")
PARTS = {
    "sd": ["unet", "vae", "text_encoder"],
    "sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["transformer", "vae", "text_encoder", "text_encoder_2"],
    "flux-schnell": ["transformer", "vae", "text_encoder", "text_encoder_2"],
}


@dataclass
class Case:
    """diffusers' pipeline, the folder it wrote, and what we read there."""

    kind: str
    stock: DiffusionPipeline
    folder: Path
    t2i: TextToImage


def build_case(kind: str, folder: Path) -> Case:
    stock = build_pipeline(kind)
    stock.save_pretrained(folder)
    t2i = load_t2i(folder)
    # The very same tensors: memory that is aligned in another way gives other last bits
    stock.register_modules(**{name: part for name, part in t2i.parts().items() if name in PARTS[kind]})
    return Case(kind, stock, folder, t2i)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    return build_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> TextToImage:
    return build_case("flux", tmp_path_factory.mktemp("flux")).t2i


@pytest.fixture(scope="module", params=FLOWS)
def flow(request, tmp_path_factory) -> TextToImage:
    return build_case(request.param, tmp_path_factory.mktemp(request.param)).t2i


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> TextToImage:
    return build_case("sd3", tmp_path_factory.mktemp("sd3")).t2i


def encode(t2i: TextToImage, text: str, *vectors: Tensor) -> Conditioning:
    return t2i.encode_prompt(compose(text, vectors, t2i.tokenizer, t2i.config.context_length))


def stock_encode(case: Case, text: str, **options: object) -> list[Tensor | None]:
    """prompt_embeds, the negative's, pooled and the negative's of diffusers' own pipeline."""
    if case.kind == "sd":
        return [*case.stock.encode_prompt(text, "cpu", 1, **options), None, None]
    if case.kind.startswith("flux"):
        negative, pooled = case.stock.encode_prompt("", max_sequence_length=case.t2i.t5_length)[:2]
        embeds = case.stock.encode_prompt(text, max_sequence_length=case.t2i.t5_length)[:2]
        return [embeds[0], negative, embeds[1], pooled]
    others = {"prompt_2": None, "prompt_3": None} if case.kind == "sd3" else {}
    return list(case.stock.encode_prompt(text, **others, **options))


def draw(t2i: TextToImage, joint: Conditioning, **changes: object) -> Tensor:
    config = GenerationConfig(num_inference_steps=3, guidance_scale=3, scheduler="euler", **changes)
    with torch.no_grad():
        return sample(t2i, Conditions(encode(t2i, ""), joint=joint), config)


# Parity with the stock pipelines


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
    latents = draw_latents([5, 6], case.t2i.latent_shape)
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


# ViLex tokens


def test_tokens_are_as_wide_as_all_text_encoders_together(case):
    assert case.t2i.text_widths == {"sd": [8], "sdxl": [8, 12], "sd3": [8, 12, 24], "flux": [8, 24]}[case.kind]
    mean, std = case.t2i.word_statistics()
    assert mean.shape == std.shape == (case.t2i.text_width,)
    for encoder, ours in zip(case.t2i.text_encoders, std.split(case.t2i.text_widths), strict=True):
        torch.testing.assert_close(ours, embedding_module(encoder).weight.std(0))


def test_each_text_encoder_reads_its_own_columns(case):
    """A vector's change in one encoder's columns changes the sample, and no other encoder's states."""
    t2i, generator = case.t2i, torch.Generator().manual_seed(3)
    vectors = torch.randn(5, t2i.text_width, generator=generator)
    before = encode(t2i, "a <image> dog", vectors)
    drawn = draw(t2i, before)
    first = 0
    for i, width in enumerate(t2i.text_widths):
        changed = vectors.clone()
        changed[2, first : first + width] = torch.randn(width, generator=generator)
        after = encode(t2i, "a <image> dog", changed)
        assert (draw(t2i, after) - drawn).abs().max() > 1e-3
        moved = (after.prompt_embeds - before.prompt_embeds).abs() > 1e-5
        assert torch.equal(moved.any(1)[0].nonzero().flatten(), states_of(case, i)[1])
        assert set(moved.any(2)[0].nonzero().flatten().tolist()) <= set(states_of(case, i)[0].tolist())
        is_pooled = before.pooled is not None and not torch.equal(before.pooled, after.pooled)
        assert is_pooled == pools(case.kind, i)
        first += width


def pools(kind: str, encoder: int) -> bool:
    """Whether the pooled vector is made from this text encoder."""
    return encoder in {"sd": (), "sdxl": (1,), "sd3": (0, 1), "flux": (0,)}[kind]


def states_of(case: Case, encoder: int) -> tuple[Tensor, Tensor]:
    """Positions and columns that a text encoder's states fill in prompt_embeds; CLIP looks only back."""
    if case.kind == "flux":  # of CLIP it reads only what is pooled
        return (torch.arange(512), torch.arange(24)) if encoder else (torch.arange(0), torch.arange(0))
    starts = [0, 8, 0] if case.kind == "sd3" else [0, 8]
    width = case.t2i.text_widths[encoder]
    positions = torch.arange(24, 280) if encoder == 2 else torch.arange(4, 24)  # BOS, "a", then the second vector
    return positions, torch.arange(starts[encoder], starts[encoder] + width)


def test_gradient_reaches_every_vector_through_every_text_encoder(case):
    before = {name: tensor.clone() for name, tensor in case.t2i.state_dict().items()}
    vectors = torch.randn(5, case.t2i.text_width, requires_grad=True)
    condition = encode(case.t2i, "a <image> dog", vectors)
    noisy = torch.randn(1, *case.t2i.latent_shape)
    case.t2i.denoise(noisy, torch.tensor([300]), condition).square().mean().backward()
    for gradient in vectors.grad.split(case.t2i.text_widths, dim=-1):
        assert (gradient.abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in case.t2i.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in case.t2i.state_dict().items())


def test_a_batch_of_training_prompts_equals_prompts_one_by_one(case):
    t2i, vectors = case.t2i, torch.randn(2, 3, case.t2i.text_width)
    texts = ["a dog on the beach", ""]
    words = [t2i.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ids, mask = torch.zeros(2, 6).long(), torch.zeros(2, 6).bool()
    ids[0, : len(words[0])], mask[0, : len(words[0])] = torch.tensor(words[0]), True
    prompt = compose_leading(ids, mask, vectors, special_tokens(t2i.tokenizer), t2i.config.context_length)
    with torch.no_grad():
        together = t2i.encode_prompt(prompt)
        alone = Conditioning.concatenate([encode(t2i, text, v) for text, v in zip(texts, vectors, strict=True)])
    torch.testing.assert_close(together.prompt_embeds, alone.prompt_embeds, atol=1e-5, rtol=1e-5)
    if case.kind != "sd":
        torch.testing.assert_close(together.pooled, alone.pooled, atol=1e-5, rtol=1e-5)


def test_words_that_clip_cuts_still_reach_t5(sd3):
    with torch.no_grad():
        a, b = (encode(sd3, "dog " * 22 + end).prompt_embeds for end in ("red cat", "blue cat"))
    assert torch.equal(a[:, :24], b[:, :24])
    assert not torch.equal(a[:, 24:], b[:, 24:])


# More tokens than CLIP's context


def test_a_prompt_is_as_long_as_t5s_context(sd3, case):
    assert (sd3.max_tokens, sd3.clip_length) == (255, 24)
    assert case.t2i.max_tokens == {"sd3": 255, "flux": 511}.get(case.kind, 22)


def test_a_hundred_and_fifty_tokens_reach_t5_and_clip_sees_the_first(sd3):
    vectors = torch.randn(150, sd3.text_width, generator=torch.Generator().manual_seed(4), requires_grad=True)
    condition = encode(sd3, "<image> a dog", vectors)
    clip, t5 = condition.prompt_embeds.split([24, 256], 1)
    first = encode(sd3, "", vectors[:22])
    assert torch.equal(clip, first.prompt_embeds[:, :24]) and torch.equal(condition.pooled, first.pooled)
    again = recompose(compose("<image> a dog", [vectors], sd3.tokenizer, 257), sd3.tokenizer, sd3.tokenizers[2], 256)
    assert again.slots.sum() == 150 and not again.slots[:, 150:].any()
    columns = vectors[:, 8 + 12 :]
    assert torch.equal(t5, read_words(sd3.text_encoders[2], again.input_ids, again.slots, columns).last_hidden_state)

    noisy = torch.randn(1, *sd3.latent_shape)
    sd3.denoise(noisy, torch.tensor([300.0]), condition).square().mean().backward()
    for gradient, seen in zip(vectors.grad.split(sd3.text_widths, dim=-1), (22, 22, 150), strict=True):
        assert (gradient[:seen].abs().sum(1) > 0).all() and not gradient[seen:].any()


def test_a_batch_of_long_prompts_equals_prompts_one_by_one(sd3):
    vectors, special = torch.randn(2, 21, sd3.text_width), special_tokens(sd3.tokenizer)
    texts = ["a red dog", "cat"]  # with 21 tokens and room for 22, CLIP's rows: one is cut, one is not
    ids, mask = torch.zeros(2, 3).long(), torch.tensor([[True] * 3, [True, False, False]])
    for row, text in enumerate(texts):
        words = sd3.tokenizer(text, add_special_tokens=False).input_ids
        ids[row, : len(words)] = torch.tensor(words)
    with torch.no_grad():
        together = sd3.encode_prompt(compose_leading(ids, mask, vectors, special, sd3.config.context_length))
        alone = Conditioning.concatenate([encode(sd3, text, v) for text, v in zip(texts, vectors, strict=True)])
    torch.testing.assert_close(together.prompt_embeds, alone.prompt_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.pooled, alone.pooled, atol=1e-5, rtol=1e-5)


def test_a_pooler_may_have_as_many_queries_as_a_prompt_has_positions(case):
    preset = replace(PRESETS["tiny"], pooler=replace(PRESETS["tiny"].pooler, num_queries=150))
    if case.kind not in ("sd3", "flux"):  # those with T5
        with pytest.raises(ValueError, match="the text-to-image model holds 75 tokens, the pooler gives 150"):
            build_model(preset, case.t2i)
        return
    pipeline = VilexPipeline(case.t2i, build_model(preset, case.t2i))
    picture = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert pipeline.encode(picture).shape == (1, 150, case.t2i.text_width)
    handlers = Handlers(pipeline)
    assert handlers.max_tokens == 150 and Balance(handlers).budgets == (1, 4, 16, 75, 150)
    handlers.engine.close()
    few, many = (
        pipeline.generate("<image>", [picture], GenerationConfig(num_tokens=n, num_inference_steps=2))
        for n in (75, 150)
    )
    assert few.note == many.note == "" and few.images[0].tobytes() != many.images[0].tobytes()
    with pytest.raises(ValueError, match="num_tokens must be between 1 and 150, got 151"):
        pipeline.generate("<image>", [picture], GenerationConfig(num_tokens=151))
    with pytest.raises(ValueError, match="num_tokens must be between 1 and 150, got 151"):
        pipeline.generate("<image>", [torch.randn(200, case.t2i.text_width)], GenerationConfig(num_tokens=151))


def test_the_whole_road_draws_and_decodes(case):
    preset = PRESETS["tiny"]
    pipeline = VilexPipeline(case.t2i, build_model(preset, case.t2i))
    tokens = torch.randn(4, case.t2i.text_width)
    for scheduler in ("dpm++", "ddim", "euler"):
        config = GenerationConfig(num_inference_steps=2, num_images=2, tfg_scale=2.0, scheduler=scheduler)
        drawn = pipeline.generate("a <image> dog", [tokens], config)
        assert [image.size for image in drawn.images] == [(16, 16)] * 2


# Training


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


@settings(max_examples=20, deadline=None)
@given(level=st.floats(0.02, 1), seed=st.integers(0, 99))
def test_the_clean_picture_follows_from_noise_and_target(case, level, seed):
    t2i, generator = case.t2i, torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(1, *t2i.latent_shape, generator=generator) for _ in range(2))
    timestep = torch.tensor(level * 999) if case.kind in FLOWS else torch.tensor(int(level * 999))
    noisy = t2i.add_noise(latents, noise, timestep[None])
    estimate = t2i.estimate_clean(noisy, t2i.target(latents, noise, timestep[None]), timestep)
    torch.testing.assert_close(estimate, latents, atol=1e-3, rtol=1e-3)


# Sampling along a flow


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


# Files


def test_saved_models_come_back(case, tmp_path):
    case.t2i.save_pretrained(tmp_path, dtype=torch.float32)
    loaded = load_t2i(tmp_path)
    assert type(loaded) is type(case.t2i)
    expected = case.t2i.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        for text in (TEXT, ""):
            assert torch.equal(encode(loaded, text).prompt_embeds, encode(case.t2i, text).prompt_embeds)
        assert torch.equal(draw(loaded, encode(loaded, TEXT)), draw(case.t2i, encode(case.t2i, TEXT)))
    stock = type(case.stock).from_pretrained(tmp_path)
    assert stock.config.get("force_zeros_for_empty_prompt") == case.stock.config.get("force_zeros_for_empty_prompt")


def test_files_hold_fp16_and_models_compute_in_fp32(case, tmp_path):
    case.t2i.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    loaded = load_t2i(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in KINDS for part in PARTS[kind]])
def test_a_missing_weight_of_any_part_is_refused(kind, part, tmp_path):
    build_pipeline(kind).save_pretrained(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(path)
    key = sorted(weights)[-1]
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} does not fit .* is missing from the file"):
        load_t2i(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_scheduler_that_shifts_with_the_size_is_refused(tmp_path):
    build_pipeline("sd3").save_pretrained(tmp_path)
    edit_json(tmp_path / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="shifts its timesteps with the picture's size, which is not supported"):
        load_t2i(tmp_path)


def test_tokenizers_of_two_vocabularies_are_refused(tmp_path):
    build_pipeline("sdxl").save_pretrained(tmp_path)
    build_tokenizer("bert").save_pretrained(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="the two CLIP tokenizers have different vocabularies"):
        load_t2i(tmp_path)


def test_an_inpainting_denoiser_is_refused(tmp_path):
    pipeline = build_pipeline("sd")
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 9 channels and gives 4; models that fill in or edit pictures"):
        load_t2i(tmp_path)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache on this machine with one commit of owner/tiny-sdxl, as a download leaves it."""
    commit = "a" * 40
    repository = tmp_path / "models--owner--tiny-sdxl"
    build_pipeline("sdxl").save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_found_offline(hub):
    assert isinstance(load_t2i("owner/tiny-sdxl"), StableDiffusionXL)
    assert isinstance(load_t2i(Path("owner/tiny-sdxl")), StableDiffusionXL)


def test_a_hub_id_of_a_model_alone_gives_a_pipeline_without_encoder(hub):
    pipeline = VilexPipeline.from_pretrained("owner/tiny-sdxl", device="cpu", dtype="float32")
    assert (pipeline.name, pipeline.vilex) == ("owner/tiny-sdxl", None)
    assert isinstance(pipeline.t2i, StableDiffusionXL)


@pytest.fixture
def asked(hub, monkeypatch) -> list[list[str]]:
    """The patterns of files that are asked of the hub."""
    patterns: list[list[str]] = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return snapshot_download(hub_id, allow_patterns=allow_patterns)

    for module in (checkpoint, diffusion):
        monkeypatch.setattr(module, "snapshot_download", fetch)
    return patterns


def test_weights_of_a_model_alone_are_left_to_what_loads_its_kind(asked):
    checkpoint.find_weights("owner/tiny-sdxl")
    ours = ["config.json", "vilex.safetensors", "t2i/unet/diffusion_pytorch_model.safetensors", "README.md"]
    others = ["unet/diffusion_pytorch_model.safetensors", "sd_xl_base_1.0.safetensors", "vilex.bin"]
    assert list(filter_repo_objects(ours + others, allow_patterns=asked[0])) == ours


def test_only_what_is_read_is_fetched(asked):
    """Files as the hub has them of SDXL: no twin in fp16, no other framework's, no folder of another use."""
    load_t2i("owner/tiny-sdxl")
    wanted = [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json",
        "text_encoder/model.safetensors", "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]  # fmt: skip
    others = [
        "README.md", "sd_xl_base_1.0.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/model.onnx",
        "text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/openvino_model.bin",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "vae_1_0/config.json",
        "vae_1_0/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects(wanted + others, allow_patterns=asked[-1])) == wanted
    assert asked[0] == ["model_index.json"]


@pytest.mark.parametrize("name", ["owner/missing", "owner/tiny sdxl", "nowhere", "/no/such/folder", "a/b/c"])
def test_what_is_neither_a_folder_nor_at_the_hub_is_named(hub, name):
    with pytest.raises(ValueError, match=f"^{name} holds no text-to-image model: [^\n]+$"):
        load_t2i(name)
