"""Triton's interpreter (TRITON_INTERPRET=1), made right for bfloat16 and told of tf32.

It runs kernels on CPU tensors as numpy programs. numpy has no bfloat16, so the interpreter holds
one as the 16 bits of a uint16; stock (Triton 3.6 to 3.9) it then adds, multiplies and takes
products of these bits as if they were numbers, and cuts floats off where a GPU rounds. Here such
operands are widened to float32, and results rounded once, as a GPU does. In addition operands of a
tf32 product are rounded to its 10 bits of mantissa, so that tests see the error.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """From now on kernels run on the repaired interpreter. Repeated calls do no harm."""
    interpreter.interpreter_builder.__class__ = _Builder


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even: the rounding of torch."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def _to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + 0xFFF + ((bits >> 13) & 1)
    return (rounded & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _bf16(values: np.ndarray) -> TensorHandle:
    return TensorHandle(_narrow(values), tl.bfloat16)


class _Builder(InterpreterBuilder):
    """The methods of the stock one that go wrong on bfloat16."""

    def get_bf16_ty(self):
        return tl.bfloat16

    def get_bf16(self, value):
        return _bf16(np.array([value], dtype=np.float32))

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _bf16(src.data)
        return super().cast_impl(_wide(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        return _bf16(op(_widen(arg.data))) if _is_bf16(arg) else super().unary_op(arg, op)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(_widen(lhs.data), _widen(rhs.data))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bf16(result)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return _bf16(_widen(x.data) * _widen(y.data) + _widen(z.data))

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = _wide(a), _wide(b)
        if a.dtype.scalar == tl.float32 and str(input_precision).upper().endswith(".TF32"):
            a, b = (TensorHandle(_to_tf32(x.data), tl.float32) for x in (a, b))
        product = np.matmul(a.data, b.data, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)
