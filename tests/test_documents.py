"""What the documents show is run: Python blocks whole, `retentive` lines as far as --help."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import zoo

from retentive import RetNet
from retentive.cli import COMMANDS, main
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.models.checkpoint import save_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "retention.md"]


def python_blocks(document: Path) -> str:
    """All blocks of a document as one program, as its reader would run them."""
    return "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))


def command_lines() -> list[list[str]]:
    """The lines of the README that begin with `retentive`, as words."""
    lines = re.findall(r"^    (retentive .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """A working folder with an untrained runs/demo in it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    config = zoo.retnet(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_heads=2)
    save_model(RetNet(config), folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document, demo_folder, capsys):
    program = python_blocks(document)
    assert "import" in program
    torch.manual_seed(0)
    exec(compile(program, document.name, "exec"), {})
    if document.name == "retention.md":
        assert float(re.search(r"tensor\((.*)\)", capsys.readouterr().out)[1]) < 1e-6


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_lines_name_commands_and_options_that_exist(words, capsys):
    command = words[: 2 if words[0] in ("bench", "eval") else 1]
    assert words[0] in COMMANDS
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in told


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
