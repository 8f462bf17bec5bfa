"""What the vision tower of a run starts from: --encoder-init and --encoder-size."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from train.distil import DistilConfig
from vilex.config import EncoderConfig
from vilex.towers import read_tower

_FORMS = "random, teacher, open_clip:TAG, open_clip:NAME:TAG, timm:NAME or hf:ID"


@dataclass(frozen=True)
class EncoderInit:
    """The distillation to do first, the weights that `build_encoder` loads, and a tower in place of the preset's.

    size: pixels a side that the tower reads, instead of its own.
    """

    distil: DistilConfig | None = None
    pretrained: str | None = None
    encoder: EncoderConfig | None = None
    size: int | None = None

    def tower(self, usual: EncoderConfig) -> EncoderConfig:
        """The tower to train, the preset's `usual` one if no other is named.

        Raises ValueError when a size is asked of our own ViT, whose size is the preset's.
        """
        encoder = self.encoder or usual
        if self.size is None:
            return encoder
        if not (encoder.open_clip or encoder.timm or encoder.transformers):
            raise ValueError(f"--encoder-size {self.size} needs a tower of open_clip, timm or transformers")
        return replace(encoder, tower_size=(self.size, self.size))


def read_encoder_init(
    encoder_init: str | None,
    distil_steps: int | None,
    init_from: Path | None,
    seed: int,
    default: str = "random",
    size: int | None = None,
) -> EncoderInit:
    """What --encoder-init and --encoder-size ask for; without the first `default`, and with init_from nothing.

    Only a teacher can go on with the tower of init_from.
    Raises ValueError on another word and on flags that clash.
    """
    if encoder_init is None:
        encoder_init = default if init_from is None else "random"
    if encoder_init not in ("random", "teacher") and not re.fullmatch("(open_clip|timm|hf):.+", encoder_init):
        raise ValueError(f"--encoder-init must be {_FORMS}, got {encoder_init!r}")
    if encoder_init not in ("random", "teacher") and init_from is not None:
        raise ValueError(f"--encoder-init {encoder_init} starts the encoder anew, --init-from brings one: give either")
    if distil_steps is not None and encoder_init != "teacher":
        raise ValueError("--distil-steps needs --encoder-init teacher")
    if size is not None and init_from is not None:
        raise ValueError(f"--encoder-size {size} sets up a tower, --init-from brings one: give either")
    if encoder_init == "teacher":
        distil = DistilConfig(seed=seed, **({} if distil_steps is None else {"steps": distil_steps}))
        return EncoderInit(distil, size=size)
    return replace(EncoderInit() if encoder_init == "random" else _read_pretrained(encoder_init), size=size)


def _read_pretrained(encoder_init: str) -> EncoderInit:
    if re.fullmatch("open_clip:[^:]+", encoder_init):
        return EncoderInit(pretrained=encoder_init.removeprefix("open_clip:"))
    encoder, pretrained = read_tower(encoder_init)
    return EncoderInit(None, pretrained, encoder)
