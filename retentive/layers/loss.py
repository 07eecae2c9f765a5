"""Cross entropy of a linear head without its logits: chunk by chunk, forward and backward at once.

Shapes: N tokens, D width, W words of the vocabulary; h `[N,D]`, weight `[W,D]`, targets `[N]`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from retentive.errors import InputError
from retentive.layers.cpu_training import product, suits_onednn
from retentive.transforms import differentiable_once, transformed

IGNORED = -100
REDUCTIONS = ("mean", "sum")


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, reduction: str, bias: Tensor | None = None
) -> Tensor:
    """Of `h @ weight.T + bias` against targets, in nats: "mean" or "sum" over all but the -100.

    h `[...,D]`, targets `[...]`, bias `[W]`. The gradients of a chunk are formed while its logits
    are at hand: logits are computed once and never exist as a whole. Products run in the autocast
    dtype, the softmax and all sums in float32 (float64 for float64).
    """
    _check(reduction, targets, h, weight.shape[0])
    if transformed(h, weight, bias):
        return cross_entropy(F.linear(h, weight, bias), targets, reduction)
    kind = h.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else h.dtype
    trained = [x is not None and x.requires_grad for x in (h, weight, bias)]
    needed = [torch.is_grad_enabled() and each for each in trained]
    flat = targets.flatten()
    with torch.autocast(kind, enabled=False):
        total = _LinearCrossEntropy.apply(h.flatten(0, -2), weight, bias, flat, dtype, needed)
    return _reduced(total, targets, reduction)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The same of logits `[...,W]` that are there: of a head that is more than a weight."""
    _check(reduction, targets, logits, logits.shape[-1])
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = F.cross_entropy(exact, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return _reduced(total, targets, reduction)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        needed: list[bool],
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=h.device)
        dh = torch.empty_like(h) if needed[0] else None
        dweight = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        dbias = torch.zeros_like(bias, dtype=exact) if bias is not None and needed[2] else None
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        rows = chunk_rows(len(weight), h.device)
        for start in range(0, len(h), rows):
            chunk, target = h[start : start + rows].to(dtype), targets[start : start + rows]
            real = (target != IGNORED).unsqueeze(1)
            target = target.clamp(min=0).unsqueeze(1)
            log_p = F.log_softmax(product(chunk, w, b), dim=-1, dtype=exact)
            total -= log_p.gather(1, target).masked_fill_(~real, 0).sum()
            if not any(needed):
                continue
            # d loss / d logits is softmax minus one-hot; the rows without a target drop out below.
            dlogits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=exact))
            if dbias is not None:
                dbias += (dlogits * real).sum(0)
            dlogits = dlogits.to(dtype)
            if dh is not None:
                torch.mul(product(dlogits, w.T), real, out=dh[start : start + rows])
            if dweight is None:
                continue
            if dtype == exact and not suits_onednn(dlogits.T):
                dweight.addmm_(dlogits.T, chunk * real)
            else:
                dweight += product(dlogits.T, (chunk * real).T)
        ctx.save_for_backward(
            dh,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(weight.dtype),
        )
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: with retain_graph=True there may be another backward.
        scaled = (None if x is None else x * grads[0] for x in ctx.saved_tensors)
        return (*scaled, None, None, None)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are formed at once: 16 MB on a CPU, for its cache, 256 MB elsewhere."""
    return max(128, (2**22 if device.type == "cpu" else 2**26) // vocab_size)


def _reduced(total: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def _check(reduction: str, targets: Tensor, x: Tensor, vocab_size: int) -> None:
    """x `[...,D]` or `[...,W]`."""
    if reduction not in REDUCTIONS:
        raise InputError(f"unknown reduction {reduction!r}; choose {' or '.join(REDUCTIONS)}")
    if targets.shape != x.shape[:-1]:
        raise InputError(
            f"targets are {list(targets.shape)} for h {list(x.shape)}; give one a token"
        )
    _check_range(targets, vocab_size)


def _check_range(targets: Tensor, vocab_size: int) -> None:
    """Reading values would break a graph, and on an accelerator stall it."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not targets.numel():
        return
    if transformed(targets):
        return
    real = targets[targets != IGNORED]
    if real.numel() and not (0 <= int(real.min()) and int(real.max()) < vocab_size):
        raise InputError(
            f"targets run from {int(real.min())} to {int(real.max())};"
            f" this model's are 0 to {vocab_size - 1}, and {IGNORED} for none"
        )
