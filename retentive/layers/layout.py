"""Where the tokens of one forward stand: made once a call, shared by all layers.

Shapes: B rows, T tokens, N packed sequences, H heads, K the rotated head dim. A layout is dense
(tokens `[B,T]`) or packed (`[1,total]`). Padding ends here: padded rows become packed sequences, so
that no layer ever sees a pad.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.errors import InputError
from retentive.ops.decay import row_scale


class Constant(nn.Module):
    """A float64 vector on the device of its module's parameters, and otherwise fixed.

    It is no buffer: `.to(dtype)`, `to_empty` and checkpoints leave its values alone.
    """

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value
        self._follow(torch.empty(0).device)  # where a parameter made now would be

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self._follow(fn(torch.empty(0, device=self.value.device)).device)
        return super()._apply(fn, recurse)

    def _follow(self, device: torch.device) -> None:
        if device.type not in ("meta", "mps"):  # one has no values, the other no float64
            self.value = self.value.to(device)

    def on(self, device: torch.device) -> Tensor:
        """The vector on `device`; in float32 where there is no float64."""
        value = self.value.float() if device.type == "mps" else self.value
        return value.to(device)


class Angles(NamedTuple):
    """What `rotate` takes, for queries and for keys: `[B|1,T,1|H,K]`."""

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def exponents(rule: str, pairs: int, heads: int = 1) -> Tensor:
    """e of θ = base^(-e), float64 `[1|heads,pairs]`, by a rule of `RetNetConfig.rotation`."""
    if rule != "rope-across-heads":
        heads = 1  # stands for all
    p = torch.arange(heads * pairs, dtype=torch.float64, device="cpu").view(heads, pairs)
    return p / max(pairs - 1, 1) if rule == "official" else p / (heads * pairs)


class Rotation(nn.Module):
    """Turns the pair (p, p + K/2) of each head at position n by the angle n·θ_p.

    `rule` and `base`: see `exponents`. With a `rotary_dim` only that many dims turn, the pairs
    p < rotary_dim/2. Factors that belong to a position ride on the cosines and sines: `key_scale`
    for keys, and for queries, if `scale_by` gives log γ `[H]`, the row scale. All of it is computed
    in float64 from integer positions, then cast: in float32 an angle is off by 0.05 at position
    10^6.
    """

    def __init__(
        self,
        head_dim: int,
        rule: str,
        base: float,
        key_scale: float = 1.0,
        scale_by: Tensor | None = None,
        *,
        rotary_dim: int | None = None,
        heads: int = 1,
    ):
        super().__init__()
        pairs = (rotary_dim or head_dim) // 2
        theta = base ** -exponents(rule, pairs, heads)
        self.frequencies = Constant(F.pad(theta, (0, head_dim // 2 - pairs)))
        self.key_scale = key_scale
        self.scale_by = None if scale_by is None else Constant(scale_by)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """For int64 positions `[B|1,T]`; `dtype` is float64 for a float64 model, else float32."""
        frequencies = self.frequencies.value
        exact = positions.to(frequencies.device)
        angles = exact[..., None, None] * frequencies
        cos, sin = (x.to(dtype).to(positions.device) for x in (angles.cos(), angles.sin()))
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        keys = cos * self.key_scale, sin * self.key_scale
        if self.scale_by is not None:
            scale = row_scale(self.scale_by.value, exact).to(dtype).to(positions.device)
            cos, sin = cos * scale.unsqueeze(-1), sin * scale.unsqueeze(-1)
        return Angles(cos, sin, *keys)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of each head of x `[B,T,H,K]`.

    The signs are in `sin`. Computed in the dtype of the angles, then cast back to that of x.
    """
    exact = x.to(cos.dtype)
    return (exact * cos).addcmul_(exact.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class Layout:
    """Where each token stands, and which sequence goes with which row of the state.

    positions       int64 `[B|1,T]`, of each token in its own sequence
    angles          of the model's rotation; `attention` is that of a hybrid's attention layers
    next_positions  int64 `[B]`, where each row of the state stands after this call
    cu_seqlens      packed: the bounds of the sequences, int64 `[N+1]` on the CPU
    first, last     packed rows: for each row of the state the sequence it enters and the one it
                    leaves by, int64 `[B]`; None where each sequence is a row
    real            padding: for each packed token its place among the B·T padded ones
    keeps_state     False where nobody wants the final state
    """

    positions: Tensor
    angles: Angles
    next_positions: Tensor
    cu_seqlens: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    real: Tensor | None = None
    padded_shape: tuple[int, int] = (0, 0)
    keeps_state: bool = True
    attention: Angles | None = None

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

    def enter(self, state: Tensor | None, initial: Tensor | None = None) -> Tensor | None:
        """The states of the rows `[B,...]` -> the initial states of the sequences `[N,...]`.

        `initial` `[...]` is what sequences begin with that no row enters; None is zeros.
        """
        if initial is not None:
            initial = initial.to(self.angles.cos.dtype)
        if state is None:
            return None if initial is None else self._repeat(initial)
        if self.first is None:
            return state
        if initial is None:
            initial = state.new_zeros(state.shape[1:])
        return self._repeat(initial).index_copy(0, self.first, state)

    def _repeat(self, initial: Tensor) -> Tensor:
        """For each sequence the same state, `[N,...]`, which is in memory once."""
        count = self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return initial.expand(count, *initial.shape)

    def leave(self, final: Tensor) -> Tensor:
        """The final states of the sequences `[N,...]` -> the states of the rows `[B,...]`."""
        return final if self.last is None else final.index_select(0, self.last)


MakeAngles = Callable[[Tensor], Angles]


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
    edges = torch.arange(rows + 1) * (total // rows)
    first = torch.searchsorted(bounds[:-1], edges[:-1], right=True) - 1
    last = torch.searchsorted(bounds[1:], edges[1:])
    if total % rows or not torch.equal(bounds[first], edges[:-1]):
        raise InputError(
            f"cu_seqlens does not begin a sequence with each of {rows} equal rows of {total} tokens"
        )
    return first, last
