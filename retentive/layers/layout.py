"""Where the tokens of one forward stand: made once a call, shared by all layers.

Shapes: B rows, T tokens, N packed sequences, H heads, K the rotated head dim. A layout is dense
(tokens `[B,T]`) or packed (`[1,total]`). Padding ends here: padded rows become packed sequences, so
that no layer ever sees a pad.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.errors import InputError
from retentive.layers.rotation import Angles, Rotation

AnglesByKey = Mapping[Hashable, Angles]
"""By `Rotation.key`."""
MakeAngles = Callable[[Tensor], AnglesByKey]
"""The angles of all layers at positions `[B|1,T]`."""


def angles_of(
    rotations: Iterable[Rotation], positions: Tensor, dtype: torch.dtype
) -> dict[Hashable, Angles]:
    """The angles of each rotation at int64 `positions` `[B|1,T]`, in `dtype`."""
    return {rotation.key: rotation(positions, dtype) for rotation in rotations}


@dataclass(frozen=True)
class Layout:
    """Where each token stands, and which sequence goes with which row of the state.

    positions       int64 `[B|1,T]`, of each token in its own sequence
    by_rotation     the angles of each rotation of the model's layers; see `angles`
    next_positions  int64 `[B]`, where each row of the state stands after this call
    cu_seqlens      packed: the bounds of the sequences, int64 `[N+1]` on the CPU
    first, last     packed rows: for each row of the state the sequence it enters and the one it
                    leaves by, int64 `[B]`; None where each sequence is a row
    real            padding: for each packed token its place among the B·T padded ones
    keeps_state     False where nobody wants the final state
    active          decoding in slots: the rows that hold a sequence, bool `[B]`; None for all
    """

    positions: Tensor
    by_rotation: AnglesByKey
    next_positions: Tensor
    cu_seqlens: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    real: Tensor | None = None
    padded_shape: tuple[int, int] = (0, 0)
    keeps_state: bool = True
    active: Tensor | None = None

    def angles(self, rotation: Rotation) -> Angles:
        """Those of a layer's rotation at `positions`, made once for all layers that share it."""
        return self.by_rotation[rotation.key]

    @property
    def rows(self) -> int:
        """B of the state."""
        return self.next_positions.shape[0]

    def unpad(self, x: Tensor) -> Tensor:
        """Padded `[B,T,...]` -> packed `[1,total,...]`; x itself where nothing is padded."""
        return x if self.real is None else x.flatten(0, 1)[self.real].unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """Packed `[1,total,...]` -> padded `[B,T,...]`, zero at the pads."""
        if self.real is None:
            return x
        rows, length = self.padded_shape
        padded = x.new_zeros(rows * length, *x.shape[2:]).index_copy(0, self.real, x[0])
        return padded.unflatten(0, (rows, length))

    def sequence_states(
        self, row_states: Tensor | None, initial: Tensor | None = None
    ) -> Tensor | None:
        """The states of the rows `[B,...]` -> the initial states of the sequences `[N,...]`.

        `initial` `[...]` is the state that all other sequences begin with; None is zeros.
        """
        if row_states is None:
            return None if initial is None else self._repeat(initial)
        if self.first is None:
            return row_states
        if initial is None:
            initial = row_states.new_zeros(row_states.shape[1:])
        return self._repeat(initial.to(row_states.dtype)).index_copy(0, self.first, row_states)

    def _repeat(self, initial: Tensor) -> Tensor:
        """The same state for each sequence, `[N,...]`, which is in memory once."""
        count = self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return initial.expand(count, *initial.shape)

    def row_states(self, sequence_states: Tensor) -> Tensor:
        """The final states of the sequences `[N,...]` -> the states of the rows `[B,...]`."""
        return sequence_states if self.last is None else sequence_states.index_select(0, self.last)

    def pieces(self) -> list[tuple[int, int]]:
        """Packed: the first token of each sequence and the one behind its last."""
        assert self.cu_seqlens is not None
        return list(pairwise(self.cu_seqlens.tolist()))


def dense(
    angles: MakeAngles, shape: tuple[int, int], start: Tensor | None, device: torch.device
) -> Layout:
    """Tokens of `shape` (B, T); rows begin at `start` `[B]`, or all at 0."""
    rows, length = shape
    steps = torch.arange(length, device=device)
    if start is None:
        positions, following = steps[None], torch.full((rows,), length, device=device)
    else:
        positions, following = start[:, None] + steps, start + length
    return Layout(positions, angles(positions), following)


def padded(angles: MakeAngles, mask: Tensor, start: Tensor | None) -> Layout:
    """`mask` `[B,T]` is True at real tokens, wherever they are; rows begin at `start` or 0."""
    shape = (mask.shape[0], mask.shape[1])
    if bool(mask.all()):
        return dense(angles, shape, start, mask.device)
    real = mask.flatten().nonzero().squeeze(1)
    if not len(real):
        raise InputError("padding_mask marks no token as real; make it True at real tokens")
    counts = mask.sum(1)
    start = torch.zeros_like(counts) if start is None else start
    positions = (start[:, None] + mask.cumsum(1) - 1).flatten()[real].unsqueeze(0)
    return Layout(
        positions,
        angles(positions),
        start + counts,
        cu_seqlens=F.pad(counts.cumsum(0), (1, 0)).cpu(),
        real=real,
        padded_shape=shape,
    )


def packed(
    angles: MakeAngles,
    cu_seqlens: Tensor,
    rows: int | None,
    start: Tensor | None,
    device: torch.device,
) -> Layout:
    """Sequences one after the other, bounds `cu_seqlens` `[N+1]`.

    With `rows` B they are B rows of equally many tokens. A row of the state enters the sequence
    that begins its row and leaves by the one that ends it; all other sequences begin at position 0
    with an empty state. Without `rows` each sequence is a row of its own, and unless there is a
    `start` no final state is made.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    if bounds[0] != 0 or bounds[-1] < 1 or bool((bounds.diff() < 0).any()):
        raise InputError(
            f"cu_seqlens is {bounds.tolist()}; give bounds that rise from 0 to the number of tokens"
        )
    first = last = None
    if rows is not None:
        first, last = (index.to(device) for index in _row_sequences(bounds, rows))
    begins, lengths = bounds[:-1].to(device), bounds.diff().to(device)
    offsets = torch.zeros_like(begins)
    if start is not None:
        offsets = start if first is None else offsets.index_copy(0, first, start)
    total = int(bounds[-1])
    shift = torch.repeat_interleave(offsets - begins, lengths, output_size=total)
    positions = (torch.arange(total, device=device) + shift).unsqueeze(0)
    following = offsets + lengths
    return Layout(
        positions,
        angles(positions),
        following if last is None else following[last],
        cu_seqlens=bounds,
        first=first,
        last=last,
        keeps_state=rows is not None or start is not None,
    )


def _row_sequences(bounds: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sequence that begins and the one that ends each of `rows` equally long rows."""
    total = int(bounds[-1])
    edges = torch.arange(rows + 1, device="cpu") * (total // rows)
    first = torch.searchsorted(bounds[:-1], edges[:-1], right=True) - 1
    last = torch.searchsorted(bounds[1:], edges[1:])
    if total % rows or not torch.equal(bounds[first], edges[:-1]):
        raise InputError(
            f"cu_seqlens does not begin a sequence with each of {rows} equal rows of {total} tokens"
        )
    return first, last
