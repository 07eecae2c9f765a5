"""yet-another-retnet (github.com/fkodom/yet-another-retnet): the layer of the paper, with biases
everywhere and an activation that is the gate's as well, and no norm before the head.
"""

from dataclasses import dataclass
from typing import Any

from retentive.convert.activations import TORCHSCALE_NAMES, activation
from retentive.convert.dialect import (
    Checkpoint,
    Constant,
    Dialect,
    TheirConfig,
    Weight,
    find_key,
    half_pairs,
)
from retentive.convert.dialects import torchscale
from retentive.convert.source import Source


@dataclass(frozen=True)
class YetAnotherConfig(TheirConfig):
    """The arguments of its RetNet; those that a config.json leaves out are its defaults."""

    num_tokens: int
    d_model: int = 512
    nhead: int = 8
    num_layers: int = 6
    dim_feedforward: int = 2048
    activation: str = "swish"
    norm_first: bool = True
    layer_norm_eps: float = 1e-6

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        act = activation("activation", self.activation, TORCHSCALE_NAMES)
        return {
            "vocab_size": self.num_tokens,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.num_layers,
            "num_heads": self.nhead,
            "qk_dim": self.d_model,
            "value_dim": self.d_model,
            "intermediate_size": self.dim_feedforward,
            "hidden_act": act,
            "gated_ffn": False,
            "gate": True,
            "gate_act": act,
            "decay": "linspace",
            "rotation": "official",
            "rotation_base": 10000.0,
            "row_scale": False,
            "head_norm": "layernorm",
            "head_norm_eps": 1e-6,
            "norm": "layernorm",
            "norm_eps": self.layer_norm_eps,
            "block": "pre-norm" if self.norm_first else "output-norm",
            "final_norm": False,
            "qkv_bias": True,
            "gate_bias": True,
            "out_bias": True,
            "ffn_bias": True,
            "head_bias": True,
            "tie_word_embeddings": False,
        }


def layer(theirs: str, ours: str, rows: Any = None) -> tuple[Weight, Weight]:
    """Weight and bias."""
    start, end = "decoder.layers.{}." + theirs, "layers.{}." + ours
    weight, bias = (Weight(f"{start}.{x}", f"{end}.{x}", rows) for x in ("weight", "bias"))
    return weight, bias


def evidence(source: Source) -> str | None:
    return find_key(source.tensors, "decoder.layers.", ".retention.thetas")


YET_ANOTHER = Dialect(
    "yet-another-retnet",
    "yet-another-retnet's",
    YetAnotherConfig,
    (
        Weight("embedding.weight", "embed_tokens.weight"),
        *layer("norm1", "retention_norm"),
        *layer("retention.q_proj", "retention.q_proj", half_pairs),
        *layer("retention.k_proj", "retention.k_proj", half_pairs),
        *layer("retention.v_proj", "retention.v_proj"),
        *layer("retention.g_proj", "retention.g_proj"),
        *layer("retention.out_proj", "retention.o_proj"),
        *layer("norm2", "ffn_norm"),
        *layer("linear1", "ffn.up_proj"),
        *layer("linear2", "ffn.down_proj"),
        Weight("out.weight", "lm_head.weight"),
        Weight("out.bias", "lm_head.bias"),
    ),
    evidence,
    (Constant("decoder.layers.{}.retention.thetas", torchscale.angle),),
)
