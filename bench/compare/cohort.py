"""Makes the cohort: phantoms, or copies of real series. Each series has its own folder, as other programs require."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import gpuprep
from gpuprep.testing import thorax, write_series

SPACING_MM = (3.0, 0.6816, 0.6816)


def phantoms(root: Path, count: int, shape: tuple[int, int, int]) -> list[Path]:
    """Write `count` phantoms; return their folders."""
    folders = [root / f"series-{n:03d}" for n in range(count)]
    for n, folder in enumerate(folders):
        write_series(folder, thorax(shape, SPACING_MM, seed=n), SPACING_MM)
    return folders


def copies(root: Path, data: Path, count: int) -> list[Path]:
    """Copy at most `count` series that all programs can read (regular, one file per slice); return their folders."""
    folders: list[Path] = []
    for series in gpuprep.discover(data):
        plain = all(s.member is None and s.frames == 1 for s in series.slices)
        if len(folders) == count or not plain or gpuprep.audit(series).verdict != "ok":
            continue
        folder = root / f"series-{len(folders):03d}"
        folder.mkdir(parents=True)
        for k, header in enumerate(series.slices):
            shutil.copyfile(os.fspath(header.path), folder / f"{k:04d}.dcm")
        folders.append(folder)
    return folders


def size_bytes(folders: list[Path]) -> int:
    """Return the total size of all files in the folders in bytes."""
    return sum(size for folder in folders for size in file_sizes_bytes(folder))


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every TIFF file under a folder, by relative path."""
    found = {}
    for file in folder.rglob("*.tif"):
        with file.open("rb") as f:
            found[str(file.relative_to(folder))] = hashlib.file_digest(f, "sha256").hexdigest()
    return found


def file_sizes_bytes(folder: Path) -> list[int]:
    """Return the sizes of all files under a folder in bytes."""
    return [f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()]
