"""Parameters, FLOPs and bytes of a model, from its config alone.

A multiply-add counts two FLOPs. Embedding look-ups, norms, rotation and activations count nothing.
"""

import torch

from retentive.models.config import ModelConfig, RetNetConfig, TransformerConfig
from retentive.models.nested import AttentionConfig

COUNTED_CHUNK = 64
"""Retention is counted at this chunk size whatever ran: a slow choice is no more work."""


def parameters(config: RetNetConfig | TransformerConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's. A tied head has none of its own.

    A hybrid has both kinds of mixer. Norms are those of heads, too.
    """
    width, words = config.hidden_size, config.vocab_size
    mixers = {kind: depth * _mixer(config, kind, vectors=True) for kind, depth in _depths(config)}
    return {
        "embedding": words * width,
        **mixers,
        "ffn": config.num_hidden_layers * _ffn(config, vectors=True),
        "norms": _norms(config),
        "head": 0 if config.tie_word_embeddings else words * (width + config.head_bias),
    }


def mixer_name(config: ModelConfig) -> str:
    return "retention" if isinstance(config, RetNetConfig) else "attention"


def flops_per_token(
    config: RetNetConfig | TransformerConfig, context: float = 0, *, head: bool = True
) -> float:
    """Forward FLOPs of a token that looks at `context` tokens; training takes three times as many.

    For a whole text of T tokens the mean context is (T+1)/2. Retention does not depend on it.
    """
    matrices = config.num_hidden_layers * _ffn(config)
    if head:
        matrices += config.vocab_size * config.hidden_size
    mixing = 0.0
    for kind, depth in _depths(config):
        matrices += depth * _mixer(config, kind)
        mixing += depth * mixing_flops(config, context, kind)
    return 2 * matrices + mixing


def mixing_flops(
    config: RetNetConfig | TransformerConfig, context: float, kind: str | None = None
) -> float:
    """Forward FLOPs a token and layer of the mixer itself, without its projections.

    `kind`: of a hybrid's "attention" layers.
    """
    if isinstance(config, RetNetConfig) and kind in (None, "retention"):
        return retention_flops(config.num_heads, config.qk_head_dim, config.value_head_dim)
    attention = _attention(config)
    seen = context if attention.window is None else min(context, attention.window)
    return attention_flops(attention.num_heads, config.hidden_size // attention.num_heads, seen)


def retention_flops(heads: int, K: int, V: int) -> int:
    """Forward FLOPs of a token: within its chunk q·k and p·v, and the state updated and read."""
    return heads * (2 * COUNTED_CHUNK * (K + V) + 4 * K * V)


def attention_flops(heads: int, head_dim: int, context: float) -> float:
    """Forward FLOPs of a token that looks at `context` tokens."""
    return 4 * context * heads * head_dim


def state_bytes(
    config: RetNetConfig | TransformerConfig,
    context: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Of one sequence: RetNet's state (always float32), or keys and values of `context` tokens."""
    return sum(
        depth * _layer_state_bytes(config, kind, context, dtype) for kind, depth in _depths(config)
    )


def weight_bytes(
    config: RetNetConfig | TransformerConfig, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of all weights."""
    return sum(parameters(config).values()) * dtype.itemsize


def decode_bytes(
    config: RetNetConfig | TransformerConfig,
    batch: int,
    context: int,
    *,
    dtype: torch.dtype = torch.float32,
    weights: int | None = None,
) -> int:
    """Bytes that a decoding step of `batch` rows has to move, behind `context` tokens of each.

    Every weight is read once, the head included, the embedding table only where it is the head
    (`weights` says how many bytes of them there are where they are not all of `dtype`). The state
    of retention is read and written; keys and values are read.
    """
    if weights is None:
        table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        weights = weight_bytes(config, dtype) - table * dtype.itemsize
    state = 0
    for kind, depth in _depths(config):
        passes = 2 if kind == "retention" else 1
        state += passes * depth * _layer_state_bytes(config, kind, context, dtype)
    return weights + batch * state


def _depths(config: RetNetConfig | TransformerConfig) -> list[tuple[str, int]]:
    """How many layers there are of each kind of mixer."""
    name, others = mixer_name(config), 0
    if isinstance(config, RetNetConfig):
        others = len(config.attention_layers)
    depths = [(name, config.num_hidden_layers - others)]
    return [*depths, ("attention", others)] if others else depths


def _attention(config: RetNetConfig | TransformerConfig) -> AttentionConfig:
    if isinstance(config, TransformerConfig):
        return AttentionConfig(config.num_heads, config.kv_heads)
    assert config.attention is not None
    return config.attention


def _mixer(config: RetNetConfig | TransformerConfig, kind: str, vectors: bool = False) -> int:
    """Weights of one layer's projections, with or without their biases."""
    width = config.hidden_size
    if isinstance(config, RetNetConfig) and kind == "retention":
        heads, groups = config.num_heads, config.kv_heads
        K, V = config.qk_head_dim, config.value_head_dim
        of_qkv = heads * K + groups * (K + V)
        biases = config.qkv_bias * of_qkv + config.gate_bias * heads * V + config.out_bias * width
        return width * config.projected_dims + vectors * biases
    attention = _attention(config)
    of_qkv = width + 2 * (width // attention.num_heads) * attention.kv_heads
    return width * (width + of_qkv) + vectors * attention.qkv_bias * of_qkv


def _ffn(config: ModelConfig, vectors: bool = False) -> int:
    """Weights of one layer's projections, with or without biases and norm."""
    width, inner, up = config.hidden_size, config.ffn_dim, 2 if config.gated_ffn else 1
    beside = config.ffn_bias * (up * inner + width) + _norm(config.ffn_subln, inner)
    return (up + 1) * width * inner + vectors * beside


def _norms(config: RetNetConfig | TransformerConfig) -> int:
    depth = config.num_hidden_layers
    count = 2 * depth + config.final_norm + config.embed_norm
    total = count * _norm(config.norm, config.hidden_size)
    if isinstance(config, RetNetConfig) and config.head_norm_affine:
        retentions = depth - len(config.attention_layers)
        total += retentions * _norm(config.head_norm, config.value_head_dim)
    return total


def _norm(kind: str, size: int) -> int:
    return {"layernorm": 2, "rmsnorm": 1, "none": 0}[kind] * size


def _layer_state_bytes(
    config: RetNetConfig | TransformerConfig, kind: str, context: int, dtype: torch.dtype
) -> int:
    if isinstance(config, RetNetConfig) and kind == "retention":
        return config.num_heads * config.qk_head_dim * config.value_head_dim * 4
    attention = _attention(config)
    held = context if attention.window is None else min(context, attention.window - 1)
    dims = attention.kv_heads * (config.hidden_size // attention.num_heads)
    return 2 * held * dims * dtype.itemsize
