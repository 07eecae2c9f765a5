"""Other people's packages: installed apart from ours, importable in their own processes only."""

import os
import subprocess
import sys
from pathlib import Path

from retentive.io.cache import cache_root

VERSIONS = {"yet-another-retnet": "0.5.1", "torchscale": "0.3.0"}
_NEEDS = ["einops==0.8.1"]


class Unavailable(Exception):
    """Why a contender cannot run; the benchmark shows it in the contender's row."""


def installed_peers() -> Path:
    """The folder that holds the peers' packages, made on first use.

    Without their dependencies: they run on the torch that we run on, so that only their code
    differs. What torchscale imports beyond that is not used here, and names stand in for it.
    """
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()] + _NEEDS
    folder = cache_root() / "peers" / "-".join(w.replace("==", "-") for w in wanted)
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    print(f"installing {' '.join(wanted)} for comparison ...", file=sys.stderr)
    done = subprocess.run(
        [*command, "--target", str(partial), *wanted], capture_output=True, text=True
    )
    if done.returncode:
        complaint = next((x for x in done.stderr.splitlines() if "ERROR" in x), "pip failed")
        raise Unavailable(f"not installed: {complaint}")
    partial.rename(folder)
    return folder
