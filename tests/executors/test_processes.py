"""Tests of both local executors: they yield the same outcomes, and a worker that dies fails only its task.

Most tasks are partials of library functions, run by `operator.call`. Workers can also run functions of this module,
since `multiprocessing` passes them its path, but then each worker has to import pytest.
"""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from worker_tasks import (
    Job,
    compute_threads,
    give_up,
    is_running,
    pid_left_by_killed_parent,
    run,
    running_threads,
    sleep_in,
    sleeping_pid,
    wait_until,
)

from gpuprep.executors.fork_server import HAVE_FORK_SERVER, LOOP_MODULES
from gpuprep.executors.processes import (
    Executor,
    InProcessExecutor,
    OverdueError,
    ProcessExecutor,
    WorkerDiedError,
    WorkerGroup,
)
from gpuprep.testing import thorax, write_series

EXECUTORS: dict[str, Callable[[], Executor]] = {
    "here": InProcessExecutor,
    "1 process": lambda: ProcessExecutor(1),
    "2 processes": lambda: ProcessExecutor(2),
}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    executor = EXECUTORS[request.param]()
    yield executor
    executor.stop()


@pytest.fixture
def processes() -> Iterator[ProcessExecutor]:
    """Two worker processes."""
    executor = ProcessExecutor(2)
    yield executor
    executor.stop()


def squares(*numbers: int) -> list[Job]:
    return [partial(pow, n, 2) for n in numbers]


def meet(folder: str) -> int:
    """Return the process ID as soon as two calls run at the same time."""
    Path(folder, str(os.getpid())).touch()
    while len(os.listdir(folder)) < 2:
        time.sleep(0.005)
    return os.getpid()


def be_seen(log: str, n: int) -> int:
    """Log begin and end of the task; appending a short line is atomic."""
    for what in ("begin", "end"):
        with open(log, "a") as f:
            f.write(f"{what} {n}\n")
        time.sleep(0.05 if what == "begin" else 0)
    return n


def die_at_once(_: object) -> None:
    """Replace the main function of a worker, which then never takes a task."""
    os._exit(1)


def test_every_executor_yields_the_same_outcomes(executor: Executor) -> None:
    assert run(executor, squares(*range(20))) == [n * n for n in range(20)]


def test_an_executor_can_run_again_with_another_function(executor: Executor) -> None:
    assert dict(executor.run(abs, [-2, 3])) == {-2: 2, 3: 3}
    assert dict(executor.run(str, [2, 3, 4])) == {2: "2", 3: "3", 4: "4"}
    assert dict(executor.run(str, list[int]())) == {}


def test_tasks_are_taken_only_as_workers_are_free(executor: Executor) -> None:
    # A generator of a million tasks must not fill the memory.
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for n in range(50):
            taken.append(n)
            yield n

    for done, _ in enumerate(executor.run(abs, tasks()), 1):
        assert len(taken) <= done + 3
    assert taken == list(range(50))


def test_stop_may_be_called_twice_and_without_a_run(executor: Executor) -> None:
    executor.stop()
    executor.stop()


def test_only_worker_processes_are_other_processes(processes: ProcessExecutor) -> None:
    where: dict[Executor, set[int]] = {}
    for executor in (InProcessExecutor(), processes):
        where[executor] = set(run(executor, [partial(os.getpid) for _ in range(4)]))
        executor.stop()
    here, others = where.values()
    assert here == {os.getpid()}
    assert os.getpid() not in others


def test_processes_run_as_many_tasks_at_a_time_as_there_are_workers(processes: ProcessExecutor, tmp_path: Path) -> None:
    # Each task waits for the other to start, which would never happen with one worker.
    assert len(set(run(processes, [partial(meet, str(tmp_path)) for _ in range(2)]))) == 2


def test_no_more_workers_are_started_than_there_are_tasks() -> None:
    executor = ProcessExecutor(50)
    try:
        assert run(executor, squares(3)) == [9]
        assert len(multiprocessing.active_children()) == 1
    finally:
        executor.stop()


def test_workers_are_reused_for_later_tasks() -> None:
    executor = ProcessExecutor(1)
    try:
        pids = [run(executor, [partial(os.getpid) for _ in range(3)]) for _ in range(2)]
    finally:
        executor.stop()
    assert len({*pids[0], *pids[1]}) == 1


def test_a_worker_computes_in_one_thread(processes: ProcessExecutor) -> None:
    assert run(processes, [partial(compute_threads)]) == [{1}]


def test_a_worker_starts_no_compute_threads(processes: ProcessExecutor) -> None:
    # Threads that are limited afterwards have already run: OpenBLAS starts one per core in each forked process.
    assert run(processes, [partial(running_threads)]) == [2]  # its own, and that which waits for the parent


@pytest.mark.parametrize(
    ("fatal", "words"),
    [
        (
            partial(signal.raise_signal, signal.SIGKILL),
            "the worker was killed, most often for lack of memory: use fewer --jobs",
        ),
        (partial(os._exit, 3), "the worker died (exit code 3)"),
        (partial(os._exit, 0), "the worker died (exit code 0)"),
        (partial(signal.raise_signal, signal.SIGSEGV), "the worker died (SIGSEGV), most often in a decoder"),
        (partial(os.abort), "the worker died (SIGABRT), most often in a decoder"),
        (partial(signal.raise_signal, 40), "the worker died ("),
    ],
    ids=["killed", "exit 3", "exit 0", "segmentation fault", "abort", "signal without a name"],
)
def test_a_worker_that_dies_fails_only_its_task(fatal: Job, words: str) -> None:
    executor = ProcessExecutor(1)
    try:
        first, death, *rest = run(executor, [*squares(1), fatal, *squares(2, 3)])
    finally:
        executor.stop()
    assert isinstance(death, WorkerDiedError)
    assert words in str(death)
    assert (first, rest) == (1, [4, 9])


def test_consecutive_and_final_deaths_of_workers_fail_only_their_tasks(processes: ProcessExecutor) -> None:
    fatal = [partial(os._exit, 1) for _ in range(3)]
    outcomes = run(processes, [*fatal[:2], *squares(5, 6, 7), fatal[2]])
    assert [isinstance(outcome, WorkerDiedError) for outcome in outcomes] == [True, True, False, False, False, True]
    assert outcomes[2:5] == [25, 36, 49]


def test_a_worker_that_died_while_idle_is_replaced(processes: ProcessExecutor) -> None:
    (pid,) = run(processes, [partial(os.getpid)])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not multiprocessing.active_children())
    assert run(processes, squares(*range(5))) == [0, 1, 4, 9, 16]  # no task was lost with the dead worker


def test_an_exception_in_a_worker_fails_only_its_task(processes: ProcessExecutor) -> None:
    one, bad, two = run(processes, [partial(int, "1"), partial(int, "x"), partial(int, "2")])
    assert isinstance(bad, WorkerDiedError)
    assert (one, two) == (1, 2)


def test_an_outcome_that_cannot_be_pickled_fails_only_its_task(processes: ProcessExecutor) -> None:
    bad, good = run(processes, [partial(threading.Lock), partial(int, "1")])
    assert isinstance(bad, WorkerDiedError)
    assert good == 1


def test_large_tasks_and_outcomes_are_transferred(processes: ProcessExecutor) -> None:
    # The text is larger than the buffer of a pipe.
    text = "x" * 3_000_000
    assert run(processes, [partial(str.upper, text), partial(str.title, text)]) == [text.upper(), text.title()]


@pytest.mark.parametrize("size", [1, 5_000_000], ids=["small task", "large task"])
def test_a_worker_that_cannot_start_fails_only_its_task(
    processes: ProcessExecutor, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    # A small task fits into the buffer of the pipe; sending a large one fails.
    monkeypatch.setattr("gpuprep.executors.processes._serve_tasks", die_at_once)
    ((_, outcome),) = processes.run(len, ["x" * size])
    assert isinstance(outcome, WorkerDiedError)


def test_stop_ends_a_worker_in_the_middle_of_a_task(processes: ProcessExecutor, tmp_path: Path) -> None:
    short, long = partial(abs, -3), partial(sleep_in, str(tmp_path))
    assert next(processes.run(operator.call, [long, short])) == (short, 3)
    pid = sleeping_pid(tmp_path)
    assert is_running(pid)
    processes.stop()
    assert not is_running(pid)
    assert not (tmp_path / "awake").exists()
    assert multiprocessing.active_children() == []


def test_stop_leaves_no_process_behind(processes: ProcessExecutor) -> None:
    pids = set(run(processes, [partial(os.getpid) for _ in range(8)]))
    processes.stop()
    assert not any(is_running(pid) for pid in pids)
    assert multiprocessing.active_children() == []


def test_after_stop_new_workers_are_started(processes: ProcessExecutor) -> None:
    run(processes, squares(1))
    processes.stop()
    assert run(processes, squares(2)) == [4]


def test_a_worker_that_requests_its_replacement_returns_its_outcome_first() -> None:
    executor = ProcessExecutor(1)
    try:
        first, last, next_, same = run(executor, [partial(os.getpid), partial(give_up), *[partial(os.getpid)] * 2])
    finally:
        executor.stop()
    assert first == last
    assert next_ != last
    assert same == next_


@pytest.mark.parametrize(
    ("costs", "most_at_a_time"),
    [
        ((4, 4, 4, 4), 2),  # two of the four workers stay idle
        ((2, 2, 2, 2), 4),
        ((50, 1, 50, 1), 1),  # a task above the budget runs alone, and no later task overtakes it
    ],
)
def test_the_cost_of_tasks_in_flight_stays_within_the_budget(
    tmp_path: Path, costs: tuple[int, ...], most_at_a_time: int
) -> None:
    log = tmp_path / "log"
    log.touch()
    jobs = [partial(be_seen, str(log), n) for n in range(len(costs))]
    executor = ProcessExecutor([WorkerGroup(4, budget_bytes=8)])
    try:
        outcomes = list(executor.run(operator.call, jobs, lambda job: costs[job.args[1]]))
    finally:
        executor.stop()
    assert [n for _, n in sorted(outcomes, key=lambda o: jobs.index(o[0]))] == list(range(len(costs)))
    inside: set[int] = set()
    begun, most = [], 0
    for line in log.read_text().splitlines():
        what, n = line.split()
        if what == "begin":
            begun.append(int(n))
            inside.add(int(n))
        else:
            inside.discard(int(n))
        most = max(most, len(inside))
        assert len(inside) == 1 or sum(costs[k] for k in inside) <= 8
    assert begun == sorted(begun) or most_at_a_time > 1  # tasks that run at the same time may begin in any order
    assert most <= most_at_a_time


def where(_: int) -> str:
    """Return the GPU that this worker sees, after a pause in which the other workers can begin."""
    time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES", "none")


def test_each_worker_sees_the_device_of_its_place() -> None:
    places = [WorkerGroup(2, environment={"CUDA_VISIBLE_DEVICES": n}) for n in ("0", "3")]
    executor = ProcessExecutor(places)
    try:
        devices = [device for _, device in executor.run(where, range(12))]
        alone = [str(device) for _, device in executor.run(where, range(2))]
    finally:
        executor.stop()
    assert set(devices) == {"0", "3"}
    assert sorted(alone) == ["0", "3"]  # the least busy device is used first
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_task_beyond_the_time_limit_is_ended_and_the_others_continue(tmp_path: Path) -> None:
    executor = ProcessExecutor(2)
    try:
        jobs = [partial(sleep_in, str(tmp_path)), partial(abs, -1), partial(abs, -2), partial(abs, -3)]
        outcomes = dict(executor.run(operator.call, jobs, limit_s=3.0))
    finally:
        executor.stop()
    late = outcomes.pop(jobs[0])
    assert isinstance(late, OverdueError)
    assert str(late) == "not finished after 3 s"
    assert [outcomes[job] for job in jobs[1:]] == [1, 2, 3]
    assert not is_running(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("make", [InProcessExecutor, lambda: ProcessExecutor(2)], ids=["here", "processes"])
def test_after_a_stop_request_tasks_in_flight_finish_and_no_others_begin(make: Any) -> None:
    executor = make()
    stop = threading.Event()
    done = []
    try:
        for task, outcome in executor.run(abs, range(-100, 0), stopped=stop.is_set):
            assert outcome == -task
            done.append(task)
            stop.set()
    finally:
        executor.stop()
    assert done[0] in (-100, -99)
    assert len(done) <= 2


ORPHANS = """
import sys
from worker_tasks import sleep_in
from gpuprep.executors.processes import ProcessExecutor
if __name__ == "__main__":
    list(ProcessExecutor(1).run(sleep_in, [sys.argv[1]]))
"""


def test_a_worker_ends_with_its_parent_in_the_middle_of_a_task(tmp_path: Path) -> None:
    # Otherwise it would continue writing into an output that the next run has already opened and cleaned up.
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    pid = pid_left_by_killed_parent([sys.executable, str(script), str(tmp_path)], tmp_path)
    for _ in range(500):
        if not is_running(pid):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker was still running five seconds after its parent was killed")


UNGUARDED = """
from gpuprep.executors.processes import ProcessExecutor
print("the script runs")
executor = ProcessExecutor(2)
print(dict(executor.run(len, ["a", "bb"])))
executor.stop()
"""


def test_an_answer_that_waits_for_a_busy_caller_is_not_overdue(processes: ProcessExecutor) -> None:
    outcomes: list[Any] = []
    for _, outcome in processes.run(operator.call, squares(1, 2, 3, 4), limit_s=1.0):
        outcomes.append(outcome)
        time.sleep(1.2)
    assert sorted(outcomes) == [1, 4, 9, 16]


def test_executors_of_several_threads_leave_the_process_as_it_was() -> None:
    before, main = dict(os.environ), sys.modules["__main__"]

    def work() -> None:
        for _ in range(5):
            executor = ProcessExecutor(2, preload=())
            assert dict(executor.run(abs, [-1, -2])) == {-1: 1, -2: 2}
            executor.stop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (dict(os.environ), sys.modules["__main__"]) == (before, main)


def test_the_command_line_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", thorax((6, 16, 16), (3, 9, 9)), (3, 9, 9))
    for name in ("imagecodecs", "nibabel", "pydicom", "zarr"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    words = ["convert", "dicom", "--out", "out", "--size", "8", "--backend", "cpu", "--format", "nifti", "--jobs", "1"]
    for command in (words, ["verify", "out"]):
        done = subprocess.run(
            [sys.executable, "-m", "gpuprep", *command], capture_output=True, text=True, timeout=120, check=False,
            cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, "current folder" in done.stdout + done.stderr) == (0, False), done.stderr


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    first, outcomes = done.stdout.splitlines()
    assert first == "the script runs"
    assert outcomes in ("{'a': 1, 'bb': 2}", "{'bb': 2, 'a': 1}")


def test_workers_import_nothing_from_the_folder_they_are_started_in(tmp_path: Path) -> None:
    # A folder of data may hold a pydicom.py, or another version of gpuprep.
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text(UNGUARDED)
    (tmp_path / "pydicom.py").write_text("print('the current folder was imported from', flush=True)")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "the script runs"
    assert "current folder" not in done.stdout


EARLY = """
import sys
from gpuprep.executors.fork_server import start_fork_server
from gpuprep.executors.processes import ProcessExecutor
start_fork_server(("colorsys",))
executor = ProcessExecutor(1, preload=("nntplib",))
print(dict(executor.run(eval, ["sorted({'colorsys', 'nntplib'} & set(__import__('sys').modules))"])).values())
executor.stop()
print("colorsys" in sys.modules)
"""


@pytest.mark.skipif(not HAVE_FORK_SERVER, reason="this system has no fork server")
def test_workers_come_from_a_fork_server_that_was_started_before_their_executor() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "dict_values([['colorsys']])\nFalse\n"


KILLED = """
import os
from multiprocessing import forkserver
from gpuprep.executors.fork_server import kill_fork_server, start_fork_server
kill_fork_server()  # there is none
start_fork_server(("time",))
kill_fork_server()
print(os.waitstatus_to_exitcode(os.waitpid(forkserver._forkserver._forkserver_pid, 0)[1]))
"""


@pytest.mark.skipif(not HAVE_FORK_SERVER, reason="this system has no fork server")
def test_a_fork_server_is_ended_at_once_without_an_effect_if_there_is_none() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{-signal.SIGKILL.value}\n"


def test_workers_of_ordinary_series_load_no_large_library_without_need(tmp_path: Path) -> None:
    write_series(tmp_path / "in", thorax((4, 16, 16), (3, 9, 9)), (3, 9, 9))
    code = f"""
import sys
import gpuprep
for name in {LOOP_MODULES}:
    __import__(name)
run = gpuprep.convert("in", "out", gpuprep.Recipe(size=(8, 8)), backend="cpu")
print(run.counts, {{"pydicom", "requests", "numpy.f2py"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "{'ok': 1} set()\n"


@pytest.mark.skipif(not HAVE_FORK_SERVER, reason="this system has no fork server")
def test_a_fork_server_that_died_is_started_again() -> None:
    processes = ProcessExecutor(1, preload=("time",))
    server: Any = forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGKILL)
    try:
        assert list(processes.run(abs, [-1, -2])) == [(-1, 1), (-2, 2)]
    finally:
        processes.stop()
