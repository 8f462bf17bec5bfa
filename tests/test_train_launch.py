"""accelerate's launcher takes the configurations in train/configs, and the trainer runs under it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from both_ways import write_inputs
from training import reset_accelerate

from train import train_t2i
from train.run import build_accelerator

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "train" / "configs"
EXPECTED = {  # processes, nodes, how they train together
    "one_gpu": (1, 1, "NO"),
    "ddp": (8, 1, "MULTI_GPU"),
    "nodes": (64, 8, "MULTI_GPU"),
    "fsdp": (8, 1, "FSDP"),
}


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGS.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_loads_the_configuration(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == EXPECTED[name]
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("has, precision", [({"avx512_bf16": True}, "bf16"), ({}, "no")])
def test_trainers_leave_bf16_alone_where_it_is_slow(monkeypatch, has, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    reset_accelerate()
    assert build_accelerator(4, 1, fp32=False).mixed_precision == precision
    reset_accelerate()
    assert build_accelerator(4, 1, fp32=True).mixed_precision == "no"


def test_the_launcher_splits_by_the_second_fsdp():
    arguments = ["--config_file", str(CONFIGS / "fsdp.yaml"), "-m", "train.train_vilex", "--out", "x"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert arguments.use_fsdp and arguments.fsdp_version == 2
    assert arguments.fsdp_transformer_layer_cls_to_wrap == "Block,PoolerBlock"
    assert (arguments.training_script, arguments.training_script_args) == ("train.train_vilex", ["--out", "x"])


def launch(name: str, folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.launch", "--config_file", CONFIGS / f"{name}.yaml", *options]
    command += ["-m", "train.train_t2i", "--preset", "tiny", "--data", folder / "pictures.parquet"]
    command += ["--text-encoder", folder / "text", "--out", folder / name, "--dry-run", "--accumulate", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_the_trainer_runs_under_the_launcher_in_one_process_and_in_two(tmp_path):
    write_inputs(tmp_path)
    runs = [launch("one_gpu", tmp_path), launch("ddp", tmp_path, "--num_processes", "2")]
    for run in runs:
        output, _ = run.communicate()
        assert run.returncode == 0, output[-3000:]
        assert "12 pictures" in output


def test_fsdp_is_for_train_vilex(monkeypatch, tmp_path):
    monkeypatch.setattr(train_t2i.T2IRun, "split", True)
    write_inputs(tmp_path)
    flags = ("--preset", "tiny", "--data", tmp_path / "pictures.parquet", "--text-encoder", tmp_path / "text")
    result = training.invoke(train_t2i.main, *flags, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "FSDP splits what train_vilex trains" in result.output
