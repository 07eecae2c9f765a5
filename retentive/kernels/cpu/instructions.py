"""The bytecode of the machine: opcodes, and the operands of each by name.

An instruction is WORDS int64, the opcode first. Operands are addresses (0 for none), sizes, and the
bits of a float32; numba folds these enums into numbers. M is the number of rows of the program.
"""

from enum import IntEnum


class Opcode(IntEnum):
    BARRIER = 0  # threads wait for each other
    PRODUCT = 1
    NORM = 2
    ROTATE = 3
    RETAIN = 4
    GATE = 5
    ADD = 6


class Product(IntEnum):
    """y `[M,N]` = (x `[M,K]` Wᵀ) ⊙ gains + bias; see `products` for how W is stored."""

    code = 1  # address of the compiled product of such weights
    weight = 2
    scales = 3
    zeros = 4
    gains = 5
    bias = 6
    x = 7
    y = 8
    N = 9
    K = 10
    row_bytes = 11  # of a row of the weight
    scale_bytes = 12  # of a row of scales
    group_shift = 13  # log2 of the columns of a group


class Norm(IntEnum):
    """y = norm(x) over each `size` values, `rows` times."""

    kind = 1  # a `NormKind`
    x = 2
    y = 3
    weight = 4
    bias = 5
    eps = 6  # bits
    rows = 7
    size = 8


class Rotate(IntEnum):
    """y = x, `[M,heads,K]`, turned by tables of cosines and sines."""

    x = 1
    y = 2
    cos = 3
    sin = 4
    heads = 5
    K = 6
    stride = 7  # numbers between the tables of two rows


class Retain(IntEnum):
    """S ← γ S + kᵀ v, o = q S: S `[B,H,K,V]`, q `[M,H,K]`, k `[M,G,K]`, v `[M,G,V]`."""

    S = 1
    gamma = 2
    q = 3
    k = 4
    v = 5
    o = 6
    H = 7
    G = 8
    K = 9
    V = 10
    rates = 11  # decays of a head: 1, or K with xPos
    tokens = 12  # of a sequence, whose rows are one after the other


class Gate(IntEnum):
    """y = act(gate) ⊙ x, or act(gate) where x is 0, `[M,size]`."""

    act = 1  # an `Act`
    gate = 2
    x = 3
    y = 4
    size = 5


class Add(IntEnum):
    """y = scale x + z, `[M,size]`."""

    x = 1
    z = 2
    y = 3
    size = 4
    scale = 5  # bits


class NormKind(IntEnum):
    rmsnorm = 0
    layernorm = 1


class Act(IntEnum):
    """By the names of `retentive.layers.activations`."""

    swish = 0
    gelu = 1
    gelu_tanh = 2
    relu = 3
    relu2 = 4
    quick_gelu = 5


OPERANDS: dict[Opcode, type[IntEnum]] = {
    Opcode.PRODUCT: Product,
    Opcode.NORM: Norm,
    Opcode.ROTATE: Rotate,
    Opcode.RETAIN: Retain,
    Opcode.GATE: Gate,
    Opcode.ADD: Add,
}
WORDS = 1 + max(len(operands) for operands in OPERANDS.values())
