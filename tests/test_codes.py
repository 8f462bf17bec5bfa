"""A `.vilex` file gives back its tokens or says why not."""

import base64
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)


@given(st.integers(1, 75), st.sampled_from([5, 384, 1024]), st.floats(-1, 3), st.integers(0, 10**6))
def test_copied_tokens_are_off_by_less_than_one_percent(count, width, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, width, generator=generator).clamp(-3.5, 3.5) * 10**exponent
    code = from_text(to_text(VilexCode(tokens, "m")), "m")
    assert code.vilex_tokens.shape == tokens.shape and code.vilex_tokens.dtype == torch.float32
    largest = tokens.abs().amax(1, keepdim=True)
    assert ((code.vilex_tokens - tokens).abs() <= largest * 0.0045).all()
    if width >= 384:
        assert (relative_error(code.vilex_tokens, tokens) < 0.01).all()


def test_a_copied_copy_changes_no_more(tokens):
    once = from_text(to_text(VilexCode(tokens, "m")))
    assert relative_error(from_text(to_text(once)).vilex_tokens, once.vilex_tokens).max() < 1e-3


def test_a_code_of_one_token_is_short_and_one_line():
    text = to_text(VilexCode(torch.randn(1, 384), "0123456789ab", "/home/me/corgi.jpg"))
    assert len(text) == 545 and text.startswith("vilex-2:0123456789ab:") and len(text.split()) == 1
    assert from_text(text).fingerprint == "0123456789ab" and from_text(text).source == ""


def test_a_code_survives_line_breaks_of_a_mail(tokens):
    text = to_text(VilexCode(tokens, "m"))
    broken = " " + "\r\n".join(text[i : i + 17] for i in range(0, len(text), 17)) + "\n"
    assert torch.equal(from_text(broken, "m").vilex_tokens, from_text(text).vilex_tokens)


def test_empty_vectors_are_copied_as_they_are():
    assert torch.equal(from_text(to_text(VilexCode(torch.zeros(2, 3), "m"))).vilex_tokens, torch.zeros(2, 3))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 511])
def test_as_many_tokens_as_any_model_takes_are_kept_and_copied(count):
    tokens = torch.linspace(-1, 1, count * 3).view(count, 3)
    again = from_text(to_text(VilexCode(tokens, "m")), "m").vilex_tokens
    torch.testing.assert_close(again, tokens, atol=1e-2, rtol=0)
    assert torch.equal(codes.from_bytes(codes.to_bytes(VilexCode(tokens, "m"))).vilex_tokens, tokens.half().float())


@given(st.data())
def test_a_changed_missing_or_added_character_is_noticed(data):
    text = to_text(VilexCode(torch.arange(14.0).view(2, 7) - 6, "nano-1a2b"))
    place = data.draw(st.integers(8, len(text) - 1))
    character = data.draw(st.sampled_from("ABCxyz019-_"))
    changed = text[:place] + character + text[place + 1 :]
    for damaged in (changed, text[:place], text[:place] + text[place + 1 :], text[:place] + character + text[place:]):
        if damaged == text:
            continue
        with pytest.raises(ValueError, match="^the code is damaged: "):
            from_text(damaged, "nano-1a2b")


def packed(count: int, width: int, body: bytes, fingerprint: str = "m") -> str:
    body = struct.pack("<BH", count, width) + body
    data = body + codes._short_checksum(fingerprint, body)
    return f"vilex-2:{fingerprint}:" + base64.urlsafe_b64encode(data).decode().rstrip("=")


FORGED = {
    "no code": ("hello", "a code starts with 'vilex-2:', got 'hello'"),
    "older": ("vilex-1:QUJD", "a code starts with 'vilex-2:', got 'vilex-1:QUJD'"),
    "nothing": ("vilex-2:", "the code is damaged: it is cut off"),
    "no tokens": ("vilex-2:m:", "the code is damaged: it is cut off"),
    "stars": ("vilex-2:m:***", "the code is damaged: .* characters that no code has"),
    "umlaut": ("vilex-2:m:\u00e9", "the code is damaged: .* characters that no code has"),
    "short": ("vilex-2:m:QUJD", "the code is damaged: a part is missing"),
    "odd": ("vilex-2:m:QUJDQ", "the code is damaged: a part is missing"),
    "huge": ("vilex-2:m:" + "A" * 2**22, "the code is damaged"),
    "none": (packed(0, 7, b""), "its size does not fit its tokens"),
    "no width": (packed(2, 0, b"\0<\0<"), "vilex_tokens must be 1 to 511 vectors"),
    "many": (packed(512 % 256, 1, bytes(512 * 3)), "vilex_tokens must be 1 to 511 vectors"),
    "wrong count": (packed(2, 1, bytes(3 * 3)), "its size does not fit its tokens"),
    "wrong size": (packed(2, 7, bytes(17)), "its size does not fit its tokens"),
    "infinite": (packed(1, 1, b"\x00\x7c\x01"), "finite"),
    "foreign": (packed(1, 1, b"\0<\1", "other"), "the code was made by 'other', this model is 'm'"),
}


@pytest.mark.parametrize(("text", "message"), FORGED.values(), ids=FORGED)
def test_text_that_is_no_code(text, message):
    with pytest.raises(ValueError, match=message):
        from_text(text, "m")


@pytest.mark.parametrize("name", ["", "a:b", "x" * 65])
def test_fingerprints_that_would_break_the_text_are_refused(tokens, name):
    with pytest.raises(ValueError, match="a fingerprint is up to 64 letters"):
        to_text(VilexCode(tokens, name))


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
        (torch.tensor(1.0).half(), _metadata(), r"1 to 511 vectors, got shape \(\)"),
        (torch.ones(5, 7), _metadata(sha256=codes._sha256(torch.ones(5, 7))), "fp16"),
        (torch.ones(512, 7).half(), _metadata(sha256=codes._sha256(torch.ones(512, 7).half())), "1 to 511 vectors"),
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
    with pytest.raises(ValueError, match="larger than 8388608 bytes"):
        load_code(tmp_path / "a.vilex")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3), r"got shape \(3,\)"),
        (torch.ones(0, 3), r"got shape \(0, 3\)"),
        (torch.ones(512, 3), r"got shape \(512, 3\)"),
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
