"""Tiny cohorts, runs over them in separate processes, and readers of their outputs without gpuprep."""

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
from gpuprep.compute.backend import numba_works
from gpuprep.executors.fork_server import LOOP_MODULES, VOLUME_MODULES
from gpuprep.testing import write_series

SIZE = 24
RECIPE = ("--size", str(SIZE))
TIMES = ("finished", "read_s", "process_s", "write_s", "upload_s", "kernels_s", "download_s", "masks_s", "host")
"""Columns in which two runs over the same cohort may differ."""
WORK_FOLDER = ".gpuprep"
LIGHT = {"NUMBA_DISABLE_JIT": "1"}
"""Run without Numba, whose import takes a second per run. Compare such runs only with each other: compiled loops may
round differently."""
Tree = dict[str, bytes]
Row = dict[str, Any]


def write_cohort(root: Path, series: int, slices: int = 6, first: int = 0) -> Path:
    """Write series of 16 × 16 into a folder each: s000, s001, …"""
    for n in range(first, first + series):
        stored = np.random.default_rng(n).integers(0, 3000, (slices, 16, 16)).astype(np.int16)
        write_series(root / f"s{n:03d}", stored, (2.0, 0.8, 0.7))
    return root


def run_words(dicom: Path, out: Path, *more: str, jobs: int = 2) -> list[str]:
    """Return the words of a command that converts a cohort, without the name of the program."""
    common = ("--backend", "cpu", "--jobs", str(jobs), "--index", "none", "--quiet")
    return ["convert", str(dicom), "--out", str(out), *RECIPE, *common, *more]


def command(dicom: Path, out: Path, *more: str, jobs: int = 2) -> list[str]:
    """Return the arguments of Python for a run."""
    return ["-m", "gpuprep", *run_words(dicom, out, *more, jobs=jobs)]


def gpuprep(*words: str | Path, loops: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves seconds; without compiled loops it writes what `python` writes.

    Its workers come from the fork server of this process, as those of later runs will. So it must have the environment
    of this process, and the modules of compiled loops, which each of their workers would otherwise import.
    """
    command_line = [str(word) for word in words]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            if numba_works() and not loops:
                modules = tuple(dict.fromkeys((*VOLUME_MODULES, *LOOP_MODULES)))
                patch.setattr("gpuprep.executors.resources.VOLUME_MODULES", modules)
                patch.setattr("gpuprep.compute.backend.numba_works", lambda: False)
            ran = CliRunner().invoke(app, command_line)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return subprocess.CompletedProcess(command_line, ran.exit_code, ran.stdout, ran.stderr)


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python until it ends."""
    options["env"] = options.get("env", os.environ) | LIGHT
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300, **options)
    ran.stderr = complaints(ran.stderr)
    return ran


class Running:
    """A run in a separate process group, killed at the end of the block if it is still running."""

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
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, true: Callable[[], bool]) -> bool:
        """Wait until `true` holds or the run ends; return whether it holds."""
        while not true():
            if not self.is_running:
                return true()  # it may have become true just before the end
            time.sleep(0.001)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process alone, like ``kill``; a terminal signals the whole group."""
        self._process.send_signal(number)

    def kill_all(self) -> None:
        """Kill the run and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait until all processes of the run, which share its streams, have ended; return the exit code."""
        try:
            _, stderr = self._process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail("a process of the run is still running")
        self.stderr = complaints(stderr)
        return self._process.returncode


def complaints(stderr: str) -> str:
    """Return stderr without the message about compiling, which depends on the speed of the machine."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("compiling the inner"))


def done(out: Path) -> set[str]:
    """Return the output folders with a volume.json."""
    found = set()
    with suppress(OSError):
        for top in os.scandir(out):
            if top.is_dir() and top.name != WORK_FOLDER:
                found |= {f"{top.name}/{e.name}" for e in os.scandir(top) if os.path.exists(f"{e.path}/volume.json")}
    return found


def unfinished_outputs(out: Path, shard: str = "") -> list[str]:
    """Return unfinished outputs: everything in the temporary folder except locks and the folders of shards."""
    try:
        names = os.listdir(out / WORK_FOLDER / shard)
    except OSError:
        return []
    return sorted(name for name in names if name != "lock" and "-of-" not in name)


def marks(out: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, modification time and size of each volume.json, which change if a volume is written again."""
    found = {}
    for folder in done(out):
        stat = (out / folder / "volume.json").stat()
        found[folder] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def tree(out: Path) -> Tree:
    """Return every file below OUT, except the temporary folder and the manifest, which contains times."""
    found: Tree = {}
    for folder, below, names in os.walk(out):
        if Path(folder) == out:
            below[:] = [name for name in below if name != WORK_FOLDER]
            names = [name for name in names if not name.startswith("manifest.")]
        for name in names:
            file = Path(folder, name)
            found[file.relative_to(out).as_posix()] = file.read_bytes()
    return found


def rows(out: Path, manifest: str = "manifest.sqlite") -> dict[str, Row]:
    """Return the rows of a manifest by the name of the source folder, without times."""
    with closing(sqlite3.connect(out / manifest)) as db:
        db.row_factory = sqlite3.Row
        found = [dict(row) for row in db.execute("SELECT * FROM series")]
    return {os.path.basename(r["source"]): {k: v for k, v in r.items() if k not in TIMES} for r in found}


def other_tables(out: Path) -> dict[str, list[Any]]:
    """Return the other tables of a manifest, except its runs."""
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        names = ("unreadable", "passed_over", "segmentations", "label_values")
        return {name: sorted(db.execute(f"SELECT * FROM {name}")) for name in names}  # noqa: S608


def whole(out: Path) -> tuple[Tree, dict[str, Row], dict[str, list[Any]]]:
    """Return everything that must be equal after two runs over the same cohort."""
    return tree(out), rows(out), other_tables(out)


def findings(out: Path) -> list[Any]:
    """Return the findings of ``gpuprep verify``."""
    verified = gpuprep("verify", out, "--json", "--jobs", "1")
    assert verified.stderr == ""
    found: list[Any] = json.loads(verified.stdout)
    assert verified.returncode == (1 if found else 0)
    return found


def children(pid: int) -> list[int]:
    """Return the child processes of a process; Linux only."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] not in "ZX":
                    found.append(int(name))
    return found


def descendants(pid: int) -> list[int]:
    """Return the child processes of a process, and theirs."""
    found = children(pid)
    for child in found:
        found = [*found, *descendants(child)]
    return found


def command_line_of(pid: int) -> str:
    """Return the command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
