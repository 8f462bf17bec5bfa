"""Both trainers end to end on twelve pictures: what they write, resume, freeze, learn and refuse."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training
from builders import build_bert, build_tokenizer
from click.testing import Result
from PIL import Image
from torch import Tensor, nn
from training import assert_same, checkpoint, reset_accelerate, snapshot, visible, write_table

from train import train_t2i, train_vilex
from train.batches import Batch, draw_batch, tabulate
from train.distil import DistilConfig, TeacherFeatures, distil_encoder, distillation_loss, grid_side
from train.memory import count_kept
from train.presets import PRESETS, TrainConfig, UNetConfig
from train.run import RunOptions, load_data, override, source_weights
from train.state import TrainState, _step, lr_schedule, step_generator
from train.subjects import content_caption, plain_caption, style_caption
from train.words import spell_captions
from vilex.config import DEFAULT_BUDGETS, EncoderConfig
from vilex.diffusion import load_t2i
from vilex.encoder import build_encoder
from vilex.loss import Noise, diffusion_loss, draw_noise, loss_weights
from vilex.pipeline import VilexPipeline
from vilex.pooler import sample_num_tokens
from vilex.prompt import compose

TINY = PRESETS["tiny"]
MAINS = {"t2i": train_t2i.main, "vilex": train_vilex.main}
QUIET = ["--fp32"]  # bf16 would blur what is compared


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Sample grids of two steps and two prompts: what they show is random here anyway."""
    for module in (train_t2i, train_vilex):
        config = module.GenerationConfig
        monkeypatch.setattr(module, "GenerationConfig", lambda c=config, **kw: c(**kw, num_inference_steps=2))
    monkeypatch.setattr(train_t2i, "GRID_PROMPTS", ("a red dog", ""))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A table of twelve pictures, a text encoder, and a random text-to-image model."""
    folder = tmp_path_factory.mktemp("train")
    write_table(folder / "pictures.parquet")
    tokenizer = build_tokenizer("bert")
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "text")
    build_bert(len(tokenizer)).save_pretrained(folder / "text")
    torch.manual_seed(0)
    t2i = train_t2i.build_model(TINY, str(folder / "text"), None, seed=0)
    with torch.no_grad():  # a random denoiser hardly listens to its prompt
        t2i.denoiser.class_embedding.linear_1.weight.mul_(30)
        t2i.denoiser.conv_out.weight.mul_(2)
        for name, parameter in t2i.denoiser.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                parameter.mul_(5)
    t2i.save_pretrained(folder / "t2i", dtype=torch.float32)
    return SimpleNamespace(data=folder / "pictures.parquet", text=folder / "text", t2i=folder / "t2i")


def arguments(kind: str, files: SimpleNamespace, out: Path) -> list[str]:
    shared = ["--preset", "tiny", "--data", str(files.data), "--text-encoder", str(files.text), "--out", str(out)]
    return shared + QUIET + (["--t2i", str(files.t2i)] if kind == "vilex" else [])


def invoke(kind: str, files: SimpleNamespace, out: Path, *more: str) -> Result:
    return training.invoke(MAINS[kind], *arguments(kind, files, out), *more)


def succeed(kind: str, files: SimpleNamespace, out: Path, *more: str) -> Result:
    return training.succeed(MAINS[kind], *arguments(kind, files, out), *more)


def build_run(kind: str, files: SimpleNamespace, out: Path, accumulate: int = 1, **settings: float):
    """A run that is ready for its first step."""
    reset_accelerate()
    config = override(getattr(TINY, kind), settings)
    pictures, _ = load_data(32, [files.data])
    options = RunOptions(out, accumulate, fp32=True)
    if kind == "t2i":
        t2i = train_t2i.build_model(TINY, str(files.text), None, config.seed)
        return train_t2i.T2IRun(t2i, pictures, None, TINY, config, options)
    t2i = load_t2i(files.t2i, str(files.text))
    model = train_vilex.build_model(TINY, t2i, seed=config.seed)
    return train_vilex.VilexRun(t2i, model, pictures, None, TINY, config, options)


def take_steps(run, count: int, fixed_step: int | None = None) -> list[float]:
    """Losses of optimiser steps; with fixed_step, all on that step's pictures, noise and token count."""

    def loss(global_step: int, micro: int) -> Tensor:
        return run.loss(global_step if fixed_step is None else fixed_step, micro)

    return [_step(run.state, run.model, loss)[0].item() for _ in range(count)]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# From start to end


def test_t2i_trains_and_writes_what_load_t2i_reads(files, tmp_path):
    succeed("t2i", files, tmp_path, "--validation", str(files.data))
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
    succeed("vilex", files, tmp_path, "--validation", str(files.data))
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


class Interrupted(Exception):
    pass


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


# What is drawn


def test_lr_schedule_warms_up_linearly_and_falls_as_a_cosine_to_zero():
    config = TrainConfig(max_steps=110, warmup_steps=10)
    rates = [lr_schedule(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert lr_schedule(TrainConfig(max_steps=5, warmup_steps=0), 0) == 1


def test_step_generators_differ_by_seed_step_and_stream_and_repeat():
    def draw(*key: int) -> float:
        return torch.rand((), generator=step_generator(*key), dtype=torch.float64).item()

    keys = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2) for stream in (0, 1, 1001, 1002)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]


def test_noise_of_a_share_is_that_of_the_whole_batch(files):
    t2i = load_t2i(files.t2i, str(files.text))
    whole, again = (draw_noise(t2i, 6, step_generator(0, 0)) for _ in range(2))
    assert whole.values.shape == (6, 48, 8, 8) and whole.timesteps.shape == (6,)
    part = again.rows(slice(2, 5))
    assert torch.equal(part.values, whole.values[2:5]) and torch.equal(part.timesteps, whole.timesteps[2:5])


def test_a_shift_draws_noisier_timesteps_more_often(files):
    t2i = load_t2i(files.t2i, str(files.text))
    plain, noisier, cleaner = (t2i.draw_timesteps(8000, step_generator(0, 0), shift) for shift in (1.0, 3.0, 1 / 3))
    assert torch.equal(plain, torch.randint(1000, (8000,), generator=step_generator(0, 0)))
    for timesteps, median in ((noisier, 750), (cleaner, 250)):
        assert timesteps.dtype == torch.int64 and timesteps.min() >= 0 and timesteps.max() <= 999
        assert timesteps.float().median() == pytest.approx(median, abs=15)


def test_a_run_draws_its_timesteps_with_its_shift(files, tmp_path, monkeypatch):
    run = build_run("t2i", files, tmp_path, timestep_shift=100.0, noise_draws=8)
    seen = []
    monkeypatch.setattr(run, "batch_loss", lambda batch, noise, step: seen.append(noise.timesteps))
    run.loss(0, 0)
    assert seen[0].float().mean() > 900


def test_several_noises_share_one_encoding_and_count_alike(files, tmp_path):
    run = build_run("t2i", files, tmp_path, noise_draws=2)
    batch = draw_batch(run.pictures, run.captions, run.config, run.weights, 0, slice(0, 4))
    noises = [draw_noise(run.t2i, 4, step_generator(0, draw)) for draw in (1, 2)]
    with torch.no_grad():
        together = run.batch_loss(batch, Noise.concatenate(noises), 0)
        apart = [run.batch_loss(batch, noise, 0) for noise in noises]
    torch.testing.assert_close(together, sum(apart) / 2)
    assert not torch.isclose(*apart)


def test_texts_of_like_length_are_encoded_together_to_the_same_end(files, tmp_path, monkeypatch):
    run = build_run("t2i", files, tmp_path)
    batch = draw_batch(run.pictures, run.captions, run.config, run.weights, 0, slice(0, 4))
    conditions = []
    for groups in (1, 4):
        monkeypatch.setattr(train_t2i, "_LENGTH_GROUPS", groups)
        conditions.append(run._condition(batch))
    assert conditions[0].mask.sum(1).unique().numel() > 1  # the texts differ in length
    torch.testing.assert_close(conditions[1].pooled, conditions[0].pooled)
    assert torch.equal(conditions[1].mask, conditions[0].mask)
    seen = conditions[0].mask[..., None]
    torch.testing.assert_close(conditions[1].prompt_embeds * seen, conditions[0].prompt_embeds * seen)


def test_another_prompt_scale_changes_no_prediction(files):
    t2i = load_t2i(files.t2i, str(files.text))
    prompt = compose("a red dog", [], t2i.tokenizer, t2i.config.context_length)
    noisy, time = torch.randn(1, *t2i.latent_shape), torch.tensor([400])
    before = t2i.denoise(noisy, time, t2i.encode_prompt(prompt))
    keys = t2i.denoiser.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].clone()
    train_t2i.rescale_prompts(t2i, t2i.config.prompt_scale / 8)
    assert t2i.config.prompt_scale == TINY.unet.prompt_scale / 8
    torch.testing.assert_close(t2i.denoise(noisy, time, t2i.encode_prompt(prompt)), before)
    after = t2i.denoiser.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    torch.testing.assert_close(after, 8 * keys)


def test_snr_weights_of_a_v_prediction(files):
    t2i = load_t2i(files.t2i, str(files.text))
    timesteps = torch.tensor([0, 300, 500, 999])
    alpha_bar = t2i.scheduler.alphas_cumprod[timesteps]
    weights = loss_weights(t2i, timesteps, snr_gamma=5.0)
    low = alpha_bar / (1 - alpha_bar) < 5
    assert low.tolist() == [False, True, True, True]
    assert torch.allclose(weights[low], alpha_bar[low])  # snr / (snr + 1)
    assert weights[0] == pytest.approx(5 * (1 - alpha_bar[0].item()), rel=1e-3)
    noise = draw_noise(t2i, 3, step_generator(0, 0))
    prompt = tabulate([["a dog"]] * 3, t2i.tokenizer, 128).prompt(torch.arange(3), torch.zeros(3).long(), trim=True)
    latents, condition = torch.zeros(3, 48, 8, 8), t2i.encode_prompt(prompt)
    one_by_one = [
        diffusion_loss(t2i, t2i.denoiser, latents[i : i + 1], condition_row(condition, i), noise.rows(slice(i, i + 1)))
        for i in range(3)
    ]
    expected = (torch.stack(one_by_one) * loss_weights(t2i, noise.timesteps, 5.0)).mean()
    assert torch.allclose(diffusion_loss(t2i, t2i.denoiser, latents, condition, noise, 5.0), expected, rtol=1e-4)


def condition_row(condition, row: int):
    parts = (condition.prompt_embeds, condition.pooled, condition.mask)
    return type(condition)(*(part[row : row + 1] for part in parts))


def test_taildrop_prefers_the_ladder():
    counts = Counter(sample_num_tokens(step_generator(0, step, train_vilex._TOKENS_STREAM)) for step in range(4000))
    assert min(counts) == 1 and max(counts) == 75
    for budget in DEFAULT_BUDGETS:
        assert counts.pop(budget) / 4000 == pytest.approx(0.15 + 0.4 / 75, abs=0.025)
    assert len(counts) == 71 and max(counts.values()) / 4000 < 0.02


def test_joint_prompts_are_those_of_compose_and_image_only_ones_hold_no_words(files, tmp_path):
    run = build_run("vilex", files, tmp_path)
    indices, variants, tokens = torch.tensor([3, 0, 5]), torch.tensor([0, 1, 2]), torch.randn(3, 4, 8)
    batch, records = Batch(indices, variants, torch.zeros(3, 3, 32, 32), run.captions), run.pictures.records
    texts = [style_caption(records[3]), content_caption(records[0]), plain_caption(records[5])]
    assert all(texts) and len(set(texts)) == 3
    for joint in (True, False):
        prompt = run.prompt(batch, tokens, joint)
        assert torch.equal(prompt.vectors, tokens.flatten(0, 1))
        for row, text in enumerate(texts):
            expected = compose(f"<image> {text}" if joint else "", [tokens[row]], run.t2i.tokenizer, 128)
            used, wanted = prompt.attention_mask[row], expected.attention_mask[0]
            assert torch.equal(prompt.input_ids[row][used], expected.input_ids[0][wanted])
            assert torch.equal(prompt.slots[row][used], expected.slots[0][wanted])


@pytest.mark.parametrize("joint_fraction", [0.0, 0.5, 1.0])
def test_the_asked_share_of_batches_holds_words(joint_fraction, files, tmp_path, monkeypatch):
    run = build_run("vilex", files, tmp_path, joint_fraction=joint_fraction)
    joint = []

    def note(batch, vilex_tokens, is_joint):
        joint.append(is_joint)
        raise Interrupted

    monkeypatch.setattr(run, "prompt", note)
    for step in range(400):
        with pytest.raises(Interrupted):
            run.loss(step, 0)
    assert np.mean(joint) == pytest.approx(joint_fraction, abs=0.08 if joint_fraction == 0.5 else 0)


def test_averaged_weights_are_put_in_and_taken_out_again(files, tmp_path):
    run = build_run("t2i", files, tmp_path)
    take_steps(run, 3)
    trained = snapshot(run.module)
    with pytest.raises(Interrupted), run.state.averaged():
        average = snapshot(run.module)
        assert_same(list(average.values()), [*run.state.ema.shadow_params])
        assert not torch.equal(average["conv_in.weight"], trained["conv_in.weight"])
        raise Interrupted
    assert_same(trained, snapshot(run.module))


def test_source_weights_leave_out_absent_sources_and_give_way_to_unknown_ones():
    records = [SimpleNamespace(source=source) for source in ("a", "a", "b")]
    assert source_weights(records, {"a": 0.5, "b": 0.25, "c": 0.25}).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert source_weights(records, {"a": 1.0}) is None


def test_a_model_with_several_text_encoders_cannot_be_spelled_to(files, tmp_path):
    run = build_run("vilex", files, tmp_path)
    run.t2i.text_encoders.append(run.t2i.text_encoder)
    with pytest.raises(ValueError, match="only a model with one text encoder can be spelled to, this one has 2"):
        spell_captions(run.module, run.t2i, run.pictures, steps=1, batch_size=2, seed=0)


def test_tokens_learn_to_spell_the_layout(files):
    run = build_run("vilex", files, files.data.parent / "spelling")
    model = run.module.float()
    frozen = snapshot(run.t2i)
    losses = spell_captions(model, run.t2i, run.pictures, steps=40, batch_size=6, seed=0)
    assert losses.shape == (40,)
    assert losses[-5:].mean() < 0.8 * losses[:3].mean()
    assert_same(frozen, snapshot(run.t2i))


def test_ids_beyond_16_bits_survive_tabulation():
    class Large:  # CLIP's vocabulary has 49,408 entries
        def __call__(self, texts, **options):
            ids = torch.full((len(texts), options["max_length"]), 49_407)
            return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    ids, mask = tabulate([["a"], ["b"]], Large(), 5).rows(torch.arange(2), torch.zeros(2).long(), trim=False)
    assert ids.tolist() == [[49_407] * 5] * 2
    assert mask.all()


# What is refused


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
    (["--stream", "1"], "--stream reads .tar shards alone, got"),
]
BAD_T2I = [(["--init-from", "/"], "/ holds no text-to-image model: model_index.json is missing")]
BAD_VILEX = [
    (["--t2i", "nowhere"], "nowhere holds no text-to-image model"),
    (["--encoder-init", "hope"], "open_clip:TAG, open_clip:NAME:TAG, timm:NAME or hf:ID, got 'hope'"),
    (["--encoder-init", "open_clip:"], "timm:NAME or hf:ID, got 'open_clip:'"),
    (["--encoder-init", "teacher", "--init-from", "/"], "starts the encoder anew"),
    (["--encoder-init", "open_clip:webli"], "needs a tower of open_clip"),
    (["--encoder-init", "open_clip:no-tower:webli"], "open_clip cannot build 'no-tower' with pretrained='webli'"),
    (["--encoder-init", "timm:no-tower"], "timm knows no tower 'no-tower'"),
    (["--encoder-init", "hf:/no/such/tower"], "'/no/such/tower' holds no tower of transformers"),
    (["--encoder-size", "224"], "--encoder-size 224 needs a tower of open_clip, timm or transformers"),
    (["--encoder-size", "224", "--init-from", "/"], "--encoder-size 224 sets up a tower, --init-from brings one"),
    (["--distil-steps", "3"], "--distil-steps needs --encoder-init teacher"),
    (["--encoder-init", "teacher", "--distil-steps", "0"], "steps must be between 1 and 1e+06, got 0"),
    (["--workers", "2"], "No such option"),
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


# Starting from a teacher


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

        def patch_features(self, pixels: Tensor) -> Tensor:
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
