"""Draws the examples that are our own: python assets/examples/draw.py"""

from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 384
SCALE = 4  # drawn larger and scaled down, for smooth edges


def draw_sailboat() -> Image.Image:
    """A red and white sailing boat under a low sun, RGB, SIZE x SIZE."""
    image, draw = _canvas("#8ecae6")
    draw.ellipse(_scaled((0.62, 0.12, 0.84, 0.34)), fill="#ffd166")
    draw.rectangle(_scaled((0, 0.62, 1, 1)), fill="#1d6fa5")
    draw.rectangle(_scaled((0, 0.62, 1, 0.66)), fill="#3a8fc4")
    draw.polygon(_scaled((0.44, 0.14, 0.44, 0.6, 0.16, 0.6)), fill="#fdfdfb")
    draw.polygon(_scaled((0.48, 0.2, 0.48, 0.6, 0.74, 0.6)), fill="#d62839")
    draw.polygon(_scaled((0.14, 0.64, 0.8, 0.64, 0.68, 0.78, 0.26, 0.78)), fill="#6b3e26")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_cactus() -> Image.Image:
    """A green cactus in an orange pot before a pink wall, RGB, SIZE x SIZE."""
    image, draw = _canvas("#f6c6c7")
    draw.rectangle(_scaled((0, 0.8, 1, 1)), fill="#b5838d")
    for box in ((0.41, 0.14, 0.59, 0.66), (0.24, 0.3, 0.35, 0.5), (0.65, 0.24, 0.76, 0.44)):
        draw.rounded_rectangle(_scaled(box), SIZE * SCALE * 0.055, fill="#2a9d5c")
    draw.rectangle(_scaled((0.295, 0.42, 0.42, 0.5)), fill="#2a9d5c")
    draw.rectangle(_scaled((0.58, 0.36, 0.705, 0.44)), fill="#2a9d5c")
    draw.polygon(_scaled((0.3, 0.62, 0.7, 0.62, 0.64, 0.88, 0.36, 0.88)), fill="#e07a3f")
    draw.rectangle(_scaled((0.27, 0.58, 0.73, 0.67)), fill="#c8642c")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_mountains() -> Image.Image:
    """Snowy mountains over a dark wood at night, with a moon, RGB, SIZE x SIZE."""
    image, draw = _canvas("#1b2a4a")
    draw.ellipse(_scaled((0.14, 0.1, 0.32, 0.28)), fill="#f4f1de")
    draw.polygon(_scaled((-0.1, 0.85, 0.3, 0.34, 0.7, 0.85)), fill="#53627c")
    draw.polygon(_scaled((0.22, 0.44, 0.3, 0.34, 0.38, 0.44, 0.3, 0.49)), fill="#eef2f7")
    draw.polygon(_scaled((0.3, 0.85, 0.7, 0.24, 1.1, 0.85)), fill="#6f7f9b")
    draw.polygon(_scaled((0.595, 0.4, 0.7, 0.24, 0.805, 0.4, 0.7, 0.46)), fill="#ffffff")
    draw.rectangle(_scaled((0, 0.78, 1, 1)), fill="#16281f")
    for i in range(12):
        left = i / 12 - 0.01
        draw.polygon(_scaled((left, 0.82, left + 0.05, 0.66, left + 0.1, 0.82)), fill="#1f3a2d")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_fruit() -> Image.Image:
    """A red apple, a lemon and a purple plum on a blue cloth, RGB, SIZE x SIZE."""
    image, draw = _canvas("#efe6d8")
    draw.rectangle(_scaled((0, 0.62, 1, 1)), fill="#3d5a98")
    draw.ellipse(_scaled((0.12, 0.32, 0.54, 0.76)), fill="#c1121f")
    draw.ellipse(_scaled((0.2, 0.38, 0.3, 0.5)), fill="#e5636b")
    draw.rectangle(_scaled((0.325, 0.2, 0.345, 0.36)), fill="#5a3a22")
    draw.polygon(_scaled((0.345, 0.26, 0.46, 0.18, 0.43, 0.29)), fill="#588157")
    draw.ellipse(_scaled((0.56, 0.46, 0.94, 0.74)), fill="#f6c945")
    draw.ellipse(_scaled((0.46, 0.6, 0.72, 0.86)), fill="#5b2a6e")
    draw.ellipse(_scaled((0.51, 0.64, 0.57, 0.7)), fill="#8d5aa3")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _canvas(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), colour)
    return image, ImageDraw.Draw(image)


def _scaled(fractions: tuple[float, ...]) -> list[float]:
    return [fraction * SIZE * SCALE for fraction in fractions]


if __name__ == "__main__":
    folder = Path(__file__).parent
    for draw in (draw_sailboat, draw_cactus, draw_mountains, draw_fruit):
        draw().save(folder / f"{draw.__name__.removeprefix('draw_')}.png", optimize=True)
