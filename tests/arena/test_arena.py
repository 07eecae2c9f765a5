"""The quality benchmark: its runs and that they are equal, how it goes on, what it reports."""

import contextlib
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retentive.arena import command as quality
from retentive.arena import report as quality_report
from retentive.arena.command import QualityBenchmark
from retentive.arena.plan import SIZES, VARIANTS, Job, Outcome, Recipe, model_options
from retentive.bench.command import main
from retentive.data.batches import BatchOrder
from retentive.data.dataset import prepare
from retentive.errors import InputError
from retentive.io.tensors import read_tensors
from retentive.models.build import build_model
from retentive.models.counts import parameters
from retentive.ops.decay import log_decay
from retentive.train.metrics import read_metrics
from retentive.train.trainer import Diverged, Trainer

WORDS = "the state of a retention network decays and never grows with what it has read".split()
TINY = Recipe(
    {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "decay": "linspace"},
    vocab_size=300,
    tokens=4 * 2 * 16,
    batch_size=2,
    seq_len=16,
    learning_rates=(1e-3, 1e-2),
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents, about 12 kB."""
    folder = tmp_path_factory.mktemp("documents")
    for n in range(40):
        words = (WORDS[(n * i + i * i) % len(WORDS)] for i in range(5 + 3 * n))
        (folder / f"{n}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)
    for module in ("arena.command", "train.loop"):
        monkeypatch.setattr(f"retentive.{module}.measure_gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("retentive.train.loop.plot_curve", lambda records, path: None)


@pytest.fixture
def options(documents: Path, tmp_path: Path) -> QualityBenchmark:
    return QualityBenchmark(
        size="tiny",
        sources=(str(documents),),
        variants=("retnet", "transformer"),
        seeds=(0, 1),
        out=tmp_path / "quality",
        device="cpu",
    )


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are made, as they are."""
    made: list[int] = []
    update = Trainer.update

    def counted(self: Trainer) -> dict[str, float]:
        result = update(self)
        made.append(self.step)
        return result

    monkeypatch.setattr(Trainer, "update", counted)
    return made


def report(options: QualityBenchmark) -> dict:
    return json.loads((options.out / "quality.json").read_text())


# The plan


@pytest.mark.parametrize("size", ["3m", "20m", "50m"])
def test_all_variants_have_equally_many_parameters(size: str):
    recipe = SIZES[size]
    counts = {
        name: sum(parameters(model_options(recipe, name).build(recipe.vocab_size)).values())
        for name in VARIANTS
    }
    millions = int(size.removesuffix("m"))
    for count in counts.values():
        assert count == pytest.approx(counts["retnet"], rel=0.01)
        assert count == pytest.approx(1e6 * millions, rel=0.05)


def test_the_ffn_takes_up_what_the_gate_leaves():
    """The runs of earlier versions are gone on with, so that this must not change by a row."""
    width = model_options(SIZES["3m"], "no-gate").fields["intermediate_size"]
    assert width == 2 * 192 + 192  # W_G is 192 x 384, a row more of the plain FFN 2 x 192


def test_variants_differ_from_the_retnet_in_what_they_are_named_for():
    recipe = SIZES["3m"]
    configs = {name: model_options(recipe, name).build(4096) for name in VARIANTS}
    retnet = configs["retnet"].to_dict()
    changed = {
        name: {key for key, value in config.to_dict().items() if value != retnet.get(key)}
        for name, config in configs.items()
        if name != "transformer"
    }
    assert changed == {
        "retnet": set(),
        "no-gate": {"gate", "intermediate_size"},
        "no-head-norm": {"head_norm"},
        "no-decay": {"decay"},
        "one-decay": {"decay"},
        "small-heads": {"num_heads"},
    }
    assert torch.all(log_decay(3, configs["no-decay"].mixer.decay) == 0)
    torch.testing.assert_close(
        log_decay(3, configs["one-decay"].mixer.decay).exp(), torch.full((3,), 127 / 128).double()
    )
    assert configs["small-heads"].mixer.qk_head_dim == configs["retnet"].mixer.qk_head_dim // 4
    with torch.device("meta"):
        assert build_model(configs["no-gate"]).layers[0].retention.g_proj is None


def test_the_sweep_comes_first_then_the_other_seeds_at_the_best_rate(options):
    plan = replace(options, learning_rates=(1e-2, 1e-3, 1e-2), seeds=(3, 5, 7)).plan()
    outcomes: dict[Job, Outcome] = {}
    losses = {("retnet", 1e-3): 2.0, ("retnet", 1e-2): 1.0, ("transformer", 1e-3): 3.0}
    jobs = []
    for job in plan.jobs(outcomes):
        jobs.append((job.variant, job.lr, job.seed))
        loss = losses.get((job.variant, job.lr))
        outcomes[job] = Outcome(valid_loss=loss, diverged=None if loss else "at once")
    assert jobs == [
        ("retnet", 1e-3, 3),
        ("retnet", 1e-2, 3),
        ("transformer", 1e-3, 3),
        ("transformer", 1e-2, 3),
        *(("retnet", 1e-2, 5), ("transformer", 1e-3, 5)),
        *(("retnet", 1e-2, 7), ("transformer", 1e-3, 7)),
    ]
    assert len(jobs) == plan.runs


def test_a_variant_that_always_diverges_has_no_other_seeds(options):
    plan, outcomes = options.plan(), {}
    for job in plan.jobs(outcomes):
        outcomes[job] = Outcome(diverged="x") if job.variant == "retnet" else Outcome(1.0, 1.0)
    assert {job.seed for job in outcomes if job.variant == "retnet"} == {0}


def test_runs_of_a_seed_see_the_same_tokens_in_the_same_order(options):
    plan = options.plan()
    split = prepare(plan.data()).train
    seen: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for job in plan.candidates():
        config = plan.config(job)
        assert config.data == plan.data()
        train = config.train
        order = BatchOrder(split, train.batch_size, train.seq_len, train.seed)
        assert train.steps == plan.steps == 4
        seen[job.seed].append(np.stack([order.batch(n).tokens.numpy() for n in range(4)]))
    for batches in seen.values():
        assert len(batches) == 4 and all(np.array_equal(batches[0], other) for other in batches)
    assert not np.array_equal(seen[0][0], seen[1][0])


# Running


def test_end_to_end(options, documents, updates, capsys):
    argv = ["quality", "--size", "tiny", "--sources", str(documents), "--seeds", "0", "1"]
    argv += ["--out", str(options.out), "--device", "cpu", "--threads", "1"]
    assert main(argv) == 0
    result = report(options)
    assert len(result["runs"]) == result["plan"]["runs"] == 7 * 3
    assert len(updates) == 21 * 4
    assert [v["name"] for v in result["variants"]] == list(VARIANTS)
    for variant in result["variants"]:
        mine = [
            r["valid_loss"]
            for r in result["runs"]
            if (r["variant"], r["lr"]) == (variant["name"], variant["lr"])
        ]
        assert variant["valid_loss"]["count"] == len(mine) == 2
        assert variant["valid_loss"]["mean"] == pytest.approx(np.mean(mine))
        assert variant["valid_loss"]["std"] == pytest.approx(np.std(mine, ddof=1))
        assert min(variant["sweep"].values()) == mine[0]
        assert (variant["carried_loss"] is None) == (variant["name"] == "transformer")
    shown = capsys.readouterr()
    assert all(variant.label in shown.out for variant in VARIANTS.values())
    assert "21 of 21 runs" in shown.out
    assert "run 1 of 21: RetNet, learning rate 0.001, seed 0" in shown.err
    assert (options.out / "quality.png").read_bytes().startswith(b"\x89PNG")
    figure = (options.out / "quality.svg").read_text()
    assert all(variant.label in figure for variant in VARIANTS.values())
    assert not list(options.out.rglob("checkpoints"))


def test_finished_runs_are_not_repeated_and_more_can_be_asked_for(options, updates):
    quality.run(options)
    before = report(options)
    assert len(updates) == 6 * 4
    updates.clear()
    quality.run(options)
    assert updates == [] and report(options) == before
    quality.run(replace(options, seeds=(0, 1, 2), variants=("retnet",)))
    assert len(updates) == 4
    assert report(options)["variants"][0]["valid_loss"]["count"] == 3


def test_runs_at_a_rate_that_is_no_longer_the_best_are_not_counted(options, updates, capsys):
    alone = replace(options, variants=("retnet",))
    quality.run(replace(alone, learning_rates=(1e-3,)))
    quality.run(alone)
    assert report(options)["variants"][0]["lr"] == 1e-2
    updates.clear()
    capsys.readouterr()
    quality.run(alone)
    assert updates == []
    assert len(report(options)["runs"]) == report(options)["plan"]["runs"] == 3
    assert "3 of 3 runs" in capsys.readouterr().out


def test_a_stopped_report_has_the_runs_behind_a_missing_one(options, updates, monkeypatch):
    quality.run(options)
    runs = report(options)["runs"]
    (options.out / "runs" / "retnet-lr0.001-seed0" / "outcome.json").unlink()
    monkeypatch.setattr(quality.Runs, "run", lambda self, job, show: None)
    quality.run(options)
    assert report(options)["runs"] == runs[1:]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_what_is_cut_off_goes_on_to_the_same_result(
    options, updates, tmp_path, monkeypatch, capsys, killed
):
    """Killed, it goes on from its last checkpoint, which is of the step before."""
    quality.run(options)
    whole = report(options)
    updates.clear()
    capsys.readouterr()

    again = replace(options, out=tmp_path / "again")
    update = Trainer.update

    def update_and_stop(self: Trainer) -> dict[str, float]:
        result = update(self)
        if len(updates) == 6:  # the second run's second step
            if killed:
                raise Killed
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "update", update_and_stop)
    with pytest.raises(Killed) if killed else contextlib.nullcontext():
        quality.run(again)
    assert len(updates) == 6
    assert len(report(again)["runs"]) == 1
    said = capsys.readouterr().out
    assert killed or ("1 of 6 runs" in said and "the same command goes on" in said)
    monkeypatch.setattr(Trainer, "update", update)

    quality.run(again)
    assert len(updates) == 6 * 4 + killed
    clock = {"seconds": None}
    assert [r | clock for r in report(again)["runs"]] == [r | clock for r in whole["runs"]]
    for job in options.plan().candidates():
        paths = [o.out / "runs" / job.name / "model.safetensors" for o in (options, again)]
        if paths[0].exists():
            one, other = (read_tensors(path, "the model")[0] for path in paths)
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_was_killed_after_its_last_step_is_only_validated(options, updates):
    plan = options.plan()
    corpus, job = prepare(plan.data()), next(plan.jobs({}))
    runs = quality.Runs(plan, corpus, options.out)
    outcome = runs.run(job)
    (options.out / "runs" / job.name / quality.OUTCOME).unlink()
    updates.clear()
    assert runs.run(job) == outcome
    assert updates == []


def test_a_retnet_is_validated_twice_with_its_state_carried_and_without(options):
    """Training itself validates a RetNet with it; a Transformer as this benchmark does."""
    plan = options.plan()
    corpus = prepare(plan.data())
    for variant in options.variants:
        job = Job(variant, 1e-3, 0)
        outcome = quality.Runs(plan, corpus, options.out).run(job)
        records = read_metrics(options.out / "runs" / job.name / "metrics.jsonl")
        (trained,) = [r["valid_loss"] for r in records if "valid_loss" in r]
        if variant == "retnet":
            assert outcome.carried_loss == trained != outcome.valid_loss
        else:
            assert outcome.carried_loss is None and outcome.valid_loss == trained


def test_a_diverged_run_is_a_result_and_the_others_go_on(options, monkeypatch, capsys):
    update = Trainer.update

    def diverge(self: Trainer) -> dict[str, float]:
        if self.config.optimizer.lr == 1e-2 or self.config.model.kind == "transformer":
            raise Diverged("the loss of step 1 is not finite; the run stops")
        return update(self)

    monkeypatch.setattr(Trainer, "update", diverge)
    quality.run(options)
    runs = report(options)["runs"]
    assert [r["diverged"] is None for r in runs] == [True, True, False, False, False]
    assert runs[2]["diverged"] == "the loss of step 1 is not finite"
    retnet, transformer = report(options)["variants"]
    assert (retnet["lr"], retnet["at_edge"]) == (1e-3, True)
    assert transformer["lr"] is None and transformer["valid_loss"] is None
    assert "diverged" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "update", update)
    quality.run(options)
    assert report(options)["runs"] == runs


def test_differences_are_taken_seed_by_seed(options):
    plan, outcomes = replace(options, learning_rates=(1e-3,)).plan(), {}
    losses = {("retnet", 0): 1.0, ("retnet", 1): 3.0, ("transformer", 0): 1.5}
    losses |= {("transformer", 1): 3.4}
    for job in plan.jobs(outcomes):
        outcomes[job] = Outcome(losses[job.variant, job.seed], 1.0)
    made = quality_report.Report(plan, prepare(plan.data()), "tiny", outcomes)
    retnet, transformer = made.summaries()
    assert retnet.against_base is None
    assert transformer.against_base.mean == pytest.approx(0.45)
    assert transformer.against_base.std == pytest.approx(0.1 / 2**0.5)
    assert transformer.against_base.show("+") == "+0.450 ± 0.071"
    assert not retnet.at_edge


def test_a_seed_that_diverged_at_the_best_rate_is_counted(options, capsys):
    plan = replace(options, variants=("retnet",), learning_rates=(1e-3,)).plan()
    outcomes = {Job("retnet", 1e-3, 0): Outcome(1.5, 0.5), Job("retnet", 1e-3, 1): Outcome()}
    made = quality_report.Report(plan, prepare(plan.data()), "tiny", outcomes)
    made.show(options.out)
    shown = capsys.readouterr().out
    assert "1, 1 diverged" in shown and "1.500 │" in shown


# What a user gets wrong


def refused(options: QualityBenchmark, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        quality.run(options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_folder_of_other_settings_is_refused_before_the_corpus_is_read(
    options, updates, monkeypatch
):
    quality.run(replace(options, variants=("retnet",), seeds=(0,), learning_rates=(1e-3,)))
    updates.clear()
    monkeypatch.setitem(SIZES, "other", replace(TINY, tokens=64))
    with monkeypatch.context() as patch:
        patch.delattr(quality, "prepare")
        refused(replace(options, size="other"), "size was 'tiny' and is 'other'", "tokens was 128")
        refused(replace(options, dtype="bfloat16"), "dtype was 'float32' and is 'bfloat16'")
        refused(replace(options, sources=("stdlib",)), "sources was", "'stdlib'", "another --out")
    monkeypatch.setitem(SIZES, "tiny", replace(TINY, batch_size=4))
    refused(options, "another version of this benchmark")
    assert updates == []


def test_a_corpus_that_has_changed_is_refused(options, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(40):
        (corpus / f"{n}.txt").write_text(" ".join(WORDS[n % 7 :] * 3))
    changed = replace(options, sources=(str(corpus),), variants=("retnet",), seeds=(0,))
    quality.run(changed)
    (corpus / "0.txt").write_text("another document")
    refused(changed, "the documents of --sources have changed", str(options.out))


def test_a_folder_of_something_else_is_refused(options):
    options.out.mkdir()
    (options.out / "thesis.tex").touch()
    refused(options, str(options.out), "holds no such benchmark")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--variants", "retnet", "no-gaet"], "unknown variant 'no-gaet' .did you mean 'no-gate'"),
        (["--size", "30m"], "unknown size '30m' .did you mean '3m'"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--learning-rates", "0"], r"optimizer.lr is 0.0; it must be above 0"),
        (["--seeds", "0", "-1"], "train.seed is -1"),
        (["--device", "cuda:99"], "cuda"),
        (["--dtype", "float16"], "choose bfloat16"),
        (["--sources", "no/such"], "no/such does not exist"),
        (["--variants"], "--variants is empty; give at least one"),
        (["--learning-rates", "--seeds", "1"], "--learning-rates is empty"),
    ],
)
def test_bad_options_are_refused(argv: list[str], words: str, tmp_path: Path):
    out = tmp_path / "quality"
    with pytest.raises(InputError, match=words):
        main(["quality", *argv, "--out", str(out)])
    assert not out.exists()
