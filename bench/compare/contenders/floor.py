"""The floor: only reads all bytes of the input and writes files of the same number and sizes as gpuprep.

It has every file written to disk as gpuprep does (`gpuprep.files.replacing`), and flushes files and folder while the
next files are written. A second one does not flush, which shows how much of the floor is the disk.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpuprep.files.replacing import begin_flush, flush

WRITE_BYTES = 1 << 20
"""Bytes per write, from a buffer that stays in the cache."""

FLUSH_THREADS = 16
"""Threads that flush the files of a series. gpuprep has 8; a floor has as many as make it faster: with 16 it takes 7 to
10 % less time than with 4 for slices, and with 32 hardly less. For one stack there is no difference."""


def convert_all(folders: list[Path], out: Path, *, sizes_bytes: dict[str, list[int]], jobs: int, flushed: bool) -> None:
    """Copy a cohort in `jobs` processes; `sizes_bytes` has the file sizes of each series."""
    tasks = [(folder, out / folder.name, sizes_bytes[folder.name], flushed) for folder in folders]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        pool.starmap(copy, tasks, chunksize=1)


def copy(folder: Path, out: Path, sizes_bytes: list[int], flushed: bool) -> None:
    """Read all files of a folder, and write files of the given sizes."""
    files = list(folder.iterdir())
    buffer = bytearray(max(f.stat().st_size for f in files))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    out.mkdir(parents=True)
    content = memoryview(bytes(WRITE_BYTES))
    with ThreadPoolExecutor(FLUSH_THREADS) as threads:
        flushes = []
        for k, size in enumerate(sizes_bytes):
            file = out / f"{k:04d}"
            with file.open("wb", buffering=0) as f:
                for start in range(0, size, WRITE_BYTES):
                    f.write(content[: size - start])
            if flushed:
                begin_flush(file)
                flushes.append(threads.submit(flush, file))
        for waiting in flushes:
            waiting.result()
    if flushed:
        flush(out)
