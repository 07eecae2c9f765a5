"""torchscale's RetNetDecoder as it first was, from July to September 2023: LayerNorms, biases
everywhere, a plain FFN with a norm inside, values of twice the width.
"""

from dataclasses import dataclass
from typing import Any

from retentive.convert.activations import TORCHSCALE_NAMES, activation
from retentive.convert.dialect import Checkpoint, Dialect, TheirConfig, Weight, find_key
from retentive.convert.dialects import torchscale
from retentive.convert.source import Source


@dataclass(frozen=True)
class Torchscale2023Config(TheirConfig):
    """As `TorchscaleConfig`; the defaults are those of that time."""

    decoder_embed_dim: int = 768
    decoder_retention_heads: int = 3
    decoder_ffn_embed_dim: int = 1536
    decoder_layers: int = 12
    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    layernorm_eps: float = 1e-5
    deepnorm: bool = False
    share_decoder_input_output_embed: bool = False
    vocab_size: int = -1
    multiway: bool = False
    moe_freq: int = 0

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(multiway=False, moe_freq=0)
        pre_norm = "layer_norm.weight" in checkpoint.tensors
        subln = "layers.0.ffn.ffn_layernorm.weight" in checkpoint.tensors
        return torchscale.decoder_fields(
            vocab_size=torchscale.vocabulary(self.vocab_size, checkpoint),
            width=self.decoder_embed_dim,
            layers=self.decoder_layers,
            deepnorm=self.deepnorm,
            scale_embedding=not self.no_scale_embedding,
            eps=self.layernorm_eps,
        ) | {
            "num_heads": self.decoder_retention_heads,
            "value_dim": 2 * self.decoder_embed_dim,
            "intermediate_size": self.decoder_ffn_embed_dim,
            "hidden_act": activation("activation_fn", self.activation_fn, TORCHSCALE_NAMES),
            "gated_ffn": False,
            "head_norm": "layernorm",
            "head_norm_eps": 1e-6,
            "norm": "layernorm",
            "block": "pre-norm" if pre_norm else "post-norm",
            "final_norm": pre_norm,
            "embed_norm": self.layernorm_embedding,
            "qkv_bias": True,
            "gate_bias": True,
            "out_bias": True,
            "ffn_bias": True,
            "ffn_subln": "layernorm" if subln else "none",
            "tie_word_embeddings": self.share_decoder_input_output_embed,
        }


def evidence(source: Source) -> str | None:
    return find_key(source.tensors, "layers.", ".retention.q_proj.bias")


TORCHSCALE_2023 = Dialect(
    "torchscale-2023",
    "torchscale's of mid 2023",
    Torchscale2023Config,
    (*torchscale.decoder(""), Weight("output_projection.weight", "lm_head.weight")),
    evidence,
    torchscale.positions("", torchscale.decay),
)
