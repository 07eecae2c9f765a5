"""Other people's packages: installed apart from ours, imported in their own processes only."""

import os
import subprocess
import sys
from pathlib import Path

from retentive.io.cache import cache_root

VERSIONS = {"yet-another-retnet": "0.5.1", "torchscale": "0.3.0"}
_NEEDS = ["einops==0.8.1"]


class Unavailable(Exception):
    """A contender cannot run; the message is the reason, shown in its row."""


def installed_peers() -> Path:
    """The folder of the peers' packages, installed on first use. Raises Unavailable.

    Without their dependencies: they run on the same torch as ours, so that only their code differs.
    torchscale imports more than that, which is not used here: stubs stand in for it.
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
        reason = next((x for x in done.stderr.splitlines() if "ERROR" in x), "pip failed")
        raise Unavailable(f"not installed: {reason}")
    partial.rename(folder)
    return folder
