"""What a model has read, in the form in which transformers hands it from call to call.

Columns are what transformers counts: the tokens of a batch, pads among them. A row of the state has
read its real tokens only. Shapes: B rows, T columns.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from retentive.errors import InputError
from retentive.models.state import ModelState

# What transformers calls the cache in calls and outputs: "past_key_values" before 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
SPELLINGS = ("cache", "past_key_values")


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, by either spelling, taken out of them."""
    given = [arguments.pop(name) for name in SPELLINGS if arguments.get(name) is not None]
    if len(given) > 1:
        raise InputError("cache and past_key_values are one argument; give one of them")
    return given[0] if given else None


class RetentiveCache(Cache):
    """The states of the rows of a batch: the `cache` of any of our models.

    A RetNet's does not grow with the text. `copy.copy` branches it: states are never changed.

    A state cannot forget. Assisted decoding, which tries tokens and takes some back, asks by
    `activate_past_recording` to keep the state from before them. `crop` goes back to that one, and
    the tokens that stay (`unread`) are read again by the next call of the model.
    """

    is_compileable = False  # pyright: ignore[reportAssignmentType]
    # It counts its columns: a prompt that repeats them is cut to what is new.
    is_linear = (False,)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.records = False
        self.reset()

    def reset(self) -> None:
        """As if nothing had been read."""
        self.state: ModelState | None = None
        self.seen = 0  # columns, those of `unread` among them
        self.mask: Tensor | None = None  # `[B,seen]`, True at real tokens; None where all are
        self.unread: Tensor | None = None  # tokens `[B,T]`
        self.mark()

    @property
    def is_croppable(self) -> bool:
        """Whether columns can be taken back."""
        return self.records

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def real(self, attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Which of the next tokens `[B,T]` are real, bool `[B,T]`; None if all are.

        attention_mask: `[B, seen + T]`. InputError where it contradicts what has been read.
        """
        if attention_mask is None:
            return None
        shape = (tokens.shape[0], self.seen + tokens.shape[1])
        if attention_mask.shape != shape:
            raise InputError(
                f"attention_mask is {list(attention_mask.shape)}; give {list(shape)}, an entry for"
                " each token read before and given now"
            )
        mask = attention_mask.bool()
        before = mask[:, : self.seen]
        if not (before.all() if self.mask is None else torch.equal(before, self.mask)):
            raise InputError(
                "attention_mask calls tokens padding that the cache has read, or the reverse"
                " (rows that end early read pads); begin again without a cache"
            )
        real = mask[:, self.seen :]
        return None if real.all() else real

    def add(self, tokens: Tensor, real: Tensor | None, state: ModelState | None) -> None:
        """`state` has read tokens `[B,T]` (or embeddings), `real` `[B,T]` of them, None for all."""
        rows, columns = tokens.shape[:2]
        if real is not None or self.mask is not None:
            everything = torch.ones(rows, self.seen + columns, device=tokens.device).bool()
            before = everything[:, : self.seen] if self.mask is None else self.mask
            self.mask = torch.cat([before, everything[:, :columns] if real is None else real], 1)
        self.state = state
        self.seen += columns
        if self.records:
            self._since = [*self._since, tokens]  # copies of the cache share the list

    def mark(self) -> None:
        """The state is kept as one that `crop` can go back to."""
        self._mark = self.state
        self._since: list[Tensor] = []  # read since then

    def read_again(self, state: ModelState | None) -> None:
        """`state` has read `unread`, too."""
        self.state, self.unread = state, None
        self.mark()

    # What generation does with a cache

    def activate_past_recording(self) -> None:
        if not self.records:
            self.records = True
            self.mark()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes columns back; their number is given below 0."""
        stay = self.seen - abs(tokens_to_remove)
        if stay == self.seen:
            return self.mark() if self.unread is None else None
        marked = self.seen - sum(tokens.shape[1] for tokens in self._since)
        if not marked <= stay < self.seen:
            raise InputError(
                f"the cache cannot go back to {stay} of {self.seen} tokens: a recurrent"
                " state forgets nothing; keep a copy.copy from before, or read the text again"
            )
        kept = torch.cat(self._since, 1)[:, : stay - marked]
        self.state, self.seen, self._since = self._mark, stay, [kept]
        self.unread = kept if kept.shape[1] else None
        if self.mask is not None:
            self.mask = self.mask[:, :stay]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)
        if self.mask is not None:
            self.mask = self.mask[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.positions.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.seen} tokens)"


def checked(cache: object) -> RetentiveCache:
    """InputError for another library's cache."""
    if not isinstance(cache, RetentiveCache):
        raise InputError(
            f"the cache is a {type(cache).__name__}, which holds keys and values; give a"
            " retentive.hf.RetentiveCache(), or None"
        )
    return cache
