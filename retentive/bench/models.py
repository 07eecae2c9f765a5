"""Which model is measured: `--model` as a config, or as the folder of one with its weights."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from retentive.errors import InputError, nearest
from retentive.models.checkpoint import load_config
from retentive.models.config import SIZES, ModelConfig, RetNetConfig
from retentive.models.counts import parameters
from retentive.models.matching import match_parameters, matching_transformer

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
class Subject:
    """The RetNet whose equals all contenders are."""

    name: str
    config: RetNetConfig
    folder: Path | None = None


def itself(model: Subject) -> RetNetConfig:
    return model.config


def square(model: Subject) -> RetNetConfig:
    """V is K and the FFN plain, wider by what retention has less: as many parameters."""
    config = model.config
    mixer = dataclasses.replace(config.mixer, value_dim=config.mixer.qk_dim)
    plain = dataclasses.replace(config.ffn, gated=False)
    made = dataclasses.replace(config, mixer=mixer, ffn=plain)
    return cast(RetNetConfig, match_parameters(made, sum(parameters(config).values()), multiple=1))


def transformer(groups: int) -> Callable[[Subject], ModelConfig]:
    """Of as many parameters; `groups` query heads, or all, share keys and values."""

    def matching(model: Subject) -> ModelConfig:
        heads = matching_transformer(model.config).mixer.num_heads
        shared = groups if heads % groups == 0 else heads
        return matching_transformer(model.config, heads // shared)

    return matching


def gated(equal: "Equal") -> "Equal":
    """The same with a gate in its FFN, which is narrower for it: a multiple of 8, as GPUs like."""

    def with_gate(model: Subject) -> ModelConfig:
        config = equal(model)
        if config.ffn.gated:
            return config
        width = 8 * round(config.ffn_dim / 12)
        ffn = dataclasses.replace(config.ffn, gated=True, intermediate_size=width)
        return dataclasses.replace(config, ffn=ffn)

    return with_gate


Equal = Callable[[Subject], ModelConfig]
"""The config of a contender whose model is the equal of ours."""


def subject(given: str) -> Subject:
    """A model folder, or a size by name, with random weights: those are as fast."""
    if (folder := Path(given)).is_dir():
        config = load_config(folder)
        if not isinstance(config, RetNetConfig):
            raise InputError(f"{folder} holds no RetNet; give a RetNet's model folder or a size")
        return Subject(folder.resolve().name, config, folder.resolve())
    sizes = {**BENCHMARK_SIZES, **SIZES}
    if given not in sizes:
        raise InputError(
            f"unknown model {given!r}{nearest(given, sizes)};"
            f" give a model folder or one of {', '.join(sizes)}"
        )
    return Subject(given, RetNetConfig.from_dict(sizes[given]))
