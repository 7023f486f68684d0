"""Reads regions of interest of Pinnacle (plan.roi), in cm, in the frame of the treatment table.

Where Pinnacle's axes lie in the patient depends on how the patient lies on the table, which the header of the image
set says. x runs to the right of someone who looks from the foot of the table, y up, z out of the gantry, so the four
positions differ by half turns about y (feet first for head first) and z (prone for supine).
"""

from __future__ import annotations

import io
import os
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.errors import SegmentationError
from gpuprep.files import filesystem
from gpuprep.masks.model import Contour, Segmentation, Structure
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, distinct, is_number, is_uid, lines, numbers, refusal

FORMAT = "Pinnacle plan.roi"

SIGNS = {"HFS": (1, -1, -1), "HFP": (-1, 1, -1), "FFS": (-1, -1, 1), "FFP": (1, 1, 1)}
"""LPS from Pinnacle's axes, by *Patient Position*."""

MM_PER_CM = 10.0

_DEEPEST = 32
_HEADER_BYTES = 2**20

_ROI = re.compile(r"(?:\A\ufeff?|[\r\n])[ \t]*roi[ \t]*=[ \t]*\{")
_HEAD = "// Region of Interest file"
_OPENING = re.compile(r"([A-Za-z_]\w*)\s*=\s*\{\s*(.*)")
_CLOSING = re.compile(r"\}\s*;?")
_TEXT = re.compile(r"([A-Za-z_]\w*)\s*:(.*)")  # to the end of the line, whatever it holds
_VALUE = re.compile(r"([A-Za-z_]\w*)\s*=([^;]*);")
_COUNT = re.compile(r"[0-9]{1,9}")
_HEADER_NAME = re.compile(r"ImageSet_\w+\.header")


def recognised(text: str) -> str | None:
    """Return why a text is Pinnacle's plan.roi; None where it is not."""
    if _ROI.search(text):
        return "its blocks roi={"
    return f'its first line "{_HEAD}"' if text.removeprefix("\ufeff").startswith(_HEAD) else None


class _Roi(NamedTuple):
    name: str
    curves_cm: list[NDArray[np.float64]]
    """Points of each, shape (n, 3)."""


def read(text: str, path: str) -> Segmentation:
    """Return the regions of a plan.roi, in the patient.

    The header of the image set is looked for beside the file, and one folder up where the file lies in a Plan_…
    folder, as Pinnacle has it.

    Parameters
    ----------
    text : str
        The whole file.
    path : str
        Of the file.

    Returns
    -------
    Segmentation

    Raises
    ------
    SegmentationError
        If the file or the header is damaged, or one does not belong to the other.
    """
    rois = _rois(lines(text))
    if not rois:
        raise SegmentationError("there is no roi={ in it: no region was drawn, or the file is cut short")
    header, notes, beside = _header(path)
    position = header.get("patient_position", "").upper()
    if not position:
        position = "HFS"
        notes.append("the position of the patient is not known, head first and supine (HFS) was assumed")
    if position not in SIGNS:
        raise SegmentationError(
            f"the header of the image set says patient_position {quoted(position)}; known are {', '.join(SIGNS)}"
        )
    shift_cm, shifted = _shift_cm(header, rois)
    notes += shifted
    scale = np.array(SIGNS[position]) * MM_PER_CM
    few = sum(len(points) < 3 for roi in rois for points in roi.curves_cm)
    if few:
        notes.append(f"{few} of its curves have fewer than 3 points: marks, not areas, left out")
    names = distinct((roi.name or f"ROI {i}", i) for i, roi in enumerate(rois, 1))
    uid = header.get("series_UID", "")
    return Segmentation(
        path=path,
        format=FORMAT,
        why=recognised(text) or "",
        structures=tuple(
            Structure(
                name,
                tuple(Contour((points + shift_cm) * scale, "patient") for points in roi.curves_cm if len(points) >= 3),
            )
            for name, roi in zip(names, rois, strict=True)
        ),
        series_uids=(uid,) if is_uid(uid) else (),
        notes=tuple(notes),
        beside=beside,
    )


def _rois(rows: list[str]) -> list[_Roi]:
    """Return the regions of a plan.roi. Lines that are not understood are passed over, but not inside of curves."""
    # Whole lines are never shown: in a damaged file each of them may be the patient's name.
    rois: list[_Roi] = []
    opened: list[tuple[str, int]] = []  # blocks: name, line
    announced: dict[str, tuple[int, int]] = {}  # of the current roi and curve: number, line
    name, curves, points = "", list[NDArray[np.float64]](), list[tuple[int, str]]()
    for line, row in enumerate(rows, 1):
        text = row.strip()
        inside = tuple(block for block, _ in opened)
        if not text or text.startswith("//"):
            continue
        if _CLOSING.match(text):
            if not opened:
                raise refusal(line, 1, "a block ends here that never began; export the file again")
            opened.pop()
            if inside == ("roi", "curve"):
                curves.append(_points_cm(points))
                _agree(announced.pop("num_points", None), len(points), "points")
                points = []
            elif inside == ("roi",):
                _agree(announced.pop("num_curve", None), len(curves), "curves")
                rois.append(_Roi(name, curves))
        elif inside == ("roi", "curve", "points"):
            points.append((line, row))
        elif match := _OPENING.match(text):
            if match[2] and not match[2].startswith("//"):
                raise refusal(line, row.index("{") + 2, "more follows on the beginning of a block; break the line")
            if len(opened) == _DEEPEST:
                raise refusal(line, 1, f"blocks are nested more than {_DEEPEST} deep; is it a plan.roi?")
            opened.append((match[1], line))
            path = (*inside, match[1])
            if path == ("roi",):
                name, curves, announced = "", [], {}
            elif path == ("roi", "curve", "points") and points:
                raise refusal(line, 1, "a curve has points twice; export the file again")
        elif (match := _TEXT.match(text)) and inside == ("roi",):
            if match[1] == "name":
                name = match[2].strip()
        elif (match := _VALUE.match(text)) and inside in (("roi",), ("roi", "curve")):
            if match[1] in ("num_curve", "num_points"):
                value = match[2].strip()
                if not _COUNT.fullmatch(value):
                    raise refusal(
                        line,
                        row.index(value, row.index("=")) + 1,
                        f"{match[1]} is {quoted(value)}; it has to be a whole number",
                    )
                announced[match[1]] = int(value), line
        elif inside == ("roi", "curve") and not _TEXT.match(text):
            raise refusal(line, 1, "the line is out of place in a curve; export the file again")
    if opened:
        block, begin = opened[-1]
        raise refusal(
            len(rows), 1, f"the file ends inside of {quoted(block)}, which began in line {begin}; export it again"
        )
    return rois


def _points_cm(rows: list[tuple[int, str]]) -> NDArray[np.float64]:
    """Return the points of a curve from their lines, which come with their numbers."""
    parts: list[str] = []
    for line, row in rows:
        point = row.split()
        if len(point) != 3:
            raise refusal(line, 1, "the line is not a point, x y z; export the file again")
        parts += point

    def place(wrong: int) -> tuple[int, int]:
        line, row = rows[wrong // 3]
        return line, list(re.finditer(r"\S+", row))[wrong % 3].start() + 1

    return numbers(parts, place, LARGEST_COORDINATE / MM_PER_CM).reshape(-1, 3)


def _agree(announced: tuple[int, int] | None, found: int, what: str) -> None:
    """Refuse where a file holds another number of things than it says."""
    if announced is not None and announced[0] != found:
        raise refusal(
            announced[1], 1, f"{announced[0]} {what} are announced, but {found} follow; export the file again"
        )


def _header(path: str) -> tuple[dict[str, str], list[str], tuple[str, ...]]:
    """Return what the header of the image set says, notes on why it was not read, and its path."""
    folder = os.path.dirname(path if filesystem.is_url(path) else os.path.abspath(path))
    around = [folder, os.path.dirname(folder)] if os.path.basename(folder).startswith("Plan_") else [folder]
    for place in around:
        try:
            names = [name for name in filesystem.listed(place) if _HEADER_NAME.fullmatch(name)]
            found = [file for name in names if filesystem.isfile(file := os.path.join(place, name))]
            if len(found) > 1:
                return {}, ["there are several ImageSet_….header; leave beside plan.roi the one it was drawn on"], ()
            if found:
                with io.BufferedReader(filesystem.opened(found[0])) as f:
                    return _keys(f.read(_HEADER_BYTES).decode("utf-8", "replace")), [], (found[0],)
        except OSError as exc:
            return {}, [f"the header of the image set cannot be read ({exc.strerror})"], ()
    return {}, ["there is no ImageSet_….header beside it"], ()


def _keys(text: str) -> dict[str, str]:
    """Return the pairs of an image set's header: ``key = value;`` and ``key : value``."""
    pairs = {}
    for row in lines(text):
        if match := _TEXT.match(row.strip()) or _VALUE.match(row.strip()):
            pairs[match[1]] = match[2].strip().strip('"')
    return pairs


def _shift_cm(header: dict[str, str], rois: list[_Roi]) -> tuple[NDArray[np.float64], list[str]]:
    """Return what to add to points, so that the image begins where DICOM has it, and notes on it.

    Since version 9 Pinnacle counts from the origin of DICOM. Before, and in plans made then, it put the image where it
    liked, which is where the header says x_start and y_start rather than x_start_dicom and y_start_dicom. Which one it
    was, plan.roi does not say: the curves have to lie inside of the image.
    """
    nothing = np.zeros(3)
    keys = [f"{axis}_{what}" for what in ("dim", "pixdim", "start") for axis in "xyz"]
    points = [curve for roi in rois for curve in roi.curves_cm if len(curve)]
    if not points or not all(is_number(header.get(key, ""), LARGEST_COORDINATE / MM_PER_CM) for key in keys):
        return nothing, []
    size, step, start = np.array([float(header[key]) for key in keys]).reshape(3, 3)
    dicom = start.copy()
    for axis, key in enumerate(("x_start_dicom", "y_start_dicom")):
        if is_number(header.get(key, ""), LARGEST_COORDINATE / MM_PER_CM):
            dicom[axis] = float(header[key])
    least = np.min([p.min(axis=0) for p in points], axis=0)
    most = np.max([p.max(axis=0) for p in points], axis=0)

    def holds(first: NDArray[np.float64]) -> bool:
        # Curves may run around the outermost pixels: one pixel more on every side.
        return bool((least >= first - step).all() and (most <= first + size * step).all())

    if holds(dicom):
        other = np.abs(start - dicom).max()
        if other > step.min() / 2 and holds(start):
            return nothing, [
                f"in a plan made before Pinnacle 9 it may lie {other * MM_PER_CM:g} mm off: its header has two origins"
            ]
        return nothing, []
    if holds(start):
        return dicom - start, ["positions are those of Pinnacle before version 9, moved to the origin of DICOM"]
    raise SegmentationError(
        "its curves lie outside of the image that the header beside it describes; "
        "put the header of the image set there that they were drawn on"
    )
