"""PaliGemma with our encoder for its eyes: patch tokens, and ViLex tokens beside them.

The tower stands where SigLIP stood and stays frozen. It gives the P patch tokens of the picture, and with num_tokens
the ViLex tokens of five grids after them: the paper's 256 + 5 * 16 = 336. The paper names the five grids and not what
they are; here they are the whole picture and its four quarters.
Source: ViLex (CVPR 2025), section 4.3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vilex.checkpoint import load_module, load_pretrained, save_module
from vilex.model import ViLex, load_vilex

GRIDS = 5
_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_ADAPTER, _VILEX = "adapter", "vilex"  # file and folder of a saved model
_IGNORED = -100  # label of a position that the loss leaves out


class VilexTower(nn.Module):
    """A frozen ViLex for PaliGemma's vision tower; `lift`, trained, brings its words to the width of patch tokens."""

    def __init__(self, vilex: ViLex, num_tokens: int) -> None:
        super().__init__()
        most, width = vilex.pooler.config.num_queries, vilex.encoder.patch_width
        if not 0 <= num_tokens <= most:
            raise ValueError(f"tokens per grid must be between 0 and the pooler's {most}, got {num_tokens}")
        self.vilex, self.num_tokens = vilex.requires_grad_(False), num_tokens
        self.lift = nn.Linear(vilex.pooler.config.text_width, width) if num_tokens else None

    def train(self, mode: bool = True) -> Self:
        """Training mode for `lift`; what is frozen stays as it was measured."""
        super().train(mode)
        self.vilex.eval()
        return self

    @property
    def num_positions(self) -> int:
        """Places that a picture takes in the language model's sequence."""
        return self.vilex.encoder.num_patches + GRIDS * self.num_tokens

    @property
    def image_size(self) -> int:
        """Side of the pictures to give it, so that quarters lose nothing."""
        return self.vilex.encoder.image_size * (2 if self.num_tokens else 1)

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        """All tokens (B,num_positions,D_vit) of pixels (B,3,H,W) in [-1,1]."""
        patch_tokens = self.vilex.encoder(pixel_values)  # (B,P,D_vit)
        if self.lift is not None:
            quarters = self.vilex.encoder(quarter(pixel_values).flatten(0, 1))  # (4B,P,D_vit)
            whole = self.vilex.pooler(patch_tokens, self.num_tokens)  # (B,N,D)
            parts = self.vilex.pooler(quarters, self.num_tokens).unflatten(0, (-1, GRIDS - 1)).flatten(1, 2)
            patch_tokens = torch.cat([patch_tokens, self.lift(torch.cat([whole, parts], 1))], 1)
        return BaseModelOutputWithPooling(last_hidden_state=patch_tokens)


def quarter(pixels: Tensor) -> Tensor:
    """The four quarters (B,4,3,H/2,W/2) of pixels (B,3,H,W), H and W even, row by row from the top left."""
    rows = pixels.unflatten(2, (2, -1)).unflatten(4, (2, -1))  # (B,3,2,H/2,2,W/2)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def swap_tower(model: PaliGemmaForConditionalGeneration, vilex: ViLex, num_tokens: int) -> None:
    """Puts ViLex where the vision tower is; its projector stays where the widths agree, else it starts anew."""
    tower, projector = VilexTower(vilex, num_tokens), model.model.multi_modal_projector
    if projector.linear.in_features != vilex.encoder.patch_width:
        projector.linear = nn.Linear(vilex.encoder.patch_width, projector.linear.out_features)
    model.model.vision_tower = tower
    model.config.vilex_tokens = num_tokens


def add_dropout(model: PaliGemmaForConditionalGeneration, probability: float) -> None:
    """Dropout, in training, of what each attention and each MLP of the language model adds.

    transformers has it on attention weights only; PaliGemma's own code has it here.
    """

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def compose_inputs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], image_id: int, positions: int
) -> dict[str, Tensor]:
    """What the model reads, and labels, each int64 (B,L): image places, BOS, prompt, a new line, answer, EOS.

    Prompts are read both ways (token type 0), answers from left to right, and only they have labels.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    asked = [[image_id] * positions + [tokenizer.bos_token_id, *ids(f"{prompt}\n")] for prompt in prompts]
    told = [[*ids(answer), tokenizer.eos_token_id] for answer in answers]
    rows = [torch.tensor(a + b) for a, b in zip(asked, told, strict=True)]
    types = [torch.tensor([0] * len(a) + [1] * len(b)) for a, b in zip(asked, told, strict=True)]
    token_type_ids = pad_sequence(types, batch_first=True)
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "token_type_ids": token_type_ids,
        "labels": input_ids.masked_fill(token_type_ids == 0, _IGNORED),
    }


def answer_loss(
    model: nn.Module, pixels: Tensor, inputs: dict[str, Tensor], positions: int, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, 0-d; the first `positions` are the picture's and need no logits."""
    labels = inputs["labels"][:, positions + 1 :]
    read = {name: value for name, value in inputs.items() if name != "labels"}
    keep = inputs["labels"].shape[1] - positions
    logits = model(pixel_values=pixels, logits_to_keep=keep, use_cache=False, **read).logits[:, :-1]
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, label_smoothing=label_smoothing
    )


def read_base(folder: str | Path) -> tuple[PreTrainedTokenizerBase, PaliGemmaConfig]:
    """Tokenizer and settings of the PaliGemma in a folder or at the hub. Raises ValueError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder), PaliGemmaConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder} holds no PaliGemma: {error}") from error


def load_base(folder: str | Path, vilex: ViLex, num_tokens: int) -> PaliGemmaForConditionalGeneration:
    """The PaliGemma in a folder or at the hub, in fp32, with ViLex for its tower.

    Raises ValueError when weights are missing or do not fit.
    """
    model = load_pretrained(PaliGemmaForConditionalGeneration, folder).float()  # transformers keeps a file's bf16
    swap_tower(model, vilex, num_tokens)
    return model


def _adapter(model: PaliGemmaForConditionalGeneration) -> nn.ModuleDict:
    parts = {"lift": model.model.vision_tower.lift, "projector": model.model.multi_modal_projector}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def save_paligemma(model: PaliGemmaForConditionalGeneration, folder: Path) -> None:
    """Writes the language model as transformers does, its adapter, and the tower in a folder of its own."""
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith((_TOWER, _PROJECTOR))}
    model.save_pretrained(folder, state_dict=kept)
    save_module(_adapter(model), folder, _ADAPTER)
    model.model.vision_tower.vilex.save_pretrained(folder / _VILEX, torch.float32)


def load_paligemma(folder: Path) -> PaliGemmaForConditionalGeneration:
    """What `save_paligemma` wrote. Raises ValueError when a part is missing or does not fit."""
    model = load_pretrained(PaliGemmaForConditionalGeneration, folder, ignore=(_TOWER, _PROJECTOR))
    num_tokens = getattr(model.config, "vilex_tokens", None)
    if num_tokens is None:
        raise ValueError(f"{folder} holds a PaliGemma that has no ViLex tower: vilex_tokens is not in its config.json")
    swap_tower(model, load_vilex(folder / _VILEX), num_tokens)
    load_module(_adapter(model), folder, _ADAPTER)
    return model
