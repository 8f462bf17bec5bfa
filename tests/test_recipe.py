"""A recipe survives the PNG, and nothing that was tampered with gets through."""

import io
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vilex import recipe
from vilex.config import GenerationConfig
from vilex.recipe import build_recipe, environment, load_recipe, save_png

IMAGE = Image.new("RGB", (20, 30), (9, 99, 199))
GENERATION = GenerationConfig(num_tokens=16, seed=2**32 - 2, guidance_scale=3, negative_prompt="blur")


def made(prompt="<image> im Grünen 🐕 狗", **options):
    return build_recipe(prompt, GENERATION, model="nano", dtype="float32", device="cpu", **options)


def png_with(text, zip=False, key="vilex"):
    info = PngInfo()
    info.add_text(key, text, zip=zip)
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"codes": ["abc", "def"]}])
def test_a_recipe_comes_back_from_every_source(tmp_path, options):
    path = tmp_path / "result.png"
    save_png(IMAGE, path, made(**options))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path)):
        loaded = load_recipe(source)
        assert loaded == made(**options)
        assert GenerationConfig.from_dict(loaded["generation"]) == GENERATION
    assert Image.open(path).tobytes() == IMAGE.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["result.png"]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_any_prompt_survives(tmp_path_factory, prompt):
    path = tmp_path_factory.getbasetemp() / "prompt.png"
    save_png(IMAGE, path, made(prompt))
    assert load_recipe(path)["prompt"] == prompt


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "result.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(recipe.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(IMAGE, path, made())
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_pictures_without_a_recipe_give_none(tmp_path):
    for format in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        IMAGE.save(buffer, format)
        assert load_recipe(buffer.getvalue()) is None
    assert load_recipe(png_with("{}", key="parameters")) is None
    assert load_recipe(b"no picture") is None
    assert load_recipe(IMAGE) is None


def changed(**changes):
    return json.dumps({key: value for key, value in {**made(), **changes}.items() if value != "drop"})


def generation(**changes):
    return changed(generation={**GENERATION.to_dict(), **changes})


BAD = {
    "no json": ("seed=3", "Expecting value"),
    "no object": ("[1]", "a recipe is a JSON object, got list"),
    "deep": ("[" * 100_000, "recursion"),
    "long": (changed(model="x" * 600_000), "600[0-9]+ characters, the limit is 524288"),
    "newer": (changed(version=2), "recipe version 2, this ViLex reads 1"),
    "no version": (changed(version="drop"), "recipe version None, this ViLex reads 1"),
    "version true": (changed(version=True), "version must be int, got bool"),
    "unknown entry": (changed(callback="os.system"), "unknown entry 'callback'"),
    "missing entry": (changed(model="drop"), "model is missing"),
    "prompt number": (changed(prompt=5), "prompt must be str, got int"),
    "long prompt": (changed(prompt="x" * 1001), "the prompt has 1001 characters, the limit is 1000"),
    "environment": (changed(environment={"torch": [1]}), "environment must hold text only"),
    "codes": (changed(codes=[1]), "codes must hold text only"),
    "unknown setting": (generation(steps=3), "GenerationConfig has no setting 'steps'"),
    "out of range": (generation(num_tokens=76), "num_tokens must be between 1 and 75, got 76"),
    "float seed": (generation(seed=1.0), "seed must be int, got float"),
    "bool": (generation(num_images=True), "num_images must be int, got bool"),
    "text number": (generation(tfg_scale="1"), "tfg_scale must be float, got str"),
    "huge": (changed().replace(str(GENERATION.seed), "9" * 400), "too large|int too big"),
    "nan": (generation(tfg_scale=float("nan")), "NaN is not a number"),
    "list": (generation(negative_prompt=["x"]), "negative_prompt must be str, got list"),
    "scheduler": (generation(scheduler="eval"), "scheduler must be one of"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("zip", [False, True])
def test_tampered_recipes_give_one_sentence(tmp_path, text, message, zip):
    path = tmp_path / "result.png"
    path.write_bytes(png_with(text, zip))
    with pytest.raises(ValueError, match=f"^result.png carries settings that cannot be used: .*({message})") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="the recipe carries settings that cannot be used: model is missing"):
        save_png(IMAGE, tmp_path / "result.png", {k: v for k, v in made().items() if k != "model"})
    assert not list(tmp_path.iterdir())


def test_broken_files_are_named(tmp_path):
    bomb = bytearray(png_with("x" * 9, zip=True))
    chunk = b"zTXtvilex\0\0" + zlib.compress(bytes(80_000_000), 9)
    start = bomb.index(b"zTXt") - 4
    bomb[start:start] = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="^bomb.png is not a readable picture: Decompressed data too large"):
        load_recipe(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="^gone.png is not a readable picture: No such file"):
        load_recipe(tmp_path / "gone.png")


def test_environment_names_the_versions_in_use():
    import torch

    versions = environment()
    assert versions["torch"] == torch.__version__ and versions["python"].startswith("3.")
    assert all(isinstance(version, str) for version in versions.values())


def test_environment_leaves_out_what_is_absent(monkeypatch):
    monkeypatch.setattr(recipe, "_PACKAGES", ("pillow", "no-such-package-here"))
    assert set(environment()) == {"vilex", "python", "pillow"}
