"""lm-eval with our adaptor, on tasks made here: no network, nothing in the user's cache."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from retentive.cli import main
from retentive.data.tokenizer import TextTokenizer, end_id, load_tokenizer
from retentive.errors import InputError

from .conftest import build, report, text, write_model

EXACT = 1e-9  # float64, relative: the bar for lm-eval's own `hf` model

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {train: examples.jsonl, test: choice.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WHOLE = """
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
AWAY = """
task: away
dataset_path: nobody/nothing
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


pytestmark = pytest.mark.usefixtures("lm_eval_offline")


@pytest.fixture(scope="module")
def lm_eval(lm_eval_offline):
    """Our adaptor's module."""
    import retentive.eval.harness

    return retentive.eval.harness


def requests(*arguments) -> list:
    return [SimpleNamespace(args=each, task_name="a task") for each in arguments]


@pytest.fixture
def lm(lm_eval, model, tokenizer):
    return lm_eval.RetentiveLM(model, tokenizer=TextTokenizer(tokenizer), batch_size=4)


def plain(model, context: list[int], continuation: list[int]) -> float:
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_p = model(tokens[:, :-1])[0][0].log_softmax(-1)[len(context) - 1 :]
    return float(log_p.gather(1, torch.tensor(continuation)[:, None]).sum())


def test_log_likelihoods_follow_the_convention_of_lm_eval(lm, model, tokenizer):
    """One tokenization of the whole; a context's spaces go over; nothing is the end token."""
    context = text(30)
    pairs = [(context, " " + text(n, skip=4)) for n in (1, 3, 4)]
    pairs += [(context + " ", "the state"), ("a", "b"), ("", text(5)), (text(12), "ention")]
    found = lm.loglikelihood(requests(*pairs, pairs[0]))
    assert found[0] == found[-1]

    def encode(string: str) -> list[int]:
        return [end_id(tokenizer), *tokenizer.encode(string).ids]

    for (before, after), (value, greedy) in zip(pairs, found[:-1], strict=True):
        kept = before.rstrip()
        prefix = encode(kept) if kept else [end_id(tokenizer)]
        both = encode(before + after)
        assert value == pytest.approx(plain(model, prefix, both[len(prefix) :]), rel=EXACT)
        assert greedy is False


def test_a_text_is_rolled_whole_or_by_windows(lm_eval, lm, model, tokenizer):
    """As in lm-eval's `hf`, which predicts the token that a tokenizer puts before a text, too."""
    end = end_id(tokenizer)
    long, short = ([end, *tokenizer.encode(text(n)).ids] for n in (30, 4))
    texts = [(text(30),), (text(4),)]
    whole = [plain(model, [end], long), plain(model, [end], short)]
    assert lm.loglikelihood_rolling(requests(*texts)) == pytest.approx(whole, rel=EXACT)
    cut = lm_eval.RetentiveLM(model, tokenizer=TextTokenizer(tokenizer), max_length=8)
    parts = plain(model, [end], long[:8])
    for start in range(8, len(long), 8):
        stop = min(start + 8, len(long))
        parts += plain(model, long[stop - 9 : start], long[start:stop])
    assert cut.loglikelihood_rolling(requests(texts[0])) == pytest.approx([parts], rel=EXACT)


def test_max_length_keeps_the_last_tokens(lm_eval, model, tokenizer):
    lm = lm_eval.RetentiveLM(model, tokenizer=TextTokenizer(tokenizer), max_length=8)
    ids = tokenizer.encode(text(30)).ids
    context, continuation = text(30).rsplit(" ", 1)
    ((value, _),) = lm.loglikelihood(requests((context, " " + continuation)))
    first = len(tokenizer.encode(context).ids)
    assert value == pytest.approx(plain(model, ids[-9:first], ids[first:]), rel=EXACT)
    with pytest.raises(InputError, match=r"max_length is 8, the continuation .* has \d+ tokens"):
        lm.loglikelihood(requests((context, " " + text(30))))


def test_generation_is_greedy_until_a_stop_string(lm, model, tokenizer):
    contexts, most = [text(n) for n in (3, 9, 1, 5, 5)], 8
    written = []
    for context in contexts:
        tokens = [end_id(tokenizer), *tokenizer.encode(context).ids]
        for _ in range(most):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
        written.append(tokenizer.decode(tokens[-most:]))
    stop = written[0][2]
    for until in ([], [stop, ""]):
        options = {"until": until, "max_gen_toks": most, "do_sample": False, "temperature": 0.0}
        found = lm.generate_until(requests(*((context, options) for context in contexts)))
        expected = [string.split(stop)[0] if until else string for string in written]
        assert found == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True, "temperature": 0.5}, "other than greedy generation"),
        ({"num_beams": 4}, "other than greedy generation"),
        ({"repetition_penalty": 2.0}, "hold repetition_penalty, which greedy generation"),
    ],
)
def test_what_is_no_greedy_generation_is_refused(lm, options, words):
    with pytest.raises(InputError, match=words):
        lm.generate_until(requests(("a", {"until": ["\n"], **options})))


def test_an_empty_continuation_is_refused(lm):
    with pytest.raises(InputError, match="how likely '' is after 'a b', which is no token"):
        lm.loglikelihood(requests(("a b", "")))


@pytest.fixture
def tasks(folder: Path) -> Path:
    """A folder of tasks beside runs/demo."""
    own = Path("tasks")
    own.mkdir()
    for yaml in (CHOICE, LAST_WORD, WHOLE, WRITES, AWAY):
        (own / f"{yaml.split()[1]}.yaml").write_text(yaml)
    rows = [
        {"question": text(30, n), "choices": [text(k, n + k) for k in (3, 4, 5)], "label": n % 3}
        for n in range(6)
    ]
    for name, part in (("examples", rows[:2]), ("choice", rows[2:])):
        (own / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    lines = [json.dumps({"text": text(20, n)}) for n in range(4)]
    (own / "lines.jsonl").write_text("\n".join(lines))
    return own


def test_a_folder_of_tasks_is_run_and_what_is_not_here_is_told(tasks, capsys):
    assert main(["eval", "tasks", "runs/demo", "--include", "tasks", "--dtype", "float64"]) == 0
    result = report("tasks")
    rows = {row["task"]: row for row in result["tasks"]}
    assert rows.keys() == {"choice", "last_word", "whole", "writes"}
    assert rows["choice"]["documents"] == rows["whole"]["documents"] == 4
    assert [row["task"] for row in result["not_run"]] == ["away"]
    assert "nobody/nothing" in result["not_run"][0]["reason"]
    accuracy = rows["choice"]["metrics"]["acc"]
    assert accuracy["error"] == pytest.approx(
        math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 3)
    )
    assert rows["last_word"]["metrics"]["perplexity"]["error"] > 0
    shown = capsys.readouterr()
    assert "away not run: " in shown.out and f"{accuracy['value']:.4f} ±" in shown.out
    assert "choice · 12/12 requests" in shown.err


def test_the_metrics_are_of_the_models_own_likelihoods(tasks, tokenizer):
    main(["eval", "tasks", "runs/demo", "--include", "tasks", "--dtype", "float64"])
    rows = {row["task"]: row["metrics"] for row in report("tasks")["tasks"]}
    model = build("retnet", tokenizer.get_vocab_size()).float().double()
    right, nats, words, end = 0, 0.0, [], end_id(tokenizer)
    for line in (tasks / "choice.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = [end, *tokenizer.encode(row["question"]).ids]
        scores = []
        for choice in row["choices"]:
            both = [end, *tokenizer.encode(f"{row['question']} {choice}").ids]
            scores.append(plain(model, context, both[len(context) :]))
        right += scores.index(max(scores)) == row["label"]
    assert rows["choice"]["acc"]["value"] == right / 4
    size = 0
    for line in (tasks / "lines.jsonl").read_text().splitlines():
        string = json.loads(line)["text"]
        ids = [end, *tokenizer.encode(string).ids]
        nats -= plain(model, [end], ids)
        first = 1 + len(tokenizer.encode(string.rsplit(" ", 1)[0]).ids)
        words.append(plain(model, ids[:first], ids[first:]))
        size += len(string)
    assert rows["whole"]["bits_per_byte"]["value"] == pytest.approx(nats / size / math.log(2))
    assert rows["last_word"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(words) / 4))


def test_shots_and_limit_and_what_an_earlier_run_had(tasks):
    command = ["eval", "tasks", "runs/demo", "--include", "tasks", "--tasks", "choice"]
    for more in ([], ["--shots", "2"], ["--limit", "1"], []):
        assert main([*command, *more]) == 0
    rows = [(row["shots"], row["limit"], row["documents"]) for row in report("tasks")["tasks"]]
    assert sorted(rows, key=str) == [(0, 1, 1), (0, None, 4), (2, None, 4)]


def test_a_killed_run_goes_on(tasks, lm_eval, monkeypatch):
    class Killed(BaseException):
        pass

    finished, finish = [], lm_eval.RetentiveLM._finish

    def counted(self, *args):
        if len(finished) == 15:
            raise Killed
        finished.append(args[:2])
        finish(self, *args)

    command = ["eval", "tasks", "runs/demo", "--include", "tasks", "--dtype", "float64"]
    main([*command, "--out", "whole"])
    monkeypatch.setattr(lm_eval.RetentiveLM, "_finish", counted)
    with pytest.raises(Killed):
        main(command)
    monkeypatch.setattr(
        lm_eval.RetentiveLM,
        "_finish",
        lambda self, *args: (finished.append(args[:2]), finish(self, *args)),
    )
    main(command)
    assert len(finished) == 12 + 4 + 4 + 4
    results = [report("tasks", out)["tasks"] for out in (Path("whole"), Path("runs/eval/demo"))]
    whole, again = ([row | {"seconds": None} for row in rows] for rows in results)
    assert whole == again


def test_the_adaptor_has_a_name_in_lm_eval(lm_eval, folder):
    from lm_eval.api.registry import get_model

    assert get_model("retentive") is lm_eval.RetentiveLM
    lm = get_model("retentive").create_from_arg_string(
        "pretrained=runs/demo,dtype=float64,share=False,max_length=64", {"batch_size": "auto"}
    )
    ((value, _),) = lm.loglikelihood(requests(("a", "b")))
    assert value < 0 and lm.max_length == 64


@pytest.mark.parametrize(
    ("config", "begin", "put_before"),
    [
        (None, 0, True),
        ({}, 0, True),
        ({"bos_token": {"content": "a"}}, "a", True),
        ({"bos_token": "<|end|>", "add_bos_token": False}, 0, False),
        ({"bos_token": "a", "eos_token": "<|end|>", "add_bos_token": True}, "a", False),
        ({"eos_token": "e"}, "e", False),
    ],
)
def test_texts_begin_as_the_folder_says(folder, tokenizer, config, begin, put_before):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = TextTokenizer(load_tokenizer(folder))
    assert text.begin == (tokenizer.token_to_id(begin) if begin else end_id(tokenizer))
    ids = tokenizer.encode("the state").ids
    assert text.encode("the state", begin=False) == ids
    assert text.encode("the state", begin=True) == ([text.begin, *ids] if put_before else ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--include", "tasks", "--tasks", "choise"],
            "unknown task 'choise' (did you mean 'choice'?)",
        ),
        (["--include", "taks"], "--include taks is no folder"),
        (["--include", "runs"], "--include runs holds no task"),
        (["--include", "tasks", "--limit", "0"], "--limit is 0; give 1 or more"),
        (["--include", "tasks", "--shots", "-1"], "--shots is -1; give 0 or more"),
        (["--include", "tasks", "--tasks"], "--tasks is empty"),
    ],
)
def test_mistakes_are_one_line(tasks, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", "no-tasks-but-ours/manager.py")
    assert main(["eval", "tasks", "runs/demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not Path("runs/eval").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["away"], "away not run: "),
        (["choice", "--shots", "3"], "choice not run: ValueError: Sample larger than population"),
        (["broken"], "broken not run: UndefinedError: 'nothing' is undefined"),
    ],
)
def test_without_any_result_the_exit_code_says_so(tasks, capsys, arguments, reason):
    broken = CHOICE.replace("task: choice", "task: broken").replace("{{question}}", "{{nothing.x}}")
    (tasks / "broken.yaml").write_text(broken)
    assert main(["eval", "tasks", "runs/demo", "--include", "tasks", "--tasks", *arguments]) == 1
    assert reason in capsys.readouterr().out
    assert len(report("tasks")["not_run"]) == 1


def test_results_of_another_model_are_left_alone(tasks, capsys, tokenizer):
    command = ["eval", "tasks", "runs/demo", "--include", "tasks", "--tasks", "choice"]
    assert main(command) == 0
    write_model(Path("runs/demo"), "transformer", tokenizer)
    assert main(command) == 2
    assert "holds results of another model" in capsys.readouterr().err


def test_results_of_another_way_to_begin_texts_are_left_alone(tasks, capsys):
    command = ["eval", "tasks", "runs/demo", "--include", "tasks", "--tasks", "choice"]
    assert main(command) == 0
    settings = json.dumps({"bos_token": "a"})
    (tasks.parent / "runs/demo/tokenizer_config.json").write_text(settings)
    assert main(command) == 2
    assert "holds results of another model" in capsys.readouterr().err


def test_a_bad_document_stops_its_task_only(tasks, capsys):
    rows = (tasks / "choice.jsonl").read_text().splitlines()
    rows[2] = json.dumps(json.loads(rows[2]) | {"choices": []})
    (tasks / "bad.jsonl").write_text("\n".join(rows))
    bad = CHOICE.replace("task: choice", "task: bad").replace("test: choice", "test: bad")
    (tasks / "bad.yaml").write_text(bad)
    command = ["eval", "tasks", "runs/demo", "--include", "tasks", "--tasks", "bad", "choice"]
    assert main(command) == 0
    assert [row["task"] for row in report("tasks")["not_run"]] == ["bad"]
    assert [row["task"] for row in report("tasks")["tasks"]] == ["choice"]
    assert "bad not run: " in capsys.readouterr().out


def test_without_lm_eval_a_line_says_what_to_install(tasks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "tasks", "runs/demo", "--include", "tasks"]) == 2
    assert 'pip install "retentive[eval]"' in capsys.readouterr().err


LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str
)
def test_texts_begin_as_in_the_hf_model(lm_eval, folder, tokenizer, settings, template):
    """A folder with the settings of other people's tokenizers; transformers asks the template."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    import retentive.hf  # noqa: F401

    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(list(LLAMA.values()))
    if template:
        begin = ("<s>", other.token_to_id("<s>"))
        other.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    write_model(folder, "retnet", other)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | settings))
    theirs = HFLM(str(folder), dtype="float64", device="cpu", batch_size=3, max_length=512)
    ours = lm_eval.RetentiveLM(folder, dtype="float64", batch_size=3)
    pairs = requests((text(9), " the state"), ("", text(4)), ("of ", "it"))
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for one, other in zip(ours.loglikelihood(pairs), expected, strict=True):
        assert one == pytest.approx(other, rel=EXACT)
    texts = requests((text(30),), (text(3),))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    ("dtype", "exact"), [("float64", EXACT), ("float32", 1e-5)], ids=["float64", "float32"]
)
def test_log_likelihoods_are_those_of_the_hf_model(lm_eval, folder, dtype, exact):
    """Of the same folder. Both numbers are the bars of this evaluation."""
    from lm_eval.models.huggingface import HFLM

    import retentive.hf  # noqa: F401 (its models are AutoModels then)

    theirs = HFLM(str(folder), dtype=dtype, device="cpu", batch_size=3, max_length=512)
    ours = lm_eval.RetentiveLM(folder, dtype=dtype, batch_size=3)
    pairs = [(text(25, n), f" {text(k, n + k)}") for n in range(3) for k in (1, 2, 4)]
    pairs += [("", text(4)), ("a token ", "reads"), ("a", "b"), pairs[0]]
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    for one, other in zip(ours.loglikelihood(requests(*pairs)), expected, strict=True):
        assert one == pytest.approx(other, rel=exact)
    texts = requests((text(30),), (text(3),))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=exact)
    options = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    prompts = requests(*((text(n), options) for n in (3, 7, 2)))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
