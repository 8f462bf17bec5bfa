"""Vision towers: pixels of any size become patch tokens."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vilex.config import EncoderConfig
from vilex.towers import Tower, load_open_clip, load_timm, load_transformers


class PatchEncoder(nn.Module):
    """A vision tower behind the preprocessing it was trained with.

    `size` is the height and width that the tower reads, `image_size` the side of a square picture that loses nothing.
    """

    def __init__(self, config: EncoderConfig, tower: Tower):
        super().__init__()
        self.config, self.tower = config, tower.net
        self.size = tuple(tower.size)
        mean, std = torch.tensor(tower.mean).view(3, 1, 1), torch.tensor(tower.std).view(3, 1, 1)
        # ((pixels + 1) / 2 - mean) / std in one product. Both are saved with the weights: open_clip keeps them per
        # pretrained tag, and a fine-tuned tower is built again without one.
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.num_patches, self.patch_width = self._measure()

    @property
    def image_size(self) -> int:
        return max(self.size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch tokens (B,P,D_vit) of pixels (B,3,H,W) in [-1,1], any H and W.

        The whole picture is squeezed into the tower's size: a centre crop would lose what stands at the edge.
        """
        return self.tower(self._preprocess(pixels))

    def _preprocess(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != self.size:
            # The clamp is what 8-bit resizing does; bicubic overshoots at edges.
            pixels = F.interpolate(pixels.float(), self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        return pixels.to(self.scale.dtype) * self.scale + self.shift

    @torch.no_grad()
    def _measure(self) -> tuple[int, int]:
        _, num_patches, patch_width = self(torch.zeros(1, 3, *self.size)).shape
        return num_patches, patch_width


def build_encoder(config: EncoderConfig, pretrained: str | None = None) -> PatchEncoder:
    """The encoder a config describes, with random weights unless `pretrained` asks for its library's.

    `pretrained` is one of open_clip's tags, such as "webli", or the path of a checkpoint; of timm the tower's own name
    or the path of a checkpoint; of transformers a hub id or a folder.
    Raises ValueError when the tower is unknown, has no patch tokens, or has no such weights.
    """
    if config.open_clip:
        return PatchEncoder(config, load_open_clip(config, pretrained))
    if config.timm:
        return PatchEncoder(config, load_timm(config, pretrained))
    if config.transformers:
        return PatchEncoder(config, load_transformers(config, pretrained))
    if pretrained:
        raise ValueError(f"pretrained={pretrained!r} needs a tower of open_clip, timm or transformers")
    size = (config.image_size, config.image_size)
    return PatchEncoder(config, Tower(_build_vit(config), size, config.image_mean, config.image_std))


def _build_vit(config: EncoderConfig) -> VisionTransformer:
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        num_classes=0,
        class_token=False,
        global_pool="",
    )
