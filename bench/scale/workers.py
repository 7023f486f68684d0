"""Measures a cohort from disk to disk with different numbers of worker processes.

    python -m bench.scale.workers [--backend gpu|cpu] [--series 64] [--workers 1 2 4 8 16] [--out bench/results/….json]

The series are phantoms of 108 × 512 × 512, converted by the default recipe to uint8. Each run reads all headers and
files again, from the page cache if the cohort fits. The largest number of workers comes first. Figures are written
after each run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.compare.contenders import AbsentError
from bench.compare.contenders.with_gpuprep import convert_all
from bench.measure import save, shape_argument
from gpuprep.compute.backend import get_backend
from gpuprep.errors import BackendError
from gpuprep.executors.cores import usable_cores
from gpuprep.testing import thorax, write_series

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
DISTINCT = 4
"""Number of different phantoms; the other series have their pixels."""


def write_cohort(root: Path, series: int, shape: tuple[int, int, int]) -> list[Path]:
    """Write phantoms in several processes; return their folders."""
    folders = [root / f"series-{n:03d}" for n in range(series)]
    with multiprocessing.get_context("spawn").Pool(min(DISTINCT, usable_cores(), series)) as pool:
        pool.starmap(_write_phantoms, [(seed, folders[seed::DISTINCT], shape) for seed in range(DISTINCT)])
    return folders


def _write_phantoms(seed: int, folders: list[Path], shape: tuple[int, int, int]) -> None:
    stored = thorax(shape, SPACING_MM, seed=seed)
    for folder in folders:
        write_series(folder, stored, SPACING_MM)


def timed(folders: list[Path], out: Path, *, gpu: bool, workers: int) -> dict[str, Any]:
    """Convert the cohort once; return the figures of the run."""
    started = time.perf_counter()
    answer = convert_all(folders, out, recipe={"dtype": "uint8"}, gpu=gpu, jobs=workers)
    seconds = time.perf_counter() - started
    return {
        "workers": workers,
        "started_workers": answer["workers"],
        "seconds": seconds,
        "series_per_s": len(folders) / seconds,
        "device": answer["device"],
        "mean_stage_s": answer["split"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--series", type=int, default=64)
    parser.add_argument("--shape", type=shape_argument, default=SHAPE, help="shape of a phantom: a small one to test")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    try:
        # Opened in this process only to find out early; the runs use worker processes.
        get_backend(args.backend)
    except BackendError as exc:
        print(f"no figures without a GPU: {exc}", file=sys.stderr)
        return exc.exit_code
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    runs: list[dict[str, Any]] = []
    figures = {"backend": args.backend, "series": args.series, "shape": args.shape, "runs": runs}
    try:
        folders, out = write_cohort(scratch / "dicom", args.series, args.shape), scratch / "out"
        for workers in sorted(args.workers, reverse=True):
            try:
                if not runs:  # compiles what is not compiled yet
                    timed(folders[:1], scratch / "first", gpu=args.backend == "gpu", workers=1)
                runs.append(run := timed(folders, out, gpu=args.backend == "gpu", workers=workers))
            except AbsentError as exc:
                print(f"no figures: {exc}", file=sys.stderr)
                return BackendError.exit_code
            print(
                f"{workers:3} workers ({run['started_workers']} started): {run['seconds']:6.1f} s, "
                f"{run['series_per_s']:.2f} series/s, scan {run['mean_stage_s']['scan_s']:.1f} s",
                flush=True,
            )
            save(args.out, "bench.scale.workers", figures, gpu=args.backend == "gpu")
            shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
