"""Reads regions of interest of Pinnacle (plan.roi), in cm, in the coordinates of the treatment table.

Seen from the foot of the table, x points to the right, y up and z out of the gantry. The directions in the patient
depend on the patient position, which the header of the image set states. The four positions differ by half turns about
y (feet first instead of head first) and z (prone instead of supine).
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
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, is_number, is_uid, lines, numbers, refusal, unique_names

FORMAT = "Pinnacle plan.roi"

SIGNS = {"HFS": (1, -1, -1), "HFP": (-1, 1, -1), "FFS": (-1, -1, 1), "FFP": (1, 1, 1)}
"""Signs of x, y and z that convert Pinnacle's axes to LPS, by *Patient Position*."""

MM_PER_CM = 10.0

_MAX_DEPTH = 32
_HEADER_BYTES = 2**20

_ROI = re.compile(r"(?:\A\ufeff?|[\r\n])[ \t]*roi[ \t]*=[ \t]*\{")
_HEAD = "// Region of Interest file"
_OPENING = re.compile(r"([A-Za-z_]\w*)\s*=\s*\{\s*(.*)")
_CLOSING = re.compile(r"\}\s*;?")
_TEXT = re.compile(r"([A-Za-z_]\w*)\s*:(.*)")  # the text extends to the end of the line
_VALUE = re.compile(r"([A-Za-z_]\w*)\s*=([^;]*);")
_COUNT = re.compile(r"[0-9]{1,9}")
_HEADER_NAME = re.compile(r"ImageSet_\w+\.header")


def recognised(text: str) -> str | None:
    """Return the evidence that a text is Pinnacle's plan.roi; None if it is not."""
    if _ROI.search(text):
        return "its blocks roi={"
    return f'its first line "{_HEAD}"' if text.removeprefix("\ufeff").startswith(_HEAD) else None


class _Roi(NamedTuple):
    name: str
    curves_cm: list[NDArray[np.float64]]
    """Points of each curve, shape (n, 3)."""


def read(text: str, path: str) -> Segmentation:
    """Return the regions of a plan.roi, in patient coordinates.

    The header of the image set is read from the folder of the file. If that is a Plan_… folder, as in Pinnacle's own
    directories, it may also be one folder up.

    Parameters
    ----------
    text : str
        Content of the file.
    path : str
        Path of the file.

    Returns
    -------
    Segmentation

    Raises
    ------
    SegmentationError
        If the file or the header is damaged, or they do not belong together.
    """
    rois = _rois(lines(text))
    if not rois:
        raise SegmentationError("there is no roi={ in it: no region was drawn, or the file is cut short")
    header, notes, beside = _header(path)
    position = header.get("patient_position", "").upper()
    if not position:
        position = "HFS"
        notes.append("the position of the patient is unknown: head first and supine (HFS) is assumed")
    if position not in SIGNS:
        raise SegmentationError(
            f"the header of the image set has patient_position {quoted(position)}; known are {', '.join(SIGNS)}"
        )
    shift_cm, shifted = _shift_cm(header, rois)
    notes += shifted
    scale = np.array(SIGNS[position]) * MM_PER_CM
    few = sum(len(points) < 3 for roi in rois for points in roi.curves_cm)
    if few:
        notes.append(f"{few} of its curves have fewer than 3 points: marks, not areas, left out")
    names = unique_names((roi.name or f"ROI {i}", i) for i, roi in enumerate(rois, 1))
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
    """Return the regions of a plan.roi. Unknown lines are ignored, except within curves."""
    # Messages never show whole lines: in a damaged file, any line may hold the patient's name.
    rois: list[_Roi] = []
    opened: list[tuple[str, int]] = []  # name and first line of each open block
    announced: dict[str, tuple[int, int]] = {}  # num_curve and num_points of the open blocks: value, line
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
                _check_count(announced.pop("num_points", None), len(points), "points")
                points = []
            elif inside == ("roi",):
                _check_count(announced.pop("num_curve", None), len(curves), "curves")
                rois.append(_Roi(name, curves))
        elif inside == ("roi", "curve", "points"):
            points.append((line, row))
        elif match := _OPENING.match(text):
            if match[2] and not match[2].startswith("//"):
                raise refusal(line, row.index("{") + 2, "more follows in the first line of a block; break the line")
            if len(opened) == _MAX_DEPTH:
                raise refusal(line, 1, f"blocks are nested more than {_MAX_DEPTH} deep; is it a plan.roi?")
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
    """Return the points of a curve from its lines, given as (line number, text)."""
    parts: list[str] = []
    for line, row in rows:
        point = row.split()
        if len(point) != 3:
            raise refusal(line, 1, "the line is not a point, x y z; export the file again")
        parts += point

    def position(wrong: int) -> tuple[int, int]:
        line, row = rows[wrong // 3]
        return line, list(re.finditer(r"\S+", row))[wrong % 3].start() + 1

    return numbers(parts, position, LARGEST_COORDINATE / MM_PER_CM).reshape(-1, 3)


def _check_count(announced: tuple[int, int] | None, found: int, what: str) -> None:
    """Raise if a file holds more or fewer points or curves than it announces."""
    if announced is not None and announced[0] != found:
        raise refusal(
            announced[1], 1, f"{announced[0]} {what} are announced, but {found} follow; export the file again"
        )


def _header(path: str) -> tuple[dict[str, str], list[str], tuple[str, ...]]:
    """Return the entries of the header of the image set, notes if it was not read, and its path."""
    own_folder = os.path.dirname(path if filesystem.is_url(path) else os.path.abspath(path))
    is_plan = os.path.basename(own_folder).startswith("Plan_")
    for folder in [own_folder, os.path.dirname(own_folder)] if is_plan else [own_folder]:
        try:
            names = [name for name in filesystem.folder_entries(folder) if _HEADER_NAME.fullmatch(name)]
            found = [file for name in names if filesystem.isfile(file := os.path.join(folder, name))]
            if len(found) > 1:
                return {}, ["there are several ImageSet_….header; keep only the one that plan.roi was drawn on"], ()
            if found:
                with io.BufferedReader(filesystem.opened(found[0])) as f:
                    return _keys(f.read(_HEADER_BYTES).decode("utf-8", "replace")), [], (found[0],)
        except OSError as exc:
            return {}, [f"the header of the image set cannot be read ({exc.strerror})"], ()
    return {}, ["there is no ImageSet_….header beside it"], ()


def _keys(text: str) -> dict[str, str]:
    """Return the entries of an image set's header: ``key = value;`` and ``key : value``."""
    pairs = {}
    for row in lines(text):
        if match := _TEXT.match(row.strip()) or _VALUE.match(row.strip()):
            pairs[match[1]] = match[2].strip().strip('"')
    return pairs


def _shift_cm(header: dict[str, str], rois: list[_Roi]) -> tuple[NDArray[np.float64], list[str]]:
    """Return the shift from the origin of the plan to the origin of DICOM, and notes.

    Plans of Pinnacle 9 and later have the origin of DICOM (x_start_dicom and y_start_dicom in the header); older plans
    have Pinnacle's own (x_start and y_start). plan.roi does not state which. The curves have to lie inside the image,
    which decides.
    """
    no_shift = np.zeros(3)
    keys = [f"{axis}_{what}" for what in ("dim", "pixdim", "start") for axis in "xyz"]
    points = [curve for roi in rois for curve in roi.curves_cm if len(curve)]
    if not points or not all(is_number(header.get(key, ""), LARGEST_COORDINATE / MM_PER_CM) for key in keys):
        return no_shift, []
    size, step, start = np.array([float(header[key]) for key in keys]).reshape(3, 3)
    dicom = start.copy()
    for axis, key in enumerate(("x_start_dicom", "y_start_dicom")):
        if is_number(header.get(key, ""), LARGEST_COORDINATE / MM_PER_CM):
            dicom[axis] = float(header[key])
    low = np.min([p.min(axis=0) for p in points], axis=0)
    high = np.max([p.max(axis=0) for p in points], axis=0)

    def contains_curves(first: NDArray[np.float64]) -> bool:
        # Curves may surround the outermost pixels, so the image is extended by one pixel on every side.
        return bool((low >= first - step).all() and (high <= first + size * step).all())

    if contains_curves(dicom):
        difference_cm = np.abs(start - dicom).max()
        if difference_cm > step.min() / 2 and contains_curves(start):
            return no_shift, [
                f"if the plan was made before Pinnacle 9, its curves are {difference_cm * MM_PER_CM:g} mm off: "
                "its header has two origins"
            ]
        return no_shift, []
    if contains_curves(start):
        return dicom - start, ["positions are those of Pinnacle before version 9, moved to the origin of DICOM"]
    raise SegmentationError(
        "its curves lie outside of the image that the header beside it describes; "
        "replace the header by that of the image set on which they were drawn"
    )
