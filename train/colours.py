"""Names for colours: the nearest of a few plain words in CIELAB, for a grid of cells or a whole picture."""

from collections.abc import Sequence

import numpy as np

from vilex.words import to_lab

# sRGB of each word, 0..255
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "light gray": (200, 200, 200),
    "gray": (135, 135, 135),
    "dark gray": (75, 75, 75),
    "black": (12, 12, 12),
    "red": (215, 30, 35),
    "dark red": (125, 20, 25),
    "orange": (240, 135, 35),
    "brown": (120, 75, 45),
    "dark brown": (60, 40, 28),
    "tan": (195, 160, 120),
    "beige": (230, 215, 185),
    "cream": (250, 243, 220),
    "yellow": (250, 220, 50),
    "gold": (205, 160, 50),
    "olive": (115, 110, 50),
    "light green": (150, 210, 130),
    "green": (60, 150, 55),
    "dark green": (30, 70, 40),
    "teal": (25, 125, 125),
    "cyan": (70, 210, 220),
    "light blue": (160, 200, 235),
    "blue": (45, 100, 210),
    "dark blue": (28, 50, 115),
    "navy": (16, 22, 60),
    "purple": (120, 50, 150),
    "lavender": (190, 165, 220),
    "pink": (245, 150, 180),
    "magenta": (215, 45, 150),
}
# Fine grids have up to 64 words, so each of these is one piece of a BERT vocabulary.
SHORT_COLOURS: dict[str, tuple[int, int, int]] = {
    **{name: rgb for name, rgb in COLOURS.items() if " " not in name and name not in ("teal", "cyan", "magenta")},
    "silver": COLOURS["light gray"],
    "charcoal": COLOURS["dark gray"],
    "maroon": COLOURS["dark red"],
    "turquoise": (50, 175, 180),
}

CELL_CHROMA_GAIN = 1.3  # a mean over a cell is grayer than what one sees there


def nearest_colours(
    colours: np.ndarray, names: dict[str, tuple[int, int, int]] = COLOURS, chroma_gain: float = 1.0
) -> np.ndarray:
    """Index (...) into `names` of the word nearest to each sRGB colour (..., 3), 0..255.

    The colours' a* and b* are multiplied by `chroma_gain` first.
    """
    words = to_lab(np.array(list(names.values())))  # (K,3)
    lab = to_lab(colours) * np.array([1, chroma_gain, chroma_gain], np.float32)
    return np.argmin((words**2).sum(-1) - 2 * np.einsum("...c,kc->...k", lab, words), axis=-1)


def summed_area(pixels: np.ndarray) -> np.ndarray:
    """Sums over all pixels above and left, (B,3,H+1,W+1), of uint8 pixels (B,3,H,W)."""
    sums = pixels.cumsum(axis=2, dtype=np.int32).cumsum(axis=3, dtype=np.int32)
    return np.pad(sums, ((0, 0), (0, 0), (1, 0), (1, 0)))


def cell_means(sums: np.ndarray, cells: int) -> np.ndarray:
    """Mean sRGB colour of each cell, float (B,cells,cells,3), of `summed_area`; H and W may be any size.

    Cells overlap by a pixel where the size is no multiple of `cells`.
    """
    (top, bottom), (left, right) = (_edges(size - 1, cells) for size in sums.shape[2:])
    bands = sums[:, :, bottom] - sums[:, :, top]  # (B,3,cells,W+1)
    totals = bands[..., right] - bands[..., left]  # (B,3,cells,cells)
    return (totals / np.outer(bottom - top, right - left)).transpose(0, 2, 3, 1)


def _edges(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(cells + 1) * size
    return steps[:-1] // cells, -(-steps[1:] // cells)


def grid_colours(pixels: np.ndarray, cells: int, names: dict[str, tuple[int, int, int]] = COLOURS) -> np.ndarray:
    """Index (B,cells,cells) into `names` of each cell's mean colour, of uint8 pixels (B,3,H,W)."""
    return name_cells(summed_area(pixels), cells, names)


def name_cells(sums: np.ndarray, cells: int, names: dict[str, tuple[int, int, int]] = COLOURS) -> np.ndarray:
    """As `grid_colours`, of `summed_area`: many grids of the same pictures share it."""
    return nearest_colours(cell_means(sums, cells), names, CELL_CHROMA_GAIN)


def colour_shares(indices: np.ndarray, names: Sequence[str] | dict = COLOURS) -> np.ndarray:
    """Share of each name, float (B,K) with rows that sum to 1, of colour indices (B,cells,cells)."""
    return (indices.reshape(len(indices), -1, 1) == np.arange(len(names))).mean(axis=1)
