"""The floor: read all bytes of the input, write as many files of the same sizes as gpuprep, and do nothing else."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

PIECE_BYTES = 1 << 20
"""Written at a time, out of a buffer that stays in cache."""


def convert_all(folders: list[Path], out: Path, *, sizes_bytes: dict[str, list[int]], jobs: int) -> None:
    """Do so for a cohort, in `jobs` processes; `sizes_bytes` are of the files of each series."""
    tasks = [(folder, out / folder.name, sizes_bytes[folder.name]) for folder in folders]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        pool.starmap(copy, tasks, chunksize=1)


def copy(folder: Path, out: Path, sizes_bytes: list[int]) -> None:
    """Read every file of a folder, and write files of these sizes."""
    files = list(folder.iterdir())
    buffer = bytearray(max(f.stat().st_size for f in files))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    out.mkdir(parents=True)
    content = memoryview(bytes(PIECE_BYTES))
    for k, size in enumerate(sizes_bytes):
        with (out / f"{k:04d}").open("wb", buffering=0) as f:
            for start in range(0, size, PIECE_BYTES):
                f.write(content[: size - start])
