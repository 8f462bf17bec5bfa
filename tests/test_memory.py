"""Checkpointed gradients are the same gradients, of less that is kept."""

import pytest
import torch
from builders import build_pipeline
from torch import Tensor

from train.memory import checkpoint_gradients, count_kept
from vilex.diffusion import TextToImage, load_t2i
from vilex.loss import diffusion_loss, draw_noise
from vilex.prompt import compose


def prompt(t2i: TextToImage, vectors: Tensor):
    return compose("<image> a dog", [vectors], t2i.tokenizer, t2i.config.context_length)


def gradient(t2i: TextToImage) -> tuple[Tensor, int, int]:
    """Of a loss by the tokens of a picture; and the bytes kept by the text encoders, and in all."""
    vectors = torch.randn(5, t2i.text_width, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    noise = draw_noise(t2i, 1, torch.Generator().manual_seed(2))
    with count_kept() as kept:
        condition = t2i.encode_prompt(prompt(t2i, vectors))
        of_text = kept.total
        diffusion_loss(t2i, t2i.denoiser, torch.zeros(1, *t2i.latent_shape), condition, noise).backward()
    return vectors.grad, of_text, kept.total


@pytest.fixture(params=["embedded", "sd", "sdxl", "sd3"])
def model(request, t2i, tmp_path) -> TextToImage:
    if request.param == "embedded":
        return t2i
    build_pipeline(request.param).save_pretrained(tmp_path)
    return load_t2i(tmp_path)


def test_checkpointed_gradients_are_equal_and_keep_less(model):
    expected, of_text, whole = gradient(model)
    checkpoint_gradients(model)
    found, less_of_text, less = gradient(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().max() > 1e-6
    assert less_of_text < 0.7 * of_text
    assert less < 0.7 * whole


def test_checkpointing_turns_no_dropout_on(t2i):
    assert t2i.text_encoder.config.hidden_dropout_prob > 0  # else this shows nothing
    checkpoint_gradients(t2i)
    vectors = torch.zeros(5, t2i.text_width, requires_grad=True)
    first, second = (t2i.encode_prompt(prompt(t2i, vectors)).prompt_embeds for _ in range(2))
    assert torch.equal(first, second)


def test_a_storage_is_counted_once():
    weight = torch.ones(4, 4, requires_grad=True)
    rows = torch.ones(2, 4)
    with count_kept() as kept:
        (rows @ weight) * (rows[:1] @ weight)
    assert kept.total == 4 * 8 + 4 * (8 + 4)  # rows, of which the slice is a view, and both factors
