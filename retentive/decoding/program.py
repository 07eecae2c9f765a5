"""A program of `kernels.cpu.machine`: what writes its instructions and runs them.

Shapes: B sequences, T tokens of each, M = B·T rows, H heads, G key and value heads, K and V head
dims.
"""

import struct
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from retentive.kernels.cpu.instructions import OPERANDS, WORDS, Act, NormKind, Opcode
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
        self._bytecode: list[list[int]] = []
        self._kept: list[Tensor] = []  # whose addresses are in the program
        self._pool: dict[int, list[Tensor]] = {}  # free buffers, by their size
        self._header: Tensor | None = None
        self._read: set[int] = set()  # since the last barrier
        self._written: set[int] = set()

    def new(self, size: int) -> Rows:
        """Memory for an instruction to write; given out again when the `Rows` are gone."""
        free = self._pool.setdefault(size, [])
        shape = (self.rows, size)
        values = free.pop() if free else torch.empty(shape, dtype=torch.float32, device="cpu")
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
        y, bias = self.new(outputs), getattr(layer, "bias", None)
        self._write(
            Opcode.PRODUCT,
            reads=[x],
            writes=y,
            code=self._products.product(form).address,
            weight=self._address(weight),
            scales=scales,
            zeros=zeros,
            gains=gains,
            bias=self._constant(bias),
            x=x,
            y=y,
            N=outputs,
            K=x.size,
            row_bytes=weight.stride(0) * weight.element_size(),
            scale_bytes=groups,
            group_shift=shift,
        )
        return y

    def norm(self, x: Rows, layer: Any, size: int) -> Rows:
        """Over each `size` values of a row."""
        kind, weight, bias, eps = norm_parts(layer)
        if kind == "none":
            return x
        y = self.new(x.size)
        self._write(
            Opcode.NORM,
            reads=[x],
            writes=y,
            kind=NormKind[kind],
            x=x,
            y=y,
            weight=self._constant(weight),
            bias=self._constant(bias),
            eps=_bits(eps),
            rows=self.rows * x.size // size,
            size=size,
        )
        return y

    def rotate(self, x: Rows, cos: Tensor, sin: Tensor) -> Rows:
        """Heads of queries or keys, turned by `[M,H,K]` of the tables of a step."""
        (_, _, K), y = cos.shape, self.new(x.size)
        self._write(
            Opcode.ROTATE,
            reads=[x],
            writes=y,
            x=x,
            y=y,
            cos=self._address(cos),
            sin=self._address(sin),
            heads=x.size // K,
            K=K,
            stride=cos.stride(0),
        )
        return y

    def retain(self, S: Tensor, gamma: Tensor, q: Rows, k: Rows, v: Rows, tokens: int = 1) -> Rows:
        """o `[M,H·V]` of the state `[B,H,K,V]`, updated in place; gamma `[H,1|K]`; M = B·tokens."""
        (_, H, K, V), (_, rates) = S.shape, gamma.shape
        o = self.new(H * V)
        self._write(
            Opcode.RETAIN,
            reads=[q, k, v],
            writes=o,
            S=self._address(S),
            gamma=self._constant(gamma),
            q=q,
            k=k,
            v=v,
            o=o,
            H=H,
            G=k.size // K,
            K=K,
            V=V,
            rates=rates,
            tokens=tokens,
        )
        return o

    def gate(self, act: str, gate: Rows, x: Rows | None = None) -> Rows:
        """act(gate) x, or without x act(gate)."""
        y, reads = self.new(gate.size), [gate] if x is None else [gate, x]
        size, given = gate.size, 0 if x is None else x
        self._write(
            Opcode.GATE, reads=reads, writes=y, act=Act[act], gate=gate, x=given, y=y, size=size
        )
        return y

    def add(self, x: Rows, y: Rows, alpha: float = 1.0) -> Rows:
        """alpha x + y"""
        z, scale = self.new(x.size), _bits(alpha)
        self._write(Opcode.ADD, reads=[x, y], writes=z, x=x, z=y, y=z, size=x.size, scale=scale)
        return z

    def run(self) -> None:
        """All that has been written."""
        if self._header is None:
            bytecode = torch.tensor(self._bytecode, dtype=torch.int64, device="cpu")
            header = [self._address(bytecode), len(bytecode), self.rows]
            self._header = torch.tensor(header, dtype=torch.int64, device="cpu")
        self._machine.run(self._header, torch.get_num_threads())

    def _write(
        self, opcode: Opcode, *, reads: list[Rows], writes: Rows, **operands: int | Rows
    ) -> None:
        """After a barrier, where a thread may still be at what this reads or writes over."""
        self._header = None
        inputs, output = {x.values.data_ptr() for x in reads}, writes.values.data_ptr()
        if output in self._read | self._written or inputs & self._written:
            self._bytecode.append([Opcode.BARRIER] + [0] * (WORDS - 1))
            self._read.clear()
            self._written.clear()
        self._read |= inputs
        self._written.add(output)
        slots, instruction = OPERANDS[opcode], [int(opcode)] + [0] * (WORDS - 1)
        assert operands.keys() == slots.__members__.keys()
        for name, value in operands.items():
            word = self._address(value.values) if isinstance(value, Rows) else int(value)
            instruction[slots[name]] = word
        self._bytecode.append(instruction)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach())  # the values, whichever tensor a parameter has later
        return tensor.data_ptr()

    def _constant(self, tensor: Tensor | None) -> int:
        """The address of the values as float32, 0 for none."""
        return 0 if tensor is None else self._address(tensor.float().contiguous())


def _bits(value: float) -> int:
    """Those of a float32."""
    return struct.unpack("i", struct.pack("f", value))[0]
