"""Measures memory over a long run, to show that it does not grow with the number of converted series.

    python -m bench.scale.endurance [--series 500] [--out bench/results/endurance-….json]

Converts many small series in one run, and records the memory (PSS) of parent and workers after each tenth of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import gpuprep
from bench.measure import save, tree
from gpuprep.core.recipe import Recipe
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.events import Listener
from gpuprep.testing import thorax, write_series

SHAPE, SPACING_MM = (40, 128, 128), (3.0, 2.7, 2.7)


class _MemoryLog(Listener):
    """Records the memory of parent and workers after each tenth of the series."""

    def __init__(self, series: int) -> None:
        self._every = max(1, series // 10)
        self._done = 0
        self.samples: list[dict[str, Any]] = []

    def finished(self, result: SeriesResult) -> None:
        if result.status != "ok":
            raise SystemExit(f"{result.key} {result.status}: {result.reason}")
        self._done += 1
        if self._done % self._every == 0:
            parent, *others = (p.memory_full_info().pss for p in tree(psutil.Process()))
            self.samples.append({"series": self._done, "parent_bytes": parent, "others_bytes": sum(others)})
            print(
                f"{self._done:5} series  parent {parent / 1e6:5.0f} MB  others {sum(others) / 1e6:5.0f} MB", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    memory_log = _MemoryLog(args.series)
    try:
        stored = thorax(SHAPE, SPACING_MM)
        for n in range(args.series):
            write_series(scratch / "dicom" / f"patient-{n}", stored, SPACING_MM)
        started = time.perf_counter()
        jobs = len(os.sched_getaffinity(0))
        recipe = Recipe(dtype="uint8", size=(128, 128))
        gpuprep.convert(scratch / "dicom", scratch / "out", recipe, backend="cpu", jobs=jobs, listener=memory_log)
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    first, last = memory_log.samples[1], memory_log.samples[-1]
    growth = {key: last[key] / first[key] - 1 for key in ("parent_bytes", "others_bytes")}
    print(f"from the second tenth to the last: {', '.join(f'{key} {g:+.1%}' for key, g in growth.items())}")
    figures = {
        "series": args.series,
        "shape": SHAPE,
        "seconds": seconds,
        "weights": memory_log.samples,
        "growth": growth,
    }
    save(args.out, "bench.scale.endurance", figures)


if __name__ == "__main__":
    main()
