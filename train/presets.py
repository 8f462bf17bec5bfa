"""What each preset trains: the shapes of the networks and the settings of the runs."""

from dataclasses import dataclass, field

from diffusers import UNet2DConditionModel

from vilex.config import DEFAULT_TOKENS, Config, EncoderConfig, PoolerConfig, setting

PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")  # diffusers' names; "sample" is x0


@dataclass(frozen=True)
class UNetConfig(Config):
    """The embedded denoiser: pixel-unshuffled pictures in, v or x0 out.

    MiniLM's states are small (root mean square 0.21), so attention over 75 colour words stays even for long: with
    prompt_scale 3 to 4 the layout error of a trial fell to 0.80 in 160 steps, without to 0.97 (1 = no layout).
    A net that is narrow beside the channels it sees learns x0 sooner: noise fills all of them, pictures few.
    Source: Li and He 2025, Back to Basics: Let Denoising Generative Models Denoise.
    """

    widths: tuple[int, ...]
    attention: tuple[bool, ...]  # cross-attention to the prompt, per resolution
    pixel_unshuffle: int = setting(4, 1, 16)
    image_size: int = setting(64, 8, 1024, "pixels")
    position_frequencies: int = setting(3, 0, 8, "waves per axis that tell the denoiser where it is")
    token_frequencies: int = setting(32, 0, 64, "waves that tell the denoiser where in the prompt a token stands")
    prompt_scale: float = setting(4.0, 0.1, 100, "factor of what cross-attention reads")
    layers_per_block: int = setting(1, 1, 4)
    heads: int = setting(4, 1, 32, "attention heads, at every resolution")
    norm_num_groups: int = setting(8, 1, 64)
    prediction_type: str = "v_prediction"

    def rules(self) -> list[str]:
        broken = [
            f"width {w} is not a multiple of norm_num_groups {self.norm_num_groups}"
            for w in self.widths
            if w % self.norm_num_groups
        ]
        broken += [f"width {w} is not a multiple of heads {self.heads}" for w in self.widths if w % self.heads]
        if len(self.attention) != len(self.widths):
            broken.append(f"attention has {len(self.attention)} entries, widths {len(self.widths)}")
        if self.image_size % (self.pixel_unshuffle << (len(self.widths) - 1)):
            broken.append(f"image_size {self.image_size} cannot be unshuffled and halved {len(self.widths) - 1} times")
        if self.prediction_type not in PREDICTION_TYPES:
            broken.append(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}")
        return broken


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of one training run."""

    batch_size: int = setting(64, 1, 65536, "pictures per optimiser step, over all processes")
    max_steps: int = setting(1000, 1, 10_000_000, "optimiser steps; the learning rate reaches 0 there")
    learning_rate: float = setting(3e-4, 0, 1, "after warm-up; train_vilex: of the pooler")
    encoder_learning_rate: float = setting(3e-4, 0, 1, "train_vilex: of the vision tower")
    warmup_steps: int = setting(100, 0, 1_000_000)
    weight_decay: float = setting(0.01, 0, 1)
    grad_clip: float = setting(1.0, 0.001, 1000, "largest norm of the gradient")
    snr_gamma: float = setting(0.0, 0, 100, "min-SNR weighting; 0 = off")
    timestep_shift: float = setting(1.0, 0.01, 100, "above 1 the noisier timesteps are drawn more often")
    align_weight: float = setting(0.0, 0, 100, "train_t2i: of the alignment with a teacher's features; 0 = off")
    perceptual_weight: float = setting(0.0, 0, 100, "of how unlike x0 looks to a teacher; 0 = off")
    say_weight: float = setting(
        0.0, 0, 100, "train_vilex: of how unlike the short caption few tokens are read; 0 = off"
    )
    ema_power: float = setting(0.75, 0.1, 1, "the EMA's decay is 1 - (1 + step) ** -ema_power")
    caption_variants: int = setting(4, 1, 64, "train_t2i: captions written per picture")
    noise_draws: int = setting(1, 1, 64, "noises per picture and step; its prompt is encoded once")
    empty_fraction: float = setting(0.1, 0, 1, "train_t2i: captions left empty, for guidance")
    joint_fraction: float = setting(0.5, 0, 1, "train_vilex: batches with words beside the image")
    tail_drop: bool = True  # train_vilex: a random number of tokens per step, else always all
    seed: int = setting(0, 0, 2**32 - 1)
    sample_every: int = setting(500, 1, 1_000_000, "steps between sample grids")
    save_every: int = setting(500, 1, 1_000_000, "steps between checkpoints")
    log_every: int = setting(20, 1, 100_000, "steps between lines of metrics.jsonl")


@dataclass(frozen=True)
class Preset:
    """All of one model family; without `unet` and `t2i` the text-to-image model is a finished one."""

    encoder: EncoderConfig
    pooler: PoolerConfig
    vilex: TrainConfig
    unet: UNetConfig | None = None
    t2i: TrainConfig | None = None
    encoder_init: str = "random"  # what train_vilex starts the tower from if not told
    context_length: int = 128
    source_weights: dict[str, float] = field(default_factory=dict)


# Drawings are few but teach shapes fastest; art is what the app is for.
SOURCE_WEIGHTS = {
    "wikiart": 0.30,
    "tiny-imagenet": 0.18,
    "miniplaces": 0.13,
    "emoji": 0.16,
    "pacs": 0.06,
    "caltech101": 0.05,
    "flickr8k": 0.04,
    "flowers102": 0.04,
    "openclipart": 0.04,
}

# The paper's, for a tower that is trained already. Source: ViLex (CVPR 2025).
PAPER_SCHEDULE = TrainConfig(
    batch_size=2048,
    max_steps=300_000,
    learning_rate=3e-4,
    encoder_learning_rate=1e-5,
    warmup_steps=10_000,
    sample_every=5000,
    save_every=1000,
    log_every=50,
)
SIGLIP = EncoderConfig(open_clip="ViT-SO400M-14-SigLIP-384")  # 428M parameters, 27x27 patch tokens of width 1152

PRESETS = {
    "tiny": Preset(
        unet=UNetConfig(
            widths=(8, 8), attention=(False, True), pixel_unshuffle=4, image_size=32, heads=2, norm_num_groups=4
        ),
        encoder=EncoderConfig(image_size=32, patch_size=8, width=8, layers=1, heads=2),
        pooler=PoolerConfig(num_queries=DEFAULT_TOKENS, num_blocks=1, width=8, heads=2, patch_width=8),
        t2i=TrainConfig(
            batch_size=4, max_steps=4, warmup_steps=1, caption_variants=2, sample_every=2, save_every=2, log_every=1
        ),
        vilex=TrainConfig(
            batch_size=4,
            max_steps=4,
            warmup_steps=1,
            learning_rate=1e-3,
            sample_every=2,
            save_every=2,
            log_every=1,
        ),
    ),
    "nano": Preset(
        unet=UNetConfig(widths=(64, 128, 192), attention=(False, True, False), prediction_type="sample"),
        encoder=EncoderConfig(width=192, layers=5, heads=6, patch_size=8),
        pooler=PoolerConfig(num_blocks=5, width=192, heads=6, patch_width=192),
        t2i=TrainConfig(
            batch_size=16,
            noise_draws=3,
            timestep_shift=3.0,
            max_steps=4000,
            learning_rate=5e-4,
            warmup_steps=100,
            caption_variants=2,
            save_every=250,
        ),
        vilex=TrainConfig(
            batch_size=16,
            noise_draws=2,
            timestep_shift=5.0,
            max_steps=900,
            learning_rate=4e-4,
            encoder_learning_rate=1.5e-4,
            warmup_steps=30,
            sample_every=1000,
        ),
        source_weights=SOURCE_WEIGHTS,
    ),
    "mini": Preset(
        unet=UNetConfig(widths=(96, 160, 224), attention=(False, True, True), pixel_unshuffle=2, layers_per_block=2),
        encoder=EncoderConfig(width=256, layers=6, heads=8, patch_size=8),
        pooler=PoolerConfig(num_blocks=5, width=256, heads=8, patch_width=256),
        t2i=TrainConfig(
            batch_size=256,
            noise_draws=2,
            timestep_shift=2.0,
            align_weight=0.25,
            max_steps=20_000,
            learning_rate=8e-4,
            warmup_steps=300,
            sample_every=2000,
            save_every=2000,
            log_every=50,
        ),
        vilex=TrainConfig(
            batch_size=512,
            timestep_shift=3.0,
            max_steps=6000,
            learning_rate=2e-4,
            encoder_learning_rate=1e-4,
            warmup_steps=200,
            sample_every=2000,
            save_every=1000,
            log_every=50,
        ),
        source_weights=SOURCE_WEIGHTS,
    ),
    # 256x256 pixels, folded into as many cells, 32x32, as mini has
    "midi": Preset(
        unet=UNetConfig(
            widths=(160, 256, 384),
            attention=(False, True, True),
            pixel_unshuffle=8,
            image_size=256,
            layers_per_block=2,
            prediction_type="sample",
        ),
        encoder=EncoderConfig(image_size=256, patch_size=16, width=384, layers=8, heads=6),
        pooler=PoolerConfig(num_blocks=5, width=384, heads=6, patch_width=384),
        t2i=TrainConfig(
            batch_size=512,
            max_steps=100_000,
            learning_rate=4e-4,
            warmup_steps=1000,
            caption_variants=6,
            sample_every=5000,
            save_every=1000,
            log_every=50,
        ),
        vilex=TrainConfig(
            batch_size=512,
            max_steps=50_000,
            learning_rate=1e-3,
            encoder_learning_rate=3e-4,
            warmup_steps=1000,
            sample_every=5000,
            save_every=1000,
            log_every=50,
        ),
        source_weights=SOURCE_WEIGHTS,
    ),
    # For GPU nodes; the hub gives the tower and, with --t2i OWNER/NAME, the text-to-image model.
    "sd15": Preset(
        encoder=SIGLIP,
        pooler=PoolerConfig(width=768, heads=12, patch_width=1152),
        vilex=PAPER_SCHEDULE,
        encoder_init="open_clip:webli",
    ),
    "sd21": Preset(
        encoder=SIGLIP,
        pooler=PoolerConfig(width=1024, heads=16, patch_width=1152),
        vilex=PAPER_SCHEDULE,
        encoder_init="open_clip:webli",
    ),
    # Tokens of width 768 + 1280, for both text encoders.
    "sdxl": Preset(
        encoder=SIGLIP,
        pooler=PoolerConfig(width=1280, heads=20, patch_width=1152),
        vilex=PAPER_SCHEDULE,
        encoder_init="open_clip:webli",
    ),
    # T5 reads 255 tokens, CLIP the first 75 of them
    "sd3": Preset(
        encoder=SIGLIP,
        pooler=PoolerConfig(num_queries=150, width=1536, heads=24, patch_width=1152),
        vilex=PAPER_SCHEDULE,
        encoder_init="open_clip:webli",
    ),
}


def build_unet(config: UNetConfig, text_width: int) -> UNet2DConditionModel:
    """A randomly initialised denoiser whose pooled text vector is added to the time embedding."""
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    channels = 3 * config.pixel_unshuffle**2
    return UNet2DConditionModel(
        sample_size=config.image_size // config.pixel_unshuffle,
        in_channels=channels + 4 * config.position_frequencies,
        out_channels=channels,
        block_out_channels=config.widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=text_width + 2 * config.token_frequencies,
        attention_head_dim=config.heads,  # diffusers means the number of heads
        norm_num_groups=config.norm_num_groups,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=text_width,
    )
