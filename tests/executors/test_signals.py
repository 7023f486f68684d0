"""Runs that are interrupted at any moment leave whole volumes or none, no process, and an output that goes on.

Trap 34. Moments are found by looking at the output folder, so nothing depends on the speed of the machine; the random
delays only add moments nobody thought of.
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
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpuprep.core.recipe import Recipe
from gpuprep.executors.signals import held_back
from gpuprep.output.paths import WORK_FOLDER
from gpuprep.pipeline.cohort import convert
from gpuprep.testing import write_series

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and process groups")

SERIES = 8
RECIPE = Recipe(size=(192, 192), compression="zlib")
COMMAND = ["-m", "gpuprep", "convert", "--size", "192", "--compression", "zlib", "--backend", "cpu", "--jobs", "2"]
Volumes = dict[str, dict[str, bytes]]


def volumes(out: Path) -> Volumes:
    """Every file below OUT by folder and name, but for what is being made and what is gpuprep's own."""
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
    """What an uninterrupted run makes of the cohort."""
    out = tmp_path_factory.mktemp("whole")
    assert convert(dicom, out, RECIPE, backend="cpu").counts == {"ok": SERIES}
    expected = volumes(out)
    assert set(expected) == {f"dicom/p{n}" for n in range(SERIES)}
    assert all(len(files) == 25 + 2 for files in expected.values())  # 10 slices of 2.5 mm at 1 mm, and what tells
    return expected


def in_the_making(out: Path) -> bool:
    """Whether a volume is being written."""
    try:
        with os.scandir(out / WORK_FOLDER) as entries:
            return any(entry.is_dir() for entry in entries)
    except OSError:
        return False


def done(out: Path) -> int:
    """Number of volumes in their places."""
    return sum((out / "dicom" / f"p{n}" / "volume.json").exists() for n in range(SERIES))


def more_done(out: Path, than: int) -> bool:
    return done(out) > than


class Interrupted:
    """A run in a process group of its own that gets a signal as soon as something is true of its output.

    All its processes hold its standard streams, so these end when the last process has.
    """

    def __init__(
        self,
        command: list[str],
        number: signal.Signals,
        moment: Callable[[], bool],
        *,
        delay_s: float = 0.0,
        everybody: bool = False,
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not moment():
                time.sleep(0.001)
            time.sleep(delay_s)
            self.too_late = process.poll() is not None
            if not self.too_late:
                os.killpg(process.pid, number) if everybody else process.send_signal(number)
            _, self.stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("a process of the run is still there after a minute")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.code = process.returncode


def check(out: Path, whole: Volumes) -> None:
    """Whatever is in its place is whole, and the manifest promises nothing that is not there."""
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
    """The run noticed, said so in one line, and wrote down what it had done."""
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
    """The next run does the rest, and nothing tells that there was an interruption."""
    run = convert(dicom, out, RECIPE, backend="cpu", jobs=2)
    assert run.exit_code == 0
    assert set(run.counts) <= {"ok", "skipped"}
    assert len(run.results) == SERIES
    assert volumes(out) == whole
    assert not in_the_making(out)
    assert convert(dicom, out, RECIPE, backend="cpu").counts == {"skipped": SERIES}


@pytest.mark.parametrize(
    ("number", "everybody"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["Ctrl-C in a terminal", "SIGTERM", "SIGKILL"],
)
def test_interrupted_runs_leave_whole_volumes_and_the_next_one_does_the_rest(
    dicom: Path, tmp_path: Path, whole: Volumes, number: signal.Signals, everybody: bool
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    for first in (True, False):
        moment = partial(in_the_making, out) if first else partial(more_done, out, than=done(out))
        run = Interrupted(command, number, moment, everybody=everybody)
        assert not run.too_late
        check(out, whole)
        if number == signal.SIGKILL:
            assert run.code == -signal.SIGKILL
        else:
            check_orderly(run, out)
    assert done(out) >= 1
    finish(dicom, out, whole)


def test_ctrl_c_while_workers_are_starting_is_one_line(dicom: Path, tmp_path: Path) -> None:
    # A terminal sends it to the server of the workers too, which is then busy importing.
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    run = Interrupted(command, signal.SIGINT, (out / WORK_FOLDER / "lock").exists, delay_s=0.2, everybody=True)
    check_orderly(run, out)


def test_signals_that_are_held_back_arrive_afterwards() -> None:
    # Around imports: Python drops what is raised in the middle of some of their clean-ups.
    reached = []

    def import_much() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("inside")
            with held_back():
                reached.append("twice inside")
            reached.append("still inside")
        reached.append("afterwards")

    with pytest.raises(KeyboardInterrupt):
        import_much()
    assert reached == ["inside", "twice inside", "still inside"]
    with pytest.raises(KeyboardInterrupt):  # nothing is held back any more
        signal.raise_signal(signal.SIGINT)


def test_runs_interrupted_at_random_are_finished_by_the_next(dicom: Path, tmp_path: Path, whole: Volumes) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(dicom), "--out", str(out)]
    generator = random.Random()  # noqa: S311
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        # From before anything is imported until after the first volumes.
        early, delay_s = generator.random() < 0.5, generator.uniform(0, 0.3)
        moment = (lambda: True) if early else (lambda: in_the_making(out))
        run = Interrupted(command, number, moment, delay_s=delay_s * (3 if early else 1), everybody=True)
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
    assert not in_the_making(out)
    assert done(out) >= 2
    finish(dicom, out, whole)
