"""Polish: gradient steps improve a picture's tokens, all budgets of them, with an encoder and without."""

import pytest
import torch
from builders import build_pipeline
from torch import Tensor

from train.presets import PRESETS
from train.train_vilex import build_model
from vilex import polish
from vilex.config import GenerationConfig, PolishConfig
from vilex.diffusion import TextToImage, load_t2i
from vilex.images import fit_image, to_pixels
from vilex.loss import diffusion_loss, draw_noise
from vilex.pipeline import VilexPipeline
from vilex.polish import polish_rows, polish_steps, spell
from vilex.prompt import compose, tokenize


def loss_of(t2i: TextToImage, picture, tokens: Tensor) -> float:
    """The loss over many noises that Polish has not seen."""
    pixels = to_pixels([fit_image(picture, t2i.image_size, "crop")])
    condition = t2i.encode_prompt(compose("", [tokens], t2i.tokenizer, t2i.config.context_length))
    with torch.no_grad():
        noise = draw_noise(t2i, 64, torch.Generator().manual_seed(99))
        return diffusion_loss(t2i, t2i.denoiser, t2i.encode(pixels), condition, noise).item()


@pytest.mark.parametrize("kind", ["embedded", "sd", "sdxl", "sd3", "flux"])
def test_every_budget_of_the_tokens_gets_better(kind, request, tmp_path, picture):
    if kind == "embedded":
        t2i = request.getfixturevalue("t2i")
    else:
        build_pipeline(kind).save_pretrained(tmp_path)
        t2i = load_t2i(tmp_path)
    pipeline = VilexPipeline(t2i, build_model(PRESETS["tiny"], t2i))
    before = pipeline.encode(picture, 6)[0]
    after = pipeline.polish(picture, 6, steps=30)
    assert after.shape == before.shape and after.dtype == torch.float32 and not after.requires_grad
    for budget in (1, 3, 6):
        assert loss_of(t2i, picture, after[:budget]) < loss_of(t2i, picture, before[:budget])


@pytest.mark.parametrize("kind", ["t2i", "stable_diffusion"])
def test_the_work_of_a_step_is_twice_the_rows_it_denoises(kind, request, picture):
    t2i, rows = request.getfixturevalue(kind), []
    t2i.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    pixels = to_pixels([fit_image(picture, t2i.image_size, "crop")])
    next(polish_steps(t2i, pixels, spell(t2i, "a red dog", 3), PolishConfig(num_tokens=3, num_steps=1)))
    assert rows and polish_rows(t2i) == 2 * sum(rows)


def test_only_the_tokens_move_and_a_seed_gives_the_same_again(pipeline, picture):
    before = {name: tensor.clone() for name, tensor in pipeline.t2i.state_dict().items()}
    seen: list[tuple[int, int, float]] = []
    first = pipeline.polish(picture, 4, steps=3, seed=5, on_step=lambda *step: seen.append(step))
    assert torch.equal(first, pipeline.polish(picture, 4, steps=3, seed=5))
    assert not torch.equal(first, pipeline.polish(picture, 4, steps=3, seed=6))
    assert [step[:2] for step in seen] == [(0, 3), (1, 3), (2, 3)] and all(step[2] > 0 for step in seen)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.t2i.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in pipeline.t2i.parameters())


def test_every_token_moves_within_the_reach_of_the_longest(pipeline, picture):
    start = pipeline.encode(picture, 5)[0]
    start[2] *= 30
    pixels, scale = to_pixels([picture.resize((32, 32))]), pipeline.t2i.word_statistics()[1]
    *_, last = polish_steps(pipeline.t2i, pixels, start, PolishConfig(num_tokens=5, num_steps=4))
    assert ((last.vilex_tokens - start).abs().sum(1) > 0).all()
    assert (last.vilex_tokens / scale).norm(dim=1).max() <= (start / scale).norm(dim=1).max() * 1.0001


def test_a_caller_without_gradients_gets_the_same(pipeline, picture):
    expected = pipeline.polish(picture, 2, steps=2)
    with torch.no_grad():
        assert torch.equal(pipeline.polish(picture, 2, steps=2), expected)


def test_a_denoiser_in_bfloat16_polishes_too(pipeline, picture):
    expected = pipeline.polish(picture, 4, steps=3)
    pipeline.to("cpu", torch.bfloat16)
    polished = pipeline.polish(picture, 4, steps=3)
    assert polished.dtype == torch.float32
    moved, off = (t - pipeline.encode(picture, 4)[0] for t in (expected, polished))
    assert torch.cosine_similarity(moved.flatten(), off.flatten(), dim=0) > 0.8


def test_a_loss_that_is_not_finite_is_told(pipeline, picture):
    pipeline.t2i.denoiser.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 1; try dtype float32"):
        pipeline.polish(picture, 2, steps=2)


@pytest.mark.parametrize(("setting", "rule"), [
    ({"steps": 0}, "num_steps must be between 1 and 1000, got 0"),
    ({"num_tokens": 76}, "num_tokens must be between 1 and 75, got 76"),
    ({"seed": -1}, "seed must be between 0 and .*, got -1"),
])  # fmt: skip
def test_a_wrong_setting_is_named(pipeline, picture, setting, rule):
    with pytest.raises(ValueError, match=rule):
        pipeline.polish(picture, **setting)


# Without an encoder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> VilexPipeline:
    """A folder as diffusers writes it, and nothing of ViLex."""
    folder = tmp_path_factory.mktemp("bare")
    build_pipeline("sdxl").save_pretrained(folder)
    return VilexPipeline.from_pretrained(str(folder), device="cpu", dtype="float32")


def test_words_are_spelt_in_every_encoders_own_embeddings(bare):
    t2i, tokens = bare.t2i, spell(bare.t2i, "a red dog", 5)
    first = 0
    for encoder, tokenizer, width in zip(t2i.text_encoders, t2i.tokenizers, t2i.text_widths, strict=True):
        table, ids = encoder.get_input_embeddings().weight, tokenize(tokenizer, "a red dog").input_ids
        assert torch.equal(tokens[:3, first : first + width], table[ids])
        torch.testing.assert_close(tokens[3:, first : first + width], table.mean(0).expand(2, -1))
        first += width
    with torch.no_grad():
        spelt = t2i.encode_prompt(compose("", [tokens[:3]], t2i.tokenizer, t2i.config.context_length))
        written = t2i.encode_prompt(compose("a red dog", [], t2i.tokenizer, t2i.config.context_length))
    torch.testing.assert_close(spelt.prompt_embeds, written.prompt_embeds)


def test_a_model_without_encoder_says_what_to_do(bare, picture):
    sentence = (
        r"^[\w-]+ has no ViLex weights to read pictures with: train them with .*train_vilex .*, or polish [^\n]+$"
    )
    for call in (bare.encode, bare.attention, lambda image: bare.generate("", [image])):
        with pytest.raises(ValueError, match=sentence):
            call(picture)


def test_a_model_without_encoder_draws_words_and_what_was_polished(bare, picture, tmp_path):
    config = GenerationConfig(num_inference_steps=2, seed=3)
    drawn = bare.generate("a red dog", config=config).images[0]
    assert drawn.size == (16, 16)
    tokens = bare.polish(picture, steps=3, words="a red dog")
    assert tokens.shape == (22, 20) == (bare.max_tokens, bare.t2i.text_width)
    assert bare.generate("<image> on the beach", [tokens], config).images[0].tobytes() != drawn.tobytes()
    bare.save_pretrained(tmp_path)
    again = VilexPipeline.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    assert again.vilex is None and again.fingerprint == bare.fingerprint


def test_small_pictures_are_polished_at_noisy_timesteps(t2i, stable_diffusion):
    def median(model) -> float:
        generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
        draws = [polish._draw_noise(model, generator, device).timesteps for _ in range(64)]
        return torch.cat(draws).float().median().item()

    assert median(t2i) == pytest.approx(1000 * 5 / 6, abs=30)  # one half, shifted by 5
    assert median(stable_diffusion) == pytest.approx(500, abs=60)
