"""Vision towers: pixels of any size become patch tokens."""

import open_clip
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vilex.config import EncoderConfig

RGB = tuple[float, float, float]


class PatchEncoder(nn.Module):
    """A vision tower behind the preprocessing it was trained with.

    `tower` maps normalised pixels (B,3,image_size,image_size) to patch tokens (B,num_patches,patch_width),
    row by row from the top left; `mean` and `std` are those of pixels in [0,1].
    """

    def __init__(self, config: EncoderConfig, tower: nn.Module, image_size: int, mean: RGB, std: RGB):
        super().__init__()
        self.config = config
        self.tower = tower
        self.image_size = image_size
        mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        # ((pixels + 1) / 2 - mean) / std in one product. Both are saved with the weights: open_clip keeps them per
        # pretrained tag, and a fine-tuned tower is built again without one.
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.num_patches, self.patch_width = self._measure()

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch tokens (B,P,D_vit) of pixels (B,3,H,W) in [-1,1], any H and W.

        The whole picture is squeezed into the tower's square: a centre crop would lose what stands at the edge.
        """
        return self.tower(self._preprocess(pixels))

    def _preprocess(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            # The clamp is what 8-bit resizing does; bicubic overshoots at edges.
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        return pixels.to(self.scale.dtype) * self.scale + self.shift

    @torch.no_grad()
    def _measure(self) -> tuple[int, int]:
        _, num_patches, patch_width = self(torch.zeros(1, 3, self.image_size, self.image_size)).shape
        return num_patches, patch_width


def build_encoder(config: EncoderConfig, pretrained: str | None = None) -> PatchEncoder:
    """The encoder a config describes, with random weights unless `pretrained` asks for open_clip's.

    `pretrained` is one of open_clip's tags, such as "webli", or the path of an open_clip checkpoint.
    Raises ValueError when the tower is unknown, has no patch tokens, or has no such weights.
    """
    if config.open_clip:
        return _build_open_clip(config, pretrained)
    if pretrained:
        raise ValueError(f"pretrained={pretrained!r} needs a tower of open_clip, and config.open_clip is empty")
    tower = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        num_classes=0,
        class_token=False,
        global_pool="",
    )
    return PatchEncoder(config, tower, config.image_size, config.image_mean, config.image_std)


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
        output = self.visual.forward_intermediates(
            pixels, indices=1, output_fmt="NLC", normalize_intermediates=True, intermediates_only=True
        )
        return output["image_intermediates"][-1]


def _drop_pooling(visual: OpenClipTransformer) -> None:
    visual.prune_intermediate_layers(1, prune_head=True)
    if visual.attn_pool is not None:
        # CoCa normalises patch tokens inside its pooler; its ln_post has the width of the pooled vector.
        visual.ln_post, visual.attn_pool = visual.attn_pool.ln_k, None


def _build_open_clip(config: EncoderConfig, pretrained: str | None) -> PatchEncoder:
    name = config.open_clip
    visual = _load_visual(name, pretrained)
    if not isinstance(visual, (OpenClipTransformer, TimmModel)):
        raise ValueError(f"{name} has no patch tokens: its tower is a {type(visual).__name__}")
    height, width = visual.image_size
    if height != width:
        raise ValueError(f"{name} takes {width} x {height} pixels, and only square towers are supported")
    preprocess = visual.preprocess_cfg | _published_preprocess(name, pretrained)
    try:
        return PatchEncoder(config, _OpenClipTower(visual), height, preprocess["mean"], preprocess["std"])
    except AssertionError as error:  # how timm says that a network has feature maps only
        trunk = type(getattr(visual, "trunk", visual)).__name__
        raise ValueError(f"{name} has no patch tokens: its tower is a {trunk}") from error


def _published_preprocess(name: str, pretrained: str | None) -> dict[str, RGB]:
    # Without a tag open_clip takes CLIP's own mean and std, which are not those of SigLIP.
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = pretrained if pretrained in tags else next(iter(tags), "")
    published = open_clip.get_pretrained_cfg(name, tag)
    return {key: published[key] for key in ("mean", "std") if published.get(key)}


def _load_visual(name: str, pretrained: str | None) -> nn.Module:
    load = pretrained is not None
    try:
        model = open_clip.create_model(
            name, pretrained, load_weights=load, require_pretrained=load, pretrained_text=False
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"open_clip cannot build {name!r} with pretrained={pretrained!r}: {error}") from error
    return model.visual
