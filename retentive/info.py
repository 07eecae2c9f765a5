"""`retentive info`: what a model is made of, how far its heads remember, what a token costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path

import torch
import tyro
from rich.table import Table

from retentive.arguments import parse
from retentive.errors import InputError
from retentive.models.checkpoint import empty_model, load_config
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.counts import flops_per_token, parameters, state_bytes, weight_bytes
from retentive.ops.decay import half_life, log_decay
from retentive.reports.tables import console, new_table, scaled, size

Config = RetNetConfig | TransformerConfig

CONTEXTS = (2048, 8192, 131072)


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    """A model folder, or a size: demo, 200m, 1.3b, 2.7b, 6.7b, 13b."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, "retentive info", "A model in numbers, from its config alone.")
    config = find_config(options.model)
    tables = {"Parameters": parameter_table(config)}
    columns = {_kind(config): config}
    if isinstance(config, RetNetConfig):
        tables["Heads, the same in every layer: tokens until their memory has halved"] = heads(
            config
        )
        columns |= baselines(config)
    tables["Memory of a sequence: RetNet's state in float32, a KV cache in bfloat16"] = cost_table(
        columns, lambda c, n: size(state_bytes(c, n, dtype=torch.bfloat16))
    )
    tables["FLOPs of a token, by the tokens before it"] = cost_table(
        columns, lambda c, n: scaled(flops_per_token(c, n), 1000, ("", "k", "M", "G", "T"))
    )
    out = console()
    out.print(f"{options.model}: {describe(config)}")
    for title, table in tables.items():
        out.print(f"\n[bold]{title}[/bold]", table, sep="\n")


def find_config(name: str) -> Config:
    """The config in a model folder, or of a named size. InputError where `name` is neither."""
    if Path(name).exists() or "/" in name:
        return load_config(name)
    try:
        return RetNetConfig.named(name)
    except InputError as error:
        raise InputError(f"there is no model folder {name}, and {error}") from None


def baselines(config: RetNetConfig) -> dict[str, Config]:
    """Transformers of as many parameters: keys and values for each head, and for fewer."""
    full = TransformerConfig.matching(config)
    eighth = max(1, full.num_heads // 8)
    fewer = next(n for n in range(eighth, 0, -1) if full.num_heads % n == 0)
    grouped = TransformerConfig.matching(config, num_kv_heads=fewer)
    return {_kind(baseline): baseline for baseline in (full, grouped)}


def describe(config: Config) -> str:
    if isinstance(config, RetNetConfig):
        heads = f"K {config.qk_head_dim} and V {config.value_head_dim}"
    else:
        heads = f"{config.head_dim}, {config.kv_heads} of keys and values"
    scheme = config.quantization
    others = attention_layers(config) if isinstance(config, RetNetConfig) else ""
    bits = "" if scheme is None else f", weights of {scheme.bits} bits"
    return (
        f"{_kind(config)}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_heads} heads of {heads}, FFN {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}{others}{bits}"
    )


def attention_layers(config: RetNetConfig) -> str:
    """What `describe` says of a hybrid's other layers."""
    if config.attention is None:
        return ""
    layers = ", ".join(map(str, config.attention_layers))
    window = config.attention.window
    seen = "" if window is None else f" to the last {window} tokens"
    return f", attention{seen} in layers {layers} (from 0)"


def parameter_table(config: Config) -> Table:
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


def stored_bytes(config: Config) -> int:
    """Of all tensors of a model folder."""
    return sum(tensor.nbytes for tensor in empty_model(config).state_dict().values())


def heads(config: RetNetConfig) -> Table:
    table = new_table("", ["head", "decay γ", "half-life"])
    decays = log_decay(config.num_heads, config.decay)
    for head, (gamma, tokens) in enumerate(
        zip(decays.exp().tolist(), half_life(decays).tolist(), strict=True)
    ):
        shown = "∞" if isinf(tokens) else f"{tokens:,.{1 if tokens < 1000 else 0}f}"
        table.add_row(str(head), f"{gamma:.8g}", shown)
    return table


def cost_table(columns: dict[str, Config], cell: Callable[[Config, int], str]) -> Table:
    """`cell` of each config at each context."""
    table = new_table("", ["context", *columns])
    for context in CONTEXTS:
        table.add_row(f"{context:,}", *(cell(config, context) for config in columns.values()))
    return table


def _kind(config: Config) -> str:
    if isinstance(config, RetNetConfig):
        return "hybrid RetNet" if config.attention_layers else "RetNet"
    fold = config.num_heads // config.kv_heads
    return "Transformer, " + ("MHA" if fold == 1 else f"GQA {fold}-fold")
