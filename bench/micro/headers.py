"""Compares the processor time for headers read from their bytes with that for the same headers read by pydicom.

    python -m bench.micro.headers [--dicom FOLDER] [--out bench/results/headers-….json]

Files are read in batches, by turns in both ways, and the ratio is that of one batch, so that it hardly depends on other
load of the machine. Without a folder, the files are synthetic: 2000 images of 2 × 2 pixels with 100 elements and a
private sequence. Their pages are in the cache of the system.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset, Sequence

from bench.measure import save
from gpuprep.dicom import element_stream
from gpuprep.dicom.element_stream import OrdinaryHeader, read_ordinary_header
from gpuprep.dicom.headers import read_headers
from gpuprep.testing import write_series

IMAGES, BATCH_FILES, ROUNDS, ELEMENTS = 2000, 50, 3, 100


def _add_elements(ds: Dataset, n: int) -> None:
    """Make the header as long as that of a scanner."""
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP, ds.ConvolutionKernel, ds.AcquisitionNumber = 120, "B30f", 1
    ds.AcquisitionDate, ds.AcquisitionTime = "20260102", f"10{n // 60 % 60:02}{n % 60:02}"
    ds.private_block(0x0009, "BENCHMARK", create=True).add_new(0x01, "OB", bytes(1000))
    block = ds.private_block(0x0019, "BENCHMARK", create=True)
    item = Dataset()
    item.CodeValue, item.CodeMeaning = "1", "one"
    block.add_new(0x01, "SQ", Sequence([item]))
    block[0x01].is_undefined_length = True
    for number in range(2, ELEMENTS - len(ds)):
        block.add_new(number, "LO", "text")


def ms_by_way(files: list[str]) -> dict[str, list[float]]:
    """Return the processor time per header of each batch in ms, read from the bytes and by pydicom."""
    ways = {"bytes": read_ordinary_header, "pydicom": _leave_to_pydicom}
    batches = [files[n : n + BATCH_FILES] for n in range(0, len(files), BATCH_FILES)]
    ms: dict[str, list[float]] = {name: [] for name in ways}
    read_headers(files)
    for turn, batch in enumerate(batches * ROUNDS):
        for name in sorted(ways, reverse=turn % 2 == 1):
            element_stream.read_ordinary_header = ways[name]
            started = time.process_time()
            read_headers(batch)
            ms[name].append((time.process_time() - started) / len(batch) * 1e3)
    element_stream.read_ordinary_header = read_ordinary_header
    return ms


def _leave_to_pydicom(f: BinaryIO) -> OrdinaryHeader | None:  # noqa: ARG001
    return None


def _is_ordinary(file: str) -> bool:
    with open(file, "rb") as f:
        return read_ordinary_header(f) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", type=Path, help="folder with DICOM files; those with one image each are read")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.dicom is None:
            write_series(Path(folder), np.zeros((IMAGES, 2, 2), np.int16), (1, 1, 1), change=_add_elements)
        found = [str(path) for path in sorted((args.dicom or Path(folder)).rglob("*")) if path.is_file()]
        files = [file for file, contents in zip(found, read_headers(found), strict=True) if len(contents.images) == 1]
        ordinary = sum(map(_is_ordinary, files))
        ms = ms_by_way(files)
    ratios = [slow / fast for slow, fast in zip(ms["pydicom"], ms["bytes"], strict=True)]
    first, *_, last = statistics.quantiles(ratios, n=10)
    figures: dict[str, Any] = {
        "files": len(files),
        "read_from_bytes": ordinary,
        "ratio": statistics.median(ratios),
        "ratio_deciles": [first, last],
        "ms": {name: statistics.median(values) for name, values in ms.items()},
    }
    print(f"{len(files)} files, {ordinary} of them read from their bytes")
    print(f"pydicom takes {figures['ratio']:.2f} times as long (first and last decile {first:.2f} and {last:.2f})")
    print("processor ms per header:", ", ".join(f"{name} {value:.3f}" for name, value in figures["ms"].items()))
    save(args.out, "bench.micro.headers", figures)


if __name__ == "__main__":
    main()
