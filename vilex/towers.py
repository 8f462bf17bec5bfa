"""Vision towers of open_clip, timm and transformers: each library's own patch tokens, size and normalisation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipTransformer
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from vilex.checkpoint import load_pretrained
from vilex.config import EncoderConfig

RGB = tuple[float, float, float]
_LAST_BLOCK = {"indices": 1, "output_fmt": "NLC", "intermediates_only": True}
_HEADS = ("text_model.", "text_projection.", "visual_projection.", "logit_")  # of whole models, beside the tower


@dataclass(frozen=True)
class Tower:
    """net: normalised pixels (B,3,*size) to patch tokens (B,P,D_vit), row by row; mean, std: of pixels in [0,1]."""

    net: nn.Module
    size: tuple[int, int]
    mean: RGB
    std: RGB


def read_tower(text: str) -> tuple[EncoderConfig, str]:
    """The tower that a text names, and its weights as `build_encoder` takes them.

    The text is open_clip:NAME:TAG, timm:NAME, timm:NAME:FILE or hf:ID, where ID is a hub id or a folder.
    Raises ValueError when it is none of these, or hf names no tower of a known kind.
    """
    source, _, name = text.partition(":")
    if source == "hf":
        return _read_transformers(name), name
    name, _, weights = name.partition(":")
    if source == "timm" and name:
        return EncoderConfig(timm=name), weights or name
    if source == "open_clip" and name and weights:
        return EncoderConfig(open_clip=name), weights
    raise ValueError(f"a tower is open_clip:NAME:TAG, timm:NAME, timm:NAME:FILE or hf:ID, got {text!r}")


def _lacks_patches(name: str, net: nn.Module) -> ValueError:
    return ValueError(f"{name} has no patch tokens: its tower is a {type(net).__name__}")


# open_clip


class _OpenClipTower(nn.Module):
    """Last-layer patch tokens of a vision tower of open_clip; what only its pooled output needs is dropped."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        if isinstance(visual, TimmModel):
            visual.trunk.prune_intermediate_layers(1, prune_head=True)
            visual.head = nn.Identity()
        else:
            _drop_pooling(visual)

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.visual.forward_intermediates(pixels, normalize_intermediates=True, **_LAST_BLOCK)
        return output["image_intermediates"][-1]


def _drop_pooling(visual: OpenClipTransformer) -> None:
    visual.prune_intermediate_layers(1, prune_head=True)
    if visual.attn_pool is not None:
        # CoCa normalises patch tokens inside its pooler; its ln_post has the width of the pooled vector.
        visual.ln_post, visual.attn_pool = visual.attn_pool.ln_k, None


def load_open_clip(config: EncoderConfig, pretrained: str | None) -> Tower:
    """A tower of open_clip, random or with the weights of a tag or of a checkpoint's path."""
    name = config.open_clip
    visual = _load_visual(config, pretrained)
    if isinstance(visual, TimmModel):
        _require_tokens(name, visual.trunk)
    elif not isinstance(visual, OpenClipTransformer):
        raise _lacks_patches(name, visual)
    preprocess = visual.preprocess_cfg | _published_preprocess(name, pretrained)
    return Tower(_OpenClipTower(visual), visual.image_size, preprocess["mean"], preprocess["std"])


def _published_preprocess(name: str, pretrained: str | None) -> dict[str, RGB]:
    # Without a tag open_clip takes CLIP's own mean and std, which are not those of SigLIP.
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = pretrained if pretrained in tags else next(iter(tags), "")
    published = open_clip.get_pretrained_cfg(name, tag)
    return {key: published[key] for key in ("mean", "std") if published.get(key)}


def _load_visual(config: EncoderConfig, pretrained: str | None) -> nn.Module:
    name, load = config.open_clip, pretrained is not None
    try:
        model = open_clip.create_model(
            name,
            pretrained,
            force_image_size=config.tower_size or None,
            load_weights=load,
            require_pretrained=load,
            pretrained_text=False,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"open_clip cannot build {name!r} with pretrained={pretrained!r}: {error}") from error
    return model.visual


# timm


class _TimmTower(nn.Module):
    """Last-layer patch tokens of a transformer of timm, normalised by its own last norm if it has one."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        trunk.prune_intermediate_layers(1, prune_head=True)
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk.forward_intermediates(pixels, norm=True, **_LAST_BLOCK)[-1]


def load_timm(config: EncoderConfig, pretrained: str | None) -> Tower:
    """A tower of timm, random or with the weights of its own name or of a file."""
    name = config.timm
    trunk = _load_trunk(config, pretrained)
    _require_tokens(name, trunk)
    settings = resolve_model_data_config(trunk)
    size = config.tower_size or settings["input_size"][1:]
    return Tower(_TimmTower(trunk), size, settings["mean"], settings["std"])


def _load_trunk(config: EncoderConfig, pretrained: str | None) -> nn.Module:
    name = config.timm
    if not timm.is_model(name):  # others, such as hf-hub:..., are no names of architectures
        raise ValueError(f"timm knows no tower {name!r}")
    options = {"img_size": config.tower_size} if config.tower_size else {}
    if pretrained not in (None, name):
        if not Path(pretrained).is_file():
            raise ValueError(f"no weights of {name} at {pretrained!r}: give a file, or none for timm's own")
        options["pretrained_cfg_overlay"] = {"file": pretrained}
    try:
        return timm.create_model(name, pretrained=pretrained is not None, num_classes=0, **options)
    except (
        RuntimeError,
        OSError,
        TypeError,
        AssertionError,
    ) as error:  # a size that a network cannot take is any of these
        raise ValueError(f"timm cannot build {name!r}: {str(error).splitlines()[0]}") from error


def _require_tokens(name: str, trunk: nn.Module) -> None:
    """Raises ValueError for networks of feature maps, which have no prefix tokens to tell apart."""
    if not hasattr(trunk, "num_prefix_tokens"):
        raise _lacks_patches(name, trunk)


# transformers


def _read_clip(model: CLIPVisionModel, pixels: Tensor) -> Tensor:
    states = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    return model.post_layernorm(states[:, 1:])  # the model itself normalises the class token alone


def _read_siglip(model: SiglipVisionModel, pixels: Tensor) -> Tensor:
    return model(pixels, interpolate_pos_encoding=True).last_hidden_state


def _read_siglip2(model: Siglip2VisionModel, pixels: Tensor) -> Tensor:
    side = model.config.patch_size
    cells = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B,3,h,side,w,side)
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B,P,side*side*3)
    shapes = torch.tensor([[cells.shape[2], cells.shape[4]]]).expand(len(pixels), -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state


def _read_dinov2(model: Dinov2Model | Dinov2WithRegistersModel, pixels: Tensor) -> Tensor:
    return model(pixels).last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0) :]


# The only classes that a file's model_type may ask for
_KINDS: dict[str, tuple[type[PreTrainedModel], Callable[[Any, Tensor], Tensor]]] = {
    "clip_vision_model": (CLIPVisionModel, _read_clip),
    "siglip_vision_model": (SiglipVisionModel, _read_siglip),
    "siglip2_vision_model": (Siglip2VisionModel, _read_siglip2),
    "dinov2": (Dinov2Model, _read_dinov2),
    "dinov2_with_registers": (Dinov2WithRegistersModel, _read_dinov2),
}


class _TransformersTower(nn.Module):
    """Last-layer patch tokens of a vision model of transformers; what only its pooled output needs is dropped."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.read = model, _KINDS[model.config.model_type][1]
        if getattr(model, "use_head", False):
            model.use_head, model.head = False, None
        model.embeddings.mask_token = None  # DINOv2's, for hidden patches

    def forward(self, pixels: Tensor) -> Tensor:
        return self.read(self.model, pixels)


def load_transformers(config: EncoderConfig, pretrained: str | None) -> Tower:
    """A tower of transformers, random or with the weights of a hub id or folder."""
    settings = dict(config.transformers)
    kind, _ = _kind(settings.pop("model_type", None))
    if unknown := sorted(set(settings) - _setting_names(kind)):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(map(repr, unknown))}")
    try:
        built = kind.config_class(**settings)
        model = load_pretrained(kind, pretrained, ignore=_HEADS, config=built) if pretrained else kind(built)
        model = model.float()  # transformers keeps fp16
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"transformers cannot build a {kind.__name__}: {str(error).splitlines()[0]}") from error
    return Tower(_TransformersTower(model), config.tower_size, config.image_mean, config.image_std)


def _read_transformers(source: str) -> EncoderConfig:
    """The tower in a hub id or folder in the layout of transformers, which may hold a text encoder beside it."""
    try:
        whole = PreTrainedConfig.get_config_dict(source)[0]
        preprocess = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError as error:
        raise ValueError(f"{source!r} holds no tower of transformers: {str(error).splitlines()[0]}") from error
    if missing := [key for key in ("image_mean", "image_std") if not preprocess.get(key)]:
        raise ValueError(f"the preprocessing of {source!r} has no {' and no '.join(missing)}")
    vision, name = whole.get("vision_config", whole), whole.get("model_type")
    model_type = f"{name}_vision_model" if "vision_config" in whole else name
    kind, _ = _kind(model_type)
    settings = {key: vision[key] for key in sorted(_setting_names(kind) & vision.keys())}
    return EncoderConfig(
        transformers={"model_type": model_type} | settings,
        tower_size=_size(preprocess) or _grid_size(kind.config_class(**settings)),
        image_mean=tuple(preprocess["image_mean"]),
        image_std=tuple(preprocess["image_std"]),
    )


def _kind(model_type: Any) -> tuple[type[PreTrainedModel], Callable[[Any, Tensor], Tensor]]:
    if not isinstance(model_type, str) or model_type not in _KINDS:
        raise ValueError(f"a tower of transformers is one of {', '.join(_KINDS)}, got {model_type!r}")
    return _KINDS[model_type]


def _setting_names(kind: type[PreTrainedModel]) -> set[str]:
    """Names of a model's own settings, without those that choose code, such as attn_implementation."""
    return {name for name in kind.config_class.__annotations__ if name[0] != "_"} - {"model_type"}


def _size(preprocess: dict[str, Any]) -> tuple[int, ...]:
    """Height and width that a picture has after its preprocessing; empty where that depends on the picture."""
    size = preprocess.get("crop_size" if preprocess.get("do_center_crop") else "size")
    if not isinstance(size, dict):
        return (size, size) if size else ()
    side = size.get("shortest_edge")
    return size.get("height", side), size.get("width", side)


def _grid_size(config: Siglip2VisionModel.config_class) -> tuple[int, int]:
    """The square whose patches SigLIP 2 has positions for."""
    side = int(config.num_patches**0.5) * config.patch_size
    return side, side
