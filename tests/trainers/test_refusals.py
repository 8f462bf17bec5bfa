"""What the trainers refuse, each with one sentence, and runs that are not to be resumed."""

import re

import pytest
import torch
from builders import build_bert, build_tokenizer
from tiny_runs import TINY, build_run, invoke, succeed
from training import checkpoint

from train import train_t2i
from train.presets import UNetConfig
from vilex.diffusion import load_t2i
from vilex.loss import diffusion_loss


def test_weights_that_are_not_finite_never_replace_a_checkpoint(files, tmp_path):
    state = build_run("vilex", files, tmp_path).state
    state.open_log()
    state.save()
    good = state.path.read_bytes()
    with torch.no_grad():
        next(state.module.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="weights are not finite at step 0"):
        state.save()
    assert state.path.read_bytes() == good


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_a_run_is_not_resumed_with_other_settings(kind, files, tmp_path):
    succeed(kind, files, tmp_path)
    result = invoke(kind, files, tmp_path, "--seed", "1", "--learning-rate", "0.5")
    assert result.exit_code == 2
    assert "holds a run with other settings (learning_rate, seed)" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_a_run_is_not_resumed_on_other_data(kind, files, tmp_path):
    succeed(kind, files, tmp_path)
    before = checkpoint(tmp_path)["inputs"]["data"]
    result = invoke(kind, files, tmp_path, "--limit", "11")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and before.startswith("12 pictures (")
    assert f"holds a run whose data was {before}, now it is 11 pictures (" in said
    assert "give another --out or the same data" in said


def test_a_run_is_not_resumed_with_another_text_to_image_model(files, tmp_path):
    succeed("vilex", files, tmp_path)
    t2i = load_t2i(files.t2i, str(files.text))
    with torch.no_grad():
        t2i.denoiser.conv_out.bias[3] += 1
    t2i.save_pretrained(tmp_path / "other", dtype=torch.float32)
    result = invoke("vilex", files, tmp_path, "--t2i", str(tmp_path / "other"))
    assert result.exit_code == 2
    sentence = r"holds a run whose text-to-image model was [0-9a-f]{12}, now it is [0-9a-f]{12}; give another --out"
    assert re.search(sentence, " ".join(result.output.split())), result.output


def test_a_run_is_not_resumed_with_another_text_encoder(files, tmp_path):
    succeed("t2i", files, tmp_path / "out")
    build_tokenizer("bert").save_pretrained(tmp_path / "text")
    build_bert(len(build_tokenizer("bert"))).save_pretrained(tmp_path / "text")
    result = invoke("t2i", files, tmp_path / "out", "--text-encoder", str(tmp_path / "text"))
    assert result.exit_code == 2 and "holds a run whose text encoder was" in result.output


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_a_run_that_does_not_name_its_data_is_not_resumed(kind, files, tmp_path):
    succeed(kind, files, tmp_path)
    saved = checkpoint(tmp_path)
    del saved["inputs"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    result = invoke(kind, files, tmp_path)
    assert result.exit_code == 2 and "does not say what data it reads; give another --out" in result.output


BAD = [
    (["--data", "nowhere-*.parquet"], "no such file, folder or pattern: 'nowhere-*.parquet'"),
    (["--preset", "giant"], "'giant' is not one of"),
    (["--batch-size", "6", "--accumulate", "4"], "batch_size 6 is not a multiple of accumulate x processes (4 x 1)"),
    (["--batch-size", "0"], "batch_size must be between 1 and 65536, got 0"),
    (["--learning-rate", "nan"], "learning_rate must be a number, got nan"),
    (["--accumulate", "0"], "0 is not in the range x>=1"),
    (["--minutes", "3", "--max-steps", "5"], "--minutes 3 and --max-steps 5 both say where to end: give one"),
    (["--stream", "1", "--workers", "2"], "--stream 1 has workers of its own: leave --workers 2 out"),
    (["--stream", "1"], "--stream reads .tar shards alone, got"),
]
BAD_T2I = [(["--init-from", "/"], "/ holds no text-to-image model: model_index.json is missing")]
BAD_VILEX = [
    (["--t2i", "nowhere"], "nowhere holds no text-to-image model"),
    (["--encoder-init", "hope"], "open_clip:TAG, open_clip:NAME:TAG, timm:NAME or hf:ID, got 'hope'"),
    (["--encoder-init", "open_clip:"], "timm:NAME or hf:ID, got 'open_clip:'"),
    (["--encoder-init", "open_clip:webli", "--init-from", "/"], "starts the encoder anew"),
    (["--say-weight", "-1"], "say_weight must be between 0 and 100, got -1"),
    (["--say-steps", "3"], "--say-steps 3 needs tokens to keep: give --init-from or --spell-steps too"),
    (["--encoder-init", "open_clip:webli"], "needs a tower of open_clip"),
    (["--encoder-init", "open_clip:no-tower:webli"], "open_clip cannot build 'no-tower' with pretrained='webli'"),
    (["--encoder-init", "timm:no-tower"], "timm knows no tower 'no-tower'"),
    (["--encoder-init", "hf:/no/such/tower"], "'/no/such/tower' holds no tower of transformers"),
    (["--encoder-size", "224"], "--encoder-size 224 needs a tower of open_clip, timm or transformers"),
    (["--encoder-size", "224", "--init-from", "/"], "--encoder-size 224 sets up a tower, --init-from brings one"),
    (["--distil-steps", "3"], "--distil-steps needs --encoder-init teacher"),
    (["--encoder-init", "teacher", "--distil-steps", "0"], "steps must be between 1 and 1e+06, got 0"),
    (["--snr-gamma", "5"], "No such option"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, flags, message",
    [("t2i", *bad) for bad in BAD + BAD_T2I] + [("vilex", *bad) for bad in BAD + BAD_VILEX],
)
def test_bad_flags_give_one_sentence_and_exit_code_2(kind, flags, message, files, tmp_path):
    result = invoke(kind, files, tmp_path / "out", *flags)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [({"widths": (8, 10)}, "width 10 is not a multiple of norm_num_groups 4"),
     ({"attention": (True,)}, "attention has 1 entries, widths 2"),
     ({"image_size": 20}, "image_size 20 cannot be unshuffled and halved 1 times")],
)  # fmt: skip
def test_a_network_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**TINY.unet.to_dict(), **change})


def test_a_loss_that_is_not_finite_stops_the_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "diffusion_loss", lambda *a, **k: diffusion_loss(*a, **k) * float("nan"))
    error = invoke("t2i", files, tmp_path).exception
    assert isinstance(error, FloatingPointError) and "the loss is nan at step 1" in str(error)
    assert not (tmp_path / "checkpoint.pt").exists()
