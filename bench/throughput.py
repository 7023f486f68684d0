"""Time and peak memory of ``gpuprep convert`` against ``bench/classic.py``, disk to disk, as whole commands.

    python -m bench.throughput [--series 4] [--rounds 2] [--out bench/results/throughput-….json]

A cohort of phantoms (108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm) is written first, and both commands are run on it in
turn, start-up included, so that slow minutes of the machine hit both. Both write one float32 .tif per slice. Last, the
output of ``gpuprep convert --recipe classic`` is compared with the script's. Memory is the highest sum, over all
processes of a command, of the memory they do not share plus their part of what they do (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile

from gpuprep.conversion import versions
from gpuprep.phantom import thorax, write_series

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
SAMPLING_S = 0.02


@dataclass
class Measured:
    """One command, once."""

    seconds: float
    peak_bytes: int
    """Sum of PSS over the processes of the command."""


def measure(command: list[str]) -> Measured:
    """Run a command to its end while watching the memory of all its processes."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_S):
            total = 0
            for p in _tree(process):
                try:
                    total += p.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue  # it has just ended
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended {process.returncode}:\n{errors.decode()}")
    return Measured(seconds, peak)


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def largest_difference(a: Path, b: Path) -> float:
    """Return the largest difference between two folders of equal slices."""
    names = sorted(f.name for f in a.glob("*.tif"))
    if names != sorted(f.name for f in b.glob("*.tif")) or not names:
        raise SystemExit(f"{a} and {b} do not hold the same slices")
    return max(float(np.abs(tifffile.imread(a / n) - tifffile.imread(b / n)).max()) for n in names)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="gpuprep convert against bench/classic.py")
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", type=int, help="for gpuprep; its own default where absent")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()

    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        cohort = scratch / "dicom"
        folders = []
        for n in range(args.series):
            folder = cohort / f"patient-{n}"
            write_series(folder, thorax(SHAPE, SPACING_MM, seed=n), SPACING_MM)
            folders.append(str(folder))
        classic = [
            sys.executable,
            str(Path(__file__).parent / "classic.py"),
            *folders,
            "--out",
            str(scratch / "classic"),
        ]
        convert = [sys.executable, "-m", "gpuprep", "convert", str(cohort), "--backend", "cpu"]
        convert += ["--jobs", str(args.jobs)] if args.jobs else []
        ours = [*convert, "--out", str(scratch / "gpuprep")]

        runs: dict[str, list[Measured]] = {"classic": [], "gpuprep": []}
        for _ in range(args.rounds):
            for name, command in (("classic", classic), ("gpuprep", ours)):
                shutil.rmtree(scratch / name, ignore_errors=True)
                os.sync()
                runs[name].append(now := measure(command))
                print(f"{name:8} {now.seconds / args.series:7.3f} s/series  {now.peak_bytes / 1e6:7.0f} MB", flush=True)
        check = scratch / "check"
        measure([*convert, "--out", str(check), "--recipe", "classic"])
        difference = largest_difference(scratch / "classic" / "patient-0", check / "dicom" / "patient-0")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    seconds = {name: statistics.median(m.seconds for m in measured) for name, measured in runs.items()}
    peaks = {name: max(m.peak_bytes for m in measured) for name, measured in runs.items()}
    result = {
        "command": "python -m bench.throughput " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "series": args.series,
        "shape": SHAPE,
        "spacing_mm": SPACING_MM,
        "runs": {name: [asdict(m) for m in measured] for name, measured in runs.items()},
        "seconds_per_series": {name: s / args.series for name, s in seconds.items()},
        "times_faster": seconds["classic"] / seconds["gpuprep"],
        "peak_bytes": peaks,
        "memory_share": peaks["gpuprep"] / peaks["classic"],
        "classic_recipe_largest_difference": difference,
    }
    print(
        f"gpuprep is {result['times_faster']:.1f} times as fast, in {result['memory_share']:.2f} of the memory; "
        f"its classic recipe differs from the script by at most {difference:.1e} of [0, 1]"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
