"""Settings refuse what they cannot mean, with field, value and rule."""

import json

import pytest

from vilex.config import EncoderConfig, GenerationConfig, PoolerConfig, T2IConfig, range_of


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be between 1 and 511, got 0"),
        ({"num_tokens": 512}, "num_tokens must be between 1 and 511, got 512"),
        ({"num_images": 17}, "num_images must be between 1 and 16, got 17"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must be a whole number, got 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"tfg_scale": float("inf")}, "tfg_scale must be a number, got inf"),
        ({"tfg_scale": -0.1}, "tfg_scale must be between 0 and 20, got -0.1"),
        ({"seed": "7"}, "seed must be a number, got '7'"),
        ({"seed": True}, "seed must be a number, got True"),
        ({"seed": 2**32 - 1, "num_images": 2}, r"seed \+ num_images must not exceed 2\^32"),
        ({"scheduler": "plms"}, r"scheduler must be one of auto, dpm\+\+, sde-dpm\+\+, ddim, ddpm, euler, got 'plms'"),
        ({"scheduler": 3}, "scheduler must be text, got 3"),
        ({"negative_prompt": None}, "negative_prompt must be text, got None"),
        ({"negative_prompt": "a" * 1001}, "negative_prompt has 1001 characters, the limit is 1000"),
        ({"guidance_low": 0.6, "guidance_high": 0.4}, "guidance_low 0.6 must not exceed guidance_high 0.4"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**values)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="num_tokens.*; num_images.*; seed"):
        GenerationConfig(num_tokens=0, num_images=99, seed=-1)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (EncoderConfig, {"patch_size": 0}, "patch_size must be between 2 and 64"),
        (EncoderConfig, {"image_size": 60}, "image_size 60 is not a multiple of patch_size 8"),
        (EncoderConfig, {"width": 100}, "width 100 is not a multiple of heads 6"),
        (PoolerConfig, {"width": 100}, "width 100 is not a multiple of heads 6"),
        (PoolerConfig, {"heads": 0}, "heads must be between 1 and 64"),
        (T2IConfig, {"context_length": 4}, "context_length must be between 8 and 1024, got 4"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_sliders_whole_float_becomes_an_integer():
    config = GenerationConfig(num_images=2.0, guidance_scale=3)
    assert config.num_images == 2
    assert type(config.num_images) is int


def test_json_round_trip(tmp_path):
    config = EncoderConfig(image_size=32, image_mean=(0.1, 0.2, 0.3))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert EncoderConfig.load_json(path) == config


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="GenerationConfig has no setting 'steps'"):
        GenerationConfig.from_dict({"steps": 3, "seed": 1})


def test_the_ends_of_a_range_are_allowed():
    bounds = range_of(GenerationConfig, "num_inference_steps")
    for steps in (bounds.minimum, bounds.maximum):
        assert GenerationConfig(num_inference_steps=int(steps)).num_inference_steps == steps
    assert GenerationConfig(seed=2**32 - 1).seed == 2**32 - 1
