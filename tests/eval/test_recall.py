"""The probes' answers against the whole texts read at once, in float64."""

import math
import random
from pathlib import Path

import pytest
import torch

from retentive.cli import main
from retentive.data.tokenizer import TextTokenizer, byte_tokenizer, end_id
from retentive.eval import recall
from retentive.eval.recall import Mqar, Passkey, ask_along
from retentive.eval.recall_report import Answer, Score
from retentive.models.counts import half_lives

from .conftest import build, report, write_model


def probes(tokenizer):
    text = TextTokenizer(tokenizer)
    return {"passkey": Passkey(text), "mqar": Mqar(text, 3)}


@pytest.mark.parametrize("name", ["passkey", "mqar"])
def test_answers_are_those_of_the_text_read_at_once(model, tokenizer, name):
    distances = [5, 20, 37]
    samples = [probes(tokenizer)[name].sample(random.Random(n), 37) for n in range(3)]
    read = []
    answers = ask_along(model, samples, distances, 4, read.append)
    assert sum(read) == 3 * 37
    for sample, found in zip(samples, answers, strict=True):
        for distance, answer in zip(distances, found, strict=True):
            asked = []
            for question in sample.questions:
                past = sample.told + sample.filler[:distance] + question.context
                scores, greedy = [], []
                for candidate in question.candidates:
                    tokens = torch.tensor([past + candidate])
                    with torch.no_grad():
                        log_p = model(tokens[:, :-1])[0][0, len(past) - 1 :].log_softmax(-1)
                    target = torch.tensor(candidate)
                    scores.append(float(log_p.gather(1, target[:, None]).sum()))
                    greedy.append(bool((log_p.argmax(-1) == target).all()))
                asked.append((scores, greedy[question.right], question.right))
            expected = Answer.of(asked)
            assert answer[:2] == expected[:2]
            assert answer.nats == pytest.approx(expected.nats, abs=1e-9)


def test_a_passkey_is_told_once_and_asked_for(tokenizer):
    sample = Passkey(TextTokenizer(tokenizer)).sample(random.Random(0), 100)
    told, filler = tokenizer.decode(sample.told[1:]), tokenizer.decode(sample.filler)
    (question,) = sample.questions
    keys = [tokenizer.decode(candidate) for candidate in question.candidates]
    assert sample.told[0] == end_id(tokenizer) and len(sample.filler) == 100
    assert f"The pass key is{keys[question.right]}." in told
    assert sum(key in told for key in keys) == 1 and not any(key in filler for key in keys)
    assert tokenizer.decode(question.context).endswith("The pass key is")


def test_pairs_are_of_different_tokens_and_none_is_filler(tokenizer):
    sample = Mqar(TextTokenizer(tokenizer), 3).sample(random.Random(0), 50)
    pairs = list(zip(sample.told[1::2], sample.told[2::2], strict=True))
    assert len(pairs) == 3 and len(set(sample.told)) == 7
    assert not set(sample.filler) & set(sample.told)
    for (key, value), question in zip(pairs, sample.questions, strict=True):
        assert question.context == [key] and question.candidates[question.right] == [value]


def test_tokens_that_the_model_lacks_are_no_candidates(tokenizer):
    mqar = Mqar(TextTokenizer(tokenizer, 257), 3)
    assert max(mqar.words) == 256


def test_an_answer_is_a_mean_over_questions():
    first = ([math.log(0.2), math.log(0.6)], False, 0)
    second = ([math.log(0.3), math.log(0.1)], True, 0)
    nats = -(math.log(0.25) + math.log(0.75)) / 2
    assert Answer.of([first, second]) == pytest.approx((0.5, 0.5, nats))
    assert Score.of([1.0]) == (1.0, None) and Score.of([0.0, 1.0]) == (0.5, 0.5)


COMMAND = ["eval", "recall", "runs/demo", "--max-distance", "100", "--samples", "5"]


def test_the_report_shows_half_lives_beside_recall(folder, capsys, retnet):
    assert main([*COMMAND, "--batch-size", "2"]) == 0
    result = report("recall")
    assert result["distances"] == [64, 100]
    assert result["half_lives"] == half_lives(retnet.config)
    assert result["probes"]["passkey"]["chance"] == 0.1
    assert result["probes"]["mqar"]["chance"] == 1 / 8
    for probe in result["probes"].values():
        assert [0 <= score["mean"] <= 1 for score in probe["chosen"]] == [True, True]
    shown = capsys.readouterr()
    assert "Half-lives of the heads, in tokens: 22, 44." in shown.out
    assert "0 of 2" in shown.out and "tokens" in shown.err
    assert Path("runs/eval/demo/recall.png").read_bytes().startswith(b"\x89PNG")
    assert "half-lives of the heads" in Path("runs/eval/demo/recall.svg").read_text()


def test_a_killed_run_goes_on(folder, monkeypatch):
    class Killed(BaseException):
        pass

    asked, along = [], recall.ask_along

    def counted(model, samples, *args):
        if len(asked) == 3:
            raise Killed
        asked.append(len(samples))
        return along(model, samples, *args)

    monkeypatch.setattr(recall.Report, "draw", lambda *args: None)
    command = [*COMMAND, "--batch-size", "2", "--dtype", "float64"]
    main([*command, "--out", "whole"])
    monkeypatch.setattr(recall, "ask_along", counted)
    with pytest.raises(Killed):
        main(command)
    assert asked == [2, 2, 1]
    monkeypatch.setattr(recall, "ask_along", along)
    main(command)
    main([*command, "--samples", "3"])  # all of them finished
    main(command)
    assert report("recall") == report("recall", Path("whole"))


def test_a_transformer_has_no_half_lives(folder, tokenizer, capsys):
    write_model(Path("runs/llama"), "transformer", tokenizer)
    command = ["eval", "recall", "runs/llama", *COMMAND[3:], "--probes", "mqar"]
    assert main(command) == 0
    assert report("recall", Path("runs/eval/llama"))["half_lives"] == []
    assert "alf-li" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--probes", "passkeys"], "unknown probe 'passkeys' (did you mean 'passkey'?)"),
        (["--probes"], "--probes is empty; choose passkey, mqar"),
        (["--samples", "0"], "--samples is 0; give 1 or more"),
        (["--pairs", "1"], "--pairs is 1; give 2 or more"),
        (["--max-distance", "0"], "--max-distance is 0; give 1 or more"),
        (["--pairs", "500"], "the vocabulary of 312 is too small; give at most 155"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, words):
    assert main(["eval", "recall", "runs/demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_tokenizer_of_another_model_is_refused(folder, capsys, tokenizer):
    from retentive.data.tokenizer import save_tokenizer
    from retentive.models.checkpoint import save_model

    save_model(build("retnet", 257).float(), folder)
    assert main(["eval", "recall", "runs/demo"]) == 2
    said = capsys.readouterr().err
    assert "and the model has 257; give the tokenizer.json" in said and said.count("\n") == 1
    assert main([*COMMAND, "--probes", "mqar"]) == 0  # with the tokens that both have
    save_tokenizer(byte_tokenizer(), folder)
    assert main([*COMMAND, "--probes", "mqar", "--out", "bytes"]) == 0
