"""Compares the first scan of a folder tree with later ones: ``python -m bench.scale.rescan [--files N] [--out FILE]``.

Files have as many header elements as those of scanners, and few pixels, because only headers are read. Each scan runs
in a fresh process; its time is reported without and with the start of Python. Files are always in the page cache, which
favours the first scan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset

from bench.measure import machine
from gpuprep.core.versions import versions
from gpuprep.testing import write_series

SLICES = 200


def lengthen(ds: Dataset, k: int) -> None:
    """Add about seventy elements like those of scanners: text, numbers, sequences and private elements."""
    for element in range(0x1000, 0x1030):
        ds.add_new((0x0018, element), "LO", f"setting {element}")
    private = ds.private_block(0x0043, "PHANTOM", create=True)
    for n in range(16):
        private.add_new(n, "DS", ["1.0", "2.5", str(k)])
    for keyword in ("ReferencedStudySequence", "RequestAttributesSequence", "AnatomicRegionSequence"):
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "T-D3000", "SRT", "Chest"
        setattr(ds, keyword, [item])
    ds.Manufacturer, ds.KVP, ds.ConvolutionKernel, ds.SliceThickness = "PHANTOM", "120", "B40f", "2"


SCAN = """
import sys, time
from gpuprep.pipeline.scan import scan
from gpuprep.executors.cores import usable_cores
started = time.perf_counter()
found = scan(sys.argv[1], index=sys.argv[2], jobs=usable_cores())
cohort, planned = found.cohort, found.planned
print(time.perf_counter() - started)
for o in planned: print(o.verdict, o.series.key, o.audit.to_dict())
"""


def _scan(tree: Path, index: Path) -> dict[str, Any]:
    """Scan in a fresh process; return the seconds of the scan and of the process, and the verdicts."""
    started = time.perf_counter()
    command = [sys.executable, "-c", SCAN, str(tree), str(index)]
    seconds, *lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {"scan_s": round(float(seconds), 2), "process_s": round(time.perf_counter() - started, 2), "lines": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, index = Path(folder) / "tree", Path(folder) / "headers.sqlite"
        stored = np.random.default_rng(0).integers(0, 2000, (SLICES, 16, 16)).astype(np.int16)
        for n in range(options.files // SLICES):
            write_series(tree / f"series-{n:04d}", stored, (2.0, 1.0, 1.0), change=lengthen)
        runs = [_scan(tree, index) for _ in range(4)]
        if any(run["lines"] != runs[0]["lines"] for run in runs):
            raise SystemExit("a later scan gives other verdicts than the first")
        again = runs[1:]
        result = {
            "command": "python -m bench.scale.rescan " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "versions": versions(),
            "files": options.files // SLICES * SLICES,
            "first": {k: runs[0][k] for k in ("scan_s", "process_s")},
            "again": [{k: run[k] for k in ("scan_s", "process_s")} for run in again],
            "ratio_of_scans": round(runs[0]["scan_s"] / min(run["scan_s"] for run in again), 1),
            "ratio_of_processes": round(runs[0]["process_s"] / min(run["process_s"] for run in again), 1),
            "index_bytes": index.stat().st_size,
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
