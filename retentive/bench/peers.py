"""Other people's implementations: installed apart from ours, run in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from retentive.data.cache import cache_root

VERSIONS = {"yet-another-retnet": "0.5.1", "torchscale": "0.3.0"}
_NEEDS = ["einops==0.8.1"]


class PeerUnavailable(Exception):
    """Why a contender cannot run; the benchmark shows it in the contender's row."""


def installed_peers() -> Path:
    """The folder that holds the peers' packages, made on first use.

    Without their dependencies: they run on the torch that we run on, so that only their code
    differs, and their op needs nothing else.
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
        raise PeerUnavailable(f"not installed: {complaint}")
    partial.rename(folder)
    return folder


class PeerOp:
    """A peer's chunkwise op behind the benchmark's contender interface."""

    chunk_sizes: tuple[int | None, ...] = (1024, 512, 256, 128, 64)

    def __init__(self, name: str, form: str = "chunkwise"):
        self.name, self.version, self.form = name, VERSIONS[name], form
        self._process: subprocess.Popen[str] | None = None

    def prepare(self, case: dict[str, Any]) -> None:
        self._ask({"prepare": case})

    def run(self) -> tuple[float, float]:
        answer = self._ask({"run": True})
        return answer["forward"], answer["backward"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes its pipes
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("peer_worker.py")
        return subprocess.Popen(
            [sys.executable, str(worker), self.name, self.form],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(installed_peers())},
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise PeerUnavailable("its process died, most likely for want of memory")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(answer["error"])
        return answer
