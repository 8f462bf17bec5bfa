"""Frozen text-to-image models by folder or hub id, and the embedded pixel-space model.

What differs between them (pixels or VAE latents, one text encoder or three, noise or flow) is decided here, once,
when the model is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vilex.checkpoint import load_pretrained
from vilex.config import T2IConfig
from vilex.coring import core
from vilex.flow import StableDiffusion3
from vilex.flux import Flux
from vilex.latent import LatentModel, StableDiffusion, StableDiffusionXL
from vilex.minilm import load_text_encoder
from vilex.prompt import ComposedPrompt
from vilex.t2i import INDEX_NAME, Conditioning, TextToImage, read_words

CONFIG_NAME = "vilex_t2i.json"  # marks an embedded model; diffusers ignores it
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}
_DOWNLOADED = [  # of each part; not its fp16 twin, its training weights or another framework's
    "*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
]  # fmt: skip


class EmbeddedModel(TextToImage):
    """Our own small pixel-space model: MiniLM, a U-Net, and pictures folded into channels."""

    pipeline_class = "VilexTextToImage"
    # fresh noise at each step mends what a small model gets wrong; nothing clips Euler's method in pixel space
    schedulers = ("sde-dpm++", "ddpm", "dpm++", "ddim")

    def __init__(
        self,
        config: T2IConfig,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        denoiser: UNet2DConditionModel,
        scheduler: DDPMScheduler,
    ) -> None:
        super().__init__(config, [tokenizer], [text_encoder], denoiser, scheduler)
        self._check_widths()
        self.register_buffer("positions", position_maps(config.position_frequencies, self.latent_shape[1]), False)
        self.register_buffer("places", place_waves(config.token_frequencies, config.context_length), False)

    @classmethod
    def part_names(cls) -> list[str]:
        """The folders of a saved model."""
        return [cls.denoiser_name, "scheduler"]

    def _check_widths(self) -> None:
        unet = self.denoiser.config
        channels = unet.out_channels + 4 * self.config.position_frequencies
        width = self.text_width + 2 * self.config.token_frequencies
        if (unet.in_channels, unet.cross_attention_dim) != (channels, width):
            raise ValueError(
                f"the denoiser takes {unet.in_channels} channels and prompts of width {unet.cross_attention_dim}, "
                f"its settings make {channels} and {width}"
            )

    @property
    def image_size(self) -> int:
        return self.denoiser.config.sample_size * self.config.pixel_unshuffle

    def encode_prompt(self, prompt: ComposedPrompt) -> Conditioning:
        """All states with the mask of words, and their mean; gradients reach `prompt.vectors`."""
        (vectors,) = self.split_vectors(prompt)
        mask = prompt.attention_mask.to(vectors.device)
        # in the shape attention takes: of (B,L) transformers asks whether all is True, for which an accelerator waits
        wide = mask[:, None, None]  # (B,1,1,L)
        output = read_words(self.text_encoder, prompt.input_ids, prompt.slots, vectors, attention_mask=wide)
        states = output.last_hidden_state  # (B,L,D)
        return Conditioning(states, masked_mean(states, mask), mask)

    def denoise(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The raw prediction (B,C,h,w); timesteps int64 (B,)."""
        network = self.denoiser if denoiser is None else denoiser
        positions = self.positions.to(noisy_latents).expand(len(noisy_latents), -1, -1, -1)
        return network(
            torch.cat([noisy_latents, positions], 1),
            timesteps,
            encoder_hidden_states=self.placed(condition.prompt_embeds),
            class_labels=condition.pooled,
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]

    def placed(self, states: Tensor) -> Tensor:
        """What the denoiser's cross-attention takes of states (B,L,D): with their places beside them, scaled."""
        B, L, _ = states.shape
        places = self.places[:, :L].to(states).expand(B, -1, -1)
        return torch.cat([states, places], 2) * self.config.prompt_scale

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [-1,1] -> the same numbers as (B,C,h,w)."""
        return F.pixel_unshuffle(pixels, self.config.pixel_unshuffle)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) -> pixels (B,3,H,W), clamped to [-1,1]; the inverse of `encode`."""
        return F.pixel_shuffle(latents, self.config.pixel_unshuffle).clamp(-1, 1)

    def clip(self, latents: Tensor) -> Tensor:
        """An estimate of x0 (B,C,h,w) as a picture can be: in [-1,1] and cored."""
        if not self.config.coring:
            return latents.clamp(-1, 1)
        return self.encode(core(self.decode(latents), self.config.coring / 127.5))

    def save_pretrained(self, folder: Path, max_shard_size: str = "45MB", dtype: torch.dtype = torch.float16) -> None:
        """Writes U-Net, scheduler and settings; the text encoder is named, not copied."""
        super().save_pretrained(folder, max_shard_size, dtype)
        (folder / CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")


_KINDS = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, EmbeddedModel)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions that the mask (B,L) keeps: (B,L,D) -> (B,D)."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def position_maps(frequencies: int, size: int) -> Tensor:
    """Cosines and sines of pi 2**k u for the cell centres' x and y, u in [0,1]: (1,4*frequencies,size,size).

    A convolution over pure noise does not know where it is, so without them words for places are learnt slowly.
    Source: Liu et al. 2018 (CoordConv).
    """
    centres = (torch.arange(size) + 0.5) / size
    angles = torch.pi * 2.0 ** torch.arange(frequencies)[:, None] * centres  # (frequencies,size)
    waves = torch.cat([angles.cos(), angles.sin()])[:, None]  # (2*frequencies,1,size)
    across = waves.expand(-1, size, -1)  # (2*frequencies,size,size)
    return torch.cat([across, across.mT])[None]


def place_waves(frequencies: int, length: int) -> Tensor:
    """Cosines and sines of each place in a prompt, from one period in two tokens to half a period in `length`:
    (1,length,2*frequencies).

    MiniLM's states blur where a token stood: of the 64 words of a layout a linear map finds the row of 64 %. What says
    which cell a colour belongs to is given beside them. Source: Vaswani et al. 2017, section 3.5.
    """
    rates = torch.pi * length ** -torch.linspace(0, 1, frequencies)  # (frequencies,)
    angles = torch.arange(length)[:, None] * rates  # (length,frequencies)
    return torch.cat([angles.cos(), angles.sin()], 1)[None]


def build_noise_scheduler(**changes: object) -> DDPMScheduler:
    """The noise schedule of the embedded models."""
    return DDPMScheduler(**SCHEDULER | changes)


def load_t2i(model: str | Path, text_encoder: str | None = None, dtype: torch.dtype = torch.float32) -> TextToImage:
    """A frozen model from a folder in diffusers layout, or from the hub id of one.

    text_encoder: a folder to take the embedded model's text encoder from instead of the usual places. dtype: what a
    latent model's parts are read as, those where that is safe.
    Raises ValueError when there is no such model or a weight is missing, left over or misshapen.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(Path(model).as_posix())
    index = _read_index(folder)
    kind = _kind(index, folder)
    if missing := [name for name in kind.part_names() if not (folder / name).is_dir()]:
        raise ValueError(f"the text-to-image model in {folder} is not complete: {', '.join(missing)} is missing")
    try:
        return _load_embedded(folder, text_encoder) if kind is EmbeddedModel else kind.load(folder, index, dtype)
    except OSError as error:
        raise ValueError(f"the text-to-image model in {folder} is not complete: {error}") from error


def _download(hub_id: str) -> Path:
    """The folder that the hub's model is kept in, with the parts that its kind has."""
    if hub_id.count("/") != 1 or hub_id[0] in "./~":
        raise ValueError(f"{hub_id} holds no text-to-image model: it is neither a folder nor a hub id owner/name")
    try:
        kind = _kind(_read_index(Path(snapshot_download(hub_id, allow_patterns=[INDEX_NAME]))), hub_id)
        patterns = [f"{part}/{pattern}" for part in kind.part_names() for pattern in _DOWNLOADED]
        return Path(snapshot_download(hub_id, allow_patterns=[INDEX_NAME, CONFIG_NAME, *patterns]))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{hub_id} holds no text-to-image model: there is no such folder, and the hub has none or is out of reach"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no text-to-image model: {INDEX_NAME} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def _kind(index: dict[str, Any], source: str | Path) -> type[EmbeddedModel | LatentModel]:
    kinds = {kind.pipeline_class: kind for kind in _KINDS}
    name = index.get("_class_name")
    if name not in kinds:
        raise ValueError(f"{source} is for {name}; supported are {', '.join(kinds)}")
    return kinds[name]


def _load_embedded(folder: Path, text_encoder: str | None) -> EmbeddedModel:
    config = T2IConfig.load_json(folder / CONFIG_NAME)
    denoiser = load_pretrained(UNet2DConditionModel, folder / "unet")
    tokenizer, encoder = load_text_encoder(text_encoder or config.text_encoder)
    return EmbeddedModel(config, tokenizer, encoder, denoiser, DDPMScheduler.from_pretrained(folder / "scheduler"))
