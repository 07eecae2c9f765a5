"""The run folder: whole checkpoints, whatever moment a crash comes, and the newest model on top.

    runs/x/
      config.json model.safetensors tokenizer.json    the newest checkpoint's: a model folder
      metrics.jsonl loss.png
      checkpoints/step-00000500/
        config.json model.safetensors tokenizer.json  a model folder, too
        optimizer.safetensors                         moments and random-number states
        state.safetensors                             carried state (truncated BPTT)
        run.json                                      step, seconds, config, corpus hash

In the place of the model files an adapter's run has the adapter's (`retentive.adapters`).

A checkpoint is written to a hidden folder and renamed when it is complete: a folder named `step-N`
is always whole.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retentive.errors import InputError

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


class OtherRun(InputError):
    """The folder holds another thing than the run that is wanted there; after "; " what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives. What writes raises InputError where the disk is full or protected."""

    path: Path
    model_files: tuple[str, ...] = MODEL_FILES
    """What of a checkpoint is the model, or the adapter that is trained."""

    @classmethod
    def open(
        cls, path: Path, *, resume: bool, model_files: tuple[str, ...] = MODEL_FILES
    ) -> "RunFolder":
        """Makes a new run's folder, or finds the one to resume. InputError: it is the other."""
        run, checkpoints = cls(path, model_files), path / "checkpoints"
        if resume and not checkpoints.is_dir():
            raise InputError(
                f"{path} holds no run to resume; leave out --resume to start one there"
            )
        if not resume and path.exists() and not _is_unused(path):
            raise OtherRun(
                f"{path} exists already; --resume continues the run in it, --out names another"
            )
        with run.writes(path):
            checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in checkpoints.glob(".step-*"):
                shutil.rmtree(leftover)
            (path / ".writable").touch()  # permission is tried now, not at the first checkpoint
            (path / ".writable").unlink()
        return run

    @contextlib.contextmanager
    def writes(self, path: Path) -> Iterator[None]:
        """The disk's refusals within the block as one line: what was not written, what remains."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            whole = self.newest()
            remains = f"; {whole} is whole: make room, then --resume" if whole else ""
            raise InputError(f"cannot write {path}: {reason}{remains}") from error

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def newest(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    @contextlib.contextmanager
    def writing(self, step: int, keep: int) -> Iterator[Path]:
        """A folder to fill, which becomes the checkpoint of `step` at the end of the block.

        Then its model becomes the run's, and checkpoints older than the newest `keep` are removed.
        If the block fails nothing has changed.
        """
        final = self.path / "checkpoints" / f"step-{step:08d}"
        aside = final.with_name(f".{final.name}")
        with self.writes(final):
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                yield aside
                _sync(aside)
                os.rename(aside, final)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            self.publish(final)
            for old in self.checkpoints()[:-keep]:
                # Renamed first, so that a kill in the middle leaves no half a checkpoint behind.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    def publish(self, checkpoint: Path) -> None:
        """Makes `checkpoint`'s model the one at the run's top, each file in one piece."""
        for name in self.model_files:
            aside = self.path / f".{name}"
            aside.unlink(missing_ok=True)
            try:
                os.link(checkpoint / name, aside)  # no second copy of the weights on disk
            except OSError:
                shutil.copyfile(checkpoint / name, aside)
            os.replace(aside, self.path / name)


def _is_unused(path: Path) -> bool:
    """An empty folder, or one where a run stopped before it began."""
    return path.is_dir() and all(
        entry.name == "checkpoints" and not any(entry.iterdir()) for entry in path.iterdir()
    )


def _sync(folder: Path) -> None:
    """To the disk itself: a renamed folder must be whole after a power cut, too."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
