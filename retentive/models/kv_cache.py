"""The Transformer's state: preallocated keys and values that are appended to and never changed.

Shapes: B rows, T new tokens, G key-value heads, d head dim; buffers `[B, capacity, G, d]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor


class _Buffers:
    """Storage that several caches share. `used[b]` tokens of row b belong to somebody; what lies beyond is free."""

    def __init__(self, k: Tensor, v: Tensor, used: tuple[int, ...]):
        self.k = k
        self.v = v
        self.used = used


@dataclass(frozen=True)
class KVCache:
    """The first `lengths[b]` tokens of each row of `buffers`.

    Appending writes past them in place, unless another cache has done so before: then it is this one that moves out.
    """

    buffers: _Buffers
    lengths: tuple[int, ...]
    kind: ClassVar[str] = "kv"

    @classmethod
    def empty(cls, rows: int, capacity: int, heads: int, head_dim: int, like: Tensor) -> Self:
        k, v = (like.new_zeros(rows, capacity, heads, head_dim) for _ in range(2))
        return cls(_Buffers(k, v, (0,) * rows), (0,) * rows)

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Self:
        """A cache of exactly these keys and values `[B,T,G,d]`, without copying them."""
        lengths = (k.shape[1],) * k.shape[0]
        return cls(_Buffers(k, v, lengths), lengths)

    @property
    def uniform(self) -> int | None:
        """The length of all rows, None if they differ."""
        return self.lengths[0] if len(set(self.lengths)) <= 1 else None

    @property
    def k(self) -> Tensor:
        """`[B, longest, G, d]`; a shorter row ends in tokens that are not its own."""
        return self.buffers.k[:, : max(self.lengths, default=0)]

    @property
    def v(self) -> Tensor:
        return self.buffers.v[:, : max(self.lengths, default=0)]

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row, `[1, length, G, d]`."""
        here = (slice(index, index + 1), slice(self.lengths[index]))
        return self.buffers.k[here], self.buffers.v[here]

    def append(self, k: Tensor, v: Tensor) -> Self:
        """T more tokens for every row: k, v `[B,T,G,d]`."""
        count = k.shape[1]
        grown = self._with_room([length + count for length in self.lengths], k)
        uniform = self.uniform
        if uniform is not None:
            grown.buffers.k[:, uniform : uniform + count] = k
            grown.buffers.v[:, uniform : uniform + count] = v
            return grown
        lengths = torch.tensor(self.lengths, device=k.device)
        columns = lengths[:, None] + torch.arange(count, device=k.device)
        rows = torch.arange(len(self.lengths), device=k.device)[:, None]
        grown.buffers.k[rows, columns] = k.to(grown.buffers.k.dtype)
        grown.buffers.v[rows, columns] = v.to(grown.buffers.v.dtype)
        return grown

    def append_packed(self, k: Tensor, v: Tensor, pieces: Sequence[tuple[int, int]]) -> Self:
        """Row b gets tokens `pieces[b]` (begin, end) of k, v `[1,total,G,d]`."""
        grown = self._with_room(
            [n + end - begin for n, (begin, end) in zip(self.lengths, pieces, strict=True)], k
        )
        for row, (begin, end) in enumerate(pieces):
            here = (row, slice(self.lengths[row], grown.lengths[row]))
            grown.buffers.k[here] = k[0, begin:end]
            grown.buffers.v[here] = v[0, begin:end]
        return grown

    def _with_room(self, lengths: list[int], new: Tensor) -> Self:
        """A cache of `lengths` whose buffers may be written past this one's tokens: ours if they are free, else a copy."""
        old = self.buffers
        needed = max(lengths, default=0)
        recorded = old.k.requires_grad or (torch.is_grad_enabled() and new.requires_grad)
        frozen = old.k.is_inference() and not torch.is_inference_mode_enabled()
        if old.used == self.lengths and needed <= old.k.shape[1] and not (recorded or frozen):
            old.used = tuple(lengths)
            return type(self)(old, old.used)
        capacity = max(needed, old.k.shape[1])
        if needed > old.k.shape[1]:
            capacity = max(needed, 2 * old.k.shape[1])
        return type(self)(_Buffers(*self._copies(capacity), tuple(lengths)), tuple(lengths))

    def _copies(self, capacity: int) -> tuple[Tensor, Tensor]:
        pair = []
        for held in (self.k, self.v):
            copy = held.new_zeros(held.shape[0], capacity, *held.shape[2:])
            copy[:, : held.shape[1]] = held
            pair.append(copy)
        return pair[0], pair[1]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.buffers.k.shape[2:])

    @property
    def nbytes(self) -> int:
        return self.buffers.k.nbytes + self.buffers.v.nbytes

    def select(self, rows: Tensor) -> Self:
        lengths = tuple(self.lengths[row] for row in rows.tolist())
        buffers = _Buffers(self.k.index_select(0, rows), self.v.index_select(0, rows), lengths)
        return type(self)(buffers, lengths)

    def reset(self, rows: Tensor) -> Self:
        flags = rows.tolist()
        return type(self)(
            self.buffers,
            tuple(0 if flag else n for flag, n in zip(flags, self.lengths, strict=True)),
        )

    def clone(self) -> Self:
        return type(self)(
            _Buffers(*self._copies(self.buffers.k.shape[1]), self.lengths), self.lengths
        )

    def detach(self) -> Self:
        if not self.buffers.k.requires_grad:
            return self
        k, v = (x.detach() for x in self._copies(max(self.lengths, default=0)))
        return type(self)(_Buffers(k, v, self.lengths), self.lengths)

    def to(self, device: torch.device | str) -> Self:
        if torch.device(device) == self.buffers.k.device:
            return self
        buffers = _Buffers(self.k.to(device), self.v.to(device), self.lengths)
        return type(self)(buffers, self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], lengths: Sequence[int]) -> Self:
        return cls(_Buffers(tensors["k"], tensors["v"], tuple(lengths)), tuple(lengths))

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        lengths = tuple(n for state in states for n in state.lengths)
        copies = [state._copies(max(lengths, default=0)) for state in states]
        k, v = (torch.cat(parts) for parts in zip(*copies, strict=True))
        return cls(_Buffers(k, v, lengths), lengths)
