"""The baseline: a pre-norm Transformer with rotary positions and a cache of keys and values.

Shapes: B rows, T tokens, S keys, D width, H query heads, G key-value heads, d head dim. x is
`[B,T,D]`; once rotated, heads go before tokens: q `[B,H,T,d]`, k and v `[B,G,S,d]`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from retentive.models.config import TransformerConfig
from retentive.models.kv_cache import KVCache, Pair
from retentive.models.language_model import LanguageModel
from retentive.models.layers import deepnet_gain, dropout, feed_forward, norm
from retentive.models.layout import Layout, Rotation, rotate
from retentive.models.linear import Linear


class Attention(nn.Module):
    """Causal softmax attention, `F.scaled_dot_product_attention` underneath."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, hidden_size)
        self.k_proj = Linear(hidden_size, kv_dim)
        self.v_proj = Linear(hidden_size, kv_dim)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, cache: KVCache | None, layout: Layout
    ) -> tuple[Tensor, KVCache | None]:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(q, layout.angles.cos, layout.angles.sin)
        k = rotate(k, layout.angles.key_cos, layout.angles.key_sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if layout.cu_seqlens is not None:
            o, cache = _packed(q, k, v, cache, layout)
        elif cache is None:
            o, cache = attend(q, (k, v)), KVCache.of((k, v)) if layout.keeps_state else None
        else:
            cache = cache.append((k, v))
            o = attend(q, cache.kv, layout.positions if cache.uniform is None else None)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), cache

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None
    ) -> None:
        """As `MultiScaleRetention.init_weights`."""
        official = initialization == "official"
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if official:
                gain = 1.0 if projection is self.o_proj else 2**-0.5
                init.xavier_uniform_(projection.weight, gain, generator)
            else:
                written = projection in (self.v_proj, self.o_proj)
                gain = deepnet_gain(depth) if written else 1.0
                init.xavier_normal_(projection.weight, gain, generator)


def attend(q: Tensor, kv: Pair, positions: Tensor | None = None) -> Tensor:
    """o `[B,H,T,d]` of queries that are the last T of the S keys, or that stand at `positions`."""
    k, v = kv
    rows, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    if queries == 1 and positions is None:
        # One query sees all keys. The heads of a group are like queries of one head: keys are read
        # once for all of them.
        o = F.scaled_dot_product_attention(q.reshape(rows, k.shape[1], -1, head_dim), k, v)
        return o.reshape(rows, heads, 1, head_dim)
    mask = None
    if positions is not None:
        mask = torch.arange(keys, device=q.device) <= positions[:, None, :, None]
    elif queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
    )


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layout: Layout
) -> tuple[Tensor, KVCache | None]:
    """Sequence by sequence. A row's cache enters one and afterwards holds the one it leaves by."""
    assert layout.cu_seqlens is not None
    pieces = list(pairwise(layout.cu_seqlens.tolist()))
    rows = range(layout.rows)
    first = list(rows) if layout.first is None else layout.first.tolist()
    last = list(rows) if layout.last is None else layout.last.tolist()
    entering = {} if cache is None else {sequence: row for row, sequence in enumerate(first)}
    outputs = []
    for sequence, (begin, end) in enumerate(pieces):
        if begin == end:
            continue
        q_here, k_here, v_here = (x[:, :, begin:end] for x in (q, k, v))
        if cache is not None and sequence in entering:
            k_past, v_past = cache.row(entering[sequence])
            k_here, v_here = torch.cat((k_past, k_here), 2), torch.cat((v_past, v_here), 2)
        outputs.append(attend(q_here, (k_here, v_here)))
    o = torch.cat(outputs, 2)
    if not layout.keeps_state:
        return o, None
    if cache is None:
        cache = KVCache.empty(layout.rows, 0, k.shape[1], k.shape[3], k)
    left = torch.tensor([begin != end for begin, end in zip(first, last, strict=True)])
    return o, cache.reset(left).append_packed((k, v), [pieces[sequence] for sequence in last])


class TransformerBlock(nn.Module):
    """Y = X + Attention(Norm(X)); X' = Y + FFN(Norm(Y))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config.hidden_size, config.num_heads, config.kv_heads)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)
        self.dropout = dropout(config)

    def forward(
        self, x: Tensor, cache: KVCache | None, layout: Layout
    ) -> tuple[Tensor, KVCache | None]:
        mixed, cache = self.attention(self.attention_norm(x), cache, layout)
        x = x + self.dropout(mixed)
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, cache

    def init_weights(self, config: TransformerConfig, generator: torch.Generator | None) -> None:
        for part in (self.attention, self.ffn):
            part.init_weights(config.initialization, config.num_hidden_layers, generator)


class Transformer(LanguageModel):
    """See `LanguageModel` for the calls."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        blocks = [TransformerBlock(config) for _ in range(config.num_hidden_layers)]
        super().__init__(config, blocks, Rotation(config.head_dim, "rope", config.rope_theta))

    def empty_layer_state(self, batch: int, capacity: int | None) -> KVCache:
        heads, head_dim = self.config.kv_heads, self.config.head_dim
        return KVCache.empty(batch, capacity or 0, heads, head_dim, self.norm.weight)

    @property
    def layer_signature(self) -> tuple[Any, ...]:
        return (KVCache.kind, self.config.kv_heads, self.config.head_dim)
