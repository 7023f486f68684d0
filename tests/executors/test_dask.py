"""Tests of `Cluster`: outcomes equal those in this process, and workers that die, hang or do not fit are handled."""

from __future__ import annotations

import operator
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from worker_tasks import (
    Job,
    compute_threads,
    give_up,
    is_running,
    pid_left_by_killed_parent,
    run,
    sleep_in,
    sleeping_pid,
    wait_until,
)

import gpuprep
from gpuprep.compute.backend import NumpyBackend
from gpuprep.errors import BackendError, RequestError
from gpuprep.executors.dask import Cluster
from gpuprep.executors.dask_worker import RemoteBackend, remote_gpu
from gpuprep.executors.processes import InProcessExecutor, OverdueError, WorkerDiedError
from gpuprep.output.folder_store import Output
from gpuprep.pipeline.convert_series import convert_series
from gpuprep.pipeline.planned_series import PlannedSeries
from gpuprep.pipeline.task import Task
from gpuprep.testing import write_series

pytest.importorskip("distributed", reason="Dask is not installed: pip install 'gpuprep[dask]'")

SCHEDULER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    workers, threads, gpus = map(int, sys.argv[1:])
    resources = {"GPU": gpus} if gpus else None
    with LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address="127.0.0.1:0", memory_limit=0,
                      silence_logs=50, resources=resources) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """Two workers of one thread each, for tests that do not depend on what earlier tests did to the workers."""
    cluster = Cluster("local", 2)
    yield cluster
    cluster.stop()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts an external scheduler with workers, and returns its address."""
    script = tmp_path / "scheduler.py"
    script.write_text(SCHEDULER)
    started = []

    def start(workers: int, threads: int = 1, gpus: int = 0) -> str:
        process = subprocess.Popen(
            [sys.executable, script, *map(str, (workers, threads, gpus))],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in started:
        process.communicate(timeout=30)


def outcomes_of(cluster: Cluster, jobs: list[Job]) -> Iterator[tuple[Job, Any]]:
    """Return the iterator over jobs and outcomes of a run."""
    return cluster.run(operator.call, jobs)


def die_once(marker: str) -> str:
    """Kill the worker at the first call, return a text at the second."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return "done again"
    os.kill(os.getpid(), signal.SIGKILL)
    return "unreachable"


def leave_mark(folder: str, n: int, seconds: float) -> int:
    Path(folder, f"begun {n}").touch()
    time.sleep(seconds)
    Path(folder, f"ended {n}").touch()
    return n


def span(seconds: float) -> tuple[int, float, float]:
    """Sleep, and return the process ID with the times of begin and end."""
    began_s = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), began_s, time.monotonic()


@dataclass(frozen=True)
class Computed:
    """A task that carries a backend."""

    backend: Any


def backend_of(task: Computed) -> tuple[str, str, int, int]:
    backend = task.backend
    return type(backend).__name__, backend.name, backend.chunk_slices, backend.slab_slices


def test_a_cluster_yields_the_same_outcomes_as_this_process(shared: Cluster) -> None:
    tasks = list(range(-9, 9))
    assert sorted(shared.run(abs, tasks)) == sorted(InProcessExecutor().run(abs, tasks)) == [(n, abs(n)) for n in tasks]
    assert list(shared.run(abs, list[int]())) == []
    assert list(shared.run(sorted, [["b", "a"]])) == [(["b", "a"], ["a", "b"])]  # tasks of discovery are lists


def test_a_tuple_like_a_dask_task_is_passed_unchanged(shared: Cluster) -> None:
    task = (abs, -3)  # Dask represents its own tasks as such tuples
    assert list(shared.run(len, [task])) == [(task, 2)]


def test_large_tasks_and_outcomes_are_transferred(shared: Cluster) -> None:
    text = "x" * 3_000_000
    assert run(shared, [partial(str.upper, text)]) == ["X" * 3_000_000]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (partial(int, "x"), "ValueError: invalid literal for int"),
        (partial(sys.exit, 3), "SystemExit: 3"),
        (partial(threading.Lock), "TypeError: cannot pickle"),
    ],
    ids=["an exception", "an exit", "an outcome that cannot be pickled"],
)
def test_an_error_in_a_worker_fails_only_its_task(shared: Cluster, bad: Job, words: str) -> None:
    one, outcome, two = run(shared, [partial(int, "1"), bad, partial(int, "2")])
    assert isinstance(outcome, WorkerDiedError)
    assert words in str(outcome)
    assert (one, two) == (1, 2)


def test_workers_are_two_other_processes_with_one_compute_thread(shared: Cluster) -> None:
    spans = run(shared, [partial(span, 0.2) for _ in range(8)])
    pids = {pid for pid, _, _ in spans}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert run(shared, [partial(compute_threads)]) == [{1}]


def test_two_tasks_per_thread_are_in_flight(shared: Cluster) -> None:
    # Two workers with one thread each: two tasks run, and two wait at the workers.
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for n in range(60):
            taken.append(n)
            yield n

    most = 0
    for done, _ in enumerate(shared.run(abs, tasks()), 1):
        most = max(most, len(taken) - (done - 1))
    assert taken == list(range(60))
    assert most == 4


def test_after_a_stop_request_started_tasks_finish_and_no_others_start(shared: Cluster, tmp_path: Path) -> None:
    seen: list[int] = []
    jobs = [partial(leave_mark, str(tmp_path), n, 0.2) for n in range(40)]
    for _, n in shared.run(operator.call, jobs, stopped=lambda: len(seen) >= 3):
        assert isinstance(n, int)
        seen.append(n)
    marks = sorted(file.name for file in tmp_path.iterdir())
    assert marks == sorted([f"begun {n}" for n in seen] + [f"ended {n}" for n in seen])
    # When the third ends, another one may be running, and each worker may start one more before the stop reaches it.
    assert 3 <= len(seen) <= 3 + 4
    assert run(shared, [partial(abs, -1)]) == [1]


def test_a_run_stopped_from_the_start_does_nothing(shared: Cluster, tmp_path: Path) -> None:
    jobs = [partial(leave_mark, str(tmp_path), 1, 0.0)]
    assert list(shared.run(operator.call, jobs, stopped=lambda: True)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_task_whose_worker_is_killed_is_run_again(shared: Cluster, tmp_path: Path) -> None:
    jobs: list[Job] = [partial(die_once, str(tmp_path / "marker")), *[partial(pow, n, 2) for n in range(6)]]
    assert run(shared, jobs) == ["done again", 0, 1, 4, 9, 16, 25]


def test_a_task_that_always_kills_its_worker_fails_but_waiting_tasks_succeed(shared: Cluster) -> None:
    # Dask counts a dead worker against all its tasks, started or not.
    fatal = [partial(os._exit, code) for code in (3, 4)]
    outcomes = run(shared, [*fatal, *[partial(pow, n, 2) for n in range(8)]])
    assert [type(outcome) for outcome in outcomes[:2]] == [WorkerDiedError] * 2
    for outcome in outcomes[:2]:
        # Two, or three if one death was counted against the task before it started, so that it was submitted again.
        assert 2 <= outcome.deaths <= 3
        assert f"{outcome.deaths} workers died with it" in str(outcome)
    assert outcomes[2:] == [n * n for n in range(8)]


def test_a_single_task_that_always_kills_its_worker_is_run_twice(shared: Cluster) -> None:
    (outcome,) = run(shared, [partial(os._exit, 3)])
    assert isinstance(outcome, WorkerDiedError)
    assert outcome.deaths == 2


def test_a_task_beyond_the_time_limit_is_ended_and_its_worker_replaced(shared: Cluster, tmp_path: Path) -> None:
    long = partial(sleep_in, str(tmp_path))
    # The other tasks wait longer than the limit in the queue, which does not count.
    outcomes = run(shared, [long, *[partial(time.sleep, 0.6) for _ in range(8)]], limit_s=1.5)
    assert isinstance(outcomes[0], OverdueError)
    assert "not finished after 1.5 s" in str(outcomes[0])
    assert outcomes[1:] == [None] * 8
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_worker_that_requests_its_replacement_returns_its_outcome_first(shared: Cluster) -> None:
    (last,) = run(shared, [partial(give_up)])
    wait_until(lambda: not is_running(last))
    assert last not in {pid for pid, _, _ in run(shared, [partial(span, 0.1) for _ in range(4)])}


def test_a_remote_backend_is_opened_by_the_worker(shared: Cluster) -> None:
    ((_, found),) = shared.run(backend_of, [Computed(RemoteBackend("cpu", chunk_slices=3, slab_slices=2))])
    assert found == ("NumpyBackend", "cpu", 3, 2)


def test_a_backend_that_cannot_be_opened_ends_the_run(shared: Cluster) -> None:
    wrong: Any = "abacus"
    with pytest.raises(BackendError, match=r"worker at tcp://.* cannot compute: there is no backend 'abacus'"):
        list(shared.run(backend_of, [Computed(RemoteBackend(wrong))]))
    assert run(shared, [partial(abs, -1)]) == [1]


def test_the_placeholder_of_a_gpu_has_the_attributes_that_plans_need() -> None:
    backend = remote_gpu()
    assert (backend.name, backend.body, backend.device, backend.free_bytes()) == ("gpu", "kernels", "", None)


def test_stop_ends_tasks_and_processes_and_the_cluster_can_run_again(tmp_path: Path) -> None:
    cluster = Cluster("local", 2)
    cluster.stop()  # before any run
    try:
        pids = {pid for pid, _, _ in run(cluster, [partial(span, 0.2) for _ in range(6)])}
        short = partial(abs, -3)
        assert next(outcomes_of(cluster, [partial(sleep_in, str(tmp_path)), short])) == (short, 3)
        sleeping_pid(tmp_path)
        started_s = time.monotonic()
        cluster.stop()
        assert time.monotonic() - started_s < 10
        assert len(pids) == 2
        assert not any(is_running(pid) for pid in pids)
        cluster.stop()
        assert run(cluster, [short]) == [3]
    finally:
        cluster.stop()


def test_a_lost_scheduler_is_one_clear_error(tmp_path: Path) -> None:
    cluster = Cluster("local", 1)
    try:
        outcomes = outcomes_of(cluster, [partial(abs, -3), partial(sleep_in, str(tmp_path))])
        assert next(outcomes)[1] == 3
        pid = sleeping_pid(tmp_path)
        assert cluster._local_cluster is not None
        cluster._local_cluster.kill()
        with pytest.raises(BackendError, match=r"the Dask scheduler at tcp://127.* was lost"):
            next(outcomes)
        wait_until(lambda: not is_running(pid))
    finally:
        cluster.stop()


def test_tasks_that_need_a_gpu_do_not_share_one(scheduler: Callable[..., str]) -> None:
    # Workers with two threads and one GPU: only two of the four threads may be busy at a time.
    cluster = Cluster(scheduler(workers=2, threads=2, gpus=1), gpu=True)
    try:
        spans = run(cluster, [partial(span, 0.1) for _ in range(12)])
    finally:
        cluster.stop()
    by_pid: dict[int, list[tuple[float, float]]] = {}
    for pid, began_s, ended_s in spans:
        by_pid.setdefault(pid, []).append((began_s, ended_s))
    assert len(by_pid) == 2
    for turns in by_pid.values():
        turns.sort()
        assert all(ended_s <= began_s for (_, ended_s), (began_s, _) in pairwise(turns))


def test_an_external_cluster_survives_stop_and_its_workers_are_freed(
    scheduler: Callable[..., str], tmp_path: Path
) -> None:
    address = scheduler(workers=1)
    (tmp_path / "scheduler.json").write_text(f'{{"address": "{address}"}}')
    first = Cluster(str(tmp_path / "scheduler.json"))
    short = partial(abs, -3)
    assert next(outcomes_of(first, [short, partial(sleep_in, str(tmp_path))])) == (short, 3)  # the run is abandoned
    pid = sleeping_pid(tmp_path)
    first.stop()
    wait_until(lambda: not is_running(pid))
    second = Cluster(address, gpu=True)  # no worker offers the resource "GPU", so all workers are used
    try:
        assert run(second, [short]) == [3]
    finally:
        second.stop()


def test_workers_of_another_version_are_refused(shared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(shared, [partial(abs, -1)]) == [1]
    other = Cluster(shared._address)
    monkeypatch.setattr("gpuprep.executors.dask.__version__", "99.1")
    words = rf"worker at tcp://127.* has gpuprep {gpuprep.__version__}, but this client has gpuprep 99\.1"
    with pytest.raises(RequestError, match=words):
        list(other.run(abs, [1]))


def test_a_scheduler_that_does_not_answer_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BackendError, match=f"no Dask scheduler answers at {address} .*: start one"):
            list(Cluster(address, timeout_s=1).run(abs, [1]))


def test_a_scheduler_without_workers_is_one_clear_error(scheduler: Callable[..., str]) -> None:
    address = scheduler(workers=0)
    with pytest.raises(BackendError, match=f"{address} has had no workers for 1 s: start some with dask worker"):
        list(Cluster(address, timeout_s=1).run(abs, [1]))


def test_an_absent_scheduler_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a Dask scheduler"):
        list(Cluster(str(tmp_path / "absent.json")).run(abs, [1]))


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BackendError, match=r"pip install 'gpuprep\[dask\]'"):
        list(Cluster("local", 1).run(abs, [1]))


UNGUARDED = """
import sys
from gpuprep.executors.dask import Cluster
assert "distributed" not in sys.modules
print("the script runs")
executor = Cluster("local", 2)
print(sorted(executor.run(len, ["a", "bb"])))
executor.stop()
"""


def test_a_script_needs_no_main_guard_and_workers_do_not_import_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text(UNGUARDED)
    (tmp_path / "pydicom.py").write_text("print('the current folder was imported from', flush=True)")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["the script runs", "[('a', 1), ('bb', 2)]"]


ORPHANS = """
import sys
from worker_tasks import sleep_in
from gpuprep.executors.dask import Cluster
list(Cluster("local", 1).run(sleep_in, [sys.argv[1]]))
"""


def test_workers_of_a_local_cluster_end_with_their_client(tmp_path: Path) -> None:
    pid = pid_left_by_killed_parent([sys.executable, "-c", ORPHANS, str(tmp_path)], tmp_path)
    wait_until(lambda: not is_running(pid))


def test_a_cluster_writes_the_same_volumes_as_this_process(
    shared: Cluster, tmp_path: Path, noise: Callable[..., NDArray[np.int16]]
) -> None:
    for n in range(5):
        write_series(tmp_path / "dicom" / f"ct{n}", noise((5 + n, 20, 24), n), (2.5, 0.8, 0.7), series_number=n)
    recipe = gpuprep.Recipe(dtype="uint8", size=(16, 18))
    backend = NumpyBackend("matmul")
    here = gpuprep.convert(tmp_path / "dicom", tmp_path / "here", recipe, backend=backend, jobs=None)
    folders = {result.key: result.folder for result in here.results}
    assert [result.status for result in here.results] == ["ok"] * 5
    tasks = [
        Task(
            planned=PlannedSeries(
                series=series, action="convert", folder=folders[series.key], fingerprint=series.fingerprint
            ),
            recipe=recipe,
            engine="operators",
            backend=backend,
            output=Output(tmp_path / "there", tmp_path / "there" / ".gpuprep"),
        )
        for series in gpuprep.discover(tmp_path / "dicom")
    ]
    (tmp_path / "there" / ".gpuprep").mkdir(parents=True)
    outcomes = [outcome for _, outcome in shared.run(convert_series, tasks)]
    assert sorted((o.key, o.status, o.folder) for o in outcomes if not isinstance(o, WorkerDiedError)) == sorted(
        (key, "ok", folder) for key, folder in folders.items()
    )
    compared = 0
    for folder in folders.values():
        for file in (tmp_path / "here" / folder).rglob("*"):
            if file.is_file():
                there = tmp_path / "there" / file.relative_to(tmp_path / "here")
                assert there.read_bytes() == file.read_bytes()
                compared += 1
    assert compared >= 5
