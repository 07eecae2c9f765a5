"""Multi-scale retention, the feed-forward network and what else blocks are made of (paper §2).

Shapes: B rows, T tokens, D width, H heads, K and V head dims; x `[B,T,D]`, state `[B,H,K,V]`.
"""

from collections.abc import Callable
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from retentive.errors import InputError, nearest
from retentive.layers.fused import ACTIVATIONS, around
from retentive.layers.layout import Constant, Layout, Rotation, exponents
from retentive.layers.linear import Linear
from retentive.layers.norms import RMSNorm
from retentive.mixers.xpos import XPosRetention
from retentive.models.config import (
    Activation,
    Decay,
    ModelConfig,
    OptionalNorm,
    RetNetConfig,
    RotationRule,
)
from retentive.ops import retention
from retentive.ops.decay import log_decay

Layer = Callable[[Tensor], Tensor]


class Recomputing(nn.Module):
    """A part of a block that keeps little for its backward, unless the block keeps nothing."""

    recompute = True  # False where the whole block is computed again anyway

    def recomputed(self, segment: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`segment(*inputs)`, of which only the inputs are kept for the backward.

        The backward runs it again up to the last tensor it needs: of some elementwise steps and a
        projection after them the steps, which cost memory, but not the product, which costs time.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return segment(*inputs)
        draws = any(isinstance(part, nn.Dropout) for part in self.modules())  # an adapter's
        return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=draws)


class RetentionOptions(TypedDict, total=False):
    """The fields of `RetNetConfig` that are a retention layer's."""

    qk_dim: int | None
    value_dim: int | None
    decay: Decay
    rotation: RotationRule
    rotation_base: float
    rotary_dim: int | None
    xpos_base: float | None
    row_scale: bool
    num_kv_heads: int | None
    gate: bool
    gate_act: Activation
    head_norm: OptionalNorm
    head_norm_eps: float
    head_norm_affine: bool
    qkv_bias: bool
    gate_bias: bool
    out_bias: bool


class MultiScaleRetention(Recomputing):
    """Gated multi-scale retention: MSR(X) = (swish(X W_G) ⊙ HeadNorm(Retention(X))) W_O.

    Without a gate there is no `g_proj`: MSR(X) = HeadNorm(Retention(X)) W_O.

    Usable in any model: `MultiScaleRetention(width, num_heads, **options)`, with the options of
    `RetentionOptions`, which mean what they mean in `RetNetConfig`; its weights are initialised as
    the authors' code does. The attributes `form`, `backend` and `chunk_size` choose how retention
    is computed, not what (`retentive.ops`).
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: Unpack[RetentionOptions]):
        super().__init__()
        known = RetentionOptions.__annotations__
        for name in options.keys() - known.keys():
            raise InputError(
                f"unknown option {name!r}{nearest(name, known)}; known are {', '.join(known)}"
            )
        config = RetNetConfig(  # fills in and checks
            vocab_size=1,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            num_heads=num_heads,
            **options,
        )
        self.num_heads, self.num_kv_heads = num_heads, config.kv_heads
        self.state_shape = (num_heads, config.qk_head_dim, config.value_head_dim)
        self.form: str = "auto"
        self.backend: str = "auto"
        self.chunk_size: int | None = None

        K, V, G = config.qk_head_dim, config.value_head_dim, config.kv_heads
        self.log_decay = Constant(log_decay(num_heads, config.decay))
        self.rotation = rotation(config)
        self.retain = xpos_retention(config) or retention
        self.share = Repeated(num_heads // G) if G < num_heads else unchanged
        self.q_proj = Linear(hidden_size, num_heads * K, config.qkv_bias)
        self.k_proj = Linear(hidden_size, G * K, config.qkv_bias)
        self.v_proj = Linear(hidden_size, G * V, config.qkv_bias)
        self.g_proj = Linear(hidden_size, num_heads * V, config.gate_bias) if config.gate else None
        self.gate_act = config.gate_act
        self.head_norm = head_norm(config)
        self.o_proj = Linear(num_heads * V, hidden_size, config.out_bias)
        self.initial_state: nn.Parameter | None = None  # [H,K,V], a tuned one; None is zeros
        if not self.o_proj.weight.is_meta:
            self.init_weights("official", 1)

    @classmethod
    def of(cls, config: RetNetConfig) -> Self:
        """The layer of a model."""
        options = {name: getattr(config, name) for name in RetentionOptions.__annotations__}
        return cls(config.hidden_size, config.num_heads, **cast(RetentionOptions, options))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """y `[B,T,D]` and the state after the last token.

        state: of an earlier call, or None for none.
        positions: int64 `[B,T]`, consecutive in each row; from 0 if left out. With a state they
            must be given: the keys in it were turned by theirs.
        layout: all of it at once, made once for many layers (`retentive.layers.layout`).
        """
        if layout is None:
            layout = self._layout(x, state, positions)
        q, k, v, gate = self.project(x)
        q = q.unflatten(-1, (self.num_heads, -1))
        k, v = (y.unflatten(-1, (self.num_kv_heads, -1)) for y in (k, v))
        q, k = around(self.backend, q).rotate(q, k, layout.angles)
        o, final = self.retain(
            q,
            self.share(k),
            self.share(v),
            self.log_decay.on(x.device),
            state=layout.enter(state, self.initial_state),
            cu_seqlens=layout.cu_seqlens,
            form=self.form,
            chunk_size=self.chunk_size,
            backend=self.backend,
            output_state=layout.keeps_state,
        )
        y = self.recomputed(self.output, o, gate)
        return y, None if final is None else layout.leave(final)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries `[B,T,H·K]`, keys, values and the gate before its activation `[B,T,H·V]`.

        Keys and values are of `num_kv_heads` heads.
        """
        gate = None if self.g_proj is None else self.g_proj(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), gate

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """y `[B,T,D]` of what the op gives, o `[B,T,H,V]`."""
        return self.o_proj(
            around(self.backend, o).norm_gate(o, gate, self.head_norm, self.gate_act)
        )

    @property
    def state_decay(self) -> Tensor:
        """What a token shrinks the state by, float64 `[H,1|K]`: γ, and with xPos ζ of a channel."""
        rates = self.log_decay.value.unsqueeze(-1)
        if isinstance(self.retain, XPosRetention):
            rates = rates + self.retain.rates.value
        return rates.exp()

    def _layout(self, x: Tensor, state: Tensor | None, positions: Tensor | None) -> Layout:
        width = self.o_proj.out_features
        if x.ndim != 3 or x.shape[2] != width or 0 in x.shape:
            raise InputError(
                f"x is {list(x.shape)}; give [B,T,{width}] with at least one row and token"
            )
        if positions is None:
            if state is not None:
                raise InputError("a state came without positions; give those of the tokens, [B,T]")
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        elif positions.shape != x.shape[:2] or positions.dtype != torch.int64:
            raise InputError(
                f"positions are {positions.dtype} {list(positions.shape)} for x {list(x.shape)};"
                f" give int64 {list(x.shape[:2])}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Layout(positions, self.rotation(positions, dtype), positions[:, -1] + 1)

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None = None
    ) -> None:
        """ "official": the authors' code's. "paper": DeepNet's, in a model of `depth` layers."""
        reset_vectors(self)
        gates = [] if self.g_proj is None else [self.g_proj]
        if initialization == "official":
            for projection in (self.q_proj, self.k_proj, self.v_proj, *gates):
                init.xavier_uniform_(projection.weight, 2**-2.5, generator)
            init.xavier_uniform_(self.o_proj.weight, 2**-1, generator)
        else:
            for projection in (self.q_proj, self.k_proj):
                init.xavier_normal_(projection.weight, 1.0, generator)
            for projection in (self.v_proj, *gates, self.o_proj):
                init.xavier_normal_(projection.weight, deepnet_gain(depth), generator)


class FeedForward(Recomputing):
    """FFN(X) = act(X W_up) W_down, or gated: (act(X W_gate) ⊙ X W_up) W_down.

    With a `subln` what is multiplied by W_down is normed before.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.ffn_dim, config.ffn_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(width, inner, bias) if config.gated_ffn else None
        self.up_proj = Linear(width, inner, bias)
        self.subln = optional_norm(config.ffn_subln, inner, config.norm_eps)
        self.down_proj = Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.recomputed(self._output, *self.project(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What goes up and what gates it, `[B,T,ffn]` each."""
        return self.up_proj(x), None if self.gate_proj is None else self.gate_proj(x)

    def _output(self, up: Tensor, gate: Tensor | None) -> Tensor:
        inner = self.act(up) if gate is None else self.act(gate) * up
        return self.down_proj(self.subln(inner))

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None = None
    ) -> None:
        """As in `MultiScaleRetention`; the authors' code has torch's own for linear layers here."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is None:
                continue
            if initialization == "official":
                bound = projection.in_features**-0.5
                init.uniform_(projection.weight, -bound, bound, generator)
            else:
                init.xavier_normal_(projection.weight, deepnet_gain(depth), generator)


def unchanged(x: Tensor) -> Tensor:
    """In the place of a layer that is not there; a call of nn.Identity takes ten times as long."""
    return x


class Repeated(nn.Module):
    """Keys or values `[...,G,X]` of each group of heads for all of its heads: `[...,H,X]`."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.times, -2)


class Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def rotation(config: RetNetConfig) -> Rotation:
    """Of a model's retention layers. K^(-1/2) rides on the keys."""
    K = config.qk_head_dim
    return Rotation(
        K,
        config.rotation,
        config.rotation_base,
        K**-0.5,
        log_decay(config.num_heads, config.decay) if config.row_scale else None,
        rotary_dim=config.rotary_dim,
        heads=config.num_heads,
    )


def xpos_retention(config: RetNetConfig) -> XPosRetention | None:
    """Retention with xPos, None for a model without."""
    if config.xpos_base is None:
        return None
    pairs = (config.rotary_dim or config.qk_head_dim) // 2
    places = exponents(config.rotation, pairs, config.num_heads)
    return XPosRetention(places, config.qk_head_dim, config.xpos_base)


def optional_norm(kind: OptionalNorm, size: int, eps: float, affine: bool = True) -> Layer:
    """Over the last dim of `size`; in the place of "none" what leaves x as it is."""
    if kind == "none":
        return unchanged
    made = nn.LayerNorm if kind == "layernorm" else RMSNorm
    return made(size, eps=eps, elementwise_affine=affine)


def norm(config: ModelConfig) -> Layer:
    """Of the width."""
    return optional_norm(config.norm, config.hidden_size, config.norm_eps)


def head_norm(config: RetNetConfig) -> Layer:
    """Over the values of each head."""
    size, eps = config.value_head_dim, config.head_norm_eps
    return optional_norm(config.head_norm, size, eps, config.head_norm_affine)


def reset_vectors(module: nn.Module) -> None:
    """Norms start as they are without weights, linear layers without a bias."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Linear) and part.bias is not None:
            init.zeros_(part.bias)


def dropout(config: ModelConfig) -> Layer:
    return nn.Dropout(config.dropout) if config.dropout else unchanged


def deepnet_gain(depth: int) -> float:
    """β = (8L)^(-1/4): what DeepNet (arXiv 2203.00555) shrinks all that is written by."""
    return (8 * depth) ** -0.25
