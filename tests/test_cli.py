"""The command line: what it writes, what it says, and how it ends."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from vilex import cli
from vilex.codes import load_code, save_code
from vilex.config import GenerationConfig
from vilex.recipe import load_recipe
from vilex.upsampler import LanczosUpsampler

FAST = ("--steps", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch, pipeline, picture) -> Path:
    """The working folder, with dog.png, a folder `photos` of cat.png, dog.jpg and broken.png, and a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VILEX_OUTPUTS", raising=False)
    monkeypatch.setattr(cli, "load_pipeline", lambda engine: pipeline)
    monkeypatch.setattr(cli, "build_upsampler", LanczosUpsampler)
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
    run("mix", "dog.png", "--prompt", "<image> on the beach", "--count", "2", "--tokens", "4", "--tfg", "2.5",
        "--guidance", "1.5", "--seed", "7", "--out", "out", *FAST)  # fmt: skip
    recipe = load_recipe("out/dog-mix-seed8.png")
    expected = GenerationConfig(num_tokens=4, seed=8, num_inference_steps=2, guidance_scale=1.5, tfg_scale=2.5)
    assert recipe.config == expected
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


@pytest.mark.parametrize("prompt", ["<image> on <image>", "<image:2> on <image:1>"])
def test_several_placeholders_use_the_photos_together(folder, prompt):
    result = run("mix", "dog.png", "photos/cat.png", "--prompt", prompt, "--tokens", "4", "--out", "out", *FAST)
    assert result.exit_code == 0 and names_in("out") == ["dog+cat-mix-seed0.png"]


def test_what_was_cut_is_said_on_stderr(folder):
    result = run("mix", "dog.png", "--prompt", "<image>" + " dog" * 30, "--tokens", "4", "--out", "out", *FAST)
    assert result.exit_code == 0
    assert result.stderr.startswith("dog-mix-seed0: image 1 keeps 1 of 4 tokens; the last words did not fit")
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


def test_padding_reaches_the_encoder(folder):
    run("encode", "dog.png", "--out", "crop.vilex")
    run("encode", "dog.png", "--fit", "pad", "--out", "pad.vilex")
    assert not torch.equal(load_code("crop.vilex").vilex_tokens, load_code("pad.vilex").vilex_tokens)


def test_equal_stems_are_numbered(folder):
    Path("photos/broken.png").rename("photos/dog-2.png")
    inputs = cli._find_inputs([Path("dog.png"), Path("photos")])
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


def test_an_existing_picture_is_replaced(folder):
    Path("out").mkdir()
    Path("out/dog-seed0.png").write_bytes(b"old")
    run("vary", "dog.png", "--count", "1", "--tokens", "4", "--out", "out", *FAST)
    assert load_recipe("out/dog-seed0.png") is not None


def test_a_given_file_is_never_overwritten(folder):
    Path("dog.png").rename("dog-seed0.png")
    Path("photos/cat.png").rename("dog.png")
    before = Path("dog-seed0.png").read_bytes()
    result = run("vary", "dog.png", "dog-seed0.png", "--count", "1", "--tokens", "4", "--out", ".", *FAST)
    assert (result.exit_code, Path("dog-seed0.png").read_bytes()) == (2, before)
    assert result.stderr == (
        "Error: dog-seed0.png is one of the given files and would be overwritten: choose another --out\n"
    )


MIX = ("mix", "dog.png", "--prompt")
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
    (("vary", "dog.png", "--fit", "stretch"), "'stretch' is not one of 'crop', 'pad'"),
    (("vary", "dog.png", "--out", "dog.png"), "'dog.png' is a file"),
    (("reconstruct", "dog.png", "--tokens", "1,x"), "'1,x' is not a list of whole numbers such as 1,4,16"),
    (("reconstruct", "dog.png", "--tokens", "0,4"), "every number must be between 1 and 75"),
    (("reconstruct", "dog.png", "--tokens", "4,76"), "every number must be between 1 and 75"),
    (("mix", "dog.png"), "Missing option '--prompt'"),
    ((*MIX, "x" * 1001), "Error: the prompt has 1001 characters, the limit is 1000"),
    ((*MIX, "<image:2>"), "Error: <image:2> asks for an image that is not there: the prompt has 1"),
    ((*MIX, "<image> <image>", "--out", "dog.png/sub"), "Not a directory"),
    (("mix", "photos", "--prompt", "<image> on <image>"), "Error: broken.png is not a readable picture"),
    (("generate", "--prompt", "<image>"), "Error: <image> asks for an image that is not there: the prompt has 0"),
    (("encode", "dog.png", "photos", "--out", "x.vilex"), "Error: 4 pictures need a folder, --out is the file x.vilex"),
    (("encode", "foreign.vilex", "--out", "foreign.vilex"), "skipped: foreign.vilex: the code was made by"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS, ids=[" ".join(a)[:40] for a, _ in BAD_INPUTS])
def test_bad_input_ends_with_2_and_one_sentence(folder, arguments, message):
    Path("empty").mkdir()
    save_code("foreign.vilex", torch.zeros(2, 8), "someone")
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
    run("encode", "dog.png", "--model", "m", "--device", "cuda:1", "--dtype", "bfloat16")
    assert engines == [cli.Engine("m", "cuda:1", "bfloat16")]


def test_help_needs_neither_diffusers_nor_transformers():
    code = "import sys, vilex.cli; print({'diffusers', 'transformers', 'open_clip'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "vilex", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("Usage: vilex [OPTIONS] COMMAND")
    assert all(verb in result.stdout for verb in ("encode", "generate", "mix", "reconstruct", "vary"))
