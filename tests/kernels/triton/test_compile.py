"""Kernels compile for GPUs that are not here; `.ci/run` compiles every case, this a few.

In processes of their own: in this one kernels are interpreted, and then nothing is compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retentive.kernels.triton.cases import SHARED_MEMORY
from retentive.kernels.triton.configs import output_configs, state_configs, tuned
from retentive.kernels.triton.output import _read

ROOT = Path(__file__).parents[3]
HOG = """
import sys
sys.path.insert(0, "scripts")
import compile_kernels, triton, triton.language as tl
from retentive.kernels.triton.cases import Case

@triton.jit
def hog(x, y, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile))

case = Case("hog", hog, {"x": "*bf16", "y": "*fp32"}, {"N": 128}, num_warps=1)
compile_kernels.all_cases = lambda arch: (case,)
print(*compile_kernels.compile_case((80, 0)).faults)
"""


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_a_few_cases_of_each_kernel_compile_for_hopper(tmp_path):
    done = run(
        "scripts/compile_kernels.py", "--quick", "--arch", "90", "--jobs", "1", cache=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wgmma" in done.stdout and "cases hold" in done.stdout


def test_a_kernel_that_spills_fails(tmp_path):
    hog = tmp_path / "hog.py"
    hog.write_text(HOG)
    done = run(str(hog), cache=tmp_path)
    assert done.stdout.startswith("spills"), done.stdout + done.stderr


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_at_most_eight_configurations(capability, dtype, precision):
    for K in (16, 64, 100, 256):
        for V in (16, 128, 300, 512):
            shared = SHARED_MEMORY[capability]
            for configs in (output_configs, state_configs):
                assert 1 <= len(configs(K, V, dtype, precision, shared)) <= 8


def test_the_length_is_no_part_of_the_key(device):
    kernel = tuned(_read, output_configs, 64, 128, torch.bfloat16, "ieee", device, False, False)
    assert kernel.keys == ["chunk_size"]
