"""What the denoiser reads of a prompt."""

import torch
from tiny_runs import build_run

from train.reading import PromptReader
from train.state import step_generator
from vilex.loss import draw_noise
from vilex.t2i import Conditioning


def build_reader(files, out):
    """A reader that asked with one picture, what it asked under, and the pixels."""
    run = build_run("vilex", files, out)
    pixels = run.pictures.batch(torch.arange(1))
    condition = run.condition(run.module(pixels, 5), trim=True)
    return PromptReader(run.t2i, pixels, condition, seed=3), condition, pixels


def test_answers_are_those_that_the_denoiser_gets(files, tmp_path):
    reader, condition, pixels = build_reader(files, tmp_path)
    t2i, got = reader.t2i, []
    noise = draw_noise(t2i, 1, step_generator(3, 0))
    hooks = [attention.register_forward_hook(lambda *of: got.append(of[2])) for attention in reader.attentions]
    t2i.denoise(t2i.add_noise(t2i.encode(pixels), noise.values, noise.timesteps), noise.timesteps, condition)
    for hook in hooks:
        hook.remove()
    *answers, pooled = reader(condition)
    assert len(answers) == len(got) > 1
    for answer in answers:  # in the order of the modules, not of the pass
        alike = [real[0] for real in got if real.shape[-1] == answer.shape[-1]]
        apart = [(answer[0][:, None] - real).abs().amax(-1).amin(1).max() for real in alike]
        assert min(apart) < 1e-4
        assert answer[0].std(0).max() > 1e-3  # the queries differ
    torch.testing.assert_close(pooled[:, 0], t2i.denoiser.class_embedding(condition.pooled))


def test_padding_is_not_read(files, tmp_path):
    reader, condition, _ = build_reader(files, tmp_path)
    for short, long in zip(reader(condition), reader(condition.padded(30)), strict=True):
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)


def test_other_words_are_read_otherwise(files, tmp_path):
    reader, condition, _ = build_reader(files, tmp_path)
    other = reader(Conditioning(condition.prompt_embeds.flip(1), -condition.pooled, condition.mask))
    for mine, others in zip(reader(condition), other, strict=True):
        assert (mine - others).abs().max() > 1e-3
