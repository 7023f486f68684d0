"""Tests that series are flushed to disk while the next ones are converted, and what happens if that fails."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from cohort import WORK_FOLDER, done, rows, unfinished_outputs, whole, write_cohort

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.files.replacing import flush
from gpuprep.output import folder_store
from gpuprep.output.folder_store import PendingFolder
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.events import Run
from gpuprep.pipeline.retry import COMMITS

TIMEOUT_S = 60


def go(dicom: Path, out: Path) -> Run:
    return gpuprep.convert(dicom, out, Recipe(size=(24, 24)), backend="cpu", jobs=1)


def wait_for_unfinished(out: Path, count: int) -> bool:
    """Wait until as many series are being written or flushed; return False after a timeout."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if len(unfinished_outputs(out)) >= count:
            return True
        time.sleep(0.01)
    return False


def test_the_next_series_begins_before_the_first_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom, out = write_cohort(tmp_path / "dicom", 2), tmp_path / "out"
    overlapped: list[bool] = []
    first = threading.Lock()  # the second series may be flushed while the first one waits

    def slow(path: str | Path) -> None:
        if Path(path).name == "0000.tif" and first.acquire(blocking=False):
            overlapped.append(wait_for_unfinished(out, 2))
        flush(path)

    monkeypatch.setattr(folder_store, "flush", slow)
    assert go(dicom, out).counts == {"ok": 2}
    assert overlapped == [True]
    assert unfinished_outputs(out) == []


def test_workers_wait_if_the_disk_is_too_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = COMMITS + 1  # one waits for those that are being flushed, and its worker with it
    dicom, out = write_cohort(tmp_path / "dicom", most + 4), tmp_path / "out"
    counts: list[int] = []
    first = threading.Semaphore(COMMITS)  # later series may be flushed while these wait

    def slow(path: str | Path) -> None:
        if Path(path).name == "0000.tif" and first.acquire(blocking=False):
            wait_for_unfinished(out, most)
            time.sleep(0.5)  # time for the worker to begin another series, if it were allowed to
            counts.append(len(unfinished_outputs(out)))
        flush(path)

    monkeypatch.setattr(folder_store, "flush", slow)
    assert go(dicom, out).counts == {"ok": most + 4}
    assert max(counts) == most


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "disk-full",
            "OutputError: cannot write the series: [Errno 28]",
        ),
        (ValueError("out of range"), "error", "ValueError: out of range"),
    ],
)
def test_a_commit_that_fails_fails_its_series_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, reason: str
) -> None:
    dicom, out, move = write_cohort(tmp_path / "dicom", 4), tmp_path / "out", PendingFolder._move_into_place

    def failing(pending: PendingFolder, key: str, known: bool) -> None:
        if pending._final.name == "s001":
            raise error
        move(pending, key, known)

    with monkeypatch.context() as patch:
        patch.setattr(PendingFolder, "_move_into_place", failing)
        run = go(dicom, out)
    assert (run.counts, run.exit_code) == ({"ok": 3, "failed": 1}, 1)
    row = rows(out)["s001"]
    assert row["codes"] == f'["{code}"]'
    assert row["reason"].startswith(reason)
    assert (row["folder"], row["files"], row["shape"]) == ("", 0, None)
    assert done(out) == {"dicom/s000", "dicom/s002", "dicom/s003"}
    assert os.listdir(out / WORK_FOLDER) == ["lock"]
    assert go(dicom, out).counts == {"skipped": 3, "ok": 1}
    go(dicom, tmp_path / "undisturbed")
    assert whole(out) == whole(tmp_path / "undisturbed")


@pytest.mark.parametrize("where", ["in the run", "in the listener"])
def test_series_that_are_being_moved_into_place_outlive_an_interrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    dicom, out = write_cohort(tmp_path / "dicom", 4), tmp_path / "out"
    flushing, before = threading.Event(), set(threading.enumerate())

    def slow(path: str | Path) -> None:
        if Path(path).name == "volume.json":
            flushing.set()
            time.sleep(1.0)
        flush(path)

    class Impatient(gpuprep.Listener):
        def finished(self, _: SeriesResult) -> None:
            if where == "in the listener":
                raise KeyboardInterrupt

    def interrupt_twice() -> None:
        flushing.wait(TIMEOUT_S)
        for _ in range(2):  # the second one arrives while the run waits for the threads
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    monkeypatch.setattr(folder_store, "flush", slow)
    if where == "in the run":
        threading.Thread(target=interrupt_twice).start()
    with pytest.raises(KeyboardInterrupt):
        gpuprep.convert(dicom, out, Recipe(size=(24, 24)), backend="cpu", jobs=1, listener=Impatient())
    monkeypatch.undo()
    assert {t for t in threading.enumerate() if "ThreadPool" in t.name} <= before
    assert unfinished_outputs(out) == []
    made = sorted(p.parent.name for p in out.rglob("volume.json"))
    assert made
    if where == "in the run":  # otherwise the manifest could not be told
        assert sorted(rows(out)) == made
    assert set(go(dicom, out).counts) <= {"ok", "skipped"}
    assert whole(out)
