"""`retentive COMMAND`: finds the command's module and turns a user's mistake into one line.

Only the module of the command that runs is imported, so the list of commands needs no torch.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from retentive import __version__
from retentive.errors import InputError, nearest

COMMANDS = {  # name: (module with main(argv) -> exit code or None, help)
    "demo": ("retentive.demo.command", "train a small model on Python's own sources, then use it"),
    "train": ("retentive.train.command", "train a model from a TOML configuration, or go on"),
    "merge": ("retentive.adapters.command", "put a LoRA adapter into its model's weights"),
    "generate": ("retentive.inference.command", "continue prompts with a trained model"),
    "convert": ("retentive.convert.command", "open anybody's RetNet checkpoint, or write one"),
    "quantize": (
        "retentive.compress.quantize_command",
        "store a model's weights in 16, 8 or 4 bits",
    ),
    "eval": ("retentive.eval.command", "perplexity, the paper's tasks, recall over distance"),
    "info": ("retentive.info", "parameters, half-lives, state and FLOPs of a model or a size"),
    "export": (
        "retentive.compress.export_command",
        "write a model for onnxruntime or torch.export",
    ),
    "bench": ("retentive.bench.command", "measure speed and memory beside other implementations"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: retentive COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "retentive COMMAND --help: its options",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 141 where a pipe's reader left."""
    try:
        code = _run(*(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return code
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what is still in the buffer at exit
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        return _fail(f"{error.strerror}{where}", 2)


def _run(command: str = "--help", *arguments: str) -> int:
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"retentive {__version__}")
        return 0
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        raise InputError(f"unknown command {command!r}{near}; choose {', '.join(COMMANDS)}")
    module, _ = COMMANDS[command]
    return importlib.import_module(module).main(list(arguments)) or 0


def _fail(message: str, code: int) -> int:
    print(f"retentive: {message}", file=sys.stderr)
    return code
