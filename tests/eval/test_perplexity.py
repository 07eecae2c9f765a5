import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from retentive.cli import main
from retentive.data.tokenizer import end_id, token_bytes
from retentive.errors import InputError
from retentive.eval import perplexity, perplexity_report
from retentive.eval.curves import BLOCK, Mean, buckets, curve
from retentive.eval.perplexity import Reading, document_losses

from .conftest import report, text, write_model

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, some hundred roundings


@pytest.fixture
def tokens(tokenizer) -> torch.Tensor:
    """50 tokens behind the end token."""
    ids = tokenizer.encode(text(100)).ids[:50]
    return torch.tensor([end_id(tokenizer), *ids])


def plain(model, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of each token behind the first, from one pass."""
    with torch.no_grad():
        log_p = model(tokens[None, :-1])[0][0].log_softmax(-1)
    return -log_p.gather(1, tokens[1:, None])[:, 0]


def test_a_whole_document_is_one_pass_whatever_the_segments(retnet, tokens, monkeypatch):
    monkeypatch.setattr(perplexity, "SEGMENT", 16)
    done = []
    losses, held = document_losses(retnet, tokens, Reading(), 4, done.append)
    torch.testing.assert_close(losses, plain(retnet, tokens), **EXACT)
    assert sum(done) == 50 and len(done) == 4
    assert held == retnet.init_state(1).nbytes


@pytest.mark.parametrize(
    ("window", "stride"), [(8, 8), (8, 4), (8, 1), (7, 3), (50, 10), (64, 32), (1, 1)]
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_are_rows_from_an_empty_state(model, tokens, window, stride, batch_size):
    """A token is predicted in the first row that has it."""
    expected = torch.full((50,), math.nan, dtype=torch.float64)
    for start in range(0, 50, stride):
        row = plain(model, tokens[start : start + window + 1])
        part = expected[start : start + window]
        part[part.isnan()] = row[part.isnan()]
    done = []
    reading = Reading(window, stride)
    losses, _ = document_losses(model, tokens, reading, batch_size, done.append)
    torch.testing.assert_close(losses, expected, **EXACT)
    assert sum(done) == 50


def test_a_mean_of_equal_blocks_has_the_usual_standard_error():
    nats = [1.0, 4.0, 2.0, 7.0]
    mean = Mean.of([(x, 2) for x in nats])
    assert (mean.tokens, mean.loss) == (8, sum(nats) / 8)
    assert mean.error == pytest.approx(statistics.stdev(nats) / 2 / 4**0.5)
    assert Mean.of([(3.0, 2)]) == Mean(2, 1.5, None)


def test_a_curve_sorts_blocks_by_their_position():
    assert list(buckets(2 * BLOCK + 1)) == [(0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 4 * BLOCK)]
    assert list(buckets(BLOCK)) == [(0, BLOCK)]
    long, short = [1.0, 2.0, 3.0, 5.0], [4.0]
    points = curve([(long, 3 * BLOCK + 5), (short, 10)])
    assert [(start, mean.tokens) for start, _, mean in points] == [
        (0, BLOCK + 10),
        (BLOCK, BLOCK),
        (2 * BLOCK, BLOCK + 5),
    ]
    assert points[0][2].loss == 5 / (BLOCK + 10) and points[2][2].loss == 8 / (BLOCK + 5)


@pytest.fixture
def corpus(folder: Path) -> Path:
    """Two documents, of more and of fewer tokens than a block."""
    path = Path("book.txt")
    path.write_text(f"{text(400)}\f{text(60, skip=4)}é")
    return path


def test_the_report_is_the_mean_over_all_tokens(corpus, capsys):
    command = ["eval", "perplexity", "runs/demo", str(corpus), "--windows", "64", "--dtype"]
    assert main([*command, "float64"]) == 0
    result = report("perplexity")
    whole, window = result["readings"]
    assert (whole["window"], window["window"], window["stride"]) == (None, 64, 32)
    counts = [document["tokens"] for document in result["documents"]]
    assert counts[0] > BLOCK > counts[1]
    assert result["bytes"] == len(corpus.read_text().replace("\f", "").encode())
    nats = sum(n * loss for n, loss in zip(counts, whole["by_document"], strict=True))
    assert whole["loss"] == pytest.approx(nats / sum(counts))
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"])
    assert sum(part["tokens"] for part in whole["by_position"]) == whole["tokens"] == sum(counts)
    assert whole["by_position"][0]["loss"] != window["by_position"][0]["loss"]
    shown = capsys.readouterr()
    assert f"{whole['loss']:.3f}" in shown.out and "2 documents" in shown.out
    assert "characters" in shown.err
    assert Path("runs/eval/demo/perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "half-lives of the heads" in Path("runs/eval/demo/perplexity.svg").read_text()


def test_the_losses_are_the_models(corpus, retnet, tokenizer):
    main(["eval", "perplexity", "runs/demo", str(corpus), "--dtype", "float64", "--limit", "1"])
    ids = tokenizer.encode(text(400)).ids
    # The folder's weights were rounded to float32, and so are these.
    expected = plain(retnet.float().double(), torch.tensor([end_id(tokenizer), *ids]))
    assert report("perplexity")["readings"][0]["loss"] == pytest.approx(float(expected.mean()))


def test_a_document_may_be_cut(corpus, tokenizer):
    main(["eval", "perplexity", "runs/demo", str(corpus), "--max-tokens", "20"])
    result = report("perplexity")
    assert [document["tokens"] for document in result["documents"]] == [20, 20]
    ids = tokenizer.encode(text(400)).ids[:20]
    assert result["documents"][0]["bytes"] == int(token_bytes(tokenizer)[ids].sum())
    assert len(tokenizer.decode(ids)) == result["documents"][0]["bytes"]


def test_a_killed_run_goes_on(corpus, monkeypatch):
    monkeypatch.setattr(perplexity_report.Report, "draw", lambda *args: None)
    command = ["eval", "perplexity", "runs/demo", str(corpus), "--windows", "64", "32"]
    main([*command, "--out", "whole"])
    read = []
    losses = perplexity.document_losses

    class Killed(BaseException):
        pass

    def counted(*args, **kwargs):
        if len(read) == 4:
            raise Killed
        read.append(args[2])
        return losses(*args, **kwargs)

    monkeypatch.setattr(perplexity, "document_losses", counted)
    with pytest.raises(Killed):
        main(command)
    with Path("runs/eval/demo/finished.jsonl").open("a") as file:
        file.write('["a line that was cut o')

    def counted_on(*args, **kwargs):
        read.append(args[2])
        return losses(*args, **kwargs)

    monkeypatch.setattr(perplexity, "document_losses", counted_on)
    main(command)
    assert len(read) == 6
    assert report("perplexity") == report("perplexity", Path("whole"))
    main(command)
    assert len(read) == 6


def test_a_transformer_is_read_by_windows(corpus, tokenizer, capsys):
    write_model(Path("runs/llama"), "transformer", tokenizer)
    command = ["eval", "perplexity", "runs/llama", str(corpus), "--windows"]
    assert main([*command, "64"]) == 0
    assert [r["window"] for r in report("perplexity", Path("runs/eval/llama"))["readings"]] == [64]
    assert "a Transformer's cache grows" in capsys.readouterr().out
    assert main(command) == 2
    assert "the state of this model grows with the sequence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/demo", "no.txt"], "no.txt does not exist"),
        (["none", "book.txt"], "no file or folder none"),
        (["runs/demo", "empty.txt"], "there is no text in empty.txt"),
        (["runs/demo", "book.txt", "--limit", "0"], "--limit is 0; give 1 or more"),
        (["runs/demo", "book.txt", "--windows", "0"], "--windows is 0; give 1 or more"),
        (["runs/demo", "book.txt", "--stride", "4096"], "--stride is 4096, longer than"),
        (["runs/demo", "book.txt", "--max-tokens", "-1"], "--max-tokens is -1; give 1"),
        (["runs/demo", "book.txt", "--batch-size", "0"], "--batch-size is 0; give 1"),
        (["runs/demo", "book.txt", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["runs/demo", "book.txt", "--out", "book.txt"], "holds no evaluations; give another"),
        (["runs/demo", "a.jsonl"], "no field 'text' (did you mean 'txt'?)"),
        (["runs/demo"], "there is no text to read; give files"),
    ],
)
def test_mistakes_are_one_line(corpus, capsys, arguments, words):
    Path("empty.txt").write_text(" \n")
    Path("a.jsonl").write_text(json.dumps({"txt": "a"}))
    assert main(["eval", "perplexity", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not Path("runs/eval").exists()


def test_results_of_another_model_are_left_alone(corpus, tokenizer, capsys):
    main(["eval", "perplexity", "runs/demo", str(corpus)])
    before = {path: path.read_bytes() for path in Path("runs/eval/demo").iterdir()}
    for other in (["--dtype", "bfloat16"], []):
        if not other:
            write_model(Path("runs/demo"), "transformer", tokenizer)
        command = ["eval", "perplexity", "runs/demo", str(corpus), *other]
        assert main(command) == 2
        assert "runs/eval/demo holds results of another model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs/eval/demo").iterdir()} == before


def test_evaluations_are_listed_and_the_nearest_is_named(capsys):
    assert main(["eval"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in ("perplexity", "tasks", "recall"))
    assert main(["eval", "perplexit"]) == 2
    assert "unknown evaluation 'perplexit' (did you mean 'perplexity'?)" in capsys.readouterr().err


def test_only_one_process_writes_to_a_folder(retnet, tokenizer, tmp_path):
    from retentive.eval.results import Results

    with Results(tmp_path / "out", "demo", "id"):
        with pytest.raises(InputError, match="another process writes results"):
            Results(tmp_path / "out", "demo", "id")
    with Results(tmp_path / "out", "demo", "id") as results:
        results.add("key", 1)
    finished = tmp_path / "out" / "finished.jsonl"
    finished.write_text("something else\n")
    with pytest.raises(InputError, match=r"finished.jsonl is damaged; delete it"):
        Results(tmp_path / "out", "demo", "id")
