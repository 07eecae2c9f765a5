"""flash-linear-attention's RetNet (github.com/fla-org/flash-linear-attention), hybrids, too.

Until February 2025 the gate and the up projection of its FFN were one matrix: a dialect of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from retentive.convert.activations import TRANSFORMERS_NAMES, activation
from retentive.convert.dialect import (
    Checkpoint,
    Dialect,
    TheirConfig,
    Weight,
    find_key,
    first_half,
    second_half,
)
from retentive.convert.source import Source
from retentive.models.config import RetNetConfig


@dataclass(frozen=True)
class FlaAttention(TheirConfig):
    """What `attn` holds in a hybrid: which layers have attention instead, and of what kind."""

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "qkv_bias": self.qkv_bias,
            "window": self.window_size,
            "rope_theta": self.rope_theta,
        }

    @classmethod
    def from_ours(cls, config: RetNetConfig) -> Self:
        ours = config.other_mixer
        assert ours is not None
        return cls(
            layers=config.other_layers,
            num_heads=ours.num_heads,
            num_kv_heads=ours.num_kv_heads,
            qkv_bias=ours.qkv_bias,
            window_size=ours.window,
            rope_theta=ours.rope_theta,
        )


@dataclass(frozen=True)
class FlaConfig(TheirConfig):
    written: ClassVar[Mapping[str, Any]] = {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
    }

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    hidden_ratio: float | None = 2
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    elementwise_affine: bool | None = True
    use_output_gate: bool = True
    attn: dict | None = None
    tie_word_embeddings: bool = False
    feature_map: str | None = None
    use_short_conv: bool = False
    attnres_block_size: int | None = None

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(feature_map=None, use_short_conv=False, attnres_block_size=None)
        hybrid = None if self.attn is None else FlaAttention.read(self.attn, "attn")
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "qk_dim": int(self.hidden_size * self.expand_k),
            "value_dim": int(self.hidden_size * self.expand_v),
            "decay": "power",
            "rotation": "rope",
            "rotation_base": 10000.0,
            "row_scale": False,
            "head_norm": "rmsnorm",
            "head_norm_affine": bool(self.elementwise_affine),
            "head_norm_eps": self.norm_eps,
            "gate": self.use_output_gate,
            "gate_act": self._gate_act(),
            "gated_ffn": True,
            "hidden_act": "swish",
            "intermediate_size": self.intermediate_size or self._ffn_dim(),
            "norm": "rmsnorm",
            "norm_eps": self.norm_eps,
            "attention": None if hybrid is None else hybrid.to_ours(checkpoint),
            "attention_layers": () if hybrid is None else tuple(sorted(set(hybrid.layers))),
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    def _gate_act(self) -> str:
        self.only(hidden_act="swish")
        return "swish"

    def _ffn_dim(self) -> int:
        return 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)

    @classmethod
    def from_ours(cls, config: RetNetConfig) -> Self:
        assert config.mixer.qk_dim is not None and config.mixer.value_dim is not None
        hybrid = None if config.other_mixer is None else asdict(FlaAttention.from_ours(config))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_heads=config.mixer.num_heads,
            num_kv_heads=config.mixer.num_kv_heads,
            expand_k=_ratio(config.mixer.qk_dim, config.hidden_size),
            expand_v=_ratio(config.mixer.value_dim, config.hidden_size),
            intermediate_size=config.ffn_dim,
            norm_eps=config.norm_eps,
            elementwise_affine=config.mixer.head_norm_affine,
            use_output_gate=config.mixer.gate,
            attn=hybrid,
            tie_word_embeddings=config.tie_word_embeddings,
        )


@dataclass(frozen=True)
class FlaFusedFfnConfig(FlaConfig):
    """`hidden_act` was that of the gate; its FFN was always activated by swish."""

    def _gate_act(self) -> str:
        return activation("hidden_act", self.hidden_act, TRANSFORMERS_NAMES)


def _ratio(dim: int, width: int) -> float:
    """What gives `dim` when they multiply `width` by it and cut the rest off."""
    ratio = dim / width
    return ratio if int(width * ratio) == dim else math.nextafter(ratio, math.inf)


LAYERS = "model.layers."
# theirs, ours
COMMON = (
    Weight("model.embeddings.weight", "embed_tokens.weight"),
    Weight("model.layers.{}.attn_norm.weight", "layers.{}.retention_norm.weight"),
    Weight("model.layers.{}.attn.q_proj.weight", "layers.{}.retention.q_proj.weight"),
    Weight("model.layers.{}.attn.k_proj.weight", "layers.{}.retention.k_proj.weight"),
    Weight("model.layers.{}.attn.v_proj.weight", "layers.{}.retention.v_proj.weight"),
    Weight("model.layers.{}.attn.g_proj.weight", "layers.{}.retention.g_proj.weight"),
    Weight("model.layers.{}.attn.o_proj.weight", "layers.{}.retention.o_proj.weight"),
    Weight(
        "model.layers.{}.attn.g_norm_swish_gate.weight",  # fused with the gate
        "layers.{}.retention.head_norm.weight",
        when=lambda config: config.mixer.gate,
    ),
    Weight("model.layers.{}.attn.g_norm.weight", "layers.{}.retention.head_norm.weight"),
    Weight("model.layers.{}.mlp_norm.weight", "layers.{}.ffn_norm.weight"),
    Weight("model.layers.{}.mlp.down_proj.weight", "layers.{}.ffn.down_proj.weight"),
    Weight("model.norm.weight", "norm.weight"),
    Weight("lm_head.weight", "lm_head.weight"),
    # the attention layers of hybrids
    Weight("model.layers.{}.attn_norm.weight", "layers.{}.attention_norm.weight"),
    Weight("model.layers.{}.attn.q_proj.weight", "layers.{}.attention.q_proj.weight"),
    Weight("model.layers.{}.attn.k_proj.weight", "layers.{}.attention.k_proj.weight"),
    Weight("model.layers.{}.attn.v_proj.weight", "layers.{}.attention.v_proj.weight"),
    Weight("model.layers.{}.attn.q_proj.bias", "layers.{}.attention.q_proj.bias"),
    Weight("model.layers.{}.attn.k_proj.bias", "layers.{}.attention.k_proj.bias"),
    Weight("model.layers.{}.attn.v_proj.bias", "layers.{}.attention.v_proj.bias"),
    Weight("model.layers.{}.attn.o_proj.weight", "layers.{}.attention.o_proj.weight"),
)
FFN = (
    Weight("model.layers.{}.mlp.gate_proj.weight", "layers.{}.ffn.gate_proj.weight"),
    Weight("model.layers.{}.mlp.up_proj.weight", "layers.{}.ffn.up_proj.weight"),
)
FUSED_FFN = (
    Weight("model.layers.{}.mlp.gate_proj.weight", "layers.{}.ffn.gate_proj.weight", first_half),
    Weight("model.layers.{}.mlp.gate_proj.weight", "layers.{}.ffn.up_proj.weight", second_half),
)


def evidence(source: Source) -> str | None:
    return find_key(source.tensors, LAYERS, ".mlp.up_proj.") and _retention(source)


def evidence_of_fused_ffn(source: Source) -> str | None:
    return None if find_key(source.tensors, LAYERS, ".mlp.up_proj.") else _retention(source)


def _retention(source: Source) -> str | None:
    """The norm within retention; where that has no weights, the norm in front."""
    if "model.embeddings.weight" not in source.tensors:
        return None
    norms = (find_key(source.tensors, LAYERS, name) for name in (".attn.g_norm", ".attn_norm."))
    return next(filter(None, norms), None)


FLA = Dialect("fla", "flash-linear-attention's", FlaConfig, (*COMMON, *FFN), evidence)
FLA_FUSED_FFN = replace(
    FLA,
    name="fla-fused-ffn",
    title="flash-linear-attention's of before February 2025",
    config=FlaFusedFfnConfig,
    weights=(*COMMON, *FUSED_FFN),
    evidence=evidence_of_fused_ffn,
)
