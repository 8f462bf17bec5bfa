"""Ablations end to end on twelve pictures: rows are added, replaced and not trained twice."""

import json
from pathlib import Path

import pytest
import torch
from builders import build_bert, build_tokenizer
from torch import Tensor
from training import invoke, reset_accelerate, succeed, write_table

from train import ablate, train_t2i
from train.ablate import parse_rows, vary
from train.batches import Batch
from train.presets import PRESETS
from train.state import TrainState
from train.train_vilex import VilexRun
from vilex.prompt import ComposedPrompt

TINY = PRESETS["tiny"]
HELD_OUT = ["--validation", "held-out.parquet"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A table of pictures, a text encoder and a random text-to-image model; no ladders, which test_train looks at."""
    reset_accelerate()
    monkeypatch.setattr(VilexRun, "write_ladders", lambda run, path: None)
    write_table(tmp_path / "pictures.parquet")
    write_table(tmp_path / "held-out.parquet")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("bert")
    tokenizer.save_pretrained(tmp_path / "text")
    build_bert(len(tokenizer)).save_pretrained(tmp_path / "text")
    t2i = train_t2i.build_model(TINY, str(tmp_path / "text"), None, seed=0)
    t2i.save_pretrained(tmp_path / "t2i", dtype=torch.float32)
    return tmp_path


def arguments(files: Path, rows: str, *more: object) -> list[object]:
    shared = ["--preset", "tiny", "--fp32", "--data", files / "pictures.parquet", "--text-encoder", files / "text"]
    return [*shared, "--t2i", files / "t2i", "--out", files / "out", "--rows", rows, *more]


def ablation(files: Path, rows: str, *more: object) -> dict[str, dict]:
    """The table after the command."""
    succeed(ablate.main, *arguments(files, rows, "--validation", files / "held-out.parquet", *more))
    return json.loads((files / "out" / "ablations.json").read_text())


def test_rows_are_added_replaced_and_not_trained_twice(files, monkeypatch):
    steps = []
    step = VilexRun.batch_loss
    monkeypatch.setattr(VilexRun, "batch_loss", lambda *args: steps.append(1) or step(*args))
    first = ablation(files, "blocks-2,tokens-4", "--max-steps", 2)
    assert list(first) == ["blocks-2", "tokens-4"]
    assert {f"validation_loss_{n}" for n in (1, 4, 16, 75)} <= first["blocks-2"].keys()
    assert "validation_loss_16" not in first["tokens-4"]
    assert first["blocks-2"]["settings"]["pooler"]["num_blocks"] == 2
    trained = len(steps)
    second = ablation(files, "blocks-2,image-only", "--max-steps", 2)
    assert list(second) == ["blocks-2", "tokens-4", "image-only"]
    assert second["blocks-2"] == first["blocks-2"]
    assert len(steps) - trained == trained // 2  # one row of the two
    third = ablation(files, "blocks-2", "--max-steps", 3)
    assert (third["blocks-2"]["steps"], third["tokens-4"]["steps"]) == (3, 2)
    lines = (files / "out" / "ablations.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| row", "| ---", "| blocks-2", "| tokens-4", "| image-only"]
    assert lines[3].split(" | ")[3] == ""


def test_a_run_that_ended_before_its_row_was_written_is_not_trained_again(files, monkeypatch):
    whole = ablation(files, "no-taildrop")
    (files / "out" / "ablations.json").unlink()

    def refuse(state: TrainState) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("train.state._step", refuse)
    assert ablation(files, "no-taildrop") == whole


def test_without_taildrop_all_tokens_are_trained_and_image_only_sees_no_words(files, monkeypatch):
    seen = []
    prompt = VilexRun.prompt

    def record(run: VilexRun, batch: Batch, vilex_tokens: Tensor, joint: bool) -> ComposedPrompt:
        seen.append((vilex_tokens.shape[1], joint))
        return prompt(run, batch, vilex_tokens, joint)

    monkeypatch.setattr(VilexRun, "prompt", record)
    counts = {}
    for row in ("blocks-2", "no-taildrop", "image-only"):
        seen.clear()
        ablation(files, row)
        counts[row] = [set(column) for column in zip(*seen, strict=True)]
    assert counts["no-taildrop"][0] == {75}
    assert counts["image-only"][1] == {False}
    assert len(counts["blocks-2"][0]) > 1
    assert counts["blocks-2"][1] == {False, True}


def test_each_row_changes_one_thing():
    changed = {name: vary(TINY, name) for name in ("blocks-3", "tokens-16", "no-taildrop", "image-only")}
    assert changed["blocks-3"].pooler.num_blocks == 3
    assert changed["tokens-16"].pooler.num_queries == 16
    assert changed["no-taildrop"].vilex.tail_drop is False
    assert changed["image-only"].vilex.joint_fraction == 0
    assert all(variant != TINY for variant in changed.values())
    folders = {row.folder(Path()) for row in parse_rows(ablate.DEFAULT_ROWS, TINY, TINY.vilex)}
    assert len(folders) == 6


def test_dry_run_leaves_nothing(files):
    more = ["--validation", files / "held-out.parquet", "--dry-run"]
    succeed(ablate.main, *arguments(files, "blocks-2", *more))
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("blocks", HELD_OUT, "a row is blocks-N, tokens-N, no-taildrop or image-only, got 'blocks'"),
        ("blocks-9", HELD_OUT, "num_blocks must be between 1 and 8, got 9"),
        ("blocks-2", [], "--validation is needed"),
        ("blocks-2", [*HELD_OUT, "--minutes", "3"], "give --max-steps, not --minutes 3"),
        ("blocks-2", ["--validation", "pictures.parquet"], "pictures.parquet is both in --data and in --validation"),
    ],
)
def test_mistakes_get_one_sentence(files, rows, more, message, monkeypatch):
    monkeypatch.chdir(files)
    result = invoke(ablate.main, *arguments(files, rows, *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
