"""Measures what a crop costs and saves: conversions of series, whole and cropped, in turn.

    python -m bench.micro.crop [DICOM…] [--rounds 5] [--scratch FOLDER] [--out bench/results/crop-….json]

Each DICOM is a folder with one series; without any, a synthetic chest of 108 × 512 × 512 is written. "search" is the
time to find the box, as a share of a conversion by the default recipe, from files to files. Bytes and time of a cropped
conversion are ratios of the whole one in the same round; their slices keep the size to which they are resampled.
Figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpuprep
from bench.measure import save
from gpuprep import Recipe
from gpuprep.compute.crop import crop_of
from gpuprep.testing import thorax, write_series

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
CROPS = ("body", "lungs")
DEFAULT, WHOLE = "default recipe", "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dicom", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the volumes")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with _series(args.dicom, args.scratch) as folders:
        for folder in folders:
            found.append(_figures(folder, args.rounds, args.scratch))
            save(args.out, "bench.micro.crop", {"rounds": args.rounds, "series": found})


@contextmanager
def _series(given: list[Path], scratch: Path | None) -> Iterator[list[Path]]:
    """Yield the folders given, or that of a synthetic chest."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        write_series(Path(folder, "synthetic chest"), thorax(SHAPE, SPACING_MM), SPACING_MM)
        yield [Path(folder, "synthetic chest")]


def _figures(dicom: Path, rounds: int, scratch: Path | None) -> dict[str, Any]:
    """Return the figures of one series, and print them."""
    volume = gpuprep.read(gpuprep.discover(dicom)[0])
    recipes = {DEFAULT: Recipe(), WHOLE: Recipe(size=None, dtype="uint8", format="npy")}
    recipes |= {crop: Recipe(crop=crop, size=None, dtype="uint8", format="npy") for crop in CROPS}
    rows = []
    for _ in range(rounds + 1):  # the first one compiles
        row = {name: _conversion(dicom, recipe, scratch) for name, recipe in recipes.items()}
        for crop in CROPS:
            started = time.perf_counter()
            crop_of(volume, recipes[crop])
            row[crop]["search_s"] = time.perf_counter() - started
        rows.append(row)
    rows = rows[1:]
    figures: dict[str, Any] = {"series": dicom.name, "shape": list(volume.stored.shape)}
    figures["default_s"] = statistics.median(row[DEFAULT]["seconds"] for row in rows)
    print(
        f"{dicom.name}, {' × '.join(map(str, volume.stored.shape))}: {figures['default_s']:.2f} s by the default recipe"
    )
    for crop in CROPS:
        figures[crop] = own = {
            "search_s": statistics.median(row[crop]["search_s"] for row in rows),
            "search_share": statistics.median(row[crop]["search_s"] / row[DEFAULT]["seconds"] for row in rows),
            "bytes_ratio": rows[0][crop]["bytes"] / rows[0][WHOLE]["bytes"],
            "time_ratio": statistics.median(row[crop]["seconds"] / row[WHOLE]["seconds"] for row in rows),
        }
        print(
            f"  {crop:6} search {1000 * own['search_s']:.0f} ms ({own['search_share']:.1%}); "
            f"{own['bytes_ratio']:.2f} of the bytes in {own['time_ratio']:.2f} of the time"
        )
    return figures


def _conversion(dicom: Path, recipe: Recipe, scratch: Path | None) -> dict[str, float]:
    """Return seconds and bytes of a conversion of one series, in this process."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        started = time.perf_counter()
        run = gpuprep.convert(dicom, out, recipe, backend="cpu")
        seconds = time.perf_counter() - started
        (result,) = run.results
        return {"seconds": seconds, "bytes": result.bytes}


if __name__ == "__main__":
    main()
