"""The trained half of ViLex: a picture's pixels become ViLex tokens. Encoder and pooler, one weight file."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from vilex.checkpoint import load_module, save_module
from vilex.config import EncoderConfig, PoolerConfig
from vilex.encoder import PatchEncoder, build_encoder
from vilex.pooler import VilexPooler

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "vilex"


class ViLex(nn.Module):
    """pixels (B,3,H,W) in [-1,1] -> vilex_tokens (B,N,D)."""

    def __init__(self, encoder: PatchEncoder, pooler_config: PoolerConfig) -> None:
        super().__init__()
        self.encoder = encoder
        if self.encoder.patch_width != pooler_config.patch_width:
            raise ValueError(
                f"the pooler expects patch tokens of width {pooler_config.patch_width}, "
                f"the encoder gives {self.encoder.patch_width}"
            )
        self.pooler = VilexPooler(pooler_config)

    def forward(self, pixels: Tensor, num_tokens: int | None = None) -> Tensor:
        """The first num_tokens tokens of each picture, all of them by default."""
        patch_tokens = self.encoder(pixels)  # (B,P,D_vit)
        return self.pooler(patch_tokens, num_tokens)  # (B,N,D)

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes config.json and vilex.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_module(self, folder, WEIGHTS_NAME, dtype)
        config = {"encoder": self.encoder.config.to_dict(), "pooler": self.pooler.config.to_dict()}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_vilex(folder: Path) -> ViLex:
    """Encoder and pooler from a folder, frozen. Raises ValueError when they do not fit their config."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no ViLex weights: {CONFIG_NAME} is missing")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not {"encoder", "pooler"} <= config.keys():
        raise ValueError(f"{path} is not a ViLex config: it needs the settings 'encoder' and 'pooler'")
    encoder = build_encoder(EncoderConfig.from_dict(config["encoder"]))
    model = ViLex(encoder, PoolerConfig.from_dict(config["pooler"]))
    load_module(model, folder, WEIGHTS_NAME)
    return model.eval().requires_grad_(False)
