"""Starting a vision tower from a teacher or from the weights of its library."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, Interrupted, invoke, succeed
from torch import Tensor, nn
from training import assert_same, checkpoint, snapshot

from train import train_vilex
from train.distil import DistilConfig, distil_encoder, distillation_loss, grid_side
from train.features import TeacherFeatures
from train.run import RunOptions, load_data
from train.state import TrainState
from train.words import say_captions, spell_captions
from vilex.config import EncoderConfig
from vilex.diffusion import load_t2i
from vilex.encoder import build_encoder
from vilex.model import load_vilex


def tiny_teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 10, 5, stride=2), nn.ReLU(), nn.Conv2d(10, 7, 3)).requires_grad_(False)


def test_distillation_loss_falls_and_repeats(files):
    pictures, _ = load_data(32, [files.data])
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        encoder = build_encoder(EncoderConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2))
        start, losses = snapshot(encoder), []
        config = DistilConfig(steps=40, batch_size=6, learning_rate=1e-2)
        distil_encoder(
            encoder, tiny_teacher(), pictures, config, lambda i, n, loss, kept=losses: kept.append(loss.item())
        )
        runs.append((snapshot(encoder), losses))
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert_same(runs[0][0], runs[1][0])
    assert not torch.equal(start["tower.pos_embed"], runs[0][0]["tower.pos_embed"])
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("steps, asked", [(2, 12), (8, 12)])
def test_the_teacher_is_asked_once_for_each_picture(steps, asked, files):
    pictures, _ = load_data(32, [files.data])
    seen = []
    teacher = tiny_teacher()
    encoder = build_encoder(EncoderConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2))
    config = DistilConfig(steps=steps, batch_size=6)
    distil_encoder(encoder, lambda pixels: seen.append(len(pixels)) or teacher(pixels), pictures, config)
    assert len(pictures) == 12 and sum(seen[1:]) == asked  # the first call is for means and deviations


def test_a_teacher_goes_on_with_the_tower_of_other_weights(files, tmp_path, monkeypatch):
    succeed("vilex", files, tmp_path / "first")
    saved = load_vilex(tmp_path / "first" / "weights")
    towers, tokens = [], []
    monkeypatch.setattr(train_vilex, "load_efficientnet", lambda: SimpleNamespace(to=lambda *_, **__: teacher))
    teacher = SimpleNamespace(coarse_features=tiny_teacher())

    def distil(encoder: nn.Module, *given) -> None:
        towers.append(snapshot(encoder))
        distil_encoder(encoder, *given)

    def say(model: nn.Module, before: nn.Module, *given) -> None:
        tokens.append((snapshot(model.encoder), snapshot(before)))
        say_captions(model, before, *given)

    monkeypatch.setattr(train_vilex, "distil_encoder", distil)
    monkeypatch.setattr(train_vilex, "say_captions", say)
    flags = ["--init-from", str(tmp_path / "first" / "weights"), "--encoder-init", "teacher", "--distil-steps", "3"]
    flags += ["--say-steps", "4"]
    succeed("vilex", files, tmp_path / "second", *flags)
    assert_same(towers[0], snapshot(saved.encoder.requires_grad_(True)))
    taught, before = tokens[0]
    assert not before.pop("pooler.token_bias").any()
    assert_same(before, snapshot(saved))
    assert not torch.equal(taught["tower.pos_embed"], saved.encoder.state_dict()["tower.pos_embed"])
    assert load_vilex(tmp_path / "second" / "weights").pooler.token_bias[:4].abs().min() > 0
    succeed("vilex", files, tmp_path / "second", *flags)  # is read again, with the biases
    assert len(tokens) == 1


def test_teacher_features_follow_the_grid_and_are_standardised():
    pixels = torch.rand(9, 3, 32, 20) * 2 - 1
    features = TeacherFeatures(tiny_teacher(), 3, pixels)(pixels)
    assert features.shape == (9, 9, 7)
    assert torch.allclose(features.mean((0, 1)), torch.zeros(7), atol=1e-5)
    assert torch.allclose(features.std((0, 1)), torch.ones(7), atol=1e-4)
    corner = torch.zeros(1, 3, 6, 6)
    corner[..., :2, 4:] = 1  # top right
    marked = TeacherFeatures(lambda p: p.mean(1, keepdim=True), 3, torch.rand(2, 3, 6, 6))(corner)
    assert marked.flatten().argmax() == 2


def test_distillation_loss_is_zero_for_equal_features_only():
    targets = torch.randn(2, 5, 3)
    assert distillation_loss(targets, targets) == pytest.approx(0, abs=1e-6)
    assert distillation_loss(-targets, targets) > 2


def test_a_tower_without_a_square_grid_has_no_teacher():
    encoder = SimpleNamespace(num_patches=12)
    with pytest.raises(ValueError, match="square grid of patches, the encoder gives 12"):
        grid_side(encoder)


def test_encoder_init_teacher_happens_once_and_the_run_resumes_exactly(files, tmp_path, monkeypatch):
    calls = []

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_teacher()
            calls.append(1)

        def coarse_features(self, pixels: Tensor) -> Tensor:
            return self.net(pixels)

    monkeypatch.setattr(train_vilex, "load_efficientnet", Teacher)
    flags = ["--encoder-init", "teacher", "--distil-steps", "3"]
    succeed("vilex", files, tmp_path / "whole", *flags)
    succeed("vilex", files, tmp_path / "plain")
    assert (
        checkpoint(tmp_path / "whole")["module"]["encoder.tower.pos_embed"]
        .sub(checkpoint(tmp_path / "plain")["module"]["encoder.tower.pos_embed"])
        .abs()
        .max()
        > 0
    )
    with monkeypatch.context() as patch:
        save = TrainState.save
        patch.setattr(TrainState, "save", lambda state: (save(state), (_ for _ in ()).throw(Interrupted))[0])
        assert isinstance(invoke("vilex", files, tmp_path / "halves", *flags).exception, Interrupted)
    assert len(calls) == 2
    succeed("vilex", files, tmp_path / "halves", *flags)
    assert len(calls) == 2
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves"))


def test_a_run_in_bf16_starts_from_what_it_learnt_and_not_from_weights_cast_once(files, tmp_path, monkeypatch):
    losses = {"teacher": [], "words": []}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})

    def distil(*arguments) -> None:
        *given, show, autocast = arguments
        distil_encoder(*given, lambda i, n, loss: losses["teacher"].append(loss.item()), autocast)

    monkeypatch.setattr(train_vilex, "load_efficientnet", lambda: SimpleNamespace(to=lambda *_, **__: teacher))
    teacher = SimpleNamespace(coarse_features=tiny_teacher())
    monkeypatch.setattr(train_vilex, "distil_encoder", distil)
    monkeypatch.setattr(train_vilex, "spell_captions", lambda *a: losses["words"].extend(spell_captions(*a).tolist()))
    t2i, (pictures, _) = load_t2i(files.t2i, str(files.text)), load_data(32, [files.data])
    model, options = train_vilex.build_model(TINY, t2i, seed=0), RunOptions(tmp_path)
    config = DistilConfig(steps=40, batch_size=6, learning_rate=1e-2)
    train_vilex.VilexRun(t2i, model, pictures, None, TINY, TINY.vilex, options, config, spell_steps=80)
    for falling in losses.values():
        assert np.mean(falling[-5:]) < 0.85 * np.mean(falling[:3])


def test_encoder_init_open_clip_loads_the_tag(files, monkeypatch):
    asked = []

    def build(config: EncoderConfig, pretrained: str) -> nn.Module:
        asked.append(pretrained)
        return build_encoder(config).requires_grad_(True)

    monkeypatch.setattr(train_vilex, "build_encoder", build)
    start = train_vilex.read_encoder_init("open_clip:webli", None, None, seed=0)
    assert start.distil is None and start.tower(TINY.encoder) == TINY.encoder
    train_vilex.build_model(TINY, load_t2i(files.t2i, str(files.text)), pretrained=start.pretrained)
    assert asked == ["webli"]
