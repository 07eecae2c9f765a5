"""syncdoth's RetNet (github.com/syncdoth/RetNet), version 1: heads turned by one list of angles
over all of them, xPos, decays of its own, no norm before the head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retentive.convert.dialect import (
    Checkpoint,
    Constant,
    Dialect,
    TheirConfig,
    Weight,
    find_key,
    half_pairs,
)
from retentive.convert.source import Source
from retentive.models.config import RetNetConfig

XPOS_BASE = 512.0


@dataclass(frozen=True)
class SyncdothV1Config(TheirConfig):
    """Whether the head is tied was left to Hugging Face's default of that time: it is."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    qk_dim: int
    v_dim: int
    ffn_proj_size: int
    use_default_gamma: bool = False
    tie_word_embeddings: bool = True

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        first = "model.blocks.0."
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_heads": self.num_heads,
            "qk_dim": self.qk_dim,
            "value_dim": self.v_dim,
            "intermediate_size": self.ffn_proj_size,
            "hidden_act": "gelu",
            "gated_ffn": False,
            "gate": True,
            "decay": "power" if self.use_default_gamma else "linspace",
            "rotation": "rope-across-heads",
            "rotation_base": 10000.0,
            "xpos_base": XPOS_BASE,
            "row_scale": False,
            "head_norm": "layernorm",
            "head_norm_eps": 1e-5,
            "norm": "layernorm",
            "norm_eps": 1e-5,
            "final_norm": False,
            "qkv_bias": f"{first}msr.qkv.bias" in checkpoint.tensors,
            "gate_bias": f"{first}msr.gated.bias" in checkpoint.tensors,
            "out_bias": f"{first}msr.proj.bias" in checkpoint.tensors,
            "ffn_bias": f"{first}ffn.0.bias" in checkpoint.tensors,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


# q, k and v are one projection: their rows, one after the other.


def queries(config: RetNetConfig, count: int) -> Tensor:
    return half_pairs(config, count)


def keys(config: RetNetConfig, count: int) -> Tensor:
    return count + half_pairs(config, count)


def values(config: RetNetConfig, count: int) -> Tensor:
    return 2 * config.mixer.num_heads * config.mixer.qk_head_dim + torch.arange(count)


def gamma(config: RetNetConfig) -> Tensor:
    """γ itself `[H]`, in float32 as theirs."""
    if config.mixer.decay == "power":
        return 1 - 2 ** (-5 - torch.arange(config.mixer.num_heads, dtype=torch.float32))
    return 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), config.mixer.num_heads).exp()


def zeta(config: RetNetConfig) -> Tensor:
    """xPos's ζ of each pair of all heads, `[H·K/2]`."""
    dims = config.mixer.num_heads * config.mixer.qk_head_dim
    return (torch.arange(0, dims, 2) + 0.4 * dims) / (1.4 * dims)


def block(theirs: str, ours: str, rows: Any = None) -> tuple[Weight, Weight]:
    """The weight and, if there is one, the bias."""
    start, end = "model.blocks.{}." + theirs, "layers.{}." + ours
    weight, bias = (Weight(f"{start}.{x}", f"{end}.{x}", rows) for x in ("weight", "bias"))
    return weight, bias


def evidence(source: Source) -> str | None:
    return find_key(source.tensors, "model.blocks.", ".msr.qkv.weight")


SYNCDOTH_V1 = Dialect(
    "syncdoth-v1",
    "syncdoth's RetNet, version 1",
    SyncdothV1Config,
    (
        Weight("model.embedding.weight", "embed_tokens.weight"),
        *block("ln1", "retention_norm"),
        *block("msr.qkv", "retention.q_proj", queries),
        *block("msr.qkv", "retention.k_proj", keys),
        *block("msr.qkv", "retention.v_proj", values),
        *block("msr.gated", "retention.g_proj"),
        *block("msr.proj", "retention.o_proj"),
        *block("ln2", "ffn_norm"),
        *block("ffn.0", "ffn.up_proj"),
        *block("ffn.2", "ffn.down_proj"),
        Weight("lm_head.weight", "lm_head.weight"),
    ),
    evidence,
    (
        Constant("model.blocks.{}.msr.decay", gamma),
        Constant("model.blocks.{}.msr.xpos.scale", zeta),
    ),
)
