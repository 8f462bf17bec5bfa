"""Guidance is a weighted sum whose weights follow the paper's two equations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vilex.guidance import BranchWeights, branch_weights, guide, outside_interval

scales = st.floats(0, 20, allow_nan=False)
NAMES = ("uncond", "image", "joint", "words")


def predictions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(2, 3, 4, 5, generator=generator) for name in NAMES}


def guided(has_images: bool, has_words: bool, w: float, t: float, s: float = 0.0) -> torch.Tensor:
    return guide(predictions(), branch_weights(has_images, has_words, w, t, s))


@given(w=scales, t=scales, s=scales, has_images=st.booleans(), has_words=st.booleans())
def test_weights_sum_to_one(w, t, s, has_images, has_words):
    weights = branch_weights(has_images, has_words, w, t, s)
    assert weights.uncond + weights.image + weights.joint + weights.words == pytest.approx(1, abs=1e-9)


def test_at_guidance_1_tfg_chooses_between_image_and_joint_exactly():
    assert torch.equal(guided(True, True, 1, 1), predictions()["joint"])
    assert torch.equal(guided(True, True, 1, 0), predictions()["image"])
    assert torch.equal(guided(True, False, 1, 0.4), predictions()["image"])
    assert torch.equal(guided(False, True, 1, 0.4), predictions()["joint"])
    assert torch.equal(guided(False, False, 3, 2), guided(True, True, 0, 0))


@given(t=scales)
def test_tfg_is_linear_at_guidance_1(t):
    """Eq. 2: image + t (joint - image)."""
    pred = predictions()
    expected = pred["image"] + t * (pred["joint"] - pred["image"])
    torch.testing.assert_close(guided(True, True, 1, t), expected, atol=1e-4, rtol=1e-4)


@given(w=scales)
def test_words_alone_follow_equation_1(w):
    pred = predictions()
    expected = pred["uncond"] + w * (pred["joint"] - pred["uncond"])
    torch.testing.assert_close(guided(False, True, w, 7), expected, atol=1e-4, rtol=1e-4)


@given(w=scales, t=scales, s=scales)
def test_all_guidances_compose(w, t, s):
    pred = predictions()
    expected = pred["uncond"] + w * (pred["image"] - pred["uncond"]) + t * (pred["joint"] - pred["image"])
    expected = expected + s * (pred["words"] - pred["uncond"])
    torch.testing.assert_close(guided(True, True, w, t, s), expected, atol=1e-4, rtol=1e-4)


@given(w=scales, t=scales, s=scales, has=st.sampled_from([(True, False), (False, True), (False, False)]))
def test_words_by_themselves_need_an_image_and_words(w, t, s, has):
    assert branch_weights(*has, w, t, s) == branch_weights(*has, w, t)


@pytest.mark.parametrize(
    ("has_images", "has_words", "w", "t", "s", "needed"),
    [
        (True, True, 1, 1, 0, ("joint",)),
        (True, True, 1, 0, 0, ("image",)),
        (True, True, 1, 3, 0, ("image", "joint")),
        (True, True, 2, 2, 0, ("uncond", "joint")),
        (True, True, 2, 0, 0, ("uncond", "image")),
        (True, True, 0, 0, 0, ("uncond",)),
        (True, True, 2, 3, 0, ("uncond", "image", "joint")),
        (True, True, 2, 3, 1, NAMES),
        (True, True, 2, 0, 4, ("uncond", "image", "words")),
        (True, False, 2, 3, 1, ("uncond", "image")),
        (False, True, 2, 3, 1, ("uncond", "joint")),
        (False, False, 2, 3, 1, ("uncond",)),
    ],
)
def test_branches_of_weight_zero_are_not_needed(has_images, has_words, w, t, s, needed):
    assert branch_weights(has_images, has_words, w, t, s).needed == needed


@given(w=scales, t=scales, s=scales)
def test_outside_the_interval_nothing_is_pushed_beyond_plain_conditioning(w, t, s):
    weights = branch_weights(True, True, *outside_interval(w, t, s))
    assert weights == BranchWeights(image=1 - min(t, 1), joint=min(t, 1))
