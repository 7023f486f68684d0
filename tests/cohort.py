"""A cohort of tiny series, runs over it in processes of their own, and what they leave, read without gpuprep."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpuprep.cli.app import app
from gpuprep.testing import write_series

SIZE = 24
RECIPE = ("--size", str(SIZE))
TIMES = ("finished", "read_s", "process_s", "write_s", "upload_s", "kernels_s", "download_s", "masks_s", "host")
"""Columns in which two runs over the same cohort may differ."""
WORKSHOP = ".gpuprep"
LIGHT = {"NUMBA_DISABLE_JIT": "1"}
"""Numba is a second's work to import, for every run; who moves the voxels does not matter here, if what is
compared was made alike: a run in the test's own process may round otherwise."""
Tree = dict[str, bytes]
Row = dict[str, Any]


def write_cohort(root: Path, series: int, slices: int = 6, first: int = 0) -> Path:
    """Write series of 16 × 16 into a folder each: s000, s001, …"""
    for n in range(first, first + series):
        stored = np.random.default_rng(n).integers(0, 3000, (slices, 16, 16)).astype(np.int16)
        write_series(root / f"s{n:03d}", stored, (2.0, 0.8, 0.7))
    return root


def command(dicom: Path, out: Path, *more: str, jobs: int = 2) -> list[str]:
    """Return the arguments of Python for a run."""
    common = ("--backend", "cpu", "--jobs", str(jobs), "--index", "none", "--quiet")
    return ["-m", "gpuprep", "convert", str(dicom), "--out", str(out), *RECIPE, *common, *more]


def gpuprep(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of gpuprep to its end; in this process, which saves a second, if it converts nothing."""
    command_line = [str(word) for word in words]
    if options or command_line[0] in ("convert", "retry"):
        return python("-m", "gpuprep", *command_line, **options)
    ran = CliRunner().invoke(app, command_line)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return subprocess.CompletedProcess(command_line, ran.exit_code, ran.stdout, ran.stderr)


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    options["env"] = options.get("env", os.environ) | LIGHT
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300, **options)
    ran.stderr = complaints(ran.stderr)
    return ran


class Running:
    """A run in a process group of its own, which is at its end by the end of the block."""

    def __init__(self, words: list[str], *, prefix: Sequence[str] = (), **options: Any) -> None:
        self.stderr = ""
        options["env"] = options.get("env", os.environ) | LIGHT
        self._process = subprocess.Popen(
            [*prefix, sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self.kill_all()
            self._process.communicate()

    @property
    def is_on(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, true: Callable[[], bool]) -> bool:
        """Return whether something has become true while the run was on."""
        while not true():
            if not self.is_on:
                return true()  # just before it ended
            time.sleep(0.001)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the run itself, as a terminal does not, and ``kill`` does."""
        self._process.send_signal(number)

    def kill_all(self) -> None:
        """Kill the run and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait until the last of its processes has gone, which all hold its streams; return the exit code."""
        try:
            _, stderr = self._process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail("a process of the run is still there")
        self.stderr = complaints(stderr)
        return self._process.returncode


def complaints(stderr: str) -> str:
    """Return what was said, but for the word on compiling, which depends on the speed of the machine."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("compiling the inner"))


def done(out: Path) -> set[str]:
    """Folders whose volume.json is in its place."""
    found = set()
    with suppress(OSError):
        for top in os.scandir(out):
            if top.is_dir() and top.name != WORKSHOP:
                found |= {f"{top.name}/{e.name}" for e in os.scandir(top) if os.path.exists(f"{e.path}/volume.json")}
    return found


def in_the_making(out: Path, shard: str = "") -> list[str]:
    """What is not finished: whatever lies in the workshop, but for locks and the workshops of shards."""
    try:
        names = os.listdir(out / WORKSHOP / shard)
    except OSError:
        return []
    return sorted(name for name in names if name != "lock" and "-of-" not in name)


def marks(out: Path) -> dict[str, tuple[int, int, int]]:
    """What tells one writing of a volume from another: inode, time and size of each volume.json."""
    found = {}
    for folder in done(out):
        stat = (out / folder / "volume.json").stat()
        found[folder] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def tree(out: Path) -> Tree:
    """Every file below OUT, but for the workshop and the manifest, which hold times."""
    found: Tree = {}
    for folder, below, names in os.walk(out):
        if Path(folder) == out:
            below[:] = [name for name in below if name != WORKSHOP]
            names = [name for name in names if not name.startswith("manifest.")]
        for name in names:
            file = Path(folder, name)
            found[file.relative_to(out).as_posix()] = file.read_bytes()
    return found


def rows(out: Path, manifest: str = "manifest.sqlite") -> dict[str, Row]:
    """Rows of a manifest by the name of the source folder, without times."""
    with closing(sqlite3.connect(out / manifest)) as db:
        db.row_factory = sqlite3.Row
        found = [dict(row) for row in db.execute("SELECT * FROM series")]
    return {os.path.basename(r["source"]): {k: v for k, v in r.items() if k not in TIMES} for r in found}


def other_tables(out: Path) -> dict[str, list[Any]]:
    """What else a manifest holds, but for its runs."""
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        names = ("unreadable", "passed_over", "segmentations", "label_values")
        return {name: sorted(db.execute(f"SELECT * FROM {name}")) for name in names}  # noqa: S608


def whole(out: Path) -> tuple[Tree, dict[str, Row], dict[str, list[Any]]]:
    """Everything in which two runs over the same cohort must agree."""
    return tree(out), rows(out), other_tables(out)


def findings(out: Path) -> list[Any]:
    """What ``gpuprep verify`` finds."""
    verified = gpuprep("verify", out, "--json", "--jobs", "1")
    assert verified.stderr == ""
    found: list[Any] = json.loads(verified.stdout)
    assert verified.returncode == (1 if found else 0)
    return found


def children(pid: int) -> list[int]:
    """Processes that a process has started; Linux only."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] not in "ZX":
                    found.append(int(name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process and those that it has started have started."""
    found = children(pid)
    for child in found:
        found = [*found, *descendants(child)]
    return found


def words_of(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
