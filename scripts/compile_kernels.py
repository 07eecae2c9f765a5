"""Compile every Triton kernel for NVIDIA GPUs, on a machine without one, and check what comes out.

    python scripts/compile_kernels.py                       # all, for sm_80, sm_89, sm_90, sm_100
    python scripts/compile_kernels.py --quick --arch 90     # the few cases of `make test`
    python scripts/compile_kernels.py --only output         # cases with this in their name
    python scripts/compile_kernels.py --markdown table.md   # the table of docs/gpu.md

A case fails when a register is spilled, when its shared memory or its registers do not fit a
streaming multiprocessor, or when it does not use the matrix instruction of the GPU at full speed
(wgmma on sm_90, tcgen05 on sm_100; wgmma that the assembler had to serialise). No driver is needed:
Triton writes the PTX and its own ptxas assembles it. Exit code 1 when a case fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("compile_kernels: unset TRITON_INTERPRET; with it nothing is compiled")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from retentive.kernels.triton.cases import OPTIONS, SHARED_MEMORY, Case, cases


@dataclass(frozen=True)
class Multiprocessor:
    """CUDA programming guide, "technical specifications per compute capability"."""

    shared: int  # bytes
    threads: int
    matrix: str | None = None  # its newest matrix instruction, as PTX names it
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that every block takes besides its own


MULTIPROCESSORS = {
    80: Multiprocessor(167_936, 2048),
    86: Multiprocessor(102_400, 1536),
    89: Multiprocessor(102_400, 1536),
    90: Multiprocessor(233_472, 2048, "wgmma.mma_async"),
    100: Multiprocessor(233_472, 2048, "tcgen05.mma"),
    120: Multiprocessor(102_400, 1536),
}
DEFAULT_ARCHS = (80, 89, 90, 100)
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Compiled:
    case: str
    arch: int
    faults: tuple[str, ...]
    registers: int = 0
    shared: int = 0
    blocks: int = 0  # that fit one multiprocessor at once
    instructions: str = ""

    def cells(self) -> tuple[str, ...]:
        verdict = "; ".join(self.faults) or "ok"
        sizes = (self.registers, self.shared, self.blocks)
        return (self.case, f"sm_{self.arch}", *map(str, sizes), self.instructions or "-", verdict)


HEADER = ("case", "arch", "registers", "shared bytes", "blocks/SM", "matrix instructions", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=MULTIPROCESSORS, default=DEFAULT_ARCHS
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kernel")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all)")
    options = parser.parse_args()
    chosen = [
        (arch, n)
        for arch in options.arch
        for n, case in enumerate(all_cases(arch))
        if options.only in case.name and (case.quick or not options.quick)
    ]
    if not chosen:
        sys.exit(f"compile_kernels: no case has {options.only!r} in its name")
    print(f"Triton {triton.__version__}; " + "; ".join(map(assembler, options.arch)))
    results = []
    with ExitStack() as stack:
        each = map
        if options.jobs > 1:
            pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"))
            each = stack.enter_context(pool).map
        for result in each(compile_case, chosen):
            results.append(result)
            print(line(result.cells()), flush=True)
    failed = sum(bool(result.faults) for result in results)
    print(f"{len(results) - failed} of {len(results)} cases hold")
    if options.markdown:
        options.markdown.write_text(markdown(results))
    sys.exit(failed > 0)


@cache
def all_cases(arch: int) -> tuple[Case, ...]:
    return tuple(cases(arch))


def assembler(arch: int) -> str:
    return f"sm_{arch}: ptxas {get_ptxas(arch).version}"


def compile_case(which: tuple[int, int]) -> Compiled:
    arch, n = which
    case = all_cases(arch)[n]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    target = GPUTarget("cuda", arch, 32)
    try:
        kernel = triton.compile(source(case), target=target, options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        reason = str(error).strip().splitlines() or [""]
        return Compiled(case.name, arch, (f"{type(error).__name__}: {reason[-1]}",))
    return examine(case, arch, kernel)


def source(case: Case) -> ASTSource:
    """The case as the launcher would hand it on: pointers aligned to 16 bytes, None a constant."""
    signature, constants, attributes = {}, {}, {}
    for n, parameter in enumerate(case.kernel.params):
        name = parameter.name
        kind = None if parameter.is_constexpr else case.types[name]
        signature[name] = kind or "constexpr"
        if kind is None:
            constants[(n,)] = case.constants[name] if parameter.is_constexpr else None
        elif kind.startswith("*"):
            attributes[(n,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, attributes)


def examine(case: Case, arch: int, kernel) -> Compiled:
    limits, ptx = MULTIPROCESSORS[arch], kernel.asm["ptx"]
    registers, stack = resources(kernel.asm["cubin"])
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    blocks = min(
        limits.registers // (-(-registers // 8) * 8 * threads),
        limits.threads // threads,
        limits.shared // (shared + limits.reserved),
    )
    counts = {name: ptx.count(name) for name in INSTRUCTIONS}
    faults = []
    if stack:
        faults.append(f"spills ({stack} bytes of stack)")
    if shared > SHARED_MEMORY[arch]:
        faults.append(f"shared memory above {SHARED_MEMORY[arch]}")
    if not blocks:
        faults.append("does not fit")
    if limits.matrix and case.tensor_cores and not counts[limits.matrix]:
        faults.append(f"no {limits.matrix}")
    if counts["wgmma.mma_async"] and "serializ" in assembler_log(ptx, arch):
        faults.append("wgmma serialised")
    used = ", ".join(f"{count} {name.partition('.')[0]}" for name, count in counts.items() if count)
    return Compiled(case.name, arch, tuple(faults), registers, shared, blocks, used)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, which a kernel without spills leaves empty."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2])


def assembler_log(ptx: str, arch: int) -> str:
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        names = (f"{folder}/kernel.ptx", "-o", f"{folder}/kernel.cubin")
        return run(get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", *names)


def run(*command: str) -> str:
    done = subprocess.run(command, check=True, text=True, capture_output=True)
    return done.stdout + done.stderr


def line(cells: tuple[str, ...]) -> str:
    widths = (64, 7, 5, 7, 3, 24)
    return " ".join(
        [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)] + [cells[-1]]
    )


def markdown(results: list[Compiled]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(result.cells() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
