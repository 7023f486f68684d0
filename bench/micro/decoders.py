"""Reading speed by transfer syntax and decoder: ``python -m bench.micro.decoders [--out FILE.json]``.

A phantom of 512 × 512 pixels with 12 of 16 bits is written in each transfer syntax, with headers as long as those of
scanners. The time is measured from files to stored values in spatial order (`SeriesReader.slab`), after the scan and a
first slab, which loads the libraries: in one process, and in several processes that each read the whole series at the
same time. Each decoder is measured alone; * marks the one that gpuprep tries first. MB are 10⁶ bytes of decoded pixels,
summed over the processes. The fastest round is reported, because other load on the machine only adds time. Files are in
the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import gpuprep
from bench.measure import machine
from bench.scale.rescan import lengthen
from gpuprep.core.versions import versions
from gpuprep.dicom import decode
from gpuprep.dicom.read import SeriesReader
from gpuprep.testing import thorax, write_series

SPACING_MM = (3.0, 0.6816, 0.6816)
SLAB = 8
"""Slices per slab."""

Encoder = Callable[[NDArray[Any]], bytes | bytearray]
ENCODERS: dict[UID, Encoder | None] = {
    ExplicitVRLittleEndian: None,
    RLELossless: None,  # pydicom encodes it
    JPEGLosslessSV1: lambda v: imagecodecs.jpeg8_encode(v, lossless=True, predictor=1, bitspersample=12),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEG2000Lossless: lambda v: imagecodecs.jpeg2k_encode(
        v, level=0, codecformat="j2k", reversible=True, bitspersample=12
    ),
    HTJ2KLossless: lambda v: imagecodecs.htj2k_encode(v, reversible=True),
}


def write(folder: Path, stored: NDArray[Any], syntax: UID) -> list[Path]:
    """Write a 12-bit series in a transfer syntax."""

    def change(ds: Dataset, k: int) -> None:
        lengthen(ds, k)
        ds.BitsStored, ds.HighBit = 12, 11
        encode = ENCODERS[syntax]
        if encode is not None:
            ds.PixelData = encapsulate([bytes(encode(stored[k]))])
            ds["PixelData"].VR = "OB"
            ds.file_meta.TransferSyntaxUID = syntax
        elif syntax == RLELossless:
            ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)

    return write_series(folder, stored, SPACING_MM, change=change)


_barrier: Barrier


def _set_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _seconds(task: tuple[str, str | None, int]) -> list[tuple[float, float]]:
    """Read a series several times with one decoder, in step with other processes; return wall and CPU seconds."""
    folder, name, rounds = task
    for kind, decoders in decode.DECODERS.items():
        decode.DECODERS[kind] = tuple(d for d in decoders if d.name == name) or decoders
    (series,) = gpuprep.discover(folder)
    SeriesReader(series).slab(0, 1)
    taken = []
    for _ in range(rounds):
        reader = SeriesReader(series)
        _barrier.wait()
        started, busy = time.perf_counter(), time.process_time()
        for start in range(0, len(series.slices), SLAB):
            reader.slab(start, min(start + SLAB, len(series.slices)))
        taken.append((time.perf_counter() - started, time.process_time() - busy))
    return taken


def measure(folder: Path, name: str | None, processes: int, shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return the time per slice in a process, and the throughput of all processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _set_barrier, (context.Barrier(processes),)) as pool:
        by_process = pool.map(_seconds, [(str(folder), name, rounds)] * processes, chunksize=1)
    taken = [statistics.mean(clock for clock, _ in times) for times in zip(*by_process, strict=True)]
    busy = min(busy for times in by_process for _, busy in times)
    return {
        "ms_per_slice": round(min(taken) / shape[0] * 1e3, 2),
        "median_ms_per_slice": round(statistics.median(taken) / shape[0] * 1e3, 2),
        "cpu_ms_per_slice": round(busy / shape[0] * 1e3, 2),
        "mb_per_s": round(processes * int(np.prod(shape)) * 2 / min(taken) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="reading speed by transfer syntax and decoder")
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2, help="number of processes, in addition to a single one")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    stored = thorax((options.slices, 512, 512), SPACING_MM).clip(0, 4095).astype(np.uint16)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for syntax in ENCODERS:
            folder = Path(scratch) / str(syntax)
            files = write(folder, stored, syntax)
            size = sum(f.stat().st_size for f in files) // len(files)
            for n, name in enumerate(decode.available_decoders(syntax) or (None,)):
                by_processes = {
                    str(p): measure(folder, name, p, stored.shape, options.rounds)
                    for p in sorted({1, options.processes})
                }
                results.append(
                    {
                        "syntax": syntax.name,
                        "decoder": name,
                        "first": n == 0,
                        "file_bytes": size,
                        "processes": by_processes,
                    }
                )
                figures = "  ".join(
                    f"{p} × {f['ms_per_slice']:6.2f} ms {f['mb_per_s']:7.1f} MB/s" for p, f in by_processes.items()
                )
                print(f"{syntax.name[:40]:40} {name or '':18}{' *'[n == 0]} {figures}", flush=True)
    if options.out:
        packages = ("pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg")
        result = {
            "command": "python -m bench.micro.decoders " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "versions": versions() | {package: version(package) for package in packages},
            "shape": stored.shape,
            "rounds": options.rounds,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
