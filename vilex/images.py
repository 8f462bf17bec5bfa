"""The one decoder for every picture that enters, and the way between pictures and pixels.

A file is untrusted: it is opened by content against an allow-list, its size is read from the header
before a pixel is decoded, and whatever is wrong with it becomes one sentence that names the file.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError, features

from vilex.config import FITS, Fit

MIN_SIDE = 16  # pixels; below it there is nothing to see
MAX_SIDE = 2048  # pixels of the longest side that load_image returns
MAX_PIXELS = 40_000_000  # a header that promises more is refused; VILEX_MAX_PIXELS overrides
MAX_DECODES = 2  # pictures decoded at the same time, which bounds memory
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
CENTRINGS = {"crop": (0.5, 0.5), "start": (0.0, 0.0), "end": (1.0, 1.0)}  # of those FITS that cut a picture's edges off
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"})

_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow's JPEG plugin also opens MPO
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_NEARLY_WHITE, _LOST_SHARE = 240, 0.98  # level of the darkest channel; share of what is opaque
_GREY_SCALES = (255, 65535)  # white of 8-bit and 16-bit data; beyond them the peak is white
_decoding = threading.BoundedSemaphore(MAX_DECODES)

Source = str | Path | bytes | BinaryIO | Image.Image


def load_image(
    source: Source, *, background: str | None = None, on_note: Callable[[str], None] | None = None
) -> Image.Image:
    """The picture as RGB, upright, in sRGB, its longest side at most MAX_SIDE, without metadata.

    Transparency is laid over `background`, by default over white, or over grey where the picture itself is white;
    `on_note` receives a sentence when it is grey, and when only the first of several frames or pages is used.
    Raises ValueError with one sentence naming the file when it is missing, broken, too large, too small or none of
    the formats allowed.
    """
    fill = None if background is None else _fill(background)
    with _decoding:
        image = decode_image(source, on_note=on_note)
        if fill is None:
            is_lost = _is_lost_on_white(image)
            fill = BACKGROUNDS["grey" if is_lost else "white"]
            if is_lost and on_note:
                on_note(f"{_name_of(source)} is white on nothing: it is laid on grey")
        return _flatten(image, fill)


def decode_image(
    source: Source, *, name: str | None = None, on_note: Callable[[str], None] | None = None
) -> Image.Image:
    """The picture as `load_image` gives it, but RGBA where it is transparent; any number may be decoded at once.

    `name` is what messages call it instead of the file's name. Raises ValueError as `load_image`.
    """
    name = name or _name_of(source)
    notes: list[str] = []
    with _refusing(name):
        image = _to_8bit(_read(source, name, notes))
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        image = _to_srgb(image)
    for note in notes if on_note else ():
        on_note(note)
    return image


class _Refused(ValueError):
    """A ValueError that already is the sentence for the user."""


def _fill(background: str) -> tuple[int, int, int]:
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    return BACKGROUNDS[background]


def _name_of(source: Source) -> str:
    path = source if isinstance(source, str | Path) else getattr(source, "name", None)
    return Path(path).name or str(path) if isinstance(path, str | Path) else "the picture"


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise ValueError(str(error)) from error.__cause__
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: the limit is {max_pixels() / 1e6:g} megapixels") from error
    except Exception as error:  # on broken bytes Pillow's plugins raise nearly anything
        raise ValueError(f"{name} is not a readable picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(_allowed_formats())}"
    return (getattr(error, "strerror", None) or str(error)).split("\n")[0].rstrip(".") or "its data is broken"


def max_pixels() -> int:
    """The most pixels a picture may have: VILEX_MAX_PIXELS, else MAX_PIXELS."""
    text = os.environ.get("VILEX_MAX_PIXELS", str(MAX_PIXELS))
    if not text.isdecimal() or int(text) < MIN_SIDE**2:
        raise _Refused(f"VILEX_MAX_PIXELS must be a whole number of at least {MIN_SIDE**2}, got {text!r}")
    return int(text)


def _read(source: Source, name: str, notes: list[str]) -> Image.Image:
    if isinstance(source, Image.Image):
        _check_size(source.size, name)
        return _upright(source)
    with _open_binary(source, name) as file:
        _check_header(file.read(32), name)
        file.seek(0)
        with Image.open(file, formats=_allowed_formats()) as image:
            _check_size(image.size, name)
            if image.format != "MPO" and getattr(image, "is_animated", False):
                notes.append(f"{name} has several frames or pages; the first one is used")
            _draft(image)
            return _upright(image)


def _open_binary(source: str | Path | bytes | BinaryIO, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    if not isinstance(source, str | Path):
        return BytesIO(source.read())
    if os.path.isdir(source):
        raise _Refused(f"{name} is a folder, not a picture")
    if not os.path.isfile(source):
        raise _Refused(f"{name} does not exist or is not a file")
    return open(source, "rb")


def _check_header(header: bytes, name: str) -> None:
    if not header:
        raise _Refused(f"{name} is not a readable picture: it is empty")
    if header[4:8] == b"ftyp" and header[8:12] in _HEIC_BRANDS and b"avif" not in header and not _register_heif():
        raise _Refused(f"{name} is a HEIC picture, which this installation cannot read: export it as JPEG or PNG")


def _register_heif() -> bool:
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif  # optional: it brings its own codec

    pillow_heif.register_heif_opener()
    return True


def _allowed_formats() -> list[str]:
    optional = {"AVIF": features.check("avif"), "HEIF": "HEIF" in Image.OPEN}
    return _FORMATS + [name for name, available in optional.items() if available]


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > max_pixels():
        raise _Refused(f"{name} is too large: {width}x{height} pixels, the limit is {max_pixels() / 1e6:g} megapixels")
    if min(size) < MIN_SIDE:
        raise _Refused(f"{name} is too small: {width}x{height} pixels, each side needs at least {MIN_SIDE}")


def _draft(image: Image.Image) -> None:
    scale = MAX_SIDE / max(image.size)
    if scale < 1:
        image.draft(None, (int(image.width * scale), int(image.height * scale)))


def _upright(image: Image.Image) -> Image.Image:
    upright = image.copy()
    with suppress(Exception):  # broken EXIF raises nearly anything, mostly after the turn, when it is written back
        ImageOps.exif_transpose(upright, in_place=True)
    return upright


def _to_8bit(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8bit(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "CMYK") else image.convert("RGB")


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    values = np.array(image, dtype=np.float32)
    alpha = np.where(values == image.info.get("transparency"), 0, 255).astype(np.uint8)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    values *= 255 / _white_level(image.mode, float(values.max()))  # in place: a large picture fits in memory once
    grey = Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))
    grey.putalpha(Image.fromarray(alpha))
    return grey.convert("RGBA")


def _white_level(mode: str, peak: float) -> float:
    if mode.startswith("I;16"):
        return _GREY_SCALES[-1]
    scales = (1, *_GREY_SCALES) if mode == "F" else _GREY_SCALES
    return next((scale for scale in scales if peak <= scale), peak)


def _to_srgb(image: Image.Image) -> Image.Image:
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    profile = image.info.get("icc_profile")
    if profile:
        try:
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, BytesIO(profile), srgb, outputMode=mode)
        except ImageCms.PyCMSError:  # broken, or made for another mode: the colours are taken as they are
            pass
    return image.convert(mode)


def _is_lost_on_white(image: Image.Image) -> bool:
    """Whether next to nothing of a picture with transparent parts would be seen on white."""
    if image.mode != "RGBA":
        return False
    levels = np.asarray(image)
    is_opaque = levels[..., 3] > 127
    if is_opaque.all() or not is_opaque.any():
        return False
    return np.mean(levels[is_opaque][:, :3].min(-1) >= _NEARLY_WHITE) >= _LOST_SHARE


def _flatten(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", image.size, fill)  # new, so that no EXIF or ICC block comes along
    canvas.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    return canvas


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` as they are and, for a folder, the picture files in it sorted by name.

    Folders are not entered further and hidden files are left out. Raises ValueError when a path
    does not exist or nothing is found.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        found += sorted(filter(_is_picture, path.iterdir())) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"no pictures in {', '.join(map(str, paths)) or 'an empty list'}; looked for {_suffixes()}")
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))


def fit_image(image: Image.Image, size: int, fit: Fit = "crop", background: str = "white") -> Image.Image:
    """What the encoder sees: `image` as a square of `size` pixels, cropped as `fit` says or the whole padded.

    Raises ValueError on a size below 1, an unknown fit or background.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    check_fit(fit)
    if fit == "pad":
        return _pad(image, size, _fill(background))
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, centering=CENTRINGS[fit])


def check_fit(fit: object) -> None:
    """Raises ValueError unless it is one of FITS."""
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")


def _pad(image: Image.Image, size: int, fill: tuple[int, int, int]) -> Image.Image:
    # not ImageOps.pad: it fails where a very long picture rounds to no pixels on its short side
    scale = size / max(image.size)
    inner = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), fill)
    canvas.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return canvas


def to_pixels(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """Pixels (B,3,H,W) float32 in [-1,1] of RGB pictures of one size.

    Raises ValueError on no pictures, several sizes or another mode than RGB.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    if len({image.size for image in images}) != 1:
        raise ValueError(f"pictures must share one size, got {[image.size for image in images]}")
    if modes := {image.mode for image in images} - {"RGB"}:
        raise ValueError(f"pictures must be RGB, got {', '.join(sorted(modes))}")
    array = np.stack([np.asarray(image) for image in images])  # (B,H,W,3)
    return from_levels(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous())  # (B,3,H,W)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB pictures of pixels (B,3,H,W) in [-1,1], rounded to the nearest level; values outside are clipped.

    Raises ValueError on another shape and on NaN or infinity.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B,3,H,W), got {tuple(pixels.shape)}")
    levels = to_levels(pixels.detach().cpu()).permute(0, 2, 3, 1)  # (B,H,W,3)
    return [Image.fromarray(array) for array in levels.contiguous().numpy()]


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """The levels 0..255, uint8, that a file holds of pixels in [-1,1]; values outside are clipped, the shape stays.

    Raises ValueError on NaN and infinity.
    """
    if not pixels.isfinite().all():
        raise ValueError("pixels hold NaN or infinity; half precision overflowed or the weights are broken")
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1,1], float32, of levels 0..255; `to_levels` is the inverse."""
    return levels.float() / 127.5 - 1


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    gap: int = 4,
) -> Image.Image:
    """One white RGB picture with the pictures in a grid, `gap` pixels apart, labels left and above.

    Rows may differ in length. Raises ValueError without pictures, or when labels are given and do
    not count one per row or one per column.
    """
    columns = max(map(len, rows), default=0)
    if not columns:
        raise ValueError("a contact sheet needs at least one picture")
    _check_labels(row_labels, len(rows), "row")
    _check_labels(column_labels, columns, "column")
    font = ImageFont.load_default(12)
    cell_width = max([image.width for row in rows for image in row] + [_text_width(font, t) for t in column_labels])
    cell_height = max(image.height for row in rows for image in row)
    left = max((_text_width(font, text) + gap for text in row_labels), default=0)
    top = 16 + gap if column_labels else 0
    corners_x = [left + gap + i * (cell_width + gap) for i in range(columns)]
    corners_y = [top + gap + i * (cell_height + gap) for i in range(len(rows))]
    sheet = Image.new("RGB", (corners_x[-1] + cell_width + gap, corners_y[-1] + cell_height + gap), "white")
    for y, row in zip(corners_y, rows, strict=True):
        for x, image in zip(corners_x, row, strict=False):
            sheet.paste(image, (x, y))
    _write(sheet, [((x, gap), text) for x, text in zip(corners_x, column_labels, strict=False)], font)
    _write(sheet, [((gap, y), text) for y, text in zip(corners_y, row_labels, strict=False)], font)
    return sheet


def _check_labels(labels: Sequence[str], count: int, kind: str) -> None:
    if labels and len(labels) != count:
        raise ValueError(f"{len(labels)} {kind} labels for {count} {kind}s")


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _write(sheet: Image.Image, labels: Sequence[tuple[tuple[int, int], str]], font: ImageFont.FreeTypeFont) -> None:
    draw = ImageDraw.Draw(sheet)
    for corner, text in labels:
        draw.text(corner, text, fill="black", font=font)
