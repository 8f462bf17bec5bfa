"""All trainers, a few steps on a tiny table in one process and in two: what test_processes compares.

python tests/both_ways.py FOLDER
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vilex  # noqa: F401, I001  first: it mends a mismatched torchvision

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, debug_launcher
from accelerate.state import AcceleratorState, PartialState
from builders import build_bert, build_tokenizer
from training import reset_accelerate, write_table, write_table_as_shards

from train import ablate, run, train_t2i, train_vilex
from train.presets import PRESETS
from train.state import TrainState
from vilex.config import GenerationConfig

MAINS = {"t2i": train_t2i.main, "vilex": train_vilex.main, "ablate": ablate.main}


def write_inputs(folder: Path) -> None:
    """A table, a text encoder and a random text-to-image model."""
    write_table(folder / "pictures.parquet")
    write_table(folder / "held-out.parquet")
    write_table_as_shards(folder / "pictures.parquet", folder / "shards", 3)
    tokenizer = build_tokenizer("bert")
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "text")
    build_bert(len(tokenizer)).save_pretrained(folder / "text")
    t2i = train_t2i.build_model(PRESETS["tiny"], str(folder / "text"), None, seed=0)
    t2i.save_pretrained(folder / "t2i", dtype=torch.float32)


def train(kind: str, folder: Path, out: str, *ways: str) -> None:
    """One trainer's command line, in each process alike.

    ways: "split" by FSDP; "stream" the pictures from shards; "halt" at the checkpoint of step 2.
    """
    reset_accelerate()
    arguments = ["--preset", "tiny", "--text-encoder", folder / "text", "--out", folder / kind / out, "--fp32"]
    if "stream" in ways:
        arguments += ["--data", folder / "shards", "--stream", "1"]
    else:
        arguments += ["--data", folder / "pictures.parquet"]
    arguments += ["--t2i", folder / "t2i"] if kind != "t2i" else []
    if kind == "ablate":
        arguments += ["--rows", "blocks-2,image-only", "--max-steps", "2", "--validation", folder / "held-out.parquet"]
    if "split" in ways:
        run.Accelerator = build_splitting_accelerator
    if "halt" in ways:
        TrainState.save = save_and_halt
    with suppress(Halt):
        MAINS[kind].main([*map(str, arguments)], standalone_mode=False)


class Halt(Exception):
    """The run ends here."""


def save_and_halt(state: TrainState, save: Callable = TrainState.save) -> None:
    """Saves, and goes no further."""
    save(state)
    raise Halt


def build_splitting_accelerator(**options: object) -> Accelerator:
    """With FSDP on the CPU, which accelerate itself has for accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["Block", "PoolerBlock"],
    )  # fmt: skip
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def in_processes(count: int, *arguments: object) -> None:
    """Calls `train` in that many new processes."""
    if count > 1:
        debug_launcher(train, arguments, count)
        return
    process = get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in (train_t2i, train_vilex):
        module.GenerationConfig = partial(GenerationConfig, num_inference_steps=1)  # what samples show is random here
    folder = Path(sys.argv[1])
    write_inputs(folder)
    for kind in ("t2i", "vilex"):
        in_processes(1, kind, folder, "one")
        in_processes(2, kind, folder, "two")
    in_processes(2, "ablate", folder, "two")
    in_processes(1, "t2i", folder, "stream-one", "stream")
    in_processes(2, "t2i", folder, "stream-two", "stream", "halt")
    in_processes(2, "t2i", folder, "stream-two", "stream")
    in_processes(1, "vilex", folder, "one-two", "halt")
    copytree(folder / "vilex" / "one-two", folder / "vilex" / "one-split")
    in_processes(2, "vilex", folder, "one-two")
    in_processes(2, "vilex", folder, "one-split", "split")
    in_processes(2, "vilex", folder, "split-one", "split", "halt")
    in_processes(1, "vilex", folder, "split-one")
