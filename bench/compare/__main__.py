"""Compares gpuprep with other programs, disk to disk: DICOM → 1 mm → window → 512² → .tif.

    python -m bench.compare [--data DIR] [--series 8] [--backend cpu|gpu] [--out bench/results/compare-….json]

First each contender converts the cohort (slow contenders: one series) while its memory is measured. The first series of
contenders that claim the same recipe is compared with SciPy in float64. Then all contenders take turns for some rounds,
so that slow minutes of the machine affect all of them, in the reverse order in every other round. In each round a fresh
process converts one series, which measures the cold start, and then the timed cohort, or a few series for slow
contenders (see the table). In between, outputs are emptied and the disk is synchronised. Programs that are not
installed are listed as absent.

The floor only reads the same input, and writes as many files of the same sizes and flushes them to disk, as gpuprep
does. "Not flushed" leaves out the latter, as the other programs do.

The ratio to gpuprep is the time of a contender over that of gpuprep with the same dtype (writing a stack, if the
contender writes one file) in the same round: the median of the rounds, and their range.

    python -m bench.compare --against REV [--scratch DIR] [--out FILE.json]

compares this build of gpuprep, with uncommitted changes, with the build of another commit, in the same way and in this
environment. The ratio is the time of the other build over that of this one. First, the command line converts the cohort
once with each build, so that loops are compiled and headers known. In the rounds, it converts one series in a new
process. Files are equal if all their bytes are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.compare import against, builds, cohort, report
from bench.compare.comparison import Comparison
from bench.compare.contenders import Contender, contenders, floors
from bench.compare.summary import summarise, without_paths
from bench.measure import machine, shape_argument
from gpuprep.core.versions import versions
from gpuprep.executors.cores import usable_cores

RIVALS = ("numba", "SimpleITK", "monai", "torch", "torchio", "dcm2niix", "dicom2nifti")


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
    parser.add_argument("--against", metavar="REV", help="compare this build of gpuprep with that of another commit")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names of contenders, such as 'gpuprep, GPU*'")
    parser.add_argument("--rounds", type=int, help="number of rounds of all contenders")
    parser.add_argument("--minutes", type=float, default=14, help="time limit for second and later rounds")
    parser.add_argument("--whole", action="store_true", help="slow contenders convert the whole cohort too")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured, or in memory: /dev/shm")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, and the chart beside it")
    return parser.parse_args()


def _chosen(all_: list[Contender], args: argparse.Namespace) -> list[Contender]:
    """Return the contenders that the arguments name, with the numbers of series and rounds that these ask for."""
    patterns = args.only or (against.USUAL if args.against else ["*"])
    chosen = [c for c in all_ if any(fnmatch(c.against if args.against else c.name, p) for p in patterns)]
    if not chosen:
        raise SystemExit(f"no contender is named {' or '.join(patterns)}")
    if args.whole:
        chosen = [replace(c, series=None) for c in chosen]
    return [replace(c, rounds=args.rounds or c.rounds) for c in chosen]


def main() -> int:
    started = time.perf_counter()
    args = _arguments()

    def log(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)

    gpu, cores = args.backend == "gpu", usable_cores()
    with (
        tempfile.TemporaryDirectory(dir=args.scratch, ignore_cleanup_errors=True) as folder,
        builds.both(args.against, Path(folder)) if args.against else nullcontext() as both,
    ):
        scratch = Path(folder)
        if args.data:
            folders = cohort.copies(scratch / "dicom", args.data, args.series)
        else:
            folders = cohort.phantoms(scratch / "dicom", args.series, args.shape)
        if not folders:
            raise SystemExit(f"no regular series of single files under {args.data}")
        bytes_in = cohort.size_bytes(folders)
        log(f"{len(folders)} series, {bytes_in / 1e6:.0f} MB")
        comparison = Comparison(folders, scratch, log)
        all_ = against.pairs(both, cores, gpu) if both else contenders(cores, gpu, scratch)
        for contender in all_:
            if contender.module == against.COMMAND_LINE.module:
                comparison.warm_up(contender)
        all_ = _chosen(all_, args)
        comparison.watch_and_check(all_)
        all_ = floors(cores, comparison.sizes_bytes) + all_
        comparison.time(all_, until=started + args.minutes * 60)

    records = comparison.records
    summarise(records, all_)
    result = {
        "command": "python -m bench.compare " + without_paths(" ".join(sys.argv[1:])),
        "machine": machine(),
        "versions": _versions(gpu),
        "builds": [build.name for build in both or ()],
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
