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
    "demo": ("retentive.demo", "train a small model on Python's own sources, then use it"),
    "train": ("retentive.train.command", "train a model from a TOML configuration, or go on"),
    "generate": ("retentive.inference.command", "continue prompts with a trained model"),
    "info": ("retentive.info", "parameters, half-lives, state and FLOPs of a model or a size"),
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
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if command in ("-h", "--help", "help"):
            print(usage())
            return 0
        if command == "--version":
            print(f"retentive {__version__}")
            return 0
        if command not in COMMANDS:
            near = nearest(command, COMMANDS)
            raise InputError(f"unknown command {command!r}{near}; choose {', '.join(COMMANDS)}")
        code = importlib.import_module(COMMANDS[command][0]).main(rest) or 0
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return code
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nothing left to flush at exit
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        return _fail(f"{error.strerror}{where}", 2)


def _fail(message: str, code: int) -> int:
    print(f"retentive: {message}", file=sys.stderr)
    return code
