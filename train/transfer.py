"""The paper's transfer tasks for PaliGemma, and the settings that each is tried with.

Lists are the paper's. Where it gives none, one value stands, which is ours.
Source: ViLex (CVPR 2025), appendix.
"""

from dataclasses import dataclass
from itertools import product

from vilex.config import Config, setting

CAPTION, ANSWER = "caption en", "answer en {question}"


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Settings of one fine-tuning."""

    learning_rate: float = setting(1e-5, 0, 1, "largest, after warm-up and before the cosine")
    epochs: int = setting(10, 1, 1000)
    dropout: float = setting(0.0, 0, 0.99, "of what each block of the language model adds")
    label_smoothing: float = setting(0.0, 0, 0.99)
    weight_decay: float = setting(0.0, 0, 1)
    warmup_fraction: float = setting(0.05, 0, 1, "of the steps")
    batch_size: int = setting(256, 1, 65536, "pictures per optimiser step, over all processes")
    seed: int = setting(0, 0, 2**32 - 1)


@dataclass(frozen=True)
class Sweep:
    """One task: what the model is asked of a picture, and the grid of settings."""

    prompt: str
    learning_rate: tuple[float, ...] = (1e-5,)
    epochs: tuple[int, ...] = (10,)
    dropout: tuple[float, ...] = (0.0,)
    label_smoothing: tuple[float, ...] = (0.0,)
    weight_decay: tuple[float, ...] = (0.0,)

    def settings(self, **fixed: float) -> list[FinetuneConfig]:
        """All settings of the grid, the last list turning fastest; `fixed` ones are the same in all."""
        names = [name for name in SWEPT if name not in fixed]
        values = product(*(getattr(self, name) for name in names))
        return [FinetuneConfig(**dict(zip(names, row, strict=True)), **fixed) for row in values]


SWEPT = tuple(name for name in Sweep.__dataclass_fields__ if name != "prompt")
TASKS = {
    "cococap": Sweep(CAPTION, learning_rate=(4e-6, 5e-6, 6e-6), epochs=(5, 10), dropout=(0, 0.02, 0.05)),
    "textcaps": Sweep(CAPTION, learning_rate=(4e-6, 6e-6), epochs=(5, 10)),
    "scicaps": Sweep(CAPTION, learning_rate=(6e-5, 7e-5), dropout=(0.1, 0.2), label_smoothing=(0.1, 0.2)),
    "vqav2": Sweep(ANSWER, label_smoothing=(0, 0.1), dropout=(0, 0.1), weight_decay=(0, 1e-6)),
    "textvqa": Sweep(ANSWER, learning_rate=(4e-6, 6e-6)),
    "okvqa": Sweep(ANSWER, learning_rate=(8e-6, 1e-5), dropout=(0, 0.02)),
    "scienceqa": Sweep(ANSWER, learning_rate=(8e-6, 1e-5), dropout=(0, 0.02)),
    "vizwiz": Sweep(ANSWER, learning_rate=(8e-6, 1e-5), dropout=(0, 0.02)),
    "gqa": Sweep(ANSWER, learning_rate=(5e-6, 1e-5), dropout=(0, 0.02, 0.05)),
    "refcoco": Sweep("segment {question}", label_smoothing=(0.1, 0.2), epochs=(60, 100), dropout=(0, 0.05)),
    "msrvtt": Sweep(CAPTION, weight_decay=(0, 1e-6), dropout=(0, 0.2), epochs=(20, 40)),
}
