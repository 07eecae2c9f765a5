"""Multi-scale retention, the feed-forward network and what else blocks are made of (paper §2).

Shapes: B rows, T tokens, D width, H heads, K and V head dims; x `[B,T,D]`, state `[B,H,K,V]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from retentive.errors import InputError
from retentive.models.config import (
    Activation,
    Decay,
    ModelConfig,
    OptionalNorm,
    RetNetConfig,
    RotationRule,
)
from retentive.models.layout import Constant, Layout, Rotation, rotate
from retentive.models.linear import Linear
from retentive.ops import retention
from retentive.ops.decay import log_decay

ACTIVATIONS = {"gelu": F.gelu, "swish": F.silu}


def _unnormed(x: Tensor, normalized_shape: Sequence[int], eps: float) -> Tensor:
    """In the place of a norm where there is none."""
    return x


HEAD_NORMS = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm, "none": _unnormed}


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
        return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=False)


class MultiScaleRetention(Recomputing):
    """Gated multi-scale retention: MSR(X) = (swish(X W_G) ⊙ HeadNorm(Retention(X))) W_O.

    Without a gate there is no `g_proj`: MSR(X) = HeadNorm(Retention(X)) W_O.

    Usable in any model. The options mean what they mean in `RetNetConfig`; its weights are
    initialised as the authors' code does. The attributes `form`, `backend` and `chunk_size` choose
    how retention is computed, not what (`retentive.ops`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        decay: Decay = "power",
        rotation: RotationRule = "official",
        rotation_base: float = 10000.0,
        row_scale: bool = False,
        gate: bool = True,
        head_norm: OptionalNorm = "layernorm",
        head_norm_eps: float = 1e-6,
    ):
        super().__init__()
        config = RetNetConfig(  # fills in and checks
            vocab_size=1,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            num_heads=num_heads,
            qk_dim=qk_dim,
            value_dim=value_dim,
            decay=decay,
            rotation=rotation,
            rotation_base=rotation_base,
            row_scale=row_scale,
            gate=gate,
            head_norm=head_norm,
            head_norm_eps=head_norm_eps,
        )
        self.num_heads = num_heads
        self.head_norm = HEAD_NORMS[head_norm]
        self.head_norm_eps = head_norm_eps
        self.form: str = "auto"
        self.backend: str = "auto"
        self.chunk_size: int | None = None

        decays = log_decay(num_heads, decay)
        K, V = config.qk_head_dim, config.value_head_dim
        self.log_decay = Constant(decays)
        scale_by = decays if row_scale else None
        self.rotation = Rotation(K, rotation, rotation_base, K**-0.5, scale_by)
        self.q_proj = Linear(hidden_size, num_heads * K)
        self.k_proj = Linear(hidden_size, num_heads * K)
        self.v_proj = Linear(hidden_size, num_heads * V)
        self.g_proj = Linear(hidden_size, num_heads * V) if gate else None
        self.o_proj = Linear(num_heads * V, hidden_size)
        self.fused_proj: nn.Module | None = None
        if not self.o_proj.weight.is_meta:
            self.init_weights("official", 1)

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
        layout: all of it at once, made once for many layers (`retentive.models.layout`).
        """
        if layout is None:
            layout = self._layout(x, state, positions)
        angles = layout.angles
        *qkv, gate = self.project(x)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        o, final = retention(
            rotate(q, angles.cos, angles.sin),
            rotate(k, angles.key_cos, angles.key_sin),
            v,
            self.log_decay.on(x.device),
            state=layout.enter(state),
            cu_seqlens=layout.cu_seqlens,
            form=self.form,
            chunk_size=self.chunk_size,
            backend=self.backend,
            output_state=layout.keeps_state,
        )
        y = self.recomputed(self.output, o, gate)
        return y, None if final is None else layout.leave(final)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys `[B,T,H·K]`, values and the gate before its swish `[B,T,H·V]`."""
        if self.fused_proj is not None:
            return self.fused_proj(x)
        gate = None if self.g_proj is None else self.g_proj(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), gate

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """y `[B,T,D]` of what the op gives, o `[B,T,H,V]`."""
        normed = self.head_norm(o, o.shape[-1:], eps=self.head_norm_eps).flatten(-2)
        return self.o_proj(normed if gate is None else F.silu(gate) * normed)

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
    """FFN(X) = act(X W_up) W_down, or gated: (act(X W_gate) ⊙ X W_up) W_down."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: Activation, gated: bool):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.gate_proj = Linear(hidden_size, intermediate_size) if gated else None
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.fused_proj: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.recomputed(self._output, *self.project(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What goes up and what gates it, `[B,T,ffn]` each."""
        if self.fused_proj is not None:
            return self.fused_proj(x)
        return self.up_proj(x), None if self.gate_proj is None else self.gate_proj(x)

    def _output(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return self.down_proj(self.act(up) if gate is None else self.act(gate) * up)

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


def norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def feed_forward(config: ModelConfig) -> FeedForward:
    return FeedForward(config.hidden_size, config.ffn_dim, config.hidden_act, config.gated_ffn)


def dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def deepnet_gain(depth: int) -> float:
    """β = (8L)^(-1/4): what DeepNet (arXiv 2203.00555) shrinks all that is written by."""
    return (8 * depth) ** -0.25
