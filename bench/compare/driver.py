"""Starts the process of a contender, sends it jobs, and reads its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from bench.compare.contenders import Contender
from bench.measure import cpu_s, tree

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 900


class Driver:
    """Process of one contender. It is started by the constructor and ended by the context manager."""

    def __init__(self, contender: Contender) -> None:
        self._options = dict(contender.options)
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare.run_contender", contender.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=contender.root or ROOT,  # where Python looks for packages first
            env=os.environ | dict(contender.environment),
        )
        self.process = psutil.Process(self._process.pid)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def ask(self, folders: list[Path], out: Path) -> dict[str, Any]:
        """Send a job to convert these series; return the answer."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        assert self._process.stdout is not None  # noqa: S101
        job = {"folders": [str(f) for f in folders], "out": str(out), "options": self._options}
        alarm = threading.Timer(TIME_LIMIT_S, self._end)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            return {"failed": f"the process ended without an answer: killed by the system or after {TIME_LIMIT_S} s"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_s(self) -> float:
        """Return the processor time that the process has used so far, in seconds."""
        return cpu_s(self.process)

    def _end(self) -> None:
        for p in tree(self.process):
            try:
                p.kill()
            except psutil.Error:
                continue
