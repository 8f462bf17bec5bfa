"""Both trainers end to end on twelve pictures: what they write and resume, what moves, and what the loss reaches."""

from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_runs import Interrupted, build_run, invoke, read_metrics, succeed, take_steps
from training import assert_same, checkpoint, snapshot, visible

from train import state, train_vilex
from train.memory import count_kept
from train.state import TrainState, step_generator
from vilex.config import DEFAULT_BUDGETS
from vilex.diffusion import load_t2i
from vilex.pipeline import VilexPipeline
from vilex.pooler import sample_num_tokens


def test_t2i_trains_and_writes_what_load_t2i_reads(files, tmp_path):
    succeed("t2i", files, tmp_path, "--validation", str(files.held_out))
    t2i = load_t2i(tmp_path / "t2i", str(files.text))
    average = dict(
        zip(dict(t2i.denoiser.named_parameters()), checkpoint(tmp_path)["ema"]["shadow_params"], strict=True)
    )
    for name, parameter in t2i.denoiser.named_parameters():
        assert torch.equal(parameter, average[name].half().float()), name
    for step in (0, 2, 4):
        with Image.open(tmp_path / f"samples-{step:06d}.png") as grid:
            assert grid.format == "PNG" and grid.size == (4 + 2 * 36, 4 + 36)
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["global_step"] for line in steps] == [1, 2, 3, 4]
    assert [line["images_seen"] for line in steps] == [4, 8, 12, 16]
    assert all(line["images_per_second"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert [line["learning_rate"] for line in steps] == pytest.approx([3e-4, 3e-4, 2.25e-4, 7.5e-5])
    assert [line["global_step"] for line in lines if "validation_loss" in line] == [0, 2, 4]


def test_vilex_trains_and_writes_what_the_pipeline_reads(files, tmp_path):
    succeed("vilex", files, tmp_path, "--validation", str(files.held_out))
    pipeline = VilexPipeline.from_pretrained(
        str(tmp_path / "weights"), device="cpu", dtype="float32", text_encoder=str(files.text)
    )
    average = checkpoint(tmp_path)["ema"]["shadow_params"]
    for (name, parameter), expected in zip(pipeline.vilex.named_parameters(), average, strict=True):
        assert torch.equal(parameter, expected.half().float()), name
    for step in (0, 2, 4):
        with Image.open(tmp_path / f"ladder-{step:06d}.png") as ladder:
            assert ladder.format == "PNG" and ladder.height == 20 + 8 * 36 + 4 and ladder.width >= 5 * 36
    lines = read_metrics(tmp_path)
    assert sum("loss" in line for line in lines) == 4
    budgets = {f"validation_loss_{n}" for n in DEFAULT_BUDGETS}
    assert [line["global_step"] for line in lines if budgets <= line.keys()] == [0, 2, 4]


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_four_steps_equal_two_and_resume_and_two(kind, files, tmp_path, monkeypatch):
    succeed(kind, files, tmp_path / "whole")
    with monkeypatch.context() as patch:
        save = TrainState.save

        def stop_after_saving(state: TrainState) -> None:
            save(state)
            state.log_metrics(loss=99.0)
            state.global_step += 1
            state.log_metrics(loss=99.0)  # written after the checkpoint, so a resumed run drops it
            raise Interrupted

        patch.setattr(TrainState, "save", stop_after_saving)
        assert isinstance(invoke(kind, files, tmp_path / "halves").exception, Interrupted)
    assert checkpoint(tmp_path / "halves")["global_step"] == 2
    succeed(kind, files, tmp_path / "halves")
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves"))
    losses = [[m["loss"] for m in read_metrics(tmp_path / name) if "loss" in m] for name in ("whole", "halves")]
    assert losses[1] == losses[0][:2] + [99.0] + losses[0][2:]


def test_a_finished_run_writes_its_weights_again_and_trains_no_more(files, tmp_path):
    succeed("t2i", files, tmp_path)
    before = checkpoint(tmp_path)
    (tmp_path / "t2i" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    succeed("t2i", files, tmp_path)
    assert_same(before, checkpoint(tmp_path))
    load_t2i(tmp_path / "t2i", str(files.text))


def test_minutes_say_how_many_steps_are_taken(files, tmp_path, monkeypatch):
    clock = count(step=0.1)  # seconds, at each look
    monkeypatch.setattr(state.time, "perf_counter", lambda: next(clock))
    succeed("t2i", files, tmp_path, "--minutes", "0.2")
    steps = [line for line in read_metrics(tmp_path) if "loss" in line]
    taken = checkpoint(tmp_path)["global_step"]
    assert 20 < taken == len(steps) < 120  # a step and what is logged of it look more than once
    assert steps[-1]["learning_rate"] < 0.2 * steps[0]["learning_rate"]
    assert (tmp_path / f"samples-{taken:06d}.png").is_file()
    succeed("t2i", files, tmp_path, "--minutes", "0.2")  # goes on, though far beyond the preset's steps
    assert checkpoint(tmp_path)["global_step"] > taken + 20


def test_the_speed_leaves_out_the_step_that_compiles(files, tmp_path, monkeypatch):
    run, clock = build_run("vilex", files, tmp_path, max_steps=8, log_every=4, sample_every=8, save_every=8), [0.0]
    losses = []

    def loss(global_step: int, micro: int) -> torch.Tensor:
        clock[0] += 2.0 if global_step else 100.0  # seconds
        losses.append(run.loss(global_step, micro))
        return losses[-1]

    monkeypatch.setattr(state.time, "perf_counter", lambda: clock[0])
    state.train(run.state, run.model, loss, dict, flops_per_picture=0.0)
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["images_per_second"] for line in lines] == [2.0, 2.0]
    means = torch.stack(losses).view(2, 4).mean(1).tolist()  # the loss of that step counts
    assert [line["loss"] for line in lines] == pytest.approx(means, abs=1e-6)


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_dry_run_logs_sizes_and_leaves_nothing(kind, files, tmp_path, caplog):
    caplog.set_level("INFO")
    succeed(kind, files, tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    assert "12 pictures" in caplog.text and "GFLOP per picture" in caplog.text and "M trained parameters" in caplog.text


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_init_from_starts_from_saved_weights_with_a_fresh_optimiser(kind, files, tmp_path):
    succeed(kind, files, tmp_path / "first")
    weights = tmp_path / "first" / ("t2i" if kind == "t2i" else "weights")
    succeed(kind, files, tmp_path / "second", "--init-from", str(weights), "--learning-rate", "0",
            *(["--encoder-learning-rate", "0"] if kind == "vilex" else []))  # fmt: skip
    first, second = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second")
    shadow = first["ema"]["shadow_params"]
    assert all(torch.equal(a.half().float(), b) for a, b in zip(shadow, second["ema"]["shadow_params"], strict=True))
    steps = [state["step"] for state in second["optimizer"]["state"].values()]
    assert steps and all(step == 4 for step in steps)


# What moves and what does not


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_a_step_moves_what_is_trained_and_nothing_else(kind, files, tmp_path):
    run = build_run(kind, files, tmp_path)
    frozen = run.t2i.text_encoder if kind == "t2i" else run.t2i
    still, moving = snapshot(frozen), snapshot(run.module)
    take_steps(run, 1, fixed_step=_full_tokens(run) if kind == "vilex" else None)
    assert_same(still, snapshot(frozen))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    for name, before in moving.items():
        before, after = visible(name, before), visible(name, run.module.get_parameter(name))
        assert not torch.equal(before, after) or not len(before), name
    assert sum(len(visible(name, parameter)) > 0 for name, parameter in moving.items()) > 25


def _full_tokens(run) -> int:
    """A step at which TailDrop keeps all tokens."""
    return next(s for s in range(99) if sample_num_tokens(step_generator(0, s, train_vilex._TOKENS_STREAM)) == 75)


def test_gradient_reaches_the_encoder_only_through_the_text_encoder(files, tmp_path, monkeypatch):
    run = build_run("vilex", files, tmp_path)
    run.loss(0, 0).backward()
    assert run.module.encoder.tower.patch_embed.proj.weight.grad.abs().sum() > 0
    encode = run.t2i.encode_prompt
    monkeypatch.setattr(run.t2i, "encode_prompt", lambda prompt: _detached(encode(prompt)))
    assert not run.loss(0, 0).requires_grad


def _detached(condition):
    condition = condition.to("cpu", torch.float32)
    return type(condition)(condition.prompt_embeds.detach(), condition.pooled.detach(), condition.mask)


@pytest.mark.parametrize("kind, factor", [("t2i", 0.7), ("vilex", 0.97)])
def test_one_batch_can_be_overfitted(kind, factor, files, tmp_path):
    rates = {"t2i": {"learning_rate": 1e-2}, "vilex": {"learning_rate": 1e-2, "encoder_learning_rate": 1e-2}}[kind]
    run = build_run(kind, files, tmp_path, max_steps=60, **rates)
    losses = take_steps(run, 60, fixed_step=1)
    assert np.mean(losses[-5:]) < factor * np.mean(losses[:2]), losses


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_accumulating_two_micro_batches_equals_one_batch(kind, files, tmp_path):
    losses, weights = [], []
    for accumulate in (1, 2):
        run = build_run(kind, files, tmp_path, accumulate)
        losses.append(take_steps(run, 3))
        weights.append(snapshot(run.module))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, whole in weights[0].items():
        # both optimisers would blow up rounding to whole steps, so only what the loss depends on is compared
        assert torch.allclose(visible(name, whole), visible(name, weights[1][name]), atol=1e-4), name


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_checkpointed_gradients_train_alike(kind, files, tmp_path):
    losses, bytes_kept = [], []
    for flags in ([], ["--checkpoint-gradients"]):
        out = tmp_path / f"out{len(flags)}"
        with count_kept() as kept:
            succeed(kind, files, out, "--max-steps", "2", *flags)
        losses.append([line["loss"] for line in read_metrics(out) if "loss" in line])
        bytes_kept.append(kept.total)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert bytes_kept[1] < 0.8 * bytes_kept[0]


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_what_the_command_line_says_stands_in_for_the_preset(kind, files, tmp_path):
    given = {"max_steps": 1, "warmup_steps": 0, "timestep_shift": 2.5, "learning_rate": 0.002, "seed": 7}
    succeed(kind, files, tmp_path, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()))
    assert given.items() <= checkpoint(tmp_path)["config"].items()


@pytest.mark.parametrize("kind", ["t2i", "vilex"])
def test_compiled_networks_train_alike_and_see_one_shape(kind, files, tmp_path, monkeypatch):
    lengths, losses, forward = set(), [], UNet2DConditionModel.forward

    def note(unet, sample, timestep, encoder_hidden_states, **options):
        if torch.is_grad_enabled():  # what is drawn in between is not compiled
            lengths.add(encoder_hidden_states.shape[1])
        return forward(unet, sample, timestep, encoder_hidden_states, **options)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, not made machine code
    monkeypatch.setattr(UNet2DConditionModel, "forward", note)
    for flags in ([], ["--compile"]):
        lengths.clear()
        out = tmp_path / f"out{len(flags)}"
        succeed(kind, files, out, "--max-steps", "4", *flags)
        losses.append([line["loss"] for line in read_metrics(out) if "loss" in line])
    assert lengths == {128}
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
