"""Recognises, by their names, the files that gpuprep writes for a series, and checks what a folder holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gpuprep.errors import OutputError
from gpuprep.output.paths import WORK_FOLDER

SIDECAR = "volume.json"

SCHEMA = 1
"""Number in ``volume.json`` of the meaning of its keys. It rises when a key is removed or changes its meaning, not when
a key is added. An output without a number counts as 0."""

PREVIEW = "preview.jpg"
"""Preview picture of a series."""


_VOLUME = r"(volume|labels|masks/[^/]+)"


_ZARR_LABELS = r"volume\.ome\.zarr/labels"


_ZARR = rf"({_VOLUME}\.ome\.zarr|{_ZARR_LABELS}/[^/]+)"


_OWN_NAME = re.compile(
    r"preview\.jpg|(labels/|masks/[^/]+/)?\d{4,}\.tif"
    rf"|{_VOLUME}\.(tif|nii|nii\.gz|npy)"
    rf"|{_ZARR}/(zarr\.json|0/zarr\.json|0/c/\d+/\d+/\d+)|{_ZARR_LABELS}/zarr\.json"
)
"""Name of a file that gpuprep writes, relative to the folder of its series."""


OWN_FOLDER = re.compile(rf"labels|masks(/[^/]+)?|{_ZARR_LABELS}|{_ZARR}(/0(/c(/\d+){{0,2}})?)?")
"""Name of a folder that gpuprep makes, relative to the folder of its series."""


def contents(folder: Path) -> tuple[int, int]:
    """Return the number of files of an output and their total size in bytes; (0, 0) if there is no such folder."""
    try:
        sizes = [e.stat().st_size for name, e in entries(folder) if (name == SIDECAR or is_own(name)) and e.is_file()]
    except OSError:
        return 0, 0
    return len(sizes), sum(sizes)


def checked_folder(folder: str) -> str:
    """Return the folder of an output as the manifest names it; raise OutputError if it does not lie in OUT."""
    path = Path(folder)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] == WORK_FOLDER:
        raise OutputError(
            f"the manifest names {folder!r} as an output, which is no folder in OUT: move the manifest away"
        )
    return folder


def check_folder(folder: Path, key: str, known: bool) -> None:
    """Raise if a new output of a series may not replace a folder: see `check_replaceable`."""
    try:
        former = json.loads((folder / SIDECAR).read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        former = None
    exists = folder.is_dir()
    check_replaceable(str(folder), former, key, known and exists, foreign_names_in(folder) if exists else [])


def check_replaceable(folder: str, former: str | None, key: str, known: bool, foreign_names: list[str]) -> None:
    """Raise unless a new output of a series may replace a folder.

    Parameters
    ----------
    folder : str
        Path or URL of the folder, for the message.
    former : str, optional
        Key of the series in the ``volume.json`` of the folder; None without one.
    key : str
        Key of the series of the new output.
    known : bool
        Whether the manifest lists the folder as the output of that series.
    foreign_names : list of str
        Names in the folder that are not gpuprep's.

    Raises
    ------
    OutputError
        If the folder may not be replaced.
    """
    hint = "move it away, or choose another --out"
    if former is None and not known:
        raise OutputError(f"{folder} is in the way and is not an output of gpuprep: {hint}")
    if former not in (None, key):
        raise OutputError(f"{folder} holds another series, {former}: {hint}")
    if foreign_names:
        raise OutputError(f"{folder} also holds {min(foreign_names)}, which gpuprep did not write: {hint}")


def foreign_names_in(folder: Path) -> list[str]:
    """Return the names in a folder, relative to it, that are not gpuprep's."""
    return sorted(n for n, entry in entries(folder) if n != SIDECAR and not (is_own(n) and entry.is_file()))


def is_own(name: str) -> bool:
    """Return whether a file name, relative to the folder of its series, is one that a writer gives."""
    return _OWN_NAME.fullmatch(name) is not None


def entries(folder: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the entries of a series' folder with their names relative to it, and those of gpuprep's own subfolders."""
    with os.scandir(folder / below) as found:
        for entry in found:
            name = below + entry.name
            if OWN_FOLDER.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                yield from entries(folder, f"{name}/")
            else:
                yield name, entry
