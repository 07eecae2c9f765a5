"""Retention in its three forms, as the paper writes them (§2.1-2.3): the oracle of every test.

Slow and plain on purpose. q, k `[B,T,H,K]`, v `[B,T,H,V]`, log_decay `[H]`, state `[B,H,K,V]` give
o `[B,T,H,V]` and the final state. All three compute, with S_0 the state before the first token,
o_n = Σ_{m≤n} γ^(n-m) (q_n·k_m) v_m + γ^(n+1) q_n S_0.
"""

import torch
from torch import Tensor


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """O = (Q Kᵀ ⊙ D) V with D_nm = γ^(n-m) on and below the diagonal: O(T²) work.

    In products that every runtime has: `retentive export` traces it.
    """
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B,H,T,X]
    n = torch.arange(length, dtype=log_decay.dtype, device=q.device)
    rate = log_decay[:, None, None]
    decay = torch.exp(rate * (n[:, None] - n[None, :]).clamp(min=0)).tril()  # D    [H,T,T]
    since_start = torch.exp(rate * (n[:, None] + 1))  # γ^(n+1)    [H,T,1]
    until_end = torch.exp(rate * (length - 1 - n[:, None]))
    o = (q @ k.mT * decay) @ v + (since_start * q) @ state
    final = torch.exp(rate * length) * state + (until_end * k).mT @ v
    return o.transpose(1, 2), final


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n: O(1) work and memory a token."""
    gamma = torch.exp(log_decay)[:, None, None]
    outputs = []
    for n in range(q.shape[1]):
        state = gamma * state + k[:, n, :, :, None] * v[:, n, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, n], state))
    return torch.stack(outputs, dim=1) if outputs else torch.empty_like(v), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The parallel form within a chunk, the recurrent form from chunk to chunk; no padding."""
    chunks = zip(*(x.split(chunk_size, dim=1) for x in (q, k, v)), strict=True)
    outputs = []
    for q_chunk, k_chunk, v_chunk in chunks:
        o, state = parallel(q_chunk, k_chunk, v_chunk, log_decay, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state
