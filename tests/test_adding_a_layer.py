"""A mixer is one file and one line: everything works with one that the package has never seen.

`toy_mixer.EMA` is the example of docs/adding-a-layer.md; it is registered here and nowhere else.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retentive.cli import main
from retentive.data.tokenizer import byte_tokenizer, load_tokenizer, save_tokenizer
from retentive.decoding.runner import runner
from retentive.errors import InputError
from retentive.inference.generate import generate
from retentive.inference.session import Session
from retentive.mixers import MIXERS
from retentive.models import counts
from retentive.models.build import build_model
from retentive.models.checkpoint import load, save_model
from retentive.models.config import ModelConfig, RetNetConfig, config_from_dict
from retentive.models.matching import of_kind

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "adding-a-layer.md"
CORPUS = "\f".join(f"def f(x):\n    return x + {n}\n\n\n" * 20 for n in range(20))
RUN = """
[model]
hidden_size = 16
num_hidden_layers = 2
[model.mixer]
kind = "ema"
expand = 2
[data]
sources = ["SOURCE"]
tokenizer = "bytes"
valid_fraction = 0.2
[train]
steps = 4
batch_size = 2
seq_len = 32
carry_state = true
sample_tokens = 4
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "ema", "toy_mixer:EMA")


def config(**fields: object) -> ModelConfig:
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2}
    return config_from_dict(
        {"model_type": "retentive", **sizes, "mixer": {"kind": "ema", "expand": 2}, **fields}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build_model(config())
    model.init_weights(seed=0)
    save_model(model, tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(257, (3, 70), generator=torch.Generator().manual_seed(0))


def test_the_document_shows_the_file_that_is_tested():
    (code,) = re.findall(r"```python\n(\"\"\"A mixer of.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code == (TESTS / "toy_mixer.py").read_text()


def test_it_is_the_recurrence(tokens):
    model = build_model(config()).double()
    mixer = model.blocks[0].mixer
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    y, state = mixer.run(x, mixer.empty_state(2, x))
    a, h, rows = mixer.alpha.sigmoid(), torch.zeros(2, 32, dtype=torch.float64), []
    for x_t in x.unbind(1):
        h = a * h + (1 - a) * mixer.in_proj(x_t)
        rows.append(mixer.out_proj(h * torch.nn.functional.silu(mixer.gate_proj(x_t))))
    torch.testing.assert_close(y, torch.stack(rows, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(state["h"], h, rtol=0, atol=1e-12)


def test_it_trains_resumes_and_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("code.txt").write_text(CORPUS)
    Path("run.toml").write_text(RUN.replace("SOURCE", str(tmp_path / "code.txt")))
    assert main("train run.toml --out run --train.steps 2 --train.save-every 1".split()) == 0
    assert main("train run.toml --out run --train.steps 4 --resume".split()) == 0
    assert json.loads(Path("run/config.json").read_text())["mixer"] == {"kind": "ema", "expand": 2}
    Path("book.txt").write_text("abc " * 500)
    capsys.readouterr()
    assert main("eval perplexity run book.txt --windows 64".split()) == 0
    assert "whole" in capsys.readouterr().out  # its state has a fixed size


def test_it_writes_and_goes_on_from_a_saved_state(folder, tmp_path):
    model, tokenizer = load(folder), load_tokenizer(folder)
    whole = generate(model, tokenizer, "hello", max_new_tokens=12, seed=3)
    session = Session(model, tokenizer, stop=())
    session.read(["hello", "another, longer prompt"])
    list(session.steps(3))
    session.save(tmp_path / "state")
    again = Session.load(tmp_path / "state", model, tokenizer)
    assert [step for step in again.steps(3)] == [step for step in session.steps(3)]
    assert generate(model, tokenizer, "hello", max_new_tokens=12, seed=3) == whole


def test_it_decodes_as_it_reads(folder, tokens):
    model = load(folder, dtype="float64")
    with torch.no_grad():
        logits, _ = model(tokens)
        _, state = model(tokens[:, :60])
    decoding = runner(model, state)
    steps = torch.stack([decoding.step(column) for column in tokens[:, 60:].unbind(1)], 1)
    torch.testing.assert_close(steps, logits[:, 60:], rtol=0, atol=1e-11)


def test_it_is_counted_described_and_matched(folder, capsys):
    sizes = counts.parameters(config())
    assert sizes["ema"] == 2 * (3 * 16 * 32 + 32)
    assert counts.state_bytes(config(), 10**6) == 2 * 32 * 4
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "ema" in said and "256 B" in said and "Transformer, MHA" in said
    retnet = RetNetConfig.named("demo")
    equal = sum(counts.parameters(of_kind(retnet, "ema")).values())
    assert equal == pytest.approx(sum(counts.parameters(retnet).values()), rel=0.01)


def test_transformers_generates_from_it(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import retentive.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["a", "hello there"], return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=5, do_sample=False)
    alone = model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert together[0, -5:].tolist() == alone[0, -5:].tolist()
    assert model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False).shape[0] == 2


def test_an_export_is_refused_by_its_name(folder, capsys):
    assert main(["export", str(folder), "--format", "torch-export"]) == 2
    assert "layer 0 mixes by ema, which is not exported" in capsys.readouterr().err


def test_its_weights_are_quantised(folder, tmp_path):
    assert main(["quantize", str(folder), str(tmp_path / "small"), "--to", "int8"]) == 0
    model, tokenizer = load(tmp_path / "small"), load_tokenizer(tmp_path / "small")
    assert generate(model, tokenizer, "hello", max_new_tokens=3) is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixer": {"kind": "emma"}}, ["'emma'", "did you mean 'ema'", "retention"]),
        ({"mixer": {"kind": "ema", "expnd": 2}}, ["'expnd'", "did you mean 'expand'"]),
        ({"mixer": {"kind": "ema", "expand": "2"}}, ["expand", "'2'", "a whole number"]),
        ({"mixer": {}}, ["mixer has no kind", "retention"]),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(fields, words):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict({"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, **fields})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_fails_to_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "broken_mixer.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MIXERS, "broken", "broken_mixer:Broken")
    with pytest.raises(InputError, match="'broken' cannot be imported from broken_mixer:Broken: "):
        config(mixer={"kind": "broken"})
