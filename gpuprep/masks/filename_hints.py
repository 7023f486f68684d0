"""Reads hints from file names: the slice that contours lie on, and the structure they belong to."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import get_args

from gpuprep.core.formatting import printable, quoted
from gpuprep.core.mask_options import SliceFrom
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import SliceKey
from gpuprep.masks.text_parsing import FARTHEST

UID = re.compile(r"(?<![0-9.])[0-2](?:\.(?:0|[1-9][0-9]*)){4,}(?![0-9])")
"""Anywhere in a name or a path."""

_Z = re.compile(r"(?<![A-Za-z])[zZ][=_ ]?([+-]?[0-9]+(?:\.[0-9]+)?)")
_SIGNED = re.compile(r"(?:(?<![A-Za-z0-9])[+-])?[0-9]+(?:\.[0-9]+)?")
_DIGITS = re.compile(r"[0-9]+")
_STRAY = "-_.=+ "


def stem(path: str) -> str:
    """Return the name of a file without its extension, which begins with a letter: UIDs and decimals are none."""
    name = os.path.basename(path)
    base, extension = os.path.splitext(name)
    return base if extension[1:2].isalpha() else name


def slice_and_structure(path: str, slice_from: SliceFrom | None) -> tuple[SliceKey | None, str]:
    """Return which slice a file of one slice means, and the name of the structure in it.

    Parameters
    ----------
    path : str
        Of its name a DICOM UID is taken, or else a number after a "z" (mm), or else the last digits (they count
        slices). What is left of the name is the structure's, or the folder's name where nothing is left.
    slice_from : {"name", "column", "z", "uid"} or None
        "z", "uid": the name must hold such, and a number that no "z" goes before is in mm too. "name": any of them.

    Returns
    -------
    SliceKey or None
        None where the name holds no digits.
    str

    Raises
    ------
    SegmentationError
        If the slice is not where `slice_from` says.
    """
    name = stem(path)
    found = _found(name, slice_from)
    if found is None:
        if slice_from is not None:
            where = "no column of the file" if slice_from == "column" else "nothing in its name"
            raise SegmentationError(f"--slice-from {slice_from}: {where} says the slice ({quoted(name)})")
        return None, _named(name, path)
    key, (begin, end) = found
    left, right = name[:begin], name[end:]
    bare = left.rstrip(_STRAY)
    rest = bare + right if right[:1] in _STRAY or not right else left + right
    return key, _named(rest, path)


def path_names(path: str) -> set[str]:
    """Return the names that structures of a file may have by its name and its folder's alone."""
    names = {printable(stem(path))}
    for slice_from in (None, *get_args(SliceFrom)):
        with suppress(SegmentationError):
            names.add(slice_and_structure(path, slice_from)[1])
    return names


def _found(name: str, slice_from: SliceFrom | None) -> tuple[SliceKey, tuple[int, int]] | None:
    if slice_from in (None, "name", "uid") and (uid := UID.search(name)) and len(uid[0]) <= 64:
        return SliceKey("uid", uid[0]), uid.span()
    if slice_from in (None, "name", "z"):
        numbers = list(_Z.finditer(name))
        if not numbers and slice_from == "z":
            numbers = list(_SIGNED.finditer(name))
        if numbers and abs(z_mm := float(numbers[-1][numbers[-1].lastindex or 0])) <= FARTHEST:
            return SliceKey("z", z_mm), numbers[-1].span()
    if slice_from in (None, "name"):
        digits = list(_DIGITS.finditer(name))
        if digits and (number := float(digits[-1][0])) <= FARTHEST:
            return SliceKey("number", number), digits[-1].span()
    return None


def _named(name: str, path: str) -> str:
    return printable(name.strip(_STRAY) or os.path.basename(os.path.dirname(os.path.abspath(path))) or "contour")
