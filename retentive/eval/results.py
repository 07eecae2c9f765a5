"""The folder of a model's evaluations, and the requests that are finished.

runs/eval/demo/
  model.json       whose results these are
  finished.jsonl   a line a finished request: what a run that was killed need not do again
  perplexity.json, tasks.json, recall.json, and figures as .png and .svg
"""

import fcntl
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retentive.data.tokenizer import TextTokenizer
from retentive.errors import InputError
from retentive.io.atomic import write_text
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel

MODEL, FINISHED = "model.json", "finished.jsonl"


def default_folder(model: Path) -> Path:
    """runs/eval/demo for runs/demo."""
    return Path("runs/eval", model.expanduser().resolve().name)


def identity(model: LanguageModel, tokenizer: TextTokenizer) -> str:
    """What results belong to: weights, config, dtype, tokenizer, and how texts begin."""
    digest = hashlib.blake2b(tokenizer.describe().encode(), digest_size=8).hexdigest()
    return f"{fingerprint(model)}:{digest}"


def check_folder(folder: Path) -> None:
    """InputError where `folder` is something else than a folder of results, or none yet."""
    if (folder / MODEL).exists() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(f"{folder} exists and holds no evaluations; give another --out")


class Answers:
    """Answers to requests of one model, in memory. Both are what JSON can hold."""

    def __init__(self, model: str = ""):
        self.model = model
        self._answers: dict[str, Any] = {}

    def key(self, *request: Any) -> str:
        words = json.dumps([self.model, *request], sort_keys=True)
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> Any:
        """None where there is none yet."""
        return self._answers.get(key)

    def add(self, key: str, answer: Any) -> None:
        self._answers[key] = answer


class Results(Answers):
    """On disk as soon as they are known.

    InputError for a folder of another model, or one that another process writes to.
    """

    def __init__(self, folder: Path, name: str, model: str):
        """`name` is what people call the model, `model` its `identity`."""
        super().__init__(model)
        check_folder(folder)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._check_model(name)
        self._file = (folder / FINISHED).open("a+b")
        try:
            self._lock()
            self._answers = self._read()
        except InputError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, key: str, answer: Any) -> None:
        super().add(key, answer)
        self._file.write(json.dumps([key, answer]).encode() + b"\n")
        self._file.flush()

    def save(self, name: str, report: dict[str, Any]) -> None:
        """As `name`.json."""
        write_text(self.folder / f"{name}.json", json.dumps(report, indent=1) + "\n")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process writes results to {self.folder}; wait for it, or give another"
                " --out"
            ) from None

    def _check_model(self, name: str) -> None:
        path = self.folder / MODEL
        if not path.exists():
            facts = {"model": name, "identity": self.model}
            write_text(path, json.dumps(facts, indent=1) + "\n")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["identity"] != self.model:
            raise InputError(
                f"{self.folder} holds results of another model, weights, dtype or tokenizer"
                f" ({before['model']}); give another --out"
            )

    def _read(self) -> dict[str, Any]:
        """All whole lines; what a killed run left of a last one is cut off."""
        answers, whole = {}, 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                key, answer = json.loads(line)
            except ValueError:
                raise InputError(
                    f"{self.folder / FINISHED} is damaged; delete it, or give another --out"
                ) from None
            answers[key] = answer
            whole += len(line)
        self._file.truncate(whole)
        return answers
