"""Products of a few rows with a weight that is read where it lies, row by row, once.

For few rows of x they are bound by memory. A sum is taken in the same order for any number of
threads and rows, so that the result of a row depends, to the last bit, neither on the other rows
nor on how many cores there are.

What a vectoriser makes of a product's loop leaves half of the memory's rate unused at 8 rows: it
holds no tile of sums, and asks for no row ahead. So a tile is written here in LLVM's own
operations, and compiled by numba for the processor when it is first asked for: some seconds, kept
on disk.

Legend: M rows of x, N outputs, K inputs; x and y are float32.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# numba hands its functions other arguments than they have names for.

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils, event
from numba.extending import intrinsic

from retentive.kernels.cpu.instructions import WORDS, Product

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.py"))
FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # how weights are stored: see `layers.quantized`

LANES = 16  # of a vector
UNIT = 2 * LANES  # columns that are read at once: of 4 bits they are 16 bytes
STEP = 2 * UNIT  # columns of a turn of the loop
BLOCK = 64  # rows of a weight that stay in the cache while all rows of x pass
LINE = 64  # bytes that memory hands out

# Sums that are held in registers, rows of the weight by rows of x: there are 32 registers of a
# vector each, or 16 of half a vector.
_WIDE = binding.get_host_cpu_features().get("avx512f", False)
TILES = ((2, 8), (4, 4), (4, 2), (1, 1)) if _WIDE else ((1, 4), (1, 4), (1, 2), (1, 1))

i8, i16, i32, i64, f32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
STORED = {FLOAT32: f32, BFLOAT16: i16, INT8: i8, INT4: i8}
BITS = {FLOAT32: 32, BFLOAT16: 16, INT8: 8, INT4: 4}


def _vector(type: ir.Type) -> ir.VectorType:
    return ir.VectorType(type, LANES)


def _all(value: int, type: ir.Type = i32) -> ir.Constant:
    return ir.Constant(_vector(type), [value] * LANES)


def _spread(b: ir.IRBuilder, scalar: Any) -> Any:
    one = b.insert_element(ir.Constant(_vector(scalar.type), ir.Undefined), scalar, i32(0))
    return b.shuffle_vector(one, one, _all(0))


def call(b: ir.IRBuilder, name: str, result: ir.Type, *given: Any, **how: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in given])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), given, **how)


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return call(b, "llvm.fma.v16f32", x.type, x, y, z)


def _load(b: ir.IRBuilder, address: Any, type: ir.Type, mask: Any = None) -> Any:
    """LANES numbers; with a mask zeros where it is false, and nothing is read there."""
    vector, size = _vector(type), 4 if type == f32 else type.width // 8
    pointer = b.inttoptr(address, vector.as_pointer())
    if mask is None:
        return b.load(pointer, align=size)
    name = f"llvm.masked.load.v16{'f32' if type == f32 else f'i{type.width}'}.p0"
    return call(b, name, vector, pointer, i32(size), mask, vector(None))


def _spread_bfloat16(b: ir.IRBuilder, address: Any) -> Any:
    """One number, as float32 in every lane: twice in each, of which the upper half stays."""
    pairs = ir.VectorType(i16, 2 * LANES)
    number = b.load(b.inttoptr(address, i16.as_pointer()), align=2)
    one = b.insert_element(ir.Constant(pairs, ir.Undefined), number, i32(0))
    all = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, 2 * LANES), [0] * 2 * LANES))
    upper = b.and_(b.bitcast(all, _vector(i32)), _all(-(2**16)))
    return b.bitcast(upper, _vector(f32))


def _floats_of(b: ir.IRBuilder, x: Any, form: int) -> Any:
    """float32 of LANES stored numbers."""
    if form == FLOAT32:
        return x
    if form == INT8:
        return b.sitofp(x, _vector(f32))
    return b.bitcast(b.shl(b.zext(x, _vector(i32)), _all(16)), _vector(f32))


def _nibbles(b: ir.IRBuilder, row: Any, k: Any, scales: Any, zeros: Any, shift: Any) -> list[Any]:
    """UNIT columns from k on: W = (code - 8) scale + zero; column 2j is the low half of byte j."""
    group = b.mul(b.lshr(k, shift), i64(2))
    slope, zero = (_spread_bfloat16(b, b.add(start, group)) for start in (scales, zeros))
    offset = _fma(b, slope, ir.Constant(_vector(f32), [-8.0] * LANES), zero)
    packed = _load(b, b.add(row, b.lshr(k, i64(1))), i8)
    low, high = b.and_(packed, _all(15, i8)), b.lshr(packed, _all(4, i8))
    columns = []
    for first in (0, LANES // 2):
        order = [first + lane // 2 + lane % 2 * LANES for lane in range(LANES)]
        codes = b.shuffle_vector(low, high, ir.Constant(_vector(i32), order))
        columns.append(_fma(b, b.uitofp(codes, _vector(f32)), slope, offset))
    return columns


def _loop(
    b: ir.IRBuilder, start: Any, end: Any, step: int, values: Sequence[Any], body: Callable
) -> list[Any]:
    """for k in range(start, end, step): values = body(k, values)"""
    before = b.block
    head, inside, after = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    k, *carried = (b.phi(value.type) for value in (start, *values))
    b.cbranch(b.icmp_signed("<", k, end), inside, after)
    b.position_at_end(inside)
    turned = body(k, carried)
    following = b.add(k, i64(step))
    b.branch(head)
    for phi, first, next in zip((k, *carried), (start, *values), (following, *turned), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next, inside)
    b.position_at_end(after)
    return carried


def _tile(form: int, R: int, M: int) -> Any:
    """y[m,r] = Σ_k x[m,k] W[r,k] for R rows of a weight and M rows of x.

    All arguments are int64: addresses of the first rows, K, bytes between two rows, `shift`, and
    how far on the weight is asked for while these rows are summed.
    """

    @intrinsic
    def tile(typing, weight, scales, zeros, x, y, K, w_row, g_row, x_row, y_row, shift, ahead):
        def generate(context: Any, b: ir.IRBuilder, signature: Any, given: Any) -> Any:
            weight, scales, zeros, x, y, K, w_row, g_row, x_row, y_row, shift, ahead = given
            rows = [b.add(weight, b.mul(w_row, i64(r))) for r in range(R)]
            groups = [[b.add(at, b.mul(g_row, i64(r))) for at in (scales, zeros)] for r in range(R)]
            texts = [b.add(x, b.mul(x_row, i64(m))) for m in range(M)]

            def columns(r: int, k: Any, masks: Sequence[Any]) -> list[Any]:
                if form == INT4:
                    return _nibbles(b, rows[r], k, *groups[r], shift)
                at = b.add(rows[r], b.mul(k, i64(BITS[form] // 8)))
                starts = at, b.add(at, i64(LANES * BITS[form] // 8))
                loaded = (_load(b, p, STORED[form], m) for p, m in zip(starts, masks, strict=True))
                return [_floats_of(b, numbers, form) for numbers in loaded]

            def unit(k: Any, sums: Sequence[Any], masks: Sequence[Any] = (None, None)) -> list[Any]:
                at, sums = b.mul(k, i64(4)), list(sums)
                starts = at, b.add(at, i64(4 * LANES))
                values = [
                    [_load(b, b.add(text, p), f32, m) for p, m in zip(starts, masks, strict=True)]
                    for text in texts
                ]
                for r in range(R):
                    for half, w in enumerate(columns(r, k, masks)):
                        for m in range(M):
                            sums[r * M + m] = _fma(b, w, values[m][half], sums[r * M + m])
                return sums

            def step(k: Any, sums: Sequence[Any]) -> Sequence[Any]:
                for row in rows:
                    later = b.add(b.add(row, ahead), b.lshr(b.mul(k, i64(BITS[form])), i64(3)))
                    for line in range(0, STEP * BITS[form] // 8, LINE):
                        at = b.inttoptr(b.add(later, i64(line)), i8.as_pointer())
                        call(b, "llvm.prefetch.p0", ir.VoidType(), at, i32(0), i32(3), i32(1))
                for start in range(0, STEP, UNIT):
                    sums = unit(b.add(k, i64(start)), sums)
                return sums

            def rest(k: Any, sums: Sequence[Any]) -> Sequence[Any]:
                lanes = ir.Constant(_vector(i32), list(range(LANES)))
                left = [b.sub(K, b.add(k, i64(start))) for start in (0, LANES)]
                bounds = (_spread(b, b.trunc(count, i32)) for count in left)
                return unit(k, sums, [b.icmp_signed("<", lanes, bound) for bound in bounds])

            sums: Sequence[Any] = [ir.Constant(_vector(f32), [0.0] * LANES)] * (R * M)
            whole = b.and_(K, i64(-STEP))
            sums = _loop(b, i64(0), whole, STEP, sums, step)
            sums = _loop(b, whole, K, UNIT, sums, rest)
            for place, lanes in enumerate(sums):
                total = call(
                    b, "llvm.vector.reduce.fadd.v16f32", f32, f32(0.0), lanes, fastmath=("reassoc",)
                )
                r, m = divmod(place, M)
                at = b.add(b.add(y, b.mul(y_row, i64(m))), i64(4 * r))
                b.store(total, b.inttoptr(at, f32.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate

    return tile


@intrinsic
def pointer(typing, address):
    return types.voidptr(types.int64), lambda context, b, signature, given: b.inttoptr(
        given[0], cgutils.voidptr_t
    )


@intrinsic
def float_of(typing, bits):
    """The float32 of these bits."""
    return types.float32(types.int32), lambda context, b, signature, given: b.bitcast(given[0], f32)


@njit(inline="always")
def floats(address, size):
    return carray(pointer(address), (size,), np.float32)


@njit(inline="always")
def share(count, thread, threads):
    """Of `count` things: the first that is this thread's, and the first that is the next one's."""
    return count * thread // threads, count * (thread + 1) // threads


def _named(name: str) -> Callable[[Callable], Any]:
    """njit for functions of one body that differ in what it calls, each by a name of its own.

    Numba counts functions of one name from process to process anew. Of two that were kept on disk
    by different processes, LLVM would take the first for both.
    """

    def compile(function: Callable) -> Any:
        function.__qualname__ = name
        return njit(function)

    return compile


def _strip(form: int, R: int, texts: int) -> Any:
    """Outputs n from `low` to `high` of `texts` rows of x, R at a time; the last one by one."""
    tile, single = _tile(form, R, texts), _tile(form, 1, 1)

    @_named(f"strip_{form}_{R}_{texts}")
    def strip(op, x, y, low, high, ahead):
        weight, scales, zeros = op[Product.weight], op[Product.scales], op[Product.zeros]
        N, K, row = op[Product.N], op[Product.K], op[Product.row_bytes]
        groups, shift = op[Product.scale_bytes], op[Product.group_shift]
        whole = high - (high - low) % R
        for n in range(low, whole, R):
            tile(
                weight + n * row, scales + n * groups, zeros + n * groups, x, y + 4 * n,
                K, row, groups, 4 * K, 4 * N, shift, ahead * R,
            )  # fmt: skip
        for n in range(whole, high):
            for m in range(texts):
                single(
                    weight + n * row, scales + n * groups, zeros + n * groups,
                    x + 4 * m * K, y + 4 * (m * N + n),
                    K, row, groups, 4 * K, 4 * N, shift, 0,
                )  # fmt: skip

    return strip


def _product(form: int) -> Any:
    """y = x Wᵀ, of the outputs from `low` to `high`."""
    *tiles, (R, M) = TILES
    # To widen 4 bits takes so long that the sum of one row would wait for its own last step.
    tiles.append((4 * R, M) if form == INT4 else (R, M))
    (a, most), (b, more), (c, few), (d, one) = ((_strip(form, R, M), M) for R, M in tiles)

    @_named(f"product_{form}")
    def product(address, M, low, high):
        op = carray(pointer(address), (WORDS,), np.int64)
        N, K, row = op[Product.N], op[Product.K], op[Product.row_bytes]
        for n in range(low, high, BLOCK):
            end, m = min(n + BLOCK, high), 0
            while m < M:
                x, y = op[Product.x] + 4 * m * K, op[Product.y] + 4 * m * N
                ahead = row if m == 0 else 0  # for later rows of x the weight is in the cache
                if m + most <= M:
                    a(op, x, y, n, end, ahead)
                    m += most
                elif m + more <= M:
                    b(op, x, y, n, end, ahead)
                    m += more
                elif m + few <= M:
                    c(op, x, y, n, end, ahead)
                    m += few
                else:
                    d(op, x, y, n, end, ahead)
                    m += one

    return product


class _Notice(event.Listener):
    """Says once what a first use waits for."""

    said = False

    def on_start(self, event: event.Event) -> None:
        if not self.said:
            _Notice.said = True
            log.warning("compiling kernels for this processor: some 10 s, the first time only")

    def on_end(self, event: event.Event) -> None:
        pass


def compiled(function: Callable, *kinds: types.Type) -> Any:
    """Machine code that takes arguments of these kinds; kept on disk where one may write.

    It is kept for the sources of all kernels: numba looks at the file of a function only.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    # By Python's own division a thread would raise, and never come to the next barrier. What is
    # called from here inherits this.
    how: dict[str, Any] = {"error_model": "numpy"}
    with event.install_listener("numba:compile", _Notice()):
        for attempt in ("", "_again"):
            function.__qualname__ = f"{function.__name__}_{digest[:12]}{attempt}"
            try:
                return cfunc(types.void(*kinds), cache=True, **how)(function)
            except (EOFError, UnpicklingError):  # what is kept was cut off when the machine crashed
                continue
            except (RuntimeError, OSError):  # nowhere to keep it, or the disk is full
                break
        return cfunc(types.void(*kinds), **how)(function)


_float32, _bfloat16, _int8, _int4 = (_product(form) for form in (FLOAT32, BFLOAT16, INT8, INT4))


# What is kept on disk has to be a function of a module.


def _float32_product(address, M, low, high):
    _float32(address, M, low, high)


def _bfloat16_product(address, M, low, high):
    _bfloat16(address, M, low, high)


def _int8_product(address, M, low, high):
    _int8(address, M, low, high)


def _int4_product(address, M, low, high):
    _int4(address, M, low, high)


_PRODUCTS = _float32_product, _bfloat16_product, _int8_product, _int4_product


@functools.cache
def product(form: int) -> Any:
    """The code of products with weights of this form; its `address` is `Product.code`."""
    return compiled(_PRODUCTS[form], *[types.int64] * 4)
