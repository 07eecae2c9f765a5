"""The model that a benchmark is about, and the configs of contenders with as many parameters.

The model is given as a folder with its weights or as a size by name; the contenders beside it have
the same width, depth and vocabulary, and the FFN that makes their numbers of parameters equal.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from retentive.errors import InputError, nearest
from retentive.models.checkpoint import load_config
from retentive.models.config import SIZES, ModelConfig, RetNetConfig, TransformerConfig
from retentive.models.counts import parameters, state_bytes

_REFERENCE = {"gated_ffn": True, "norm": "rmsnorm", "head_norm": "rmsnorm"}
BENCHMARK_SIZES: dict[str, dict[str, Any]] = {  # beside the sizes that models have
    "38m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_heads": 8,
        "intermediate_size": 1024,
        **_REFERENCE,
    },
    "110m": {
        "vocab_size": 8192,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_heads": 12,
        "intermediate_size": 1536,
        **_REFERENCE,
    },
}

Config = RetNetConfig | TransformerConfig


@dataclass(frozen=True)
class ReferenceModel:
    """The model whose number of parameters all contenders have."""

    name: str
    config: Config
    folder: Path | None = None


Matching = Callable[[ReferenceModel], Config]
"""Gives the config of a contender that has as many parameters as the reference model."""


def identity(model: ReferenceModel) -> Config:
    """The reference model itself, of whatever kind."""
    return model.config


def retnet(model: ReferenceModel) -> RetNetConfig:
    """The reference model if it is a RetNet, else one with the paper's layer."""
    config = model.config
    if isinstance(config, RetNetConfig):
        return config
    shared = {one.name: getattr(config, one.name) for one in dataclasses.fields(ModelConfig)}
    return match_parameters(RetNetConfig(**{**shared, "quantization": None}), count(config))


def transformer(groups: int) -> Matching:
    """A Transformer in which `groups` query heads, or all, share keys and values."""

    def matching(model: ReferenceModel) -> TransformerConfig:
        config = model.config
        if not isinstance(config, TransformerConfig):
            config = TransformerConfig.matching(config)
        heads = config.num_heads
        kv_heads = heads // groups if heads % groups == 0 else 1
        if config.kv_heads == kv_heads:
            return config
        grouped = dataclasses.replace(config, num_kv_heads=kv_heads, quantization=None)
        return match_parameters(grouped, count(model.config))

    return matching


def square_heads(model: ReferenceModel) -> RetNetConfig:
    """A RetNet with V = K and a plain FFN."""
    config = retnet(model)
    fields = {"value_dim": config.qk_dim, "gated_ffn": False, "quantization": None}
    return match_parameters(dataclasses.replace(config, **fields), count(config), multiple=1)


def gated(matching: Matching) -> Matching:
    """The same with a gate in its FFN, whose width is a multiple of 8, as GPUs like it."""

    def with_gate(model: ReferenceModel) -> Config:
        config = matching(model)
        if config.gated_ffn:
            return config
        plain = dataclasses.replace(config, gated_ffn=True, quantization=None)
        return match_parameters(plain, count(config))

    return with_gate


C = TypeVar("C", bound=Config)


def match_parameters(config: C, target: int, *, multiple: int = 8) -> C:
    """`config` with the FFN width, a multiple of `multiple`, that comes nearest to `target`.

    The number of parameters is affine in the width, so that two counts solve it.
    """

    def with_width(width: int) -> C:
        return dataclasses.replace(config, intermediate_size=width)

    first = count(with_width(multiple))
    per_step = count(with_width(2 * multiple)) - first
    return with_width(multiple * max(1, 1 + round((target - first) / per_step)))


def grows(config: Config) -> bool:
    """Whether its state grows with the sequence."""
    return state_bytes(config, 2) > state_bytes(config, 1)


def count(config: Config) -> int:
    """The number of parameters."""
    return sum(parameters(config).values())


def reference_model(given: str) -> ReferenceModel:
    """A model folder, or a size by name: its weights are random, which costs the same time."""
    if (folder := Path(given)).is_dir():
        return ReferenceModel(folder.resolve().name, load_config(folder), folder.resolve())
    sizes = {**BENCHMARK_SIZES, **SIZES}
    if given not in sizes:
        raise InputError(
            f"unknown model {given!r}{nearest(given, sizes)};"
            f" give a model folder or one of {', '.join(sizes)}"
        )
    return ReferenceModel(given, RetNetConfig.from_dict(sizes[given]))
