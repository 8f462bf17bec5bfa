"""The command line: what it writes, what it says, and how it ends."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from vilex import cli, desk, similar
from vilex.codes import VilexCode, from_text, load_code, save_code, to_text
from vilex.config import GenerationConfig
from vilex.pipeline import VilexPipeline
from vilex.recipe import Recipe, RecipeImage, load_recipe, save_png
from vilex.upsampler import LanczosUpsampler

FAST = ("--steps", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch, pipeline, picture) -> Path:
    """The working folder, with dog.png, a folder `photos` of cat.png, dog.jpg and broken.png, and a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VILEX_OUTPUTS", raising=False)
    for module in (cli, desk, similar):
        monkeypatch.setattr(module, "load_pipeline", lambda engine: pipeline)
    monkeypatch.setattr(desk, "build_upsampler", LanczosUpsampler)
    (tmp_path / "photos").mkdir()
    for name in ("dog.png", "photos/cat.png", "photos/dog.jpg"):
        picture.save(name)
    Path("photos/broken.png").write_bytes(b"no picture")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def names_in(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_the_environment_names_the_folder_of_results(folder, monkeypatch):
    monkeypatch.setenv("VILEX_OUTPUTS", "elsewhere")
    assert run("reconstruct", "dog.png", "--tokens", "1", *FAST).exit_code == 0
    assert names_in("elsewhere") == ["dog-t1.png"]


def test_reconstruct_writes_one_picture_per_number_of_tokens(folder):
    result = run("reconstruct", "dog.png", "--tokens", "4,1,4", "--out", "a/b", *FAST)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.split() == [str(Path("a/b/dog-t1.png")), str(Path("a/b/dog-t4.png"))]
    assert names_in("a/b") == ["dog-t1.png", "dog-t4.png"]
    assert load_recipe("a/b/dog-t4.png").config.num_tokens == 4
    assert (pixels_of("a/b/dog-t1.png") != pixels_of("a/b/dog-t4.png")).any()


def test_reconstruct_of_a_short_code_draws_no_more_tokens_than_it_holds(folder):
    run("encode", "dog.png", "--tokens", "3", "--out", "dog.vilex")
    result = run("reconstruct", "dog.vilex", "--tokens", "1,4,5", "--out", "out", *FAST)
    assert names_in("out") == ["dog-t1.png", "dog-t3.png"]
    assert result.stderr == "dog.vilex: has 3 tokens, fewer than the 5 asked for\n"


def test_a_picture_depends_on_its_seed_not_on_its_batch(folder):
    assert run("vary", "dog.png", "--tokens", "4", "--count", "3", "--out", "a", "--raw", *FAST).exit_code == 0
    one = run("vary", "dog.png", "--tokens", "4", "--count", "1", "--seed", "1", "--out", "b", "--raw", *FAST)
    assert one.exit_code == 0 and names_in("b") == ["dog-seed1.png"]
    assert names_in("a") == ["dog-seed0.png", "dog-seed1.png", "dog-seed2.png"]
    assert abs(pixels_of("a/dog-seed1.png") - pixels_of("b/dog-seed1.png")).max() <= 2
    assert abs(pixels_of("a/dog-seed0.png") - pixels_of("b/dog-seed1.png")).max() > 2


def test_pngs_carry_the_settings_that_draw_them_alone(folder, pipeline):
    scales = ("--tfg", "2.5", "--words-scale", "1.5", "--guidance", "1.5")
    run("mix", "dog.png", "--prompt", "<image> on the beach", "--count", "2", "--tokens", "4", *scales, "--seed", "7",
        "--out", "out", *FAST)  # fmt: skip
    recipe = load_recipe("out/dog-mix-seed8.png")
    expected = {"num_tokens": 4, "seed": 8, "num_inference_steps": 2, "guidance_scale": 1.5, "tfg_scale": 2.5}
    expected |= {"words_scale": 1.5}
    assert recipe.config == GenerationConfig(**expected, scheduler="sde-dpm++")  # with what "auto" meant
    assert (recipe.prompt, recipe.model) == ("<image> on the beach", "tiny")
    assert (recipe.dtype, recipe.device) == ("float32", "cpu")


def test_raw_saves_the_models_own_pixels(folder):
    run("generate", "--prompt", "a red dog", "--count", "1", "--out", "small", "--raw", *FAST)
    run("generate", "--prompt", "a red dog", "--count", "1", "--out", "large", *FAST)
    assert pixels_of("small/a-red-dog-seed0.png").shape == (32, 32, 3)
    assert pixels_of("large/a-red-dog-seed0.png").shape == (128, 128, 3)


def test_words_without_letters_name_a_picture_too(folder):
    assert run("generate", "--prompt", "...", "--count", "1", "--out", "out", *FAST).exit_code == 0
    assert names_in("out") == ["picture-seed0.png"]


def test_one_placeholder_gives_each_photo_its_picture(folder):
    result = run("mix", "dog.png", "photos/cat.png", "--prompt", "a painting of <image>", "--out", "out", *FAST)
    assert result.exit_code == 0 and names_in("out") == ["cat-mix-seed0.png", "dog-mix-seed0.png"]


def test_a_prompt_takes_words_from_a_photo_and_adds_others(folder):
    for prompt, out in (("<image>", "a"), ('<image> - "red" + "blue"', "b")):
        assert run("mix", "dog.png", "--prompt", prompt, "--out", out, "--raw", *FAST).exit_code == 0
    assert (pixels_of("a/dog-mix-seed0.png") != pixels_of("b/dog-mix-seed0.png")).any()
    assert run("redo", "b/dog-mix-seed0.png", "--photo", "dog.png", "--out", "c", "--raw").exit_code == 0
    assert (pixels_of("b/dog-mix-seed0.png") == pixels_of("c/dog-mix-seed0-redo.png")).all()


@pytest.mark.parametrize("prompt", ["<image> on <image>", "<image:2> on <image:1>"])
def test_several_placeholders_use_the_photos_together(folder, prompt):
    result = run("mix", "dog.png", "photos/cat.png", "--prompt", prompt, "--tokens", "4", "--out", "out", *FAST)
    assert result.exit_code == 0 and names_in("out") == ["dog+cat-mix-seed0.png"]


def test_what_was_cut_is_said_on_stderr(folder):
    result = run("mix", "dog.png", "--prompt", "<image>" + " dog" * 30, "--tokens", "4", "--out", "out", *FAST)
    assert result.exit_code == 0
    assert result.stderr.startswith("dog-mix-seed0: [dog] keeps 1 of 4 tokens; the last words did not fit")
    assert result.stdout.strip() == str(Path("out/dog-mix-seed0.png"))


def test_codes_draw_what_their_picture_draws(folder):
    run("encode", "dog.png", "--out", "words/dog.vilex")
    for source, out in (("dog.png", "a"), ("words/dog.vilex", "b"), ("words", "c")):
        assert run("vary", source, "--count", "1", "--tokens", "4", "--out", out, "--raw", *FAST).exit_code == 0
    assert abs(pixels_of("a/dog-seed0.png") - pixels_of("b/dog-seed0.png")).max() <= 2
    assert (pixels_of("b/dog-seed0.png") == pixels_of("c/dog-seed0.png")).all()


def test_encode_writes_the_first_tokens_of_each_picture(folder, pipeline, picture):
    result = run("encode", "dog.png", "photos/cat.png", "--tokens", "3", "--out", "words")
    assert result.exit_code == 0 and names_in("words") == ["cat.vilex", "dog.vilex"]
    code = load_code("words/cat.vilex", pipeline.fingerprint)
    assert code.source == "cat"
    assert torch.equal(code.vilex_tokens, pipeline.encode(picture, 3)[0].half().float())


def test_polish_writes_words_that_the_other_commands_take(folder, pipeline, picture):
    result = run("polish", "dog.png", "photos/cat.png", "--tokens", "3", "--seed", "2", "--out", "words", *FAST)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.split() == [str(Path("words/dog.vilex")), str(Path("words/cat.vilex"))]
    tokens = load_code("words/cat.vilex", pipeline.fingerprint).vilex_tokens
    expected = pipeline.polish(picture, 3, steps=2, seed=2)
    assert torch.equal(tokens, expected.half().float())
    assert run("vary", "words/cat.vilex", "--tokens", "3", "--count", "1", "--out", "out", *FAST).exit_code == 0
    run("polish", "photos/cat.png", "--tokens", "3", "--seed", "2", "--words", "red dog", "--out", "spelt.vilex", *FAST)
    spelt = pipeline.polish(picture, 3, steps=2, seed=2, words="red dog")
    assert torch.equal(load_code("spelt.vilex").vilex_tokens, spelt.half().float())
    assert not torch.allclose(spelt, expected, atol=0.01)


def test_polish_skips_what_has_no_picture(folder):
    run("encode", "dog.png", "--out", "dog.vilex")
    result = run("polish", "dog.vilex", "photos/broken.png", "dog.png", "--out", "words", "--tokens", "2", *FAST)
    assert result.exit_code == 1 and names_in("words") == ["dog-2.vilex"]
    assert "skipped: dog.vilex: a word has no picture to look at\n" in result.stderr


def test_a_model_without_encoder_draws_words_and_polished_pictures(folder, monkeypatch, pipeline):
    bare = VilexPipeline(pipeline.t2i, name="bare")
    for module in (cli, desk):
        monkeypatch.setattr(module, "load_pipeline", lambda engine: bare)
    assert run("generate", "--prompt", "a dog", "--count", "1", "--out", "out", *FAST).exit_code == 0
    result = run("vary", "dog.png", "--out", "out", *FAST)
    assert result.exit_code == 2 and "skipped: bare has no ViLex weights to read pictures with" in result.stderr
    assert run("polish", "dog.png", "--tokens", "3", "--out", "dog.vilex", *FAST).exit_code == 0
    result = run("mix", "dog.vilex", "--prompt", "<image> on the beach", "--tokens", "3", "--out", "out", *FAST)
    assert result.exit_code == 0 and names_in("out") == ["a-dog-seed0.png", "dog-mix-seed0.png"]


def test_padding_reaches_the_encoder(folder):
    run("encode", "dog.png", "--out", "crop.vilex")
    run("encode", "dog.png", "--fit", "pad", "--out", "pad.vilex")
    assert not torch.equal(load_code("crop.vilex").vilex_tokens, load_code("pad.vilex").vilex_tokens)


def test_equal_stems_are_numbered(folder):
    Path("photos/broken.png").rename("photos/dog-2.png")
    inputs = desk.find_inputs([Path("dog.png"), Path("photos")])
    assert {stem: str(path) for stem, path in inputs.items()} == {
        "dog": "dog.png",
        "cat": str(Path("photos/cat.png")),
        "dog-2": str(Path("photos/dog-2.png")),
        "dog-3": str(Path("photos/dog.jpg")),
    }


def test_a_broken_file_is_skipped_and_the_rest_done(folder):
    result = run("vary", "photos", "--count", "1", "--tokens", "4", "--out", "out", *FAST)
    assert result.exit_code == 1
    assert result.stderr.startswith("skipped: broken.png is not a readable picture") and result.stderr.count("\n") == 1
    assert names_in("out") == ["cat-seed0.png", "dog-seed0.png"]


def test_a_picture_is_kept_from_others_of_its_name(folder):
    def draw(prompt: str) -> list[str]:
        flags = ("--tokens", "4", "--out", "out", "--sheet", *FAST)
        return run("mix", "dog.png", "--prompt", prompt, *flags).stdout.split()

    first = draw("a red")
    assert [Path(name).name for name in first] == ["dog-mix-seed0.png", "dog-mix-sheet.png"]
    before = [Path(name).read_bytes() for name in first]
    second = draw("a blue")
    assert [Path(name).name for name in second] == ["dog-mix-seed0-2.png", "dog-mix-sheet-2.png"]
    assert [load_recipe(name).prompt for name in (first[0], second[0])] == ["a red", "a blue"]
    assert draw("a red") == first and draw("a blue") == second  # what is there already is not written twice
    assert [Path(name).read_bytes() for name in first] == before
    assert names_in("out") == sorted(Path(name).name for name in first + second)


def test_a_given_file_is_never_overwritten(folder):
    Path("dog.png").rename("dog-seed0.png")
    Path("photos/cat.png").rename("dog.png")
    before = Path("dog-seed0.png").read_bytes()
    result = run("vary", "dog.png", "--count", "1", "--tokens", "4", "--out", ".", *FAST)
    assert (result.exit_code, result.stdout) == (0, "dog-seed0-2.png\n")
    assert Path("dog-seed0.png").read_bytes() == before and load_recipe("dog-seed0-2.png") is not None


def copied(picture: str, pipeline: VilexPipeline, num_tokens: int = 3) -> str:
    with Image.open(picture) as image:
        return to_text(VilexCode(pipeline.encode(image.convert("RGB"), num_tokens)[0], pipeline.fingerprint))


def test_copied_codes_stand_for_pictures(folder, pipeline):
    code = copied("dog.png", pipeline)
    result = run("mix", code, "dog.png", "--prompt", "<image> on <image>", "--tokens", "3", "--out", "out", *FAST)
    assert (result.exit_code, result.stderr) == (0, "") and names_in("out") == ["word+dog-mix-seed0.png"]
    images = load_recipe("out/word+dog-mix-seed0.png").images
    assert images == (RecipeImage("word", 3, 1.0, ""), RecipeImage("dog", 3, 1.0, "crop"))
    run("encode", code, "--tokens", "2", "--out", "kept.vilex")
    kept = load_code("kept.vilex", pipeline.fingerprint)
    assert kept.source == "word"
    torch.testing.assert_close(kept.vilex_tokens, from_text(code).vilex_tokens[:2], rtol=2e-3, atol=1e-4)


def test_photos_are_called_by_their_stems(folder):
    result = run("mix", "dog.png", "photos/cat.png", "--prompt", "[dog] a photo of [cat]", "--tokens", "2",
                 "--out", "out", "--tfg", "1", *FAST)  # fmt: skip
    assert result.exit_code == 0 and names_in("out") == ["dog+cat-mix-seed0.png"] and not result.stderr
    turned = run("mix", "dog.png", "photos/cat.png", "--prompt", "<image:1> a photo of <image:2>", "--tokens", "2",
                 "--out", "turned", "--tfg", "1", *FAST)  # fmt: skip
    assert turned.exit_code == 0
    assert (pixels_of("out/dog+cat-mix-seed0.png") == pixels_of("turned/dog+cat-mix-seed0.png")).all()
    alone = run("mix", "dog.png", "photos/cat.png", "--prompt", "a photo of [cat]", "--tokens", "2", *FAST)
    assert alone.exit_code == 0 and "[dog] is not in the prompt" in alone.stderr


def test_what_a_prompt_leaves_out_is_neither_shared_nor_asked_for_again(folder):
    run("mix", "dog.png", "photos/cat.png", "--prompt", "a photo of [cat]", "--tokens", "2", "--share-tokens",
        "--out", "out", *FAST)  # fmt: skip
    assert [bool(image.code) for image in load_recipe("out/dog+cat-mix-seed0.png").images] == [False, True]
    again = run("redo", "out/dog+cat-mix-seed0.png", "--out", "again")
    assert again.exit_code == 0, again.output
    difference = pixels_of("again/dog+cat-mix-seed0-redo.png") - pixels_of("out/dog+cat-mix-seed0.png")
    assert abs(difference).max() <= 6  # a code is rounded


@pytest.mark.parametrize(("flags", "said"), [((), False), (("--tfg", "3"), True)])
def test_a_tfg_that_nobody_asked_for_is_not_called_without_effect(folder, flags, said):
    result = run("mix", "dog.png", "--prompt", '<image> - "red" + "blue"', "--tokens", "2", *flags, *FAST)
    assert result.exit_code == 0 and ("text-free guidance has no effect" in result.stderr) is said


def drawn_with(*weights: str) -> np.ndarray:
    options = [part for weight in weights for part in ("--weight", weight)]
    result = run("mix", "dog.png", "photos/cat.png", "--prompt", "<image> on <image>", "--tokens", "4", "--tfg", "1",
                 "--out", "-".join(weights), *options, *FAST)  # fmt: skip
    assert result.exit_code == 0, result.output
    return pixels_of(f"{'-'.join(weights)}/dog+cat-mix-seed0.png")


def test_weights_count_for_all_photos_or_for_each_in_order(folder):
    Image.new("RGB", (32, 32), "navy").save("photos/cat.png")
    assert (drawn_with("0.5") == drawn_with("0.5", "0.5")).all()
    assert (drawn_with("1.5", "0") != drawn_with("0", "1.5")).any()
    weights = [image.weight for image in load_recipe("0-1.5/dog+cat-mix-seed0.png").images]
    assert weights == [0, 1.5]


def test_tokens_are_written_into_pngs_only_when_they_are_shared(folder, pipeline, picture):
    arguments = ("mix", "dog.png", "--prompt", "a photo of <image>", "--tokens", "3", "--weight", "0.5", *FAST)
    assert run(*arguments, "--out", "private").exit_code == 0
    assert run(*arguments, "--out", "shared", "--share-tokens").exit_code == 0
    assert b"vilex-2:" not in Path("private/dog-mix-seed0.png").read_bytes()
    [image] = load_recipe("shared/dog-mix-seed0.png").images
    assert (image.name, image.num_tokens, image.weight, image.fit) == ("dog", 3, 0.5, "crop")
    expected = pipeline.vocabulary.weigh(pipeline.encode(picture, 3)[0], 0.5)
    torch.testing.assert_close(image.tokens(pipeline.fingerprint), expected, rtol=0, atol=0.01)


def test_reconstructions_share_as_many_tokens_as_they_show(folder):
    run("reconstruct", "dog.png", "--tokens", "1,4", "--out", "out", "--share-tokens", *FAST)
    assert [load_recipe(f"out/dog-t{count}.png").images[0].num_tokens for count in (1, 4)] == [1, 4]
    lengths = [len(load_recipe(f"out/dog-t{count}.png").images[0].code) for count in (1, 4)]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("sharing", [("--share-tokens",), ()])
def test_redo_draws_the_same_picture_again(folder, sharing):
    Image.new("RGB", (40, 32), "navy").save("photos/cat.png")
    prompt = "[cat] and a red <image:1> in style of monet"
    run("mix", "dog.png", "photos/cat.png", "--prompt", prompt, "--tokens", "3", "--weight", "1.2", "--weight", "0.7",
        "--fit", "pad", "--seed", "9", "--count", "2", "--out", "out", *sharing, *FAST)  # fmt: skip
    photos = () if sharing else ("--photo", "dog.png", "--photo", "photos/cat.png")
    result = run("redo", "out", *photos, "--out", "again")
    assert (result.exit_code, result.stderr) == (0, "")
    assert names_in("again") == ["dog+cat-mix-seed10-redo.png", "dog+cat-mix-seed9-redo.png"]
    for seed in (9, 10):
        first, again = f"out/dog+cat-mix-seed{seed}.png", f"again/dog+cat-mix-seed{seed}-redo.png"
        assert abs(pixels_of(first) - pixels_of(again)).max() <= (6 if sharing else 2)
        assert load_recipe(first) == load_recipe(again)
    assert abs(pixels_of("again/dog+cat-mix-seed9-redo.png") - pixels_of("out/dog+cat-mix-seed10.png")).max() > 6


def test_redo_says_that_it_does_not_need_the_photo(folder):
    assert run("reconstruct", "dog.png", "--tokens", "4", "--out", "out", "--share-tokens", *FAST).exit_code == 0
    said = "dog-t4.png: it holds the tokens of its pictures, so --photo is not used for it"
    assert said in run("redo", "out/dog-t4.png", "--photo", "dog.png", "--out", "again").stderr
    assert said not in run("redo", "out/dog-t4.png", "--out", "again").stderr


def test_redo_says_what_is_other_here(folder):
    run("generate", "--prompt", "a red dog", "--count", "1", "--out", "out", *FAST)
    path = Path("out/a-red-dog-seed0.png")
    recipe = load_recipe(path)
    with Image.open(path) as image:
        save_png(image, path, replace(recipe, environment=recipe.environment | {"torch": "1.0"}))
    result = run("redo", str(path), "--out", "again")
    assert result.exit_code == 0
    assert result.stderr.startswith("a-red-dog-seed0.png: Drawn with torch 1.0 (here ")


def test_redo_goes_on_after_pictures_it_cannot_draw(folder):
    run("vary", "dog.png", "--count", "1", "--tokens", "3", "--out", "out", *FAST)
    run("blend", "dog.png", "photos/cat.png", "--count", "2", "--tokens", "3", "--out", "blended", *FAST)
    run("encode", "dog.png", "--out", "dog.vilex")
    blended = "blended/dog+cat-000.png"
    result = run("redo", "dog.png", "out", blended, "--photo", "dog.png", "--out", "again")
    assert result.exit_code == 1 and names_in("again") == ["dog-seed0-redo.png"]
    assert result.stderr.splitlines() == [
        "skipped: dog.png carries no settings of ViLex",
        "skipped: dog+cat-000.png: no single picture gives the tokens of 'dog+cat': give its .vilex file or code",
    ]
    assert run("redo", blended, "--photo", "dog.vilex", "--out", "again").exit_code == 0
    assert abs(pixels_of("again/dog+cat-000-redo.png") - pixels_of(blended)).max() <= 2


def test_a_foreign_code_inside_is_refused_with_both_models(folder, pipeline):
    run("vary", "dog.png", "--count", "1", "--tokens", "3", "--share-tokens", "--out", "out", *FAST)
    pipeline.__dict__["fingerprint"] = "another"
    result = run("redo", "out", "--out", "again")
    assert result.exit_code == 2
    assert result.stderr.startswith("skipped: dog-seed0.png: the code was made by ")
    assert result.stderr.endswith("this model is 'another'\n")


def test_blend_draws_a_row_that_ends_at_its_pictures(folder):
    Image.new("RGB", (32, 32), "navy").save("photos/cat.png")
    shared = ("--tokens", "4", "--raw", *FAST)
    result = run("blend", "dog.png", "photos/cat.png", "--count", "3", "--out", "row", *shared)
    assert (result.exit_code, result.stderr) == (0, "")
    assert names_in("row") == ["dog+cat-000.png", "dog+cat-050.png", "dog+cat-100.png"]
    for name, end in (("dog.png", "000"), ("photos/cat.png", "100")):
        run("vary", name, "--count", "1", "--out", "ends", *shared)
        own = pixels_of(f"ends/{Path(name).stem}-seed0.png")
        assert abs(own - pixels_of(f"row/dog+cat-{end}.png")).max() <= 2
    middle = pixels_of("row/dog+cat-050.png")
    assert all((middle != pixels_of(f"row/dog+cat-{end}.png")).any() for end in ("000", "100"))


def test_graft_takes_the_first_tokens_of_one_and_the_rest_of_the_other(folder):
    Image.new("RGB", (32, 32), "navy").save("photos/cat.png")
    result = run("blend", "dog.png", "photos/cat.png", "--graft", "2", "--tokens", "5", "--out", "out",
                 "--share-tokens", *FAST)  # fmt: skip
    assert result.exit_code == 0 and names_in("out") == ["dog+cat-graft2.png"]
    [image] = load_recipe("out/dog+cat-graft2.png").images
    run("encode", "dog.png", "photos/cat.png", "--tokens", "5", "--out", "words")
    dog, cat = (load_code(f"words/{name}.vilex").vilex_tokens for name in ("dog", "cat"))
    tokens = from_text(image.code).vilex_tokens
    torch.testing.assert_close(tokens, torch.cat([dog[:2], cat[2:]]), rtol=0.02, atol=0.02)


def test_sheets_show_what_was_given_and_drawn(folder):
    for command, stem, options, drawn in (
        ("reconstruct", "dog", ("--tokens", "1,4"), 2),
        ("vary", "dog", ("--tokens", "4", "--count", "3"), 3),
        ("mix", "dog-mix", ("--prompt", "a painting of <image>"), 1),
    ):
        result = run(command, "dog.png", *options, "--sheet", "--raw", "--out", command, *FAST)
        assert result.exit_code == 0 and result.stdout.split()[-1] == str(Path(f"{command}/{stem}-sheet.png"))
        assert len(names_in(command)) == drawn + 1
        height, width, _ = pixels_of(f"{command}/{stem}-sheet.png").shape
        assert width > (drawn + 1) * 32 and 32 < height < 64
    result = run("blend", "dog.png", "photos/cat.png", "--count", "2", "--sheet", "--out", "row", *FAST)
    assert result.exit_code == 0 and "dog+cat-sheet.png" in names_in("row")


def test_inspect_lists_the_nearest_words_of_each_token(folder, pipeline):
    result = run("inspect", "dog.png", copied("dog.png", pipeline, 2), "--tokens", "2", "--words", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [lines[0], lines[4]] == ["dog", "word"] and lines[1] == "token  distance  nearest words" and len(lines) == 8
    with Image.open("dog.png") as image:
        reading = pipeline.vocabulary.read(pipeline.encode(image.convert("RGB"), 2)[0], 3)[1]
    words = [part for near in reading.neighbours for part in (near.word, f"{near.similarity:.2f}")]
    assert lines[3].split() == ["2", f"{reading.distance:.1f}", *words]


MIX = ("mix", "dog.png", "--prompt")
FOREIGN = to_text(VilexCode(torch.ones(2, 8), "someone"))
BAD_INPUTS = [
    (("vary", "nowhere.png"), "'nowhere.png' does not exist"),
    (("vary",), "Missing argument 'PHOTO...'"),
    (("vary", "empty"), "Error: no pictures in empty; looked for"),
    (("vary", "photos/broken.png"), "skipped: broken.png is not a readable picture"),
    (("vary", "foreign.vilex"), "skipped: foreign.vilex: the code was made by 'someone', this model is"),
    (("vary", "dog.png", "--count", "17"), "17 is not in the range 1<=x<=16"),
    (("vary", "dog.png", "--count", "2", "--seed", "4294967295"), "Error: seed + num_images must not exceed 2^32"),
    (("vary", "dog.png", "--guidance", "nan"), "Error: guidance_scale must be a number, got nan"),
    (("vary", "dog.png", "--steps", "0"), "0 is not in the range 1<=x<=100"),
    (("vary", "dog.png", "--fit", "stretch"), "'stretch' is not one of 'crop', 'start', 'end', 'pad'"),
    (("vary", "dog.png", "--out", "dog.png"), "'dog.png' is a file"),
    (("reconstruct", "dog.png", "--tokens", "1,x"), "'1,x' is not a list of whole numbers such as 1,4,16"),
    (("reconstruct", "dog.png", "--tokens", "0,4"), "every number must be between 1 and 511"),
    (("reconstruct", "dog.png", "--tokens", "4,512"), "every number must be between 1 and 511"),
    (("reconstruct", "dog.png", "--tokens", "4,76"), "skipped: num_tokens must be between 1 and 75, got 76"),
    (("encode", "dog.png", "--tokens", "76"), "skipped: num_tokens must be between 1 and 75, got 76"),
    (("mix", "dog.png", "--prompt", "[dog]", "--tokens", "76"), "Error: num_tokens must be between 1 and 75, got 76"),
    (("mix", "dog.png"), "Missing option '--prompt'"),
    ((*MIX, "x" * 1001), "Error: the prompt has 1001 characters, the limit is 1000"),
    ((*MIX, "<image:2>"), "Error: <image:2> asks for an image that is not there: the prompt has 1"),
    ((*MIX, "<image> <image>", "--out", "dog.png/sub"), "Not a directory"),
    (("mix", "photos", "--prompt", "<image> on <image>"), "Error: broken.png is not a readable picture"),
    ((*MIX, "<image>", "--weight", "2.1"), "2.1 is not in the range 0.0<=x<=2.0"),
    ((*MIX, "a", "--weight", "1", "--weight", "0"), "Error: --weight is given once, or once for each of 1 pictures"),
    (("vary", "vilex-2:m:AAAA"), "skipped: word: the code is damaged: a part is missing or altered"),
    (("vary", FOREIGN), "skipped: word: the code was made by 'someone', this model is"),
    (
        ("mix", "dog.png", "photos", "--prompt", "[corgi] in snow"),
        "Error: [corgi] names none of the pictures; their names",
    ),
    (("blend", "dog.png"), "Error: blend takes two pictures, got 1"),
    (("blend", "dog.png", "dog.png", "--graft", "512"), "512 is not in the range 0<=x<=511"),
    (("redo", "dog.png"), "skipped: dog.png carries no settings of ViLex"),
    (("redo", "nowhere.png"), "'nowhere.png' does not exist"),
    (("redo", "drawn.png"), "skipped: drawn.png does not hold the tokens of its pictures: give 1 by --photo, got 0"),
    (("redo", "drawn.png", "--photo", "photos/broken.png"), "skipped: drawn.png: broken.png is not a readable"),
    (("inspect", "photos/broken.png"), "skipped: broken.png is not a readable picture"),
    (("inspect", "dog.png", "--words", "0"), "0 is not in the range 1<=x<=20"),
    (("generate", "--prompt", "<image>"), "Error: <image> asks for an image that is not there: give a picture"),
    (("encode", "dog.png", "photos", "--out", "x.vilex"), "Error: 4 pictures need a folder, --out is the file x.vilex"),
    (("polish", "dog.png", "--steps", "0"), "0 is not in the range 1<=x<=1000"),
    (("encode", "foreign.vilex", "--out", "foreign.vilex"), "skipped: foreign.vilex: the code was made by"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS, ids=[" ".join(a)[:40] for a, _ in BAD_INPUTS])
def test_bad_input_ends_with_2_and_one_sentence(folder, arguments, message):
    Path("empty").mkdir()
    save_code("foreign.vilex", torch.zeros(2, 8), "someone")
    recipe = Recipe("", GenerationConfig(), "tiny", "0", "float32", "cpu", {}, (RecipeImage("dog", 3),))
    save_png(Image.new("RGB", (32, 32)), "drawn.png", recipe)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not message.startswith("Error") or result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_missing_weights_are_named(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    result = run("vary", "dog.png", "--model", "./nothing")
    assert result.exit_code == 2 and result.stderr.startswith("Error: no weights at './nothing': give a folder")


def test_a_cpu_has_nothing_to_offload_from(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    result = run("vary", "dog.png", "--device", "cpu", "--offload")
    assert result.exit_code == 2
    assert result.stderr == "Error: --offload is for GPUs: on a CPU there is nothing to offload from\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("values that are not finite at step 1"), "Error: values that are not finite at step 1\n"),
        (torch.OutOfMemoryError("out of memory\ndetails"), "Error: out of memory; try a smaller --count\n"),
    ],
)
def test_a_failing_model_ends_with_1_and_one_sentence(folder, monkeypatch, pipeline, error, message):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "generate", fail)
    result = run("generate", "--prompt", "a dog", *FAST)
    assert (result.exit_code, result.stderr) == (1, message)


def test_options_reach_the_loader(folder, monkeypatch, pipeline):
    engines = []
    monkeypatch.setattr(cli, "load_pipeline", lambda engine: engines.append(engine) or pipeline)
    run("encode", "dog.png", "--model", "m", "--device", "cuda:1", "--dtype", "bfloat16", "--offload")
    assert engines == [cli.Engine("m", "cuda:1", "bfloat16", offload=True)]


def test_every_way_in_gives_the_options_to_the_pipeline(monkeypatch):
    asked = []

    def record(*given: object, **options: object) -> None:
        asked.append((given, options))
        raise ValueError("enough")

    monkeypatch.setattr(VilexPipeline, "from_pretrained", record)
    monkeypatch.setattr("app.models.LaterPipeline.__init__", lambda self, folder, load: load())
    options = {"device": "cuda:1", "dtype": "bfloat16", "offload": True}
    with pytest.raises(ValueError, match="enough"):
        desk.load_pipeline(cli.Engine("m", **options))
    page = runpy.run_path("app.py", run_name="page")
    assert page["load"]("m", "cuda:1", "bfloat16", 20, True)[0].problem == "enough"
    with pytest.raises(ValueError, match="enough"):
        page["load_later"](Path("m"), "cuda:1", "bfloat16", 20, True)
    assert asked == [(("m",), options)] * 3


def test_help_needs_neither_diffusers_nor_transformers():
    code = "import sys, vilex.cli; print({'diffusers', 'transformers', 'open_clip'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "vilex", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("Usage: vilex [OPTIONS] COMMAND")
    verbs = ("blend", "encode", "generate", "inspect", "mix", "polish", "reconstruct", "redo", "vary")
    assert all(f"\n  {verb} " in result.stdout for verb in verbs)


def test_similar_names_the_most_alike_first_and_says_what_it_skipped(folder, picture):
    Path("photos/dog.jpg").unlink()
    picture.rotate(180).save("photos/turned.png")
    result = run("similar", "dog.png", "photos", "--count", "2")
    assert result.exit_code == 1 and "skipped: broken.png" in result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [path for _, path in lines] == [str(Path("photos/cat.png")), str(Path("photos/turned.png"))]
    assert lines[0][0] == "1.000" >= lines[1][0] and not Path("outputs").exists()
    assert run("similar", "dog.png", "photos", "--count", "1").stdout.splitlines() == result.stdout.splitlines()[:1]


def test_similar_shows_what_it_found_on_a_sheet(folder):
    run("encode", "dog.png", "--tokens", "3", "--out", "dog.vilex")
    result = run("similar", "dog.vilex", "dog.png", "photos/cat.png", "dog.vilex", "--sheet", "--out", "out")
    assert result.exit_code == 0 and names_in("out") == ["dog-similar-sheet.png"]
    assert [line.split("\t")[0] for line in result.stdout.splitlines()[:3]] == ["1.000"] * 3
    assert Image.open("out/dog-similar-sheet.png").width > 2 * 128  # the code has no picture to show


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "dog.png"], "photos holds 3 pictures: give the one that the others are compared with"),
        (["photos/broken.png", "dog.png"], "broken.png is not a readable picture"),
        (["dog.png", "photos/broken.png"], "skipped: broken.png is not a readable picture"),
    ],
)
def test_similar_refuses_what_it_cannot_compare(folder, arguments, message):
    result = run("similar", *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
