"""Who takes part in which benchmark, and what each is told."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retentive.bench.models import Equal, Subject, gated, itself, square, transformer
from retentive.bench.peers import VERSIONS
from retentive.errors import InputError, nearest
from retentive.models.config import ModelConfig

Choice = dict[str, Any]
CHUNKS: tuple[Choice, ...] = tuple({"chunk_size": C} for C in (1024, 512, 256, 128, 64))
"""Tried from the largest on until it gets slower: small ones may take minutes."""


@dataclass(frozen=True)
class Contender:
    """`settings` go to the worker as they are; `choices` are tried and the fastest is measured."""

    name: str
    worker: str
    form: str
    tasks: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    equal: Equal = itself  # the config of its model; its work is counted by it
    choices: dict[str, tuple[Choice, ...]] = field(default_factory=dict)  # by task
    quadratic: bool = False  # it holds T² scores, in its only form or before a choice
    package: str | None = None
    extra: str | None = None  # the package's, in our own pyproject
    cuda: bool = False
    most_tokens: int | None = None  # of an op; beyond it takes minutes

    def version(self) -> str:
        assert self.package is not None
        return VERSIONS.get(self.package) or importlib.metadata.version(self.package)

    def missing(self, device: str) -> str | None:
        """Why it cannot run on this machine, before it is tried."""
        if self.cuda and not device.startswith("cuda"):
            return "its kernels need a CUDA device; this run is on " + device
        if self.package is None or self.package in VERSIONS:
            return None
        try:
            self.version()
        except importlib.metadata.PackageNotFoundError:
            what = f"'retentive[{self.extra}]'" if self.extra else self.package
            return f"{self.package} is not installed: pip install {what}"
        return None


@dataclass(frozen=True)
class Entry:
    """A contender with the model whose equal it is; there is none where an op is measured."""

    contender: Contender
    model: Subject | None = None

    def config(self) -> ModelConfig:
        assert self.model is not None
        return self.contender.equal(self.model)

    @property
    def opens_folder(self) -> bool:
        """Whether it runs the very model that is given, rather than an equal of it."""
        return self.contender.worker == "ours" and self.contender.equal is itself

    def case(self, case: dict[str, Any]) -> dict[str, Any]:
        """A benchmark's case as this contender's worker wants it."""
        contender = self.contender
        told = {**case, **contender.settings, "form": contender.form}
        if self.model is not None:
            told["config"] = self.config().to_dict()
            if self.model.folder is not None and self.opens_folder:
                told["folder"] = str(self.model.folder)
        if contender.package is not None:
            told |= {"package": contender.package, "version": contender.version()}
        return told

    def choices(self, task: str) -> tuple[Choice, ...]:
        return self.contender.choices.get(task, ({},))


ON_GPU: dict[str, tuple[str, ...]] = {
    "op": (
        "retnet-triton",
        "retnet",
        "attention",
        "flash-linear-attention",
        "flash-linear-attention-recurrent",
    ),
    "step": ("retnet-triton", "retnet", "attention", "flash-linear-attention-recurrent"),
    "train": ("retnet", "transformer", "flash-linear-attention"),
    "decode": ("retnet", "transformer", "transformer-gqa8"),
}
"""Who takes part on a GPU unless others are named, ours first: seconds count there."""

_AUTO = {"retention": "auto", "backend": "auto"}
_MODEL = ("train", "prefill", "decode")
_SHARED = 4  # query heads to a pair of keys and values, for GQA

CONTENDERS = [
    Contender("retnet", "ours", "chunkwise", ("train", "prefill"), _AUTO),
    Contender(
        "retnet", "ours", "recurrent, runner", ("decode", "along"), {**_AUTO, "runner": True}
    ),
    Contender("retnet-eager", "ours", "recurrent", ("decode",), _AUTO),
    Contender(
        "retnet",
        "ours",
        "chunkwise",
        ("op", "step"),
        {"retention": "chunkwise", "backend": "torch"},
    ),
    Contender(
        "retnet-parallel",
        "ours",
        "parallel",
        ("op", "train", "prefill"),
        {"retention": "parallel", "backend": "torch"},
        quadratic=True,
        most_tokens=2048,
    ),
    Contender(
        "retnet-recurrent",
        "ours",
        "recurrent",
        ("op",),
        {"retention": "recurrent", "backend": "torch"},
        most_tokens=2048,
    ),
    Contender(
        "retnet-triton",
        "ours",
        "chunkwise, GPU kernels",
        ("op", "step"),
        {"retention": "chunkwise", "backend": "triton"},
        cuda=True,
    ),
    Contender(
        "retnet-reference",
        "ours",
        "chunkwise, the reference",
        ("op",),
        {"retention": "chunkwise", "backend": "reference"},
        most_tokens=2048,
    ),
    Contender(
        "attention",
        "ours",
        "softmax, SDPA",
        ("op", "step"),
        {"attention": True},
        most_tokens=32768,
    ),
    Contender("transformer", "ours", "MHA, SDPA", (*_MODEL, "along"), equal=transformer(1)),
    Contender("transformer-gqa", "ours", "GQA, SDPA", _MODEL, equal=transformer(_SHARED)),
    Contender("transformer-gqa8", "ours", "8-fold GQA, SDPA", ("decode",), equal=transformer(8)),
    Contender(
        "transformer-math",
        "ours",
        "MHA, scores in memory",
        ("train",),
        {"math": True},
        equal=transformer(1),
        quadratic=True,
    ),
    *(
        Contender(
            name + ("-static" if cache == "static" else ""),
            "huggingface",
            f"{kind}, SDPA",
            tasks,
            {"cache": cache},
            equal=gated(transformer(shared)),
            package="transformers",
            extra="hf",
        )
        for name, kind, shared in (("llama", "MHA", 1), ("llama-gqa", "GQA", _SHARED))
        for tasks, cache in ((_MODEL, "dynamic"), (("decode",), "static"))
    ),
    Contender(
        "yet-another-retnet",
        "peers",
        "inputs split once",
        ("op",),
        {"split_once": True},
        choices={"op": CHUNKS},
        package="yet-another-retnet",
        most_tokens=32768,
    ),
    Contender(
        "yet-another-retnet-readme",
        "peers",
        "its README's loop",
        ("op",),
        {"split_once": False},
        choices={"op": CHUNKS},
        package="yet-another-retnet",
        most_tokens=8192,
    ),
    Contender(
        "torchscale",
        "peers",
        "chunkwise",
        ("op",),
        choices={"op": CHUNKS},
        package="torchscale",
        most_tokens=32768,
    ),
    *(
        Contender(
            name,
            "peers",
            "its fastest",
            _MODEL,
            equal=equal,
            choices={task: ({"chunk_size": None}, *CHUNKS) for task in ("train", "prefill")},
            quadratic=True,
            package=name,
        )
        for name, equal in (("yet-another-retnet", square), ("torchscale", gated(itself)))
    ),
    Contender(
        "flash-linear-attention",
        "huggingface",
        "chunkwise, Triton",
        ("op", *_MODEL),
        equal=gated(itself),
        package="flash-linear-attention",
        cuda=True,
    ),
    Contender(
        "flash-linear-attention-recurrent",
        "huggingface",
        "recurrent, Triton",
        ("op", "step"),
        {"recurrent": True},
        package="flash-linear-attention",
        cuda=True,
    ),
]


def chosen(task: str, names: str) -> list[Contender]:
    """The contenders of a task, all of them or those `names` lists with commas between.

    Raises InputError for one that there is not.
    """
    there = {contender.name: contender for contender in CONTENDERS if task in contender.tasks}
    if not names:
        return list(there.values())
    return [_named(there, task, name) for name in _split(names)]


def _named(there: dict[str, Contender], task: str, name: str) -> Contender:
    if name not in there:
        raise InputError(
            f"unknown contender {name!r} of bench {task}{nearest(name, there)};"
            f" choose from {', '.join(there)}"
        )
    return there[name]


def _split(names: str) -> Sequence[str]:
    return [name.strip() for name in names.split(",")]
