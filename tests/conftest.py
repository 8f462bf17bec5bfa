"""Tiny random parts: the whole pipeline at width 8, with no network and no weights."""

import dataclasses
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vilex  # noqa: I001  first: it mends a mismatched torchvision

import pytest
import torch
from builders import build_bert, build_clip, build_latent_unet, build_tokenizer, build_vae
from diffusers import DDPMScheduler
from hypothesis import settings
from PIL import Image
from transformers import PreTrainedTokenizerFast

from train.presets import PRESETS, build_unet
from vilex.config import T2IConfig
from vilex.diffusion import EmbeddedModel, TextToImage, build_noise_scheduler
from vilex.encoder import build_encoder
from vilex.latent import StableDiffusion
from vilex.model import ViLex
from vilex.pipeline import VilexPipeline

assert vilex
torch.set_num_threads(1)
settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests come last: from its start on the browser's event loop runs in the main thread."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer("bert")


@pytest.fixture
def t2i(tokenizer: PreTrainedTokenizerFast) -> TextToImage:
    """An embedded 32 px model with a 24-position context, random from a fixed seed."""
    torch.manual_seed(0)
    unet = build_unet(PRESETS["tiny"].unet, text_width=8)
    config = T2IConfig(
        pixel_unshuffle=4, position_frequencies=3, token_frequencies=32, context_length=24, text_encoder=""
    )
    return EmbeddedModel(config, tokenizer, build_bert(len(tokenizer)), unet, build_noise_scheduler())


@pytest.fixture
def stable_diffusion() -> TextToImage:
    """A model in Stable Diffusion's layout: 16 px pictures, 8x8 latents, CLIP text."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("clip")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusion([tokenizer], [build_clip(tokenizer)], build_latent_unet(), scheduler, build_vae())


@pytest.fixture
def picture() -> Image.Image:
    """48x32 with a different colour in each corner."""
    image = Image.new("RGB", (48, 32), "white")
    for box, colour in (((0, 0, 24, 16), "red"), ((24, 0, 48, 16), "green"), ((0, 16, 24, 32), "blue")):
        image.paste(colour, box)
    return image


@pytest.fixture
def pipeline(t2i: TextToImage) -> VilexPipeline:
    """The whole road at width 8."""
    torch.manual_seed(1)
    preset = PRESETS["tiny"]
    pooler = dataclasses.replace(preset.pooler, text_width=8)
    return VilexPipeline(t2i, ViLex(build_encoder(preset.encoder), pooler), "tiny")
