"""Multi-scale retention, the feed-forward network and the norms (paper §2).

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
from retentive.models.config import ModelConfig
from retentive.models.layout import Constant, Layout, Rotation, rotate
from retentive.ops import retention
from retentive.ops.decay import log_decay

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "swish": F.silu}


class MultiScaleRetention(nn.Module):
    """Gated multi-scale retention: MSR(X) = (swish(X W_G) ⊙ HeadNorm(Retention(X))) W_O.

    `form`, `backend` and `chunk_size` say how retention is computed (see `retentive.ops.retention`), not what.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        decay: str | Sequence[float] = "power",
        rotation: str = "official",
        rotation_base: float = 10000.0,
        row_scale: bool = False,
        head_norm: str = "layernorm",
        head_norm_eps: float = 1e-6,
    ):
        super().__init__()
        qk_dim = hidden_size if qk_dim is None else qk_dim
        value_dim = 2 * hidden_size if value_dim is None else value_dim
        decays = log_decay(num_heads, decay)
        key_dim = qk_dim // num_heads
        self.num_heads = num_heads
        self.log_decay = Constant(decays)
        self.rotation = Rotation(
            key_dim, rotation, rotation_base, key_dim**-0.5, decays if row_scale else None
        )
        self.head_norm = F.layer_norm if head_norm == "layernorm" else F.rms_norm
        self.head_norm_eps = head_norm_eps
        self.form, self.backend, self.chunk_size = "auto", "auto", None

        self.q_proj = nn.Linear(hidden_size, qk_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, qk_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """y `[B,T,D]` and the state after the last token, for x `[B,T,D]` and the state before the first.

        positions: int64 `[B,T]`, consecutive in each row. Without, rows begin at 0; a call that goes on from a state
        must say where it stands, since the keys in the state are turned by their positions.
        layout: says it all instead, made once for many layers (`retentive.models.layout`).
        """
        if layout is None:
            layout = self._own_layout(x, state, positions)
        angles = layout.angles
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        o, final = retention(
            rotate(q, angles.cos, angles.sin),
            rotate(k, angles.key_cos, angles.key_sin),
            v,
            self.log_decay.value,
            state=layout.enter(state),
            cu_seqlens=layout.cu_seqlens,
            form=self.form,
            chunk_size=self.chunk_size,
            backend=self.backend,
            output_state=layout.keeps_state,
        )
        y = recomputed(self._gated_output, o, self.g_proj(x))
        return y, None if final is None else layout.leave(final)

    def _gated_output(self, o: Tensor, gate: Tensor) -> Tensor:
        normed = self.head_norm(o, o.shape[-1:], eps=self.head_norm_eps)
        return self.o_proj(F.silu(gate) * normed.flatten(-2))

    def _own_layout(self, x: Tensor, state: Tensor | None, positions: Tensor | None) -> Layout:
        if positions is None:
            if state is not None:
                raise InputError(
                    "a state without positions; give the positions [B,T] of the tokens"
                )
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if positions.shape[-1] != x.shape[1]:
            raise InputError(
                f"positions are {list(positions.shape)} for x {list(x.shape)}; give [B,T]"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Layout(positions, self.rotation(positions, dtype), positions[:, -1] + 1)

    def init_weights(
        self,
        initialization: str = "official",
        depth: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """ "official": the authors' code. "paper": DeepNet's for `depth` layers, whose gain shrinks what is written."""
        if initialization == "official":
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
                init.xavier_uniform_(projection.weight, 2**-2.5, generator)
            init.xavier_uniform_(self.o_proj.weight, 2**-1, generator)
        else:
            for projection in (self.q_proj, self.k_proj, self.g_proj):
                init.xavier_normal_(projection.weight, 1.0, generator)
            for projection in (self.v_proj, self.o_proj):
                init.xavier_normal_(projection.weight, deepnet_gain(depth), generator)


class FeedForward(nn.Module):
    """FFN(X) = act(X W_up) W_down, or gated: (act(X W_gate) ⊙ X W_up) W_down."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, gated: bool):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return recomputed(self._output, up, None if self.gate_proj is None else self.gate_proj(x))

    def _output(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return self.down_proj(self.act(up) if gate is None else self.act(gate) * up)

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None
    ) -> None:
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is None:
                continue
            if initialization == "official":
                bound = projection.in_features**-0.5
                init.uniform_(projection.weight, -bound, bound, generator)
            else:
                init.xavier_normal_(projection.weight, deepnet_gain(depth), generator)


def recomputed(segment: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`segment(*inputs)`, of which only the inputs are kept for the backward.

    The rest is computed again when it is needed, up to the last tensor that is: of a few elementwise steps and a final
    projection, the steps but not the product. That takes a third off the memory of training for 1 % of its time.
    """
    if not torch.is_grad_enabled():
        return segment(*inputs)
    return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=False)


def norm(config: ModelConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def feed_forward(config: ModelConfig) -> FeedForward:
    return FeedForward(config.hidden_size, config.ffn_dim, config.hidden_act, config.gated_ffn)


def dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def deepnet_gain(depth: int) -> float:
    """β = (8L)^(-1/4), the gain of a decoder's values, outputs and FFNs (DeepNet, arXiv 2203.00555)."""
    return (8 * depth) ** -0.25
