"""Coring: what it takes from a picture and what it leaves."""

import pytest
import torch

from vilex.coring import core, finest_checkerboard

ROWS, COLUMNS = torch.arange(16)[:, None], torch.arange(16)
BOARD = ((ROWS + COLUMNS) % 2 * 2.0 - 1).expand(2, 3, 16, 16)
WITHOUT = {
    "even": torch.full((1, 3, 16, 16), 0.3),
    "stripes": (COLUMNS % 2 * 2.0 - 1).expand(1, 3, 16, 16),
    "edge": ((COLUMNS > 7) * 2.0 - 1).expand(1, 3, 16, 16),
    "ramp": ((ROWS + 2 * COLUMNS) / 48).expand(1, 3, 16, 16),
}


def test_a_checkerboard_is_all_finest():
    inside = finest_checkerboard(0.4 * BOARD)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, 0.4 * BOARD[..., 1:-1, 1:-1])


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_checkerboard_is_left_alone(name):
    torch.testing.assert_close(core(WITHOUT[name], 0.1), WITHOUT[name])


def test_a_faint_checkerboard_goes_and_a_strong_one_loses_the_strength():
    picture = WITHOUT["ramp"].expand(2, -1, -1, -1)
    faint, strong = core(picture + 0.05 * BOARD, 0.1), core(picture + 0.5 * BOARD, 0.1)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(faint[inside], picture[inside])
    torch.testing.assert_close(strong[inside], (picture + 0.4 * BOARD)[inside])


def test_pictures_do_not_depend_on_their_batch():
    pixels = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(core(pixels, 0.1)[1:2], core(pixels[1:2], 0.1))
