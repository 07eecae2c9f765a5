"""Whole runs: what they leave in their folder, how they stop, and how they go on."""

import errno
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.cli import main
from retentive.errors import InputError
from retentive.train.checkpoints import RunFolder
from retentive.train.config import RunConfig
from retentive.train.loop import train
from retentive.train.metrics import measure_gemm_rate, plot_curve, read_metrics
from retentive.train.trainer import Trainer

Tiny = Callable[..., RunConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights to the last bit, and the same metrics but for the clock's."""
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    clock = ("seconds", "tokens_per_second", "gemm_fraction")
    records = [
        [
            {k: v for k, v in r.items() if k not in clock}
            for r in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (one, other)
    ]
    assert records[0] == records[1]


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`signal_after(step, number)`: the process gets the signal as that step ends."""

    def arrange(step: int, number: int) -> None:
        update = Trainer.update

        def update_and_signal(self: Trainer) -> dict[str, float]:
            result = update(self)
            if self.step == step:
                signal.raise_signal(number)
            return result

        monkeypatch.setattr(Trainer, "update", update_and_signal)

    return arrange


def test_a_run_learns_and_leaves_a_model_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("retentive.train.loop.plot_curve", plot_curve)
    out = tmp_path / "run"
    result = train(tiny(train={"steps": 60, "valid_every": 20}), out, quiet=True)
    assert result.finished
    losses = [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 60
    assert losses[-1] < 0.6 * losses[0]
    validations = [r for r in read_metrics(out / "metrics.jsonl") if "valid_loss" in r]
    assert [r["step"] for r in validations] == [20, 40, 60]
    assert validations[-1]["bits_per_byte"] == result.bits_per_byte < 0.6 * 8
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = retentive.load(out), retentive.load_tokenizer(out)
    assert retentive.generate(model, tokenizer, "the ", max_new_tokens=5)


def test_the_newest_checkpoints_are_kept_each_a_model_folder(tiny: Tiny, tmp_path: Path):
    out = tmp_path / "run"
    train(tiny(), out, quiet=True)
    kept = RunFolder(out).checkpoints()
    assert [folder.name for folder in kept] == ["step-00000004", "step-00000006"]
    for folder in kept:
        retentive.load(folder)
    assert_same = zip(weights(kept[-1]).values(), weights(out).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in assert_same)
    hidden = [path.name for path in out.rglob(".*")]
    assert hidden == []


def test_updates_are_told_as_they_are_made(tiny: Tiny, tmp_path: Path):
    told = []
    train(tiny(), tmp_path / "run", quiet=True, on_update=lambda *update: told.append(update))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    updates = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert [(step, loss) for step, loss, _ in told] == updates
    assert all(speed > 0 for _, _, speed in told)


def test_samples_and_speed_are_recorded(tiny: Tiny, tmp_path: Path):
    train(tiny(train={"steps": 2, "sample_every": 1}), tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(r.get("sample", "").startswith("def ") for r in records) == 2
    update = records[0]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} < update.keys()
    assert update["tokens_per_second"] > 0 and update["gemm_fraction"] > 0


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, signal.SIGINT),
        ({"carry_state": True}, signal.SIGTERM),
        ({"micro_batch": 3}, signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny: Tiny,
    tmp_path: Path,
    signal_after: Callable[[int, int], None],
    changes: dict[str, Any],
    number: int,
):
    """With dropout, so that the random numbers go on, too. Step 3 is none at which runs save."""
    config = tiny(train=changes)
    train(config, tmp_path / "whole", quiet=True)
    signal_after(3, number)
    stopped = train(config, tmp_path / "cut", quiet=True)
    assert (stopped.step, stopped.finished) == (3, False)
    assert train(config, tmp_path / "cut", resume=True, quiet=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_measuring_the_machine_leaves_the_random_numbers_as_they_are(
    tiny: Tiny,
    tmp_path: Path,
    signal_after: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
):
    """Else dropout would go on differently after a stop than without one."""
    monkeypatch.setattr(
        "retentive.train.loop.measure_gemm_rate",
        lambda device, dtype: measure_gemm_rate(device, dtype, seconds=0.05),
    )
    before = torch.get_rng_state()
    assert measure_gemm_rate(torch.device("cpu"), torch.float32, seconds=0.05) > 0
    assert torch.equal(torch.get_rng_state(), before)
    train(tiny(), tmp_path / "whole", quiet=True)
    signal_after(3, signal.SIGINT)
    train(tiny(), tmp_path / "cut", quiet=True)
    train(tiny(), tmp_path / "cut", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("report", ["validate", "generate", "plot_curve"])
@pytest.mark.parametrize("step", [2, 6])
def test_a_report_that_fails_loses_no_step_and_is_made_up_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str, step: int
):
    every = step % 6  # 0: only at the end
    config = tiny(train={"save_every": 2, "valid_every": every, "sample_every": every})
    train(config, tmp_path / "whole", quiet=True)

    def fail(*arguments: Any, **options: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(f"retentive.train.loop.{report}", fail)
        with pytest.raises(ArithmeticError):
            train(config, tmp_path / "cut", quiet=True)
    newest = RunFolder(tmp_path / "cut").newest()
    assert newest is not None and newest.name == f"step-{step:08d}"
    assert train(config, tmp_path / "cut", resume=True, quiet=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_second_signal_interrupts_at_once(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_after: Callable[[int, int], None],
):
    before = signal.getsignal(signal.SIGINT)
    signal_after(3, signal.SIGINT)
    signal_after(3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert train(tiny(), tmp_path / "run", resume=True, quiet=True).finished


def test_the_command_prints_what_continues_it(
    texts: Path,
    tmp_path: Path,
    signal_after: Callable[[int, int], None],
    capsys: pytest.CaptureFixture[str],
):
    """From the file to the end: stopped, continued by the printed command, finished, told so."""
    config = tmp_path / "tiny.toml"
    config.write_text("[model]\nhidden_size = 16\nnum_hidden_layers = 1\nnum_heads = 2\n")
    argv = ["train", str(config), "--out", str(tmp_path / "my run"), "--device", "cpu"]
    argv += ["--data.sources", str(texts), "--data.tokenizer", "bytes", "--train.steps", "4"]
    argv += ["--train.seq-len=32", "--train.sample_tokens", "2", "--data.valid-fraction", "0.2"]
    signal_after(2, signal.SIGTERM)
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith("stopped: 2 of 4 steps")
    again = shlex.split(said.split("continue with: ")[1])
    assert again == ["retentive", *argv, "--resume"]
    assert main(again[1:]) == 0
    finished = capsys.readouterr().out
    assert "is finished: 4 of 4 steps" in finished and "bits per byte" in finished
    assert main(again[1:]) == 0
    assert capsys.readouterr().out == finished


def test_a_higher_number_of_steps_continues_a_finished_run(tiny: Tiny, tmp_path: Path):
    train(tiny(), tmp_path / "run", quiet=True)
    longer = train(tiny(train={"steps": 8}), tmp_path / "run", resume=True, quiet=True)
    assert (longer.step, longer.finished) == (8, True)


def test_a_run_past_the_number_of_steps_is_refused(tiny: Tiny, tmp_path: Path):
    train(tiny(), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match=r"is at step 6 already, past --train\.steps 3; give"):
        train(tiny(train={"steps": 3}), tmp_path / "run", resume=True, quiet=True)


def test_a_damaged_record_is_named(tiny: Tiny, tmp_path: Path):
    train(tiny(), tmp_path / "run", quiet=True)
    (tmp_path / "run/checkpoints/step-00000006/run.json").write_text('{"step": 6, "se')
    with pytest.raises(InputError, match=r"run\.json is damaged; delete .*step-00000006, and"):
        train(tiny(), tmp_path / "run", resume=True, quiet=True)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tiny: Tiny, tmp_path: Path):
    train(tiny(), tmp_path / "whole", quiet=True)
    cut = tmp_path / "cut"
    (cut / "checkpoints" / ".step-00000002").mkdir(parents=True)
    (cut / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    train(tiny(), cut, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", cut)


def test_a_run_that_was_refused_before_it_began_needs_no_resume(tiny: Tiny, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="too few for one batch"):
        train(tiny(train={"seq_len": 100_000}), out, quiet=True)
    assert train(tiny(), out, quiet=True).finished


def test_an_existing_folder_needs_resume_and_resume_an_existing_run(tiny: Tiny, tmp_path: Path):
    train(tiny(), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="exists already; --resume continues"):
        train(tiny(), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="holds no run to resume"):
        train(tiny(), tmp_path / "runn", resume=True, quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        train(tiny(), tmp_path / "file", quiet=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"hidden_size": 32}}, "model.hidden_size was 16 and is 32"),
        ({"model": {"kind": "transformer"}}, "model.model_type was 'retentive'"),
        ({"data": {"valid_fraction": 0.3}}, "data.valid_fraction was 0.2 and is 0.3"),
        ({"train": {"seq_len": 16}}, "train.seq_len was 32 and is 16"),
        ({"train": {"carry_state": True}}, "train.carry_state was False and is True"),
    ],
)
def test_a_resume_with_something_else_is_refused(
    tiny: Tiny, tmp_path: Path, changes: dict[str, dict[str, Any]], named: str
):
    train(tiny(), tmp_path / "run", quiet=True)
    before = weights(tmp_path / "run")
    with pytest.raises(InputError, match="cannot resume") as caught:
        train(tiny(**changes), tmp_path / "run", resume=True, quiet=True)
    assert named in str(caught.value)
    assert before.keys() == weights(tmp_path / "run").keys()


def test_a_run_from_before_a_field_came_goes_on(tiny: Tiny, tmp_path: Path):
    """As those of an older version, whose models had what is the default now."""
    train(tiny(train={"steps": 2}), tmp_path / "run", quiet=True)
    checkpoint = RunFolder(tmp_path / "run").newest()
    assert checkpoint is not None
    for name in ("run.json", "config.json"):
        record = json.loads((checkpoint / name).read_text())
        del record.get("model", record)["gate"]
        (checkpoint / name).write_text(json.dumps(record))
    assert train(tiny(train={"steps": 3}), tmp_path / "run", resume=True, quiet=True).finished


@pytest.fixture
def copied_texts(texts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(texts, tmp_path / "texts"))


def test_a_resume_on_changed_texts_is_refused(tiny: Tiny, tmp_path: Path, copied_texts: Path):
    config = tiny(data={"sources": [str(copied_texts)]})
    train(config, tmp_path / "run", quiet=True)
    (copied_texts / "7.txt").write_text("something else")
    with pytest.raises(InputError, match=r"the text behind data\.sources has changed"):
        train(config, tmp_path / "run", resume=True, quiet=True)


def test_what_changes_neither_model_nor_data_may_change(
    tiny: Tiny, tmp_path: Path, copied_texts: Path
):
    """The same texts elsewhere, another cache, another rate, other pieces of a batch."""
    train(tiny(train={"steps": 2}), tmp_path / "run", quiet=True)
    changed = tiny(
        data={"sources": [str(copied_texts)], "cache": str(tmp_path / "cache")},
        optimizer={"lr": 1e-3},
        train={"micro_batch": 1},
    )
    assert train(changed, tmp_path / "run", resume=True, quiet=True).finished


class FullDisk:
    """Stands for a function that writes: the `n`-th call finds no space left."""

    def __init__(self, write: Callable[..., None], n: int):
        self.write, self.left = write, n

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.write(*arguments, **options)


@pytest.mark.parametrize(
    ("function", "n"),
    [
        ("retentive.models.checkpoint.write_tensors", 2),
        ("retentive.train.trainer.write_tensors", 2),
        ("retentive.train.loop.write_text", 2),
        ("retentive.train.loop.save_tokenizer", 2),
        ("os.rename", 2),
    ],
)
def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, n: int
):
    train(tiny(), tmp_path / "whole", quiet=True)
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        module, name = function.rsplit(".", 1)
        write = getattr(importlib.import_module(module), name)
        patch.setattr(function, FullDisk(write, n))
        with pytest.raises(InputError, match="No space left on device") as caught:
            train(tiny(), out, quiet=True)
    good = out / "checkpoints" / "step-00000002"
    assert str(caught.value) == (
        f"cannot write {good.with_name('step-00000004')}: No space left on device; "
        f"{good} is whole: make room, then --resume"
    )
    assert [path.name for path in good.parent.iterdir()] == ["step-00000002"]
    retentive.load(out)
    train(tiny(), out, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_too_full_for_a_line_of_metrics(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from retentive.train.metrics import MetricsLog

    train(tiny(), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        full = FullDisk(MetricsLog.write, 4)
        patch.setattr(MetricsLog, "write", lambda *a, **o: full(*a, **o))
        with pytest.raises(
            InputError, match=r"metrics\.jsonl: No space left.*step-00000002 is whole"
        ):
            train(tiny(), tmp_path / "cut", quiet=True)
    train(tiny(), tmp_path / "cut", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_folder_that_cannot_be_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*Not a directory"):
        train(tiny(), tmp_path / "file" / "run", quiet=True)

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "touch", refuse)  # root may write anywhere, so chmod proves nothing
    with pytest.raises(InputError, match=r"cannot write .*: Permission denied$"):
        train(tiny(), tmp_path / "run", quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Tiny, tmp_path: Path):
    config = tiny(optimizer={"lr": 1e20, "warmup": 0}, train={"save_every": 1})
    with pytest.raises(InputError, match="of step 2 is not finite"):
        train(config, tmp_path / "run", quiet=True)
    assert RunFolder(tmp_path / "run").newest() == tmp_path / "run/checkpoints/step-00000001"


def test_a_gpu_too_small_is_told_what_helps(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fill(self: Trainer) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "update", fill)
    with pytest.raises(InputError, match=r"step 1 needs more memory.*--train\.micro-batch"):
        train(tiny(), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("trainer.build_model", r"the model needs more memory than cpu has; take a smaller one"),
        ("loop.Trainer.update", r"step 1 needs more memory than cpu has; lower --train\.micro"),
        ("loop.validate", r"validation needs more memory than cpu has; .*--train\.batch-size"),
    ],
)
def test_a_machine_without_enough_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, line: str
):
    def fill(*arguments: Any, **options: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(f"retentive.train.{place}", fill)
    with pytest.raises(InputError, match=line):
        train(tiny(), tmp_path / "run", quiet=True)


def test_tensorboard_that_is_not_installed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install retentive\[tensorboard\]"):
        train(tiny(train={"tensorboard": True}), tmp_path / "run", quiet=True)
    assert train(tiny(), tmp_path / "run", quiet=True).finished


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tiny(), tmp_path / "run")
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 6/6 · loss " in err and "tokens/s" in err and "of GEMM rate" in err
    assert "bits per byte" in err and "step 6, a sample:\ndef " in err


def test_everything_held_in_no_split_is_trained_on(tiny: Tiny, tmp_path: Path):
    result = train(tiny(data={"valid_fraction": 0.0}), tmp_path / "run", quiet=True)
    assert result.finished and result.bits_per_byte is None
    record = json.loads((RunFolder(tmp_path / "run").checkpoints()[-1] / "run.json").read_text())
    assert record["step"] == 6
