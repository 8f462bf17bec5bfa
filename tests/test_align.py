"""Alignment with a teacher's features: off it leaves no trace, on it teaches the denoiser, and it is never shipped."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
from safetensors import safe_open
from torch import Tensor
from training import Teacher, assert_same, build_t2i_run, checkpoint, snapshot

from train import features, train_t2i
from train.align import AlignedDenoiser, alignment_loss, bottleneck_side
from train.data import background_colours
from train.features import FeatureTable
from train.state import TrainState, _step
from vilex.config import GenerationConfig
from vilex.loss import diffusion_loss


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    return training.write_files(tmp_path_factory.mktemp("align"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_t2i, "load_efficientnet", Teacher)
    monkeypatch.setattr(train_t2i, "GRID_PROMPTS", ("a dog",))
    monkeypatch.setattr(train_t2i, "GenerationConfig", lambda **kw: GenerationConfig(**kw, num_inference_steps=1))


def invoke(files: SimpleNamespace, out: Path, *more: str):
    return training.invoke(train_t2i.main, "--preset", "tiny", "--data", files.data, "--text-encoder", files.text,
                           "--out", out, "--fp32", *more)  # fmt: skip


def test_off_there_is_no_teacher_no_projector_and_the_plain_loss(files, tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "load_efficientnet", None)  # calling it would fail
    run = build_t2i_run(files, tmp_path)
    assert run.module is run.t2i.denoiser
    assert not run.module.mid_block._forward_hooks
    plain = []
    monkeypatch.setattr(train_t2i, "diffusion_loss", lambda *a: plain.append(diffusion_loss(*a)) or plain[0])
    assert run.loss(0, 0) is plain[0]


def test_the_first_diffusion_loss_is_the_same_on_and_off(files, tmp_path, monkeypatch):
    """The projector draws from a generator of its own, so the denoiser starts from the same weights."""
    plain = []
    monkeypatch.setattr(train_t2i, "diffusion_loss", lambda *a: plain.append(diffusion_loss(*a)) or plain[-1])
    off, on = build_t2i_run(files, tmp_path), build_t2i_run(files, tmp_path, align_weight=0.5)
    assert_same(snapshot(off.module), snapshot(on.module.denoiser))
    total = on.loss(0, 0)
    assert torch.equal(off.loss(0, 0), plain[0])
    told, features = on.module.told, on.teacher(batch_pixels(on))
    assert total.item() == pytest.approx((plain[0] + 0.5 * alignment_loss(told, features)).item())


def batch_pixels(run: train_t2i.T2IRun) -> Tensor:
    """The pictures of step 0."""
    seen = []
    encode, run.t2i.encode = run.t2i.encode, lambda pixels: seen.append(pixels) or encode(pixels)
    run.loss(0, 0)
    del run.t2i.encode
    return seen[0]


def test_projector_and_denoiser_learn_and_the_teacher_does_not(files, tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "diffusion_loss", lambda *a: diffusion_loss(*a) * 0)  # alignment alone
    run = build_t2i_run(files, tmp_path, align_weight=1.0, learning_rate=3e-3, warmup_steps=0, max_steps=100)
    teacher = snapshot(run.teacher.teacher.__self__)
    run.loss(0, 0).backward()
    for name, parameter in run.module.projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert run.module.denoiser.conv_in.weight.grad.abs().sum() > 0
    run.module.zero_grad()
    losses = [_step(run.state, run.model, lambda step, micro: run.loss(0, micro))[0].item() for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0], losses
    assert_same(teacher, snapshot(run.teacher.teacher.__self__))


def test_several_noises_of_a_picture_share_its_features(files, tmp_path):
    run = build_t2i_run(files, tmp_path, align_weight=1.0, noise_draws=3)
    run.loss(0, 0)
    assert run.module.told.shape == (3 * 4, 16, 5)
    told, features = torch.randn(6, 7, 3), torch.randn(2, 7, 3)
    expected = torch.stack([alignment_loss(told[i : i + 1], features[i % 2 : i % 2 + 1]) for i in range(6)]).mean()
    assert torch.allclose(alignment_loss(told, features), expected)


def test_the_table_holds_what_the_teacher_says_of_each_look(files, tmp_path):
    run = build_t2i_run(files, tmp_path, align_weight=1.0)
    pictures, seed = run.pictures, run.config.seed
    assert 0 < pictures.cut_out.sum() < len(pictures)
    table = FeatureTable(run.teacher, pictures, variants=3, seed=seed)
    for variant in range(3):
        indices = torch.randperm(len(pictures))
        pixels = pictures.batch(indices, background_colours(seed, variant, indices))
        assert torch.allclose(table(indices, torch.full_like(indices, variant)), run.teacher(pixels), atol=0.02)


def test_a_table_is_made_on_an_accelerator_that_can_hold_it(files, tmp_path, monkeypatch):
    run = build_t2i_run(files, tmp_path, align_weight=1.0)
    tables = []
    monkeypatch.setattr(train_t2i, "FeatureTable", lambda *given: tables.append(FeatureTable(*given)) or tables[-1])
    run._build_targets()
    run.device = torch.device("cuda")  # only said: the pictures stay where they are
    run._build_targets()
    assert len(tables) == 1
    for limit, made in ((tables[0].features.nbytes, 2), (tables[0].features.nbytes - 1, 2)):
        monkeypatch.setattr(features, "RESIDENT_BYTES", limit)
        run._build_targets()
        assert len(tables) == made


def test_alignment_loss_runs_from_0_for_parallel_to_2_for_opposite_features():
    features = torch.randn(2, 5, 3)
    assert alignment_loss(3 * features, features) == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-features, features) == pytest.approx(2, abs=1e-6)


def test_the_bottleneck_is_where_the_teacher_is_asked(files, tmp_path):
    run = build_t2i_run(files, tmp_path, align_weight=1.0)
    assert bottleneck_side(run.t2i.denoiser) == run.teacher.side == 4
    assert isinstance(run.module, AlignedDenoiser)


class Interrupted(Exception):
    pass


def test_an_aligned_run_resumes_exactly_and_ships_the_denoiser_alone(files, tmp_path, monkeypatch):
    flags = ("--align-weight", "0.5")
    assert invoke(files, tmp_path / "whole", *flags).exit_code == 0
    with monkeypatch.context() as patch:
        save = TrainState.save
        patch.setattr(TrainState, "save", lambda state: (save(state), (_ for _ in ()).throw(Interrupted))[0])
        assert isinstance(invoke(files, tmp_path / "halves", *flags).exception, Interrupted)
    assert checkpoint(tmp_path / "halves")["global_step"] == 2
    assert invoke(files, tmp_path / "halves", *flags).exit_code == 0
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves"))
    assert any(name.startswith("projector.") for name in checkpoint(tmp_path / "whole")["module"])
    with safe_open(tmp_path / "whole" / "t2i" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as shipped:
        names = set(shipped.keys())
    assert names == set(build_t2i_run(files, tmp_path).t2i.denoiser.state_dict())


def test_a_run_is_not_resumed_with_another_weight(files, tmp_path):
    assert invoke(files, tmp_path).exit_code == 0
    result = invoke(files, tmp_path, "--align-weight", "0.5")
    assert result.exit_code == 2 and "holds a run with other settings (align_weight)" in result.output


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(files, tmp_path):
    assert invoke(files, tmp_path).exit_code == 0
    saved = checkpoint(tmp_path)
    del saved["config"]["align_weight"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert invoke(files, tmp_path).exit_code == 0
    assert invoke(files, tmp_path, "--align-weight", "0.5").exit_code == 2


@pytest.mark.parametrize("weight", ["-1", "nan"])
def test_a_bad_weight_is_named(weight, files, tmp_path):
    result = invoke(files, tmp_path / "out", "--align-weight", weight)
    assert result.exit_code == 2 and "align_weight must be" in result.output
