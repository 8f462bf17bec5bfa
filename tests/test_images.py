"""Every picture that may enter, every one that must not, and the road to pixels and back."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from vilex import images
from vilex.images import contact_sheet, find_images, fit_image, load_image, to_images, to_pixels

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height=24, width=40, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def text_bomb():
    return png(32, 32, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9)))


PHOTO = Image.fromarray(noise())
NOT_ALLOWED = "bad.png is not a readable picture: its content is none of PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF"
BAD_FILES = {
    "empty": (b"", "bad.png is not a readable picture: it is empty"),
    "text": (b"this is no picture at all", NOT_ALLOWED),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', NOT_ALLOWED),
    "pdf": (encoded(PHOTO, "PDF"), NOT_ALLOWED),
    "eps": (encoded(PHOTO, "EPS"), NOT_ALLOWED),
    "ppm": (encoded(PHOTO, "PPM"), NOT_ALLOWED),
    "truncated png": (encoded(PHOTO)[:1500], "bad.png is not a readable picture: "),
    "truncated jpeg": (encoded(PHOTO, "JPEG")[:-200], "bad.png is not a readable picture: image file is truncated"),
    "png without pixels": (png(32, 32), "bad.png is not a readable picture: "),
    "flipped bytes": (encoded(PHOTO).replace(b"IDAT", b"IDAX"), "bad.png is not a readable picture: "),
    "100 megapixels": (png(10_000, 10_000), "bad.png is too large: 10000x10000 pixels, the limit is 40 megapixels"),
    "400 megapixels": (png(20_000, 20_000), "bad.png is too large: the limit is 40 megapixels"),
    "text bomb": (text_bomb(), "bad.png is not a readable picture: Decompressed data too large"),
    "1x1": (encoded(Image.new("RGB", (1, 1))), "bad.png is too small: 1x1 pixels, each side needs at least 16"),
    "1x4000": (encoded(Image.new("RGB", (1, 4000))), "bad.png is too small: 1x4000 pixels"),
    "15 wide": (encoded(Image.new("RGB", (15, 99))), "bad.png is too small: 15x99 pixels"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(64), "bad.png is a HEIC picture, .* export it as JPEG or PNG"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_give_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_image(path)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path.name} is a folder, not a picture$"):
        load_image(tmp_path)
    for missing in (tmp_path / "gone.png", str(tmp_path / "gone.png"), "gone\0.png"):
        with pytest.raises(ValueError, match="^gone.*png does not exist or is not a file$"):
            load_image(missing)


def test_a_header_is_refused_before_any_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="^the picture is too large: 9000x9000"):
        load_image(png(9_000, 9_000))


def test_pixel_limit_from_the_environment(monkeypatch):
    monkeypatch.setenv("VILEX_MAX_PIXELS", str(24 * 40 - 1))
    with pytest.raises(ValueError, match="too large: 40x24"):
        load_image(PHOTO)
    monkeypatch.setenv("VILEX_MAX_PIXELS", str(24 * 40))
    assert load_image(PHOTO).size == (40, 24)
    monkeypatch.setenv("VILEX_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="^VILEX_MAX_PIXELS must be a whole number of at least 256, got 'many'$"):
        load_image(PHOTO)


def test_an_unknown_background_is_refused():
    with pytest.raises(ValueError, match="background must be one of white, grey, black, got 'pink'"):
        load_image(PHOTO, background="pink")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
def test_damaged_bytes_load_or_raise_value_error(format, data):
    content = bytearray(encoded(PHOTO, format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(content)).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("the picture is ")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_every_source_and_format_gives_the_same_picture(tmp_path, format):
    smooth = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    content = encoded(smooth, format)
    path = tmp_path / "picture.dat"
    path.write_bytes(content)
    loaded = [load_image(source) for source in (path, str(path), content, io.BytesIO(content), Image.open(path))]
    for image in loaded:
        assert type(image) is Image.Image and image.mode == "RGB" and image.size == (48, 32)
        np.testing.assert_array_equal(image, loaded[0])
    np.testing.assert_allclose(np.asarray(loaded[0], float), np.asarray(smooth, float), atol=6)


def corners(image):
    """Colours of the four corners, clockwise from top left."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (right, bottom), (0, bottom))]


def test_all_eight_orientations_come_out_upright():
    upright = Image.new("RGB", (20, 30), "white")
    for colour, corner in ((RED, (0, 0)), (GREEN, (10, 0)), (BLUE, (10, 15))):
        upright.paste(colour, (*corner, corner[0] + 10, corner[1] + 15))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions that undo each orientation
    for orientation, transposition in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        sideways = upright if transposition is None else upright.transpose(Image.Transpose(transposition))
        for format in ("PNG", "TIFF"):
            loaded = load_image(encoded(sideways, format, exif=exif))
            assert (loaded.size, corners(loaded)) == ((20, 30), corners(upright)), (orientation, format)
            assert not loaded.info and not loaded.getexif()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_neither_the_picture_nor_the_turn():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    wrong_type = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")  # cannot be written back
    assert load_image(encoded(PHOTO, exif=wrong_type)).size == (24, 40)
    assert load_image(encoded(PHOTO, exif=b"Exif\0\0no TIFF header")).size == (40, 24)


@pytest.mark.parametrize("background, level", [("white", 255), ("grey", 128), ("black", 0)])
def test_transparency_is_laid_over_the_background(background, level):
    hidden = Image.new("RGBA", (20, 30), (*RED, 0))
    hidden.putpixel((0, 0), (*BLUE, 255))
    palette = Image.new("P", (20, 30), 1)
    palette.putpalette([*BLUE, *RED])
    palette.putpixel((0, 0), 0)
    plain = Image.new("RGB", (20, 30), RED)
    plain.putpixel((0, 0), BLUE)
    contents = [
        encoded(hidden),
        encoded(hidden, "WEBP", lossless=True),
        encoded(palette, transparency=1),
        encoded(palette, "GIF", transparency=1),
        encoded(plain, transparency=RED),
    ]
    for content in contents:
        loaded = load_image(content, background=background)
        assert loaded.getpixel((0, 0)) == BLUE and loaded.getpixel((9, 9)) == (level,) * 3
    grey = load_image(encoded(Image.new("LA", (20, 30), (77, 0))), background=background)
    assert grey.getpixel((3, 3)) == (level,) * 3


@pytest.mark.parametrize(
    "drawn, level",
    [((250, 250, 250, 255), 128), ((250, 250, 200, 255), 255), (None, 255), ((250, 250, 250, 90), 255)],
)
def test_what_white_would_hide_is_laid_on_grey_and_that_is_noted(drawn, level):
    logo, notes = Image.new("RGBA", (20, 30), (0, 0, 0, 0)), []
    if drawn:
        logo.paste(drawn, (4, 4, 9, 9))
    loaded = load_image(encoded(logo), on_note=notes.append)
    assert loaded.getpixel((15, 15)) == (level,) * 3
    assert notes == (["the picture is white on nothing: it is laid on grey"] if level == 128 else [])
    assert load_image(encoded(logo), background="white").getpixel((15, 15)) == (255, 255, 255)


def test_a_white_picture_without_transparent_parts_stays_white():
    white, notes = Image.new("RGBA", (20, 30), "white"), []
    assert load_image(encoded(white), on_note=notes.append).getpixel((3, 3)) == (255, 255, 255)
    assert notes == []


def test_half_transparent_pixels_mix():
    assert load_image(Image.new("RGBA", (20, 30), (0, 0, 0, 51))).getpixel((1, 1)) == (204, 204, 204)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_rescaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 40 * 24).round().astype(np.uint16).reshape(24, 40)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), format)), dtype=float)
    np.testing.assert_allclose(loaded, (ramp[..., None] / 257).repeat(3, axis=2), atol=0.51)


def test_a_transparent_level_of_a_sixteen_bit_picture():
    ramp = np.full((24, 40), 5000, dtype=np.uint16)
    ramp[0, 0] = 65535
    loaded = load_image(encoded(Image.fromarray(ramp), transparency=5000), background="grey")
    assert loaded.getpixel((0, 0)) == (255,) * 3 and loaded.getpixel((5, 5)) == (128,) * 3


@pytest.mark.parametrize("peak, dtype", [(1, "float32"), (255, "float32"), (70000, "float32"), (65535, "int32")])
def test_wide_greys_keep_their_range(peak, dtype):
    ramp = np.linspace(0, peak, 40 * 24).reshape(24, 40).astype(dtype)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), "TIFF")), dtype=float)[..., 0]
    np.testing.assert_allclose(loaded, ramp * (255 / peak), atol=0.51)


def test_floats_that_are_no_numbers_become_black():
    values = np.ones((24, 40), dtype=np.float32)
    values[0, :3] = (np.nan, np.inf, -5)
    loaded = np.asarray(load_image(encoded(Image.fromarray(values), "TIFF")))[..., 0]
    assert loaded[0].tolist() == [0, 0, 0] + [255] * 37 and loaded[1:].min() == 255


def test_cmyk_without_a_profile_is_taken_as_it_is():
    cyan = Image.new("CMYK", (20, 30), (255, 0, 0, 0))
    assert load_image(encoded(cyan, "TIFF")).getpixel((3, 3)) == (0, 255, 255)
    np.testing.assert_allclose(load_image(encoded(cyan, "JPEG")).getpixel((3, 3)), (0, 255, 255), atol=2)


def test_cmyk_with_a_broken_or_foreign_profile_is_taken_as_it_is():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile", srgb):
        content = encoded(Image.new("CMYK", (20, 30), (255, 0, 0, 0)), "TIFF", icc_profile=profile)
        assert load_image(content).getpixel((3, 3)) == (0, 255, 255)


def linear_rgb_profile():
    """sRGB with its transfer curve replaced by a straight line, as bytes."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        tag, offset, size = struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv\0\0\0\0\0\0\0\0"
            profile[140 + 12 * i : 144 + 12 * i] = struct.pack(">I", 12)
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_is_applied_and_dropped(mode):
    grey = Image.new("RGB", (20, 30), (55, 55, 55)).convert(mode)
    if mode == "RGBA":
        grey.putpixel((0, 0), (*RED, 0))
    loaded = load_image(encoded(grey, icc_profile=linear_rgb_profile()))
    np.testing.assert_allclose(loaded.getpixel((3, 3)), 128, atol=2)  # 55/255 linear is 128/255 in sRGB
    assert loaded.getpixel((0, 0)) == ((255,) * 3 if mode == "RGBA" else loaded.getpixel((3, 3)))
    assert "icc_profile" not in loaded.info


def test_large_jpegs_are_decoded_at_a_fraction(monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "_upright", lambda image: decoded.append(image.size) or image.copy())
    load_image(encoded(Image.new("RGB", (8200, 1000)), "JPEG"))
    assert decoded == [(2050, 250)]


def test_the_first_frame_is_used_and_noted():
    frames = [Image.new("RGB", (20, 30), colour) for colour in (RED, GREEN, BLUE)]
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        notes = []
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert load_image(content, on_note=notes.append).getpixel((3, 3)) == RED
        assert notes == ["the picture has several frames or pages; the first one is used"]
    notes = []
    load_image(encoded(frames[0]), on_note=notes.append)
    load_image(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), on_note=notes.append)
    assert notes == []


def test_large_pictures_are_bounded_and_small_ones_kept():
    assert load_image(Image.new("RGB", (4100, 2050))).size == (2048, 1024)
    assert load_image(encoded(Image.new("RGB", (1000, 8200)), "JPEG")).size == (250, 2048)
    assert load_image(Image.new("RGB", (16, 2048))).size == (16, 2048)


def test_the_callers_picture_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    source = Image.open(io.BytesIO(encoded(Image.new("RGB", (4000, 30)), "JPEG", exif=exif)))
    assert load_image(source).size == (15, 2048)
    assert source.size == (4000, 30) and source.getexif()[0x0112] == 6


def test_find_images_takes_files_as_they_are_and_folders_by_suffix(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "sub/deep.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "notes.txt", tmp_path])
    assert [path.name for path in found] == ["notes.txt", "a.jpg", "b.PNG"]
    with pytest.raises(ValueError, match="gone does not exist"):
        find_images([tmp_path / "gone"])
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="no pictures in .*void; looked for .avif"):
        find_images([tmp_path / "void"])
    with pytest.raises(ValueError, match="no pictures in an empty list"):
        find_images([])


def test_crop_shows_the_centre_and_pad_the_whole():
    wide = Image.new("RGB", (90, 30), RED)
    wide.paste(BLUE, (30, 0, 60, 30))
    crop, pad = fit_image(wide, 24), fit_image(wide, 24, "pad", "grey")
    assert crop.size == pad.size == (24, 24)
    assert crop.crop((2, 0, 22, 24)).getcolors() == [(20 * 24, BLUE)]  # LANCZOS reaches 2 pixels over the cut
    assert pad.getpixel((1, 12)) == pad.getpixel((22, 12)) == RED and pad.getpixel((12, 12)) == BLUE
    assert [pad.getpixel((12, y)) for y in (7, 8, 15, 16)] == [(128,) * 3, BLUE, BLUE, (128,) * 3]


@pytest.mark.parametrize("turn", [None, Image.Transpose.TRANSPOSE])
@pytest.mark.parametrize(("fit", "colour"), [("start", RED), ("crop", BLUE), ("end", GREEN)])
def test_a_crop_can_lie_at_either_end_of_a_long_picture(fit, colour, turn):
    long = Image.new("RGB", (90, 30), RED)
    long.paste(BLUE, (30, 0, 60, 30))
    long.paste(GREEN, (60, 0, 90, 30))
    long = long if turn is None else long.transpose(turn)
    assert fit_image(long, 30, fit).crop((3, 3, 27, 27)).getcolors() == [(24 * 24, colour)]


def test_fitting_averages_instead_of_skipping_pixels():
    checks = Image.fromarray((np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    np.testing.assert_allclose(np.asarray(fit_image(checks, 12), float), 127.5, atol=12)


def test_a_very_long_picture_can_be_padded():
    assert fit_image(Image.new("RGB", (2048, 8), RED), 64, "pad").getpixel((30, 31)) == RED


@pytest.mark.parametrize(
    "size, fit, background, message",
    [
        (0, "crop", "white", "size must be at least 1 pixel, got 0"),
        (8, "zoom", "white", "fit must be one of crop, start, end, pad, got 'zoom'"),
        (8, "pad", "pink", "background must be one of white, grey, black, got 'pink'"),
    ],
)
def test_bad_fits_are_refused(size, fit, background, message):
    with pytest.raises(ValueError, match=message):
        fit_image(PHOTO, size, fit, background)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pixels_round_trip_bit_equal(batch, height, width, seed):
    arrays = [noise(height, width, seed=seed + i) for i in range(batch)]
    pixels = to_pixels([Image.fromarray(array) for array in arrays])
    assert pixels.shape == (batch, 3, height, width) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    for array, image in zip(arrays, to_images(pixels), strict=True):
        np.testing.assert_array_equal(array, image)


def test_pixels_keep_channel_row_and_column():
    image = Image.new("RGB", (5, 7))
    image.putpixel((3, 2), BLUE)
    expected = torch.full((1, 3, 7, 5), -1.0)
    expected[0, 2, 2, 3] = 1.0
    assert torch.equal(to_pixels(image), expected)


def test_to_images_rounds_and_clips():
    levels = torch.tensor([-9.0, 99.6, 99.4, 300.0])
    pixels = (levels / 127.5 - 1).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert np.asarray(to_images(pixels)[0])[0, :, 1].tolist() == [0, 100, 99, 255]
    assert to_images(torch.ones(1, 3, 2, 5, dtype=torch.bfloat16))[0].getpixel((4, 1)) == (255, 255, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value):
    pixels = torch.zeros(2, 3, 4, 5)
    pixels[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="pixels hold NaN or infinity"):
        to_images(pixels)


def test_pixels_of_mixed_pictures_are_refused():
    with pytest.raises(ValueError, match=r"share one size, got \[\(4, 5\), \(5, 4\)\]"):
        to_pixels([Image.new("RGB", (4, 5)), Image.new("RGB", (5, 4))])
    with pytest.raises(ValueError, match="must be RGB, got L"):
        to_pixels(Image.new("L", (4, 5)))
    with pytest.raises(ValueError, match=r"share one size, got \[\]"):
        to_pixels([])
    with pytest.raises(ValueError, match=r"pixels must be \(B,3,H,W\), got \(2, 4, 5, 3\)"):
        to_images(torch.zeros(2, 4, 5, 3))


def test_contact_sheet_places_pictures_in_rows_and_columns():
    tiles = [Image.new("RGB", (10, 20), colour) for colour in (RED, GREEN, BLUE)]
    sheet = contact_sheet([tiles[:2], tiles[2:]], gap=3)
    assert sheet.size == (2 * 10 + 3 * 3, 2 * 20 + 3 * 3)
    assert [sheet.getpixel(at) for at in ((3, 3), (16, 3), (3, 26), (16, 26), (0, 0))] == [
        RED,
        GREEN,
        BLUE,
        (255, 255, 255),
        (255, 255, 255),
    ]


def test_contact_sheet_writes_its_labels():
    tile = Image.new("RGB", (40, 40), RED)
    sheet = contact_sheet([[tile]], row_labels=["input"], column_labels=["16 tokens"])
    left, top = sheet.width - 44, sheet.height - 44
    assert left > 20 and top > 10
    for strip in (sheet.crop((0, 0, sheet.width, top)), sheet.crop((0, top, left // 2, sheet.height))):
        assert strip.convert("L").getextrema()[0] < 100


def test_contact_sheet_refuses_nothing_and_miscounted_labels():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([[], []])
    with pytest.raises(ValueError, match="2 column labels for 1 columns"):
        contact_sheet([[PHOTO]], column_labels=["a", "b"])
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        contact_sheet([[PHOTO]], row_labels=["a", "b"])


def test_at_most_two_pictures_are_decoded_at_once():
    with ThreadPoolExecutor(1) as pool:
        with images._decoding, images._decoding:
            third = pool.submit(load_image, PHOTO)
            with pytest.raises(TimeoutError):
                third.result(0.2)
        assert third.result(20).size == (40, 24)
