"""What RetNet and the Transformer baseline share: everything but the mixer of tokens and the kind of state.

Shapes: B rows, T tokens, D width; tokens `[B,T]`, hidden states `[B,T,D]`, logits `[B,T,vocab]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from retentive.errors import InputError
from retentive.models import layout as layouts
from retentive.models.config import ModelConfig
from retentive.models.layers import dropout, norm
from retentive.models.layout import Angles, Layout, Rotation
from retentive.models.loss import linear_cross_entropy
from retentive.models.state import LayerState, RetNetState


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head. Any number of tokens at any time: prefill, decoding and continuation are one call.

    A subclass gives `blocks`, each called as `block(x, layer state | None, layout) -> (x, layer state | None)`, the
    `rotation` of its positions, and `empty_state` of a layer.

    Built under `torch.device("meta")` a model has shapes only; elsewhere its weights are initialised, too.
    `checkpoint_layers` trades time for memory in training: only the input of each block is kept.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[nn.Module], rotation: Rotation):
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = dropout(config)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotation = rotation
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    # ------------------------------------------------------------------ calls

    def forward(
        self,
        tokens: Tensor,
        state: RetNetState | None = None,
        *,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, RetNetState]:
        """Logits `[B,T,vocab]` and the state after these tokens; `state` is what an earlier call gave, unchanged by this.

        padding_mask: bool `[B,T]`, True where a token is real. Each row then counts as if it stood alone without its
        pads, wherever they are; their logits are zero.
        """
        layout = self.layout(tokens, state, padding_mask)
        h, after = self.hidden(layout.unpad(tokens), state, layout=layout)
        assert after is not None
        return layout.pad(self.head(h)), after

    def hidden(
        self, tokens: Tensor, state: RetNetState | None = None, *, layout: Layout | None = None
    ) -> tuple[Tensor, RetNetState | None]:
        """Normed hidden states and the state after; `tokens` may be embeddings `[B,T,D]`.

        With a `layout` (from `layout` or `packed_layout`) the tokens are in its form: `[1,total]` where it is packed.
        The state is None only where the layout does not keep it.
        """
        if layout is None:
            layout = self.layout(tokens, state)
        self._check(tokens, state, layout)
        x = self.dropout(self._embed(tokens))
        after: list[Any] = []
        for index, block in enumerate(self.layers):
            before = None if state is None else state.layers[index]
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x, layer_state = checkpoint(block, x, before, layout, use_reentrant=False)
            else:
                x, layer_state = block(x, before, layout)
            after.append(layer_state)
        h = self.norm(x)
        return h, RetNetState(layout.next_positions, after) if layout.keeps_state else None

    def head(self, h: Tensor) -> Tensor:
        """Logits of hidden states `[...,D]`."""
        return F.linear(h, self.head_weight)

    def loss(self, h: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross entropy of `head(h)` against `targets` (-100: none), in nats, "mean" or "sum" over the targets.

        The logits never exist whole: see `retentive.models.loss`.
        """
        return linear_cross_entropy(h, self.head_weight, targets, reduction)

    # ------------------------------------------------------------------ layouts

    def layout(
        self, tokens: Tensor, state: RetNetState | None = None, padding_mask: Tensor | None = None
    ) -> Layout:
        """The layout of `tokens` `[B,T]` (or embeddings `[B,T,D]`): dense, or packed from padding."""
        if tokens.ndim < 2 or 0 in tokens.shape:
            raise InputError(f"tokens are {list(tokens.shape)}; give [B,T] with at least one token")
        shape = (tokens.shape[0], tokens.shape[1])
        start = None if state is None else self._positions(state, shape[0])
        if padding_mask is None:
            return layouts.dense(self._angles, shape, start, tokens.device)
        if padding_mask.shape != shape:
            raise InputError(
                f"padding_mask is {list(padding_mask.shape)} for tokens {list(shape)}; give one entry a token"
            )
        return layouts.padded(self._angles, padding_mask.bool(), start)

    def packed_layout(
        self, cu_seqlens: Tensor, *, rows: int | None = None, state: RetNetState | None = None
    ) -> Layout:
        """The layout of sequences packed in one row of tokens `[1,total]`: see `layouts.packed`."""
        start = None
        if state is not None:
            start = self._positions(state, rows or len(cu_seqlens) - 1)
        return layouts.packed(self._angles, cu_seqlens, rows, start, self.device)

    def _angles(self, positions: Tensor) -> Angles:
        return self.rotation(positions, self.exact_dtype)

    # ------------------------------------------------------------------ state and weights

    def init_state(self, batch: int, capacity: int | None = None) -> RetNetState:
        """The state of `batch` rows that have read nothing. `capacity`: tokens to make room for, where that costs."""
        positions = torch.zeros(batch, dtype=torch.int64, device=self.device)
        empty = [self.empty_layer_state(batch, capacity) for _ in self.layers]
        return RetNetState(positions, empty)

    def empty_layer_state(self, batch: int, capacity: int | None) -> LayerState:
        raise NotImplementedError

    def init_weights(self, seed: int | None = None) -> None:
        """Values for all parameters, by `config.initialization`; a `seed` makes them reproducible on a device."""
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        std = self.config.hidden_size**-0.5
        init.normal_(self.embed_tokens.weight, 0.0, std, generator)
        if self.lm_head is not None:
            init.normal_(self.lm_head.weight, 0.0, std, generator)
        for block in self.layers:
            block.init_weights(self.config, generator)  # pyright: ignore[reportCallIssue]

    def num_parameters(self) -> int:
        """Weights, a tied one counted once."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of angles and retention states: float64 in a float64 model, float32 in any other."""
        return torch.promote_types(self.embed_tokens.weight.dtype, torch.float32)

    # ------------------------------------------------------------------ checks

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return tokens
        try:
            return self.embed_tokens(tokens)
        except IndexError:
            low, high = tokens.min().item(), tokens.max().item()
            raise InputError(
                f"tokens run from {low} to {high}; this model's vocabulary has 0 to {self.config.vocab_size - 1}"
            ) from None

    def _positions(self, state: RetNetState, rows: int) -> Tensor:
        if not isinstance(state, RetNetState):
            raise InputError(
                f"state is a {type(state).__name__}; give a RetNetState of this model or None"
            )
        if state.batch_size != rows:
            raise InputError(
                f"the state has {state.batch_size} rows for a batch of {rows}; select or concat its rows"
            )
        return state.positions

    def _check(self, tokens: Tensor, state: RetNetState | None, layout: Layout) -> None:
        rows, length = layout.positions.shape
        if tokens.shape[1] != length or rows not in (1, tokens.shape[0]):
            raise InputError(
                f"tokens are {list(tokens.shape[:2])} for a layout of {[rows, length]}; unpad or flatten them first"
            )
        if state is None:
            return
        self._positions(state, layout.rows)
        expected = self.empty_layer_state(0, 0)
        given = [(layer.kind, layer.row_shape) for layer in state.layers]
        if given != [(expected.kind, expected.row_shape)] * len(self.layers):
            raise InputError(
                "the state belongs to another model: give one that this model made, or None"
            )
