"""Tasks for workers, and helpers that wait for them; without pytest, which each worker would have to import."""

from __future__ import annotations

import operator
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpuprep.executors.processes import Executor, request_replacement

Job = partial[Any]


def run(executor: Executor, jobs: list[Job], **options: Any) -> list[Any]:
    """Return the outcome of each job, in the order of the jobs."""
    outcomes = dict(executor.run(operator.call, jobs, **options))
    return [outcomes[job] for job in jobs]


def sleep_in(folder: str) -> int:
    """Write the process ID to the file "pid", sleep longer than any test takes, then make the file "awake"."""
    Path(folder, "part").write_text(str(os.getpid()))
    os.replace(Path(folder, "part"), Path(folder, "pid"))
    time.sleep(120)
    Path(folder, "awake").touch()
    return 0


def sleeping_pid(folder: Path) -> int:
    """Return the process ID of a worker that runs `sleep_in`, once it sleeps."""
    wait_until((folder / "pid").exists)
    return int((folder / "pid").read_text())


def pid_left_by_killed_parent(command: list[str], folder: Path) -> int:
    """Run a script that starts `sleep_in`, kill it while the worker sleeps, and return the worker's process ID."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as parent:
        pid = sleeping_pid(folder)
        parent.kill()
    return pid


def give_up() -> int:
    """Request the replacement of the worker, and return its process ID."""
    request_replacement()
    return os.getpid()


def compute_threads() -> set[int]:
    """Return the numbers of threads of the loaded numerical libraries."""
    import numpy as np
    import threadpoolctl

    np.ones((4, 4)) @ np.ones((4, 4))
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}


def running_threads() -> int:
    """Return the number of threads of this process after a product of matrices that several threads could share."""
    import numpy as np
    import psutil

    np.ones((512, 512)) @ np.ones((512, 512))
    return int(psutil.Process().num_threads())


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie, since orphans may be reaped late."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # the process has just ended, or this system has no /proc
        return not os.path.exists("/proc/self")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition is true; fail after a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not become true within a minute")
