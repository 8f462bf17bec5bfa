"""Arithmetic on ViLex tokens keeps its promises for any tokens, and hints name words that are there."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vilex import words
from vilex.images import fit_image, load_image
from vilex.words import (
    blend,
    graft,
    likeness,
    shift,
    similar,
    weigh,
    without,
)

WIDTH = 7
shares = st.floats(0, 1)
counts = st.integers(1, 9)
seeds = st.integers(0, 10**6)


def tokens_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@given(counts, counts, shares, seeds)
def test_a_blend_seen_from_the_other_side_is_the_same(n, m, share, seed):
    assume(1 - (1 - share) == share)  # just below one half the other side is rounded to the half
    first, second = tokens_of(n, seed), tokens_of(m, seed + 1)
    close(blend(first, second, share), blend(second, first, 1 - share))


@given(counts, counts, seeds)
def test_a_blend_ends_exactly_at_its_pictures(n, m, seed):
    first, second = tokens_of(n, seed), tokens_of(m, seed + 1)
    assert torch.equal(blend(first, second, 0), first) and torch.equal(blend(first, second, 1), second)


@given(counts, shares, seeds)
def test_norms_of_a_blend_change_evenly_and_directions_turn_evenly(n, share, seed):
    first, second = tokens_of(n, seed), tokens_of(n, seed + 1)
    mixed = blend(first, second, share)
    close(mixed.norm(dim=1), first.norm(dim=1) * (1 - share) + second.norm(dim=1) * share)
    whole = torch.arccos(torch.cosine_similarity(first, second))
    turned = torch.arccos(torch.cosine_similarity(first, mixed).clamp(-1, 1))
    torch.testing.assert_close(turned, share * whole, rtol=0, atol=1e-6)


def test_a_right_angle_is_halved():
    first, second = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])
    torch.testing.assert_close(blend(first, second, 0.5), torch.tensor([[1.0, 1.0, 0.0]]) * 3 / math.sqrt(2))


@pytest.mark.parametrize(("share", "length"), [(0.0, 3), (0.4, 3), (0.5, 8), (0.6, 8), (1.0, 8)])
def test_tokens_of_the_longer_picture_alone_are_there_in_its_half(share, length):
    short, long = tokens_of(3, 1), tokens_of(8, 2)
    for mixed in (blend(short, long, share), blend(long, short, 1 - share)):
        assert len(mixed) == length and torch.equal(mixed[3:], long[3:length])


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_a_blend_of_parallel_opposite_and_empty_vectors_is_finite(factor):
    first = tokens_of(4, 3)
    mixed = blend(first, factor * first, 0.25)
    assert mixed.isfinite().all()
    if factor > 0:
        close(mixed, first * (0.75 + 0.25 * factor))


@given(counts, counts, st.integers(0, 75), seeds)
def test_a_graft_takes_each_token_from_one_picture(n, m, cut, seed):
    first, second = tokens_of(n, seed), tokens_of(m, seed + 1)
    grafted = graft(first, second, cut)
    head = min(cut, n)
    assert torch.equal(grafted[:head], first[:head]) and torch.equal(grafted[head:], second[cut:])
    assert len(grafted) == head + max(0, m - cut) > 0


@given(counts, st.floats(0, 2), seeds)
def test_weights_move_tokens_on_a_line_through_the_average_word(n, weight, seed):
    tokens, mean = tokens_of(n, seed), tokens_of(1, seed + 1)[0]
    weighed = weigh(tokens, weight, mean)
    close(weighed - mean, weight * (tokens - mean))
    assert torch.equal(weigh(tokens, 1, mean), tokens) and torch.equal(weigh(tokens, 0, mean), mean.expand(n, -1))


@given(st.integers(2, 9), st.data())
def test_one_token_can_be_left_out(n, data):
    tokens, index = tokens_of(n, 5), data.draw(st.integers(0, n - 1))
    rest = without(tokens, index)
    assert rest.shape == (n - 1, WIDTH)
    assert torch.equal(torch.cat([rest[:index], tokens[index : index + 1], rest[index:]]), tokens)


@given(counts, st.floats(-3, 3), seeds)
def test_word_algebra_can_be_undone(n, strength, seed):
    tokens, snow, sand = tokens_of(n, seed), tokens_of(2, seed + 1), tokens_of(3, seed + 2)
    moved = shift(tokens, snow, sand, strength)
    close(moved - tokens, (strength * (sand.mean(0) - snow.mean(0))).expand(n, -1))
    close(shift(moved, sand, snow, strength), tokens)
    assert torch.equal(shift(tokens, None, None), tokens)
    close(shift(tokens, None, sand), tokens + sand.mean(0))


BAD = {
    "share below": (lambda: blend(tokens_of(1, 0), tokens_of(1, 0), -0.1), "share must be between 0 and 1, got -0.1"),
    "share nan": (lambda: blend(tokens_of(1, 0), tokens_of(1, 0), math.nan), "share must be a number, got nan"),
    "cut": (lambda: graft(tokens_of(1, 0), tokens_of(1, 0), 512), "cut must be between 0 and 511, got 512"),
    "half a cut": (lambda: graft(tokens_of(1, 0), tokens_of(1, 0), 1.5), "cut must be a whole number, got 1.5"),
    "weight": (lambda: weigh(tokens_of(1, 0), 2.1, torch.zeros(WIDTH)), "weight must be between 0 and 2, got 2.1"),
    "weight text": (lambda: weigh(tokens_of(1, 0), "1", torch.zeros(WIDTH)), "weight must be a number, got '1'"),
    "only token": (lambda: without(tokens_of(1, 0), 0), "cannot leave out token 1 of 1"),
    "no such token": (lambda: without(tokens_of(3, 0), 3), "cannot leave out token 4 of 3"),
    "strength": (lambda: shift(tokens_of(1, 0), None, None, math.inf), "strength must be a finite number, got inf"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.lists(counts, min_size=1, max_size=30), counts, seeds)
def test_similar_gives_falling_scores_and_finds_the_picture_itself(lengths, n, seed):
    query = tokens_of(n, seed)
    stored = [tokens_of(length, seed + 1 + i) for i, length in enumerate(lengths)]
    found = similar(query, stored, 30)
    assert sorted(i for i, _ in found) == list(range(len(stored)))
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True) and all(-1.001 <= score <= 1.001 for score in scores)
    [(best, score)] = similar(query, [*stored, 2 * query], 1)
    assert best == len(stored) and score == pytest.approx(1, abs=1e-4)


def test_those_closest_by_token_1_are_ranked_by_sixteen():
    query = torch.zeros(20, WIDTH)
    query[:, 0] = 1.0
    turned = torch.zeros(WIDTH)
    turned[1] = 1.0
    late, middle, first = query.clone(), query.clone(), query.clone()
    late[16:], middle[8:], first[0] = turned, turned, turned  # beyond the sixteenth nothing counts
    assert similar(query, [middle, first, late], 3) == [(2, 1.0), (1, 0.9375), (0, 0.5)]
    # token 1 of `first` is the worst: it is no candidate when four of one token are asked for, whatever follows
    assert [i for i, _ in similar(query, [middle, middle, middle, middle, first], 1)] == [0]
    assert similar(query, [], 3) == []


@pytest.fixture(scope="module")
def examples(request) -> dict[str, Image.Image]:
    folder = request.config.rootpath / "assets" / "examples"
    return {path.stem: fit_image(load_image(path), 64) for path in sorted(folder.glob("*.[jp][pn]g"))}


def test_likeness_is_100_for_equal_pictures_and_low_for_others(examples):
    assert len(examples) >= 5
    for name, image in examples.items():
        assert likeness(image, image) == 100
        for other, second in examples.items():
            if name < other:
                assert 0 <= likeness(image, second) < 50  # two of them are nights
                assert likeness(image, second) == pytest.approx(likeness(second, image))


def test_likeness_falls_as_a_picture_changes_and_sees_layout(examples):
    image = examples["rocket"]
    darker = [likeness(image, ImageEnhance.Brightness(image).enhance(factor)) for factor in (0.9, 0.7, 0.4)]
    assert 100 > darker[0] > darker[1] > darker[2] > 0
    assert likeness(image, ImageOps.flip(image)) < 60
    assert likeness(image, image.resize((256, 256))) > 95


def test_likeness_halves_with_14_units_of_lightness():
    grey = [Image.new("RGB", (16, 16), (level,) * 3) for level in (119, 119 + 36)]  # L* 50.0 and 64.0
    assert likeness(*grey) == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_cielab_of_known_colours(colour, lab):
    torch.testing.assert_close(
        torch.from_numpy(words.to_lab(colour)).double(), torch.tensor(lab).double(), atol=0.05, rtol=0
    )
