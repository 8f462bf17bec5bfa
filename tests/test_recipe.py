"""A recipe survives the PNG, and nothing that was tampered with gets through."""

import dataclasses
import io
import json
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vilex import recipe
from vilex.config import GenerationConfig
from vilex.recipe import (
    Recipe,
    RecipeImage,
    build_recipe,
    build_recipe_image,
    differences,
    environment,
    load_recipe,
    save_png,
)

IMAGE = Image.new("RGB", (20, 30), (9, 99, 199))
CONFIG = GenerationConfig(num_tokens=16, seed=2**32 - 2, guidance_scale=3, negative_prompt="blur")
DOG = RecipeImage("dog", 16, 0.5, "pad")


def made(prompt="<image> im Grünen 🐕 狗", images=(DOG,)) -> Recipe:
    return Recipe(prompt, CONFIG, "nano", "0123456789ab", "float32", "cpu", environment(), tuple(images))


def png_with(text, zip=False, key="vilex"):
    info = PngInfo()
    info.add_text(key, text, zip=zip)
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("images", [(), (DOG,), (DOG, RecipeImage("a+b", 3, 1, "", "vilex-2:m:x"))])
def test_a_recipe_comes_back_from_every_source(tmp_path, images):
    path = tmp_path / "result.png"
    save_png(IMAGE, path, made(images=images))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path)):
        assert load_recipe(source) == made(images=images)
    assert Image.open(path).tobytes() == IMAGE.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["result.png"]


@settings(max_examples=50)
@given(st.text(max_size=300))
def test_any_prompt_survives(tmp_path_factory, prompt):
    path = tmp_path_factory.getbasetemp() / "prompt.png"
    save_png(IMAGE, path, made(prompt))
    assert load_recipe(path).prompt == prompt


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


def as_dict() -> dict:
    return {"version": 3, **dataclasses.asdict(made())}


def changed(**changes):
    return json.dumps({key: value for key, value in {**as_dict(), **changes}.items() if value != "drop"})


def config(**changes):
    return changed(config={key: v for key, v in {**CONFIG.to_dict(), **changes}.items() if v != "drop"})


def image(**changes):
    return changed(images=[{key: v for key, v in {**DOG.to_dict(), **changes}.items() if v != "drop"}])


@pytest.mark.parametrize(
    ("prompt", "now"),
    [
        ("[dog] in snow", "<image:2> [dog] in snow"),  # which put what it does not mention first
        ("<image:2> in snow", "<image:1> <image:2> in snow"),
        ("[dog] on [cat]", "[dog] on [cat]"),
        ("in snow", "in snow"),
    ],
)
def test_recipes_of_version_2_draw_what_they_drew(prompt, now):
    settings = {key: value for key, value in CONFIG.to_dict().items() if key != "words_scale"}
    images = [dataclasses.replace(DOG, name=name).to_dict() for name in ("dog", "cat")]
    earlier = load_recipe(png_with(changed(version=2, config=settings, prompt=prompt, images=images)))
    assert earlier.config == dataclasses.replace(CONFIG, words_scale=0.0)
    assert earlier.prompt == now


BAD = {
    "no json": ("seed=3", "Expecting value"),
    "no object": ("[1]", "a recipe is a JSON object, got list"),
    "deep": ("[" * 100_000, "recursion"),
    "older": (changed(version=1), "recipe version 1 is of an earlier ViLex and names no pictures"),
    "newer": (changed(version=4), "recipe version 4, this ViLex reads 2"),
    "no version": (changed(version="drop"), "recipe version None, this ViLex reads 2"),
    "version true": (changed(version=True), "recipe version True, this ViLex reads 2"),
    "version 3.0": (changed(version=3.0), "recipe version 3.0, this ViLex reads 2"),
    "unknown entry": (changed(callback="os.system"), "unknown entry 'callback'"),
    "missing entry": (changed(model="drop"), "model is missing"),
    "prompt number": (changed(prompt=5), "prompt must be str, got int"),
    "long prompt": (changed(prompt="x" * 1001), "the prompt has 1001 characters, the limit is 1000"),
    "long model": (changed(model="x" * 201), "model has 201 characters, the limit is 200"),
    "long fingerprint": (changed(fingerprint="x" * 201), "fingerprint has 201 characters"),
    "environment": (changed(environment={"torch": [1]}), "environment must hold text only"),
    "long version": (changed(environment={"torch": "x" * 300}), "torch has 300 characters, the limit is 200"),
    "many versions": (changed(environment={str(i): "" for i in range(999)}), "environment has 2887 characters"),
    "unknown setting": (config(steps=3), "config: unknown entry 'steps'"),
    "missing setting": (config(seed="drop"), "config: seed is missing"),
    "out of range": (config(num_tokens=512), "config: num_tokens must be between 1 and 511, got 512"),
    "float seed": (config(seed=1.0), "seed must be int, got float"),
    "bool": (config(num_images=True), "num_images must be int, got bool"),
    "text number": (config(tfg_scale="1"), "tfg_scale must be float, got str"),
    "huge": (changed().replace(str(CONFIG.seed), "9" * 400), "seed must be between 0 and 4.29497e.09, got 999"),
    "nan": (config(tfg_scale=float("nan")), "NaN is not a number"),
    "list": (config(negative_prompt=["x"]), "negative_prompt must be str, got list"),
    "scheduler": (config(scheduler="eval"), "scheduler must be one of"),
    "no list of images": (changed(images={}), "images must be list, got dict"),
    "many images": (changed(images=[DOG.to_dict()] * 512), "512 images, the limit is 511"),
    "image no object": (changed(images=["dog.png"]), "image 1 must be an object, got str"),
    "image path": (image(path="/etc/passwd"), "image 1: unknown entry 'path'"),
    "image without fit": (image(fit="drop"), "image 1: fit is missing"),
    "image fit": (image(fit="stretch"), "image 1: fit must be one of crop, start, end, pad or empty, got 'stretch'"),
    "image weight": (image(weight=2.5), "image 1: weight must be between 0 and 2, got 2.5"),
    "image bool": (image(weight=True), "image 1: weight must be float, got bool"),
    "image tokens": (image(num_tokens=0), "image 1: num_tokens must be between 1 and 511, got 0"),
    "image name": (image(name="x" * 300), "image 1: name has 300 characters, the limit is 200"),
    "image code": (image(code=None), "image 1: code must be str, got NoneType"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("zip", [False, True])
def test_tampered_recipes_give_one_sentence(tmp_path, text, message, zip):
    path = tmp_path / "result.png"
    path.write_bytes(png_with(text, zip))
    with pytest.raises(ValueError, match=f"^result.png carries settings that cannot be used: .*({message})") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("zip", "message"),
    [
        (False, "that cannot be used: 10010[0-9]+ characters, the limit is 10000000"),
        (True, "Decompressed data too large"),
    ],
)
def test_recipes_that_are_too_long_are_refused(tmp_path, zip, message):
    (tmp_path / "result.png").write_bytes(png_with(changed(model="x" * 10_010_000), zip))
    with pytest.raises(ValueError, match=f"^result.png .*{message}"):
        load_recipe(tmp_path / "result.png")


def test_the_tokens_of_a_long_context_fit(tmp_path):
    big = made(images=[dataclasses.replace(DOG, code="x" * 2_100_000)])
    save_png(IMAGE, tmp_path / "result.png", big)
    assert load_recipe(tmp_path / "result.png") == big


def test_a_recipe_that_could_not_be_read_back_is_not_written(tmp_path):
    big = made(images=[dataclasses.replace(DOG, code="x" * 2**24)])
    with pytest.raises(ValueError, match="the recipe carries settings that cannot be used: 16[0-9]+ characters"):
        save_png(IMAGE, tmp_path / "result.png", big)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", [0, 2])
def test_a_recipe_draws_its_own_picture_alone(pipeline, index):
    config = GenerationConfig(seed=5, num_images=3, num_tokens=4)
    built = build_recipe(pipeline, "<image> a dog", config, [DOG], index=index)
    assert built.config == GenerationConfig(seed=5 + index, num_tokens=4, scheduler="sde-dpm++")  # what "auto" meant
    assert (built.prompt, built.model, built.images) == ("<image> a dog", "tiny", (DOG,))
    assert (built.fingerprint, built.dtype, built.device) == (pipeline.fingerprint, "float32", "cpu")


def test_shared_tokens_come_back_only_for_their_model(pipeline, picture):
    tokens = pipeline.encode(picture, 5)[0]
    assert build_recipe_image(pipeline, "dog", tokens, weight=0.5, fit="pad").code == ""
    shared = build_recipe_image(pipeline, "dog", tokens, weight=0.5, fit="pad", share=True)
    assert (shared.name, shared.num_tokens, shared.weight, shared.fit) == ("dog", 5, 0.5, "pad")
    torch.testing.assert_close(shared.tokens(pipeline.fingerprint), tokens, rtol=0, atol=0.01 * float(tokens.norm()))
    assert DOG.tokens(pipeline.fingerprint) is None
    with pytest.raises(ValueError, match="the code was made by .* this model is 'other'"):
        shared.tokens("other")
    with pytest.raises(ValueError, match="the code of 'dog' has 5 tokens, its recipe says 4"):
        dataclasses.replace(shared, num_tokens=4).tokens(pipeline.fingerprint)


def test_differences_are_said_in_one_sentence(pipeline):
    here = build_recipe(pipeline, "", GenerationConfig())
    assert differences(here, pipeline) == ""
    versions = here.environment | {"torch": "1.0", "python": "3.99", "xformers": "0"}
    there = dataclasses.replace(here, dtype="float16", environment=versions)
    assert differences(there, pipeline) == (
        f"Drawn with dtype float16 (here float32), torch 1.0 (here {here.environment['torch']}): "
        "small differences are normal"
    )
    foreign = dataclasses.replace(here, model="mini", fingerprint="other")
    assert differences(foreign, pipeline) == (
        "Drawn by 'mini' with other weights than those in use: the picture will be another"
    )


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
    versions = environment()
    assert versions["torch"] == torch.__version__ and versions["python"].startswith("3.")
    assert all(isinstance(version, str) for version in versions.values())


def test_environment_leaves_out_what_is_absent(monkeypatch):
    monkeypatch.setattr(recipe, "_PACKAGES", ("pillow", "no-such-package-here"))
    assert set(environment()) == {"vilex", "python", "pillow"}
