"""Which tokens step s trains on: a pure function of (seed, step), so that a run resumes exactly.

Each epoch puts the documents of a split in an order of its own, end to end. The rows of a batch are
windows of that stream, and every token of an epoch is in one row, once; where the stream runs out,
a row is filled up with end tokens that have no target.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from retentive.data.dataset import Split
from retentive.errors import InputError

NO_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, all on the CPU."""

    tokens: Tensor
    """int64 [B, T]"""
    targets: Tensor
    """int64 [B, T]: the token that follows, -100 where there is nothing to predict"""
    cu_seqlens: Tensor
    """int64 [N + 1]: where sequences begin in the rows laid end to end, and B * T. Every row and
    every document begins one."""
    continues: Tensor
    """bool [B]: the row goes on with the document in which the same row of the step before ended"""


class BatchOrder:
    """The batches of a run over `split`.

    Without `carry` the windows of an epoch come in random order; a document that a row's end cuts
    goes on in some other row, from an empty state. With `carry` (truncated BPTT) the stream is
    dealt to the rows in `batch_size` equal lanes, and row b goes on at step s + 1 where step s left
    it.
    """

    def __init__(
        self, split: Split, batch_size: int, seq_len: int, seed: int, *, carry: bool = False
    ):
        if batch_size < 1 or seq_len < 1:
            raise InputError(f"a batch of {batch_size} x {seq_len} tokens: both must be at least 1")
        if split.num_tokens < batch_size * seq_len:
            raise InputError(
                f"the corpus has {split.num_tokens} tokens, too few for one batch of {batch_size} "
                f"rows of {seq_len}: give it more text, or take a smaller batch"
            )
        self.split = split
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.carry = carry
        self._stream = lru_cache(maxsize=2)(self._make_stream)  # a batch touches at most two epochs
        self._row_order = lru_cache(maxsize=2)(self._make_row_order)

    @property
    def steps_per_epoch(self) -> float:
        """Without `carry` a fraction: a batch may end one epoch and begin the next."""
        if self.carry:
            longest_lane = -(-self.split.num_tokens // self.batch_size)
            return float(-(-longest_lane // self.seq_len))
        return self._rows_per_epoch / self.batch_size

    def batch(self, step: int) -> Batch:
        if self.carry:
            return self._lane_windows(step)
        rows = []
        for row in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(row, self._rows_per_epoch)
            start = int(self._row_order(epoch)[i]) * self.seq_len
            rows.append(self._stream(epoch).row(start, start + self.seq_len, self.seq_len))
        return _stack(rows, [False] * self.batch_size)

    @property
    def _rows_per_epoch(self) -> int:
        return -(-self.split.num_tokens // self.seq_len)

    def _lane_windows(self, step: int) -> Batch:
        """Lane b is the part of the epoch's stream from b / B to (b + 1) / B."""
        epoch, i = divmod(step, int(self.steps_per_epoch))
        stream, total = self._stream(epoch), self.split.num_tokens
        rows, continues = [], []
        for b in range(self.batch_size):
            begin, end = (total * lane // self.batch_size for lane in (b, b + 1))
            start = min(begin + i * self.seq_len, end)
            rows.append(stream.row(start, min(start + self.seq_len, end), self.seq_len))
            continues.append(i > 0 and start < end and not stream.begins_document(start))
        return _stack(rows, continues)

    def _make_stream(self, epoch: int) -> "_Stream":
        return _Stream(self.split, _permutation(self.split.num_documents, self.seed, 2 * epoch))

    def _make_row_order(self, epoch: int) -> np.ndarray:
        return _permutation(self._rows_per_epoch, self.seed, 2 * epoch + 1)


@dataclass(frozen=True)
class _Row:
    tokens: np.ndarray
    targets: np.ndarray
    begins: np.ndarray
    """Where sequences begin, 0 first."""


class _Stream:
    """The documents of a split end to end in some order."""

    def __init__(self, split: Split, order: np.ndarray):
        self.tokens = split.tokens
        self.starts = np.concatenate([[0], np.cumsum(np.diff(split.offsets)[order])])
        self.shift = split.offsets[:-1][order] - self.starts[:-1]  # stream position -> token index
        self.length = split.num_tokens
        self.end_token = int(split.tokens[0])

    def begins_document(self, position: int) -> bool:
        return self.starts[np.searchsorted(self.starts, position)] == position

    def row(self, start: int, stop: int, seq_len: int) -> _Row:
        """Positions [start, stop) and the targets after them, filled up to `seq_len`."""
        stop = min(stop, self.length)
        tokens = np.full(seq_len, self.end_token, np.int64)
        targets = np.full(seq_len, NO_TARGET, np.int64)
        length = stop - start
        read = self._read(start, stop + 1)
        tokens[:length] = read[:-1]
        targets[:length] = read[1:]
        inside = slice(*np.searchsorted(self.starts, [start + 1, stop]))
        fill = [length] if 0 < length < seq_len else []
        return _Row(tokens, targets, np.concatenate([[0], self.starts[inside] - start, fill]))

    def _read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]; past the last document stands an end token."""
        within = min(stop, self.length)
        first = np.searchsorted(self.starts, start, side="right") - 1
        last = np.searchsorted(self.starts, within)
        counts = np.diff(np.clip(self.starts[first : last + 1], start, within))
        index = np.arange(start, within) + np.repeat(self.shift[first:last], counts)
        read = self.tokens[index].astype(np.int64)
        return read if within == stop else np.append(read, self.end_token)


def _stack(rows: list[_Row], continues: list[bool]) -> Batch:
    seq_len = len(rows[0].tokens)
    begins = [row.begins + b * seq_len for b, row in enumerate(rows)]
    cu_seqlens = np.concatenate([*begins, [len(rows) * seq_len]]).astype(np.int64)
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in rows])),
        torch.from_numpy(np.stack([row.targets for row in rows])),
        torch.from_numpy(cu_seqlens),
        torch.tensor(continues),
    )


def _permutation(n: int, seed: int, index: int) -> np.ndarray:
    """A random order of range(n): raw Philox output is the same in every NumPy, `shuffle` not."""
    key = np.array([seed % 2**64, index], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
