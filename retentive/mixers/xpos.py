"""xPos: every channel of the keys has a decay of its own beside its head's (arXiv 2212.10554).

q_n is scaled by ζ^(n/base) and k_m by ζ^(-m/base), ζ ≤ 1: a product by ζ^((n-m)/base). Keys scaled
like that grow without bound, at base 512 beyond float32 near token 36 000. But only n - m counts.
So n and m are counted anew from time to time, and the state is kept as of its last token.

Shapes as everywhere; L tokens of a segment.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.layers.rotation import Constant
from retentive.ops import retention

BASES = 4  # so many bases of tokens until n and m are counted anew: keys grow 150-fold


class XPosRetention(nn.Module):
    """`retentive.ops.retention` of q and k that xPos scales.

    The state is Σ_m γ^(n-m) ζ^((n-m)/base) k_mᵀ v_m: that of keys in which each channel decays by
    itself.
    """

    def __init__(self, exponents: Tensor, head_dim: int, base: float):
        """`exponents` e `[1|H,pairs]` of the rotation: ζ = (e + 0.4)/1.4; 1 where no pair turns."""
        super().__init__()
        rates = ((exponents + 0.4) / 1.4).log() / base
        rates = F.pad(rates, (0, head_dim // 2 - rates.shape[-1]))
        self.rates = Constant(torch.cat((rates, rates), -1))  # log ζ / base, `[1|H,K]`
        self.segment = max(1, min(2048, int(BASES * base)))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        output_state: bool,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is None:
            o, state = self._dense(q, k, v, log_decay, state, **how)
        else:
            o, state = self._packed(q, k, v, log_decay, state, cu_seqlens, **how)
        return o, state if output_state else None

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, **how: Any
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for begin in range(0, q.shape[1], self.segment):
            here = slice(begin, begin + self.segment)
            steps = torch.arange(1, q[:, here].shape[1] + 1, device=q.device)
            scale = self._scale(steps, q)
            o, state = retention(
                _times(q[:, here], scale),
                _times(k[:, here], scale.reciprocal()),
                v[:, here],
                log_decay,
                state=state,
                **how,
            )
            assert state is not None
            state = state * scale[-1].unsqueeze(-1)
            outputs.append(o)
        assert state is not None
        return torch.cat(outputs, 1), state

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor,
        **how: Any,
    ) -> tuple[Tensor, Tensor]:
        """Segment by segment of all sequences at once; those that have ended are empty then."""
        lengths = cu_seqlens.diff()
        steps = torch.arange(q.shape[1], device="cpu") - cu_seqlens[:-1].repeat_interleave(lengths)
        o = torch.empty_like(v)
        for begin in range(0, int(lengths.max()), self.segment):
            where = ((steps >= begin) & (steps < begin + self.segment)).nonzero().squeeze(1)
            counts = (lengths - begin).clamp(0, self.segment)
            here = where.to(q.device)
            scale = self._scale(steps[where].to(q.device) - begin + 1, q)
            piece, state = retention(
                _times(q[:, here], scale),
                _times(k[:, here], scale.reciprocal()),
                v[:, here],
                log_decay,
                state=state,
                cu_seqlens=F.pad(counts.cumsum(0), (1, 0)),
                **how,
            )
            assert state is not None
            o = o.index_copy(1, here, piece)
            state = state * self._scale(counts.to(q.device), q).unsqueeze(-1)
        assert state is not None
        return o, state

    def _scale(self, steps: Tensor, like: Tensor) -> Tensor:
        """ζ^(steps/base) `[L,1|H,K]`, float32, or float64 for such q."""
        rates = self.rates.on(like.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return (rates * steps[:, None, None]).exp().to(dtype)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """x `[B,L,H,K]` scaled in the precision of `scale`, in its own dtype."""
    return (x * scale).to(x.dtype)
