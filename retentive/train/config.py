"""A run is one TOML file: the tables [model], [data], [optimizer], [train] and [adapter].

A command line such as `--optimizer.lr 1e-3` is a later line of the same file, so both meet the same
checks: an unknown key or a wrong type is named with its table and the nearest key there is.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from retentive.convert.loading import load_config as load_model_config
from retentive.data.dataset import DataConfig
from retentive.errors import InputError, nearest
from retentive.layers.feed_forward import FeedForwardConfig
from retentive.mixers import MIXERS
from retentive.mixers.attention import AttentionConfig
from retentive.mixers.retention import RetentionConfig
from retentive.models.build import shapes
from retentive.models.config import ModelConfig, RetNetConfig, config_class, named_size
from retentive.models.flat import RETNET, put
from retentive.models.matching import matching_transformer, of_kind

Table = dict[str, Any]


@dataclass(frozen=True)
class ModelOptions:
    """[model]: a named size and the fields of `ModelConfig` that differ from it, or all the fields.

    [model.mixer] and [model.ffn] are its nested fields; the flat names of config.json are taken as
    well. A `kind` other than "retnet" is a model of the same width, depth and number of parameters.
    """

    base: str | None = None
    """A model folder to go on from (fine-tuning), with its weights and its tokenizer."""
    kind: str = "retnet"
    """retnet, transformer, or a mixer by name: that of a model as large as the RetNet."""
    size: str | None = None
    num_kv_heads: int | None = None
    """Groups of heads that share keys and values; by default as many as heads."""
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.base is not None:
            if given := [*self.fields, *_changed(self, ("kind", "size", "num_kv_heads"))]:
                raise InputError(f"model.base is a whole model; leave out model.{given[0]}")
            return
        if self.kind not in (kinds := ("retnet", "transformer", *MIXERS)):
            near = nearest(self.kind, kinds)
            raise InputError(f"model.kind is {self.kind!r}{near}; it is one of {', '.join(kinds)}")
        if self.size is None:
            nested = nest(self.fields)
            missing = [name for name in ("hidden_size", "num_hidden_layers") if name not in nested]
            if self._mixer_kind == "retention" and "num_heads" not in nested.get("mixer", {}):
                missing.append("mixer.num_heads")
            if missing:
                raise InputError(
                    f"model has neither a size nor {', '.join(missing)}; give one of both"
                )

    @property
    def _mixer_kind(self) -> str:
        return _kind_of(self.fields.get("mixer"), "retention")

    def build(self, vocab_size: int) -> ModelConfig:
        """The model's config. `vocab_size` is the tokenizer's, for a table that names none."""
        if self.base is not None:
            return self._of_base(vocab_size)
        config = self._written(vocab_size)
        if config.vocab_size < vocab_size:
            raise InputError(
                f"model.vocab_size is {config.vocab_size}, but the tokenizer has {vocab_size} "
                "entries; leave it out to take the tokenizer's"
            )
        if self.kind == "retnet":
            return config
        if self.kind == "transformer":
            return matching_transformer(config, self.num_kv_heads)
        return of_kind(config, self.kind)

    def _written(self, vocab_size: int) -> ModelConfig:
        """The model that size and fields say."""
        other = _kind_of(self.fields.get("other_mixer"), None)
        cls = config_class(self._mixer_kind, other)
        sizes = {} if self.size is None else dict(named_size(self.size))
        if cls is not RetNetConfig:
            sizes.pop("num_heads", None)  # of retention
        fields = {**sizes, "vocab_size": vocab_size, **self.fields}
        if self.kind == "retnet" and self.num_kv_heads is not None:
            fields["num_kv_heads"] = self.num_kv_heads
        return cls.from_dict(nest(fields))

    def _of_base(self, vocab_size: int) -> ModelConfig:
        config = load_model_config(self.base_folder)
        if config.quantization is not None:
            raise InputError(
                f"the weights of model.base, {self.base}, are quantised; give the model it was "
                "made from"
            )
        if config.vocab_size < vocab_size:
            raise InputError(
                f"the tokenizer has {vocab_size} entries, the model in {self.base} "
                f"{config.vocab_size}; give the tokenizer.json that it was trained with"
            )
        return config

    @property
    def base_folder(self) -> Path:
        assert self.base is not None
        return Path(self.base).expanduser()


def nest(fields: Mapping[str, Any]) -> Table:
    """Flat names of config.json as the nested fields that they are; a later one counts."""
    nested: Table = {}
    for name, value in fields.items():
        put(nested, RETNET.get(name, name), value)
    return nested


def _kind_of(given: Any, default: Any) -> Any:
    return given.get("kind", default) if isinstance(given, Mapping) else default


@dataclass(frozen=True)
class OptimizerConfig:
    """[optimizer]: AdamW with the paper's settings (its learning rate for 200M and 1.3B)."""

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Of matrices; norms and biases do not decay."""
    warmup: int = 375
    """Updates over which the rate grows linearly."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_lr: float = 0.0
    """Where the schedule ends, as a fraction of lr."""
    clip: float = 2.0
    """Largest norm of the gradient; larger ones are scaled down to it. inf: none are."""

    def __post_init__(self):
        for key in ("lr", "eps", "weight_decay", "final_lr"):
            if not math.isfinite(getattr(self, key)):
                raise InputError(f"optimizer.{key} is {getattr(self, key)}; it must be finite")
        _at_least("optimizer.warmup", self.warmup, 0)
        for key in ("lr", "eps", "clip"):
            if not getattr(self, key) > 0:
                raise InputError(f"optimizer.{key} is {getattr(self, key)}; it must be above 0")
        for key in ("weight_decay", "final_lr"):
            _at_least(f"optimizer.{key}", getattr(self, key), 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"optimizer.betas is {self.betas}; both must be at least 0 and below 1"
            )


@dataclass(frozen=True)
class TrainConfig:
    """[train]: how much, how it is cut, where it runs, and what it reports."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 8
    """Rows of one update."""
    micro_batch: int | None = None
    """Rows that go through the model at once; fewer take less memory. By default all of them."""
    seq_len: int = 512
    """Tokens of a row."""
    carry_state: bool = False
    """Truncated BPTT: rows continue their documents, and the state, from step to step."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Of products: auto (bfloat16 on CUDA, else float32), float32, bfloat16; float64 of all."""
    compile: bool = False
    """torch.compile for every layer."""
    checkpoint_layers: bool = False
    """Activation checkpointing: less memory, more time (blocks are computed twice)."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    valid_every: int = 500
    """Steps between validations; 0: only at the end."""
    valid_tokens: int = 65536
    """Tokens of a validation during the run; the one at the end reads everything."""
    sample_every: int = 500
    """Steps between samples of text; 0: only at the end."""
    sample_prompt: str = "def "
    sample_tokens: int = 80
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""

    def __post_init__(self):
        for key in ("steps", "batch_size", "seq_len", "keep", "valid_tokens", "sample_tokens"):
            _at_least(f"train.{key}", getattr(self, key), 1)
        for key in ("seed", "save_every", "valid_every", "sample_every"):
            _at_least(f"train.{key}", getattr(self, key), 0)
        if self.micro_batch is not None:
            _at_least("train.micro_batch", self.micro_batch, 1)
        if self.seed >= 2**64:
            raise InputError(f"train.seed is {self.seed}; it must be below 2**64")
        if not self.sample_prompt:
            raise InputError("train.sample_prompt is empty; give the text that a sample continues")


@dataclass(frozen=True)
class AdapterConfig:
    """[adapter]: what is learned of a `model.base` that stays as it is."""

    kind: Literal["none", "lora", "state"] = "none"
    """none: all weights are trained; lora; state: only the states that texts begin with."""
    rank: int = 8
    """Of LoRA, as are the keys below: r, the rows of A and columns of B."""
    alpha: int = 16
    """The product B A counts alpha / rank times."""
    dropout: float = 0.0
    """Of what A reads."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as q_proj; by default all projections of all layers."""

    def __post_init__(self):
        if self.kind != "lora" and (
            given := _changed(self, ("rank", "alpha", "dropout", "targets"))
        ):
            raise InputError(f'adapter.{given[0]} belongs to kind = "lora"; leave it out')
        _at_least("adapter.rank", self.rank, 1)
        _at_least("adapter.alpha", self.alpha, 1)
        if not 0 <= self.dropout < 1:
            raise InputError(f"adapter.dropout is {self.dropout}; it is at least 0, below 1")


def _changed(options: Any, keys: Sequence[str]) -> list[str]:
    """Those of the keys that differ from their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    return [key for key in keys if getattr(options, key) != defaults[key]]


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise InputError(f"{key} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run: the same RunConfig gives the same weights on a machine."""

    model: ModelOptions
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self):
        # A mistake in [model] shows before the corpus is read.
        model = shapes(self.model.build(vocab_size=1))
        if self.train.carry_state and model.state_grows:
            raise InputError(
                "train.carry_state needs a state of fixed size, and that of attention without a "
                "window grows; leave it out, or take a RetNet whose attention layers have a window"
            )
        if self.model.base is not None and self.data.tokenizer == "bpe":
            raise InputError(
                f"data.tokenizer is bpe, a new one, but the model in {self.model.base} knows its "
                "own; leave it out to take that"
            )
        if self.adapter.kind != "none" and self.model.base is None:
            raise InputError(
                f"adapter.kind is {self.adapter.kind}, but there is no model to adapt; give its "
                "folder as model.base"
            )
        if self.adapter.kind == "state" and not model.tunable:
            raise InputError(
                f"state tuning needs retention, and the model in {self.model.base} has none;"
                ' take adapter.kind = "lora"'
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_table`; keys that are left out take their defaults."""
        for section, given in table.items():
            _options(section)
            if not isinstance(given, Mapping):
                raise InputError(f"{section} is {given!r}; it must be a table, [{section}]")
            for name, value in _leaves(section, given):
                key = f"{section}.{name}"
                _check_type(key, option(key).type, value)
        sections = {s: _tuples(given) for s, given in table.items()}
        if base := sections.get("model", {}).get("base"):
            sections["data"] = {"tokenizer": base, **sections.get("data", {})}
        sections["model"] = _split_model(sections.get("model", {}))
        return cls(**{s: _SECTIONS[s](**given) for s, given in sections.items()})

    def to_table(self) -> Table:
        """The nested dict of a TOML (or JSON) file that `from_table` reads back."""
        table = dataclasses.asdict(self)
        table["model"] |= table["model"].pop("fields")
        return {s: {k: v for k, v in t.items() if v is not None} for s, t in table.items()}


_SECTIONS: dict[str, Any] = {
    "model": ModelOptions,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "adapter": AdapterConfig,
}


def load_config(
    path: str | Path, overrides: Mapping[str, Sequence[str]] | None = None
) -> RunConfig:
    """Reads a run's TOML file. `overrides`: the words given on the command line, by dotted key.

    Raises InputError for a file that is missing or no TOML, and for every bad key or value.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such config file: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the TOML file of a run") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    if isinstance(model := table.get("model"), dict):
        table["model"] = _nest_model(model)
    for key, words in (overrides or {}).items():
        section, name = key.split(".", 1)
        value = _from_words(key, option(key).type, words)
        given = table.setdefault(section, {})
        if isinstance(given, dict):  # what is no table is named with all other mistakes
            put(given, _path(section, name), value)
    return RunConfig.from_table(table)


class Option(NamedTuple):
    """What a key takes, and what it is where nobody gives it."""

    type: Any
    default: Any


def option(key: str) -> Option:
    """A dotted key such as "optimizer.lr". InputError, with the nearest key, for an unknown one."""
    section, name = key.split(".", 1)
    known, name = _options(section), _path(section, name)
    if section == "model" and name.split(".")[0] in ("mixer", "other_mixer"):
        return known.get(name, Option(Any, None))  # of another kind of mixer, which checks it
    if name not in known:
        elsewhere = [other for other in options() if other.endswith(f".{name}")]
        near = nearest(elsewhere[0] if elsewhere else key, options())
        raise InputError(f"unknown key {key!r}{near}; [{section}] has {', '.join(known)}")
    return known[name]


def options() -> dict[str, Option]:
    """All dotted keys."""
    return {
        f"{section}.{name}": o for section in _SECTIONS for name, o in _options(section).items()
    }


def _options(section: str) -> dict[str, Option]:
    """The keys of a table; those of [model] are the fields of a RetNet's config as well."""
    if section not in _SECTIONS:
        near = nearest(section, _SECTIONS)
        raise InputError(f"unknown table {section!r}{near}; there are {', '.join(_SECTIONS)}")
    found = _fields(_SECTIONS[section])
    if section == "model":
        found.pop("fields")
        found |= _fields(RetNetConfig)
        for name, cls in _NESTED.items():
            del found[name]
            found |= {f"{name}.{key}": o for key, o in _fields(cls).items()}
    return found


_NESTED = {"mixer": RetentionConfig, "ffn": FeedForwardConfig, "other_mixer": AttentionConfig}


def _fields(cls: Any) -> dict[str, Option]:
    hints = get_type_hints(cls)
    return {f.name: Option(hints[f.name], f.default) for f in dataclasses.fields(cls)}


def _path(section: str, name: str) -> str:
    """Where the key is in its table: "mixer.decay" for decay, its flat name in [model]."""
    own = section != "model" or name in _fields(ModelOptions)
    return name if own else RETNET.get(name, name)


def _leaves(section: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a table, those of [model.mixer] as "mixer.KEY"."""
    for name, value in given.items():
        path = _path(section, name)
        if section == "model" and path in _NESTED and isinstance(value, Mapping):
            yield from ((f"{path}.{key}", one) for key, one in value.items())
        else:
            yield path, value


_SHOULD_BE = "Input should be "  # how pydantic begins most of its messages


def _check_type(key: str, hint: Any, value: Any) -> None:
    # As JSON, where a strict check takes a list for a tuple, as TOML means it, but no "3" for a 3.
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        said = [each["msg"] for each in error.errors() if each["msg"].startswith(_SHOULD_BE)]
        wanted = " or ".join(each.removeprefix(_SHOULD_BE) for each in said) or f"a {hint}"
        raise InputError(f"{key} is {value!r}; it must be {wanted}") from None


def _from_words(key: str, hint: Any, words: Sequence[str]) -> Any:
    """Command-line words as a value of type `hint`: as TOML where that fits, else as they are."""
    if get_origin(hint) is tuple and not (len(words) == 1 and words[0].startswith("[")):
        elements = get_args(hint)
        return [_from_words(key, elements[0], [word]) for word in words]
    if not words and hint is not bool:
        raise InputError(f"--{key} needs a value")
    (text,) = words or ["true"]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        _check_type(key, hint, value)
        return value
    except (tomllib.TOMLDecodeError, InputError):
        return text


def _tuples(given: Mapping[str, Any]) -> Table:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _nest_model(given: Table) -> Table:
    """[model] with all its fields nested."""
    own = _fields(ModelOptions)
    return {k: v for k, v in given.items() if k in own} | nest(
        {k: v for k, v in given.items() if k not in own}
    )


def _split_model(given: Table) -> Table:
    """The arguments of `ModelOptions`."""
    own = _fields(ModelOptions)
    nested = _nest_model(given)
    return {k: v for k, v in nested.items() if k in own} | {
        "fields": {k: v for k, v in nested.items() if k not in own}
    }
