"""Where the tokens of one forward stand: made once a call, shared by all layers.

Shapes: B rows, T tokens, N packed sequences, H heads, K the rotated head dim. A layout is dense (`[B, T]` tokens) or
packed (`[1, total]`). Padding ends here: padded rows become packed sequences, so no layer ever sees a pad.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retentive.errors import InputError
from retentive.ops.decay import row_scale


class Constant(nn.Module):
    """A float64 vector that follows its module's device and nothing else.

    It is no buffer: `.to(dtype)`, `to_empty` and checkpoints leave its values alone.
    """

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        device = fn(torch.empty(0, device=self.value.device)).device
        if device.type not in ("meta", "mps"):  # no values on the one, no float64 on the other
            self.value = self.value.to(device)
        return super()._apply(fn, recurse)


class Angles(NamedTuple):
    """Rotations of queries `[B|1, T, 1|H, K]` and keys `[B|1, T, 1, K]`, to be used by `rotate`."""

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


class Rotation(nn.Module):
    """Turns the pair (p, p + K/2) of a head at position n by the angle n·θ_p.

    `rule` is "official" (θ_p = base^(-p/(K/2-1))) or "rope" (θ_p = base^(-2p/K)). Scales that belong to a query's or a
    key's position are part of its cosines and sines: `key_scale`, and with `scale_by` (log γ of each head) the row
    scale of the queries. All is computed in float64 from integer positions: float32 is off by 0.05 at 10^6.
    """

    def __init__(
        self,
        head_dim: int,
        rule: str,
        base: float,
        key_scale: float = 1.0,
        scale_by: Tensor | None = None,
    ):
        super().__init__()
        pairs = head_dim // 2
        p = torch.arange(pairs, dtype=torch.float64, device="cpu")
        exponents = p / max(pairs - 1, 1) if rule == "official" else p / pairs
        self.frequencies = Constant(base**-exponents)
        self.key_scale = key_scale
        self.scale_by = None if scale_by is None else Constant(scale_by)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """The angles of integer `positions` `[B|1, T]` in `dtype`: float64 for a float64 model, else float32."""
        frequencies = self.frequencies.value
        exact = positions.to(frequencies.device)
        angles = (exact.unsqueeze(-1) * frequencies).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        tables = [cos, sin, cos * self.key_scale, sin * self.key_scale]
        if self.scale_by is not None:
            scale = row_scale(self.scale_by.value, exact).unsqueeze(-1)
            tables[:2] = cos * scale, sin * scale
        return Angles(*(table.to(dtype).to(positions.device) for table in tables))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for x `[B,T,H,K]`, x1 and x2 its halves; in the tables' dtype,
    then cast back. `sin` carries the signs."""
    exact = x.to(cos.dtype)
    return (exact * cos).addcmul_(exact.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Layout:
    """Where each token stands, and which sequence belongs to which row of the state.

    positions       int64 `[B|1, T]`, of each token in its own sequence
    next_positions  int64 `[B]`, where each row of the state stands after this call
    cu_seqlens      packed: the bounds of the sequences, int64 `[N+1]` on the CPU
    first, last     packed rows: the sequence each row's state enters and the one it leaves by, `[B]`; None where the
                    sequences are the rows
    real            padding: where each packed token was among the B·T padded ones
    keeps_state     False where the final state is not wanted
    """

    positions: Tensor
    angles: Angles
    next_positions: Tensor
    cu_seqlens: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    real: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    keeps_state: bool = True

    @property
    def rows(self) -> int:
        """Rows of the state."""
        return self.next_positions.shape[0]

    def unpad(self, x: Tensor) -> Tensor:
        """Padded `[B,T,...]` -> packed `[1,total,...]`; x itself where nothing was padded."""
        return x if self.real is None else x.flatten(0, 1)[self.real].unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """Packed `[1,total,...]` -> padded `[B,T,...]`, zeros at the pads."""
        if self.real is None or self.padded_shape is None:
            return x
        rows, length = self.padded_shape
        padded = x.new_zeros(rows * length, *x.shape[2:]).index_copy(0, self.real, x[0])
        return padded.unflatten(0, (rows, length))

    def enter(self, state: Tensor | None) -> Tensor | None:
        """The state of each row `[B,...]` -> the initial state of each sequence `[N,...]`."""
        if state is None or self.first is None or self.cu_seqlens is None:
            return state
        sequences = self.cu_seqlens.shape[0] - 1
        return state.new_zeros(sequences, *state.shape[1:]).index_copy(0, self.first, state)

    def leave(self, final: Tensor) -> Tensor:
        """The final state of each sequence `[N,...]` -> the state of each row `[B,...]`."""
        return final if self.last is None else final.index_select(0, self.last)


Rotate = Callable[[Tensor], Angles]


def dense(
    rotate: Rotate, shape: tuple[int, int], start: Tensor | None, device: torch.device
) -> Layout:
    """`shape` (B, T); rows start at `start` `[B]`, or all at 0."""
    rows, length = shape
    steps = torch.arange(length, device=device)
    if start is None:
        positions, next_positions = steps[None], torch.full((rows,), length, device=device)
    else:
        positions, next_positions = start[:, None] + steps, start + length
    return Layout(positions, rotate(positions), next_positions)


def padded(rotate: Rotate, mask: Tensor, start: Tensor | None) -> Layout:
    """`mask` `[B,T]` is True at real tokens, wherever they are; rows start at `start` `[B]`, or all at 0."""
    shape = (mask.shape[0], mask.shape[1])
    if bool(mask.all()):
        return dense(rotate, shape, start, mask.device)
    real = mask.flatten().nonzero().squeeze(1)
    if not len(real):
        raise InputError("padding_mask marks no token as real; it must be True at real tokens")
    counts = mask.sum(1)
    start = torch.zeros_like(counts) if start is None else start
    positions = (start[:, None] + mask.cumsum(1) - 1).flatten()[real][None]
    cu_seqlens = nn.functional.pad(counts.cumsum(0), (1, 0)).cpu()
    return Layout(
        positions, rotate(positions), start + counts, cu_seqlens, real=real, padded_shape=shape
    )


def packed(
    rotate: Rotate,
    cu_seqlens: Tensor,
    rows: int | None,
    start: Tensor | None,
    device: torch.device,
) -> Layout:
    """Sequences one after the other, bounds `cu_seqlens` `[N+1]`.

    With `rows` B they are B rows of equally many tokens: the state has a row each, it enters the sequence that begins
    the row and leaves by the one that ends it; the others begin at position 0 with an empty state. Without, a sequence
    is a row, and no final state is made unless `start` was given.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    lengths = bounds.diff()
    total = int(bounds[-1])
    if bounds[0] != 0 or total == 0 or bool((lengths < 0).any()):
        raise InputError(
            f"cu_seqlens is {bounds.tolist()}; give bounds that rise from 0 to the number of tokens"
        )
    first = last = None
    if rows is not None:
        first, last = _row_sequences(bounds, rows)
    offsets = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    if start is not None:
        offsets = start if first is None else offsets.index_copy(0, first.to(device), start)
    shift = torch.repeat_interleave(
        offsets - bounds[:-1].to(device), lengths.to(device), output_size=total
    )
    positions = (torch.arange(total, device=device) + shift)[None]
    ends = offsets + lengths.to(device)
    return Layout(
        positions,
        rotate(positions),
        ends if last is None else ends[last.to(device)],
        bounds,
        first=None if first is None else first.to(device),
        last=None if last is None else last.to(device),
        keeps_state=rows is not None or start is not None,
    )


def _row_sequences(bounds: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The sequences that begin and end each of `rows` equal rows."""
    total = int(bounds[-1])
    edges = torch.arange(rows + 1) * (total // rows)
    first = torch.searchsorted(bounds[:-1], edges[:-1], right=True) - 1
    last = torch.searchsorted(bounds[1:], edges[1:])
    if total % rows or not torch.equal(bounds[first], edges[:-1]):
        raise InputError(
            f"cu_seqlens cuts {total} tokens so that {rows} rows of equal length do not each begin a sequence"
        )
    return first, last
