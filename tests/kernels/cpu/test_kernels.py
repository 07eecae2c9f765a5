"""The compiled kernels against float64, each as a program of one instruction.

Bounds: float32 rounds by 2^-24 of a value; a sum of K products in any order errs by no more than K
such steps of the sum of their sizes.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retentive.compress.quantize import quantize_weight
from retentive.decoding.program import Program, Rows
from retentive.kernels.cpu.available import available
from retentive.kernels.cpu.instructions import WORDS
from retentive.layers.activations import ACTIVATIONS
from retentive.layers.norms import RMSNorm
from retentive.layers.quantized import QuantizedLinear
from retentive.models.config import Quantization

pytestmark = pytest.mark.skipif(not available(), reason="needs numba, and Linux")

EPS = 2.0**-24


def given(program: Program, x: torch.Tensor) -> Rows:
    rows = program.new(x.shape[1])
    rows.values.copy_(x)
    return rows


def run(program: Program, result: Rows) -> torch.Tensor:
    result.values.fill_(float("nan"))  # nothing may be left out
    program.run()
    return result.values


def weights(form: str, N: int, K: int, bias: bool) -> nn.Linear | QuantizedLinear:
    linear = nn.Linear(K, N, bias=bias)
    if form in ("float32", "bfloat16"):
        return linear.to(getattr(torch, form))
    bits, _, group = form.removeprefix("int").partition("/")
    scheme = Quantization(int(bits), "test", int(group or 32))
    layer = QuantizedLinear(K, N, scheme, bias)
    stored = quantize_weight(linear.weight.detach(), scheme)
    layer.load_state_dict(stored | ({"bias": linear.bias.detach()} if bias else {}), assign=True)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 15, 33])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 16), (5, 31), (64, 32), (61, 33), (130, 96), (7, 300), (200, 1000)]
)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "int4/64", "int4/128"])
def test_products(form, shape, rows):
    torch.manual_seed(0)
    layer, x = weights(form, *shape, bias=rows % 2 == 1), torch.randn(rows, shape[1])
    program = Program(rows)
    y = run(program, program.product(given(program, x), layer))
    weight = layer.weight.detach().double()
    expected = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.detach().double())
    sizes = x.double().abs() @ weight.abs().T + 1
    assert ((y - expected).abs() <= (shape[1] + 8) * EPS * sizes).all()


def test_products_leave_what_lies_beyond_alone():
    """A masked load reads nothing beyond the last row: NaN there would show."""
    x, memory = torch.randn(3, 50), torch.full((8 * 50,), float("nan"))
    layer = nn.Linear(50, 5, bias=False)
    layer.weight.data = memory[: 5 * 50].view(5, 50).copy_(layer.weight.detach())
    program = Program(3)
    held = torch.full((4, 50), float("nan"))
    rows = Rows(program, held[:3].copy_(x))
    y = run(program, program.product(rows, layer))
    torch.testing.assert_close(y, F.linear(x, layer.weight.detach()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("rows, heads", [(1, 1), (3, 1), (2, 5)])
def test_norms(kind, affine, rows, heads):
    torch.manual_seed(0)
    norm = kind(37, eps=1e-3, elementwise_affine=affine)
    for weight in norm.parameters():
        nn.init.normal_(weight)
    x = 3 * torch.randn(rows, heads * 37) + 1
    program = Program(rows)
    y = run(program, program.norm(given(program, x), norm, 37))
    expected = norm.double()(x.double().unflatten(1, (heads, 37))).flatten(1)
    torch.testing.assert_close(y.double(), expected, rtol=16 * EPS, atol=64 * EPS)


def test_a_norm_of_zeros_without_an_eps_holds_up_nobody():
    """A thread that raised would do none of its other rows, nor come to the next barrier."""
    norm, layer, x = RMSNorm(4, eps=1e-60), nn.Linear(4, 3), torch.ones(4, 4)
    x[0] = 0
    program = Program(4)
    y = run(program, program.product(program.norm(given(program, x), norm, 4), layer))
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    """From where e^x is 0 to where it is beyond float32; errors as those of a rounded x."""
    x = torch.cat((torch.linspace(-120, 120, 4001), torch.linspace(-6, 6, 4001), torch.zeros(1)))
    x = x.repeat(2, 1)
    program = Program(2)
    y = run(program, program.gate(act, given(program, x)))
    expected = ACTIVATIONS[act](x.double())
    assert ((y - expected).abs() <= 8 * EPS * (1 + x.abs() + expected.abs())).all()
    other = torch.randn_like(x)
    program = Program(2)
    gated = run(program, program.gate(act, given(program, x), given(program, other)))
    torch.testing.assert_close(gated, y * other, rtol=2 * EPS, atol=0)


def test_infinities_and_nan_show():
    """A model that has gone wrong must not write text as if nothing were."""
    for value in (float("inf"), float("nan")):
        x = torch.tensor([[1.0, value, 2.0, -1.0]])
        program = Program(1)
        assert (
            not run(program, program.norm(given(program, x), RMSNorm(4, 1e-6), 4)).isfinite().all()
        )
        program = Program(1)
        layer = nn.Linear(4, 3, bias=False)
        assert not run(program, program.product(given(program, x), layer)).isfinite().any()


@pytest.mark.parametrize("rates", [1, 6])
@pytest.mark.parametrize("texts, tokens", [(1, 1), (2, 1), (5, 1), (1, 7), (3, 4)])
@pytest.mark.parametrize("heads, groups", [(3, 3), (4, 2), (1, 1)])
def test_retention(texts, tokens, heads, groups, rates):
    torch.manual_seed(0)
    K, V = 6, 35
    S, gamma = torch.randn(texts, heads, K, V), torch.rand(heads, rates)
    q, k = torch.randn(texts, tokens, heads, K), torch.randn(texts, tokens, groups, K)
    v = torch.randn(texts, tokens, groups, V)
    expected, exact = S.double(), []
    for at in range(tokens):
        kt, vt = (x[:, at].double().repeat_interleave(heads // groups, 1) for x in (k, v))
        expected = gamma.double().unsqueeze(-1) * expected + kt.unsqueeze(-1) * vt.unsqueeze(-2)
        exact.append(torch.einsum("bhk,bhkv->bhv", q[:, at].double(), expected))
    program = Program(texts * tokens)
    inputs = (given(program, x.flatten(2).flatten(0, 1)) for x in (q, k, v))
    o = run(program, program.retain(S, gamma, *inputs, tokens))
    torch.testing.assert_close(S.double(), expected, rtol=8 * EPS, atol=32 * EPS)
    exact = torch.stack(exact, 1).flatten(2).flatten(0, 1)
    torch.testing.assert_close(o.double(), exact, rtol=16 * EPS, atol=256 * EPS)


def test_one_waits_for_the_other_only_where_it_must():
    program = Program(1)
    x, layer = given(program, torch.randn(1, 8)), nn.Linear(8, 8)
    barrier = [0] * WORDS
    a, b = program.product(x, layer), program.product(x, layer)
    assert barrier not in program._bytecode
    program.add(a, b)  # reads both
    assert program._bytecode.count(barrier) == 1
    del a  # its memory is given out again, while the sum may still be read
    c = program.product(x, layer)
    assert program._bytecode.count(barrier) == 2
    assert c.values.data_ptr() != b.values.data_ptr()


HASWELL = """
from llvmlite import binding
binding.get_host_cpu_features = lambda: {"avx2": True}
"""


def multiplied(cache: Path, *forms: str, before: str = "", **environment: str) -> None:
    """In a process of its own, which keeps what it compiles in `cache`."""
    code = f"""{before}
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_kernels
for form in {forms}:
    test_kernels.test_products(form, (61, 100), 7)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr


def test_what_processes_keep_one_after_the_other_is_not_mixed_up(tmp_path):
    multiplied(tmp_path, "float32")
    multiplied(tmp_path, "int8")  # compiles as its first what the next one does
    multiplied(tmp_path, "int4", "int8")
    assert len(list(tmp_path.rglob("*.nbi"))) == 4


def test_compiled_for_a_processor_with_narrow_vectors(tmp_path):
    """One without AVX-512."""
    features = "+avx,+avx2,+fma,+f16c,+sse4.2,+popcnt"
    multiplied(
        tmp_path, "float32", "int4", before=HASWELL,
        NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features,
    )  # fmt: skip


@pytest.mark.parametrize("problem", [RuntimeError("no locator"), OSError(errno.ENOSPC, "full")])
def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(problem, monkeypatch):
    from numba import types

    from retentive.kernels.cpu import products

    compile = products.cfunc

    def nothing(x: int) -> None:
        pass

    def cfunc(*given: Any, cache: bool = False, **how: Any) -> Any:
        if cache:
            raise problem
        return compile(*given, **how)

    monkeypatch.setattr(products, "cfunc", cfunc)
    assert products.compiled(nothing, types.int64).address


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_was_kept_and_cut_off_is_compiled_again(tmp_path, suffix, monkeypatch):
    """By a crash of the machine; once, not each time."""
    from numba import types
    from numba.core import config

    from retentive.kernels.cpu.products import compiled

    def nothing(x: int) -> None:
        pass

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    assert [compiled(nothing, types.int64).cache_hits for _ in range(2)] == [0, 1]
    (kept,) = tmp_path.rglob(f"*.{suffix}")
    kept.write_bytes(kept.read_bytes()[:300])
    assert [compiled(nothing, types.int64).cache_hits for _ in range(2)] == [0, 1]
    assert len(list(tmp_path.rglob("*_again*.nbi"))) == 1


def test_what_is_kept_is_of_the_sources_that_are_there(tmp_path, monkeypatch):
    """A function goes by the sources of all kernels, not only by its own file's."""
    from numba import types

    from retentive.kernels.cpu import products

    def nothing(x: int) -> None:
        pass

    names = set()
    for source in ("one", "another"):
        (tmp_path / "source.py").write_text(source)
        monkeypatch.setattr(products, "SOURCES", [tmp_path / "source.py"])
        products.compiled(nothing, types.int64)
        names.add(nothing.__qualname__)
    assert len(names) == 2
