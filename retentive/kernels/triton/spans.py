"""Which tokens are which sequence's and chunk's: arithmetic for a batch, tables for cu_seqlens."""

from typing import NamedTuple

import torch
from torch import Tensor

from retentive.sequences import sequence_bounds


class Spans(NamedTuple):
    """N sequences in chunks of at most C tokens; the last one of a sequence may be shorter.

    The tables are for `kernels.triton.tiles.span`: rows (start, stop, first chunk) of each
    sequence and rows (start, stop, chunk) of each chunk. None where every sequence is a row of
    `length` tokens.
    """

    sequences: int
    chunks: int
    length: int
    chunk_size: int
    sequence_table: Tensor | None = None  # int32 [N,3]
    chunk_table: Tensor | None = None  # int32 [chunks,3]

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> "Spans":
        """Of x `[B,T,H,X]`. With cu_seqlens on the device its values are waited for."""
        batch, length = x.shape[:2]
        if cu_seqlens is None:
            return cls(batch, batch * -(-length // chunk_size), length, chunk_size)
        bounds = torch.tensor(sequence_bounds(cu_seqlens, length), dtype=torch.int32)
        start, stop = bounds[:-1], bounds[1:]
        chunks = (stop - start + chunk_size - 1).div(chunk_size, rounding_mode="floor")
        first = chunks.cumsum(0, dtype=torch.int32) - chunks
        owner = torch.arange(len(start)).repeat_interleave(chunks)
        chunk = torch.arange(len(owner), dtype=torch.int32)
        chunk_start = start[owner] + (chunk - first[owner]) * chunk_size
        chunk_stop = torch.minimum(chunk_start + chunk_size, stop[owner])
        columns = (start, stop, first), (chunk_start, chunk_stop, chunk)
        tables = torch.cat([torch.stack(column, dim=1) for column in columns])
        sequence_table, chunk_table = tables.to(x.device).split([len(start), len(owner)])
        return cls(len(start), len(owner), length, chunk_size, sequence_table, chunk_table)
