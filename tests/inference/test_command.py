"""`retentive generate`: what it prints where, what it saves, and how it refuses."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch
import zoo

from retentive.cli import main
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.inference.session import Session
from retentive.models.checkpoint import save_model
from retentive.models.retnet import RetNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained byte model, as a model folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1}
    save_model(RetNet(zoo.retnet(**sizes)), folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def generate(folder, capfdbinary):
    """Runs the command on the model; its exit code, stdout and stderr."""

    def call(*options):
        code = main(["generate", str(folder), *map(str, options)])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return call


def test_one_prompt(generate):
    code, out, err = generate("--prompt", "hello", "--max-new-tokens", 30)
    assert code == 0
    assert out
    assert "30 tokens in" in err
    assert "tokens/s" in err
    assert "state: 2,048 bytes per sequence" in err  # K 16, V 32, float32
    assert generate("--prompt", "hello", "--max-new-tokens", 30)[1] == out
    assert generate("--prompt", "hello", "--max-new-tokens", 30, "--seed", 1)[1] != out


def test_several_prompts_are_told_apart(generate):
    texts = [
        generate("--prompt", prompt, "--temperature", 0)[1] for prompt in ("one", "two  words")
    ]
    code, out, _ = generate("--prompt", "one", "--prompt", "two  words", "--temperature", 0)
    assert code == 0
    assert out == f"== 1 of 2: one ==\n{texts[0]}\n\n== 2 of 2: two words ==\n{texts[1]}\n"


def test_the_prompt_may_come_from_standard_input(generate, monkeypatch):
    expected = generate("--prompt", "a\nb")[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert generate()[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    code, _, err = generate()
    assert (code, err.count("\n")) == (2, 1)
    assert "not UTF-8" in err


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"]])
def test_a_saved_text_goes_on(generate, tmp_path, prompts):
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    given += ["--temperature", 1.3, "--seed", 9, "--repetition-penalty", 1.2, "--stop", "\x01\x02"]
    state = tmp_path / "state"
    _, whole, _ = generate(*given, "--max-new-tokens", 40)
    _, first, err = generate(*given, "--max-new-tokens", 15, "--save-state", state)
    assert f"--load-state {state}" in err
    _, second, _ = generate("--load-state", state, "--max-new-tokens", 25)
    if len(prompts) == 1:
        assert first + second == whole
    else:
        joined = zip(texts(first), texts(second), strict=True)
        assert [a + b for a, b in joined] == texts(whole)


def texts(out):
    """Of several texts, each without its heading."""
    return [part.split(" ==\n")[1] for part in out[:-1].split("\n\n== ")]


def test_a_prompt_read_once_serves_many_texts(generate, tmp_path):
    state = tmp_path / "state"
    code, out, _ = generate("--prompt", "ab", "--max-new-tokens", 0, "--save-state", state)
    assert (code, out) == (0, "")
    expected = generate("--prompt", "abcd", "--temperature", 0)[1]
    going_on = ("--load-state", state, "--prompt", "cd", "--temperature", 0)
    assert generate(*going_on)[1] == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--save-state", "no/such/folder/s"], "there is no folder"),
        (["--prompt", "a", "--save-state", "."], "is a folder"),
        (["--load-state", "nowhere"], "does not exist"),
        (["--load-state", __file__], "no safetensors file"),
        (["--prompt", "a", "--dtype", "int3"], "unknown dtype"),
        (["--prompt", "a", "--device", "tpu"], "unknown device"),
        (["--promt", "a"], "did you mean --prompt"),
    ],
)
def test_mistakes_are_one_line(generate, options, complaint):
    code, out, err = generate(*options)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_state_of_other_weights_is_refused(generate, tmp_path):
    torch.manual_seed(2)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1}
    save_model(RetNet(zoo.retnet(**sizes)), tmp_path)
    save_tokenizer(byte_tokenizer(), tmp_path)
    state = tmp_path / "state"
    generate("--prompt", "a", "--save-state", state)
    assert main(["generate", str(tmp_path), "--load-state", str(state)]) == 2


def test_interrupted_it_keeps_what_it_wrote_and_saves(folder, generate, tmp_path):
    state = tmp_path / "state"
    endless = [*"--prompt x --max-new-tokens 100000000 --temperature 0 --save-state".split(), state]
    command = [sys.executable, "-m", "retentive", "generate", folder, *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    begun = process.stdout.read(200)
    os.kill(process.pid, signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    written = (begun + rest).decode()
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err
    more = generate("--load-state", state, "--max-new-tokens", 20)[1]
    length = len((written + more).encode()) + 50
    whole = generate("--prompt", "x", "--temperature", 0, "--max-new-tokens", length)[1]
    assert whole.startswith(written + more)


def test_broken_off_within_a_step_it_saves_nothing(generate, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_take", interrupted)
    state = tmp_path / "state"
    code, _, err = generate("--prompt", "x", "--save-state", state)
    assert code == 130
    assert f"{state} not saved" in err
    assert not state.exists()


def test_a_reader_that_leaves_ends_it_and_the_state_is_saved(folder, generate, tmp_path):
    state = tmp_path / "state"
    endless = [*"--prompt x --max-new-tokens 100000000 --save-state".split(), state]
    command = [sys.executable, "-m", "retentive", "generate", folder, *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdout.read(20)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert process.returncode == 141
    assert generate("--load-state", state, "--max-new-tokens", 5)[0] == 0
