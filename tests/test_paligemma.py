"""PaliGemma on our tower, from tiny random parts: what it reads, what trains, and the paper's sweeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import build_tokenizer
from PIL import Image
from torch import Tensor
from training import assert_same, invoke, reset_accelerate, snapshot, succeed, write_table
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from train import finetune_paligemma
from train.data import load_pictures
from train.finetune_paligemma import Finetuning, Questions
from train.paligemma import (
    VilexTower,
    add_dropout,
    answer_loss,
    compose_inputs,
    load_base,
    load_paligemma,
    quarter,
    save_paligemma,
    swap_tower,
)
from train.presets import PRESETS
from train.run import build_accelerator
from train.train_vilex import build_model
from train.transfer import TASKS, FinetuneConfig
from vilex.config import EncoderConfig

IMAGE_ID = 40
TOKENIZER = build_tokenizer("clip")  # has all that Gemma's has: padding, BOS and EOS


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()


@pytest.fixture
def vilex(pipeline):
    """16 patch tokens of width 8, 75 tokens of width 8, from 32 px."""
    return pipeline.vilex


def build_paligemma(patch_width: int = 8) -> PaliGemmaForConditionalGeneration:
    """A random PaliGemma of two layers."""
    torch.manual_seed(0)
    text = GemmaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=TOKENIZER.pad_token_id, bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=patch_width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, projection_dim=16, hidden_size=16
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def with_tower(vilex, num_tokens: int = 2) -> PaliGemmaForConditionalGeneration:
    model = build_paligemma()
    swap_tower(model, vilex, num_tokens)
    return model


def inputs_of(model, *answers: str) -> dict[str, Tensor]:
    positions = model.model.vision_tower.num_positions
    return compose_inputs(TOKENIZER, ["a photo of"] * len(answers), answers, IMAGE_ID, positions)


def loss_of(model, pixels: Tensor, *answers: str, label_smoothing: float = 0.0) -> Tensor:
    positions = model.model.vision_tower.num_positions
    return answer_loss(model, pixels, inputs_of(model, *answers), positions, label_smoothing)


def noise(count: int, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


# The tower


@pytest.mark.parametrize(("num_tokens", "positions"), [(0, 256), (16, 336)])
def test_a_picture_takes_as_many_places_as_in_the_paper(t2i, num_tokens, positions):
    encoder = EncoderConfig(image_size=224, patch_size=14, width=8, layers=1, heads=2)
    model = with_tower(build_model(replace(PRESETS["tiny"], encoder=encoder), t2i), num_tokens)
    tower, inputs = model.model.vision_tower, inputs_of(model, "red dog")
    assert tower.num_positions == positions
    assert (inputs["input_ids"] == IMAGE_ID).sum() == positions
    with torch.no_grad():
        assert model(pixel_values=noise(1), **inputs).image_hidden_states.shape == (1, positions, 16)


def test_quarters_stand_row_by_row():
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    parts = quarter(pixels)
    assert parts.shape == (2, 4, 3, 2, 3)
    for i, (rows, columns) in enumerate([(slice(2), slice(3)), (slice(2), slice(3, 6)), (slice(2, 4), slice(3))]):
        assert torch.equal(parts[:, i], pixels[:, :, rows, columns])


@torch.no_grad()
def test_patch_tokens_come_first_and_then_the_tokens_of_the_whole_and_of_each_quarter(vilex):
    tower, pixels = VilexTower(vilex, 3), noise(2)
    tokens = tower(pixels).last_hidden_state
    grids = [pixels, pixels[..., :32, :32], pixels[..., :32, 32:], pixels[..., 32:, :32], pixels[..., 32:, 32:]]
    expected = [vilex.encoder(pixels), *(tower.lift(vilex(grid, 3)) for grid in grids)]
    assert torch.allclose(tokens, torch.cat(expected, 1), atol=1e-5)


def test_the_projector_stays_where_it_fits_and_starts_anew_where_not(vilex):
    model = build_paligemma()
    before = model.model.multi_modal_projector.linear
    swap_tower(model, vilex, 1)
    assert model.model.multi_modal_projector.linear is before
    wider = build_paligemma(patch_width=12)
    swap_tower(wider, vilex, 1)
    assert wider.model.multi_modal_projector.linear.weight.shape == (16, 8)


def test_more_tokens_than_the_pooler_has_are_refused(vilex):
    with pytest.raises(ValueError, match="between 0 and the pooler's 75, got 76"):
        VilexTower(vilex, 76)


@torch.no_grad()
def test_a_changed_picture_changes_the_answer_also_through_the_vilex_tokens_alone(vilex):
    model, pixels = with_tower(vilex), noise(1)
    inputs = inputs_of(model, "red dog")
    logits = model(pixel_values=pixels, **inputs).logits[:, -3:]
    assert not torch.allclose(model(pixel_values=-pixels, **inputs).logits[:, -3:], logits, atol=1e-4)
    model.model.vision_tower.lift.weight.mul_(-1)
    assert not torch.allclose(model(pixel_values=pixels, **inputs).logits[:, -3:], logits, atol=1e-4)


# What it reads and the loss


def test_prompt_answer_and_padding_lie_as_paligemma_has_them():
    inputs = compose_inputs(TOKENIZER, ["a photo of", "style"], ["dog", "red green cat"], IMAGE_ID, 2)
    ids = TOKENIZER.convert_tokens_to_ids
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    first = [IMAGE_ID, IMAGE_ID, bos, *ids(["a", "photo", "of"]), *ids(["dog"]), eos]
    assert inputs["input_ids"][0].tolist() == first
    assert inputs["token_type_ids"].tolist() == [[0] * 6 + [1] * 2, [0] * 4 + [1] * 4]
    assert inputs["labels"].tolist()[1] == [-100] * 4 + [*ids(["red", "green", "cat"]), eos]
    ragged = compose_inputs(TOKENIZER, ["a", "a"], ["dog", "red green"], IMAGE_ID, 1)
    assert ragged["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert ragged["labels"][0, -1] == -100


@torch.no_grad()
def test_the_loss_is_transformers_own_and_smoothing_mixes_in_all_words(vilex):
    model, pixels = with_tower(vilex), noise(2)
    inputs = inputs_of(model, "red dog", "cat")
    plain = loss_of(model, pixels, "red dog", "cat")
    assert plain.item() == pytest.approx(model(pixel_values=pixels, **inputs).loss.item(), rel=1e-5)
    logits = model(pixel_values=pixels, **inputs).logits[:, :-1]
    uniform = -F.log_softmax(logits, -1).mean(-1)[inputs["labels"][:, 1:] != -100].mean()
    smooth = loss_of(model, pixels, "red dog", "cat", label_smoothing=0.2)
    assert smooth.item() == pytest.approx(0.8 * plain.item() + 0.2 * uniform.item(), rel=1e-5)


@torch.no_grad()
def test_dropout_is_on_in_training_only(vilex):
    model, pixels = with_tower(vilex), noise(1)
    plain = loss_of(model, pixels, "red dog")
    add_dropout(model, 0.5)
    assert loss_of(model, pixels, "red dog") == plain
    model.train()
    assert len({loss_of(model, pixels, "red dog").item() for _ in range(3)}) == 3


@torch.no_grad()
def test_a_saved_model_answers_as_before(vilex, tmp_path):
    model, pixels = with_tower(vilex), noise(2)
    save_paligemma(model, tmp_path)
    again = load_paligemma(tmp_path).eval()
    assert loss_of(again, pixels, "red", "dog") == loss_of(model, pixels, "red", "dog")
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    inputs = inputs_of(model, "dog")
    prompt = {name: value[:, :-2] for name, value in inputs.items() if name != "labels"}
    told = [m.generate(pixel_values=pixels[:1], max_new_tokens=3, **prompt).tolist() for m in (model, again)]
    assert told[0] == told[1]


def test_a_base_in_half_precision_is_trained_in_full(vilex, tmp_path):
    build_paligemma().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_base(tmp_path, vilex, 2).parameters()} == {torch.float32}


def test_a_paligemma_without_our_tower_is_not_taken_for_one(vilex, tmp_path):
    build_paligemma().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no ViLex tower"):
        load_paligemma(tmp_path)


# Fine-tuning


@pytest.fixture
def questions(vilex, tmp_path) -> Questions:
    write_table(tmp_path / "pictures.parquet")
    pictures = load_pictures(tmp_path / "pictures.parquet", image_size=64)
    records = [replace(record, captions=(f"{record.label} red", "green")) for record in pictures.records]
    return Questions(replace(pictures, records=records), "photo", TOKENIZER, IMAGE_ID, 16 + 5 * 2)


def finetuning(vilex, questions: Questions, accumulate: int = 1, **settings: float) -> Finetuning:
    reset_accelerate()
    config = FinetuneConfig(**{"batch_size": 4, "learning_rate": 1e-2, "epochs": 20} | settings)
    return Finetuning(with_tower(vilex), config, questions, build_accelerator(config.batch_size, accumulate, fp32=True))


def test_a_step_moves_all_but_the_tower(vilex, questions):
    run = finetuning(vilex, questions, warmup_fraction=0)
    before = snapshot(run.module)
    run.step(0)
    still = {name for name, parameter in run.module.named_parameters() if torch.equal(parameter, before[name])}
    assert still == {name for name in before if name.startswith("model.vision_tower.vilex.")}


def test_one_batch_can_be_learnt(vilex, questions):
    run = finetuning(vilex, questions, warmup_fraction=0)
    losses = [run.step(0) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_smoothing_and_weight_decay_are_used(vilex, questions):
    plain, smooth, dropped = (
        finetuning(vilex, questions, **{"learning_rate": 0.0} | more).step(0)
        for more in ({}, {"label_smoothing": 0.5}, {"dropout": 0.5})
    )
    assert abs(smooth - plain) > 0.01
    assert abs(dropped - plain) > 1e-4
    runs = [finetuning(vilex, questions, weight_decay=decay, warmup_fraction=0) for decay in (0.0, 1.0)]
    for run in runs:
        run.step(0)
    assert runs[1].module.lm_head.weight.norm() < runs[0].module.lm_head.weight.norm()


def test_micro_batches_add_up(vilex, questions):
    same = replace(
        questions,
        pictures=replace(
            questions.pictures, records=[replace(record, captions=("dog",)) for record in questions.pictures.records]
        ),
    )  # fmt: skip  answers of one length: a mean of means is then the mean
    whole, halves = (finetuning(vilex, same, n, warmup_fraction=0) for n in (1, 2))
    assert whole.step(0) == pytest.approx(halves.step(0), rel=1e-5)
    for (name, a), b in zip(whole.module.named_parameters(), halves.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), name


@pytest.fixture
def files(vilex, tmp_path) -> Path:
    """PaliGemma, ViLex and a table."""
    build_paligemma().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    vilex.save_pretrained(tmp_path / "vilex", torch.float32)
    for folder in (tmp_path / "data", tmp_path / "held-out"):
        folder.mkdir()
        for i, name in enumerate(["red dog", "green cat", "blue dog"]):
            Image.new("RGB", (64, 64), (90 * i, 255 - 90 * i, 90)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(name)
    return tmp_path


def arguments(files: Path, *more: object) -> list[object]:
    data = ["--data", files / "data", "--validation", files / "held-out", "--batch-size", 2, "--tokens", 2]
    return ["--paligemma", files / "base", "--model", files / "vilex", *data, "--out", files / "out", *more]


def test_a_setting_is_trained_saved_and_not_trained_again(files):
    command = arguments(files, "--task", "cococap", "--setting", 1)
    succeed(finetune_paligemma.main, *command)
    metrics = json.loads((files / "out" / "01" / "metrics.json").read_text())
    assert (metrics["dropout"], metrics["epochs"], metrics["steps"]) == (0.02, 5, 8)
    model = load_paligemma(files / "out" / "01").eval()
    assert not torch.equal(
        model.lm_head.weight, load_base(files / "base", model.model.vision_tower.vilex, 2).lm_head.weight
    )
    (files / "out" / "01" / "model.safetensors").unlink()
    succeed(finetune_paligemma.main, *command)
    assert not (files / "out" / "01" / "model.safetensors").exists()
    refused = invoke(finetune_paligemma.main, *command, "--tokens", 1)
    assert refused.exit_code == 2 and "holds a run with other settings (tokens)" in " ".join(refused.output.split())


def test_a_seed_says_all_that_is_random(files):
    losses = []
    for out, seed in (("one", 3), ("two", 3), ("other", 4)):
        more = ["--task", "cococap", "--setting", 2, "--seed", seed, "--out", files / out]
        succeed(finetune_paligemma.main, *arguments(files, *more))
        losses.append(json.loads((files / out / "02" / "metrics.json").read_text())["validation_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_dry_run_lists_the_grid(files):
    lines = succeed(finetune_paligemma.main, *arguments(files, "--task", "gqa", "--dry-run")).output.splitlines()
    assert [line[:2] for line in lines] == ["00", "01", "02", "03", "04", "05"]
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "gqa"], "has no question, and the task asks one"),
        (["--task", "cococap", "--setting", "18"], "settings 0 to 17, got 18"),
        (["--task", "cococap", "--accumulate", "3"], "not a multiple of accumulate x processes (3 x 1)"),
        (["--task", "cococap", "--paligemma", "/nowhere"], "/nowhere holds no PaliGemma"),
        (["--task", "cococap", "--tokens", "-1"], "between 0 and the pooler's 75, got -1"),
    ],
)
def test_mistakes_get_one_sentence(files, more, message):
    result = invoke(finetune_paligemma.main, *arguments(files, *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


# The sweeps


def test_the_grids_are_the_papers():
    sizes = {name: len(sweep.settings()) for name, sweep in TASKS.items()}
    assert sizes == {
        "cococap": 18, "textcaps": 4, "scicaps": 8, "vqav2": 8, "textvqa": 2, "okvqa": 4, "scienceqa": 4, "vizwiz": 4,
        "gqa": 6, "refcoco": 8, "msrvtt": 8,
    }  # fmt: skip
    settings = TASKS["msrvtt"].settings(batch_size=8)
    assert len(set(settings)) == 8
    assert {(s.weight_decay, s.dropout, s.epochs, s.batch_size) for s in settings} == {
        (decay, dropout, epochs, 8) for decay in (0, 1e-6) for dropout in (0, 0.2) for epochs in (20, 40)
    }
    assert_same([s.learning_rate for s in TASKS["textvqa"].settings()], [4e-6, 6e-6])
