"""A `.vilex` file gives back its tokens or says why not."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from vilex import codes
from vilex.codes import VilexCode, fingerprint, from_bytes, from_text, load_code, save_code, to_bytes, to_text


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def test_files_keep_tokens_in_half_precision(tmp_path, tokens):
    path = tmp_path / "a.vilex"
    save_code(path, tokens, "nano-1a2b", "/home/me/my corgi.jpeg")
    code = load_code(path, "nano-1a2b")
    assert torch.equal(code.vilex_tokens, tokens.half().float())
    assert (code.vilex_tokens.dtype, code.fingerprint, code.source) == (torch.float32, "nano-1a2b", "my corgi")
    assert b"/home/me" not in path.read_bytes()


def test_tensors_that_are_views_are_stored_as_seen(tokens):
    code = from_bytes(to_bytes(VilexCode(tokens.T[:, ::2], "m")))
    assert torch.equal(code.vilex_tokens, tokens.T[:, ::2].half().float())


def test_text_is_one_line_and_comes_back(tokens):
    text = to_text(VilexCode(tokens, "m", "corgi"))
    assert "\n" not in text and text.startswith("vilex-1:")
    assert torch.equal(from_text(f" {text}\n", "m").vilex_tokens, tokens.half().float())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "a code starts with 'vilex-1:', got 'hello'"),
        ("vilex-1:***", "damaged"),
        ("vilex-1:é", "damaged"),
        ("vilex-1:", "not a readable .vilex file"),
        ("vilex-1:QUJD", "not a readable .vilex file"),
    ],
)
def test_text_that_is_no_code(text, message):
    with pytest.raises(ValueError, match=message):
        from_text(text)


def test_another_models_code_is_refused_with_both_names(tmp_path, tokens):
    save_code(tmp_path / "a.vilex", tokens, "nano-1a2b")
    with pytest.raises(ValueError, match="made by 'nano-1a2b', this model is 'mini-3c4d'"):
        load_code(tmp_path / "a.vilex", "mini-3c4d")


def _metadata(**changes: str) -> dict[str, str]:
    good = {"format": "vilex-1", "fingerprint": "m", "num_tokens": "5", "source": "", "sha256": "0" * 64}
    return good | changes


@pytest.mark.parametrize("position", [-1, -10, -69])
def test_a_flipped_bit_is_noticed(tokens, position):
    data = bytearray(to_bytes(VilexCode(tokens, "m")))
    data[position] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        from_bytes(bytes(data))


def test_a_reshaped_tensor_is_noticed(tokens):
    data = to_bytes(VilexCode(tokens, "m"))
    forged = data.replace(b"[5,7]", b"[7,5]")
    assert load(forged)["vilex_tokens"].shape == (7, 5)
    with pytest.raises(ValueError, match="checksum"):
        from_bytes(forged)


@pytest.mark.parametrize(
    ("tensor", "metadata", "message"),
    [
        (torch.ones(5, 7).half(), None, "its format is 'not named'"),
        (torch.ones(5, 7).half(), _metadata(format="vilex-9"), "its format is 'vilex-9'"),
        (torch.ones(5, 7).half(), {"format": "vilex-1"}, "not a vilex-1 file"),
        (torch.ones(5, 7).half(), _metadata(), "checksum"),
        (torch.tensor(1.0).half(), _metadata(), r"1 to 75 vectors, got shape \(\)"),
        (torch.ones(5, 7), _metadata(sha256=codes._sha256(torch.ones(5, 7))), "fp16"),
        (torch.ones(76, 7).half(), _metadata(sha256=codes._sha256(torch.ones(76, 7).half())), "1 to 75 vectors"),
    ],
)
def test_foreign_safetensors_are_refused(tensor, metadata, message):
    with pytest.raises(ValueError, match=message):
        from_bytes(save({"vilex_tokens": tensor}, metadata))


@pytest.mark.parametrize("data", [b"", b"PNG", b"\xff" * 99])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.vilex").write_bytes(data)
    with pytest.raises(ValueError, match="not a readable .vilex file"):
        load_code(tmp_path / "a.vilex")


def test_big_files_are_refused_before_they_are_parsed(tmp_path):
    (tmp_path / "a.vilex").write_bytes(bytes(codes.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="larger than 4194304 bytes"):
        load_code(tmp_path / "a.vilex")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3), r"got shape \(3,\)"),
        (torch.ones(0, 3), r"got shape \(0, 3\)"),
        (torch.ones(76, 3), r"got shape \(76, 3\)"),
        (torch.full((2, 3), torch.nan), "finite"),
        (torch.full((2, 3), 1e6), "finite"),
    ],
)
def test_tokens_that_cannot_be_stored_are_refused(tmp_path, tensor, message):
    with pytest.raises(ValueError, match=message):
        save_code(tmp_path / "a.vilex", tensor, "m")
    assert not (tmp_path / "a.vilex").exists()


def test_fingerprint_follows_the_weights_and_not_their_precision():
    module = nn.Linear(3, 2)
    first = fingerprint(module)
    assert len(first) == 12 and fingerprint(module.half().float()) == first
    module.weight.data[1, 2] += 0.01
    assert fingerprint(module) != first
