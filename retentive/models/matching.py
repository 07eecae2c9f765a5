"""Models of equal size: the same but for the mixer, with the FFN that gives as many parameters."""

import dataclasses
from typing import cast

from retentive.errors import InputError
from retentive.mixers import mixer_class
from retentive.mixers.attention import AttentionConfig
from retentive.mixers.base import MixerConfig
from retentive.models.config import ModelConfig, TransformerConfig, config_class
from retentive.models.counts import parameters


def match_parameters(config: ModelConfig, target: int, *, multiple: int = 8) -> ModelConfig:
    """`config` with the FFN width, a multiple of `multiple`, that comes nearest to `target`.

    The number of parameters is affine in the width, so two counts solve it. Raises InputError where
    even the narrowest FFN is too much.
    """
    if config.block == "mixer-only":
        raise InputError("a model without FFNs has no width that could make it equally large")

    def count(width: int) -> int:
        return sum(parameters(_with_ffn(config, width)).values())

    slope = (count(2 * multiple) - count(multiple)) // multiple
    width = (target - count(multiple)) / slope + multiple
    if width < multiple / 2:
        raise InputError(
            f"{config.mixer.kind} alone has more parameters than the {target:,} to match;"
            " give it smaller sizes"
        )
    return _with_ffn(config, multiple * max(1, round(width / multiple)))


def _with_ffn(config: ModelConfig, width: int) -> ModelConfig:
    return dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, intermediate_size=width))


def with_mixer(config: ModelConfig, mixer: MixerConfig, *, multiple: int = 8) -> ModelConfig:
    """`config` with another mixer in every layer, and as many parameters; not quantised."""
    cls = config_class(mixer.kind)
    shared = {
        one.name: getattr(config, one.name)
        for one in dataclasses.fields(ModelConfig)
        if one.name not in ("mixer", "other_layers", "other_mixer", "quantization")
    }
    target = sum(parameters(config).values())
    return match_parameters(cls(mixer=mixer, **shared), target, multiple=multiple)


def of_kind(config: ModelConfig, kind: str) -> ModelConfig:
    """`with_mixer` of a kind with its usual options at this width."""
    return with_mixer(config, mixer_class(kind).Config.default(config.hidden_size))


def matching_transformer(config: ModelConfig, num_kv_heads: int | None = None) -> TransformerConfig:
    """The baseline of `config`: a Transformer of as many parameters; fewer kv heads make it GQA."""
    mixer = AttentionConfig.default(config.hidden_size)
    if config.hidden_size < 64:  # toys: as many heads as theirs
        mixer = AttentionConfig(getattr(config.mixer, "num_heads", 1))
    if num_kv_heads is not None:
        mixer = dataclasses.replace(mixer, num_kv_heads=num_kv_heads)
    return cast(TransformerConfig, with_mixer(config, mixer))
