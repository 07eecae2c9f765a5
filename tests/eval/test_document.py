"""Every command and the Python block of docs/evaluation.md, on a tiny model and small texts."""

import json
import re
import shlex
from pathlib import Path

import pytest

from retentive.cli import main
from retentive.eval import perplexity_report, recall, recall_report

from .conftest import report, text

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"
SMALLER = {"--max-distance": "100", "--samples": "2", "--pairs": "4"}


def commands() -> list[list[str]]:
    lines = re.findall(r"^    retentive (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture
def readers_folder(folder: Path, lm_eval_offline, monkeypatch) -> Path:
    """With the files that the document speaks of."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", "lm_eval_tasks/manager.py")
    for name in ("tasks", "lm_eval_tasks"):
        Path(name).mkdir()
    Path("book.txt").write_text(text(300))
    (Path("tasks") / "colours.yaml").write_text(blocks("yaml")[0])
    for name in ("examples.jsonl", "colours.jsonl"):
        (Path("tasks") / name).write_text(blocks("json")[0])
    paper = ["hellaswag", "boolq", "copa", "piqa", "wsc273", "winogrande", "storycloze_2016"]
    for task in (*paper, "lambada_openai"):  # as if lm-eval had them, with data not at hand
        yaml = blocks("yaml")[0].replace("colours", task).replace("path: json", "path: no/where")
        (Path("lm_eval_tasks") / f"{task}.yaml").write_text(yaml)
    return folder


def smaller(words: list[str]) -> list[str]:
    for option, value in SMALLER.items():
        if option in words:
            words[words.index(option) + 1] = value
        elif words[1] == "recall" and option != "--pairs":
            words += [option, value]
    return words


def test_the_commands_run(readers_folder, monkeypatch, capsys):
    for module in (perplexity_report, recall_report):
        monkeypatch.setattr(module.Report, "draw", lambda *args: None)
    monkeypatch.setattr(recall, "NEAREST", 64)
    given = commands()
    assert {words[1] for words in given} == {"perplexity", "tasks", "recall"}
    for words in given:
        code = main(smaller(words))
        away = words[1] == "tasks" and "--include" not in words  # all of them
        assert code == (1 if away else 0), words
    shown = capsys.readouterr().out
    assert "hellaswag not run: " in shown and "colours" in shown and "half-lives" in shown.lower()
    assert [row["shots"] for row in report("tasks")["tasks"]] == [0, 1]


def test_the_python_block_runs(readers_folder, capsys):
    (program,) = blocks("python")
    exec(compile(program, DOCUMENT.name, "exec"), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) in (0.0, 1.0)
    assert json.loads(blocks("json")[0])["answer"] == 0
