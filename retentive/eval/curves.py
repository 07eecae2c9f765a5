"""Loss as a function of position: sums over blocks of tokens, and means with standard errors.

The position of a token is how many tokens of its document come before it. Blocks are the samples
that standard errors are made of: within one, losses go together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

BLOCK = 128  # positions; the first bounds of `buckets` are a multiple of it


@dataclass(frozen=True)
class Mean:
    """Nats a token over some blocks, and its standard error (None for a single block)."""

    tokens: int
    loss: float
    error: float | None

    @classmethod
    def of(cls, blocks: Sequence[tuple[float, int]]) -> Self:
        """Of blocks (nats, tokens). The error is that of a ratio of means, linearised."""
        tokens = sum(count for _, count in blocks)
        mean = sum(nats for nats, _ in blocks) / tokens
        if len(blocks) < 2:
            return cls(tokens, mean, None)
        squares = sum((nats - mean * count) ** 2 for nats, count in blocks)
        return cls(tokens, mean, math.sqrt(squares * len(blocks) / (len(blocks) - 1)) / tokens)

    def show(self, digits: int = 3, sign: str = "") -> str:
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.loss:{sign}.{digits}f}{error}"


def block_lengths(tokens: int) -> list[int]:
    """How many tokens each block of a document has."""
    return [min(BLOCK, tokens - start) for start in range(0, tokens, BLOCK)]


def buckets(longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions: [0, 128), then doublings, as far as `longest` tokens reach."""
    start, stop = 0, BLOCK
    while start < longest:
        yield start, stop
        start, stop = stop, 2 * stop


def curve(documents: Sequence[tuple[Sequence[float], int]]) -> list[tuple[int, int, Mean]]:
    """(from, to, mean) over documents, each (nats of its blocks, tokens)."""
    means = []
    for start, stop in buckets(max(tokens for _, tokens in documents)):
        blocks = [
            block
            for nats, tokens in documents
            for block in list(zip(nats, block_lengths(tokens), strict=True))[
                start // BLOCK : stop // BLOCK
            ]
        ]
        means.append((start, stop, Mean.of(blocks)))
    return means
