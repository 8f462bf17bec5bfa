"""ViLex tokens in the prompts of finished models: every text encoder reads them, more than a context of CLIP too."""

from dataclasses import replace

import pytest
import torch
from cases import Case, draw, encode
from PIL import Image
from torch import Tensor

from app.balance import Balance
from app.handlers import Handlers
from app.workbench import side_by_side
from train.presets import PRESETS
from train.train_vilex import build_model
from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose, compose_leading, embedding_module, recompose, special_tokens
from vilex.t2i import read_words


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
    tokens = pipeline.encode(picture)[0]
    rows = side_by_side(pipeline, [[tokens[:75]], [tokens]], GenerationConfig())
    for row, length in enumerate((75, 150)):
        alone = pipeline.conditions("", [tokens[:length]], GenerationConfig(num_tokens=150)).image.prompt_embeds[0]
        torch.testing.assert_close(rows.image.prompt_embeds[row], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*rows.image.prompt_embeds)
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
    for scheduler in case.t2i.schedulers:
        config = GenerationConfig(num_inference_steps=2, num_images=2, tfg_scale=2.0, scheduler=scheduler)
        drawn = pipeline.generate("a <image> dog", [tokens], config)
        assert [image.size for image in drawn.images] == [(16, 16)] * 2
