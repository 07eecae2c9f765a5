"""The contenders of each benchmark, and the settings that each is run with."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retentive.bench.models import (
    Matching,
    ReferenceModel,
    gated,
    identity,
    retnet,
    square_heads,
    transformer,
)
from retentive.bench.peers import VERSIONS
from retentive.errors import InputError, nearest
from retentive.models.config import ModelConfig
from retentive.models.counts import mixer_name

Choice = dict[str, Any]
CHUNKS: tuple[Choice, ...] = tuple({"chunk_size": C} for C in (1024, 512, 256, 128, 64))
"""Tried from the largest on until one is slower than the last: small ones may take minutes."""


@dataclass(frozen=True)
class Contender:
    """An implementation of an op or a model, in one form.

    worker             the module of `retentive.bench.workers` that runs it
    form               how it computes; of an own model of any kind the name of its mixer
    tasks              the benchmarks that it takes part in
    settings           go to the worker as they are
    parameter_matched  the config of its model, by which its work is counted, too
    choices            by task: further settings, of which the fastest is measured
    quadratic          it holds T² scores, in its only form or with the first of its choices
    extra              the package's, in our own pyproject
    most_tokens        of an op; more take minutes
    """

    name: str
    worker: str
    form: str
    tasks: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    parameter_matched: Matching = retnet
    choices: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    quadratic: bool = False
    package: str | None = None
    extra: str | None = None
    cuda: bool = False
    most_tokens: int | None = None

    def version(self) -> str:
        assert self.package is not None
        return VERSIONS.get(self.package) or importlib.metadata.version(self.package)

    def missing(self, device: str) -> str | None:
        """Why it cannot run on this machine, as far as that is known before it is tried."""
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
    """A contender beside a reference model; there is no model where an op is measured."""

    contender: Contender
    model: ReferenceModel | None = None

    def config(self) -> ModelConfig:
        assert self.model is not None
        return self.contender.parameter_matched(self.model)

    @property
    def is_reference(self) -> bool:
        """Whether it runs the reference model itself, with the weights in its folder."""
        assert self.model is not None
        return self.contender.worker == "ours" and self.config() == self.model.config

    def case(self, case: dict[str, Any]) -> dict[str, Any]:
        """A benchmark's case as this contender's worker takes it."""
        contender = self.contender
        request = {**case, **contender.settings, "form": contender.form}
        if self.model is not None:
            config = self.config()
            request["config"] = config.to_dict()
            request["form"] = contender.form or mixer_name(config)
            if self.model.folder is not None and self.is_reference:
                request["folder"] = str(self.model.folder)
        if contender.package is not None:
            request |= {"package": contender.package, "version": contender.version()}
        return request

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
    "train": ("model", "retnet", "transformer", "flash-linear-attention"),
    "decode": ("model", "retnet", "transformer", "transformer-gqa8"),
}
"""The contenders on a GPU unless others are named, ours first: time is short there."""

_AUTO = {"retention": "auto", "backend": "auto"}
_MODEL = ("train", "prefill", "decode")
_GROUP = 4  # query heads that share keys and values, for GQA
REFERENCE = "model"
"""The contender that is the reference model, of whatever kind."""

CONTENDERS = [
    Contender(REFERENCE, "ours", "", _MODEL, {**_AUTO, "runner": True}, identity),
    Contender("retnet", "ours", "chunkwise", ("train", "prefill"), _AUTO),
    Contender("retnet", "ours", "recurrent, runner", ("decode",), {**_AUTO, "runner": True}),
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
    Contender("transformer", "ours", "MHA, SDPA", _MODEL, parameter_matched=transformer(1)),
    Contender(
        "transformer-gqa", "ours", "GQA, SDPA", _MODEL, parameter_matched=transformer(_GROUP)
    ),
    Contender(
        "transformer-gqa8",
        "ours",
        "8-fold GQA, SDPA",
        ("decode",),
        parameter_matched=transformer(8),
    ),
    Contender(
        "transformer-math",
        "ours",
        "MHA, scores in memory",
        ("train",),
        {"math": True},
        parameter_matched=transformer(1),
        quadratic=True,
    ),
    *(
        Contender(
            name + ("-static" if cache == "static" else ""),
            "huggingface",
            f"{kind}, SDPA",
            tasks,
            {"cache": cache},
            parameter_matched=gated(transformer(shared)),
            package="transformers",
            extra="hf",
        )
        for name, kind, shared in (("llama", "MHA", 1), ("llama-gqa", "GQA", _GROUP))
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
            parameter_matched=matching,
            choices={task: ({"chunk_size": None}, *CHUNKS) for task in ("train", "prefill")},
            quadratic=True,
            package=name,
        )
        for name, matching in (("yet-another-retnet", square_heads), ("torchscale", gated(retnet)))
    ),
    Contender(
        "flash-linear-attention",
        "huggingface",
        "chunkwise, Triton",
        ("op", *_MODEL),
        parameter_matched=gated(retnet),
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


def entries(
    task: str, names: str = "", model: ReferenceModel | None = None, *, usual: Sequence[str] = ()
) -> list[Entry]:
    """The contenders of a task beside `model`: those of `names`, with commas between.

    Without names those of `usual`, or all; then the reference model has a row of its own only where
    it is none of the others. Raises InputError for an unknown name.
    """
    found = [Entry(contender, model) for contender in chosen(task, names or ",".join(usual))]
    if names or model is None:
        return found
    others = [entry for entry in found if entry.contender.name != REFERENCE]
    return others if any(entry.is_reference for entry in others) else found


def entries_of_itself(found: Sequence[Entry], task: str) -> list[Entry]:
    """Those of the entries, all beside one model, that run this model; at least one."""
    own = [entry for entry in found if entry.is_reference]
    return own or [Entry(chosen(task, REFERENCE)[0], found[0].model)]


def chosen(task: str, names: str = "") -> list[Contender]:
    """The contenders of a task, all of them or those that `names` lists with commas between.

    Raises InputError for an unknown one.
    """
    known = {contender.name: contender for contender in CONTENDERS if task in contender.tasks}
    if not names:
        return list(known.values())
    return [_named(known, task, name.strip()) for name in names.split(",")]


def _named(known: dict[str, Contender], task: str, name: str) -> Contender:
    if name not in known:
        raise InputError(
            f"unknown contender {name!r} of bench {task}{nearest(name, known)};"
            f" choose from {', '.join(known)}"
        )
    return known[name]
