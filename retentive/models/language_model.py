"""A language model: embedding, blocks, norm, head. All kinds of models are one, by their config.

Shapes: B rows, T tokens, D width; tokens `[B,T]`, hidden states `[B,T,D]`, logits `[B,T,vocab]`.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from retentive.errors import InputError
from retentive.layers import layout as layouts
from retentive.layers.layout import AnglesByKey, Layout, angles_of
from retentive.layers.linear import Linear
from retentive.layers.loss import cross_entropy, linear_cross_entropy
from retentive.layers.parts import (
    Recomputing,
    Scaled,
    dropout,
    identity,
    make_norm,
    reset_vectors,
)
from retentive.layers.quantized import QuantizedEmbedding, QuantizedLinear, use_quantized_layers
from retentive.layers.rotation import Rotation
from retentive.mixers.base import Mixer
from retentive.models.block import Block
from retentive.models.config import ModelConfig
from retentive.models.state import ModelState, concat


class LanguageModel(nn.Module):
    """Prefill, decoding and continuation are one and the same call.

    Built under `torch.device("meta")` it has shapes only; elsewhere weights are initialized, too.
    `checkpoint_layers`: in training save the inputs of the blocks only and recompute the rest.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding | QuantizedEmbedding
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = identity if config.embed_scale == 1 else Scaled(config.embed_scale)
        self.embed_norm = self._make_norm(config.embed_norm)
        self.dropout = dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = self._make_norm(config.final_norm)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config.head_bias)
        if config.quantization is not None:
            use_quantized_layers(self, config.quantization)
        self.checkpoint_layers = False
        if self.device.type != "meta":
            self.init_weights()

    def _make_norm(self, there: bool) -> Any:
        config = self.config
        kind = config.norm if there else "none"
        return make_norm(kind, config.hidden_size, config.norm_eps)

    @property
    def checkpoint_layers(self) -> bool:
        return self._checkpoint_layers

    @checkpoint_layers.setter
    def checkpoint_layers(self, on: bool) -> None:
        self._checkpoint_layers = on
        for module in self.modules():
            if isinstance(module, Recomputing):
                module.recompute = not on

    def set_kernels(
        self, *, form: str = "auto", backend: str = "auto", chunk_size: int | None = None
    ) -> Self:
        """Choose how every retention layer is computed (see `retentive.ops.retention`)."""
        for block in self.blocks:
            block.mixer.set_kernels(form=form, backend=backend, chunk_size=chunk_size)
        return self

    # Calls

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits and the state after these tokens, going on from `state`, which is left as it is.

        padding_mask: bool `[B,T]`, True where a token is real. Logits and state of a row are those
        of the row alone without its pads, wherever they are; logits at pads are zero.
        """
        layout = self.layout(tokens, state, padding_mask)
        h, after = self.hidden(layout.unpad(tokens), state, layout=layout)
        assert after is not None
        return layout.pad(self.head(h)), after

    def hidden(
        self, tokens: Tensor, state: ModelState | None = None, *, layout: Layout | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """Normed hidden states and the state after; tokens may be embeddings `[B,T,D]`.

        With a layout (of `layout` or `packed_layout`) the tokens come in its form, `[1,total]`
        where it is packed. The state is None iff `layout.keeps_state` is False.
        """
        if layout is None:
            layout = self.layout(tokens, state)
        else:
            self._check_tokens(tokens)
            self._check(tokens, layout)
        if state is not None:
            self._positions(state, layout.rows)
            self.check_state(state)

        # Embed the tokens: x [B,T,D]
        x = self.dropout(self.embed(tokens))

        # Each block mixes the tokens along time, then transforms each of them
        after: list[Any] = []
        for index, block in enumerate(self.layers):
            before = None if state is None else state.layers[index]
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x, layer_state = checkpoint(block, x, before, layout, use_reentrant=False)
            else:
                x, layer_state = block(x, before, layout)
            after.append(layer_state)

        # Norm what the head reads
        h = self.norm(x)
        return h, ModelState(layout.next_positions, after) if layout.keeps_state else None

    def head(self, h: Tensor) -> Tensor:
        """Logits `[...,vocab]` of hidden states `[...,D]`."""
        if self.lm_head is not None:
            return self.lm_head(h)
        if isinstance(self.embed_tokens, QuantizedEmbedding):
            return self.embed_tokens.table(h)
        return F.linear(h, self.embed_tokens.weight)

    def decode_step(
        self, tokens: Tensor, state: ModelState, layout: Layout
    ) -> tuple[Tensor, list[Any]]:
        """Logits `[B,vocab]` after one more token a row, `[B]`, and the states of the layers.

        States of fixed size are updated in place (`Mixer.step`); `state.positions` is the caller's.
        """
        x, after = self.embed(tokens), []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, layer_state = block.step(x, before, layout)
            after.append(layer_state)
        return self.head(self.norm(x)), after

    def loss(self, h: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of `head(h)` against targets, -100 for none; "mean" or "sum".

        The logits never exist as a whole (`retentive.layers.loss`), but of a head with an adapter.
        """
        if not isinstance(self.lm_head, nn.Linear | QuantizedLinear | None):
            return cross_entropy(self.head(h), targets, reduction)
        weight = self.head_weight
        bias = None if self.lm_head is None else self.lm_head.bias
        return linear_cross_entropy(h, weight, targets, reduction, bias)

    # Layouts

    def layout(
        self, tokens: Tensor, state: ModelState | None = None, padding_mask: Tensor | None = None
    ) -> Layout:
        """Of tokens `[B,T]` or embeddings `[B,T,D]`: dense, or packed where some are padding."""
        self._check_tokens(tokens)
        shape = (tokens.shape[0], tokens.shape[1])
        start = None if state is None else self._positions(state, shape[0])
        if padding_mask is None:
            return layouts.dense(self.angles, shape, start, tokens.device)
        if padding_mask.shape != shape:
            raise InputError(
                f"padding_mask is {list(padding_mask.shape)} for tokens {list(shape)};"
                " give an entry for each token"
            )
        return layouts.padded(self.angles, padding_mask.bool(), start)

    def packed_layout(
        self, cu_seqlens: Tensor, *, rows: int | None = None, state: ModelState | None = None
    ) -> Layout:
        """Of sequences packed as tokens `[1,total]`; see `retentive.layers.layout.packed`."""
        start = None
        if state is not None:
            start = self._positions(state, len(cu_seqlens) - 1 if rows is None else rows)
        return layouts.packed(self.angles, cu_seqlens, rows, start, self.device)

    def angles(self, positions: Tensor) -> AnglesByKey:
        """Of every layer's rotation at int64 positions `[B|1,T]`, in the model's `exact_dtype`."""
        return angles_of(self.rotations, positions, self.exact_dtype)

    @property
    def rotations(self) -> list[Rotation]:
        """One for each distinct rotation of the layers."""
        found = (block.mixer.rotation for block in self.blocks)
        return list({rotation.key: rotation for rotation in found if rotation}.values())

    # State and weights

    def init_state(self, batch: int, capacity: int | None = None) -> ModelState:
        """The initial state of `batch` sequences: zeros, or the tuned initial state.

        A state that grows has room for `capacity` tokens.
        """
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        positions = torch.zeros(batch, dtype=torch.int64, device=self.device)
        layers = [block.mixer.empty_state(batch, like, capacity or 0) for block in self.blocks]
        return ModelState(positions, layers)

    def restart_rows(self, state: ModelState, rows: Tensor) -> ModelState:
        """The state, with the initial one where `rows` (bool `[B]`, on the CPU) is True."""
        index = torch.arange(state.batch_size, device="cpu").masked_fill(rows, state.batch_size)
        return concat([state, self.init_state(1)]).select(index)

    @property
    def state_grows(self) -> bool:
        """Whether the state grows with the sequence, as keys and values do."""
        return any(block.mixer.grows for block in self.blocks)

    @property
    def blocks(self) -> list[Block]:
        """The layers, for type checkers."""
        return cast(list[Block], list(self.layers))

    @property
    def tunable(self) -> list[Mixer]:
        """The mixers whose initial state can be tuned."""
        return [block.mixer for block in self.blocks if block.mixer.tunable]

    def init_weights(self, seed: int | None = None) -> None:
        """Values for all parameters by `config.initialization`; a seed makes them reproducible."""
        if self.config.quantization is not None:
            raise InputError("a quantised model has no initial weights; quantise a trained one")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        reset_vectors(self)
        std = self.config.hidden_size**-0.5
        init.normal_(self.embed_tokens.weight, 0.0, std, generator)
        if self.lm_head is not None:
            init.normal_(self.lm_head.weight, 0.0, std, generator)
        for block in self.blocks:
            block.init_weights(self.config, generator)

    def num_parameters(self) -> int:
        """Of all weights, quantised or not; a tied one counts once."""
        quantized = (layer for layer in self.modules() if isinstance(layer, QuantizedLinear))
        return sum(weight.numel() for weight in self.parameters()) + sum(
            layer.num_parameters for layer in quantized
        )

    @property
    def head_weight(self) -> Tensor:
        """`[vocab,D]`; computed anew from a quantised one."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of angles and retention states: float64 in a float64 model, float32 in any other."""
        return torch.promote_types(self.dtype, torch.float32)

    # What a caller may get wrong

    def check_storable(self) -> None:
        """InputError for what no model folder holds: a tuned initial state."""
        if any(name.endswith(".initial_state") for name, _ in self.named_parameters()):
            raise InputError(
                "a tuned state is no part of a model folder; keep its adapter's folder"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, `[...,D]`, of tokens `[...]` or of rows of `embed_tokens`."""
        if tokens.is_floating_point():
            return self.embed_norm(self.embed_scale(tokens))
        try:
            x = self.embed_tokens(tokens)
        except IndexError:
            raise InputError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())};"
                f" this model's are 0 to {self.config.vocab_size - 1}"
            ) from None
        if isinstance(self.embed_tokens, QuantizedEmbedding):
            x = x.to(self.dtype)  # from float32
        return self.embed_norm(self.embed_scale(x))

    def _check_tokens(self, tokens: Tensor) -> None:
        width = self.config.hidden_size
        if not isinstance(tokens, Tensor):
            given, fit = f"a {type(tokens).__name__}", False
        else:
            given = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
            if tokens.is_floating_point():
                fit = tokens.ndim == 3 and tokens.shape[2] == width
            else:
                fit = tokens.ndim == 2 and tokens.dtype in (torch.int32, torch.int64)
            fit = fit and 0 not in tokens.shape
        if not fit:
            raise InputError(
                f"tokens are {given}; give at least one, int64 or int32 [B,T],"
                f" or embeddings [B,T,{width}]"
            )

    def _positions(self, state: ModelState, rows: int) -> Tensor:
        if not isinstance(state, ModelState):
            raise InputError(f"the state is a {type(state).__name__}; give a RetNetState or None")
        if state.batch_size != rows:
            raise InputError(
                f"the state has {state.batch_size} rows, the batch {rows};"
                " select or concat the rows of the state"
            )
        return state.positions

    def _check(self, tokens: Tensor, layout: Layout) -> None:
        rows, length = layout.positions.shape
        if tokens.shape[1] != length or rows not in (1, tokens.shape[0]):
            raise InputError(
                f"tokens are {list(tokens.shape[:2])} for a layout of {[rows, length]};"
                " bring them into its form first"
            )

    def check_state(self, state: ModelState) -> None:
        """InputError for a state of a model with other layers."""
        expected = [block.mixer.state_signature for block in self.blocks]
        if [layer.signature for layer in state.layers] != expected:
            raise InputError(
                "the state is of another model; give one that this model made, or None"
            )
