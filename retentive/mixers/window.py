"""The state of attention with a sliding window: the last keys and values, and no more of them.

Shapes: B rows, T new tokens, S held ones, G key-value heads, d head dim; keys and values
`[B,G,S,d]`. The newest token is the last one in every row; a row that has read less begins with
tokens that are not its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.mixers.kv_cache import Pair


@dataclass(frozen=True)
class WindowCache:
    """The last `lengths[b]` of the tokens in row b. It is never changed: appending copies."""

    kv: Pair
    lengths: tuple[int, ...]
    kind: ClassVar[str] = "window"

    @classmethod
    def from_kv(cls, kv: Pair, lengths: Sequence[int], room: int) -> Self:
        """The last tokens of keys and values, at most `room` of each row, which has `lengths`."""
        lengths = tuple(min(length, room) for length in lengths)
        held, kept = kv[0].shape[2], max(lengths, default=0)
        if held > kept:  # a copy, so that what is not kept is freed
            k, v = (x.narrow(2, held - kept, kept).clone() for x in kv)
            kv = k, v
        return cls(kv, lengths)

    @classmethod
    def empty(cls, rows: int, heads: int, head_dim: int, like: Tensor) -> Self:
        k, v = (like.new_zeros(rows, heads, 0, head_dim) for _ in range(2))
        return cls((k, v), (0,) * rows)

    def row(self, index: int) -> Pair:
        """Keys and values of one row, `[1,G,length,d]`."""
        length = self.lengths[index]
        k, v = (x[index : index + 1, :, x.shape[2] - length :] for x in self.kv)
        return k, v

    def append_packed(self, kv: Pair, pieces: Sequence[tuple[int, int]], room: int) -> Self:
        """For row b tokens begin to end, `pieces[b]`, of `[1,G,total,d]`; at most `room` stay."""
        rows = []
        for index, (begin, end) in enumerate(pieces):
            own = zip(self.row(index), kv, strict=True)
            k, v = (torch.cat((held, new[:, :, begin:end]), 2) for held, new in own)
            rows.append(self.from_kv((k, v), [k.shape[2]], room))
        return self.concat(rows)

    @property
    def signature(self) -> tuple[Any, ...]:
        _, heads, _, head_dim = self.kv[0].shape
        return (self.kind, heads, head_dim)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.kv)

    def select(self, rows: Tensor) -> Self:
        k, v = (x.index_select(0, rows) for x in self.kv)
        return type(self)((k, v), tuple(self.lengths[row] for row in rows.tolist()))

    def emptied(self, rows: Tensor) -> Self:
        """Nothing is held of the rows where `rows` (bool `[B]`) is True."""
        flags = zip(rows.tolist(), self.lengths, strict=True)
        return type(self)(self.kv, tuple(0 if flag else length for flag, length in flags))

    def clone(self) -> Self:
        """Itself: a cache is never changed."""
        return self

    def detach(self) -> Self:
        k, v = (x.detach() for x in self.kv)
        return type(self)((k, v), self.lengths)

    def to(self, device: torch.device | str) -> Self:
        k, v = (x.to(device) for x in self.kv)
        return type(self)((k, v), self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip("kv", self.kv, strict=True))

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        longest = max(state.kv[0].shape[2] for state in states)
        k, v = (
            torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in parts])
            for parts in zip(*(state.kv for state in states), strict=True)
        )
        return cls((k, v), tuple(length for state in states for length in state.lengths))
