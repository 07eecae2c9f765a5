import io
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest

from retentive import __version__, cli
from retentive.arguments import parse
from retentive.errors import InputError


def retentive(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retentive", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_commands_are_listed_with_a_line_each(arguments):
    result = retentive(*arguments)
    assert result.returncode == 0
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name:8}  {text}\n" in result.stdout


def test_listing_the_commands_imports_nothing_heavy():
    code = textwrap.dedent("""
        import sys
        from retentive.cli import main
        main([])
        heavy = {"torch", "numpy", "tyro", "rich", "pydantic", "tokenizers", "matplotlib"}
        sys.exit(", ".join(heavy & set(sys.modules)) or 0)
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"retentive {__version__}\n"


def test_an_unknown_command_names_the_nearest():
    result = retentive("trian")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("retentive: unknown command 'trian' (did you mean 'train'?)")


@pytest.fixture
def command(monkeypatch):
    """A command `x` whose main is whatever the test gives."""

    def install(main):
        monkeypatch.setitem(cli.COMMANDS, "x", ("retentive.x", "a test's command"))
        monkeypatch.setitem(sys.modules, "retentive.x", SimpleNamespace(main=main))

    return install


def raises(error: BaseException):
    def main(argv):
        raise error

    return main


def test_a_command_gets_the_other_arguments_and_gives_the_exit_code(command):
    command(lambda argv: 3 if argv == ["a", "--b"] else 4)
    assert cli.main(["x", "a", "--b"]) == 3
    command(lambda argv: None)
    assert cli.main(["x"]) == 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("width 7 is odd"), 2, "width 7 is odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "Permission denied: /a/b"),
        (FileNotFoundError(2, "No such file or directory", "c"), 2, "No such file or directory: c"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_a_users_mistake_is_one_line(command, capsys, error, code, line):
    command(raises(error))
    assert cli.main(["x"]) == code
    assert capsys.readouterr().err == f"retentive: {line}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(9, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(command, error):
    command(raises(error))
    with pytest.raises(type(error)):
        cli.main(["x"])


def test_a_reader_that_went_away_is_no_error():
    code = "import sys; sys.argv = ['retentive']; from retentive.cli import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    """Peak learning rate."""


@dataclass(frozen=True)
class Options:
    optimizer: Optimizer = Optimizer()
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int = 10

    def __post_init__(self):
        if self.steps < 0:
            raise InputError(f"{self.steps} steps; give 0 or more")


def test_arguments_override_the_default_given():
    default = Options(steps=5)
    parsed = parse(Options, ["--optimizer.learning-rate", "0.5"], "p", "what it does", default)
    assert parsed == Options(Optimizer(0.5), steps=5)
    assert parse(Options, [], "p", "what it does") == Options()


def test_help_is_printed_and_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "retentive x", "what it does")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert (
        "retentive x" in printed and "what it does" in printed and "Peak learning rate" in printed
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--optimizer.learning-rat", "3"],
            "unknown option --optimizer.learning-rat (did you mean ",
        ),
        (["--zzz"], "unknown option --zzz; p --help lists the options"),
        (["more"], "unexpected argument more; p --help lists the options"),
        (["--device", "tpu"], "invalid choice 'tpu' for argument '--device'"),
        (["--steps", "few"], "error parsing --steps: invalid literal for int()"),
        (["--steps"], "missing value for argument '--steps'"),
        (["--steps", "-1"], "-1 steps; give 0 or more"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_arguments_that_do_not_parse_are_one_line(arguments, line, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(InputError) as error:
        parse(Options, arguments, "p", "what it does")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
