"""The demo from end to end at a size of seconds: printed, drawn, resumed, not trained twice."""

import re
from pathlib import Path

import pytest

from retentive.bench.along import Mark
from retentive.cli import main
from retentive.demo import command
from retentive.errors import InputError
from retentive.reports.tables import console
from retentive.train.config import load_config


@pytest.fixture
def config(tmp_path):
    """A tiny model on documents made up here."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(40):
        lines = [f"def function_{n}_{i}(value):\n    return value * {n + i}\n" for i in range(20)]
        (corpus / f"{n}.py").write_text("\n".join(lines))
    file = tmp_path / "demo.toml"
    file.write_text(f"""
        [model]
        hidden_size = 16
        num_hidden_layers = 1
        num_heads = 2
        [data]
        sources = ["{corpus}"]
        tokenizer = "bytes"
        valid_fraction = 0.2
        [train]
        steps = 6
        batch_size = 2
        seq_len = 32
        valid_every = 3
        sample_every = 0
    """)
    return load_config(file)


def test_from_training_to_figures_and_again(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "FORM_TOKENS", 100)
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "run"
    command.demonstrate(config, folder, tokens=256)
    told = capsys.readouterr().out
    before, _, after = re.split("^[23][.] .*$", told, flags=re.MULTILINE)  # all but what it wrote
    assert max(map(len, (before + after).splitlines())) <= 80
    assert re.search(r"│ +6 │ +384 │ +\d+\.\d │ +\d\.\d{3} │", told)
    assert re.search(r"xz -9 │ +\d\.\d{3} │", told)
    assert command.PROMPT in told
    errors = [float(error) for error in re.findall(r"(?:recurrent|chunkwise) +│ +(\S+) │", told)]
    assert len(errors) == 2
    assert max(errors) < 1e-5
    figures = ["bits-per-byte.png", "memory.png", "time-per-token.png"]
    for name in figures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        (folder / name).unlink()

    def made_up(name, folder, positions, device, on_mark):
        return [Mark(at, 0.001, at, at) for at in positions]

    monkeypatch.setattr(command, "measure_along", made_up)  # starting processes takes the longest
    weights = (folder / "model.safetensors").read_bytes()
    command.demonstrate(config, folder, tokens=256)
    assert "training is skipped" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == weights
    assert all((folder / name).exists() for name in figures)


def test_an_interrupted_training_goes_on(config, tmp_path, capsys, monkeypatch):
    def interrupted(config, folder, *, resume):
        shorter = config.train.__class__(**{**vars(config.train), "steps": 3})
        before = command_train(type(config)(**{**vars(config), "train": shorter}), folder)
        return type(before)(before.folder, 3, 6, None, None)

    command_train = command.train
    monkeypatch.setattr(command, "train", interrupted)
    folder = tmp_path / "run"
    command.demonstrate(config, folder, tokens=256)
    assert "stopped after step 3 of 6; run it again to go on" in capsys.readouterr().out
    monkeypatch.setattr(command, "train", command_train)
    assert command.trained(config, folder, console()).finished
    assert "holds a run at step 3" in capsys.readouterr().out


def test_a_folder_with_something_else_gets_the_demos_own_advice(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").touch()
    advice = f"remove {folder}, or train elsewhere: retentive demo --out"
    with pytest.raises(InputError, match=f"exists already; {advice}"):
        command.trained(config, folder, console())
    (folder / "notes.txt").unlink()
    command.trained(config, folder, console())
    next(Path(config.data.sources[0]).iterdir()).write_text("other text\n" * 100)
    with pytest.raises(InputError, match=f"has changed; {advice}"):
        command.trained(config, folder, console())


def test_the_table_shows_doublings():
    points = [Mark(at, 0.001, 2**20, 2**28) for at in command.positions(16_000)]
    table = command.decoding_table(dict.fromkeys(command.CONTENDERS, points))
    assert list(table.columns[0].cells) == ["500", "1,000", "2,000", "4,000", "8,000", "16,000"]


def test_the_settings_come_with_the_package():
    shipped = Path(command.__file__).with_name("demo.toml")
    config = load_config(shipped)
    assert config == load_config(Path(__file__).parents[1] / "configs/demo.toml")
    assert config.model.size == "demo"
    assert config.data.sources == ("stdlib",)


def test_unknown_options_are_one_line(capsys):
    assert main(["demo", "--ouch", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
