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
from gpuprep.masks.text_parsing import LARGEST_COORDINATE

UID = re.compile(r"(?<![0-9.])[0-2](?:\.(?:0|[1-9][0-9]*)){4,}(?![0-9])")
"""Matches a DICOM UID anywhere in a name or a path."""

_Z = re.compile(r"(?<![A-Za-z])[zZ][=_ ]?([+-]?[0-9]+(?:\.[0-9]+)?)")
_SIGNED = re.compile(r"(?:(?<![A-Za-z0-9])[+-])?[0-9]+(?:\.[0-9]+)?")
_DIGITS = re.compile(r"[0-9]+")
_SEPARATORS = "-_.=+ "


def stem(path: str) -> str:
    """Return the file name without its extension, which begins with a letter, so that UIDs and decimals stay whole."""
    name = os.path.basename(path)
    base, extension = os.path.splitext(name)
    return base if extension[1:2].isalpha() else name


def slice_and_structure(path: str, slice_from: SliceFrom | None) -> tuple[SliceKey | None, str]:
    """Return the slice and the name of the structure that the file name of a single slice contains.

    Parameters
    ----------
    path : str
        The slice is a DICOM UID in the file name, else a number after "z" (mm), else the last digits (a slice number).
        The rest of the file name names the structure; if nothing remains, the name of the folder does.
    slice_from : {"name", "column", "z", "uid"} or None
        "uid": only a UID counts. "z": only a z in mm counts, with or without the letter z. "name": any of the three
        is required. None: any of the three, or no slice at all. "column": always an error.

    Returns
    -------
    key : SliceKey or None
        None if the file name contains no slice.
    structure : str

    Raises
    ------
    SegmentationError
        If the file name does not contain the slice in the form that `slice_from` requires.
    """
    name = stem(path)
    found = _key_and_span(name, slice_from)
    if found is None:
        if slice_from is not None:
            where = "no column of the file" if slice_from == "column" else "nothing in its name"
            raise SegmentationError(f"--slice-from {slice_from}: {where} gives the slice ({quoted(name)})")
        return None, _structure_name(name, path)
    key, (begin, end) = found
    left, right = name[:begin], name[end:]
    stripped = left.rstrip(_SEPARATORS)
    rest = stripped + right if right[:1] in _SEPARATORS or not right else left + right
    return key, _structure_name(rest, path)


def path_names(path: str) -> set[str]:
    """Return all structure names that the names of a file and its folder can yield."""
    names = {printable(stem(path))}
    for slice_from in (None, *get_args(SliceFrom)):
        with suppress(SegmentationError):
            names.add(slice_and_structure(path, slice_from)[1])
    return names


def _key_and_span(name: str, slice_from: SliceFrom | None) -> tuple[SliceKey, tuple[int, int]] | None:
    if slice_from in (None, "name", "uid") and (uid := UID.search(name)) and len(uid[0]) <= 64:
        return SliceKey("uid", uid[0]), uid.span()
    if slice_from in (None, "name", "z"):
        numbers = list(_Z.finditer(name))
        if not numbers and slice_from == "z":
            numbers = list(_SIGNED.finditer(name))
        if numbers and abs(z_mm := float(numbers[-1][numbers[-1].lastindex or 0])) <= LARGEST_COORDINATE:
            return SliceKey("z", z_mm), numbers[-1].span()
    if slice_from in (None, "name"):
        digits = list(_DIGITS.finditer(name))
        if digits and (number := float(digits[-1][0])) <= LARGEST_COORDINATE:
            return SliceKey("number", number), digits[-1].span()
    return None


def _structure_name(name: str, path: str) -> str:
    return printable(name.strip(_SEPARATORS) or os.path.basename(os.path.dirname(os.path.abspath(path))) or "contour")
