"""A bytecode machine that runs a program on all cores: an instruction is an operation on rows.

Between two products of a decoding step are some ten operations of a microsecond each, which cost
several times that when each is called from Python. A program (`decoding.program`) lists them once,
as addresses and sizes (`instructions`); here all of it is one compiled call. Every thread of
torch's own pool walks through the whole program, does its share of each instruction, and waits for
the others where the program has a barrier.

Importing this compiles it by numba for the processor: a few seconds, kept on disk. What rows hold
is float32. Legend: M rows (a token each), H and G heads, K and V head dims.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false
# numba hands its functions other arguments than they have names for.

import ctypes
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.extending import intrinsic

from retentive.kernels.cpu.available import LIBRARY
from retentive.kernels.cpu.instructions import (
    WORDS,
    Act,
    Add,
    Gate,
    Norm,
    NormKind,
    Opcode,
    Product,
    Retain,
    Rotate,
)
from retentive.kernels.cpu.products import call, compiled, float_of, floats, pointer, share

_SUMS = {"fastmath": {"reassoc", "contract", "nsz"}}  # in any order; infinities and NaN stay


@intrinsic
def _call_product(typing, code, address, M, low, high):
    def generate(context: Any, b: ir.IRBuilder, signature: Any, given: Any) -> Any:
        code, *arguments = given
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        b.call(b.inttoptr(code, kind.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit
def _run_product(address, M, thread, threads):
    op = carray(pointer(address), (WORDS,), np.int64)
    code, gains, bias = op[Product.code], op[Product.gains], op[Product.bias]
    y, N = op[Product.y], op[Product.N]
    low, high = share(N, thread, threads)
    _call_product(code, address, M, low, high)
    count = high - low
    for m in range(M):
        out = floats(y + 4 * (m * N + low), count)
        if gains:
            gain = floats(gains + 4 * low, count)
            for n in range(count):
                out[n] *= gain[n]
        if bias:
            shift = floats(bias + 4 * low, count)
            for n in range(count):
                out[n] += shift[n]


@njit
def _exp(x):
    """e^x = 2^n e^r with |r| <= ln(2)/2, to 2e-7 of it."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    biased = np.int32(x * np.float32(1.44269504) + np.float32(127.5))  # it is positive: rounds
    n = np.float32(biased - np.int32(127))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    e = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        e = e * r + np.float32(c)
    return e * float_of(biased << np.int32(23))


@njit
def _erf(x):
    """To 2e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    z = abs(x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
    p = np.float32(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + np.float32(c)
    e = np.float32(1.0) - p * t * _exp(-z * z)
    return e if x >= 0 else -e


@njit(**_SUMS)
def _mean(x):
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i]
    return total / np.float32(x.size)


@njit(**_SUMS)
def _mean_square(x, mean):
    total = np.float32(0.0)
    for i in range(x.size):
        total += (x[i] - mean) * (x[i] - mean)
    return total / np.float32(x.size)


@njit
def _run_norm(op, thread, threads):
    kind, weight, bias, size = op[Norm.kind], op[Norm.weight], op[Norm.bias], op[Norm.size]
    eps = float_of(np.int32(op[Norm.eps]))
    low, high = share(op[Norm.rows], thread, threads)
    for row in range(low, high):
        x = floats(op[Norm.x] + 4 * row * size, size)
        y = floats(op[Norm.y] + 4 * row * size, size)
        mean = _mean(x) if kind == NormKind.layernorm else np.float32(0.0)
        r = np.float32(1.0) / np.sqrt(_mean_square(x, mean) + eps)
        for i in range(size):
            y[i] = (x[i] - mean) * r
        if weight:
            gain = floats(weight, size)
            for i in range(size):
                y[i] *= gain[i]
        if bias:
            shift = floats(bias, size)
            for i in range(size):
                y[i] += shift[i]


@njit
def _run_rotate(op, M, thread, threads):
    """Each head x: (a cos - b sin, b cos + a sin), a and b its halves; the signs are in `sin`."""
    heads, K, stride = op[Rotate.heads], op[Rotate.K], op[Rotate.stride]
    half = K // 2
    low, high = share(M * heads, thread, threads)
    for head in range(low, high):
        x, y = floats(op[Rotate.x] + 4 * head * K, K), floats(op[Rotate.y] + 4 * head * K, K)
        table = 4 * (head // heads * stride + head % heads * K)
        cos, sin = floats(op[Rotate.cos] + table, K), floats(op[Rotate.sin] + table, K)
        for i in range(half):
            y[i] = x[i] * cos[i] + x[i + half] * sin[i]
        for i in range(half, K):
            y[i] = x[i] * cos[i] + x[i - half] * sin[i]


@njit
def _run_retain(op, M, thread, threads):
    """S ← γ S + kᵀ v, o = q S (paper §2.2), token after token of each sequence.

    Threads share the heads, or else the columns of each.
    """
    H, V, tokens = op[Retain.H], op[Retain.V], op[Retain.tokens]
    heads = M // tokens * H
    parts = 1 if heads % threads == 0 else threads
    low, high = share(heads * parts, thread, threads)
    for item in range(low, high):
        head, part = item // parts, item % parts
        first, end = share(V, part, parts)
        for token in range(tokens):
            _retain(op, head // H, head % H, head // H * tokens + token, first, end)


@njit
def _retain(op, sequence, h, row, first, end):
    """Columns of a head, two rows of S at once: so o is read half as often."""
    H, G, K = op[Retain.H], op[Retain.G], op[Retain.K]
    V, rates = op[Retain.V], op[Retain.rates]
    columns, group = end - first, row * G + h * G // H
    S = op[Retain.S] + 4 * ((sequence * H + h) * K * V + first)
    gamma = floats(op[Retain.gamma] + 4 * h * rates, rates)
    q = floats(op[Retain.q] + 4 * (row * H + h) * K, K)
    k = floats(op[Retain.k] + 4 * group * K, K)
    v = floats(op[Retain.v] + 4 * (group * V + first), columns)
    o = floats(op[Retain.o] + 4 * ((row * H + h) * V + first), columns)
    o[:] = 0
    for a in range(0, K, 2):  # K is even
        b = a + 1
        upper, lower = floats(S + 4 * a * V, columns), floats(S + 4 * b * V, columns)
        decay, other = gamma[min(a, rates - 1)], gamma[min(b, rates - 1)]
        for j in range(columns):
            s, t = decay * upper[j] + k[a] * v[j], other * lower[j] + k[b] * v[j]
            upper[j], lower[j] = s, t
            o[j] += q[a] * s + q[b] * t


@njit
def _run_gate(op, M, thread, threads):
    """y = act(gate) x, or without x act(gate)."""
    act, size = op[Gate.act], op[Gate.size]
    low, high = share(M * size, thread, threads)
    count = high - low
    gate, y = floats(op[Gate.gate] + 4 * low, count), floats(op[Gate.y] + 4 * low, count)
    one, zero = np.float32(1.0), np.float32(0.0)
    if act == Act.swish:
        for i in range(count):
            y[i] = gate[i] / (one + _exp(-gate[i]))
    elif act == Act.gelu:
        for i in range(count):
            y[i] = np.float32(0.5) * gate[i] * (one + _erf(gate[i] * np.float32(0.5**0.5)))
    elif act == Act.gelu_tanh:  # 1 + tanh(u) = 2 / (1 + exp(-2u)), u = √(2/π) (x + 0.044715 x³)
        for i in range(count):
            u = gate[i] * (one + np.float32(0.044715) * gate[i] * gate[i])
            y[i] = gate[i] / (one + _exp(np.float32(-1.5957691216) * u))
    elif act == Act.relu:
        for i in range(count):
            y[i] = max(gate[i], zero)
    elif act == Act.relu2:
        for i in range(count):
            y[i] = max(gate[i], zero) * max(gate[i], zero)
    else:  # quick_gelu
        for i in range(count):
            y[i] = gate[i] / (one + _exp(np.float32(-1.702) * gate[i]))
    if op[Gate.x]:
        x = floats(op[Gate.x] + 4 * low, count)
        for i in range(count):
            y[i] *= x[i]


@njit
def _run_add(op, M, thread, threads):
    """y = scale x + z"""
    scale = float_of(np.int32(op[Add.scale]))
    low, high = share(M * op[Add.size], thread, threads)
    count = high - low
    x, z = floats(op[Add.x] + 4 * low, count), floats(op[Add.z] + 4 * low, count)
    y = floats(op[Add.y] + 4 * low, count)
    for i in range(count):
        y[i] = scale * x[i] + z[i]


# The threads


def _of_pool(name: str, result: types.Type) -> Any:
    """A function without arguments of the library whose threads torch computes with."""
    binding.add_symbol(name, ctypes.cast(getattr(_pool, name), ctypes.c_void_p).value)

    @intrinsic
    def function(typing):
        def generate(context: Any, b: ir.IRBuilder, signature: Any, given: Any) -> Any:
            kind = ir.VoidType() if result == types.void else ir.IntType(32)
            called = call(b, name, kind)
            return context.get_dummy_value() if result == types.void else called

        return result(), generate

    return function


_pool = ctypes.CDLL(str(LIBRARY))
_thread_number = _of_pool("omp_get_thread_num", types.int32)
_thread_count = _of_pool("omp_get_num_threads", types.int32)
_barrier = _of_pool("GOMP_barrier", types.void)
_parallel = _pool.GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None


def _run(header):
    """A thread's way through the program."""
    told = carray(header, (3,), np.int64)
    program, M = carray(pointer(told[0]), (told[1], WORDS), np.int64), told[2]
    thread, threads = np.int64(_thread_number()), np.int64(_thread_count())
    for place in range(told[1]):
        op = program[place]
        if op[0] == Opcode.BARRIER:
            _barrier()
        elif op[0] == Opcode.PRODUCT:
            _run_product(told[0] + 8 * WORDS * place, M, thread, threads)
        elif op[0] == Opcode.NORM:
            _run_norm(op, thread, threads)
        elif op[0] == Opcode.ROTATE:
            _run_rotate(op, M, thread, threads)
        elif op[0] == Opcode.RETAIN:
            _run_retain(op, M, thread, threads)
        elif op[0] == Opcode.GATE:
            _run_gate(op, M, thread, threads)
        else:
            _run_add(op, M, thread, threads)


_code = compiled(_run, types.voidptr)


def run(header: torch.Tensor, threads: int) -> None:
    """Runs a program; `header` int64 `[3]` has its address, its length and M."""
    _parallel(_code.address, header.data_ptr(), threads, 0)
