"""Tests of interrupted runs: they leave complete volumes or none, no process, and an output that can be continued.

Trap 34. The moments of interruption are detected in the output folder, so they do not depend on the speed of the
machine. Random delays add further moments.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cohort import LIGHT

from gpuprep.compute.backend import NumpyBackend
from gpuprep.core.recipe import Recipe
from gpuprep.executors.signals import signals_blocked
from gpuprep.output.paths import WORK_FOLDER
from gpuprep.pipeline.cohort import convert
from gpuprep.testing import write_series

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and process groups")

SERIES = 8
RECIPE = Recipe(size=(192, 192), compression="zlib")
COMMAND = ["-m", "gpuprep", "convert", "--size", "192", "--compression", "zlib", "--backend", "cpu", "--jobs", "2"]
BACKEND = NumpyBackend("matmul")
"""Backend of `LIGHT` commands, with which runs in this process give the same bytes."""
Volumes = dict[str, dict[str, bytes]]


def volumes(out: Path) -> Volumes:
    """Return the files of all volumes below OUT by folder and name, without unfinished ones and run records."""
    found: Volumes = {}
    for folder, below, names in os.walk(out):
        if Path(folder) == out:
            below[:] = [b for b in below if b != WORK_FOLDER]
            names = [n for n in names if not n.startswith(("recipe.toml", "manifest."))]
        if names:
            found[os.path.relpath(folder, out)] = {n: Path(folder, n).read_bytes() for n in names}
    return found


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interruption") / "dicom"
    for n in range(SERIES):
        stored = np.random.default_rng(n).integers(0, 3000, (10, 24, 20)).astype(np.int16)
        write_series(root / f"p{n}", stored, (2.5, 0.8, 0.7))
    return root


@pytest.fixture(scope="module")
def whole(dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    """Return the volumes of an uninterrupted run over the cohort."""
    out = tmp_path_factory.mktemp("whole")
    assert convert(dicom, out, RECIPE, backend=BACKEND).counts == {"ok": SERIES}
    expected = volumes(out)
    assert set(expected) == {f"dicom/p{n}" for n in range(SERIES)}
    # 10 slices of 2.5 mm become 25 of 1 mm; two more files are the volume.json and the preview.
    assert all(len(files) == 25 + 2 for files in expected.values())
    return expected


def is_writing(out: Path) -> bool:
    """Return whether a volume is being written."""
    try:
        with os.scandir(out / WORK_FOLDER) as entries:
            return any(entry.is_dir() for entry in entries)
    except OSError:
        return False


def done(out: Path) -> int:
    """Return the number of finished volumes."""
    return sum((out / "dicom" / f"p{n}" / "volume.json").exists() for n in range(SERIES))


def more_done(out: Path, than: int) -> bool:
    return done(out) > than


class Interrupted:
    """A run in a separate process group that gets a signal as soon as a condition is true.

    All its processes hold its standard streams, so `communicate` returns when the last of them has ended.
    """

    def __init__(
        self,
        command: list[str],
        number: signal.Signals,
        condition: Callable[[], bool],
        *,
        delay_s: float = 0.0,
        whole_group: bool = False,
        environment: Mapping[str, str] = LIGHT,
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not condition():
                time.sleep(0.001)
            time.sleep(delay_s)
            self.too_late = process.poll() is not None
            if not self.too_late:
                os.killpg(process.pid, number) if whole_group else process.send_signal(number)
            _, self.stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("a process of the run still exists after a minute")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.code = process.returncode


def check(out: Path, whole: Volumes) -> None:
    """Assert that all volumes are complete, and that the manifest lists only files that exist."""
    found = volumes(out)
    assert {folder: files for folder, files in found.items() if files != whole.get(folder)} == {}
    if not (out / "manifest.sqlite").exists():
        return
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        rows = db.execute("SELECT folder, files, bytes, status FROM series").fetchall()
    for folder, files, size, status in rows:
        assert status == "ok"
        assert (files, size) == (len(found[folder]), sum(map(len, found[folder].values())))


def check_orderly(run: Interrupted, out: Path) -> None:
    """Assert that the run reported its interruption in one line and wrote its manifest."""
    assert run.code == 130
    assert "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if "interrupted" in line] == [
        "gpuprep: interrupted; completed outputs are kept: run the same command again to continue"
    ]
    with (out / "manifest.csv").open(newline="") as f, closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        assert sorted(row["key"] for row in csv.DictReader(f)) == sorted(
            key for (key,) in db.execute("SELECT key FROM series")
        )


def finish(dicom: Path, out: Path, whole: Volumes) -> None:
    """Assert that the next run completes the cohort, with the same files as an uninterrupted run."""
    run = convert(dicom, out, RECIPE, backend=BACKEND, jobs=2)
    assert run.exit_code == 0
    assert set(run.counts) <= {"ok", "skipped"}
    assert len(run.results) == SERIES
    assert volumes(out) == whole
    assert not is_writing(out)
    assert convert(dicom, out, RECIPE, backend=BACKEND).counts == {"skipped": SERIES}


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["Ctrl-C in a terminal", "SIGTERM", "SIGKILL"],
)
def test_interrupted_runs_leave_complete_volumes_and_the_next_run_does_the_rest(
    dicom: Path, tmp_path: Path, whole: Volumes, number: signal.Signals, whole_group: bool
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    for first in (True, False):
        condition = partial(is_writing, out) if first else partial(more_done, out, than=done(out))
        run = Interrupted(command, number, condition, whole_group=whole_group)
        assert not run.too_late
        check(out, whole)
        if number == signal.SIGKILL:
            assert run.code == -signal.SIGKILL
        else:
            check_orderly(run, out)
    assert done(out) >= 1
    finish(dicom, out, whole)


def test_ctrl_c_while_workers_are_starting_is_one_line(dicom: Path, tmp_path: Path) -> None:
    # A terminal sends SIGINT to the fork server, too, which is then importing modules, of which Numba takes longest.
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    begun = (out / WORK_FOLDER / "lock").exists
    run = Interrupted(command, signal.SIGINT, begun, delay_s=0.2, whole_group=True, environment={})
    check_orderly(run, out)


def test_blocked_signals_arrive_after_the_block() -> None:
    # Needed around imports, since Python discards exceptions that are raised in some of their clean-ups.
    reached = []

    def import_much() -> None:
        with signals_blocked():
            signal.raise_signal(signal.SIGINT)
            reached.append("inside")
            with signals_blocked():
                reached.append("twice inside")
            reached.append("still inside")
        reached.append("afterwards")

    with pytest.raises(KeyboardInterrupt):
        import_much()
    assert reached == ["inside", "twice inside", "still inside"]
    with pytest.raises(KeyboardInterrupt):  # signals are no longer blocked
        signal.raise_signal(signal.SIGINT)


def test_runs_interrupted_at_random_are_finished_by_the_next(dicom: Path, tmp_path: Path, whole: Volumes) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    generator = random.Random()  # noqa: S311
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        # Between the start of the process, before any import, and some time after the first volumes.
        early, delay_s = generator.random() < 0.5, generator.uniform(0, 0.3)
        condition = (lambda: True) if early else (lambda: is_writing(out))
        run = Interrupted(command, number, condition, delay_s=delay_s * (3 if early else 1), whole_group=True)
        print(f"{number.name}: early={early}, delay_s={delay_s:.3f}, code={run.code}")  # noqa: T201
        assert run.code != 0 or run.too_late
        check(out, whole)
    finish(dicom, out, whole)


PLAIN = """
import sys, gpuprep
gpuprep.convert(sys.argv[1], sys.argv[2], gpuprep.Recipe(size=(192, 192), compression="zlib"), backend="cpu")
"""


def test_a_script_without_workers_may_be_interrupted_too(dicom: Path, tmp_path: Path, whole: Volumes) -> None:
    out = tmp_path / "out"
    run = Interrupted(["-c", PLAIN, str(dicom), str(out)], signal.SIGINT, lambda: done(out) == 2)
    assert run.code == -signal.SIGINT
    assert run.stderr.splitlines()[-1] == "KeyboardInterrupt"
    check(out, whole)
    assert not is_writing(out)
    assert done(out) >= 2
    finish(dicom, out, whole)
