"""torchscale's RetNetDecoder (github.com/microsoft/torchscale) since September 2023.

Also the keys that all code derived from it shares: `decoder` is their table. A checkpoint is the
decoder's state dict, or fairseq's {"model": {"decoder....": ...}}.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

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
from retentive.convert.source import Source
from retentive.models.config import RetNetConfig


@dataclass(frozen=True)
class TorchscaleConfig(TheirConfig):
    """The arguments of its RetNetConfig; those that a config.json leaves out are its defaults.

    `decoder_normalize_before` and `subln` are not read: what they lead to has changed between
    versions. A decoder is pre-norm if and only if it has a final norm, and that is in the weights.
    """

    decoder_embed_dim: int = 768
    decoder_value_embed_dim: int = 1280
    decoder_retention_heads: int = 3
    decoder_ffn_embed_dim: int = 1280
    decoder_layers: int = 12
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    layernorm_eps: float = 1e-6
    deepnorm: bool = False
    subln: bool = True
    share_decoder_input_output_embed: bool = False
    vocab_size: int = -1
    multiway: bool = False
    moe_freq: int = 0

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(multiway=False, moe_freq=0)
        pre_norm = "layer_norm.weight" in checkpoint.tensors
        return decoder_fields(
            vocab_size=vocabulary(self.vocab_size, checkpoint),
            width=self.decoder_embed_dim,
            layers=self.decoder_layers,
            deepnorm=self.deepnorm,
            scale_embedding=not self.no_scale_embedding,
            eps=self.layernorm_eps,
        ) | {
            "num_heads": self.decoder_retention_heads,
            "value_dim": self.decoder_value_embed_dim,
            "intermediate_size": self.decoder_ffn_embed_dim,
            "hidden_act": activation("activation_fn", self.activation_fn, TORCHSCALE_NAMES),
            "gated_ffn": True,
            "block": "pre-norm" if pre_norm else "post-norm",
            "final_norm": pre_norm,
            "embed_norm": self.layernorm_embedding,
            "tie_word_embeddings": self.share_decoder_input_output_embed,
        }

    @classmethod
    def from_ours(cls, config: RetNetConfig) -> Self:
        assert config.mixer.value_dim is not None
        pre_norm, deepnorm = config.block == "pre-norm", config.residual_scale != 1
        return cls(
            vocab_size=config.vocab_size,
            decoder_embed_dim=config.hidden_size,
            decoder_value_embed_dim=config.mixer.value_dim,
            decoder_retention_heads=config.mixer.num_heads,
            decoder_ffn_embed_dim=config.ffn_dim,
            decoder_layers=config.num_hidden_layers,
            activation_fn=config.ffn.act,
            layernorm_eps=config.norm_eps,
            no_scale_embedding=config.embed_scale == 1,
            layernorm_embedding=config.embed_norm,
            deepnorm=deepnorm,
            subln=pre_norm and not deepnorm,
            decoder_normalize_before=pre_norm,
            share_decoder_input_output_embed=config.tie_word_embeddings,
        )


def decoder_fields(
    *, vocab_size: int, width: int, layers: int, deepnorm: bool, scale_embedding: bool, eps: float
) -> dict[str, Any]:
    """The fields of our config that all versions and descendants have in common."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "qk_dim": width,
        "decay": "power",
        "rotation": "official",
        "rotation_base": 10000.0,
        "row_scale": True,
        "head_norm": "rmsnorm",
        "head_norm_eps": eps,
        "norm": "rmsnorm",
        "norm_eps": eps,
        "gate": True,
        "residual_scale": (2 * layers) ** 0.25 if deepnorm else 1.0,
        "embed_scale": math.sqrt(width) if scale_embedding else 1.0,
    }


def vocabulary(given: int, checkpoint: Checkpoint) -> int:
    """-1 where it is not given: fairseq has it from a dictionary, and so have the weights."""
    embedding = checkpoint.tensors.get("embed_tokens.weight")
    return given if given >= 0 or embedding is None else embedding.shape[0]


def gated(config: RetNetConfig) -> bool:
    return config.ffn.gated


def plain(config: RetNetConfig) -> bool:
    return not config.ffn.gated


def decoder(prefix: str) -> tuple[Weight, ...]:
    """theirs, ours; entries count for models that have them (biases, norms), so none is optional.

    In a gated FFN fc1 is what is activated.
    """
    table = (
        Weight("embed_tokens.weight", "embed_tokens.weight"),
        Weight("layernorm_embedding.weight", "embed_norm.weight"),
        Weight("layernorm_embedding.bias", "embed_norm.bias"),
        Weight("layers.{}.retention_layer_norm.weight", "layers.{}.retention_norm.weight"),
        Weight("layers.{}.retention_layer_norm.bias", "layers.{}.retention_norm.bias"),
        Weight(
            "layers.{}.retention.q_proj.weight", "layers.{}.retention.q_proj.weight", half_pairs
        ),
        Weight("layers.{}.retention.q_proj.bias", "layers.{}.retention.q_proj.bias", half_pairs),
        Weight(
            "layers.{}.retention.k_proj.weight", "layers.{}.retention.k_proj.weight", half_pairs
        ),
        Weight("layers.{}.retention.k_proj.bias", "layers.{}.retention.k_proj.bias", half_pairs),
        Weight("layers.{}.retention.v_proj.weight", "layers.{}.retention.v_proj.weight"),
        Weight("layers.{}.retention.v_proj.bias", "layers.{}.retention.v_proj.bias"),
        Weight("layers.{}.retention.g_proj.weight", "layers.{}.retention.g_proj.weight"),
        Weight("layers.{}.retention.g_proj.bias", "layers.{}.retention.g_proj.bias"),
        Weight("layers.{}.retention.out_proj.weight", "layers.{}.retention.o_proj.weight"),
        Weight("layers.{}.retention.out_proj.bias", "layers.{}.retention.o_proj.bias"),
        Weight("layers.{}.final_layer_norm.weight", "layers.{}.ffn_norm.weight"),
        Weight("layers.{}.final_layer_norm.bias", "layers.{}.ffn_norm.bias"),
        Weight("layers.{}.ffn.fc1.weight", "layers.{}.ffn.gate_proj.weight", when=gated),
        Weight("layers.{}.ffn.gate.weight", "layers.{}.ffn.up_proj.weight", when=gated),
        Weight("layers.{}.ffn.fc1.weight", "layers.{}.ffn.up_proj.weight", when=plain),
        Weight("layers.{}.ffn.fc1.bias", "layers.{}.ffn.up_proj.bias", when=plain),
        Weight("layers.{}.ffn.ffn_layernorm.weight", "layers.{}.ffn.subln.weight"),
        Weight("layers.{}.ffn.ffn_layernorm.bias", "layers.{}.ffn.subln.bias"),
        Weight("layers.{}.ffn.fc2.weight", "layers.{}.ffn.down_proj.weight"),
        Weight("layers.{}.ffn.fc2.bias", "layers.{}.ffn.down_proj.bias"),
        Weight("layer_norm.weight", "norm.weight"),
        Weight("layer_norm.bias", "norm.bias"),
    )
    return tuple(Weight(prefix + w.theirs, w.ours, w.rows, w.when) for w in table)


# In float32 and step by step as they compute them, so that what is written is what they would have.


def angle(config: RetNetConfig) -> Tensor:
    """θ, each twice, `[K]`."""
    exponents = torch.linspace(0, 1, config.mixer.qk_head_dim // 2)
    return (1.0 / 10000**exponents).repeat_interleave(2)


def decay(config: RetNetConfig) -> Tensor:
    """log γ `[H]`."""
    heads = torch.arange(config.mixer.num_heads, dtype=torch.float32)
    return (1 - 2 ** (-5 - heads)).log()


def positions(prefix: str, decay: Callable[[RetNetConfig], Tensor]) -> tuple[Constant, ...]:
    """The buffers of its relative positions."""
    return (
        Constant(prefix + "retnet_rel_pos.angle", angle),
        Constant(prefix + "retnet_rel_pos.decay", decay),
    )


def evidence(source: Source) -> str | None:
    """What other descendants of the code have besides must be ruled out before this is asked."""
    return find_key(source.tensors, "layers.", ".retention.q_proj.weight")


TORCHSCALE = Dialect(
    "torchscale",
    "torchscale's",
    TorchscaleConfig,
    (*decoder(""), Weight("output_projection.weight", "lm_head.weight")),
    evidence,
    positions("", decay),
    stores_tied_head=True,
)
