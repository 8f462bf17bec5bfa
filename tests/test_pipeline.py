"""The whole road at width 8: pictures in, pictures out, and what is said on the way."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from train.presets import PRESETS
from vilex.config import GenerationConfig
from vilex.devices import pick_device, pick_dtype
from vilex.encoder import build_encoder
from vilex.model import ViLex, load_vilex
from vilex.pipeline import VilexPipeline
from vilex.prompt import compose

FAST = GenerationConfig(num_inference_steps=2, num_tokens=7)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return all(np.array_equal(levels(x), levels(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def other(picture) -> Image.Image:
    return Image.new("RGB", (40, 40), "purple")


@pytest.fixture
def saved(pipeline, tmp_path: Path) -> tuple[Path, str]:
    """A folder of the pipeline's weights and one of its text encoder."""
    pipeline.save_pretrained(tmp_path / "tiny")
    for part in (pipeline.t2i.text_encoder, pipeline.t2i.tokenizer):
        part.save_pretrained(tmp_path / "text")
    return tmp_path / "tiny", str(tmp_path / "text")


def load(saved: tuple[Path, str]) -> VilexPipeline:
    folder, text_encoder = saved
    return VilexPipeline.from_pretrained(str(folder), device="cpu", dtype="float32", text_encoder=text_encoder)


def test_pictures_come_out(pipeline, picture):
    config = dataclasses.replace(FAST, num_images=3)
    result = pipeline.generate("a <image> on a beach", [picture], config)
    assert [image.size for image in result.images] == [(32, 32)] * 3
    assert (result.prompt, result.config, result.note) == ("a <image> on a beach", config, "")
    assert not same(result.images[:1], result.images[1:2])


def test_words_alone_and_nothing_at_all_work(pipeline):
    assert not same(pipeline.generate("a red dog", config=FAST).images, pipeline.generate(config=FAST).images)


def test_tokens_stand_for_their_picture(pipeline, picture):
    tokens = pipeline.encode(picture)
    assert tokens.shape == (1, 75, 8)
    a, b = (pipeline.generate("a <image>", [word], FAST).images for word in (picture, tokens[0]))
    assert same(a, b)


def test_fewer_tokens_are_a_prefix(pipeline, picture, other):
    tokens = pipeline.encode([picture, other])
    torch.testing.assert_close(pipeline.encode([picture, other], 5), tokens[:, :5], atol=1e-6, rtol=1e-5)
    one = dataclasses.replace(FAST, num_tokens=5)
    assert same(pipeline.generate("", [tokens[0]], one).images, pipeline.generate("", [tokens[0][:5]], one).images)


def test_another_picture_changes_the_sample(pipeline, picture, other):
    a, b = (list(pipeline.stream("", [word], FAST))[-1].latents for word in (picture, other))
    assert (a - b).abs().max() > 1e-4


def test_names_and_numbers_choose_pictures(pipeline, picture, other):
    by_name = pipeline.compose("[mine] and [yours]", [picture, other], 3, names=["yours", "mine"])
    by_number = pipeline.compose("<image:2> and <image:1>", [picture, other], 3)
    swapped = pipeline.compose("<image> and <image>", [other, picture], 3)
    assert torch.equal(by_name.vectors, by_number.vectors)
    assert torch.equal(by_name.vectors, swapped.vectors)
    named = pipeline.generate("[mine] on [yours]", [picture, other], FAST, names=["yours", "mine"])
    numbered = pipeline.generate("<image:2> on <image:1>", [picture, other], FAST)
    assert same(named.images, numbered.images)


def test_the_image_branch_has_the_joint_branchs_tokens_and_no_words(pipeline, picture):
    tokens = pipeline.encode(picture)[0]
    text = "red green blue " * 5
    conditions = pipeline.conditions(text, [tokens], GenerationConfig())
    kept = pipeline.compose(text, [tokens]).kept[0]
    alone = pipeline.conditions("", [tokens[:kept]], GenerationConfig())
    assert kept < 75
    assert torch.equal(conditions.image.prompt_embeds, alone.image.prompt_embeds)
    assert alone.joint is None


def test_a_prompt_takes_words_from_a_picture_and_adds_others(pipeline, picture):
    [tokens] = pipeline.encode(picture, 7)
    words = {word: pipeline.vocabulary.shift(torch.zeros(1, 8), "", word) for word in ("red", "dog", "blue")}
    moved = tokens - (words["red"] + words["dog"]) / 2 + words["blue"]
    torch.testing.assert_close(pipeline.vocabulary.shift(tokens, "red dog", "blue"), moved)
    assert pipeline.vocabulary.shift(tokens, "", "").equal(tokens)
    for rest in ("", " on a beach"):
        asked = pipeline.conditions(f'<image> - "red dog" + "blue"{rest}', [tokens], FAST)
        given = pipeline.conditions(f"<image>{rest}", [moved], FAST)
        assert asked.names == given.names == ("uncond", "image") + ("joint",) * bool(rest)
        for name in asked.names:
            torch.testing.assert_close(getattr(asked, name).prompt_embeds, getattr(given, name).prompt_embeds)
    assert pipeline.compose('<image> - "red" + "blue"', [tokens]).num_words == 0
    with pytest.raises(ValueError, match="there is no word in ' '"):
        pipeline.vocabulary.shift(tokens, " ", "")


def test_reconstruct_goes_cheapest_first_from_one_noise(pipeline, picture):
    config = GenerationConfig(num_inference_steps=2, seed=5)
    ladder = list(pipeline.reconstruct(picture, (16, 1, 4), config))
    assert [budget for budget, _ in ladder] == [1, 4, 16]
    for budget, generation in ladder:
        single = pipeline.generate("", [picture], dataclasses.replace(config, num_tokens=budget))
        assert generation.config.num_tokens == budget
        assert np.abs(levels(generation.images[0]) - levels(single.images[0])).max() <= 1
    assert not same(ladder[0][1].images, ladder[2][1].images)


def test_the_callback_sees_every_step(pipeline, picture):
    seen = []
    pipeline.generate("", [picture], FAST, on_step=lambda i, n, latents: seen.append((i, n, tuple(latents.shape))))
    assert seen == [(0, 2, (1, 48, 8, 8)), (1, 2, (1, 48, 8, 8))]


def test_closing_the_stream_stops_the_denoiser(pipeline, picture):
    calls = []
    pipeline.t2i.denoiser.register_forward_hook(lambda *args: calls.append(1))
    stream = pipeline.stream("", [picture], GenerationConfig(num_inference_steps=20, num_tokens=3))
    assert not calls  # nothing is drawn before the first step is asked for
    next(stream)
    stream.close()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("prompt", "changes", "with_image", "note"),
    [
        ("a dog", {}, True, ""),
        ("a dog", {"negative_prompt": "cat"}, True, ""),
        ("a dog", {"negative_prompt": "cat", "guidance_scale": 1}, True,
         "the negative prompt has no effect at guidance 1"),
        ("a dog", {"negative_prompt": "cat", "guidance_scale": 1, "words_scale": 2}, True, ""),
        ("", {"tfg_scale": 2}, True, "text-free guidance has no effect without words"),
        ("a dog", {"tfg_scale": 2}, False, "text-free guidance has no effect without an image"),
        ("", {"tfg_scale": 2, "words_scale": 1}, True,
         "text-free guidance and guidance by the words alone have no effect without words"),
        ("a dog", {"words_scale": 1}, False, "guidance by the words alone has no effect without an image"),
        ("a dog", {"num_tokens": 75}, True, "image 1 keeps 20 of 75 tokens"),
        ("dog " * 23 + "monet", {}, False, "the last words did not fit: 'dog monet'"),
        ("dog " * 52, {}, False, f"the last words did not fit: {('dog ' * 20 + ' ...')!r}"),
        ("", {"negative_prompt": "dog " * 22 + "cat"}, True,
         "the last words of the negative prompt did not fit: 'cat'"),
    ],
)  # fmt: skip
def test_notes(pipeline, picture, prompt, changes, with_image, note):
    config = dataclasses.replace(FAST, **changes)
    images = [picture] if with_image else []
    assert pipeline.note(prompt, images, config) == note
    assert pipeline.generate(prompt, images, config).note == note


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        ("a" * 1001, [], "the prompt has 1001 characters, the limit is 1000"),
        ("<image:2>", [torch.zeros(3, 8)], "<image:2> asks for an image that is not there: the prompt has 1"),
        ("", [torch.zeros(3, 16)], r"expects tokens of width 8, got shape \(3, 16\)"),
        ("", [torch.zeros(1, 3, 8)], r"expects tokens of width 8, got shape \(1, 3, 8\)"),
        ("", [torch.zeros(0, 8)], r"expects tokens of width 8, got shape \(0, 8\)"),
        ("<image>" * 30, [torch.zeros(3, 8)], "30 images do not fit into 22 positions"),
    ],
)
def test_bad_prompts_are_refused(pipeline, prompt, words, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate(prompt, words, FAST)


def test_euler_is_refused_before_drawing(pipeline):
    with pytest.raises(ValueError, match="'euler' does not suit this model"):
        pipeline.generate("dog", config=dataclasses.replace(FAST, scheduler="euler"))


def test_saved_pipelines_draw_the_same_picture(pipeline, saved, picture):
    loaded = load(saved)
    config = dataclasses.replace(FAST, num_inference_steps=4)
    a, b = (p.generate("a <image> dog", [picture], config).images[0] for p in (pipeline, loaded))
    assert np.abs(levels(a) - levels(b)).max() <= 4  # the files hold fp16
    assert loaded.fingerprint == pipeline.fingerprint
    assert (loaded.name, loaded.dtype, str(loaded.device)) == ("tiny", torch.float32, "cpu")


def test_a_latent_model_decodes_through_its_vae(stable_diffusion, picture):
    torch.manual_seed(1)
    preset = PRESETS["tiny"]
    pipeline = VilexPipeline(
        stable_diffusion, ViLex(build_encoder(preset.encoder), dataclasses.replace(preset.pooler, text_width=8))
    )
    for name in stable_diffusion.schedulers:
        config = dataclasses.replace(FAST, scheduler=name, num_images=2)
        images = pipeline.generate("a <image>", [picture], config).images
        assert [image.size for image in images] == [(16, 16)] * 2


def test_a_pooler_of_another_width_is_refused(pipeline):
    preset = PRESETS["tiny"]
    vilex = ViLex(build_encoder(preset.encoder), dataclasses.replace(preset.pooler, text_width=16, num_queries=5))
    with pytest.raises(ValueError, match="expects tokens of width 8, the pooler gives 5 x 16"):
        VilexPipeline(pipeline.t2i, vilex)


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "vilex.safetensors"
    weights = load_file(path)
    weights.pop(name, None)
    save_file(weights if tensor is None else weights | {name: tensor}, path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("pooler.queries", torch.zeros(16, 4), r"pooler.queries: expects 75 x \d+, file has 16 x 4"),
        ("pooler.queries", None, "pooler.queries is missing from the file"),
        ("pooler.extra", torch.zeros(2), "pooler.extra in the file is unknown to the model"),
        ("pooler.out.bias", torch.full((8,), torch.nan), "pooler.out.bias in .* holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, name, tensor, message):
    change_weights(saved[0], name, tensor)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_folders_that_hold_something_else_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no ViLex weights: config.json is missing"):
        load_vilex(tmp_path)
    with pytest.raises(ValueError, match="no weights at"):
        VilexPipeline.from_pretrained(str(tmp_path / "absent"))
    (saved[0] / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="is not a ViLex config: it needs the settings 'encoder' and 'pooler'"):
        load(saved)


def test_everything_is_frozen(pipeline):
    modules = (pipeline.t2i, pipeline.vilex)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(part.training for module in modules for part in module.modules())


def test_a_negative_prompt_takes_the_place_of_nothing(pipeline, picture):
    tokens, t2i = pipeline.encode(picture, 3)[0], pipeline.t2i
    for words in ("red dog", ""):
        found = pipeline.conditions("a cat", [tokens], GenerationConfig(negative_prompt=words)).uncond
        alone = t2i.encode_prompt(compose(words, [], t2i.tokenizer, t2i.config.context_length))
        assert torch.equal(found.prompt_embeds, alone.prompt_embeds)
    drawn = {
        pipeline.generate("a cat", [tokens], replace(FAST, guidance_scale=3.0, negative_prompt=words))
        .images[0]
        .tobytes()
        for words in ("red dog", "")
    }
    assert len(drawn) == 2


def test_only_the_denoiser_is_narrowed(pipeline, picture):
    pipeline.to("cpu", torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16
    assert {p.dtype for p in pipeline.t2i.text_encoder.parameters()} == {torch.float32}
    assert pipeline.encode(picture).dtype == torch.float32
    assert pipeline.generate("", [picture], FAST).images[0].size == (32, 32)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setenv("VILEX_DEVICE", "toaster")
    with pytest.raises(ValueError, match="device 'toaster' is not available here; cpu always is"):
        pick_device()
    assert pick_device("cpu").type == "cpu"  # a flag wins over the variable


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("VILEX_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert pick_dtype(None, cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert pick_dtype(None, cpu) == torch.float32
    monkeypatch.setenv("VILEX_DTYPE", "bfloat16")
    assert pick_dtype(None, cpu) == torch.bfloat16
    assert pick_dtype("float32", cpu) == torch.float32
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        pick_dtype("int8", cpu)
    with pytest.raises(ValueError, match="dtype float16 is for GPUs; on a CPU use float32 or bfloat16"):
        pick_dtype("float16", cpu)


def test_there_is_nothing_to_offload_from_on_a_cpu():
    with pytest.raises(ValueError, match="--offload is for GPUs: on a CPU there is nothing to offload from"):
        VilexPipeline.from_pretrained(device="cpu", offload=True)


@pytest.mark.parametrize("words_scale", [0.0, 2.0])
def test_words_by_themselves_are_those_of_the_prompt_without_its_pictures(pipeline, picture, words_scale):
    config = dataclasses.replace(FAST, words_scale=words_scale)
    tokens = pipeline.encode(picture, 3)[0]
    conditions = pipeline.conditions("a dog, <image> red", [tokens], config)
    alone = pipeline.conditions("a dog, red", [], config).joint
    assert (conditions.words is None) is (words_scale == 0)
    assert not words_scale or torch.equal(conditions.words.prompt_embeds, alone.prompt_embeds)
    assert pipeline.conditions("<image>,", [tokens], config).words is None
    assert pipeline.conditions("a dog", [], config).words is None
