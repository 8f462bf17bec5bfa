"""A frozen model: strict files, one space for pictures, gradient only to the image's vectors."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vilex.diffusion import (
    Conditioning,
    EmbeddedModel,
    TextToImage,
    build_noise_scheduler,
    load_t2i,
    masked_mean,
    place_waves,
    position_maps,
)
from vilex.prompt import compose, override_embeddings

LENGTH = 24


@pytest.fixture(params=["embedded", "latent"])
def model(request, t2i, stable_diffusion) -> TextToImage:
    return t2i if request.param == "embedded" else stable_diffusion


@pytest.fixture
def text_encoder(t2i, tmp_path: Path) -> str:
    """A folder with the embedded model's text encoder and tokenizer."""
    folder = tmp_path / "text"
    t2i.text_encoder.save_pretrained(folder)
    t2i.tokenizer.save_pretrained(folder)
    return str(folder)


def condition(model: TextToImage, text: str = "a red dog", vectors: torch.Tensor | None = None) -> Conditioning:
    images = [] if vectors is None else [vectors]
    return model.encode_prompt(compose(text, images, model.tokenizer, LENGTH))


def predict(model: TextToImage) -> torch.Tensor:
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.denoise(noisy, torch.tensor([500]), condition(model))


def test_saved_models_come_back(model, tmp_path, text_encoder):
    model.save_pretrained(tmp_path / "t2i", dtype=torch.float32)
    loaded = load_t2i(tmp_path / "t2i", text_encoder)
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    torch.testing.assert_close(predict(loaded), predict(model))
    assert loaded.config.context_length == LENGTH
    assert (loaded.embedded, loaded.image_size) == (model.embedded, model.image_size)


def test_files_hold_fp16_and_models_compute_in_fp32(model, tmp_path, text_encoder):
    model.save_pretrained(tmp_path / "t2i")
    for path in (tmp_path / "t2i").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    loaded = load_t2i(tmp_path / "t2i", text_encoder)
    parameters = dict(loaded.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for name, parameter in model.denoiser.named_parameters():
        assert torch.equal(parameters[f"denoiser.{name}"], parameter.half().float())
    assert model.denoiser.dtype == torch.float32  # saving leaves the model as it was


@pytest.mark.parametrize("value", [1e6, torch.nan])
def test_weights_that_fp16_cannot_hold_are_refused_and_what_was_saved_stays(model, tmp_path, value):
    def saved() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "unet").iterdir()}

    model.save_pretrained(tmp_path)
    before = saved()
    with torch.no_grad():
        model.denoiser.conv_in.bias[2] = value
    with pytest.raises(ValueError, match="conv_in.bias in .*unet holds values that are not finite"):
        model.save_pretrained(tmp_path)
    assert saved() == before
    if value == 1e6:
        model.save_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), "conv_in.bias is missing from the file"),
        (lambda w: w.update(extra=torch.zeros(3)), "extra in the file is unknown to the model"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(5)}), "conv_in.bias: expects 8, file has 5"),
        (lambda w: w["conv_in.bias"].fill_(torch.nan), "conv_in.bias in .* holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(stable_diffusion, tmp_path, change, message):
    stable_diffusion.save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_t2i(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_refused(stable_diffusion, tmp_path, part):
    stable_diffusion.save_pretrained(tmp_path)
    (tmp_path / part).rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{tmp_path} is not complete: {part} is missing"):
        load_t2i(tmp_path)


def test_folders_of_no_model_or_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text-to-image model: model_index.json is missing"):
        load_t2i(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(ValueError, match="is for SanaPipeline; supported are StableDiffusionPipeline, "):
        load_t2i(tmp_path)


def test_backward_through_vectors_moves_nothing_frozen(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = torch.randn(5, model.text_width, requires_grad=True)
    noisy = torch.randn(1, *model.latent_shape)
    model.denoise(noisy, torch.tensor([300]), condition(model, "a <image> dog", vectors)).square().mean().backward()
    assert (vectors.grad.abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_pixel_space_is_its_own_inverse(t2i):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = t2i.encode(pixels)
    assert latents.shape == (2, *t2i.latent_shape) == (2, 48, 8, 8)
    assert torch.equal(t2i.decode(latents), pixels)
    assert t2i.decode(latents * 9).abs().max() == 1


def test_latent_space_is_the_vaes(stable_diffusion):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = stable_diffusion.encode(pixels)
        decoded = stable_diffusion.decode(latents)
        mean = stable_diffusion.vae.encode(pixels).latent_dist.mean
    assert latents.shape == (2, *stable_diffusion.latent_shape) == (2, 4, 8, 8)
    torch.testing.assert_close(latents, mean * 0.18215)
    assert decoded.shape == pixels.shape
    assert stable_diffusion.image_size == 16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_the_noise_the_velocity_or_the_picture(t2i, prediction_type):
    t2i.scheduler = build_noise_scheduler(prediction_type=prediction_type)
    latents, noise, timesteps = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.tensor([10, 900])
    alpha_bar = t2i.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    torch.testing.assert_close(t2i.target(latents, noise, timesteps), expected)


def test_padding_does_not_reach_the_pooled_vector():
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    torch.testing.assert_close(masked_mean(states, mask)[0], states[0, :2].mean(0))
    torch.testing.assert_close(masked_mean(states, mask)[1], states[1, :4].mean(0))


def test_padding_does_not_reach_the_prediction(t2i):
    noisy, short = torch.randn(1, *t2i.latent_shape), condition(t2i, "a red dog")
    changed = short.prompt_embeds.masked_fill(~short.mask[..., None], 7.0)
    same = Conditioning(changed, short.pooled, short.mask)
    trimmed = short.trimmed()
    assert trimmed.prompt_embeds.shape[1] == trimmed.mask.shape[1] == 8 < LENGTH
    with torch.no_grad():
        a, *others = (t2i.denoise(noisy, torch.tensor([400]), c) for c in (short, same, trimmed))
    for other in others:
        torch.testing.assert_close(a, other)


def test_every_cell_and_every_place_in_a_prompt_has_numbers_of_its_own():
    maps, waves = position_maps(3, 16), place_waves(32, 128)
    assert maps.shape == (1, 12, 16, 16) and waves.shape == (1, 128, 64)
    for rows in (maps[0].flatten(1).T, waves[0]):
        distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
        assert distances.min() > 0.2
    torch.testing.assert_close(maps[0, :6, 5], maps[0, 6:, :, 5])  # along x in the first half, along y in the second


def test_the_denoiser_reads_where_a_token_stands(t2i):
    noisy, words = torch.randn(1, *t2i.latent_shape), condition(t2i, "red dog")
    swapped = Conditioning(words.prompt_embeds[:, [0, 2, 1, *range(3, LENGTH)]], words.pooled, words.mask)
    with torch.no_grad():
        a, b = (t2i.denoise(noisy, torch.tensor([400]), c) for c in (words, swapped))
        t2i.places.zero_()  # attention alone does not know the order
        c, d = (t2i.denoise(noisy, torch.tensor([400]), c) for c in (words, swapped))
    assert not torch.equal(a, b)
    torch.testing.assert_close(c, d)


@pytest.mark.parametrize("change", [{"position_frequencies": 2}, {"token_frequencies": 0}])
def test_settings_that_do_not_fit_the_denoiser_are_refused(t2i, change):
    config = dataclasses.replace(t2i.config, **change)
    with pytest.raises(ValueError, match="the denoiser takes 60 channels and prompts of width 72, its settings make"):
        EmbeddedModel(config, t2i.tokenizer, t2i.text_encoder, t2i.denoiser, t2i.scheduler)


def test_words_alone_wait_for_another_threads_vectors(t2i):
    expected, result = condition(t2i, "a red dog").prompt_embeds, []
    prompt = compose("<image>", [torch.randn(5, 8)], t2i.tokenizer, LENGTH)
    other = threading.Thread(target=lambda: result.append(condition(t2i, "a red dog").prompt_embeds))
    with override_embeddings(t2i.text_encoder, prompt.slots, prompt.vectors):
        other.start()
        other.join(0.2)
        assert not result
        t2i.text_encoder(prompt.input_ids)
    other.join()
    assert torch.equal(result[0], expected)


def test_conditions_expand_join_trim_and_move():
    one = Conditioning(torch.rand(1, 4, 3), torch.rand(1, 3), torch.tensor([[True, True, False, False]]))
    both = Conditioning.concatenate([one, one.expand(2)])
    assert both.prompt_embeds.shape == (3, 4, 3)
    assert both.pooled.shape == (3, 3)
    moved = both.to(torch.device("cpu"), torch.bfloat16)
    assert (moved.prompt_embeds.dtype, moved.pooled.dtype, moved.mask.dtype) == (torch.bfloat16,) * 2 + (torch.bool,)
    bare = Conditioning(torch.rand(1, 4, 3)).expand(2)
    assert bare.pooled is None and bare.mask is None
    assert bare.trimmed() is bare  # its padding is read
