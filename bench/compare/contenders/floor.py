"""The floor: only reads all bytes of the input and writes files of the same number and sizes as gpuprep."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

WRITE_BYTES = 1 << 20
"""Bytes per write, from a buffer that stays in the cache."""


def convert_all(folders: list[Path], out: Path, *, sizes_bytes: dict[str, list[int]], jobs: int) -> None:
    """Copy a cohort in `jobs` processes; `sizes_bytes` has the file sizes of each series."""
    tasks = [(folder, out / folder.name, sizes_bytes[folder.name]) for folder in folders]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        pool.starmap(copy, tasks, chunksize=1)


def copy(folder: Path, out: Path, sizes_bytes: list[int]) -> None:
    """Read all files of a folder, and write files of the given sizes."""
    files = list(folder.iterdir())
    buffer = bytearray(max(f.stat().st_size for f in files))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    out.mkdir(parents=True)
    content = memoryview(bytes(WRITE_BYTES))
    for k, size in enumerate(sizes_bytes):
        with (out / f"{k:04d}").open("wb", buffering=0) as f:
            for start in range(0, size, WRITE_BYTES):
                f.write(content[: size - start])
