"""Command-line arguments from a dataclass, for every command: tyro, its errors as one line.

A field is an option, its default the option's default, the docstring under it the option's help;
a field that is itself a dataclass gives dotted options (`--optimizer.learning-rate`).
"""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

from retentive.errors import InputError

T = TypeVar("T")


def parse(
    cls: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None
) -> T:
    """`argv` as a `cls`; what is not given comes from `default`, or from the fields' own defaults.

    `--help` prints and exits. Raises InputError for anything that does not parse.
    """
    import tyro

    fallback = tyro.MISSING_NONPROP if default is None else default
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls, args=list(argv), prog=prog, description=description, default=fallback
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        if isinstance(stop.__context__, InputError):
            raise stop.__context__ from None
        raise InputError(_one_line(complaint.getvalue(), prog)) from None


def _one_line(complaint: str, prog: str) -> str:
    """tyro draws a box: a title, the complaint, a rule, the nearest options with their help.

    Where standard output is not UTF-8 the box is blank and the title has a rule of its own.
    """
    _, *lines = (line.strip("│ ") for line in complaint.splitlines() if line.strip())
    if _is_rule(lines[0]):
        lines = lines[1:]
    rule = next(i for i, line in enumerate(lines) if _is_rule(line))
    said = " ".join(lines[:rule]).replace(" .", ".").rstrip(".")
    unknown = "Unrecognized options: "
    if said.startswith(unknown):  # the values that follow an unknown option are listed with it
        given = said.removeprefix(unknown).split(",")[0]
        options = (line for line in lines[rule:] if line.startswith("--") and not _is_rule(line))
        near = next((line.split()[0] for line in options), None)
        kind = "unknown option" if given.startswith("-") else "unexpected argument"
        said = f"{kind} {given}" + (f" (did you mean {near}?)" if near else "")
    return f"{said[0].lower()}{said[1:]}; {prog} --help lists the options"


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")
