"""Weights in 16, 8 or 4 bits for inference; everything else of a model stays as it is.

What is stored of a weight W `[N out, K in]`, beside its bias, is plain and outlives the kernels:

    bits 16   qweight bfloat16 [N,K]
    bits 8    qweight int8 [N,K], scales bfloat16 [N]:  W = qweight · scales
    bits 4    qweight uint8 [N,K'/2], scales and zeros bfloat16 [N,K'/G]:
              W = (code - 8) · scales + zeros; column 2j in the low half of byte j, 2j+1 in the high
              one; K' is K rounded up to whole groups of G columns, and what it adds is ignored

How the numbers are found is in `retentive.compress`. Legend: M rows of activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.errors import InputError
from retentive.fields import check_types

Kernel = Callable[[Tensor], Tensor]  # [M,K] -> [M,N] of some dtype

STORED = ("qweight", "scales", "zeros")
FEW_ROWS = 8  # that oneDNN chooses its layout for
MANY_ROWS = 32  # from where on to unpack a weight costs little beside the product
_TINY = 1e-30
TILE = 64  # torch's kernels take rows and columns of a weight in tiles; some do not check the ends


@dataclass(frozen=True)
class Quantization:
    """How the weights of linear layers are stored (`retentive.layers.quantized`).

    bits         16 (bfloat16), 8, a scale a row, or 4, a scale and an offset for `group_size`
                 columns of a row; of embedding and head never fewer than 8
    source       the fingerprint of the model that was quantised
    """

    bits: int
    source: str
    group_size: int = 32

    def __post_init__(self) -> None:
        check_types(self)
        if self.bits not in (16, 8, 4):
            raise InputError(f"quantization bits are {self.bits}; this package knows 16, 8 and 4")
        if self.group_size not in (32, 64, 128):
            raise InputError(f"quantization group_size is {self.group_size}; it is 32, 64 or 128")


class QuantizedLinear(nn.Module):
    """x Wᵀ + b for x `[...,in]`, in the dtype of x.

    Its buffers are what is stored, and what decoding on a CPU reads (`inference.program`). Called
    on a CPU it multiplies by torch's kernels, with x rounded to bfloat16 or, at a few rows and
    where the CPU multiplies whole numbers (8 bits, VNNI), to 255 steps a row. What these need of a
    weight is made anew for many rows and kept for few, which come again and again. On other devices
    the weight is dequantised at every call: right, but slow.
    """

    qweight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, quantization: Quantization, bias: bool = False
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization = quantization
        stored = empty_tensors(in_features, out_features, quantization)
        for name in STORED:
            self.register_buffer(name, stored.get(name))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self._kernel: Kernel | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            y = F.linear(x, self.weight.to(x.dtype))
        else:
            y = self._product(x.reshape(-1, self.in_features))
            y = y.view(*x.shape[:-1], self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight as it is multiplied by, float32 `[N,K]`, computed anew."""
        return self.rows(torch.arange(self.out_features, device=self.qweight.device))

    def rows(self, index: Tensor) -> Tensor:
        """The rows of the weight at `index` `[...]`, float32 `[...,K]`."""
        rows = F.embedding(index, self.qweight)  # refuses negative ones
        if self.scales is None:
            return rows.float()
        scales = self.scales[index].float().unsqueeze(-1)
        if self.zeros is None:
            return rows * scales
        codes = unpack_nibbles(rows).unflatten(-1, (scales.shape[-2], -1))
        zeros = self.zeros[index].float().unsqueeze(-1)
        return ((codes.float() - 8) * scales + zeros).flatten(-2)[..., : self.in_features]

    @property
    def num_parameters(self) -> int:
        return self.out_features * (self.in_features + (self.bias is not None))

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise InputError(
                "a quantised model cannot be trained; train the one it was made from and quantise"
                " that again"
            )
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._kernel = None  # of what was stored before
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to other devices; what is stored keeps its dtypes."""
        self._kernel = None
        return super()._apply(lambda x: fn(x).to(x.dtype), recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own kernel: the layouts of some cannot be copied."""
        return {**self.__dict__, "_kernel": None}

    @torch.no_grad()
    def _product(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            return self._make_kernel(many=True)(x)
        kernel = self._kernel = self._kernel or self._make_kernel(many=False)
        return kernel(x)

    def _make_kernel(self, many: bool) -> Kernel:
        if many:
            return DenseKernel(self)
        whole = WholeNumberKernel if _has_vnni() else Int8Kernel
        return {16: Bfloat16Kernel, 8: whole, 4: Int4Kernel}[self.quantization.bits](self)

    def extra_repr(self) -> str:
        bits = self.quantization.bits
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


class QuantizedEmbedding(nn.Module):
    """Rows of a quantised table, float32; the table of a tied model is its head as well."""

    def __init__(self, vocab_size: int, hidden_size: int, quantization: Quantization):
        super().__init__()
        self.table = QuantizedLinear(hidden_size, vocab_size, quantization)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.rows(tokens)

    @property
    def weight(self) -> Tensor:
        """float32 `[vocab,D]`, computed anew."""
        return self.table.weight


def use_quantized_layers(module: nn.Module, quantization: Quantization) -> None:
    """Replaces every nn.Linear and nn.Embedding in place; weights are uninitialized.

    The embedding and the head (`lm_head`) keep at least 8 bits, where 4-bit error is largest.
    """
    outer = replace(quantization, bits=max(quantization.bits, 8))
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                scheme = outer if name == "lm_head" else quantization
                sizes = child.in_features, child.out_features
                linear = QuantizedLinear(*sizes, scheme, bias=child.bias is not None)
                setattr(parent, name, linear)
            elif isinstance(child, nn.Embedding):
                sizes = child.num_embeddings, child.embedding_dim
                setattr(parent, name, QuantizedEmbedding(*sizes, outer))


def empty_tensors(
    in_features: int, out_features: int, quantization: Quantization
) -> dict[str, Tensor]:
    """What is stored of a weight, by name, without values."""
    if quantization.bits == 16:
        return {"qweight": torch.empty(out_features, in_features, dtype=torch.bfloat16)}
    if quantization.bits == 8:
        qweight = torch.empty(out_features, in_features, dtype=torch.int8)
        return {"qweight": qweight, "scales": torch.empty(out_features, dtype=torch.bfloat16)}
    groups = -(-in_features // quantization.group_size)
    shape = (out_features, groups)
    return {
        "qweight": torch.empty(
            out_features, groups * quantization.group_size // 2, dtype=torch.uint8
        ),
        "scales": torch.empty(shape, dtype=torch.bfloat16),
        "zeros": torch.empty(shape, dtype=torch.bfloat16),
    }


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes 0 to 15 `[...,K]` -> bytes `[...,K/2]`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


class Bfloat16Kernel:
    """oneDNN's, with the weight in its own layout: at few rows twice as fast as without."""

    def __init__(self, layer: QuantizedLinear):
        self.weight = layer.qweight
        self.prepacked = _has_bfloat16()
        if self.prepacked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, FEW_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self.prepacked:
            x = x.bfloat16()
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x.float(), self.weight.float())


class WholeNumberKernel:
    """oneDNN's products of 8-bit numbers, whose sums are exact.

    Each row of x is rounded to 255 steps of its own, so that it does not matter what other rows it
    comes with. The product takes them as 1 to 255, 128 for 0.
    """

    def __init__(self, layer: QuantizedLinear):
        assert layer.scales is not None
        self.qweight = torch.ops.onednn.qlinear_prepack(
            layer.qweight, [FEW_ROWS, layer.in_features]
        )
        self.scales = layer.scales.float() / 127  # of the weight, and of a step of x
        self.zeros = torch.zeros(layer.out_features, dtype=torch.int32, device="cpu")
        self.zero = torch.tensor(
            128.5, dtype=torch.float32, device="cpu"
        )  # codes are to nearest: a cast cuts the fraction off

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)  # vector_norm(inf) is slow
        codes = torch.addcdiv(self.zero, x, largest, value=127).to(torch.uint8)
        weight = self.qweight, self.scales, self.zeros
        output = 1.0, 0, torch.float32, "none", [], ""  # not quantised, and nothing after it
        y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, *weight, None, *output)
        return y.mul_(largest)


class Int8Kernel:
    """torch's for 8-bit weights, for other CPUs."""

    def __init__(self, layer: QuantizedLinear):
        assert layer.scales is not None
        self.padding = -layer.in_features % TILE
        self.qweight = layer.qweight  # the kernel's own layout, unless it has to be padded
        if self.padding:
            self.qweight = F.pad(self.qweight, (0, self.padding))
        self.scales = layer.scales

    def __call__(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.padding:  # F.pad copies even what it does not pad
            x = F.pad(x, (0, self.padding))
        return torch.ops.aten._weight_int8pack_mm(x, self.qweight, self.scales)


class Int4Kernel:
    """torch's for 4-bit weights."""

    def __init__(self, layer: QuantizedLinear):
        assert layer.scales is not None and layer.zeros is not None
        self.outputs, self.group_size = layer.out_features, layer.quantization.group_size
        more = -self.outputs % TILE
        codes = F.pad(unpack_nibbles(layer.qweight), (0, 0, 0, more))
        self.padding = codes.shape[1] - layer.in_features
        affine = torch.stack((layer.scales, layer.zeros), -1)
        self.affine = F.pad(affine, (0, 0, 0, 0, 0, more)).transpose(0, 1).contiguous()  # [K/G,N,2]
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.padding:
            x = F.pad(x, (0, self.padding))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.affine)
        return y[:, : self.outputs]


class DenseKernel:
    """A product with the weight as bfloat16 or, where that is no faster, float32: for many rows."""

    def __init__(self, layer: QuantizedLinear):
        self.dtype = torch.bfloat16 if _has_bfloat16() else torch.float32
        self.weight, self.scales = layer.qweight, layer.scales
        if layer.zeros is not None and layer.scales is not None:
            scales, zeros, self.scales = layer.scales.unsqueeze(-1), layer.zeros.unsqueeze(-1), None
            codes = unpack_nibbles(layer.qweight).view(torch.int8).sub_(8).bfloat16()
            codes = codes.unflatten(-1, (scales.shape[1], -1))
            weight = torch.addcmul(zeros, codes, scales).flatten(-2)
            self.weight = weight[:, : layer.in_features]

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype))
        return y if self.scales is None else y.float().mul_(self.scales)


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
