"""Run by test_kill.py in a process of its own: kills runs with SIGKILL, then resumes them.

`killed.py WORK TEXTS`: one run after the other is killed at the first, second, third, ... file
operation that it makes once its first model is there, in a fork each, until one comes through
alive. Prints the number of runs killed; fails if one of them does not resume to the same weights.
`killed.py WORK TEXTS BASE`: state tuning of the model in BASE, killed at every seventh operation.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import retentive
from retentive.adapters.loading import load_adapted
from retentive.train import loop
from retentive.train.config import RunConfig

# What a save does to the disk, as Python's audit hooks name it.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_at(operation: int, folder: Path, file: str) -> None:
    """The `operation`-th access to `folder` from its first `file` on will be the process's last."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            if (folder / file).exists():
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def weights_file(config: RunConfig) -> str:
    return next(name for name in loop.LEAVES[config.adapter.kind] if name.endswith("tensors"))


def run_killed(config: RunConfig, folder: Path, operation: int) -> bool:
    """Whether a run in a fork of this process was killed before its end."""
    child = os.fork()
    if child == 0:
        kill_at(operation, folder, weights_file(config))
        loop.train(config, folder, quiet=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(work: Path, texts: str, base: str | None = None) -> None:
    torch.set_num_threads(1)
    loop.measure_gemm_rate = lambda device, dtype: 1e9  # pyright: ignore
    loop.plot_curve = lambda records, path: None  # pyright: ignore
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "dropout": 0.1}
    config = RunConfig.from_table(
        {
            "model": model if base is None else {"base": base},
            "adapter": {} if base is None else {"kind": "state"},
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
    file = weights_file(config)
    whole = load_file(work / "whole" / file)
    killed, every = 0, 1 if base is None else 7
    while run_killed(config, work / f"{killed}", 1 + every * killed):
        folder = work / f"{killed}"
        # A model folder, or an adapter's, at every moment.
        retentive.load(folder) if base is None else load_adapted(base, folder)
        loop.train(config, folder, resume=True, quiet=True)
        resumed = load_file(folder / file)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), killed
        assert not list(folder.glob("checkpoints/.*")), killed
        killed += 1
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
