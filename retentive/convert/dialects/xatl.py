"""RetNet-XATL (github.com/syncdoth/RetNet-XATL): syncdoth's version 2 with the options of GPT-NeoX,
from whose models its own were distilled: parallel blocks, biases, rotation of a part of each head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retentive.convert.activations import XATL_NAMES, activation
from retentive.convert.dialect import Checkpoint, Constant, Dialect, TheirConfig, Weight
from retentive.convert.dialects import torchscale
from retentive.convert.source import CONFIG, Source
from retentive.errors import InputError
from retentive.models.config import RetNetConfig
from retentive.ops.decay import log_decay

DECAY = "model.retnet_rel_pos.decay"


@dataclass(frozen=True)
class XatlConfig(TheirConfig):
    vocab_size: int
    decoder_embed_dim: int
    decoder_value_embed_dim: int
    decoder_retention_heads: int
    decoder_ffn_embed_dim: int
    decoder_layers: int
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    layernorm_eps: float = 1e-6
    deepnorm: bool = False
    use_glu: bool = True
    use_rms_norm: bool = True
    groupnorm_affine: bool = False
    parallel_residual: bool = False
    rotary_percentage: float = 1.0
    retnet_stability_update: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    shared_attention_norm: bool = False
    retnet_bottleneck: int | None = None
    hybrid_attention_layers: tuple[int, ...] | None = None

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(shared_attention_norm=False, retnet_bottleneck=None, hybrid_attention_layers=None)
        pre_norm = self.decoder_normalize_before and not self.deepnorm
        if self.parallel_residual and not pre_norm:
            raise InputError("parallel_residual is known here only with norms before the layers")
        norm = "rmsnorm" if self.use_rms_norm else "layernorm"
        first = "model.layers.0."
        bias = f"{first}retention.q_proj.bias" in checkpoint.tensors
        return torchscale.decoder_fields(
            vocab_size=self.vocab_size,
            width=self.decoder_embed_dim,
            layers=self.decoder_layers,
            deepnorm=self.deepnorm,
            scale_embedding=not self.no_scale_embedding,
            eps=self.layernorm_eps,
        ) | {
            "num_heads": self.decoder_retention_heads,
            "value_dim": self.decoder_value_embed_dim,
            "intermediate_size": self.decoder_ffn_embed_dim,
            "hidden_act": activation("activation_fn", self.activation_fn, XATL_NAMES),
            "gated_ffn": self.use_glu,
            "decay": self._decay(checkpoint),
            "rotary_dim": self._rotary_dim(),
            "row_scale": self.retnet_stability_update,
            "head_norm": norm if self.groupnorm_affine else "rmsnorm",
            "head_norm_affine": self.groupnorm_affine,
            "norm": norm,
            "block": "parallel"
            if self.parallel_residual
            else "pre-norm"
            if pre_norm
            else "post-norm",
            "final_norm": pre_norm,
            "embed_norm": self.layernorm_embedding,
            "qkv_bias": bias,
            "gate_bias": bias,
            "out_bias": bias,
            "ffn_bias": f"{first}ffn.fc1.bias" in checkpoint.tensors,
            "ffn_subln": _subln(checkpoint, f"{first}ffn.ffn_layernorm."),
            "head_bias": self.lm_head_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    def _decay(self, checkpoint: Checkpoint) -> str | tuple[float, ...]:
        """As it is stored, log₂ γ: `use_lm_decay` computes something else than its name says."""
        if DECAY not in checkpoint.tensors:
            return "power"
        return tuple((checkpoint.read(DECAY).double() * math.log(2)).tolist())

    def _rotary_dim(self) -> int | None:
        K = self.decoder_embed_dim // self.decoder_retention_heads
        turning = int(K * self.rotary_percentage)
        return None if turning == K else turning


def _subln(checkpoint: Checkpoint, start: str) -> str:
    if f"{start}weight" not in checkpoint.tensors:
        return "none"
    return "layernorm" if f"{start}bias" in checkpoint.tensors else "rmsnorm"


def angle(config: RetNetConfig) -> Tensor:
    """θ of what turns; in float32, as theirs."""
    exponents = torch.linspace(0, 1, (config.mixer.rotary_dim or config.mixer.qk_head_dim) // 2)
    return 1.0 / 10000**exponents


def decay(config: RetNetConfig) -> Tensor:
    """log₂ γ `[H]`."""
    return log_decay(config.mixer.num_heads, config.mixer.decay) / math.log(2)


def evidence(source: Source) -> str | None:
    """Its keys may be those of version 2."""
    return f"rotary_percentage in {CONFIG}" if "rotary_percentage" in source.config else None


def layer(theirs: str, ours: str) -> Weight:
    return Weight("model.layers.{}." + theirs, "layers.{}." + ours)


XATL = Dialect(
    "xatl",
    "RetNet-XATL",
    XatlConfig,
    (
        *torchscale.decoder("model."),
        layer("retention.group_norm.weight", "retention.head_norm.weight"),
        layer("retention.group_norm.bias", "retention.head_norm.bias"),
        layer("ffn.fc1.bias", "ffn.gate_proj.bias"),
        Weight(
            "model.layers.{}.ffn.gate.bias",
            "layers.{}.ffn.up_proj.bias",
            when=torchscale.gated,
        ),
        Weight("lm_head.weight", "lm_head.weight"),
        Weight("lm_head.bias", "lm_head.bias"),
    ),
    evidence,
    (Constant("model.retnet_rel_pos.angle", angle), Constant(DECAY, decay)),
)
