"""The model that a benchmark is about, and the configs of contenders with as many parameters.

The model is given as a folder with its weights or as a size by name; the contenders beside it have
the same width, depth and vocabulary, and the FFN that makes their numbers of parameters equal.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retentive.convert.loading import load_config
from retentive.errors import InputError, nearest
from retentive.models.build import shapes
from retentive.models.config import SIZES, ModelConfig, RetNetConfig
from retentive.models.counts import mixer_name, parameters
from retentive.models.matching import match_parameters, matching_transformer, of_kind

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


@dataclass(frozen=True)
class ReferenceModel:
    """The model whose number of parameters all contenders have."""

    name: str
    config: ModelConfig
    folder: Path | None = None


Matching = Callable[[ReferenceModel], ModelConfig]
"""Gives the config of a contender that has as many parameters as the reference model."""


def identity(model: ReferenceModel) -> ModelConfig:
    """The reference model itself, of whatever kind."""
    return model.config


def retnet(model: ReferenceModel) -> ModelConfig:
    """The reference model if it is a RetNet, else one with the paper's layer."""
    config = model.config
    if mixer_name(config) == "retention":
        return config
    return of_kind(config, "retention")


def transformer(groups: int) -> Matching:
    """A Transformer in which `groups` query heads, or all, share keys and values."""

    def matching(model: ReferenceModel) -> ModelConfig:
        heads = matching_transformer(model.config).mixer.num_heads
        return matching_transformer(model.config, heads // groups if heads % groups == 0 else 1)

    return matching


def square_heads(model: ReferenceModel) -> ModelConfig:
    """A RetNet with V = K and a plain FFN."""
    config: Any = retnet(model)
    mixer = dataclasses.replace(config.mixer, value_dim=config.mixer.qk_dim)
    ffn = dataclasses.replace(config.ffn, gated=False)
    square = dataclasses.replace(config, mixer=mixer, ffn=ffn, quantization=None)
    return match_parameters(square, count(config), multiple=1)


def gated(matching: Matching) -> Matching:
    """The same with a gate in its FFN, whose width is a multiple of 8, as GPUs like it."""

    def with_gate(model: ReferenceModel) -> ModelConfig:
        config = matching(model)
        if config.ffn.gated:
            return config
        ffn = dataclasses.replace(config.ffn, gated=True)
        return match_parameters(dataclasses.replace(config, ffn=ffn), count(config))

    return with_gate


def grows(config: ModelConfig) -> bool:
    """Whether its state grows with the sequence."""
    return shapes(config).state_grows


def count(config: ModelConfig) -> int:
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
