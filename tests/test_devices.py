"""Memory that is freed and wanted again."""

import subprocess
import sys

CODE = """
import resource, sys, torch
from retentive.devices import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_freed_memory()
size = 64 * 2**20  # more than glibc keeps by itself
torch.zeros(size, dtype=torch.uint8).add_(1)
before = faults()
for _ in range(16):  # it settles after a few
    torch.ones(size, dtype=torch.uint8)
print(faults() - before)
"""


def pages_cleared(how: str) -> int:
    command = [sys.executable, "-c", CODE, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again():
    if sys.platform == "linux":  # the one with glibc
        assert pages_cleared("kept") < pages_cleared("as usual") / 2
    else:
        assert pages_cleared("kept") >= 0  # asking for it breaks nothing
