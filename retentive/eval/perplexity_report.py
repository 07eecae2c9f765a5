"""The report of `retentive eval perplexity`: JSON, two tables, a figure as PNG and SVG."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retentive.eval.curves import BLOCK, Mean, block_lengths, curve
from retentive.eval.figures import by_distance
from retentive.reports.figures import MARKERS, PALETTE, figure
from retentive.reports.tables import console, new_table, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1


class Measured(NamedTuple):
    """What reading a document gave: nats of each block of tokens, bytes of the state at its end."""

    blocks: list[float]
    state_bytes: int


@dataclass(frozen=True)
class _Document:
    name: str
    tokens: int
    bytes: int
    """UTF-8 bytes of those tokens' text."""
    measured: list[Measured]
    """By reading."""


class Reading(NamedTuple):
    """How a document is read: in rows of `window` tokens `stride` apart, or whole."""

    window: int | None = None
    stride: int | None = None

    @property
    def name(self) -> str:
        return "whole" if self.window is None else f"window {self.window}"


@dataclass
class Report:
    """Of a model, read in several ways. `max_tokens`: of each document, None for all."""

    model: str
    dtype: str
    max_tokens: int | None
    half_lives: list[float]
    readings: Sequence[Reading]
    documents: list[_Document] = field(default_factory=list)

    def add(self, name: str, tokens: int, length: int, measured: list[Measured]) -> None:
        self.documents.append(_Document(name, tokens, length, measured))

    @property
    def bytes(self) -> int:
        return sum(document.bytes for document in self.documents)

    def mean(self, reading: int) -> Mean:
        """Over all tokens of all documents."""
        return Mean.of(
            [
                block
                for document in self.documents
                for block in zip(
                    document.measured[reading].blocks, block_lengths(document.tokens), strict=True
                )
            ]
        )

    def bits_per_byte(self, mean: Mean) -> float:
        return mean.loss * mean.tokens / math.log(2) / self.bytes

    def curve(self, reading: int) -> list[tuple[int, int, Mean]]:
        return curve([(d.measured[reading].blocks, d.tokens) for d in self.documents])

    def gain(self, reading: int) -> list[tuple[int, int, Mean]]:
        """What the same tokens lose in a reading by windows, against the whole: pairs of blocks."""
        return curve(
            [
                (
                    [
                        b - a
                        for a, b in zip(
                            d.measured[0].blocks, d.measured[reading].blocks, strict=True
                        )
                    ],
                    d.tokens,
                )
                for d in self.documents
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "evaluation": "perplexity",
            "format": FORMAT,
            "model": self.model,
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
            "bytes": self.bytes,
            "documents": [
                {"name": d.name, "tokens": d.tokens, "bytes": d.bytes} for d in self.documents
            ],
            "readings": [self._reading(index) for index in range(len(self.readings))],
        }

    def _reading(self, index: int) -> dict[str, Any]:
        reading, mean = self.readings[index], self.mean(index)
        return {
            **reading._asdict(),
            "tokens": mean.tokens,
            "loss": mean.loss,
            "error": mean.error,
            "perplexity": math.exp(mean.loss),
            "bits_per_byte": self.bits_per_byte(mean),
            "by_document": [sum(d.measured[index].blocks) / d.tokens for d in self.documents],
            "by_position": [
                {"from": start, "to": stop, **asdict(part)}
                for start, stop, part in self.curve(index)
            ],
            "state_bytes": max(d.measured[index].state_bytes for d in self.documents) or None,
        }

    def show(self, folder: Path) -> None:
        out = console()
        documents = len(self.documents)
        title = f"{documents:,} document{'s' * (documents > 1)}, {self.bytes:,} bytes"
        columns = ["read", "tokens", "nats a token", "perplexity", "bits per byte"]
        table = new_table(title, columns, words=["read"])
        for index, reading in enumerate(self.readings):
            mean = self.mean(index)
            numbers = f"{mean.tokens:,}", mean.show(), f"{math.exp(mean.loss):,.2f}"
            table.add_row(reading.name, *numbers, f"{self.bits_per_byte(mean):.4f}")
        out.print(table)
        out.print(self._by_position())
        out.print(self._footnote())
        out.print(f"all of it in {folder}")

    def _by_position(self) -> Any:
        """A row a doubling of the context; beside each window what it loses against the whole."""
        whole = self.readings[0].window is None
        columns = ["context", "tokens"]
        for index, reading in enumerate(self.readings):
            columns += [reading.name, "- whole"] if whole and index else [reading.name]
        table = new_table("nats a token, by the tokens before it", columns)
        curves = [self.curve(index) for index in range(len(self.readings))]
        gains = [self.gain(index) for index in range(len(self.readings))] if whole else []
        for row, (start, stop, mean) in enumerate(curves[0]):
            cells = [f"{start:,} - {stop - 1:,}", f"{mean.tokens:,}"]
            for index in range(len(self.readings)):
                cells.append(curves[index][row][2].show())
                if whole and index:
                    cells.append(gains[index][row][2].show(4, sign="+"))
            table.add_row(*cells)
        return table

    def _footnote(self) -> str:
        lines = [f"± standard errors, blocks of {BLOCK} tokens as samples."]
        if self.readings[0].window is None:
            longest = max(d.tokens for d in self.documents)
            held = max(d.measured[0].state_bytes for d in self.documents)
            lines.append(f"Whole: state carried, {size(held)} after {longest:,} tokens.")
        else:
            lines.append("By windows only: a Transformer's cache grows with every token it keeps.")
        lines += [
            f"Window {r.window}: rows from an empty state, {r.stride} tokens apart."
            for r in self.readings
            if r.window is not None
        ]
        return "\n".join(lines)

    def draw(self, folder: Path) -> None:
        """As perplexity.png and .svg: a line a reading; below, what windows lose against whole."""
        compared = range(1, len(self.readings)) if self.readings[0].window is None else range(0)
        heights = (3, 2) if compared else (1,)
        size = (7.0, 4.4 * sum(heights) / heights[0])
        with figure(folder / "perplexity", "Loss by the tokens before", size) as drawn:
            grid = drawn.subplots(len(heights), squeeze=False, height_ratios=heights, sharex=True)
            above, *below = panels = list(grid[:, 0])
            for index in range(len(self.readings)):
                self._line(above, self.curve(index), index)
            above.set_ylabel("nats a token")
            above.legend()
            for axes in below:
                axes.axhline(0, color=PALETTE[0], linewidth=1)
                for index in compared:
                    self._line(axes, self.gain(index), index)
                axes.set_ylabel("above whole")
            by_distance(panels, "tokens before", self.half_lives)

    def _line(self, axes: "Axes", points: list[tuple[int, int, Mean]], index: int) -> None:
        axes.errorbar(
            [math.sqrt(max(start, 1) * stop) for start, stop, _ in points],
            [mean.loss for _, _, mean in points],
            yerr=[mean.error or 0.0 for _, _, mean in points],
            marker=MARKERS[index % len(MARKERS)],
            capsize=2,
            color=PALETTE[index % len(PALETTE)],
            label=self.readings[index].name,
        )
