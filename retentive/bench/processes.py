"""A contender's process, from this side; the other side is `retentive.bench.workers.serving`."""

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
    """The process of one contender, until `close`.

    A request that fails, or a process that dies, raises Unavailable with the reason in one line.
    """

    def __init__(self, worker: str, threads: int):
        """`worker`: a module of `retentive.bench.workers`."""
        paths = [str(Path(retentive.__file__).parents[1])]
        if worker == "peers":
            paths.insert(0, str(installed_peers()))
        paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self._stderr = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"retentive.bench.workers.{worker}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )

    def prepare(
        self, case: dict[str, Any], on_message: Callable[[Answer], None] | None = None
    ) -> Answer:
        """Gets the contender ready for a case; returns its facts.

        `on_message` is called with what it reports until then.
        """
        return self._ask({"prepare": case}, on_message)

    def run(self, **arguments: Any) -> Answer:
        return self._ask({"run": arguments})

    def memory(self) -> dict[str, int]:
        return self._ask({"memory": True})

    def release(self) -> None:
        """Frees what was prepared."""
        self._ask({"release": True})

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()  # closes its pipes
        self._stderr.close()

    def _ask(
        self, request: dict[str, Any], on_message: Callable[[Answer], None] | None = None
    ) -> Answer:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                answer = json.loads(line)
                if "message" not in answer:
                    break
                if on_message is not None:
                    on_message(answer["message"])
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(self._cause_of_death())
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process was killed by signal {-code}, most likely for want of memory"
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines() or ["it printed nothing"]
        return f"its process ended with code {code}: {lines[-1]}"


class ProcessPool:
    """A process for each contender, used for case after case, until `close`.

    For a GPU: there a contender's memory is that of its tensors, whatever the process has done
    before, and to start one takes as long as to measure a case.
    """

    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}

    def get(self, name: str, worker: str, threads: int) -> Process:
        """The contender's process; a new one begins to import at once."""
        if name not in self._processes:
            self._processes[name] = Process(worker, threads)
        return self._processes[name]

    def release(self, name: str) -> None:
        """Frees what the process had prepared. One that does not answer is ended."""
        try:
            self._processes[name].release()
        except Unavailable:
            self._processes.pop(name).close()

    def close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()
