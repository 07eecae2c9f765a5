"""`retentive info`: what a model is made of, how far its heads remember, what a token costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.table import Table

from retentive.arguments import parse
from retentive.convert.loading import load_config
from retentive.errors import InputError
from retentive.models.build import shapes
from retentive.models.config import ModelConfig, RetNetConfig
from retentive.models.counts import (
    flops_per_token,
    half_lives,
    parameters,
    state_bytes,
    weight_bytes,
)
from retentive.models.matching import matching_transformer
from retentive.reports.tables import console, new_table, scaled, size

CONTEXTS = (2048, 8192, 131072)


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    """A model folder, or a size: demo, 200m, 1.3b, 2.7b, 6.7b, 13b."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, "retentive info", "A model in numbers, from its config alone.")
    config = find_config(options.model)
    tables = {"Parameters": parameter_table(config)}
    if half_lives(config):
        title = "Heads, the same in every layer: tokens until their memory has halved"
        tables[title] = heads(config)
    columns = {_kind(config): config, **baselines(config)}
    tables["Memory of a sequence: fixed states in float32, a KV cache in bfloat16"] = cost_table(
        columns, lambda c, n: size(state_bytes(c, n, dtype=torch.bfloat16))
    )
    tables["FLOPs of a token, by the tokens before it"] = cost_table(
        columns, lambda c, n: scaled(flops_per_token(c, n), 1000, ("", "k", "M", "G", "T"))
    )
    out = console()
    out.print(f"{options.model}: {describe(config)}")
    for title, table in tables.items():
        out.print(f"\n[bold]{title}[/bold]", table, sep="\n")


def find_config(name: str) -> ModelConfig:
    """The config in a model folder, or of a named size. InputError where `name` is neither."""
    if Path(name).exists() or "/" in name:
        return load_config(name)
    try:
        return RetNetConfig.named(name)
    except InputError as error:
        raise InputError(f"there is no model folder {name}, and {error}") from None


def baselines(config: ModelConfig) -> dict[str, ModelConfig]:
    """Transformers of as many parameters, to compare a state of fixed size with.

    Keys and values for each head, and for fewer.
    """
    if shapes(config).state_grows or config.block == "mixer-only":
        return {}
    full = matching_transformer(config)
    eighth = max(1, full.mixer.num_heads // 8)
    fewer = next(n for n in range(eighth, 0, -1) if full.mixer.num_heads % n == 0)
    grouped = matching_transformer(config, num_kv_heads=fewer)
    return {_kind(baseline): baseline for baseline in (full, grouped)}


def describe(config: ModelConfig) -> str:
    mixers = [block.mixer.describe() for block in shapes(config).blocks]
    kinds = list(dict.fromkeys(mixers))
    said = kinds[0]
    for other in kinds[1:]:
        layers = ", ".join(str(i) for i, mixer in enumerate(mixers) if mixer == other)
        said += f"; in layers {layers} (from 0) {other}"
    scheme = config.quantization
    bits = "" if scheme is None else f", weights of {scheme.bits} bits"
    ffn = "no FFN" if config.block == "mixer-only" else f"FFN {config.ffn_dim}"
    return (
        f"{_kind(config)}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{ffn}, vocabulary {config.vocab_size}{bits}; {said}"
    )


def parameter_table(config: ModelConfig) -> Table:
    table = new_table("", ["part", "parameters", "share"], words=["part"])
    parts = parameters(config)
    total = sum(parts.values())
    for part, count in parts.items():
        tied = part == "head" and not count
        table.add_row(part, "tied" if tied else f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}")
    for dtype in (torch.float32, torch.bfloat16):
        table.add_row(f"in {dtype}".replace("torch.", ""), size(weight_bytes(config, dtype)))
    if config.quantization is not None:
        table.add_row(f"as stored, {config.quantization.bits} bits", size(stored_bytes(config)))
    return table


def stored_bytes(config: ModelConfig) -> int:
    """Of all tensors of a model folder."""
    return sum(tensor.nbytes for tensor in shapes(config).state_dict().values())


def heads(config: ModelConfig) -> Table:
    table = new_table("", ["head", "decay γ", "half-life"])
    for head, tokens in enumerate(half_lives(config)):
        shown = "∞" if isinf(tokens) else f"{tokens:,.{1 if tokens < 1000 else 0}f}"
        table.add_row(str(head), f"{0.5 ** (1 / tokens):.8g}", shown)
    return table


def cost_table(columns: dict[str, ModelConfig], cell: Callable[[ModelConfig, int], str]) -> Table:
    """`cell` of each config at each context."""
    table = new_table("", ["context", *columns])
    for context in CONTEXTS:
        table.add_row(f"{context:,}", *(cell(config, context) for config in columns.values()))
    return table


def _kind(config: ModelConfig) -> str:
    names = [block.mixer.name for block in shapes(config).blocks]
    if set(names) == {"attention"}:
        attention: Any = config.mixer
        fold = attention.num_heads // attention.kv_heads
        return "Transformer, " + ("MHA" if fold == 1 else f"GQA {fold}-fold")
    known = {"retention": "RetNet"}.get(names[0], names[0])
    return known if len(set(names)) == 1 else f"hybrid {known}"
