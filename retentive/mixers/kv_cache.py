"""The Transformer's state: preallocated keys and values that are appended to and never changed.

Shapes: B rows, T new tokens, G key-value heads, d head dim; buffers `[B,G,capacity,d]`:
the tokens of a head are side by side, because a decoding step reads one head after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


@dataclass
class _Buffers:
    """Storage that caches share. `used[b]` tokens of row b belong to a cache; the rest is free."""

    kv: Pair
    used: tuple[int, ...]

    @property
    def capacity(self) -> int:
        return self.kv[0].shape[2]


@dataclass(frozen=True)
class KVCache:
    """The first `lengths[b]` tokens of each row of `buffers`.

    Appending writes behind them in place, unless another cache did so before: then into a copy.
    """

    buffers: _Buffers
    lengths: tuple[int, ...]
    kind: ClassVar[str] = "kv"

    @classmethod
    def from_kv(cls, kv: Pair, lengths: Sequence[int] | None = None) -> Self:
        """A cache that takes over keys and values `[B,G,T,d]`, of all tokens or of `lengths`."""
        rows, _, tokens, _ = kv[0].shape
        lengths = (tokens,) * rows if lengths is None else tuple(lengths)
        return cls(_Buffers(kv, lengths), lengths)

    @classmethod
    def empty(cls, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor) -> Self:
        k, v = (like.new_zeros(rows, heads, capacity, head_dim) for _ in range(2))
        return cls.from_kv((k, v), (0,) * rows)

    @property
    def uniform(self) -> int | None:
        """The length of all rows, None if they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def kv(self) -> Pair:
        """`[B,G,longest,d]` each; a shorter row ends in tokens that are not its own."""
        longest = max(self.lengths, default=0)
        k, v = self.buffers.kv
        return k[:, :, :longest], v[:, :, :longest]

    def row(self, index: int) -> Pair:
        """Keys and values of one row, `[1,G,length,d]`."""
        k, v = (x[index : index + 1, :, : self.lengths[index]] for x in self.buffers.kv)
        return k, v

    def append(self, kv: Pair) -> Self:
        """T more tokens in every row: `[B,G,T,d]`."""
        count = kv[0].shape[2]
        grown = self._with_room([length + count for length in self.lengths], kv)
        if self.uniform is not None:
            tokens = slice(self.uniform, self.uniform + count)
            for buffer, new in zip(grown.buffers.kv, kv, strict=True):
                buffer[:, :, tokens] = new
            return grown
        starts = torch.tensor(self.lengths, device=kv[0].device)[:, None]
        columns = starts + torch.arange(count, device=starts.device)
        rows = torch.arange(len(self.lengths), device=starts.device)[:, None]
        for buffer, new in zip(grown.buffers.kv, kv, strict=True):
            buffer[rows, :, columns] = new.transpose(1, 2).to(buffer.dtype)
        return grown

    def append_packed(self, kv: Pair, pieces: Sequence[tuple[int, int]]) -> Self:
        """For row b tokens begin to end, `pieces[b]`, of `[1,G,total,d]`."""
        counts = [end - begin for begin, end in pieces]
        grown = self._with_room([n + m for n, m in zip(self.lengths, counts, strict=True)], kv)
        for buffer, new in zip(grown.buffers.kv, kv, strict=True):
            for row, (begin, end) in enumerate(pieces):
                there = slice(self.lengths[row], grown.lengths[row])
                buffer[row, :, there] = new[0, :, begin:end]
        return grown

    def _with_room(self, lengths: list[int], new: Pair) -> Self:
        """A cache of `lengths`, to be filled behind this one's tokens: in our buffers or a copy."""
        k, needed, capacity = self.buffers.kv[0], max(lengths, default=0), self.buffers.capacity
        free = self.buffers.used == self.lengths and needed <= capacity
        recorded = k.requires_grad or torch.is_grad_enabled()  # a graph may hold what is in there
        frozen = k.is_inference() and not torch.is_inference_mode_enabled()
        if free and not recorded and not frozen:
            self.buffers.used = tuple(lengths)
            return type(self)(self.buffers, tuple(lengths))
        if needed > capacity:
            capacity = max(needed, 2 * capacity)
        return self.from_kv(self._copies(capacity), lengths)

    def _copies(self, capacity: int) -> Pair:
        k, v = self.kv
        room = (0, 0, 0, capacity - k.shape[2])
        return F.pad(k, room), F.pad(v, room)

    @property
    def signature(self) -> tuple[Any, ...]:
        _, heads, _, head_dim = self.buffers.kv[0].shape
        return (self.kind, heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Of the buffers, whoever else shares them."""
        return sum(buffer.nbytes for buffer in self.buffers.kv)

    def select(self, rows: Tensor) -> Self:
        k, v = (held.index_select(0, rows) for held in self.kv)
        return self.from_kv((k, v), [self.lengths[row] for row in rows.tolist()])

    def emptied(self, rows: Tensor) -> Self:
        """Nothing is held of the rows where `rows` (bool `[B]`) is True."""
        lengths = [0 if flag else n for flag, n in zip(rows.tolist(), self.lengths, strict=True)]
        return type(self)(self.buffers, tuple(lengths))

    def clone(self) -> Self:
        """Itself: a cache is never changed."""
        return self

    def detach(self) -> Self:
        if not self.buffers.kv[0].requires_grad:
            return self
        k, v = (held.detach().clone() for held in self.kv)
        return self.from_kv((k, v), self.lengths)

    def to(self, device: torch.device | str) -> Self:
        if torch.device(device) == self.buffers.kv[0].device:
            return self
        k, v = (held.to(device) for held in self.kv)
        return self.from_kv((k, v), self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip("kv", self.kv, strict=True))

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        lengths = [length for state in states for length in state.lengths]
        copies = [state._copies(max(lengths, default=0)) for state in states]
        k, v = (torch.cat(parts) for parts in zip(*copies, strict=True))
        return cls.from_kv((k, v), lengths)
