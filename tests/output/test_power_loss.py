"""After a loss of power, no output looks complete that is not, none is lost, and the next run repairs every state.

`disk_recorder` records what a run does to the disk, and `power_loss` makes the states in which that may leave it. Each
state is checked as it is; some are repaired by the next run. The choice depends on a seed; GPUPREP_CHAOS_SEED sets
another one, and GPUPREP_CHAOS_REPAIRS the number of repairs for each run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from cohort import WORK_FOLDER, Tree, unfinished_outputs, whole, write_cohort
from disk_recorder import Recorder
from power_loss import State, disks
from pydicom import dcmread

from gpuprep.compute.backend import NumpyBackend
from gpuprep.core.recipe import Recipe
from gpuprep.core.shard import Shard
from gpuprep.errors import GpuprepError
from gpuprep.output.records import DONE, SeriesResult
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.events import Listener, Run
from gpuprep.testing import write_series

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads open files in /proc")

SEED = int(os.environ.get("GPUPREP_CHAOS_SEED", "1"))
REPAIRS = int(os.environ.get("GPUPREP_CHAOS_REPAIRS", "60"))
RANDOM_STATES = 3
"""Number of random states after each step, besides those in which most is lost, or a single change."""
SLICES = Recipe(size=(8, 8), spacing_mm=None)
OPTIONS: dict[str, dict[str, Any]] = {
    "slices": {"recipe": SLICES},
    "gzip": {"recipe": replace(SLICES, format="nifti", compression="zlib")},
    "nnunet": {"recipe": replace(SLICES, format="tif-stack"), "layout": "nnunet"},
}
Outputs = dict[str, Tree]
"""Files of each output folder."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is such a place."""
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108
        yield tmp_path
        return
    folder = Path(mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def dicom(place: Path) -> Path:
    return write_cohort(place / "Thörax", 3, slices=4)  # its name is that of a folder in OUT


def change(series: Path) -> None:
    """Give a series other pixels."""
    files = sorted(series.iterdir())
    uid = str(dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
    for file in files:
        file.unlink()
    write_series(series, np.full((4, 16, 16), 7, np.int16), (2.0, 0.8, 0.7), series_uid=uid)


def converting(dicom: Path, **options: Any) -> Callable[..., Run]:
    """Return a function that converts a cohort into a folder, in this process, and requires that all of it is done."""

    def run(out: Path, **more: Any) -> Run:
        done = convert(dicom, out, backend=NumpyBackend("matmul"), **options, **more)
        assert done.exit_code == 0, done.counts
        return done

    return run


class Reporter(Listener):
    """Records which series are reported as finished."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def finished(self, result: SeriesResult) -> None:
        self._recorder.report(result.key)


# --- what a disk holds


def content(out: Path) -> Tree:
    """Return every file in OUT, also in its temporary folder."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def below(files: Tree, folder: str) -> Tree:
    """Return the files in a folder."""
    return {name[len(folder) + 1 :]: data for name, data in files.items() if name.startswith(f"{folder}/")}


def outputs(files: Tree) -> Outputs:
    """Return the files of each folder that looks like a complete output."""
    folders = [name.removesuffix("/volume.json") for name in files if name.endswith("/volume.json")]
    return {folder: below(files, folder) for folder in folders if not folder.startswith(WORK_FOLDER)}


def set_aside(files: Tree) -> Outputs:
    """Return the outputs that are being replaced in two steps, and to which a note leads the next run."""
    notes = {
        name: data.decode(errors="replace")
        for name, data in files.items()
        if re.fullmatch(rf"{WORK_FOLDER}/\w+\.place", name)
    }
    moved = {folder: below(files, name.removesuffix("place") + "former") for name, folder in notes.items()}
    return {folder: there for folder, there in moved.items() if there}


def view(files: Tree) -> Tree:
    """Return the files that are arranged for nnU-Net."""
    return {name: data for name, data in files.items() if name.startswith(("dataset.json", "images", "labelsT"))}


def key(output: Tree) -> str:
    """Return the key of the series of an output."""
    return str(json.loads(output["volume.json"])["key"])


def is_intact(output: Tree) -> bool:
    """Whether an output has the files of its volume.json, each with its size and checksum."""
    found = {n: {"bytes": len(d), "crc32": f"{zlib.crc32(d):08x}"} for n, d in output.items() if n != "volume.json"}
    return bool(found == json.loads(output["volume.json"])["outputs"])


def recorded(files: Tree) -> dict[str, str]:
    """Return the folder of each series that a manifest calls done, by the key of the series."""
    return dict(row for name, database in files.items() if name.endswith(".sqlite") for row in done_in(database))


@cache
def done_in(database: bytes) -> tuple[tuple[str, str], ...]:
    """Return key and folder of each series that a manifest with this content calls done."""
    with closing(sqlite3.connect(":memory:")) as db:
        if database:
            db.deserialize(without_log(database))
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'series'").fetchone():
            return ()
        rows = db.execute("SELECT key, folder, status FROM series").fetchall()
        return tuple((key, folder) for key, folder, status in rows if status in DONE)


def without_log(database: bytes) -> bytes:
    """Return a database whose header does not ask for a write-ahead log, which is in its content."""
    return database[:18] + b"\1\1" + database[20:]


# --- the states after a loss of power


class Survey:
    """Checks the states that a run may leave behind, and that the next run repairs them.

    Parameters
    ----------
    disk : path
        Folder in which the run makes OUT, or uses an existing one.
    run : callable
        Converts into the given folder; the same conversion repairs.
    """

    def __init__(self, disk: Path, run: Callable[..., Run]) -> None:
        self._run = run
        self._out = disk / "out"
        undisturbed = disk.with_name("undisturbed")
        run(undisturbed)
        self._wanted = whole(undisturbed)
        self._before, self._after = content(self._out), content(undisturbed)
        shutil.rmtree(undisturbed)
        self._former = outputs(self._before) | set_aside(self._before)
        self._known = [*self._former.values(), *outputs(self._after).values()]
        assert all(map(is_intact, self._known))
        self._new = {key(there): there for there in outputs(self._after).values()}
        self.recorder = Recorder(disk)
        with self.recorder.recording():
            run(self._out, listener=Reporter(self.recorder))
        assert whole(self._out) == self._wanted

    def states(self) -> Iterator[tuple[State, set[str], str]]:
        """Yield states, each with the keys of the series that were reported, and the moment."""
        chance = random.Random(SEED)  # noqa: S311
        for step, disk in enumerate(disks(self.recorder)):
            for model in disk.models:
                for state in disk.states(model, chance, RANDOM_STATES):
                    yield state, disk.reported, f"{model}, after step {step}, GPUPREP_CHAOS_SEED={SEED}"

    def check(self) -> int:
        """Check all states as they are, repair some of those that differ, and return the number of states."""
        found = list(self.states())
        for state, reported, moment in found:
            self._check_as_it_is(state.below("out"), reported, moment)
        distinct = list({tuple(state.files.items()): (state, moment) for state, _, moment in found}.values())
        chance = random.Random(SEED)  # noqa: S311
        for state, moment in chance.sample(distinct, min(REPAIRS, len(distinct))):
            self._check_repair(state, moment)
        return len(found)

    def _check_as_it_is(self, files: Tree, reported: set[str], moment: str) -> None:
        complete, rows = outputs(files), recorded(files)
        for folder, there in complete.items():
            assert there in self._known, f"{moment}: {folder} is incomplete"
            if there not in self._new.values():
                assert rows.get(key(there)) == folder, f"{moment}: no run will replace or remove {folder}"
        aside = [there for folder, there in set_aside(files).items() if self._former.get(folder) == there]
        keys = {key(there) for there in (*complete.values(), *aside)}
        assert {key(there) for there in self._former.values()} <= keys, f"{moment}: a former output is lost"
        for series in reported:
            assert self._new[series] in complete.values(), f"{moment}: an output that was reported is lost"
        assert rows.keys() <= keys, f"{moment}: the manifest has a series without output"
        assert recorded(self._before).keys() <= rows.keys(), f"{moment}: a row of the manifest is lost"
        if "dataset.json" in files:
            views = view(self._before), view(self._after)
            assert view(files) in views, f"{moment}: the dataset of nnU-Net is incomplete"

    def _check_repair(self, state: State, moment: str) -> None:
        state.write(self._out.parent)
        try:
            run = self._run(self._out)
        except (GpuprepError, AssertionError) as exc:
            pytest.fail(f"{moment}: {exc}")
        assert run.counts.keys() <= {"ok", "skipped"}, f"{moment}: {run.counts}"
        assert whole(self._out) == self._wanted, moment
        assert set(unfinished_outputs(self._out)) <= {"nnunet.json"}, moment
        names = {path.name for path in self._out.iterdir()}
        assert {name for name in names if name.startswith("manifest.")} == {"manifest.sqlite", "manifest.csv"}, moment


@pytest.fixture
def disk(place: Path) -> Path:
    disk = place / "disk"
    disk.mkdir()
    return disk


@pytest.fixture
def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two folders."""
    monkeypatch.setattr("gpuprep.output.folder_store._exchanged", lambda *_: False)


FORMATS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@FORMATS
def test_volumes_of_a_first_run_are_complete_or_absent(dicom: Path, disk: Path, options: dict[str, Any]) -> None:
    assert Survey(disk, converting(dicom, **options)).check() > 500


@FORMATS
def test_an_output_that_is_exchanged_is_the_former_or_the_new_one(
    dicom: Path, disk: Path, options: dict[str, Any]
) -> None:
    run = converting(dicom, **options)
    run(disk / "out")
    change(dicom / "s001")
    assert Survey(disk, run).check() > 500


@pytest.mark.usefixtures("in_two_steps")
def test_an_output_that_is_replaced_in_two_steps_can_be_restored_even_if_that_is_interrupted(
    dicom: Path, disk: Path
) -> None:
    run = converting(dicom, recipe=SLICES)
    run(disk / "out")
    change(dicom / "s001")
    survey = Survey(disk, run)
    assert survey.check() > 500
    next(state for state, _, _ in survey.states() if set_aside(state.below("out"))).write(disk)
    assert "Thörax/s001" not in outputs(content(disk / "out"))
    assert Survey(disk, run).check() > 500


def test_an_output_that_moves_is_complete_in_one_of_its_folders(dicom: Path, disk: Path) -> None:
    run = converting(dicom, recipe=SLICES)
    run(disk / "out")
    change(dicom / "s001")
    (dicom / "s001").rename(dicom / "s901")
    assert Survey(disk, run).check() > 500


def test_no_row_is_lost_while_shards_are_merged(dicom: Path, disk: Path) -> None:
    run = converting(dicom, recipe=SLICES)
    for number in (1, 2):
        run(disk / "out", shard=Shard(number, 2))
    assert Survey(disk, run).check() > 200


# --- the models


def possible(recorder: Recorder, model: str) -> list[Tree]:
    """Return the files that may be left after all steps."""
    *_, disk = disks(recorder)
    found: list[Tree] = []
    for seed in range(100):
        for state in disk.states(model, random.Random(seed), 1):  # noqa: S311
            files = {name: file.data for name, file in state.files.items() if file is not None}
            if files not in found:
                found.append(files)
    return sorted(found, key=lambda files: sorted(files))


def test_a_flush_of_a_file_keeps_its_folder_in_a_journal_only(disk: Path) -> None:
    recorder = Recorder(disk)
    with recorder.recording():
        (disk / "folder").mkdir()
        with (disk / "folder" / "file").open("wb") as f:
            f.write(b"data")
            f.flush()
            os.fsync(f.fileno())
    assert possible(recorder, "journal") == [{"folder/file": b"data"}]
    assert possible(recorder, "entries") == [{}, {"folder/file": b"data"}]
    with recorder.recording():
        for folder in (disk / "folder", disk):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    assert possible(recorder, "entries") == [{"folder/file": b"data"}]


def test_a_file_that_is_renamed_before_it_is_flushed_may_be_incomplete(disk: Path) -> None:
    (disk / "file").write_bytes(b"former")
    recorder = Recorder(disk)
    with recorder.recording():
        (disk / "part").write_bytes(b"data")
        (disk / "part").replace(disk / "file")
    for model in ("journal", "entries"):
        found = {files["file"] for files in possible(recorder, model)}
        assert found == {b"former", b"data", b"dat", b"da", b"d", b"", bytes(4)}


def test_entries_of_two_folders_persist_in_any_order(disk: Path) -> None:
    for name in ("a", "b"):
        (disk / name).mkdir()
        (disk / name / "file").write_bytes(name.encode())
    recorder = Recorder(disk)
    with recorder.recording():
        (disk / "a" / "file").unlink()
        (disk / "b" / "file").unlink()
    a, b = {"a/file": b"a"}, {"b/file": b"b"}
    assert possible(recorder, "journal") == [{}, a | b, b]
    assert possible(recorder, "entries") == [{}, a, a | b, b]


@pytest.mark.parametrize(("synchronous", "left"), [("NORMAL", {0, 1, 2}), ("FULL", {2})])
def test_a_commit_is_durable_if_its_settings_say_so_or_the_log_has_ended(
    disk: Path, synchronous: str, left: set[int]
) -> None:
    with closing(sqlite3.connect(disk / "db.sqlite")) as db:
        db.execute("CREATE TABLE t (x)")
    recorder = Recorder(disk)
    with recorder.recording(), closing(sqlite3.connect(disk / "db.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        for x in (1, 2):
            db.execute("INSERT INTO t VALUES (?)", (x,))
        assert {number_of_rows(files["db.sqlite"]) for files in possible(recorder, "journal")} == left
        db.execute("PRAGMA journal_mode = DELETE")
    assert {number_of_rows(files["db.sqlite"]) for files in possible(recorder, "journal")} == {2}


def number_of_rows(database: bytes) -> int:
    with closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(without_log(database))
        return int(db.execute("SELECT count(*) FROM t").fetchone()[0])
