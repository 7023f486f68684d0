"""Compares gpuprep with other programs, disk to disk: DICOM → 1 mm → window → 512² → .tif.

    python -m bench.compare [--data DIR] [--series 8] [--backend cpu|gpu] [--out bench/results/compare-….json]

First each contender converts the cohort (slow contenders: one series) while its memory is measured. The first series of
contenders that claim the same recipe is compared with SciPy in float64. Then all contenders take turns for some rounds,
so that slow minutes of the machine affect all of them. In each round a fresh process converts one series, which
measures the cold start, and then the timed cohort, or a few series for slow contenders (see the table). In between,
outputs are emptied and the disk is synchronised. The floor only reads the same input and writes as many files of the
same sizes. Programs that are not installed are listed as absent.

The ratio to gpuprep is the time of a contender over that of gpuprep with the same dtype (writing a stack, if the
contender writes one file).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.compare import agreement, cohort, report
from bench.compare.contenders import Contender, contenders, floors
from bench.compare.driver import Driver
from bench.compare.summary import summarise, without_paths
from bench.measure import MemoryWatch, machine, shape_argument
from gpuprep.executors.cores import usable_cores
from gpuprep.pipeline.convert_series import versions

RIVALS = ("numba", "SimpleITK", "monai", "torch", "torchio", "dcm2niix", "dicom2nifti")

SETTLE_S = 1.0
"""Pause after outputs are emptied, so that the disk has freed the space before the next output is timed."""


class Comparison:
    """One comparison: the cohort, a scratch folder, and a record per contender."""

    def __init__(self, folders: list[Path], scratch: Path, log: Callable[[str], None]) -> None:
        self.folders = folders
        self.records: dict[str, dict[str, Any]] = {}
        self.sizes_bytes: dict[str, dict[str, list[int]]] = {}
        """Sizes of the output files of each series, by name of the floor."""
        self._out = scratch / "out"
        self._cleaned = 0
        self._log = log
        self._expected: dict[str, NDArray[np.float32]] = {}
        self._source_shape: tuple[int, ...] = ()

    def watch_and_check(self, all_: list[Contender]) -> None:
        """Run each contender once for peak memory, output sizes and agreement with the reference."""
        hu, spacing_mm = agreement.hounsfield(self.folders[0])
        self._source_shape = hu.shape
        for claim, order in (("cubic", 3), ("linear", 1)):
            self._expected[claim] = agreement.reference(hu, spacing_mm, order)
            self._log(f"reference, {claim}")
        for contender in sorted(all_, key=lambda c: c.module != "notebook"):  # its values are a reference
            self._watch_and_check(contender)
        self._expected.clear()

    def _watch_and_check(self, contender: Contender) -> None:
        folders = self.folders if contender.series is None else self.folders[:1]
        record: dict[str, Any] = {"status": "ok", "note": contender.note, "dtype": contender.dtype}
        self.records[contender.name] = record
        with Driver(contender) as driver:
            with MemoryWatch(driver.process) as memory:
                answer = driver.ask(folders, self._out)
            if self._stopped(contender, answer):
                return
        record["peak_bytes"] = memory.peak_bytes
        record["largest_process_bytes"] = memory.largest_process_bytes
        record["series_watched"] = len(folders)
        record |= {k: answer[k] for k in ("device", "predicted_process_bytes") if k in answer}
        outputs = {f.name: self._out / answer.get("outputs", {}).get(f.name, f.name) for f in folders}
        if contender.floor is not None and contender.floor not in self.sizes_bytes:
            self.sizes_bytes[contender.floor] = {name: cohort.file_sizes_bytes(out) for name, out in outputs.items()}
        if contender.claim is not None:
            self._check(contender, record, outputs[self.folders[0].name])
        self._log(f"{contender.name}: {memory.peak_bytes / 1e6:.0f} MB" + _agreement_text(record))
        self._clean()

    def _check(self, contender: Contender, record: dict[str, Any], folder: Path) -> None:
        values = agreement.read_output(folder)
        if contender.module == "notebook":
            self._expected["classic"] = values
            return
        expected = self._expected.get(str(contender.claim))
        if expected is None:
            return
        record["tolerance_hu"] = tolerance_hu = agreement.tolerance_hu(contender.dtype)
        if values.shape != expected.shape:
            record |= {"agrees": False, "shape": values.shape}
            return
        record["largest_difference_hu"] = agreement.largest_difference_hu(values, expected)
        inside = agreement.inner(values.shape, self._source_shape, contender.border)
        record["border_left_out"] = contender.border
        record["largest_difference_inside_hu"] = agreement.largest_difference_hu(values[inside], expected[inside])
        record["agrees"] = record["largest_difference_inside_hu"] <= tolerance_hu

    def time(self, all_: list[Contender], until: float) -> None:
        """Time all contenders in turns; skip repeated rounds that would end after `until` (`time.perf_counter`)."""
        round_s: dict[str, float] = {}
        for n in range(max(c.rounds for c in all_)):
            for contender in all_:
                record = self.records.setdefault(contender.name, {"status": "ok", "dtype": contender.dtype})
                late = n > 0 and time.perf_counter() + round_s.get(contender.name, 0) > until
                if n < contender.rounds and record["status"] == "ok" and not late:
                    started = time.perf_counter()
                    self._time_once(contender, record, n)
                    round_s[contender.name] = time.perf_counter() - started

    def _time_once(self, contender: Contender, record: dict[str, Any], round_: int) -> None:
        count = contender.series or len(self.folders)
        first = round_ * count % len(self.folders)
        folders = (self.folders[first:] + self.folders[:first])[:count]
        with Driver(contender) as driver:
            answer = driver.ask(self.folders[:1], self._out)
            cold_s = time.perf_counter() - driver.started
            if self._stopped(contender, answer):
                return
            self._clean()
            cpu_before_s = driver.cpu_s()
            answer = driver.ask(folders, self._out)
            if self._stopped(contender, answer):
                return
            cpu_s = driver.cpu_s() - cpu_before_s
        run = {
            "cold_s": cold_s,
            "seconds": answer["seconds"],
            "series": len(folders),
            "cpu_s": cpu_s,
            "bytes_in": cohort.size_bytes(folders),
            "bytes_out": cohort.size_bytes([self._out]),
        }
        record.setdefault("runs", []).append(run | {k: answer[k] for k in ("split",) if k in answer})
        self._log(f"{contender.name}: {answer['seconds'] / len(folders):.3f} s/series")
        self._clean()

    def _stopped(self, contender: Contender, answer: dict[str, Any]) -> bool:
        """Return whether a contender is absent or has failed, and record the reason."""
        for status in ("absent", "failed"):
            if status in answer:
                self.records[contender.name] |= {"status": status, "reason": without_paths(answer[status])}
                self._log(f"{contender.name}: {status}: {without_paths(answer[status])}")
                self._clean()
                return True
        return False

    def _clean(self) -> None:
        """Free the disk space of the last output without slowing down the next one.

        Files are emptied and moved aside, not deleted: for a minute after many deletions ext4 creates files slowly,
        because it avoids inodes that were freed recently.
        """
        if self._out.exists():
            for folder, _, names in os.walk(self._out):
                for name in names:
                    os.truncate(os.path.join(folder, name), 0)
            self._cleaned += 1
            self._out.rename(self._out.with_name(f"spent-{self._cleaned}"))
        os.sync()
        time.sleep(SETTLE_S)


def _agreement_text(record: dict[str, Any]) -> str:
    if "agrees" not in record:
        return ""
    if "shape" in record:
        return f", another grid: {record['shape']}"
    sign = "≤" if record["agrees"] else "but not ≤"
    return f", within {record['largest_difference_inside_hu']:.2g} HU of SciPy ({sign} {record['tolerance_hu']:.2g})"


def _versions(gpu: bool) -> dict[str, str]:
    found = dict(versions(gpu))
    for package in RIVALS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.compare"
    )
    parser.add_argument("--data", type=Path, help="folder of real series, of which the regular ones are copied")
    parser.add_argument("--series", type=int, default=8)
    parser.add_argument(
        "--shape", type=shape_argument, default=(108, 512, 512), help="shape of a phantom; a small one for a quick test"
    )
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="cpu", help="gpu: also gpuprep on the GPU")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names of contenders, such as 'gpuprep, GPU*'")
    parser.add_argument("--minutes", type=float, default=14, help="time limit for second and later rounds")
    parser.add_argument("--whole", action="store_true", help="slow contenders convert the whole cohort too")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, and the chart beside it")
    return parser.parse_args()


def main() -> int:
    started = time.perf_counter()
    args = _arguments()

    def log(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)

    gpu, cores = args.backend == "gpu", usable_cores()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        cohort_folder = scratch / "dicom"
        if args.data:
            folders = cohort.copies(cohort_folder, args.data, args.series)
        else:
            folders = cohort.phantoms(cohort_folder, args.series, args.shape)
        if not folders:
            raise SystemExit(f"no regular series of single files under {args.data}")
        bytes_in = cohort.size_bytes(folders)
        log(f"{len(folders)} series, {bytes_in / 1e6:.0f} MB")
        all_ = contenders(cores, gpu, scratch)
        if args.only:
            all_ = [c for c in all_ if any(fnmatch(c.name, pattern) for pattern in args.only)]
        if args.whole:
            all_ = [replace(c, series=None) for c in all_]
        comparison = Comparison(folders, scratch, log)
        comparison.watch_and_check(all_)
        all_ = floors(cores, comparison.sizes_bytes) + all_
        comparison.time(all_, until=started + args.minutes * 60)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    records = comparison.records
    summarise(records, all_)
    result = {
        "command": "python -m bench.compare " + without_paths(" ".join(sys.argv[1:])),
        "machine": machine(),
        "versions": _versions(gpu),
        "cohort": {"series": len(folders), "bytes": bytes_in, "phantoms": None if args.data else args.shape},
        "minutes": (time.perf_counter() - started) / 60,
        "contenders": {c.name: records[c.name] for c in all_},
    }
    print(report.table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        try:
            report.chart(result, args.out.with_suffix(".png"))
        except ModuleNotFoundError as exc:
            log(f"no chart: {exc.name} is not installed")
    ours = [records[c.name] for c in all_ if c.ours and records[c.name]["status"] != "absent"]
    return 0 if all(r["status"] == "ok" and r.get("agrees", True) for r in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
