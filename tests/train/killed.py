"""Run by test_kill.py in a process of its own: kills runs with SIGKILL, then resumes them.

`killed.py WORK TEXTS`: one run after the other is killed at the first, second, third, ... file
operation that it makes once its first model is there, in a fork each, until one comes through
alive. Prints the number of runs killed; fails if one of them does not resume to the same weights.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import retentive
from retentive.train import loop
from retentive.train.config import RunConfig

# What a save does to the disk, as Python's audit hooks name it.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_at(operation: int, folder: Path) -> None:
    """The `operation`-th access to `folder` from its first model on will be the process's last."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            if (folder / "model.safetensors").exists():
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_killed(config: RunConfig, folder: Path, operation: int) -> bool:
    """Whether a run in a fork of this process was killed before its end."""
    child = os.fork()
    if child == 0:
        kill_at(operation, folder)
        loop.train(config, folder, quiet=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(work: Path, texts: str) -> None:
    torch.set_num_threads(1)
    loop.measure_gemm_rate = lambda device, dtype: 1e9  # pyright: ignore
    loop.plot_curve = lambda records, path: None  # pyright: ignore
    config = RunConfig.from_table(
        {
            "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "dropout": 0.1},
            "data": {"sources": [texts], "tokenizer": "bytes", "valid_fraction": 0.0},
            "train": {
                "steps": 2,
                "batch_size": 2,
                "seq_len": 16,
                "carry_state": True,
                "save_every": 1,
                "keep": 1,
                "sample_tokens": 1,
                "device": "cpu",
            },
        }
    )
    loop.train(config, work / "whole", quiet=True)
    whole = load_file(work / "whole" / "model.safetensors")
    operation = 1
    while run_killed(config, work / f"{operation}", operation):
        folder = work / f"{operation}"
        retentive.load(folder)  # a model folder at every moment
        loop.train(config, folder, resume=True, quiet=True)
        resumed = load_file(folder / "model.safetensors")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), operation
        assert not list(folder.glob("checkpoints/.*")), operation
        operation += 1
    print(operation - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
