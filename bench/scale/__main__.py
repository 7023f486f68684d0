"""Measures scheduling, manifest and status for a cohort of 100,000 series without pixels.

    python -m bench.scale [--series 100000] [--slices 4] [--out bench/results/scale-….json]

Headers are synthetic, and a stub of the conversion writes only a ``volume.json``. Everything else is real: the decision
per series, worker processes, manifest, folder layout, a second run that finds everything done, and status. Audit and
plan of the series are measured separately, because they are not part of scheduling. Memory is the peak resident size of
the parent, which contains the headers and so grows with the number of slices.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpuprep.pipeline.prepare
import gpuprep.pipeline.retry
from bench.measure import save
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series, SliceHeader
from gpuprep.dicom.audit import audit
from gpuprep.dicom.discover import Cohort
from gpuprep.executors.cores import usable_cores
from gpuprep.output.records import SeriesResult, now
from gpuprep.output.verify import status
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.task import Task


def synthetic_series(number: int, slices: int) -> Series:
    """Return a series of synthetic headers without files."""
    uid = f"1.2.826.0.1.3680043.8.498.{number:039d}"
    folder = f"/data/cohort/patient-{number // 3:06d}/study-1/series-{number % 3}"
    headers = tuple(
        SliceHeader(
            path=f"{folder}/{k:04d}.dcm", mtime_ns=10**18 + number * 1000 + k, member=None, frame=0, frames=1,
            file_bytes=526_336, sop_instance_uid=f"{uid}.{k}", instance_number=k + 1,
            position_mm=(-170.0, -170.0, -300.0 + 3.0 * k), localizer=False, secondary=False, modality="CT",
            temporal_position=None, acquisition_number=1, acquisition_time="1f2e", reconstruction="a1b2", phase="",
            rescale_slope=1.0, rescale_intercept=-1024.0, rescale_type="HU", photometric="MONOCHROME2",
            samples_per_pixel=1, bits_allocated=16, bits_stored=12, high_bit=11, signed=False, padding=None,
            padding_limit=None, transfer_syntax="1.2.840.10008.1.2.1", pixel_offset=1200, pixel_bytes=524_288,
        )
        for k in range(slices)
    )  # fmt: skip
    return Series(
        uid, f"{uid[:-1]}.1", f"{uid[:-1]}.2", number % 3, 512, 512, (0.68, 0.68), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 0,
        folder, headers,
    )  # fmt: skip


def stub_conversion(task: Task) -> SeriesResult:
    """Replace the conversion of a series; runs in a worker."""
    planned = task.planned
    folder = task.output.root / planned.folder
    folder.mkdir(parents=True)
    text = json.dumps({"key": planned.series.key})
    (folder / "volume.json").write_text(text)
    done = replace(task.result(), status="ok", folder=planned.folder, files=1, bytes=len(text), finished=now())
    return replace(done, source_shape=(4, 512, 512), shape=(12, 512, 512), process_s=0.25, read_s=0.1, write_s=0.1)


def run(out: Path, series: int, slices: int) -> dict[str, Any]:
    """Run a conversion in this process; return time and memory of the parent."""
    cohort = Cohort(tuple(synthetic_series(n, slices) for n in range(series)), {}, ())
    headers_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpuprep.pipeline.prepare.discover = lambda *_, **__: cohort  # type: ignore[attr-defined]
    gpuprep.pipeline.retry.fill_series = stub_conversion  # type: ignore[attr-defined]
    recipe = Recipe(dtype="uint8")
    processor_s = time.process_time()
    for one in cohort:
        if stack := audit(one, recipe.rules).stack:
            make_plan(stack.geometry, recipe, stack.placement)
    audits_s = time.process_time() - processor_s
    started, processor_s = time.perf_counter(), time.process_time()
    outcome = convert(out.parent, out, recipe, backend="cpu", jobs=usable_cores(), room_check=False)
    seconds = time.perf_counter() - started
    if outcome.counts not in ({"ok": series}, {"skipped": series}):
        raise RuntimeError(f"{series} series became {outcome.counts}")
    return {
        "counts": outcome.counts,
        "seconds": seconds,
        "parent_processor_s": time.process_time() - processor_s,
        "audits_processor_s": audits_s,
        "headers_bytes": headers_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def timed_status(out: Path) -> dict[str, Any]:
    """Compute the status once; return counts, time and memory."""
    started = time.perf_counter()
    counts = status(out).counts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"counts": counts, "seconds": time.perf_counter() - started, "peak_bytes": peak}


STAGE = """
import json, sys
from pathlib import Path
from bench.scale.__main__ import timed_status, run
out = Path(sys.argv[1])
print(json.dumps({}))
"""
"""Code of one stage, run in a separate process to measure its memory alone. It imports this module by name, because
workers cannot unpickle `stub_conversion` from a script."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=100_000)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    figures: dict[str, Any] = {"series": args.series, "slices": args.slices}
    try:
        for name, call in (
            ("first run", f"run(out, {args.series}, {args.slices})"),
            ("status", "timed_status(out)"),
            ("second run", f"run(out, {args.series}, {args.slices})"),
        ):
            command = [sys.executable, "-c", STAGE.format(call), str(scratch / "out")]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[name] = found = json.loads(answer)
            each = 1000 / args.series
            found["ms_per_series"] = found["seconds"] * each
            scheduling = ""
            if name == "first run":
                found["scheduling_ms_per_series"] = (found["parent_processor_s"] - found["audits_processor_s"]) * each
                scheduling = (
                    f"; CPU of the parent without audits and plans ({found['audits_processor_s'] * each:.2f} ms): "
                    f"{found['scheduling_ms_per_series']:.2f} ms"
                )
            print(
                f"{name:10} {found['seconds']:7.1f} s, {found['ms_per_series']:.3f} ms per series, peak "
                f"{found['peak_bytes'] / 1e6:.0f} MB {found['counts']}{scheduling}",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    save(args.out, "bench.scale", figures)


if __name__ == "__main__":
    main()
