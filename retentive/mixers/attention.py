"""Softmax attention with rotary positions: the baseline's mixer, and that of hybrids' other layers.

Shapes: B rows, T tokens, S keys, D width, H query heads, G key-value heads, d head dim. x is
`[B,T,D]`; once rotated, heads go before tokens: q `[B,H,T,d]`, k and v `[B,G,S,d]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn import init

from retentive.fields import check_divisible, check_even, check_positive
from retentive.layers.layout import Layout
from retentive.layers.linear import Linear
from retentive.layers.parts import deepnet_gain, reset_vectors
from retentive.layers.rotation import Rotation, rotate
from retentive.mixers.base import Mixer, MixerConfig
from retentive.mixers.kv_cache import KVCache, Pair
from retentive.mixers.window import WindowCache

QUERIES_AT_ONCE = 256  # of a window narrower than that


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Softmax attention with rotary positions, heads of width/num_heads.

    num_kv_heads   fewer than num_heads: groups of consecutive heads share keys and values
    qkv_bias       of q, k and v; o has none
    window         how many tokens a token sees, itself among them; None for all before it
    rope_theta     the base of the rotation's frequencies
    """

    kind: ClassVar[str] = "attention"

    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.kv_heads),
            ("window", 1 if self.window is None else self.window),
            ("rope_theta", self.rope_theta),
        ):
            check_positive(f"attention {name}", value)
        check_divisible(
            "attention num_heads", self.num_heads, self.kv_heads, "attention num_kv_heads"
        )

    def for_width(self, hidden_size: int) -> Self:
        """Itself, once the heads are known to divide the width into even dims."""
        check_divisible("hidden_size", hidden_size, self.num_heads, "attention num_heads")
        check_even("hidden_size", hidden_size, self.num_heads)
        return self

    @classmethod
    def default(cls, hidden_size: int) -> Self:
        """Heads of 128 dims from a width of 2048 on, else 64, where these divide it."""
        preferred = (128, 64) if hidden_size >= 2048 else (64, 128)
        dims = (*preferred, *range(66, 128, 2), hidden_size)
        return cls(hidden_size // next(dim for dim in dims if hidden_size % dim == 0))

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, by default `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class Attention(Mixer):
    """Causal attention, `F.scaled_dot_product_attention` underneath."""

    name = "attention"
    Config = AttentionConfig
    rewrites_state = False
    rotation: Rotation

    def __init__(self, hidden_size: int, config: AttentionConfig):
        super().__init__(hidden_size, config)
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_dim = hidden_size // config.num_heads
        kv_dim = config.kv_heads * self.head_dim
        self.rotation = Rotation(self.head_dim, "rope", config.rope_theta)
        window = config.window
        self.mask: Mask = CausalMask() if window is None else SlidingWindow(window)
        self.grows = config.window is None
        self.q_proj = Linear(hidden_size, hidden_size, config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_dim, config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_dim, config.qkv_bias)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        # Project to queries [B,T,H,d], keys and values [B,T,G,d], and turn them by their positions
        angles = layout.angles(self.rotation)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(q, angles.cos, angles.sin)
        k = rotate(k, angles.key_cos, angles.key_sin)

        # Attend, with heads before tokens: o [B,H,T,d]
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if layout.cu_seqlens is not None:
            o, state = _packed(self.mask, q, k, v, state, layout)
        elif state is None:
            o = self.mask.attend(q, (k, v))
            state = self.mask.cache((k, v)) if layout.keeps_state else None
        else:
            o, state = self.mask.go_on(q, (k, v), state, layout)

        # Re-assemble the heads and project back to the residual stream [B,T,D]
        return self.o_proj(o.transpose(1, 2).flatten(-2)), state

    def empty_state(self, rows: int, like: Tensor, capacity: int = 0) -> KVCache | WindowCache:
        return self.mask.empty(rows, capacity, self.num_kv_heads, self.head_dim, like)

    def restore_state(
        self, tensors: dict[str, Tensor], lengths: list[int]
    ) -> KVCache | WindowCache:
        return self.mask.restore(tensors, lengths)

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None = None
    ) -> None:
        """As `Retention.init_weights`."""
        reset_vectors(self)
        official = initialization == "official"
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if official:
                gain = 1.0 if projection is self.o_proj else 2**-0.5
                init.xavier_uniform_(projection.weight, gain, generator)
            else:
                written = projection in (self.v_proj, self.o_proj)
                gain = deepnet_gain(depth) if written else 1.0
                init.xavier_normal_(projection.weight, gain, generator)

    # What reports ask

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        held = self.mask.held(context)
        return 2 * held * self.num_kv_heads * self.head_dim * dtype.itemsize

    def mixing_flops(self, context: float) -> float:
        return attention_flops(self.num_heads, self.head_dim, self.mask.seen(context))

    def describe(self) -> str:
        window = (
            "" if isinstance(self.mask, CausalMask) else f", a window of {self.mask.size} tokens"
        )
        heads = f"{self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} of keys and values"
        return f"attention, {heads}{window}"


def attention_flops(heads: int, head_dim: int, context: float) -> float:
    """Forward FLOPs of a token that looks at `context` tokens."""
    return 4 * context * heads * head_dim


class CausalMask:
    """A token sees all tokens before it."""

    tokens_back = -1  # to the first one, as torch says it

    def empty(self, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor) -> KVCache:
        return KVCache.empty(rows, capacity, heads, head_dim, like)

    def cache(self, kv: Pair) -> KVCache:
        return KVCache.from_kv(kv)

    def restore(self, tensors: dict[str, Tensor], lengths: Sequence[int]) -> KVCache:
        return KVCache.from_kv((tensors["k"], tensors["v"]), lengths)

    def held(self, context: int) -> int:
        """Tokens in the cache behind `context` tokens."""
        return context

    def seen(self, context: float) -> float:
        """Tokens that a token looks at."""
        return context

    def attend(self, q: Tensor, kv: Pair) -> Tensor:
        """o `[B,H,T,d]` of queries that are the last T of the S tokens."""
        return attend(q, kv)

    def go_on(self, q: Tensor, kv: Pair, cache: KVCache, layout: Layout) -> tuple[Tensor, KVCache]:
        """The same behind the tokens in `cache`, and the cache with the new ones."""
        cache = cache.append(kv)
        return attend(q, cache.kv, layout.positions if cache.uniform is None else None), cache

    def append_packed(self, cache: KVCache, kv: Pair, pieces: Sequence[tuple[int, int]]) -> KVCache:
        return cache.append_packed(kv, pieces)


class SlidingWindow:
    """A token sees the last `size` tokens, itself among them."""

    def __init__(self, size: int):
        self.size = size
        self.tokens_back = size - 1

    def empty(
        self, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor
    ) -> WindowCache:
        return WindowCache.empty(rows, heads, head_dim, like)

    def cache(self, kv: Pair) -> WindowCache:
        rows, _, count, _ = kv[0].shape
        return WindowCache.from_kv(kv, [count] * rows, self.size - 1)

    def restore(self, tensors: dict[str, Tensor], lengths: Sequence[int]) -> WindowCache:
        return WindowCache.from_kv((tensors["k"], tensors["v"]), lengths, tensors["k"].shape[2])

    def held(self, context: int) -> int:
        return min(context, self.size - 1)

    def seen(self, context: float) -> float:
        return min(context, self.size)

    def attend(self, q: Tensor, kv: Pair) -> Tensor:
        return attend_window(q, kv, self.size)

    def go_on(
        self, q: Tensor, kv: Pair, cache: WindowCache, layout: Layout
    ) -> tuple[Tensor, WindowCache]:
        k, v = (torch.cat(parts, 2) for parts in zip(cache.kv, kv, strict=True))
        lengths = [length + q.shape[2] for length in cache.lengths]
        o = attend_window(q, (k, v), self.size, lengths)
        return o, WindowCache.from_kv((k, v), lengths, self.size - 1)

    def append_packed(
        self, cache: WindowCache, kv: Pair, pieces: Sequence[tuple[int, int]]
    ) -> WindowCache:
        return cache.append_packed(kv, pieces, self.size - 1)


Mask = CausalMask | SlidingWindow


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
    return _attend(q, kv, mask)


def attend_window(q: Tensor, kv: Pair, window: int, lengths: Sequence[int] | None = None) -> Tensor:
    """As `attend`, of queries that see the last `window` keys.

    `lengths`: of the S keys only so many, the last ones, are the row's own. Queries are taken some
    at a time, so that work and memory grow with T · window.
    """
    k, v = kv
    queries, keys = q.shape[2], k.shape[2]
    ragged = lengths is not None and min(lengths) < keys
    if not ragged and (keys <= window and queries in (1, keys)):
        return attend(q, kv)
    first = torch.zeros(1, device=q.device)
    if ragged:
        first = keys - torch.tensor(lengths, device=q.device)
    outputs = []
    for begin in range(0, queries, max(window, QUERIES_AT_ONCE)):
        piece = q[:, :, begin : begin + max(window, QUERIES_AT_ONCE)]
        at = torch.arange(piece.shape[2], device=q.device)[:, None] + keys - queries + begin
        low, high = max(0, keys - queries + begin - window + 1), int(at[-1]) + 1
        key = torch.arange(low, high, device=q.device)
        seen = (key <= at) & (key > at - window) & (key >= first[:, None, None, None])
        outputs.append(_attend(piece, (k[:, :, low:high], v[:, :, low:high]), seen))
    return torch.cat(outputs, 2)


def _attend(q: Tensor, kv: Pair, mask: Tensor | None) -> Tensor:
    """Where `mask` is True; without one causal, and of as many queries as keys."""
    k, v = kv
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def _packed(
    mask: Mask, q: Tensor, k: Tensor, v: Tensor, cache: Any, layout: Layout
) -> tuple[Tensor, Any]:
    """Within each sequence. A row's cache enters one and afterwards holds the one it leaves by."""
    assert layout.cu_seqlens is not None
    rows = range(layout.rows)
    first = list(rows) if layout.first is None else layout.first.tolist()
    last = list(rows) if layout.last is None else layout.last.tolist()
    if cache is None:
        o = attend_packed(mask, q, (k, v), layout.cu_seqlens)
        cache = mask.empty(layout.rows, 0, k.shape[1], k.shape[3], k)
    else:
        past = {sequence: cache.row(row) for row, sequence in enumerate(first)}
        o = _attend_runs(mask, q, (k, v), layout.cu_seqlens, past)
    if not layout.keeps_state:
        return o, None
    parted = [begin != end for begin, end in zip(first, last, strict=True)]
    left = torch.tensor(parted, device="cpu")
    pieces = layout.pieces()
    return o, mask.append_packed(cache.emptied(left), (k, v), [pieces[index] for index in last])


def attend_packed(mask: Mask, q: Tensor, kv: Pair, bounds: Tensor) -> Tensor:
    """o `[1,H,total,d]` within each of the sequences of `bounds` `[N+1]`, which have no past."""
    if _has_varlen(q, kv) and len(bounds.diff().unique()) > 1:
        return _attend_varlen(mask, q, kv, bounds)
    return _attend_runs(mask, q, kv, bounds, {})


def _attend_runs(mask: Mask, q: Tensor, kv: Pair, bounds: Tensor, past: dict[int, Pair]) -> Tensor:
    """A batch for each run of sequences of one length: a view, nothing is copied.

    `past`: keys and values before a sequence, which then is a batch of its own.
    """
    lengths = bounds.diff().tolist()
    kinds = ((n, i if i in past else None) for i, n in enumerate(lengths) if n)
    outputs, end = [], 0
    for (length, index), run in groupby(kinds):
        count = len(list(run))
        begin, end = end, end + count * length
        q_run, k_run, v_run = (
            x[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for x in (q, *kv)
        )
        if index is not None:
            k_run, v_run = (torch.cat(x, 2) for x in zip(past[index], (k_run, v_run), strict=True))
        outputs.append(mask.attend(q_run, (k_run, v_run)).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).transpose(0, 1)[None]


def _has_varlen(q: Tensor, kv: Pair) -> bool:
    """Whether flash attention's kernel for sequences of different lengths can run here."""
    if not q.is_cuda or q.shape[-1] % 8:
        return False
    grouped = q.shape[1] != kv[0].shape[1]
    return can_use_flash_attention(SDPAParams(q, *kv, None, 0.0, True, grouped))


def _attend_varlen(mask: Mask, q: Tensor, kv: Pair, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = kv
    group = q.shape[1] // k.shape[1]
    if group > 1:  # not all versions take groups of heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    longest, bounds = int(bounds.diff().max()), bounds.to(q.device, torch.int32)
    window = mask.tokens_back, 0
    o = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window)
    assert isinstance(o, Tensor)  # asked for more it is a tuple
    return o.transpose(0, 1)[None]
