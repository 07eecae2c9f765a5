"""`retentive bench quality`: the loss of a RetNet, its ablations and a Transformer, trained alike.

    runs/quality/
      settings.json                         the settings that all its runs share
      quality.json quality.png quality.svg  the report; the numbers are written after every run
      runs/retnet-lr0.004-seed0/            a run folder of `retentive train`, with its outcome

A run that has its outcome is never repeated; one that was killed goes on from its checkpoint.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retentive.arena.plan import SIZES, VARIANTS, Job, Outcome, Plan
from retentive.arena.report import Report
from retentive.bench.options import check_positive
from retentive.convert.loading import load
from retentive.data.dataset import Corpus, prepare
from retentive.devices import resolve_device
from retentive.errors import InputError, nearest
from retentive.io.atomic import write_text
from retentive.models.counts import flops_per_token
from retentive.train.config import RunConfig
from retentive.train.loop import OnUpdate, train
from retentive.train.metrics import measure_gemm_rate, read_metrics
from retentive.train.progress import Display
from retentive.train.trainer import Diverged, compute_dtype
from retentive.train.validate import validate

SETTINGS, OUTCOME = "settings.json", "outcome.json"
FORMAT = 1


@dataclass(frozen=True)
class QualityBenchmark:
    size: str = "3m"
    """About how many parameters: 3m, 20m or 50m. It also sets the defaults below, the batch and the
    vocabulary."""
    tokens: int | None = None
    """Training tokens of each run: 2M, 100M or 250M unless given."""
    sources: tuple[str, ...] = ("stdlib",)
    """The corpus, as data.sources of a training run."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """The models to train."""
    learning_rates: tuple[float, ...] | None = None
    """Every variant tries these with the first seed, and takes its best with the others. Unless
    given each is twice the one before, from 2e-3 to 1.6e-2 for 3m."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights and of the order of the documents."""
    out: Path = Path("runs/quality")
    """A folder for all runs and the report. The same command goes on there; more variants, rates
    or seeds add runs to it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Of matrix products: auto (bfloat16 on CUDA, else float32), float32 or bfloat16."""
    threads: int | None = None
    """Of a CPU; torch's choice unless given."""

    def __post_init__(self) -> None:
        _check_names("size", (self.size,), SIZES)
        _check_names("variant", self.variants, VARIANTS)
        for name in ("variants", "seeds", "sources", "learning_rates"):
            if getattr(self, name) == ():
                raise InputError(f"--{name.replace('_', '-')} is empty; give at least one")
        for name in ("tokens", "threads"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)

    def plan(self) -> Plan:
        recipe = SIZES[self.size]
        dtype = compute_dtype(self.dtype, resolve_device(self.device))
        return Plan(
            recipe=recipe,
            variants=tuple(dict.fromkeys(self.variants)),
            learning_rates=tuple(sorted(set(self.learning_rates or recipe.learning_rates))),
            seeds=tuple(dict.fromkeys(self.seeds)),
            tokens=self.tokens or recipe.tokens,
            sources=self.sources,
            device=self.device,
            dtype=str(dtype).removeprefix("torch."),
        )


def run(options: QualityBenchmark) -> None:
    """Raises InputError where the options, the corpus or the training refuse."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan, folder = options.plan(), options.out
    for job in plan.candidates():
        plan.config(job)  # refuses a bad learning rate or seed before anything runs
    settings = {
        "format": FORMAT,
        "size": options.size,
        "tokens": plan.tokens,
        "sources": list(plan.sources),
        "dtype": plan.dtype,
    }
    check_settings(folder, settings)
    corpus = prepare(plan.data(), progress=lambda line: print(line, file=sys.stderr))
    settings |= {"recipe": plan.recipe.digest(), "corpus": corpus.hash}
    check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    report = Report(plan, corpus, options.size)
    finished = Runs(plan, corpus, folder).run_all(report)
    report.save(folder)
    report.draw(folder)
    report.show(folder)
    if not finished:
        print("stopped; the same command goes on where it stopped")


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises InputError if the runs in `folder` were made with other `settings`, naming these.

    More variants, learning rates and seeds only add runs, so they are no settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and holds no such benchmark; give another --out")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        _difference(key, before.get(key), value)
        for key, value in settings.items()
        if before.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{folder} holds runs with other settings: {'; '.join(changed)}; change it back, or "
            "give another --out"
        )


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "corpus":
        return "the documents of --sources have changed"
    if key in ("format", "recipe"):
        return "they were made by another version of this benchmark"
    return f"{key} was {before!r} and is {now!r}"


class Runs:
    """The runs of a plan in a folder, one after the other."""

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path):
        self.plan, self.corpus, self.folder = plan, corpus, folder / "runs"
        self.device = resolve_device(plan.device)
        self.dtype = compute_dtype(plan.dtype, self.device)

    def run_all(self, report: Report) -> bool:
        """Adds all outcomes to the report, known ones first; False if it was stopped."""
        plan, steps = self.plan, self.plan.steps
        gemm_rate = measure_gemm_rate(self.device, self.dtype)
        for job in plan.jobs(report.outcomes):
            if (outcome := self.earlier(job)) is not None:
                self.record(job, outcome, report)
        done = len(report.outcomes)
        with Display(done * steps, plan.runs * steps, 0.0) as display:
            for number, job in enumerate(plan.jobs(report.outcomes)):
                if job in report.outcomes:
                    continue
                display.say(f"run {number + 1} of {plan.runs}: {job}")
                display.gemm_seconds = self._flops_per_token(job) / gemm_rate

                def show(step: int, loss: float, speed: float, before: int = done * steps):
                    display.update(before + step, loss, speed)

                outcome = self.run(job, show)
                if outcome is None:
                    return False
                display.say(f"  {outcome}")
                self.record(job, outcome, report)
                done += 1
        return True

    def record(self, job: Job, outcome: Outcome, report: Report) -> None:
        # Only resuming needs the checkpoints, which take three times the model's space
        shutil.rmtree(self.folder / job.name / "checkpoints", ignore_errors=True)
        report.outcomes[job] = outcome
        report.save(self.folder.parent)

    def earlier(self, job: Job) -> Outcome | None:
        path = self.folder / job.name / OUTCOME
        if not path.exists():
            return None
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))

    def run(self, job: Job, on_update: OnUpdate | None = None) -> Outcome | None:
        """Trains a run, or the rest of it, and validates it; None if it was stopped."""
        folder, config = self.folder / job.name, self.plan.config(job)
        resume = (folder / "checkpoints").is_dir()
        try:
            result = train(config, folder, resume=resume, quiet=True, on_update=on_update)
        except Diverged as error:
            outcome = Outcome(diverged=str(error).partition(";")[0])
        else:
            if not result.finished:
                return None
            outcome = self._validated(config, folder, result.valid_loss)
        write_text(folder / OUTCOME, json.dumps(asdict(outcome), indent=1) + "\n")
        return outcome

    def _validated(self, config: RunConfig, folder: Path, carried: float | None) -> Outcome:
        """`carried`: the loss that training itself found, with a RetNet's state carried on."""
        model = load(folder, device=str(self.device))
        loss, bits = validate(
            model,
            self.corpus,
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
            dtype=self.dtype,
            carry=False,
        )
        updates = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
        return Outcome(
            valid_loss=loss,
            bits_per_byte=bits,
            carried_loss=carried if config.model.kind == "retnet" else None,
            seconds=updates[-1]["seconds"],
        )

    def _flops_per_token(self, job: Job) -> float:
        config = self.plan.config(job).model.build(self.corpus.vocab_size)
        return 3 * flops_per_token(config, (self.plan.recipe.seq_len + 1) / 2)


def _check_names(what: str, given: tuple[str, ...], known: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                f"unknown {what} {name!r}{nearest(name, known)}; choose from {', '.join(known)}"
            )
