"""A run from its first step, or from its last checkpoint, to its end."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retentive.adapters.initial_state import InitialState
from retentive.adapters.lora import Lora, check_targets
from retentive.data.dataset import Corpus, prepare
from retentive.data.tokenizer import save_tokenizer
from retentive.devices import resolve_device
from retentive.errors import InputError
from retentive.inference.generate import generate
from retentive.io.atomic import write_text
from retentive.models.config import config_from_dict
from retentive.models.counts import flops_per_token
from retentive.train.checkpoints import MODEL_FILES, OtherRun, RunFolder
from retentive.train.config import AdapterConfig, RunConfig
from retentive.train.interrupt import stop_requests
from retentive.train.metrics import MetricsLog, measure_gemm_rate, plot_curve, read_metrics
from retentive.train.progress import Display
from retentive.train.trainer import Trainer, autocast, compute_dtype, enough_memory
from retentive.train.validate import validate

RECORD = "run.json"
# They decide which tokens a step sees: a resumed run keeps them, as it keeps its model and corpus.
ORDER_KEYS = ("seed", "batch_size", "seq_len", "carry_state")
# What a run leaves, by its adapter.kind.
LEAVES = {"none": MODEL_FILES, "lora": Lora.files, "state": InitialState.files}
OnUpdate = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Result:
    """Where a run stands, with its last validation: over all held-out text once it is finished."""

    folder: Path
    step: int
    steps: int
    valid_loss: float | None
    """Nats a token; None, as are the bits, where nothing has been validated."""
    bits_per_byte: float | None

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    on_update: OnUpdate | None = None,
) -> Result:
    """Trains a model into `folder`, which is a model folder then; `resume`: from where it stopped.

    With an adapter, `folder` is the adapter's.

    SIGINT and SIGTERM end it after the step they fall in, saved. Progress goes to stderr unless
    `quiet`, and after every update its step, loss (nats a token) and tokens/s to `on_update`.

    Raises InputError for a folder that exists (or, with `resume`, does not), a model or corpus that
    is not the one resumed, a loss that is not finite (Diverged), a disk that cannot be written, and
    all that the model and the data refuse.
    """
    compute_dtype(config.train.dtype, resolve_device(config.train.device))  # refused at once
    if config.adapter.kind == "lora":
        check_targets(config.model.build(vocab_size=1), config.adapter.targets)
    leaves = LEAVES[config.adapter.kind]
    run_folder = RunFolder.open(Path(folder), resume=resume, model_files=leaves)
    corpus = prepare(config.data, progress=None if quiet else _tell)
    run = Run(config, run_folder, corpus)
    if run.step < config.train.steps or run.owed():
        run.go(quiet, on_update)
    validations = [r for r in read_metrics(run.log.path) if "valid_loss" in r]
    last = validations[-1] if validations else {}
    return Result(
        folder=run_folder.path,
        step=run.step,
        steps=config.train.steps,
        valid_loss=last.get("valid_loss"),
        bits_per_byte=last.get("bits_per_byte"),
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


class Run:
    """A trainer, the folder it is saved in, and what is reported on the way."""

    def __init__(self, config: RunConfig, folder: RunFolder, corpus: Corpus):
        self.config, self.folder, self.corpus = config, folder, corpus
        self.model_config = config.model.build(corpus.vocab_size)
        before: dict[str, Any] = {"step": 0, "seconds": 0.0}
        if checkpoint := folder.newest():
            before = _read_record(checkpoint)
            _check_unchanged(folder.path, before, self.description())
            _check_not_past(folder.path, before["step"], config.train.steps)
        self.trainer = Trainer(config, corpus, checkpoint)
        self.trainer.step = before["step"]
        self._began = time.perf_counter() - before["seconds"]
        with folder.writes(folder.path):
            if checkpoint:
                folder.publish(checkpoint)  # a kill may have come between the checkpoint and this
            self.log = MetricsLog(folder.path, before["step"], config.train.tensorboard)

    @property
    def step(self) -> int:
        return self.trainer.step

    @property
    def seconds(self) -> float:
        """Since the run began, the time between a stop and its resume left out."""
        return time.perf_counter() - self._began

    def description(self) -> dict[str, Any]:
        """What is trained on what: the config, the model with its sizes, the corpus's content."""
        return {
            "config": self.config.to_table(),
            "model": self.model_config.to_dict(),
            "corpus": self.corpus.hash,
        }

    def go(self, quiet: bool, on_update: OnUpdate | None = None) -> None:
        """Steps up to the last one, or up to the one in which a stop is asked for; saved then."""
        train, trainer = self.config.train, self.trainer
        gemm_rate = measure_gemm_rate(trainer.device, trainer.dtype)
        # Forward, gradients of what flows through, and of the weights unless these are frozen.
        passes = 3 if trainer.adapter is None else 2
        flops = passes * flops_per_token(self.model_config, (train.seq_len + 1) / 2)
        with (
            contextlib.closing(self.log),
            stop_requests() as stop,
            Display(self.step, train.steps, flops / gemm_rate, quiet) as display,
        ):
            display.say(
                f"{trainer.model.num_parameters() / 1e6:.1f}M parameters{self._share()}, "
                f"{self.corpus.train.num_tokens / 1e6:.1f}M tokens to train on; {trainer.device}, "
                f"{str(trainer.dtype).removeprefix('torch.')}, GEMM {gemm_rate / 1e9:,.0f} GFLOP/s"
            )
            stopping = False
            self._report(display)
            while self.step < train.steps and not stopping:
                loss, speed = self._update(display, flops / gemm_rate)
                if on_update is not None:
                    on_update(self.step, loss, speed)
                stopping = stop.made
                if stopping or self._due(train.save_every):
                    self._save()  # first: whatever fails in a report costs no step
                self._report(display)

    def _share(self) -> str:
        """How many parameters an adapter trains."""
        if self.trainer.adapter is None:
            return ""
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        return f", {trained:,} of them trained"

    def _update(self, display: Display, gemm_seconds: float) -> tuple[float, float]:
        """Its loss and tokens/s. `gemm_seconds`: a token's time at the machine's GEMM rate."""
        start = time.perf_counter()
        remedy = "lower --train.micro-batch (which changes no result), or set "
        remedy += "--train.checkpoint-layers"
        with enough_memory(f"step {self.step + 1}", self.trainer.device, remedy):
            update = self.trainer.update()
        speed = update["tokens"] / (time.perf_counter() - start)
        display.update(self.step, update["loss"], speed)
        self._record(
            **update,
            tokens_per_second=round(speed, 1),
            gemm_fraction=round(speed * gemm_seconds, 4),
            seconds=round(self.seconds, 2),
        )
        return update["loss"], speed

    def _due(self, every: int) -> bool:
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def _report(self, display: Display) -> None:
        for report in self.owed():
            report(display)

    def owed(self) -> list[Callable[[Display], None]]:
        """The validation and the sample due at this step; an end after its save may leave some."""
        train, owed = self.config.train, []
        if self.corpus.valid.num_tokens and self._is_owed("valid_loss", train.valid_every):
            owed.append(self._validate)
        if self._is_owed("sample", train.sample_every):
            owed.append(self._sample)
        return owed

    def _is_owed(self, key: str, every: int) -> bool:
        if self.step == 0 or not self._due(every):
            return False
        records = read_metrics(self.log.path)
        return not any(r["step"] == self.step and key in r for r in records)

    def _record(self, **values: Any) -> None:
        with self.folder.writes(self.log.path):
            self.log.write(self.step, **values)

    def _validate(self, display: Display) -> None:
        """During the run on the same few tokens each time, at its end on all of them."""
        train = self.config.train
        remedy = "take a smaller --train.batch-size (in a run of its own)"
        with enough_memory("validation", self.trainer.device, remedy):
            loss, bits = validate(
                self.trainer.model,
                self.corpus,
                batch_size=train.batch_size,
                seq_len=train.seq_len,
                dtype=self.trainer.dtype,
                max_tokens=None if self.step == train.steps else train.valid_tokens,
            )
        self._record(valid_loss=loss, bits_per_byte=bits)
        display.say(
            f"step {self.step}: validation loss {loss:.4f} nats a token, {bits:.4f} bits per byte"
        )
        curve = self.folder.path / "loss.png"
        with self.folder.writes(curve):
            plot_curve(read_metrics(self.log.path), curve)

    def _sample(self, display: Display) -> None:
        train = self.config.train
        with autocast(self.trainer.device, self.trainer.dtype):
            text = generate(
                self.trainer.model,
                self.corpus.tokenizer,
                train.sample_prompt,
                max_new_tokens=train.sample_tokens,
            )
        self._record(sample=train.sample_prompt + text)
        display.say(f"step {self.step}, a sample:\n{train.sample_prompt}{text}")

    def _save(self) -> None:
        with self.folder.writing(self.step, self.config.train.keep) as checkpoint:
            self.trainer.save(checkpoint)
            if self.trainer.adapter is None:
                save_tokenizer(self.corpus.tokenizer, checkpoint)
            progress = {"step": self.step, "seconds": self.seconds}
            write_text(checkpoint / RECORD, json.dumps(progress | self.description(), indent=2))


def _read_record(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(
            f"{checkpoint / RECORD} is damaged; delete {checkpoint}, and --resume goes on from the "
            "checkpoint before"
        ) from None


def _check_not_past(folder: Path, step: int, steps: int) -> None:
    if step > steps:
        raise InputError(
            f"{folder} is at step {step} already, past --train.steps {steps}; give a higher number"
        )


def _check_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError that names what a resumed run would change of its model, corpus or order."""
    model = config_from_dict(before["model"]).to_dict()  # with the fields that came since
    changed = _differences("model", model, now["model"])
    if before["corpus"] != now["corpus"]:
        data = [{**run["config"]["data"], "cache": None} for run in (before, now)]
        changed += _differences("data", *data) or ["the text behind data.sources has changed"]
    order = [{k: run["config"]["train"][k] for k in ORDER_KEYS} for run in (before, now)]
    changed += _differences("train", *order)
    none = dataclasses.asdict(AdapterConfig())  # of runs from before there were any
    changed += _differences(
        "adapter", *(run["config"].get("adapter", none) for run in (before, now))
    )
    if changed:
        raise OtherRun(
            f"cannot resume {folder}: {'; '.join(changed)}; change it back, or begin another run "
            "with --out"
        )


def _differences(table: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    # Through JSON, where what was read back and what was made are spelt alike.
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    return [
        f"{table}.{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
