"""Tiny random tokenizers, text encoders and diffusers pipelines, by kind."""

import vilex  # noqa: F401, I001  first: it mends a mismatched torchvision

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = """
a an the of in on photo painting sketch red green blue dog cat style monet van gogh beach rows mostly
""".split()  # noqa: SIM905


def build_tokenizer(kind: str, pad_token: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of BERT, CLIP or T5 around a text."""
    names = {
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "clip": ["!", "[UNK]"],
        "t5": ["<pad>", "</s>", "[UNK]"],
    }[kind]
    tail = ["<|start|>", "<|end|>"] if kind == "clip" else []  # CLIP's EOS has the largest id
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS, ",", ".", *tail])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = {"bert": "[CLS] $A [SEP]", "clip": "<|start|> $A <|end|>", "t5": "$A </s>"}[kind]
    used = [(name, vocabulary[name]) for name in around.split() if name != "$A"]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    special = {
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "clip": {"pad_token": "<|end|>", "bos_token": "<|start|>", "eos_token": "<|end|>"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
    }[kind] | ({"pad_token": pad_token} if pad_token else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_max_length=24, **special)


def build_bert(vocabulary: int, width: int = 8) -> BertModel:
    """A random BERT of one layer."""
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    return BertModel(config).eval()


def build_clip(
    tokenizer: PreTrainedTokenizerFast,
    eos_token_id: int | None = None,
    width: int = 8,
    layers: int = 1,
    projection: int | None = None,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A random CLIP text encoder; `eos_token_id` 2 selects pooling at the largest id."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id, pad_token_id=1,
        projection_dim=projection or width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def build_latent_unet(text_width: int = 8, **changes: object) -> UNet2DConditionModel:
    """A random U-Net of Stable Diffusion's kind for 8x8 latents of 4 channels."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width, attention_head_dim=2, norm_num_groups=4, **changes,
    )  # fmt: skip


def build_vae(channels: int = 4, **changes: object) -> AutoencoderKL:
    """A random VAE between 16 px pictures and 8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes,
    )  # fmt: skip


def build_pipeline(kind: str) -> DiffusionPipeline:
    """diffusers' own pipeline of random parts from a fixed seed: "sd", "sdxl", "sd3", "flux" or "flux-schnell"."""
    torch.manual_seed(0)
    builders = {"sd": _build_sd, "sdxl": _build_sdxl, "sd3": _build_sd3, "flux": _build_flux}
    pipeline = _build_flux(distilled=False) if kind == "flux-schnell" else builders[kind]()
    pipeline.set_progress_bar_config(disable=True)
    texts = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    for part in texts:
        for parameter in part.parameters():  # at their usual start, words hardly tell
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return pipeline


def _build_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _build_sd() -> StableDiffusionPipeline:
    tokenizer = build_tokenizer("clip")
    return StableDiffusionPipeline(
        vae=build_vae(), text_encoder=build_clip(tokenizer), tokenizer=tokenizer, unet=build_latent_unet(),
        scheduler=_build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _build_sdxl() -> StableDiffusionXLPipeline:
    first, second = build_tokenizer("clip"), build_tokenizer("clip", pad_token="!")
    unet = build_latent_unet(
        8 + 12, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=build_vae(scaling_factor=0.13025), text_encoder=build_clip(first, layers=2), tokenizer=first,
        text_encoder_2=build_clip(second, 2, width=12, layers=3, projection=10), tokenizer_2=second, unet=unet,
        scheduler=_build_scheduler(), add_watermarker=False,
    )  # fmt: skip


def _build_sd3() -> StableDiffusion3Pipeline:
    first, second, third = build_tokenizer("clip"), build_tokenizer("clip", pad_token="!"), build_tokenizer("t5")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=6 + 10,
        pos_embed_max_size=12, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(6, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=build_clip(first, layers=2, projection=6), tokenizer=first,
        text_encoder_2=build_clip(second, 2, width=12, layers=2, projection=10), tokenizer_2=second,
        text_encoder_3=_build_t5(third), tokenizer_3=third,
    )  # fmt: skip


def _build_flux(distilled: bool = True) -> FluxPipeline:
    """With distilled guidance and a dynamic shift, as dev has them, or with neither, as schnell."""
    first, second = build_tokenizer("clip"), build_tokenizer("t5")
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=distilled, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled)
    return FluxPipeline(
        transformer=transformer, scheduler=scheduler,
        vae=build_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=build_clip(first, layers=2), tokenizer=first,
        text_encoder_2=_build_t5(second), tokenizer_2=second,
    )  # fmt: skip


def _build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=6, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()
