"""Full and read-only disks, vanishing inputs, damaged manifests, concurrent runs, signals, limits.

In each case the user gets one clear line, no volume is incomplete, and the next run converts the rest.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cohort import (
    WORK_FOLDER,
    Running,
    command,
    done,
    findings,
    gpuprep,
    marks,
    python,
    rows,
    run_words,
    tree,
    unfinished_outputs,
    whole,
    write_cohort,
)

from gpuprep.compute.backend import NumpyBackend
from gpuprep.core.recipe import Recipe
from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.output.folder_store import Output, PendingFolder, open_output
from gpuprep.output.manifest import Manifest
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run

SMALL = Recipe(size=(24, 24))
MISFIT = re.compile(
    r"gpuprep: \S+: the outputs need [\d.]+ \w+ and [\d.]+ \w+ are free: free some, choose another --out, a smaller "
    r"--dtype or a --compression, or begin anyway with --no-room-check\n"
)


def go(dicom: Path, out: Path, **options: Any) -> Run:
    return convert(dicom, out, **{"recipe": SMALL, "backend": "cpu", **options})


def statuses(out: Path) -> dict[str, str]:
    return {name: row["status"] for name, row in rows(out).items()}


def names(count: int) -> list[str]:
    return [f"s{n:03d}" for n in range(count)]


def one_line(text: str) -> str:
    """Return the only line of a text."""
    (line,) = text.splitlines()
    return line


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "dicom", 4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Planned(Listener):
    """Calls a function after planning, before conversion starts."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def planned(self, forecast: Forecast) -> None:  # noqa: ARG002
        self._act()


# --- the disk


class Disk:
    """A file system in memory."""

    def __init__(self, path: Path, kilobytes: int) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("mount is not installed")
        if mounted.returncode:
            pytest.skip(f"no permission to mount: {mounted.stderr.strip()}")

    def change(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    mounted: list[Disk] = []

    def mount(kilobytes: int) -> Disk:
        disk = Disk(tmp_path / f"disk{len(mounted)}", kilobytes)
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk.path)], check=True)


def test_series_that_fit_on_a_full_disk_are_converted_and_the_rest_when_there_is_space(
    tmp_path: Path, disks: Callable[[int], Disk]
) -> None:
    # A volume is 40 files of 24 × 24 float32. Each takes a page of 4096 bytes, more than the predicted size.
    dicom = write_cohort(tmp_path / "dicom", 10, slices=20)
    disk = disks(1400)
    with Running(command(dicom, disk.path)) as run:
        code = run.end()
    assert code == 1, run.stderr
    assert "Traceback" not in run.stderr
    found = rows(disk.path)
    assert sorted(found) == names(10)
    left_out = {name: row for name, row in found.items() if row["status"] != "ok"}
    assert 1 <= len(left_out) <= 9
    assert done(disk.path) == {f"dicom/{name}" for name in found if name not in left_out}
    for row in left_out.values():
        assert (row["status"], row["codes"], row["folder"]) == ("failed", '["disk-full"]', "")
        assert re.fullmatch(
            r"OutputError: cannot write the series: \[Errno 28\] No space left on device.*"
            r"|OutputError: it needs [\d.]+ \w+ and [\d.]+ \w+ are free: free some and run again",
            row["reason"],
        )
    assert unfinished_outputs(disk.path) == []
    assert findings(disk.path) == []
    before = marks(disk.path)
    disk.change("size=40m")
    again = gpuprep(*run_words(dicom, disk.path))
    assert (again.returncode, again.stderr) == (0, "")
    assert {folder: marks(disk.path)[folder] for folder in before} == before
    undisturbed = tmp_path / "undisturbed"
    assert gpuprep(*run_words(dicom, undisturbed)).returncode == 0
    assert whole(disk.path) == whole(undisturbed)


def test_a_run_whose_outputs_cannot_fit_does_not_start(tmp_path: Path, disks: Callable[[int], Disk]) -> None:
    # 4 volumes of at least 39 × 24 × 24 float32 are 360 kB.
    dicom = write_cohort(tmp_path / "dicom", 4, slices=20)
    disk = disks(300)
    refused = gpuprep(*run_words(dicom, disk.path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert MISFIT.fullmatch(refused.stderr)
    assert done(disk.path) == set()
    assert rows(disk.path) == {}
    begun = python(*command(dicom, disk.path, "--no-room-check"))
    assert begun.returncode == 1
    assert "Traceback" not in begun.stderr
    assert set(statuses(disk.path).values()) <= {"ok", "failed"}
    # The manifest may run out of space too, and then the run cannot continue.
    without_record = f"gpuprep: cannot write into {disk.path}: "
    assert "failed" in statuses(disk.path).values() or begun.stderr.splitlines()[-1].startswith(without_record)
    assert unfinished_outputs(disk.path) == []


def test_a_disk_without_any_space_is_named(dicom: Path, disks: Callable[[int], Disk]) -> None:
    disk = disks(64)
    (disk.path / "other").write_bytes(bytes(60 * 1024))
    run = python(*command(dicom, disk.path))
    assert run.returncode == 1
    assert one_line(run.stderr) == f"gpuprep: cannot write into {disk.path}: database or disk is full"


@pytest.mark.parametrize("where", ["folder", "file", "volume.json"])
def test_a_disk_that_fills_up_fails_only_the_series_being_written(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    pending, flush = Output.pending, sys.modules["gpuprep.output.folder_store"].flush
    written_at: list[Path] = []

    def noted(output: Output, folder: str) -> PendingFolder:
        if where == "folder" and folder == "dicom/s001":
            raise full
        made = pending(output, folder)
        if folder == "dicom/s001":
            written_at.append(made.path)
        return made

    def filling(path: str | Path) -> None:
        if Path(path).parent in written_at and Path(path).name == {"file": "0003.tif"}.get(where, where):
            raise full
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "pending", noted)
        patch.setattr("gpuprep.output.folder_store.flush", filling)
        run = go(dicom, out)
    assert run.exit_code == 1
    assert statuses(out) == {"s000": "ok", "s001": "failed", "s002": "ok", "s003": "ok"}
    row = rows(out)["s001"]
    assert row["codes"] == '["disk-full"]'
    assert row["reason"] == "OutputError: cannot write the series: [Errno 28] No space left on device"
    assert unfinished_outputs(out) == []
    assert go(dicom, out).counts == {"skipped": 3, "ok": 1}
    go(dicom, out.with_name("undisturbed"))
    assert whole(out) == whole(out.with_name("undisturbed"))


def test_a_read_only_output_can_be_read_but_not_written(dicom: Path, disks: Callable[[int], Disk]) -> None:
    disk = disks(8000)
    assert gpuprep(*run_words(dicom, disk.path)).returncode == 0
    (dicom / "s000" / "S1-0006.dcm").touch()
    disk.change("ro")
    before = whole(disk.path)
    run = gpuprep(*run_words(dicom, disk.path))
    assert run.returncode == 2
    assert (
        one_line(run.stderr) == f"gpuprep: cannot write into {disk.path}: Read-only file system; choose another --out"
    )
    status = gpuprep("status", disk.path, "--json")
    assert (status.returncode, status.stderr) == (0, "")
    assert json.loads(status.stdout)["counts"] == {"ok": 4}
    rows_of = gpuprep("manifest", disk.path, "--json")
    assert (rows_of.returncode, rows_of.stderr) == (0, "")
    assert [json.loads(line)["status"] for line in rows_of.stdout.splitlines()] == ["ok"] * 4
    assert findings(disk.path) == []
    for words in (("retry", disk.path), ("merge", disk.path)):
        refused = gpuprep(*words)
        assert refused.returncode in (0, 2)
        assert "Traceback" not in refused.stderr
    assert whole(disk.path) == before


def test_a_new_output_on_a_read_only_disk_gives_one_line(dicom: Path, disks: Callable[[int], Disk]) -> None:
    disk = disks(8000)
    disk.change("ro")
    run = gpuprep(*run_words(dicom, disk.path / "out"))
    assert run.returncode == 2
    out = disk.path / "out"
    assert one_line(run.stderr) == f"gpuprep: cannot write into {out}: Read-only file system; choose another --out"


NO_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Prefix that makes file modes apply to root too."""


@pytest.fixture
def stoppable() -> tuple[str, ...]:
    """Return a prefix with which file modes apply to a command."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no POSIX users")
    if os.geteuid() != 0:
        return ()
    try:
        tried = subprocess.run([*NO_OVERRIDE, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("running as root, and setpriv is not installed")
    if tried.returncode:
        pytest.skip(f"running as root, and capabilities cannot be dropped: {tried.stderr.strip()}")
    return NO_OVERRIDE


def test_an_output_that_becomes_read_only_loses_no_volume(
    tmp_path: Path, out: Path, stoppable: tuple[str, ...]
) -> None:
    dicom = write_cohort(tmp_path / "dicom", 20)
    with Running(command(dicom, out), prefix=stoppable) as run:
        run.wait_until(lambda: len(done(out)) >= 3)
        closed = [out, out / "dicom", out / WORK_FOLDER]
        for folder in closed:
            folder.chmod(0o555)
        code = run.end()
    for folder in closed:
        folder.chmod(0o755)
    assert code == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"gpuprep: cannot write into {out}: [Errno 13] Permission denied")
    assert {f"dicom/{name}" for name, status in statuses(out).items() if status == "ok"} <= done(out)
    before = marks(out)
    assert len(before) >= 3
    again = gpuprep(*run_words(dicom, out))
    assert (again.returncode, again.stderr) == (0, "")
    assert {folder: marks(out)[folder] for folder in before} == before
    undisturbed = tmp_path / "undisturbed"
    assert gpuprep(*run_words(dicom, undisturbed)).returncode == 0
    assert whole(out) == whole(undisturbed)
    assert unfinished_outputs(out) == []


def test_a_manifest_that_becomes_read_only_ends_the_run(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Manifest] = []

    def noted(*args: Any) -> Manifest:
        opened.append(real(*args))
        return opened[-1]

    class ReadOnlyFromTheSecondOn(Listener):
        def finished(self, result: SeriesResult) -> None:  # noqa: ARG002
            opened[0]._db.execute("PRAGMA query_only = 1")

    real = sys.modules["gpuprep.pipeline.cohort"].open_manifest
    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.pipeline.cohort.open_manifest", noted)
        with pytest.raises(OutputError, match=f"^cannot write into {out}: attempt to write a readonly database$"):
            go(dicom, out, listener=ReadOnlyFromTheSecondOn())
    assert len(done(out)) >= 2
    assert len(rows(out)) == 1
    before = marks(out)
    assert go(dicom, out).counts == {"skipped": 1, "ok": 3}
    assert {folder: marks(out)[folder] for folder in before} == before
    go(dicom, out.with_name("undisturbed"))
    assert whole(out) == whole(out.with_name("undisturbed"))


# --- the input


@pytest.mark.parametrize("jobs", [None, 2])
def test_a_series_that_vanishes_before_it_is_read_is_named(dicom: Path, out: Path, jobs: int | None) -> None:
    run = go(dicom, out, jobs=jobs, listener=Planned(lambda: shutil.rmtree(dicom / "s002")))
    assert run.exit_code == 1
    found = rows(out)
    assert {name: row["status"] for name, row in found.items() if name != "s002"} == dict.fromkeys(
        ["s000", "s001", "s003"], "ok"
    )
    assert found["s002"]["status"] in ("rejected", "failed")
    assert re.search(r"S1-000\d\.dcm.*(No such file|not found|gone|missing)", found["s002"]["reason"])
    assert done(out) == {"dicom/s000", "dicom/s001", "dicom/s003"}
    assert unfinished_outputs(out) == []


def test_a_file_that_vanishes_is_named(dicom: Path, out: Path) -> None:
    go(dicom, out, listener=Planned((dicom / "s001" / "S1-0003.dcm").unlink))
    row = rows(out)["s001"]
    assert row["status"] in ("rejected", "failed")
    assert "S1-0003.dcm" in row["reason"]


def test_former_outputs_of_vanished_inputs_are_kept(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = tree(out)
    other = Recipe(size=(26, 26))
    run = go(dicom, out, recipe=other, listener=Planned(lambda: shutil.rmtree(dicom)))
    assert run.exit_code == 1
    after = tree(out)
    assert {k: v for k, v in after.items() if k != "recipe.toml"} == {
        k: v for k, v in before.items() if k != "recipe.toml"
    }
    for name, row in rows(out).items():
        assert row["status"] in ("rejected", "failed")
        assert row["folder"] == f"dicom/{name}"
        assert json.loads(row["warnings"])[-1] == f"the output of an earlier run is still in dicom/{name}"
    known = rows(out)
    with pytest.raises(RequestError, match="dicom"):
        go(dicom, out)
    command_line = gpuprep(*run_words(dicom, out))
    assert command_line.returncode == 2
    assert str(dicom) in one_line(command_line.stderr)
    assert rows(out) == known
    assert {k: v for k, v in tree(out).items() if k.endswith(".tif")} == {
        k: v for k, v in before.items() if k.endswith(".tif")
    }


# --- the manifest


def garbled(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 64)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """Flip every bit of a page in the middle."""
    content = bytearray(file.read_bytes())
    assert len(content) > 40 * 4096
    middle = len(content) // 8192 * 4096
    content[middle : middle + 4096] = bytes(255 - byte for byte in content[middle : middle + 4096])
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [garbled, truncated, flipped])
def test_a_damaged_manifest_gives_one_line_and_loses_no_volume(
    dicom: Path, out: Path, damage: Callable[[Path], None]
) -> None:
    go(dicom, out)
    manifest = out / "manifest.sqlite"
    undisturbed, before = whole(out), marks(out)
    with closing(sqlite3.connect(manifest)) as db, db:  # a large manifest, like that of many series
        columns = [name for _, name, *_ in db.execute("PRAGMA table_info(series)")]
        row = dict(zip(columns, db.execute("SELECT * FROM series").fetchone(), strict=True))
        for n in range(400):
            other = row | {"key": f"9.9.{n}", "series_uid": f"9.9.{n}", "folder": "", "status": "rejected"}
            db.execute(
                f"INSERT INTO series ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",  # noqa: S608
                list(other.values()),
            )
    damage(manifest)
    content = manifest.read_bytes()
    run = gpuprep(*run_words(dicom, out))
    assert (run.returncode, run.stdout) == (1, "")
    line = one_line(run.stderr)
    assert line.startswith(f"gpuprep: {manifest} cannot be used as manifest (")
    assert line.endswith(
        "): move it away, or choose another --out; without it, complete volumes are recognised by their volume.json "
        "and kept"
    )
    for words in (("status", out), ("manifest", out), ("verify", out), ("retry", out), ("merge", out)):
        looked = gpuprep(*words)
        assert "Traceback" not in looked.stderr, words
        assert looked.returncode in (0, 1), words
        assert looked.returncode == 0 or str(manifest) in one_line(looked.stderr), words
    assert manifest.read_bytes() == content  # the damaged file is unchanged
    manifest.rename(out.with_name("damaged"))
    again = gpuprep(*run_words(dicom, out))
    assert (again.returncode, again.stderr) == (0, "")
    assert marks(out) == before
    assert whole(out) == undisturbed


# --- two runs at once

TAKEN = "another gpuprep is writing into {out}: wait for it, or choose another --out"


def taken(out: Path) -> str:
    return re.escape(TAKEN.format(out=out))


def test_a_second_run_into_the_same_output_is_refused(dicom: Path, out: Path) -> None:
    seen: list[subprocess.CompletedProcess[str]] = []

    def second() -> None:
        seen.extend((python(*command(dicom, out)), gpuprep("verify", out), gpuprep("merge", out)))

    assert go(dicom, out, listener=Planned(second)).counts == {"ok": 4}
    refused, verified, merged = seen
    assert (refused.returncode, refused.stderr) == (2, f"gpuprep: {TAKEN.format(out=out)}\n")
    assert (merged.returncode, merged.stderr) == (2, f"gpuprep: {TAKEN.format(out=out)}\n")
    assert (verified.returncode, verified.stderr) == (
        2,
        f"gpuprep: a run is writing into {out}: verify it afterwards\n",
    )
    go(dicom, out.with_name("undisturbed"))
    assert whole(out) == whole(out.with_name("undisturbed"))


def test_different_shards_run_concurrently_and_other_runs_are_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicom = write_cohort(tmp_path / "dicom", 12)
    counts: dict[str, int] = {}

    def beside_a_shard() -> None:
        for shard in (Shard(1, 2), WHOLE_COHORT):
            with pytest.raises(RequestError, match=taken(out)):
                go(dicom, out, shard=shard)
        counts["second"] = len(go(dicom, out, shard=Shard(2, 2)).results)

    counts["first"] = len(go(dicom, out, shard=Shard(1, 2), listener=Planned(beside_a_shard)).results)
    assert counts["first"] + counts["second"] == 12
    before = marks(out)
    monkeypatch.setattr("gpuprep.output.folder_store.WHOLE_LOCK_TIMEOUT_S", 0.1)

    def beside_everything() -> None:
        for shard in (Shard(1, 2), WHOLE_COHORT):
            with pytest.raises(RequestError, match=taken(out)):
                go(dicom, out, shard=shard)

    assert go(dicom, out, listener=Planned(beside_everything)).counts == {"skipped": 12}
    assert marks(out) == before


def test_asking_for_the_status_does_not_block_a_run(dicom: Path, out: Path) -> None:
    # Status checks whether a run holds the lock by acquiring it for a moment.
    go(dicom, out)
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db, db:
        db.execute("UPDATE runs SET state = 'running'")
    asking = (
        "import sys, time\nfrom pathlib import Path\nfrom gpuprep.output.folder_store import is_open\n"
        "print(flush=True)\nwhile True: is_open(Path(sys.argv[1])), time.sleep(0.005)"
    )
    asker = subprocess.Popen([sys.executable, "-c", asking, str(out)], stdout=subprocess.PIPE)
    try:
        assert asker.stdout is not None
        asker.stdout.readline()
        for _ in range(50):
            with open_output(out):
                pass
    finally:
        asker.kill()
        asker.communicate()


# --- Ctrl-C


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("many") / "dicom", 24)


FINISHING = "gpuprep: finishing the series in flight; interrupt again to end those that are not on disk yet"
INTERRUPTED = "gpuprep: interrupted; completed outputs are kept: run the same command again to continue"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_finishes_the_series_in_progress(many: Path, out: Path) -> None:
    with Running(command(many, out)) as run:
        run.wait_until(lambda: len(done(out)) >= 3)
        run.signal(signal.SIGINT)
        code = run.end()
    assert code == 130
    assert run.stderr.splitlines() == [FINISHING, INTERRUPTED]
    found = rows(out)
    assert {row["status"] for row in found.values()} == {"ok"}
    assert {row["folder"] for row in found.values()} == done(
        out
    )  # every series that was started was finished and recorded
    assert 3 <= len(found) < 24
    assert unfinished_outputs(out) == []
    assert findings(out) == []
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        assert db.execute("SELECT state FROM runs").fetchall() == [("interrupted",)]
    before = marks(out)
    assert gpuprep(*run_words(many, out)).returncode == 0
    assert {folder: marks(out)[folder] for folder in before} == before
    assert len(done(out)) == 24


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_twice_stops_at_once(tmp_path: Path, out: Path) -> None:
    # Two series that become 1200 slices on two workers: none is finished at the first signal.
    dicom = write_cohort(tmp_path / "dicom", 2)
    with Running(command(dicom, out, "--spacing", "0.01,1,1")) as run:
        run.wait_until(lambda: len(unfinished_outputs(out)) == 2)
        run.signal(signal.SIGINT)
        time.sleep(0.2)
        run.signal(signal.SIGINT)
        code = run.end()
    assert code == 130
    assert run.stderr.splitlines() == [FINISHING, INTERRUPTED]
    assert {row["folder"] for row in rows(out).values()} == done(out)
    assert len(done(out)) < 2
    assert unfinished_outputs(out) == []
    assert findings(out) == []


# --- limits


class SleepyBackend(NumpyBackend):
    """Backend that never finishes series of 7 slices."""

    def to_device(self, host: Any) -> Any:
        if host.shape == (7,):  # the rescale slopes, one per slice
            time.sleep(3600)
        return host


class DeadlyBackend(NumpyBackend):
    """Backend that kills its process on series of 7 slices, like the kernel does when memory runs out.

    It appends a line to the file in the environment variable GPUPREP_TEST_DEATHS.
    """

    def to_device(self, host: Any) -> Any:
        if host.shape == (7,):
            with open(os.environ["GPUPREP_TEST_DEATHS"], "a") as f:
                f.write("dead\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return host


def test_a_series_that_exceeds_the_time_limit_fails_without_affecting_others(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(dicom, 1, slices=7, first=4)
    monkeypatch.setattr("gpuprep.executors.resources.get_backends", lambda *_: [SleepyBackend("matmul")])
    run = go(dicom, out, jobs=2, limit_s=20)
    assert run.exit_code == 1
    assert statuses(out) == {**dict.fromkeys(names(4), "ok"), "s004": "failed"}
    row = rows(out)["s004"]
    assert row["codes"] == '["time"]'
    assert row["reason"] == (
        "OverdueError: not finished after 20 s, the limit set by --time-limit: raise it, and gpuprep retry tries it "
        "again"
    )
    assert unfinished_outputs(out) == []


def test_a_time_limit_requires_worker_processes(dicom: Path, out: Path) -> None:
    with pytest.raises(RequestError, match=r"^a time limit needs jobs: nothing can end a series in this process$"):
        go(dicom, out, limit_s=5)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_series_that_kills_its_worker_is_tried_twice_and_then_fails(
    dicom: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(dicom, 1, slices=7, first=4)
    deaths = tmp_path / "deaths"
    monkeypatch.setattr("gpuprep.executors.resources.get_backends", lambda *_: [DeadlyBackend()])
    script = (
        "import sys, os; sys.path.insert(0, os.environ['GPUPREP_TESTS'])\n"
        "import gpuprep.executors.resources, gpuprep.pipeline.cohort, test_faults\n"
        "gpuprep.executors.resources.get_backends = lambda *_: [test_faults.DeadlyBackend()]\n"
        "from gpuprep import Recipe\n"
        "convert = gpuprep.pipeline.cohort.convert\n"
        "run = convert(sys.argv[1], sys.argv[2], Recipe(size=(24, 24)), backend='cpu', jobs=2)\n"
        "raise SystemExit(run.exit_code)"
    )
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([tests, *filter(None, sys.path)])
    ran = python(
        "-c", script, str(dicom), str(out),
        env=os.environ | {"GPUPREP_TESTS": tests, "GPUPREP_TEST_DEATHS": str(deaths), "PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    assert deaths.read_text() == "dead\ndead\n"
    assert statuses(out) == {**dict.fromkeys(names(4), "ok"), "s004": "failed"}
    row = rows(out)["s004"]
    assert row["codes"] == '["worker-died"]'
    assert row["reason"] == (
        "WorkerDiedError: the worker was killed, most often for lack of memory: use fewer --jobs; it has ended 2 "
        "workers, and is set aside: gpuprep retry tries it again"
    )
    monkeypatch.undo()
    again = gpuprep("retry", out, "--backend", "cpu", "--jobs", "1", "--quiet", "--index", "none")
    assert (again.returncode, again.stderr) == (0, "")
    assert set(statuses(out).values()) == {"ok"}


# --- replacement of outputs in two steps

KILLED_BETWEEN = """
import os, pathlib, sys
import gpuprep, gpuprep.output.folder_store
gpuprep.output.folder_store._exchanged = lambda *_: False
rename = pathlib.Path.rename
def ends(path, target):
    if pathlib.Path(target).name == "s001":
        os._exit(9)
    return rename(path, target)
pathlib.Path.rename = ends
gpuprep.convert(sys.argv[1], sys.argv[2], gpuprep.Recipe(size=(26, 26)), backend="cpu")
"""


def test_a_former_output_is_restored_if_the_run_is_killed_during_its_replacement(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = {k: v for k, v in tree(out).items() if k.startswith("dicom/s001/")}
    assert python("-c", KILLED_BETWEEN, str(dicom), str(out)).returncode == 9
    assert not (out / "dicom" / "s001").exists()
    assert any(name.endswith(".place") for name in unfinished_outputs(out))
    with open_output(out):
        assert {k: v for k, v in tree(out).items() if k.startswith("dicom/s001/")} == before
        assert unfinished_outputs(out) == []
    undisturbed = out.with_name("undisturbed")
    for place in (out, undisturbed):
        assert gpuprep(*run_words(dicom, place, "--size", "26")).returncode == 0
    assert whole(out) == whole(undisturbed)


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_former_output_is_restored_if_its_replacement_fails(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch, exc: BaseException
) -> None:
    go(dicom, out)
    before = {k: v for k, v in tree(out).items() if k.startswith("dicom/s001/")}
    rename = Path.rename
    left = 1

    def fails_once(path: Path, target: Path) -> Path:
        nonlocal left
        if Path(target).name == "s001" and left:
            left = 0
            raise exc
        return rename(path, target)

    other = Recipe(size=(26, 26))
    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.output.folder_store._exchanged", lambda *_: False)
        patch.setattr(Path, "rename", fails_once)
        if isinstance(exc, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                go(dicom, out, recipe=other)
        else:
            go(dicom, out, recipe=other)
            row = rows(out)["s001"]
            assert (row["status"], row["folder"]) == ("failed", "dicom/s001")
    assert {k: v for k, v in tree(out).items() if k.startswith("dicom/s001/")} == before
    assert unfinished_outputs(out) == []
    assert go(dicom, out, recipe=other).exit_code == 0
    go(dicom, out.with_name("undisturbed"), recipe=other)
    assert whole(out) == whole(out.with_name("undisturbed"))


# --- the log


@pytest.mark.parametrize("format_", ["text", "json"])
def test_the_log_is_machine_readable_and_has_no_names_or_paths(tmp_path: Path, out: Path, format_: str) -> None:
    dicom = write_cohort(tmp_path / "Quincey^Morris" / "secret-1897", 3)
    (dicom / "s001" / "S1-0003.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 64)
    os.truncate(dicom / "s002" / "S1-0003.dcm", (dicom / "s002" / "S1-0003.dcm").stat().st_size - 50)
    log = tmp_path / "log"
    run = gpuprep(*run_words(dicom, out, "--log", str(log), "--log-format", format_))
    assert run.returncode == 1
    text = log.read_text()
    for word in ("Quincey", "Morris", "secret", "s000", "s001", "s002", ".dcm", str(tmp_path), "Phantom", "PHANTOM"):
        assert word not in text, word
    events = []
    for line in text.splitlines():
        if format_ == "json":
            record = json.loads(line)
            assert record["level"] in ("info", "error")
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record["time"])
            events.append(record["event"])
        else:
            parts = re.fullmatch(
                r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (info |error) (\w+) +((?:\w+=.*?(?: |$))+)", line
            )
            assert parts, line
            events.append(parts[2])
    assert events[:2] == ["scanned", "planned"]
    assert events[-1] == "ended"
    assert len(events) == 3 + len(rows(out))
    assert sorted(events[2:-1]) == sorted(statuses(out).values())
