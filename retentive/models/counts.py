"""Parameters, FLOPs and bytes of a model, from its config alone.

A multiply-add counts two FLOPs. Embedding look-ups, norms, rotation and activations count nothing.
"""

import torch

from retentive.models.config import ModelConfig, RetNetConfig, TransformerConfig

COUNTED_CHUNK = 64
"""Retention is counted at this chunk size whatever ran: a slow choice is no more work."""


def parameters(config: RetNetConfig | TransformerConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's. A tied head has none of its own."""
    width, depth = config.hidden_size, config.num_hidden_layers
    norm = width * (2 if config.norm == "layernorm" else 1)
    head = 0 if config.tie_word_embeddings else config.vocab_size * width
    return {
        "embedding": config.vocab_size * width,
        mixer_name(config): depth * _mixer_weights(config),
        "ffn": depth * (3 if config.gated_ffn else 2) * width * config.ffn_dim,
        "norms": (2 * depth + 1) * norm,
        "head": head,
    }


def mixer_name(config: ModelConfig) -> str:
    return "retention" if isinstance(config, RetNetConfig) else "attention"


def flops_per_token(
    config: RetNetConfig | TransformerConfig, context: float = 0, *, head: bool = True
) -> float:
    """Forward FLOPs of a token that looks at `context` tokens; training takes three times as many.

    For a whole text of T tokens the mean context is (T+1)/2. Retention does not depend on it.
    """
    counted = parameters(config)
    matrices = counted[mixer_name(config)] + counted["ffn"]
    if head:
        matrices += config.vocab_size * config.hidden_size
    return 2 * matrices + config.num_hidden_layers * mixing_flops(config, context)


def mixing_flops(config: RetNetConfig | TransformerConfig, context: float) -> float:
    """Forward FLOPs a token and layer of the mixer itself, without its projections."""
    if isinstance(config, RetNetConfig):
        return retention_flops(config.num_heads, config.qk_head_dim, config.value_head_dim)
    return attention_flops(config.num_heads, config.head_dim, context)


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
    depth = config.num_hidden_layers
    if isinstance(config, RetNetConfig):
        return depth * config.num_heads * config.qk_head_dim * config.value_head_dim * 4
    return depth * 2 * context * config.kv_heads * config.head_dim * dtype.itemsize


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
    (`weights` says how many bytes of them there are where they are not all of `dtype`). A RetNet's
    state is read and written; keys and values are read.
    """
    if weights is None:
        table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        weights = weight_bytes(config, dtype) - table * dtype.itemsize
    passes = 2 if isinstance(config, RetNetConfig) else 1
    return weights + passes * batch * state_bytes(config, context, dtype=dtype)


def _mixer_weights(config: RetNetConfig | TransformerConfig) -> int:
    """Of one layer."""
    width = config.hidden_size
    if isinstance(config, RetNetConfig):
        return width * config.projected_dims
    return 2 * width * width + 2 * width * config.kv_heads * config.head_dim
