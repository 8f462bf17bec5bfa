"""What a step draws: learning rates, noise, captions, token counts, pictures; all functions of seed and step."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, Interrupted, build_run, take_steps
from training import assert_same, snapshot

from train import train_t2i, train_vilex
from train.batches import Batch, draw_batch, tabulate
from train.presets import TrainConfig
from train.run import source_weights
from train.state import lr_schedule, step_generator
from train.subjects import content_caption, plain_caption, style_caption
from train.words import Sayings, say_captions, spell_captions
from vilex.config import DEFAULT_BUDGETS
from vilex.diffusion import load_t2i
from vilex.loss import Noise, diffusion_loss, draw_noise, loss_weights
from vilex.pooler import sample_num_tokens
from vilex.prompt import compose


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


@pytest.mark.parametrize("trim, lengths", [(True, None), (False, {16})])
def test_joint_prompts_are_those_of_compose_and_image_only_ones_hold_no_words(
    trim, lengths, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_vilex.VilexRun, "trim", trim)
    run = build_run("vilex", files, tmp_path)
    indices, variants, tokens = torch.tensor([3, 0, 5]), torch.tensor([0, 1, 2]), torch.randn(3, 4, 8)
    batch, records = Batch(indices, variants, torch.zeros(3, 3, 32, 32), run.captions), run.pictures.records
    texts = [style_caption(records[3]), content_caption(records[0]), plain_caption(records[5])]
    assert all(texts) and len(set(texts)) == 3
    for joint in (True, False):
        prompt = run.prompt(batch, tokens, joint)
        assert torch.equal(prompt.vectors, tokens.flatten(0, 1))
        assert lengths is None or prompt.input_ids.shape[1] in lengths
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


@pytest.mark.parametrize("autocast", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_tokens_learn_to_spell_the_layout(files, autocast):
    run = build_run("vilex", files, files.data.parent / "spelling")
    model = run.module.float()
    frozen = snapshot(run.t2i)
    losses = spell_captions(model, run.t2i, run.pictures, steps=40, batch_size=6, seed=0, autocast=autocast)
    assert losses.shape == (40,)
    assert losses[-5:].mean() < 0.8 * losses[:3].mean()
    assert_same(frozen, snapshot(run.t2i))


@pytest.mark.parametrize("autocast", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_first_tokens_learn_to_say_the_caption_and_the_others_stay(files, autocast):
    run = build_run("vilex", files, files.data.parent / "saying")
    model, frozen = run.module.float(), snapshot(run.t2i)
    model.pooler.out.bias.data += 1  # as far from words as training takes it
    model.pooler.add_token_bias()
    before, pixels = copy.deepcopy(model).eval(), run.pictures.batch(torch.arange(len(run.pictures)))
    losses = say_captions(model, before, run.sayings, steps=160, batch_size=6, seed=0, autocast=autocast)
    assert losses.shape == (160,)
    leading = losses[::2]  # the other half counts the later tokens too
    assert leading[-10:].mean() < 0.8 * leading[:10].mean()
    with torch.no_grad():
        told, kept = model(pixels), before(pixels)
        moved = (told - kept).square().mean((0, 2))  # (N,)
        assert moved[:4].min() > 10 * moved[4:].mean()
        for step in (0, 2):  # 1 and 4 tokens
            errors = [run.sayings.loss(tokens, pixels, torch.arange(12), step) for tokens in (told, kept)]
            assert errors[0] < 0.8 * errors[1]
    assert_same(frozen, snapshot(run.t2i))


def test_few_tokens_that_are_read_like_the_caption_cost_nothing(files, tmp_path):
    plain, saying = (build_run("vilex", files, tmp_path / name) for name in ("plain", "saying"))
    saying.config = replace(saying.config, say_weight=2.0)
    batch = saying.draw(3, 0)
    added = saying.sayings.loss(saying.module(batch.pixels), batch.pixels, batch.indices, 3)
    assert added > 0
    assert saying.loss(3, 0).item() == pytest.approx(plain.loss(3, 0).item() + 2 * added.item(), rel=1e-4)
    words = saying.sayings.wanted(batch.pixels, batch.indices)
    saying.sayings.told = lambda tokens: words
    assert saying.sayings.loss(saying.module(batch.pixels), batch.pixels, batch.indices, 3) == 0


def test_what_is_not_pooled_cannot_be_said(files):
    run = build_run("vilex", files, files.data.parent / "unsaid")
    with pytest.raises(ValueError, match="only our own text-to-image model pools what its text encoder says"):
        Sayings(SimpleNamespace(embedded=False), run.pictures, seed=0)


def test_ids_beyond_16_bits_survive_tabulation():
    class Large:  # CLIP's vocabulary has 49,408 entries
        pad_token_id = 49_407

        def __call__(self, texts, **options):
            return SimpleNamespace(input_ids=[[49_407] * options["max_length"]] * len(texts))

    ids, mask = tabulate([["a"], ["b"]], Large(), 5).rows(torch.arange(2), torch.zeros(2).long(), trim=False)
    assert ids.tolist() == [[49_407] * 5] * 2
    assert mask.all()
