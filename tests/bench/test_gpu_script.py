"""`bench/gpu.sh` and the benchmarks that it starts, as far as they run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.micro import kernels, parity
from bench.scale import workers

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PARTS = ["doctor", "tests", "parity", "kernels", "workers", "compare"]

STUB = """#!/bin/sh
case "$*" in
*"doctor --gpu --json"*) echo '{"trusted": true}' ;;
*bench.micro.parity*) echo "4.2 HU is too much"; exit 1 ;;
*bench.micro.kernels*) kill -9 $$ ;;
*) echo "ran $*" ;;
esac
"""
"""Stands for python3: one part fails, another one is killed, the others succeed."""


def run(*arguments: Path | str, path: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": path}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


def test_a_part_that_fails_does_not_stop_the_next_ones(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STUB)
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = run("-", tmp_path / "out", path=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    summary = lines[lines.index(f"== summary: figures in {tmp_path / 'out'}") + 1 :]
    assert [line.split(":")[0] for line in summary] == PARTS
    assert summary[2].startswith("parity: failed with exit code 1")
    assert summary[2].endswith(": 4.2 HU is too much")
    assert summary[3].startswith("kernels: ")
    assert "done in" not in summary[3]
    assert all(": done in" in summary[n] for n in (0, 1, 4, 5))
    assert json.loads((tmp_path / "out" / "doctor-gpu.json").read_text()) == {"trusted": True}
    assert "-m pytest -q -m gpu" in (tmp_path / "out" / "tests-gpu.txt").read_text()


def test_a_folder_of_wheels_that_is_absent_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "absent", path=os.environ["PATH"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: bench/gpu.sh" in done.stderr


def test_the_script_stays_below_ten_minutes() -> None:
    text = SCRIPT.read_text()
    assert int(text.split("TOTAL_S=")[1].split()[0]) <= 595
    limits = [int(line.split()[2]) for line in text.splitlines() if line.startswith("run_part ")]
    assert len(limits) == len(PARTS)


def test_a_cohort_is_converted_by_different_numbers_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--backend", "cpu", "--series", "3", "--workers", "1", "2", "--shape", "6,24,24"]
    monkeypatch.setattr(
        sys, "argv", ["workers", *arguments, "--scratch", str(tmp_path), "--out", str(tmp_path / "w.json")]
    )
    assert workers.main() == 0
    found = json.loads((tmp_path / "w.json").read_text())
    assert [(r["workers"], r["started_workers"]) for r in found["runs"]] == [(2, 2), (1, 1)]
    assert all(r["series_per_s"] == pytest.approx(3 / r["seconds"]) for r in found["runs"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json"]


def test_the_loops_of_the_cpu_agree_with_numpy_and_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.json"
    monkeypatch.setattr(sys, "argv", ["parity", "--backend", "cpu", "--shape", "6,24,24", "--out", str(out)])
    assert parity.main() == 0
    rows = json.loads(out.read_text())["runs"]
    assert [(r["engine"], r["agrees"]) for r in rows] == [("operators", True), ("operators", True), ("ndimage", True)]
    monkeypatch.setattr(parity, "largest_difference_hu", lambda *_: float("nan"))
    assert parity.main() == 1


def test_the_default_setting_of_both_engines_is_measured_first() -> None:
    class Gpu:
        slab_slices, chunk_slices = 32, 64

    expected = [("operators", 32, 64), ("ndimage", 32, 64), ("operators", 8, 64)]
    assert kernels.settings(Gpu(), [8, 32], [64]) == expected
