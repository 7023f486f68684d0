"""Time and peak memory of ``gpuprep convert`` against ``bench/classic.py``, disk to disk, as whole commands.

    python -m bench.throughput [--series 4] [--rounds 2] [--out bench/results/throughput-….json]

A cohort of phantoms (108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm) is written first, and both commands are run on it in
turn, start-up included, so that slow minutes of the machine hit both. Both write one float32 .tif per slice. Last, the
output of ``gpuprep convert --recipe classic`` is compared with the script's. Memory is the highest sum, over all
processes of a command, of the memory they do not share plus their part of what they do (PSS); it is watched in runs of
their own, because watching costs time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from bench.measure import largest_difference, machine, peak_bytes, seconds
from gpuprep.conversion import versions
from gpuprep.phantom import thorax, write_series

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)


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

        commands = {"classic": classic, "gpuprep": ours}
        runs: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                shutil.rmtree(scratch / name, ignore_errors=True)
                os.sync()
                runs[name].append(seconds(command))
                print(f"{name:8} {runs[name][-1] / args.series:7.3f} s/series", flush=True)
        peaks = {}
        for name, command in commands.items():
            shutil.rmtree(scratch / name, ignore_errors=True)
            peaks[name] = peak_bytes(command)
            print(f"{name:8} {peaks[name] / 1e6:7.0f} MB", flush=True)
        check = scratch / "check"
        seconds([*convert, "--out", str(check), "--recipe", "classic"])
        difference = largest_difference(scratch / "classic" / "patient-0", check / "dicom" / "patient-0")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    per_series = {name: statistics.median(taken) / args.series for name, taken in runs.items()}
    result = {
        "command": "python -m bench.throughput " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "series": args.series,
        "shape": SHAPE,
        "spacing_mm": SPACING_MM,
        "seconds": runs,
        "seconds_per_series": per_series,
        "times_faster": per_series["classic"] / per_series["gpuprep"],
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
