"""Talking to a contender's process; its side is `retentive.bench.workers.serving`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import retentive
from retentive.bench.peers import Unavailable, installed_peers

Answer = dict[str, Any]


class Process:
    """A contender of its own process, from its first request to `close`.

    A request that fails, or a process that dies, raises Unavailable with the reason in one line.
    """

    def __init__(self, worker: str, threads: int):
        """`worker`: a module of `retentive.bench.workers`."""
        paths = [str(Path(retentive.__file__).parents[1])]
        if worker == "peers":
            paths.insert(0, str(installed_peers()))
        paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self._complaints = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"retentive.bench.workers.{worker}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )

    def prepare(
        self, case: dict[str, Any], heard: Callable[[Answer], None] | None = None
    ) -> Answer:
        """The facts of the contender ready for a case; `heard` gets what it tells meanwhile."""
        return self._ask({"prepare": case}, heard)

    def run(self, **arguments: Any) -> Answer:
        return self._ask({"run": arguments})

    def memory(self) -> dict[str, int]:
        return self._ask({"memory": True})

    def rest(self) -> None:
        """Frees what was prepared."""
        self._ask({"rest": True})

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()  # closes its pipes
        self._complaints.close()

    def _ask(
        self, request: dict[str, Any], heard: Callable[[Answer], None] | None = None
    ) -> Answer:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                answer = json.loads(line)
                if "mark" not in answer:
                    break
                if heard is not None:
                    heard(answer["mark"])
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(self._last_words())
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process was killed by signal {-code}, most likely for want of memory"
        self._complaints.seek(0)
        said = self._complaints.read().strip().splitlines() or ["it said nothing"]
        return f"its process ended with code {code}: {said[-1]}"


class Kept:
    """Processes that go on from case to case, one for each contender, until `close`.

    For a GPU: there a contender's memory is that of its tensors, whatever the process has done
    before, and to start one takes as long as to measure a case.
    """

    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}

    def started(self, name: str, worker: str, threads: int) -> Process:
        """The contender's process; one that is new begins to import at once."""
        if name not in self._processes:
            self._processes[name] = Process(worker, threads)
        return self._processes[name]

    def rest(self, name: str) -> None:
        """What it had prepared is freed. It ends where it does not answer, and is started anew."""
        try:
            self._processes[name].rest()
        except Unavailable:
            self._processes.pop(name).close()

    def close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()
