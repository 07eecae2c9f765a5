"""A program of `kernels.cpu.machine`: what writes its instructions and runs them.

Shapes: B sequences, T tokens of each, M = B·T rows, H heads, G key and value heads, K and V head
dims.
"""

import struct
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from retentive.layers.parts import norm_parts
from retentive.layers.quantized import QuantizedLinear


class Rows:
    """float32 `[M,size]` in a program: what an instruction writes."""

    def __init__(self, program: "Program", values: Tensor):
        self.program, self.values, self.size = program, values, values.shape[1]

    def __add__(self, other: "Rows") -> "Rows":
        return self.program.add(self, other)

    def plus(self, y: "Rows", scale: float) -> "Rows":
        """scale x + y: how a block's residual is added."""
        return self.program.add(self, y, scale)


class Program:
    """Instructions for M rows. Each method but `new` and `run` writes one, and gives its result."""

    def __init__(self, rows: int):
        from retentive.kernels.cpu import machine, products  # compiled, unless they were before

        self.rows = rows
        self._machine, self._products = machine, products
        self._code: list[list[int]] = []
        self._kept: list[Tensor] = []  # whose addresses are in the program
        self._free: dict[int, list[Tensor]] = {}
        self._header: Tensor | None = None
        self._read: set[int] = set()  # since the last barrier
        self._written: set[int] = set()

    def new(self, size: int) -> Rows:
        """Memory for an instruction to write; given out again when the `Rows` are gone."""
        free = self._free.setdefault(size, [])
        values = free.pop() if free else torch.empty(self.rows, size)
        rows = Rows(self, values)
        weakref.finalize(rows, free.append, values)
        return rows

    def product(self, x: Rows, layer: nn.Linear | QuantizedLinear | nn.Embedding) -> Rows:
        """x Wᵀ + b; a table of embeddings is a head without b."""
        forms, scales, zeros, gains, groups, shift = self._products, 0, 0, 0, 0, 0
        if isinstance(layer, QuantizedLinear):
            weight, bits, outputs = layer.qweight, layer.quantization.bits, layer.out_features
            form = {16: forms.BFLOAT16, 8: forms.INT8, 4: forms.INT4}[bits]
            if bits == 8:
                gains = self._constant(layer.scales)
            if layer.zeros is not None and layer.scales is not None:
                scales, zeros = self._address(layer.scales), self._address(layer.zeros)
                groups = layer.scales.stride(0) * layer.scales.element_size()
                shift = layer.quantization.group_size.bit_length() - 1
        else:
            weight, outputs = layer.weight, len(layer.weight)
            form = forms.BFLOAT16 if weight.dtype == torch.bfloat16 else forms.FLOAT32
        code = self._products.product(form)
        row, bias = weight.stride(0) * weight.element_size(), getattr(layer, "bias", None)
        y = self.new(outputs)
        self._write(
            self._machine.PRODUCT, [x], y,
            code.address, self._address(weight), scales, zeros, gains, self._constant(bias),
            x, y, outputs, x.size, row, groups, shift,
        )  # fmt: skip
        return y

    def norm(self, x: Rows, layer: Any, size: int) -> Rows:
        """Over each `size` values of a row."""
        m, (kind, weight, bias, eps) = self._machine, norm_parts(layer)
        if kind == "none":
            return x
        y = self.new(x.size)
        self._write(
            m.NORM, [x], y,
            m.LAYER_NORM if kind == "layernorm" else m.RMS_NORM, x, y,
            self._constant(weight), self._constant(bias), _bits(eps),
            self.rows * x.size // size, size,
        )  # fmt: skip
        return y

    def rotate(self, x: Rows, cos: Tensor, sin: Tensor) -> Rows:
        """Heads of queries or keys, turned by `[M,H,K]` of the tables of a step."""
        (_, _, K), y = cos.shape, self.new(x.size)
        self._write(
            self._machine.ROTATE, [x], y,
            x, y, self._address(cos), self._address(sin), x.size // K, K, cos.stride(0),
        )  # fmt: skip
        return y

    def retain(self, S: Tensor, gamma: Tensor, q: Rows, k: Rows, v: Rows, tokens: int = 1) -> Rows:
        """o `[M,H·V]` of the state `[B,H,K,V]`, updated in place; gamma `[H,1|K]`; M = B·tokens."""
        (_, H, K, V), (_, rates) = S.shape, gamma.shape
        o = self.new(H * V)
        self._write(
            self._machine.RETAIN, [q, k, v], o,
            self._address(S), self._constant(gamma), q, k, v, o,
            H, k.size // K, K, V, rates, tokens,
        )  # fmt: skip
        return o

    def gate(self, act: str, gate: Rows, x: Rows | None = None) -> Rows:
        """act(gate) x, or without x act(gate)."""
        m, y = self._machine, self.new(gate.size)
        code = {"swish": m.SWISH, "gelu": m.GELU, "gelu_tanh": m.GELU_TANH}[act]
        given = [gate] if x is None else [gate, x]
        self._write(m.GATE, given, y, code, gate, 0 if x is None else x, y, gate.size)
        return y

    def add(self, x: Rows, y: Rows, alpha: float = 1.0) -> Rows:
        """alpha x + y"""
        z = self.new(x.size)
        self._write(self._machine.ADD, [x, y], z, x, y, z, x.size, _bits(alpha))
        return z

    def run(self) -> None:
        """All that has been written."""
        if self._header is None:
            words = self._products.WORDS
            code = torch.tensor([[*line, *[0] * (words - len(line))] for line in self._code])
            self._header = torch.tensor([self._address(code), len(code), self.rows])
        self._machine.run(self._header, torch.get_num_threads())

    def _write(self, code: int, read: list[Rows], written: Rows, *operands: int | Rows) -> None:
        """After a barrier, where a thread may still be at what this reads or writes over."""
        self._header = None
        inputs, output = {x.values.data_ptr() for x in read}, written.values.data_ptr()
        if output in self._read | self._written or inputs & self._written:
            self._code.append([self._machine.BARRIER])
            self._read.clear()
            self._written.clear()
        self._read |= inputs
        self._written.add(output)
        words = (self._address(x.values) if isinstance(x, Rows) else x for x in operands)
        self._code.append([code, *words])

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach())  # the values, whichever tensor a parameter has later
        return tensor.data_ptr()

    def _constant(self, tensor: Tensor | None) -> int:
        """The address of the values as float32, 0 for none."""
        return 0 if tensor is None else self._address(tensor.float().contiguous())


def _bits(value: float) -> int:
    """Those of a float32."""
    return struct.unpack("i", struct.pack("f", value))[0]
