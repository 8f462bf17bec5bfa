"""Tiny random models of each kind in diffusers' layout, and what is done with them in a line."""

from dataclasses import dataclass
from pathlib import Path

import torch
from builders import build_pipeline
from diffusers import DiffusionPipeline
from torch import Tensor

from vilex.config import GenerationConfig
from vilex.diffusion import Conditioning, TextToImage, load_t2i
from vilex.prompt import compose
from vilex.sampling import Conditions, sample

TEXT = "a red dog on the beach , monet style"
LONG = "dog cat " * 30
KINDS = ("sd", "sdxl", "sd3", "flux")
FLOWS = ("sd3", "flux")
PARTS = {
    "sd": ["unet", "vae", "text_encoder"],
    "sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["transformer", "vae", "text_encoder", "text_encoder_2"],
    "flux-schnell": ["transformer", "vae", "text_encoder", "text_encoder_2"],
}


@dataclass
class Case:
    """diffusers' pipeline, the folder it wrote, and what we read there."""

    kind: str
    stock: DiffusionPipeline
    folder: Path
    t2i: TextToImage


def build_case(kind: str, folder: Path) -> Case:
    stock = build_pipeline(kind)
    stock.save_pretrained(folder)
    t2i = load_t2i(folder)
    # The very same tensors: memory that is aligned in another way gives other last bits
    stock.register_modules(**{name: part for name, part in t2i.parts().items() if name in PARTS[kind]})
    return Case(kind, stock, folder, t2i)


def encode(t2i: TextToImage, text: str, *vectors: Tensor) -> Conditioning:
    return t2i.encode_prompt(compose(text, vectors, t2i.tokenizer, t2i.config.context_length))


def stock_encode(case: Case, text: str, **options: object) -> list[Tensor | None]:
    """prompt_embeds, the negative's, pooled and the negative's of diffusers' own pipeline."""
    if case.kind == "sd":
        return [*case.stock.encode_prompt(text, "cpu", 1, **options), None, None]
    if case.kind.startswith("flux"):
        negative, pooled = case.stock.encode_prompt("", max_sequence_length=case.t2i.t5_length)[:2]
        embeds = case.stock.encode_prompt(text, max_sequence_length=case.t2i.t5_length)[:2]
        return [embeds[0], negative, embeds[1], pooled]
    others = {"prompt_2": None, "prompt_3": None} if case.kind == "sd3" else {}
    return list(case.stock.encode_prompt(text, **others, **options))


def draw(t2i: TextToImage, joint: Conditioning, **changes: object) -> Tensor:
    config = GenerationConfig(num_inference_steps=3, guidance_scale=3, scheduler="euler", **changes)
    with torch.no_grad():
        return sample(t2i, Conditions(encode(t2i, ""), joint=joint), config)
