"""Knows the names of files that gpuprep writes for a series, and whether all files of a folder are its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gpuprep.errors import OutputError
from gpuprep.output.paths import WORKSHOP

SIDECAR = "volume.json"


PREVIEW = "preview.jpg"
"""A small picture of a series, for people."""


_VOLUME = r"(volume|labels|masks/[^/]+)"


_ZARR_LABELS = r"volume\.ome\.zarr/labels"


_ZARR = rf"({_VOLUME}\.ome\.zarr|{_ZARR_LABELS}/[^/]+)"


_OWN_NAME = re.compile(
    r"preview\.jpg|(labels/|masks/[^/]+/)?\d{4,}\.tif"
    rf"|{_VOLUME}\.(tif|nii|nii\.gz|npy)"
    rf"|{_ZARR}/(zarr\.json|0/zarr\.json|0/c/\d+/\d+/\d+)|{_ZARR_LABELS}/zarr\.json"
)
"""Of a file in a series' folder, from there on."""


OWN_FOLDER = re.compile(rf"labels|masks(/[^/]+)?|{_ZARR_LABELS}|{_ZARR}(/0(/c(/\d+){{0,2}})?)?")


def contents(folder: Path) -> tuple[int, int]:
    """Return the number of an output's files and their bytes together; (0, 0) where there is no such folder."""
    try:
        sizes = [e.stat().st_size for name, e in entries(folder) if (name == SIDECAR or is_own(name)) and e.is_file()]
    except OSError:
        return 0, 0
    return len(sizes), sum(sizes)


def inside(folder: str) -> str:
    """Return the folder of an output, which a manifest may name wrongly; raise OutputError if it is not in OUT."""
    path = Path(folder)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] == WORKSHOP:
        raise OutputError(f"the manifest names {folder!r} as an output, which is no folder in OUT: move it away")
    return folder


def check_folder(folder: Path, key: str, known: bool) -> None:
    """Raise if a folder holds what the output of a series may not replace: see `check_replaceable`."""
    try:
        former = json.loads((folder / SIDECAR).read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        former = None
    there = folder.is_dir()
    check_replaceable(str(folder), former, key, known and there, strangers_in(folder) if there else [])


def check_replaceable(place: str, former: str | None, key: str, known: bool, strangers: list[str]) -> None:
    """Raise unless what stands at a place may go for a new output of a series.

    Parameters
    ----------
    place : str
        For the message.
    former : str, optional
        Key of the series that it says it holds, if it says so.
    key : str
        That of the new output.
    known : bool
        Whether the manifest says that it is that series' output.
    strangers : list of str
        What else is there.

    Raises
    ------
    OutputError
        If it may not.
    """
    hint = "move it away, or choose another --out"
    if former is None and not known:
        raise OutputError(f"{place} is in the way and is not an output of gpuprep: {hint}")
    if former not in (None, key):
        raise OutputError(f"{place} holds another series, {former}: {hint}")
    if strangers:
        raise OutputError(f"{place} also holds {min(strangers)}, which is not gpuprep's to remove: {hint}")


def strangers_in(folder: Path) -> list[str]:
    """Return the names below a folder that gpuprep does not make."""
    return sorted(n for n, entry in entries(folder) if n != SIDECAR and not (is_own(n) and entry.is_file()))


def is_own(name: str) -> bool:
    """Whether a writer gives such a name to a file."""
    return _OWN_NAME.fullmatch(name) is not None


def entries(folder: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what is in a series' folder, by its name from there on; of folders of its own, what is in them."""
    with os.scandir(folder / below) as found:
        for entry in found:
            name = below + entry.name
            if OWN_FOLDER.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                yield from entries(folder, f"{name}/")
            else:
                yield name, entry
