"""What becomes of each tensor of a checkpoint, found and checked before anything is written.

Every tensor of theirs is used exactly once, every parameter of ours is filled, shapes fit, and what
only follows from the config (decays, angles) is what our config says.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.convert.dialect import Dialect, TheirConfig, Weight
from retentive.convert.dialects import detect
from retentive.convert.source import CONFIG, Source
from retentive.convert.weight_files import Stored
from retentive.errors import InputError
from retentive.models.build import empty_model
from retentive.models.config import (
    QUANTIZED,
    ModelConfig,
    RetNetConfig,
    TransformerConfig,
    config_from_dict,
)
from retentive.models.flat import written

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
OURS = tuple(
    kind.model_type + suffix
    for kind in (RetNetConfig, TransformerConfig)
    for suffix in ("", QUANTIZED)
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # no field of ours; other tools want them


class Piece(NamedTuple):
    """A tensor to make: all rows of one of the source, or those that `rows` lists."""

    source: str
    rows: Tensor | None
    stored: Stored

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]


@dataclass(frozen=True)
class Plan:
    """Tensors by their new names, and the config that goes with them.

    config      ours, also where what is written is another dialect's
    fields      of the config.json to write
    constants   tensors to write that are not made of the source's
    """

    source: Source
    told: str
    config: ModelConfig
    fields: dict[str, Any]
    pieces: dict[str, Piece]
    constants: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Stored]:
        """All that will be written, in the dtypes of the source."""
        made = {name: Stored(tuple(x.shape), x.dtype) for name, x in self.constants.items()}
        return {name: piece.stored for name, piece in self.pieces.items()} | made

    def read(self, name: str) -> Tensor:
        piece = self.pieces[name]
        return piece.of(self.source.read(piece.source))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, in the order of the source's files; each until the next is wanted."""
        yield from self.constants.items()
        made_of = defaultdict(list)
        for name, piece in self.pieces.items():
            made_of[piece.source].append((name, piece))
        for source, tensor in self.source.stream(made_of.keys()):
            for name, piece in made_of[source]:
                yield name, piece.of(tensor)


def plan(source: Source) -> Plan:
    """How `source`, of any dialect or ours, becomes a model of ours. InputError if it does not."""
    if not source.config:
        raise InputError(
            f"{source.given} has no {CONFIG} with the model's sizes and options; put one beside it"
        )
    if source.config.get("model_type") in OURS:
        return _plan_of_ours(source)
    dialect, evidence = detect(source)
    fit = _Fit(source, f"what {dialect.title} stores")
    config = _our_config(source, dialect, fit)
    pieces = {}
    for name, shape in _shapes(config).items():
        weight, number = _entry(dialect, config, name, fit.tensors)
        rows = None if weight.rows is None else weight.rows(config, shape[0])
        theirs = weight.theirs.format(number)
        pieces[name] = Piece(theirs, rows, Stored(shape, fit.dtype(theirs)))
    fit.check_shapes(pieces)
    fit.check_constants(_constants(dialect, config))
    if config.tie_word_embeddings:
        fit.check_tied([w.theirs for w in dialect.weights if w.ours == HEAD], pieces[EMBEDDING])
    fit.check_all_used()
    told = f"{source.given} is {dialect.title}: {evidence}"
    return Plan(source, told, config, _our_fields(config, source), pieces, {})


def rewrite(made: Plan, dialect: Dialect) -> Plan:
    """The same model written as `dialect` has it. InputError where that cannot say what it is."""
    config = made.config
    if not isinstance(config, RetNetConfig):
        raise InputError(f"{dialect.name} holds RetNets, which {made.source.given} is not")
    if config.quantization is not None:
        raise InputError(
            f"{dialect.name} holds no quantised weights; convert the model that"
            f" {made.source.given} was made from"
        )
    theirs = dialect.config.from_ours(config)
    pieces = {}
    for name, piece in made.pieces.items():
        if (entry := _first_entry(dialect, config, name)) is not None:
            weight, number = entry
            pieces[weight.theirs.format(number)] = _back(piece, weight, config)
            if name == EMBEDDING and config.tie_word_embeddings and dialect.stores_tied_head:
                head = next(w.theirs for w in dialect.weights if w.ours == HEAD)
                pieces[head] = piece
    fields = {**dialect.config.written, **asdict(theirs), **_tokens(made.source)}
    constants = _constants(dialect, config)
    back = replace(made, fields=fields, pieces=pieces, constants=constants)
    _check_said(back, dialect, theirs)
    assert len(pieces) >= len(made.pieces), made.pieces.keys() - pieces.keys()
    return back


def _check_said(made: Plan, dialect: Dialect, theirs: TheirConfig) -> None:
    """InputError where a field of our config is another one when theirs is read back."""
    refusal = f"{dialect.name} cannot hold {made.source.given}"
    try:
        read = RetNetConfig.from_dict(theirs.to_ours(made))
    except InputError as error:
        raise InputError(f"{refusal}: {error}") from error
    meant = written(made.config, sparse=False)
    said = written(read, sparse=False) | {
        name: meant[name] for name in ("dropout", "initialization")
    }
    if lost := [name for name in meant if said[name] != meant[name]]:
        reasons = [f"{name} is {meant[name]!r}, there {said[name]!r}" for name in lost[:3]]
        raise InputError(
            f"{refusal}: {', '.join(reasons)}; without --to it becomes a folder of ours"
        )


def _back(piece: Piece, weight: Weight, config: RetNetConfig) -> Piece:
    """The tensor of theirs whose rows, as `weight` picks them, are the tensor of ours."""
    if weight.rows is None:
        return piece
    count = piece.stored.shape[0]
    order = weight.rows(config, count).argsort()
    rows = order if piece.rows is None else piece.rows[order]
    return piece._replace(rows=None if torch.equal(rows, torch.arange(count)) else rows)


def _plan_of_ours(source: Source) -> Plan:
    fit = _Fit(source, "a model of ours")
    fit.check_layers(source.config.get("num_hidden_layers"))
    with _naming(source):
        config = config_from_dict(source.config)
    fit.check_sizes(config)
    pieces = {
        name: Piece(name, None, Stored(shape, fit.dtype(name)))
        for name, shape in _shapes(config).items()
    }
    fit.check_shapes(pieces)
    fit.check_all_used()
    told = f"{source.given} is a model of ours: its model_type is {source.config['model_type']}"
    return Plan(source, told, config, _our_fields(config, source), pieces, {})


class _Fit:
    """Compares a checkpoint with what is wanted of it; InputError where they differ."""

    def __init__(self, source: Source, what: str):
        self.source, self.what = source, what
        self.tensors = source.tensors
        self.used: set[str] = set()

    def _refuse(self, complaint: str) -> InputError:
        return InputError(
            f"{self.source.given} {complaint}; {CONFIG} and weights must come from one model"
        )

    def check_layers(self, count: Any) -> None:
        """First of all, before anything is as large as a config says."""
        stored = 1 + max((number for _, number in map(_numbered, self.tensors)), default=-1)
        if stored != count:
            raise self._refuse(f"holds {stored} layers, {CONFIG} says {count}")

    def check_sizes(self, config: ModelConfig) -> None:
        largest = max(max(stored.shape, default=0) for stored in self.tensors.values())
        for name in ("vocab_size", "hidden_size", "intermediate_size", "qk_dim", "value_dim"):
            if (size := getattr(config, name, 0)) > largest:
                raise self._refuse(f"holds no tensor as large as {name} {size} of {CONFIG}")

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that must be there."""
        if name not in self.tensors:
            raise self._refuse(f"lacks {name}")
        self.used.add(name)
        return self.tensors[name].dtype

    def check_shapes(self, pieces: Mapping[str, Piece]) -> None:
        """Of what the pieces are of, whose rows they use once each."""
        parts = defaultdict(list)
        for piece in pieces.values():
            parts[piece.source].append(piece)
        for name, used in parts.items():
            shapes = [piece.stored.shape for piece in used]
            wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if self.tensors[name].shape != wanted:
                raise self._refuse(
                    f"holds {name} as {self.tensors[name].shape}, {CONFIG} says {wanted}"
                )
            every = torch.arange(wanted[0])
            rows = torch.cat([every if piece.rows is None else piece.rows for piece in used])
            assert torch.equal(rows.sort().values, every), name

    def check_constants(self, constants: Mapping[str, Tensor]) -> None:
        for name, stored in self.source.stream(constants.keys() & self.tensors.keys()):
            if not _is_rounding(stored, constants[name]):
                raise self._refuse(f"holds a {name} that is not the one of its {CONFIG}")
            self.used.add(name)

    def check_tied(self, heads: list[str], embedding: Piece) -> None:
        for head in self.tensors.keys() & set(heads):
            if not torch.equal(self.source.read(head), self.source.read(embedding.source)):
                raise self._refuse(f"holds a head of its own, {head}, and {CONFIG} says tied")
            self.used.add(head)

    def check_all_used(self) -> None:
        if extra := self.tensors.keys() - self.used:
            raise self._refuse(
                f"holds {len(extra)} tensors that are no part of {self.what}, such as {min(extra)}"
            )


def _is_rounding(stored: Tensor, value: Tensor) -> bool:
    """Is it what `value`, up to the roundings of a power and a logarithm in float32, rounds to?

    In half precision γ of one rule is as near to γ of another as two numbers can be, so that only
    the very ends of what float32 may give are allowed for, each rounded as it was.
    """
    if not stored.is_floating_point() or stored.numel() != value.numel():
        return False
    given, meant = stored.flatten(), value.double().flatten()
    slack = 16 * torch.finfo(torch.float32).eps * meant.abs()
    low, high = (end.to(stored.dtype) for end in (meant - slack, meant + slack))
    return bool(((low <= given) & (given <= high)).all())


def _our_config(source: Source, dialect: Dialect, fit: "_Fit") -> RetNetConfig:
    with _naming(source):
        fields = dialect.config.read(source.config).to_ours(source)
    fit.check_layers(fields["num_hidden_layers"])
    with _naming(source):
        config = RetNetConfig.from_dict(fields)
    fit.check_sizes(config)
    return config


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Says whose config it is that is wrong, be it only that a width is 0 or an expansion NaN."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:  # InputError is the first
        raise InputError(f"{source.given}, {CONFIG}: {error}") from error


def _our_fields(config: ModelConfig, source: Source) -> dict[str, Any]:
    return {**config.to_dict(), **_tokens(source)}


def _tokens(source: Source) -> dict[str, Any]:
    return {name: source.config[name] for name in TOKENS if source.config.get(name) is not None}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in empty_model(config).state_dict().items()}


def _entry(
    dialect: Dialect, config: RetNetConfig, name: str, there: Container[str]
) -> tuple[Weight, int]:
    """The entry for a tensor of ours: of several the one that is there, or else the first."""
    found = _entries(dialect, config, name)
    assert found, f"{dialect.name} has no entry for {name}"
    return next((entry for entry in found if entry[0].theirs.format(entry[1]) in there), found[0])


def _first_entry(dialect: Dialect, config: RetNetConfig, name: str) -> tuple[Weight, int] | None:
    return next(iter(_entries(dialect, config, name)), None)


def _entries(dialect: Dialect, config: RetNetConfig, name: str) -> list[tuple[Weight, int]]:
    pattern, number = _numbered(name)
    return [(w, number) for w in dialect.weights if w.ours == pattern and w.when(config)]


def _numbered(name: str) -> tuple[str, int]:
    """ "layers.3.ffn.x" -> ("layers.{}.ffn.x", 3); -1 for what is in no layer."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, -1
    return f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}", int(found[1])


def _constants(dialect: Dialect, config: RetNetConfig) -> dict[str, Tensor]:
    """Their names and values, those of every layer where they have a number."""
    made = {}
    for constant in dialect.constants:
        value = constant.value(config)
        numbers = range(config.num_hidden_layers if "{}" in constant.theirs else 1)
        made |= {constant.theirs.format(number): value for number in numbers}
    return made
