"""Multi-scale retention: the mixer of RetNet (paper §2).

Shapes: B rows, T tokens, D width, H heads, G key and value heads, K and V head dims; x `[B,T,D]`,
state S `[B,H,K,V]`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import init

from retentive.errors import InputError, nearest
from retentive.fields import check_divisible, check_even, check_positive
from retentive.layers.activations import Activation
from retentive.layers.fused import fuses, norm_gate, rotate_qk
from retentive.layers.layout import Layout, angles_of
from retentive.layers.linear import Linear
from retentive.layers.parts import (
    OptionalNorm,
    Recomputing,
    Repeated,
    deepnet_gain,
    identity,
    make_norm,
    norm_parts,
    reset_vectors,
)
from retentive.layers.rotation import Constant, Rotation, RotationRule, exponents, rotate
from retentive.mixers.base import Mixer, MixerConfig
from retentive.mixers.state import TensorState
from retentive.mixers.xpos import XPosRetention
from retentive.ops import retention
from retentive.ops.decay import log_decay

Decay = Literal["power", "linspace"] | tuple[float, ...]


@dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """A retention layer. The defaults are the paper's.

    num_heads           H
    qk_dim, value_dim   of all heads together; the width and twice the width unless given
    num_kv_heads        G, fewer than num_heads: groups of consecutive heads share keys and values
    decay               "power", γ = 1 - 2^(-5-h); "linspace", of paper §3.1; or each head's log γ
    rotation            "official", θ_p = base^(-p/(K/2-1)); "rope", θ_p = base^(-2p/K);
                        "rope-across-heads", θ_hp = base^(-2(h K/2 + p)/(H K))
    rotary_dim          how many of the K dims turn: the pairs p < rotary_dim/2, whose θ_p are those
                        of a head of rotary_dim dims; all unless given
    xpos_base           q is scaled by ζ_p^(n/base), k by ζ_p^(-n/base), ζ = (e + 0.4) / 1.4 where
                        θ = rotation_base^(-e) (xPos, arXiv 2212.10554)
    row_scale           row n times 1/√Σ_{i≤n} γ^i (paper §2.1), as the authors' code has it
    gate                MSR(X) = (act(X W_G) ⊙ Y) W_O; False leaves Y W_O (an ablation)
    gate_act            its activation
    head_norm           over the V values of a head, without weights; "layernorm" is the paper's
                        GroupNorm, a group for each head; "none" is an ablation
    head_norm_affine    it has weights [V] that all heads of a layer share
    qkv_bias, gate_bias, out_bias    of the projections q, k and v; of g; of o

    The dims p and p + K/2 of a head turn together. A checkpoint that pairs 2p and 2p + 1 is exactly
    the same model with the rows of W_Q and W_K in another order within each head: evens, then odds.
    So is one whose first rotary_dim dims turn: the first half of these goes to 0 and on, the second
    to K/2 and on.
    """

    kind: ClassVar[str] = "retention"
    ffn_ratio: ClassVar[float] = 2.0

    num_heads: int
    qk_dim: int | None = None
    value_dim: int | None = None
    gate: bool = True
    head_norm: OptionalNorm = "layernorm"
    head_norm_eps: float = 1e-6
    decay: Decay = "power"
    rotation: RotationRule = "official"
    rotation_base: float = 10000.0
    row_scale: bool = False
    gate_act: Activation = "swish"
    head_norm_affine: bool = False
    rotary_dim: int | None = None
    xpos_base: float | None = None
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    gate_bias: bool = False
    out_bias: bool = False

    def for_width(self, hidden_size: int) -> Self:
        """With qk_dim and value_dim filled in."""
        dims = {"qk_dim": self.qk_dim, "value_dim": self.value_dim}
        dims["qk_dim"] = hidden_size if self.qk_dim is None else self.qk_dim
        dims["value_dim"] = 2 * hidden_size if self.value_dim is None else self.value_dim
        filled = dataclasses.replace(self, **dims)
        filled._check()
        return filled

    @classmethod
    def default(cls, hidden_size: int) -> Self:
        """Heads of K = 64, or of 256 from the paper's widths on."""
        head_dim = next((d for d in (256, 64) if hidden_size % d == 0 and hidden_size >= 4 * d), 1)
        return cls(num_heads=hidden_size // head_dim if head_dim > 1 else 1)

    def _check(self) -> None:
        for name in ("num_heads", "qk_dim", "value_dim", "head_norm_eps", "rotation_base"):
            check_positive(name, getattr(self, name))
        check_positive("num_kv_heads", self.kv_heads)
        for name in ("qk_dim", "value_dim"):
            check_divisible(name, getattr(self, name), self.num_heads)
        check_even("qk_dim", self.qk_dim, self.num_heads)
        check_divisible("num_heads", self.num_heads, self.kv_heads, "num_kv_heads")
        log_decay(self.num_heads, self.decay)  # refuses a bad list
        self._check_rotation()
        if self.gate_bias and not self.gate:
            raise InputError("gate_bias is true without a gate; leave it out")
        if self.head_norm_affine and self.head_norm == "none":
            raise InputError("head_norm_affine is true, but head_norm is none; leave it out")

    def _check_rotation(self) -> None:
        if self.xpos_base is not None:
            check_positive("xpos_base", self.xpos_base)
        R, K = self.rotary_dim, self.qk_head_dim
        if R is not None and (R % 2 or not 0 < R <= K):
            raise InputError(f"rotary_dim is {R}; give an even number from 2 to the head dim {K}")
        grouped = self.kv_heads != self.num_heads
        if self.rotation == "rope-across-heads" and (grouped or R is not None):
            raise InputError(
                "rotation is rope-across-heads, which turns all dims of as many key heads as heads;"
                " leave rotary_dim and num_kv_heads out"
            )

    @property
    def qk_head_dim(self) -> int:
        """K, of a resolved config."""
        assert self.qk_dim is not None
        return self.qk_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """V, of a resolved config."""
        assert self.value_dim is not None
        return self.value_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, by default `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class Retention(Recomputing, Mixer):
    """Gated multi-scale retention: MSR(X) = (swish(X W_G) ⊙ HeadNorm(Retention(X))) W_O.

    Without a gate there is no `g_proj`: MSR(X) = HeadNorm(Retention(X)) W_O. The attributes `form`,
    `backend` and `chunk_size` choose how retention is computed, not what (`retentive.ops`).
    """

    name = "retention"
    Config = RetentionConfig
    rotation: Rotation
    tunable = True

    def __init__(self, hidden_size: int, config: RetentionConfig):
        super().__init__(hidden_size, config)
        H, G = config.num_heads, config.kv_heads
        K, V = config.qk_head_dim, config.value_head_dim
        self.num_heads, self.num_kv_heads, self.state_shape = H, G, (H, K, V)
        self.form: str = "auto"
        self.backend: str = "auto"
        self.chunk_size: int | None = None

        self.log_decay = Constant(log_decay(H, config.decay))
        self.rotation = Rotation(  # K^(-1/2) rides on the keys
            K,
            config.rotation,
            config.rotation_base,
            K**-0.5,
            self.log_decay.value if config.row_scale else None,
            rotary_dim=config.rotary_dim,
            heads=H,
        )
        self.retain = xpos_retention(config) or retention
        self.share = Repeated(H // G) if G < H else identity
        self.q_proj = Linear(hidden_size, H * K, config.qkv_bias)
        self.k_proj = Linear(hidden_size, G * K, config.qkv_bias)
        self.v_proj = Linear(hidden_size, G * V, config.qkv_bias)
        self.g_proj = Linear(hidden_size, H * V, config.gate_bias) if config.gate else None
        self.gate_act = config.gate_act
        self.head_norm = make_norm(
            config.head_norm, V, config.head_norm_eps, config.head_norm_affine
        )
        self.o_proj = Linear(H * V, hidden_size, config.out_bias)
        self.initial_state: nn.Parameter | None = None  # [H,K,V], a tuned one; None is zeros
        self._gamma: Tensor | None = None
        self.exportable = config.xpos_base is None

    def forward(
        self, x: Tensor, state: TensorState | None, layout: Layout
    ) -> tuple[Tensor, TensorState | None]:
        # Project to queries [B,T,H,K], keys [B,T,G,K] and values [B,T,G,V]
        q, k, v, gate = self._project(x)

        # Turn queries and keys by their positions; the row scale and K^-1/2 ride on the factors
        q, k = rotate_qk(q, k, layout.angles(self.rotation), self.backend)

        # Retention o_n = q_n S_n, S_n = γ S_(n-1) + k_nᵀ v_n, by form and backend: o [B,T,H,V]
        o, final = self.retain(
            q,
            self.share(k),
            self.share(v),
            self.log_decay.on(x.device),
            state=layout.sequence_states(None if state is None else state["S"], self._initial(x)),
            cu_seqlens=layout.cu_seqlens,
            form=self.form,
            chunk_size=self.chunk_size,
            backend=self.backend,
            output_state=layout.keeps_state,
        )

        # Norm each head, gate, and project back to the residual stream [B,T,D]
        y = self.recomputed(self._output, o, gate)
        return y, None if final is None else self._state(layout.row_states(final))

    def step(self, x: Tensor, state: TensorState, layout: Layout) -> tuple[Tensor, TensorState]:
        """S ← γ S + kᵀ v in place, o = q S (paper §2.2). With xPos γ is that of a channel."""
        S, angles = state["S"], layout.angles(self.rotation)
        if fuses(self.backend, x):
            return self._fused_step(x, S, layout), state
        q, k, v, gate = self._project(x)
        q = rotate(q.to(S.dtype), angles.cos.squeeze(1), angles.sin.squeeze(1))
        k = rotate(self.share(k).to(S.dtype), angles.key_cos.squeeze(1), angles.key_sin.squeeze(1))
        v = self.share(v).to(S.dtype)
        gamma = self.gamma(S).unsqueeze(-1)
        S.mul_(gamma).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        o = torch.bmm(q.flatten(0, 1).unsqueeze(1), S.flatten(0, 1)).view(v.shape)
        return self._output(o.to(x.dtype), gate), state

    def _fused_step(self, x: Tensor, S: Tensor, layout: Layout) -> Tensor:
        """Rotation, retention, norm and gate as one kernel; rows that are not active are left."""
        from retentive.kernels.triton.decode import decode_step

        q, k, v, gate = self._project(x.unsqueeze(1))
        norm, weight, bias, eps = norm_parts(self.head_norm)
        y = decode_step(
            q, k, v, gate, S, self.gamma(S), *layout.angles(self.rotation), layout.active,
            weight, bias, norm, self.gate_act, eps,
        )  # fmt: skip
        return self.o_proj(y).squeeze(1)

    def set_kernels(self, *, form: str, backend: str, chunk_size: int | None) -> None:
        self.form, self.backend, self.chunk_size = form, backend, chunk_size

    def fixed_step(self, like: Tensor) -> bool:
        return fuses(self.backend, like)

    def emit(self, program: Any, x: Any, state: TensorState) -> Any:
        q, k, v = (program.product(x, p) for p in (self.q_proj, self.k_proj, self.v_proj))
        gate = None if self.g_proj is None else program.product(x, self.g_proj)
        angles = program.angles(self.rotation, self.num_heads)
        q = program.rotate(q, angles.cos, angles.sin)
        k = program.rotate(k, angles.key_cos, angles.key_sin)
        S = state["S"]
        o = program.retain(S, self.gamma(S), q, k, v, program.tokens)
        y = program.norm(o, self.head_norm, self.state_shape[-1])
        if gate is not None:
            y = program.gate(self.gate_act, gate, y)
        return program.product(y, self.o_proj)

    def empty_state(self, rows: int, like: Tensor, capacity: int = 0) -> TensorState:
        exact = torch.promote_types(like.dtype, torch.float32)
        if self.initial_state is not None:
            return self._state(self.initial_state.to(exact).repeat(rows, 1, 1, 1))
        S = torch.zeros(rows, *self.state_shape, dtype=exact, device=like.device)
        return self._state(S)

    def _state(self, S: Tensor) -> TensorState:
        return TensorState(self.name, {"S": S})

    def _initial(self, x: Tensor) -> Tensor | None:
        if self.initial_state is None:
            return None
        return self.initial_state.to(torch.promote_types(x.dtype, torch.float32))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries `[...,H,K]`, keys `[...,G,K]`, values `[...,G,V]`, gate `[...,H·V]`."""
        _, K, V = self.state_shape
        gate = None if self.g_proj is None else self.g_proj(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V)), gate

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """y `[...,D]` of what the op gives, o `[...,H,V]`."""
        return self.o_proj(norm_gate(o, gate, self.head_norm, self.gate_act, self.backend))

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

    def gamma(self, like: Tensor) -> Tensor:
        """What a token leaves of the state, `[H,1|K]`: γ, and with xPos ζ^(1/base) of a channel."""
        known = self._gamma
        if known is None or known.device != like.device or known.dtype != like.dtype:
            rates = self.log_decay.value.unsqueeze(-1)
            if isinstance(self.retain, XPosRetention):
                rates = rates + self.retain.rates.value
            known = self._gamma = rates.exp().to(like.device, like.dtype)
        return known

    # What reports ask

    def mixing_flops(self, context: float) -> float:
        return retention_flops(*self.state_shape)

    def log_decay_per_token(self) -> Tensor:
        return self.log_decay.value

    def describe(self) -> str:
        H, K, V = self.state_shape
        xpos = ", with xPos" if isinstance(self.retain, XPosRetention) else ""
        return f"retention, {H} heads of K {K} and V {V}{xpos}"


COUNTED_CHUNK = 64
"""Retention is counted at this chunk size whatever ran: a slow choice is no more work."""


def retention_flops(heads: int, K: int, V: int) -> int:
    """Forward FLOPs of a token: within its chunk q·k and p·v, and the state updated and read."""
    return heads * (2 * COUNTED_CHUNK * (K + V) + 4 * K * V)


def xpos_retention(config: RetentionConfig) -> XPosRetention | None:
    """Retention with xPos, None for a layer without."""
    if config.xpos_base is None:
        return None
    pairs = (config.rotary_dim or config.qk_head_dim) // 2
    e = exponents(config.rotation, pairs, config.num_heads)
    return XPosRetention(e, config.qk_head_dim, config.xpos_base)


class MultiScaleRetention(Retention):
    """A retention layer by itself, for any model.

    The options are the other fields of `RetentionConfig`. Its weights are initialised as the
    authors' code does. Raises InputError for unknown options and sizes that do not fit.
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: Any):
        known = [one.name for one in dataclasses.fields(RetentionConfig)]
        for name in options.keys() - set(known):
            raise InputError(
                f"unknown option {name!r}{nearest(name, known)}; known are {', '.join(known)}"
            )
        check_positive("hidden_size", hidden_size)
        super().__init__(hidden_size, RetentionConfig(num_heads, **options).for_width(hidden_size))
        if not self.o_proj.weight.is_meta:
            self.init_weights("official", 1)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y `[B,T,D]` and the state `[B,H,K,V]` after the last token of x `[B,T,D]`.

        state: of an earlier call, or None for none.
        positions: int64 `[B,T]`, consecutive in each row; from 0 if left out. With a state they
            must be given: the keys in it were turned by theirs.
        """
        layout = self._layout(x, state, positions)
        y, after = super().forward(x, None if state is None else self._state(state), layout)
        return y, None if after is None else after["S"]

    def _layout(self, x: Tensor, state: Tensor | None, positions: Tensor | None) -> Layout:
        width = self.o_proj.out_features
        if x.ndim != 3 or x.shape[2] != width or 0 in x.shape:
            raise InputError(
                f"x is {list(x.shape)}; give [B,T,{width}] with at least one row and token"
            )
        if positions is None:
            if state is not None:
                raise InputError("a state came without positions; give those of the tokens, [B,T]")
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        elif positions.shape != x.shape[:2] or positions.dtype != torch.int64:
            raise InputError(
                f"positions are {positions.dtype} {list(positions.shape)} for x {list(x.shape)};"
                f" give int64 {list(x.shape[:2])}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = angles_of([self.rotation], positions, dtype)
        return Layout(positions, angles, positions[:, -1] + 1)
