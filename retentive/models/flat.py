"""The flat fields of `config.json`: what the nested fields of a config are called there.

A folder of a RetNet or Transformer is written with these names, which every version of the package
and Hugging Face's tools read; models of other mixers are written nested.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Table = Mapping[str, str]
"""Flat name -> where the field is in the nested config, in the order in which it is written."""

_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "mixer.num_heads",
    "intermediate_size": "ffn.intermediate_size",
    "hidden_act": "ffn.act",
    "gated_ffn": "ffn.gated",
    "norm": "norm",
    "norm_eps": "norm_eps",
    "dropout": "dropout",
    "tie_word_embeddings": "tie_word_embeddings",
    "initialization": "initialization",
    "quantization": "quantization",
    "block": "block",
    "residual_scale": "residual_scale",
    "final_norm": "final_norm",
    "embed_scale": "embed_scale",
    "embed_norm": "embed_norm",
    "ffn_bias": "ffn.bias",
    "ffn_subln": "ffn.subln",
    "head_bias": "head_bias",
}
_RETENTION = (
    "qk_dim value_dim gate head_norm head_norm_eps decay rotation rotation_base row_scale gate_act "
    "head_norm_affine rotary_dim xpos_base num_kv_heads qkv_bias gate_bias out_bias".split()
)

ANY: Table = {flat: path for flat, path in _SHARED.items() if not path.startswith("mixer.")}
RETNET: Table = {
    **_SHARED,
    **{name: f"mixer.{name}" for name in _RETENTION},
    "attention_layers": "other_layers",
    "attention": "other_mixer",
}
TRANSFORMER: Table = {
    **_SHARED,
    **{name: f"mixer.{name}" for name in ("num_kv_heads", "rope_theta", "qkv_bias", "window")},
}

# Written only where they have another value than their default: a plain RetNet's file stays short.
SPARSE = frozenset(
    "quantization block residual_scale final_norm embed_scale embed_norm ffn_bias ffn_subln "
    "head_bias gate_act head_norm_affine rotary_dim xpos_base num_kv_heads qkv_bias gate_bias "
    "out_bias window attention_layers attention".split()
)


def put(nested: dict[str, Any], path: str, value: Any) -> None:
    """Sets the field at `path` ("ffn.act", or "ffn" with a table of several)."""
    section, _, name = path.partition(".")
    if name:
        nested[section] = {**_fields(nested.get(section, {})), name: value}
    elif isinstance(value, Mapping) and section in nested:
        nested[section] = {**_fields(nested[section]), **value}
    else:
        nested[section] = value


def _fields(given: Any) -> Mapping[str, Any]:
    """Those of a table, or of a config that was made of one."""
    return given if isinstance(given, Mapping) else dataclasses.asdict(given)


def written(config: Any, *, sparse: bool = True) -> dict[str, Any]:
    """The fields of a config as `config.json` has them, without defaults that are `SPARSE`."""
    if config.mixer_kind is None:
        return _nested(config)
    fields = {flat: _plain(_get(config, path)) for flat, path in config.flat_fields.items()}
    defaults = {flat: _default(config, path) for flat, path in config.flat_fields.items()}
    return {
        name: value
        for name, value in fields.items()
        if not (sparse and name in SPARSE and value == defaults[name])
    }


def _nested(config: Any) -> dict[str, Any]:
    fields = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    made = {name: _plain(value) for name, value in fields.items()}
    for name in ("mixer", "other_mixer"):
        if fields[name] is not None:
            made[name] = {"kind": fields[name].kind, **made[name]}
    return {name: value for name, value in made.items() if value is not None}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _default(config: Any, path: str) -> Any:
    """The default of the field at `path`."""
    section, _, name = path.partition(".")
    owner = getattr(config, section) if name else config
    return next(one.default for one in dataclasses.fields(owner) if one.name == (name or section))
