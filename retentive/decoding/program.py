"""A few tokens of a RetNet as a program of `kernels.cpu.machine`: a decoding step, a short prompt.

The program is written once for a batch, by a walk through the model: a block's own `join` is run on
`Rows`, which write down what is done to them. Weights stay the model's own.

Shapes: B texts, T tokens of each, M = B·T rows, D width, G key and value heads, H heads, K and V
head dims.
"""

import struct
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.decoding.runner import AHEAD, AnglesAhead, decays, retnet_blocks
from retentive.errors import InputError
from retentive.kernels.cpu.available import available
from retentive.layers.fused import ACTIVATIONS, norm_parts
from retentive.layers.layout import Constant, Rotation
from retentive.layers.linear import Linear
from retentive.layers.norms import RMSNorm
from retentive.layers.quantized import QuantizedEmbedding, QuantizedLinear
from retentive.mixers.retention import FeedForward, MultiScaleRetention, Repeated, Scaled
from retentive.mixers.xpos import XPosRetention
from retentive.models.block import JOINS
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet, RetNetBlock
from retentive.models.state import RetNetState

KNOWN = {
    RetNet, RetNetBlock, MultiScaleRetention, FeedForward, nn.ModuleList, nn.Dropout, Scaled,
    Linear, QuantizedLinear, nn.Embedding, QuantizedEmbedding, nn.LayerNorm, RMSNorm,
    Rotation, XPosRetention, Constant, Repeated, *JOINS.values(),
}  # fmt: skip
"""What a program knows how to do. An adapter's modules are of other types."""


FEW = {32: 32, 16: 32, 8: 128, 4: 256}
"""By the bits of a weight: for more tokens the chunkwise form and dense products are faster."""


def suits(model: LanguageModel) -> bool:
    """Whether a step of this model can be a program."""
    return (
        isinstance(model, RetNet)
        and not model.config.attention_layers
        and model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and available()
        and all(
            type(part) in KNOWN
            and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
            for part in model.modules()
        )
        and all(_readable(tensor) for tensor in (*model.parameters(), *model.buffers()))
    )


def _readable(tensor: Tensor) -> bool:
    """Whether a program reads it right: whole rows, of a kind that it knows."""
    kinds = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    return tensor.device.type == "cpu" and tensor.dtype in kinds and tensor.is_contiguous()


class ProgramRunner:
    """A `Runner` whose step is a program: of a model that `suits`, going on from its own `state`.

    It is for the weights that the model has when it is made.
    """

    @torch.inference_mode()
    def __init__(self, model: RetNet, state: RetNetState):
        self.model, self.state = model, state
        self._angles = AnglesAhead(model, AHEAD)
        self._step = Step(model, state)
        self._logits = self._step.head()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        if len(tokens) != self.state.batch_size:
            raise InputError(
                f"{len(tokens)} tokens for {self.state.batch_size} texts; give one for each"
            )
        self._step.run(self.model.embed(tokens), *self._angles.next(self.state.positions))
        self.state.positions.add_(1)
        return self._logits.values.clone()  # the next step writes over it


def reads(model: LanguageModel, rows: Sequence[list[int]]) -> bool:
    """Whether `read` takes these tokens: a few, as many in each row."""
    lengths, quantization = {len(tokens) for tokens in rows}, model.config.quantization
    few = FEW[32 if quantization is None else quantization.bits]
    return len(lengths) == 1 and len(rows) * max(lengths) <= few and suits(model)


@torch.inference_mode()
def read(model: LanguageModel, rows: Sequence[list[int]], state: RetNetState) -> RetNetState:
    """The state after the tokens of each row, by the recurrent form; `state` stays as it is.

    For a few tokens what costs is to read the weights, and this reads them once.
    """
    assert isinstance(model, RetNet)
    tokens, after = torch.tensor(rows), state.clone()
    step = Step(model, after, tokens.shape[1])
    cos, sin = AnglesAhead.table(model, state.positions, tokens.shape[1])
    step.run(model.embed(tokens).flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))
    after.positions.add_(tokens.shape[1])
    return after


class Step:
    """The program of T tokens of each text; M = B·T rows, those of a text one after the other."""

    def __init__(self, model: RetNet, state: RetNetState, tokens: int = 1):
        """Updates `state`, where it lies, whenever it is run."""
        model.check_state(state)
        if any(layer.S.dtype != torch.float32 for layer in state.layers):
            raise InputError("the state is of a model in another dtype; give one of this model")
        config, rows = model.config, state.batch_size * tokens
        program = self._program = Program(rows)
        tables = torch.empty(2, rows, 2, config.num_heads, config.qk_head_dim)
        self._model, self._tokens, (self._cos, self._sin) = model, tokens, tables.unbind()
        x = self._x = program.new(config.hidden_size)
        layers = zip(retnet_blocks(model), state.layers, decays(model), strict=True)
        for block, layer, gamma in layers:
            x = self._block(block, x, layer.S, gamma)
        self._hidden = x

    def head(self) -> "Rows":
        """The logits are wanted, too."""
        model, x = self._model, self._hidden
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        if isinstance(head, QuantizedEmbedding):
            head = head.table
        return self._program.product(self._program.norm(x, model.norm, x.size), head)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Embeddings `[M,D]`, angles `[M,2,H|1,K]` of queries and keys."""
        self._x.values.copy_(x)
        self._cos.copy_(cos)
        self._sin.copy_(sin)
        self._program.run()

    def _block(self, block: RetNetBlock, x: "Rows", S: Tensor, gamma: Tensor) -> "Rows":
        program, size = self._program, x.size

        def norm(layer: Any) -> Any:
            return lambda x: program.norm(x, layer, size)

        def mix(h: Any) -> tuple[Any, None]:
            return self._retention(block.retention, h, S, gamma), None

        def ffn(h: Any) -> Any:
            return self._feed_forward(block.ffn, h)

        parts: Any = x, mix, norm(block.retention_norm), ffn, norm(block.ffn_norm)
        return cast(Rows, block.join.forward(*parts)[0])

    def _retention(self, layer: MultiScaleRetention, h: "Rows", S: Tensor, gamma: Tensor) -> "Rows":
        program = self._program
        q, k, v = (program.product(h, p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        gate = None if layer.g_proj is None else program.product(h, layer.g_proj)
        q, k = (
            program.rotate(x, self._cos[:, which], self._sin[:, which])
            for which, x in enumerate((q, k))
        )
        o = program.retain(S, gamma, q, k, v, self._tokens)
        y = program.norm(o, layer.head_norm, S.shape[-1])
        if gate is not None:
            y = program.gate(layer.gate_act, gate, y)
        return program.product(y, layer.o_proj)

    def _feed_forward(self, ffn: FeedForward, h: "Rows") -> "Rows":
        program = self._program
        up = program.product(h, ffn.up_proj)
        (act,) = (name for name, function in ACTIVATIONS.items() if function is ffn.act)
        if ffn.gate_proj is None:
            inner = program.gate(act, up)
        else:
            inner = program.gate(act, program.product(h, ffn.gate_proj), up)
        return program.product(program.norm(inner, ffn.subln, inner.size), ffn.down_proj)


class Rows:
    """float32 `[M,size]` in a program: what an instruction writes."""

    def __init__(self, program: "Program", values: Tensor):
        self.program, self.values, self.size = program, values, values.shape[1]

    def __add__(self, other: "Rows") -> "Rows":
        return self.program.add(self, other)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        """`Join.add`, where dropout does nothing."""
        if function is F.dropout:
            return args[0]
        assert function is torch.add, function
        y, x = args
        return x.program.add(x, y, **kwargs)


class Program:
    """Instructions for M rows. Each method but `new` and `run` writes one, and gives its result."""

    def __init__(self, rows: int):
        from retentive.kernels.cpu import machine, products  # compiled, unless they were before

        self._rows, self._machine, self._products = rows, machine, products
        self._code: list[list[int]] = []
        self._kept: list[Tensor] = []  # whose addresses are in the program
        self._free: dict[int, list[Tensor]] = {}
        self._header: Tensor | None = None
        self._read: set[int] = set()  # since the last barrier
        self._written: set[int] = set()

    def new(self, size: int) -> Rows:
        """Memory for an instruction to write; given out again when the `Rows` are gone."""
        free = self._free.setdefault(size, [])
        values = free.pop() if free else torch.empty(self._rows, size)
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
            self._rows * x.size // size, size,
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
            self._header = torch.tensor([self._address(code), len(code), self._rows])
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
