"""The recurrent form in plain torch: a few tokens of each row, as decoding needs it (§2.2)."""

import torch
from torch import Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    active: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n; see `retentive.ops.retention_step`."""
    dtype = v.dtype
    gamma = torch.exp(log_decay)[:, None, None]
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    if active is not None:
        on = active[:, None, None, None]
        gamma = torch.where(on, gamma, 1.0)
        q, k, v = (torch.where(on, x, 0.0) for x in (q, k, v))  # whatever an idle slot holds
    outputs = []
    for n in range(q.shape[1]):
        write, read = (k[:, n, :, :, None], v[:, n, :, None, :]), q[:, n, :, None, :]
        if inplace:
            state.mul_(gamma).addcmul_(*write)
        else:
            state = torch.addcmul(state * gamma, *write)
        outputs.append((read @ state).squeeze(2))
    return torch.stack(outputs, dim=1).to(dtype), state
