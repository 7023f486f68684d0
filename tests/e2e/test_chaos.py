"""Runs that are killed at random moments, or lose workers, finally give the same outputs as an undisturbed run.

The moments depend on random numbers and on the state of the output. The seed is printed; GPUPREP_CHAOS_SEED sets it.
GPUPREP_CHAOS_KILLS=30 kills more often.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cohort import (
    Running,
    children,
    command,
    command_line_of,
    descendants,
    done,
    findings,
    gpuprep,
    marks,
    rows,
    unfinished_outputs,
    whole,
    write_cohort,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

SERIES = 30
KILLS = int(os.environ.get("GPUPREP_CHAOS_KILLS", "10"))
WORKER_KILLS = 10
DASK_KILLS = 4


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("chaos") / "dicom", SERIES)


@pytest.fixture(scope="module")
def undisturbed(dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Outputs and records of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with Running(command(dicom, out)) as run:
        assert run.end() == 0, run.stderr
    found = whole(out)
    assert done(out) == {f"dicom/s{n:03d}" for n in range(SERIES)}
    assert {row["status"] for row in found[1].values()} == {"ok"}
    assert len(found[1]) == SERIES
    # 6 slices of 2 mm are 12 of 1 mm, or 11 if only their centres are counted; plus preview.jpg and volume.json.
    assert len(found[0]) in (SERIES * (11 + 2) + 1, SERIES * (12 + 2) + 1)
    return found


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("GPUPREP_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"GPUPREP_CHAOS_SEED={seed}")  # noqa: T201
    return random.Random(seed)  # noqa: S311


class Witness:
    """Checks that a complete volume is never written again."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._seen: dict[str, tuple[int, int, int]] = {}

    def look(self) -> int:
        """Check the volumes seen before, and return the number of volumes."""
        there = marks(self._out)
        assert {folder: there.get(folder) for folder in self._seen} == self._seen
        self._seen = there
        return len(there)


def test_a_run_that_is_killed_repeatedly_finally_gives_the_same_outputs(
    dicom: Path, tmp_path: Path, undisturbed: Any, chance: random.Random
) -> None:
    out = tmp_path / "out"
    witness = Witness(out)
    before, startup_s = 0, 1.5
    for left in range(KILLS, 0, -1):
        share = (SERIES - before) // left  # so that work is left until the last kill
        kind = chance.choice(["any", "making", "placed", "placed", "later"])
        more = before + 1 + chance.randint(0, share)
        started_s = time.monotonic()
        with Running(command(dicom, out)) as run:
            if kind == "any":  # imports, the scan, the plan, the start of workers
                until_s = started_s + chance.uniform(0, startup_s)
                run.wait_until(lambda more=more, until_s=until_s: time.monotonic() > until_s or len(done(out)) > more)  # type: ignore[misc]
            elif kind == "making":
                run.wait_until(lambda: unfinished_outputs(out) != [])
                time.sleep(chance.uniform(0, 0.02))
            else:  # at once: the row of the manifest may still be missing
                run.wait_until(lambda more=more: len(done(out)) >= more)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.2) if kind == "later" and share > 1 else 0)
            if kind != "any":
                startup_s = time.monotonic() - started_s
            too_late = not run.is_running
            run.kill_all()
            code = run.end()
        before = witness.look()
        print(f"{kind}, {before} done, exit code {code}")  # noqa: T201
        assert code == (0 if too_late else -signal.SIGKILL)
        assert "Traceback" not in run.stderr
    with Running(command(dicom, out)) as run:
        assert run.end() == 0, run.stderr
    witness.look()
    assert whole(out) == undisturbed
    assert unfinished_outputs(out) == []
    assert [str(path) for path in out.rglob("*.part")] == []
    assert findings(out) == []


def workers_of(run: Running) -> list[int]:
    """Return the worker processes of a run: the children of the fork server."""
    return [
        worker for server in children(run.pid) if "forkserver" in command_line_of(server) for worker in children(server)
    ]


def test_a_run_that_loses_many_workers_continues(
    dicom: Path, tmp_path: Path, undisturbed: Any, chance: random.Random
) -> None:
    out = tmp_path / "out"
    killed = 0
    with Running(command(dicom, out)) as run:
        for n in range(WORKER_KILLS):
            # From the first volume on, because files whose header workers die twice are left out of their series.
            more = n * (SERIES // WORKER_KILLS) // 2 + 1
            run.wait_until(lambda more=more: len(done(out)) >= more)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
            workers = workers_of(run)
            if workers:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed += 1
        code = run.end()
    print(f"{killed} killed")  # noqa: T201
    assert killed >= 1
    assert "Traceback" not in run.stderr
    failed = {name: row for name, row in rows(out).items() if row["status"] != "ok"}
    assert code == (1 if failed else 0)
    for row in failed.values():
        assert (row["status"], row["codes"]) == ("failed", '["worker-died"]')
        assert "it has ended 2 workers, and is set aside: gpuprep retry tries it again" in row["reason"]
    again = gpuprep("retry", out, "--backend", "cpu", "--jobs", "2", "--quiet", "--index", "none")
    assert (again.returncode, again.stderr) == (0, "")
    assert whole(out) == undisturbed
    assert unfinished_outputs(out) == []
    assert findings(out) == []


def dask_workers_of(run: Running) -> list[int]:
    """Return the workers of a local Dask cluster; its nannies, threads of the cluster process, start them."""
    keepers = [child for child in children(run.pid) if "gpuprep.executors.dask" in command_line_of(child)]
    started = [pid for keeper in keepers for pid in descendants(keeper)]
    return [pid for pid in started if "spawn_main" in command_line_of(pid)]


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed: gpuprep[dask]")
def test_a_cluster_that_loses_workers_finally_gives_the_same_outputs(
    dicom: Path, tmp_path: Path, undisturbed: Any, chance: random.Random
) -> None:
    out = tmp_path / "out"
    killed = 0
    with Running(command(dicom, out, "--scheduler", "local")) as run:
        for n in range(DASK_KILLS):
            more = n * SERIES // (2 * DASK_KILLS) + 1
            run.wait_until(lambda more=more: len(done(out)) >= more)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.1))
            workers = dask_workers_of(run)
            if workers:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed += 1
        code = run.end()
    print(f"{killed} killed")  # noqa: T201
    assert killed >= 1
    assert "Traceback" not in run.stderr
    failed = {name: row for name, row in rows(out).items() if row["status"] != "ok"}
    assert code == (1 if failed else 0), run.stderr
    assert {(row["status"], row["codes"]) for row in failed.values()} <= {("failed", '["worker-died"]')}
    if failed:
        gpuprep("retry", out, "--backend", "cpu", "--jobs", "2", "--quiet", "--index", "none")
    assert whole(out) == undisturbed
    assert unfinished_outputs(out) == []
    assert findings(out) == []
