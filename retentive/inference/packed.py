"""Weights laid out for the CPU's matrix kernels: a model that reads and writes text, fast.

At a few rows a plain linear layer leaves half to three quarters of the memory bandwidth unused. The
kernels of oneDNN read weights that were brought into their own layout once, before the first token.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from retentive.errors import InputError
from retentive.models.files import fingerprint
from retentive.models.language_model import LanguageModel
from retentive.models.layers import FeedForward, Layer, MultiScaleRetention
from retentive.models.quantized import QuantizedLinear, joined_bias

ROWS = 8  # that the layout is chosen for: few rows are bound by memory, at many it matters little

Model = TypeVar("Model", bound=LanguageModel)


class PackedLinear(nn.Module):
    """x Wᵀ + b for x `[...,in]`; `weight` `[out,in]` is copied into the kernel's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def function(self) -> Layer:
        """For `inference.steps`."""
        product, weight, bias = torch.ops.mkldnn._linear_pointwise, self._weight, self._bias
        return lambda x: product(x, weight, bias, "none", [], "")


class FusedProjections(nn.Module):
    """Several projections of the same x as one `product`: a tuple of their outputs."""

    def __init__(self, projections: Sequence[nn.Linear | QuantizedLinear | None]):
        super().__init__()
        linears = [linear for linear in projections if linear is not None]
        self._missing = [None] * (len(projections) - len(linears))  # a gate, the last if there
        self.widths = [linear.out_features for linear in linears]
        quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
        if quantized:
            self.product = QuantizedLinear.fused(quantized).prepare_()
        else:
            weight = torch.cat([linear.weight for linear in linears])
            self.product = PackedLinear(weight, joined_bias(linears))

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        return (*self.product(x).split(self.widths, -1), *self._missing)


@torch.no_grad()
def pack_(model: Model) -> Model:
    """Lays out the weights of a model on the CPU for inference, in place; returns the model.

    Its logits are what they were, up to rounding, but it has no loss and cannot be saved or moved.
    Layer by layer, so that the weights are in memory only once; a tied head is copied. Quantised
    weights keep their kernels' layout only. Where there is no kernel for the model's dtype the
    model stays as it is.

    Raises InputError for a model on another device.
    """
    if model.device.type != "cpu":
        raise InputError(f"the model is on {model.device}; only models on the CPU can be packed")
    if model.packed_from is not None or not _has_kernel(model.dtype):
        return model
    model.packed_from = fingerprint(model)
    model.eval()
    for module in list(model.modules()):
        if isinstance(module, MultiScaleRetention):
            _fuse(module, ("q_proj", "k_proj", "v_proj", "g_proj"))
        elif isinstance(module, FeedForward):
            _fuse(module, ("up_proj", "gate_proj"))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif isinstance(child, QuantizedLinear) and module is not model.embed_tokens:
                child.prepare_()
    if model.lm_head is None and isinstance(model.embed_tokens, nn.Embedding):
        head = PackedLinear(model.embed_tokens.weight)
        model.lm_head = head  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _fuse(module: nn.Module, names: Sequence[str]) -> None:
    module.fused_proj = FusedProjections([getattr(module, name) for name in names])
    for name in names:
        delattr(module, name)


def _has_kernel(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or dtype == torch.float32
