"""Stable Diffusion's networks by their published settings, without weights: what a cost can be counted on.

Sources: the config.json files of stable-diffusion-v1-5, stable-diffusion-2-1 (768 px) and
stable-diffusion-xl-base-1.0. Their tokenizers are stood in for by one of three words.
"""

from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from vilex.latent import LatentModel, StableDiffusion, StableDiffusionXL

_VOCABULARY, _POSITIONS = 49408, 77
_TEXT_CLASSES = (CLIPTextModel, CLIPTextModelWithProjection)


@dataclass(frozen=True)
class Published:
    """Settings of one model: side of its latents, U-Net and text encoders."""

    latent_size: int
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any] = field(default_factory=dict)


_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

PUBLISHED = {
    "sd15": Published(64, {"cross_attention_dim": 768, "attention_head_dim": 8}, (_CLIP_L,)),
    "sd21": Published(
        96,
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        (_CLIP_H,),
        {"prediction_type": "v_prediction"},
    ),
    "sdxl": Published(
        128,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (_CLIP_L, _CLIP_G),
    ),
}  # the U-Nets' other settings are diffusers' defaults


def build_published(published: Published) -> LatentModel:
    """A model of these settings with random weights, or without any on the device "meta"."""
    unet = UNet2DConditionModel(sample_size=published.latent_size, **published.unet)
    texts = [_build_text(*pair) for pair in zip(_TEXT_CLASSES, published.texts, strict=False)]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **published.scheduler)
    model = StableDiffusion if len(texts) == 1 else StableDiffusionXL
    return model([_build_tokenizer() for _ in texts], texts, unet, scheduler, _build_vae(published.latent_size * 8))


def _build_text(kind: type[CLIPTextModel], shape: dict[str, int]) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=_VOCABULARY, max_position_embeddings=_POSITIONS, projection_dim=shape["hidden_size"], **shape
    )
    return kind(config)


def _build_vae(sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=sample_size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"!": 0, "a": 1, "<|startoftext|>": _VOCABULARY - 2, "<|endoftext|>": _VOCABULARY - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="!"))
    start, end = list(words)[2:]
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(name, words[name]) for name in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="!", pad_token=end, bos_token=start, eos_token=end, model_max_length=_POSITIONS
    )
