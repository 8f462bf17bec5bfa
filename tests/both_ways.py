"""Both trainers, each in one process and in two, three steps on a tiny table: what test_processes compares.

python tests/both_ways.py FOLDER
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vilex  # noqa: F401, I001  first: it mends a mismatched torchvision

import torch
from accelerate import debug_launcher
from builders import build_bert, build_tokenizer
from training import reset_accelerate, write_table

from train import train_t2i, train_vilex
from train.presets import PRESETS
from vilex.config import GenerationConfig

MAINS = {"t2i": train_t2i.main, "vilex": train_vilex.main}
OUT = {1: "one", 2: "two"}


def write_inputs(folder: Path) -> None:
    """A table, a text encoder and a random text-to-image model."""
    write_table(folder / "pictures.parquet")
    tokenizer = build_tokenizer("bert")
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "text")
    build_bert(len(tokenizer)).save_pretrained(folder / "text")
    t2i = train_t2i.build_model(PRESETS["tiny"], str(folder / "text"), None, seed=0)
    t2i.save_pretrained(folder / "t2i", dtype=torch.float32)


def run(kind: str, folder: Path, processes: int) -> None:
    """One trainer's command line, in each process alike."""
    reset_accelerate()
    arguments = ["--preset", "tiny", "--data", folder / "pictures.parquet", "--text-encoder", folder / "text"]
    arguments += ["--out", folder / kind / OUT[processes], "--max-steps", "3", "--fp32"]
    arguments += ["--t2i", folder / "t2i"] if kind == "vilex" else []
    MAINS[kind].main([*map(str, arguments)], standalone_mode=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in (train_t2i, train_vilex):
        module.GenerationConfig = partial(GenerationConfig, num_inference_steps=1)  # what samples show is random here
    folder = Path(sys.argv[1])
    write_inputs(folder)
    for kind in MAINS:
        debug_launcher(run, (kind, folder, 2))  # first, since it forks
    for kind in MAINS:
        run(kind, folder, 1)
