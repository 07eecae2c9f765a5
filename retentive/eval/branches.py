"""Many continuations of many contexts, what they have in common read once.

A RetNet's past is a state of constant size, so to go on from one text in several ways is to copy
it: the inputs of all requests form a tree of common beginnings (a few-shot prompt, the context of
some choices, the choices' own first words), and each part of it is read once. A Transformer does
the same at the price of copying its cache.

Shapes: B rows, T tokens, N of all rows, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.eval.scores import log_likelihoods
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

AT_ONCE = 4096  # tokens read in one call, of all rows: memory does not grow with a text
LEAST = 16  # tokens that requests must have in common: to read fewer once costs more than twice


@dataclass(eq=False)
class Request:
    """How likely is `continuation` after `context`? Both hold at least one token.

    `row` is that of the state from which all of this goes on.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    row: int = 0
    log_likelihood: float = 0.0
    greedy: bool = True
    """Each token of the continuation is the model's likeliest."""
    tokens: tuple[int, ...] = field(init=False)
    inputs: tuple[int, ...] = field(init=False)
    unscored: int = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.context) and len(self.continuation)
        self.tokens = (*self.context, *self.continuation)
        self.inputs = self.tokens[:-1]
        self.unscored = len(self.continuation)

    def scored(self, start: int, stop: int) -> range:
        """The inputs from start to stop after which a token of the continuation comes."""
        return range(max(start, len(self.context) - 1), min(stop, len(self.inputs)))

    def take(self, log_likelihood: float, likeliest: bool) -> None:
        self.log_likelihood += log_likelihood
        self.greedy &= likeliest
        self.unscored -= 1


@dataclass
class Node:
    """Inputs from start to stop, the same in all these requests; children are how they go on."""

    requests: list[Request]
    start: int
    stop: int
    children: "list[Node]" = field(default_factory=list)

    @property
    def tokens(self) -> Sequence[int]:
        return self.requests[0].inputs[self.start : self.stop]


def tree(requests: Sequence[Request], start: int = 0) -> list[Node]:
    """Of requests in the order of their inputs, all from one row, equal before `start`."""
    nodes = []
    for _, equal in groupby(requests, key=lambda r: r.inputs[start : start + LEAST]):
        group = list(equal)
        stop = start + _common(group[0].inputs[start:], group[-1].inputs[start:])
        longer = [request for request in group if len(request.inputs) > stop]
        nodes.append(Node(group, start, stop, tree(longer, stop)))
    return nodes


def _common(first: Sequence[int], last: Sequence[int]) -> int:
    """How many tokens agree. In sorted order all between the first and the last do, too."""
    pairs = enumerate(zip(first, last, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(last)))


class Segment(NamedTuple):
    """Hidden states of some tokens of each row: the one of token `at + i` of row b, if there is
    one, is `h[begins[b] + i]`."""

    h: Tensor  # [N,D]
    at: int
    lengths: list[int]
    begins: list[int]
    state: ModelState


@torch.inference_mode()
def read(
    model: LanguageModel, rows: Sequence[Sequence[int]], state: ModelState, *, last: bool
) -> Iterator[Segment]:
    """Reads ragged rows, at most AT_ONCE tokens a call; a row may have none.

    With `last` nobody goes on from the state after them: then short rows may be padded, which costs
    less than to read each by itself.
    """
    width = max(1, AT_ONCE // len(rows))
    longest = max(map(len, rows))
    for at in range(0, longest, width):
        segments = [row[at : at + width] for row in rows]
        lengths = [len(segment) for segment in segments]
        if last or len(set(lengths)) == 1:
            wide = max(lengths)
            begins = [wide * row for row in range(len(rows))]
            padded = [[*segment, *[0] * (wide - len(segment))] for segment in segments]
            h, after = model.hidden(torch.tensor(padded, device=model.device), state)
        else:
            bounds = [0, *accumulate(lengths)]
            begins = bounds[:-1]
            packed = [token for segment in segments for token in segment]
            layout = model.packed_layout(torch.tensor(bounds), state=state)
            tokens = torch.tensor([packed], device=model.device)
            h, after = model.hidden(tokens, state, layout=layout)
        assert after is not None
        state = after
        yield Segment(h.flatten(0, 1), at, lengths, begins, state)


def after(model: LanguageModel, rows: Sequence[Sequence[int]], state: ModelState) -> ModelState:
    """The state after each row has read its tokens; a row may have none."""
    for segment in read(model, rows, state, last=False):
        state = segment.state
    return state


class Scorer:
    """Log-likelihoods of requests, `batch_size` rows at a time."""

    def __init__(self, model: LanguageModel, batch_size: int, *, share: bool = True):
        """`share` False reads every request by itself: to see what sharing gains."""
        self.model, self.batch_size, self.share = model, batch_size, share

    def finish(
        self,
        requests: Sequence[Request],
        state: ModelState | None = None,
        on_finished: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """Fills in `log_likelihood` and `greedy` of all; tells of each as soon as it has them.

        They go on from the rows of `state`, or, all in row 0, from an empty one.
        """
        state = self.model.init_state(1) if state is None else state
        ordered = sorted(requests, key=lambda r: (r.row, r.inputs))
        roots = []
        for row, group in groupby(ordered, key=lambda r: r.row):
            mine = list(group)
            alone = (Node([request], 0, len(request.inputs)) for request in mine)
            roots += [(node, row) for node in (tree(mine) if self.share else alone)]
        self._read(roots, state, on_finished)

    def _read(
        self,
        nodes: list[tuple[Node, int]],
        state: ModelState,
        on_finished: Callable[[Request], None],
    ) -> None:
        """Depth first, so that few states are held. Each node goes on from a row of `state`."""
        for inner in (True, False):
            group = [(node, row) for node, row in nodes if bool(node.children) == inner]
            group.sort(key=lambda item: item[0].stop - item[0].start, reverse=True)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                before = state.select([row for _, row in batch])
                after = self._read_batch([node for node, _ in batch], before, on_finished)
                children = [(n, row) for row, (node, _) in enumerate(batch) for n in node.children]
                if children:
                    self._read(children, after, on_finished)

    def _read_batch(
        self, nodes: list[Node], state: ModelState, on_finished: Callable[[Request], None]
    ) -> ModelState:
        rows, last = [node.tokens for node in nodes], not nodes[0].children
        for segment in read(self.model, rows, state, last=last):
            state = segment.state
            owners: list[Request] = []
            places: list[int] = []
            targets: list[int] = []
            for node, begin, length in zip(nodes, segment.begins, segment.lengths, strict=True):
                start = node.start + segment.at
                for request in node.requests:
                    for i in request.scored(start, start + length):
                        owners.append(request)
                        places.append(begin + i - start)
                        targets.append(request.tokens[i + 1])
            if not owners:
                continue
            device = self.model.device
            found, likeliest = log_likelihoods(
                self.model,
                segment.h,
                torch.tensor(places, device=device),
                torch.tensor(targets, device=device),
            )
            for owner, *answer in zip(owners, found.tolist(), likeliest.tolist(), strict=True):
                owner.take(*answer)
                if not owner.unscored:
                    on_finished(owner)
        return state
