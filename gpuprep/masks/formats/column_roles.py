"""Determines the role of each column of a table of numbers, by the header or by the values."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.core.mask_options import ReadingOptions, Units
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.parse_numbers import Table
from gpuprep.masks.model import Plane

ROLES = {
    "x": ("x", "xcoord", "col", "column"),
    "y": ("y", "ycoord", "row"),
    "z": ("z", "zcoord"),
    "slice": ("slice", "slicenumber", "sliceno", "sliceindex", "image", "frame"),
    "contour": ("contour", "contourid", "polygon", "polygonid"),
    "object": ("object", "objectid", "label", "labelid", "name", "structure", "roi", "class", "organ"),
    "value": ("value", "val"),
    "": ("", "point", "pointid", "vertex", "index", "id", "n"),
}
"""Column names in headers by role, in lower case and without separators. Columns of the role "" are ignored."""

_ROLE = {name: role for role, names in ROLES.items() for name in names}
_UNITS: dict[str, Units] = {
    "px": "px", "pixel": "px", "pixels": "px", "vox": "px", "voxel": "px", "mm": "mm", "cm": "cm"
}  # fmt: skip
_UNIT = re.compile(r"[ _]*[(\[]?(mm|cm|px|pixels?|vox|voxel)[)\]]?$")
_SEPARATORS = re.compile(r"[ _.\-]+")
_BOX = re.compile(r"^(?:x_?min|x_?max|y_?min|y_?max|bbox.*|width|height|left|top|x1|y1|x2|y2)$")

HEADER_HINT = "name the columns in a first line, such as 'slice x y' or 'contour x y z'"

MOST_LIST_LABELS = 64
"""Largest number of distinct values in a list of pixels that can be labels."""

MOST_LABELS = 256
"""Distinct values beyond which an image is no mask."""

SHORTEST_PIXEL_LIST = 6
"""Smallest number of points that are recognised as a list of pixels; fewer may be an outline by chance."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Role of each column (one of `ROLES`), the evidence for it, and the units if the header names them."""

    roles: tuple[str, ...]
    why: str
    units: Units | None = None


def named(header: tuple[str, ...], labelled: bool) -> Columns:
    """Return the columns that a header names.

    Parameters
    ----------
    header : tuple of str
        Names of the columns.
    labelled : bool
        Whether the first column holds words. They are not in the table, so the column gets no role.

    Raises
    ------
    SegmentationError
        If it names boxes, unknown columns, a column twice, z and slice, or different units, or lacks x or y.
    """
    names = [name.lower() for name in header]
    if sum(bool(_BOX.match(_SEPARATORS.sub("_", name))) for name in names) >= 2:
        raise SegmentationError("its header names the corners of boxes: gpuprep reads contours, not boxes")
    units: set[Units] = set()
    roles: list[str] = []
    for name in names:
        if found := _UNIT.search(name):
            units.add(_UNITS[found[1]])
            name = name[: found.start()]
        role = _ROLE.get(_SEPARATORS.sub("", name))
        if role is None:
            if {"x", "y"} & set(names):
                raise SegmentationError(
                    f"the header names a column {quoted(name)}, which is none of x, y, z, slice, contour, object, "
                    "value, point: rename it, or remove it"
                )
            raise SegmentationError("its first line is no header of coordinates: no known kind of segmentation text")
        roles.append(role)
    for role in ("x", "y"):
        if role not in roles:
            raise SegmentationError(f"the header names no column {role}: {HEADER_HINT}")
    for role in set(roles) - {""}:
        if roles.count(role) > 1:
            raise SegmentationError(f"the header names two columns for {role}: keep one of them")
    if {"z", "slice"} <= set(roles):
        raise SegmentationError("the header names both z and slice: keep the one that gives the slice")
    if len(units) > 1:
        raise SegmentationError(f"the header names different units, {' and '.join(sorted(units))}: use one")
    if labelled:
        if roles[0] not in ("object", ""):
            raise SegmentationError(f"the header names the first column {quoted(header[0])}, but it holds words")
        roles = roles[1:]
    return Columns(tuple(roles), f"a header that names {', '.join(r for r in roles if r)}", next(iter(units), None))


def of_points(table: Table, reading: ReadingOptions, plane: Plane | None) -> Columns | None:
    """Return the columns of a list of points on several slices without header; None if it is no such list.

    A column that keeps each value for at least three lines is no x or y of an outline. Of three columns, such a column
    is the slice (``slice x y`` or ``x y z``). Before ``x y z``, it is the contour, and two are the object and the
    contour.

    Raises
    ------
    SegmentationError
        If the columns are ambiguous.
    """
    grid = table.grid()
    width = grid.shape[1]
    if table.labels and width == 2:
        return Columns(("x", "y"), "a label and two numbers in every line")
    if width == 3:
        return _three_columns(grid, reading, plane)
    if width == 4 and steady(grid[:, 0]):
        if steady(grid[:, 1]) and not steady(grid[:, 3]):
            raise SegmentationError(f"its first two columns could both be the slice or the contour: {HEADER_HINT}")
        return Columns(("contour", "x", "y", "z"), "four columns, and the first one stays the same from point to point")
    if width == 5 and steady(grid[:, 0]) and steady(grid[:, 1]):
        why = "five columns, and the first two stay the same from point to point"
        return Columns(("object", "contour", "x", "y", "z"), why)
    return None


def _three_columns(grid: NDArray[np.float64], reading: ReadingOptions, plane: Plane | None) -> Columns | None:
    first, last = steady(grid[:, 0]), steady(grid[:, 2], whole_only=False)
    slice_x_y = Columns(("slice", "x", "y"), "three columns, and the first one stays the same from point to point")
    x_y_z = Columns(("x", "y", "z"), "three columns, and the last one stays the same from point to point")
    if reading.slice_from == "z" or reading.units in ("mm", "cm"):
        return Columns(("x", "y", "z"), "three columns")
    if first and last:
        raise SegmentationError(f"its first and its last column could both be the slice: {HEADER_HINT}")
    if first or last:
        return slice_x_y if first else x_y_z
    if in_patient(grid, plane):  # in slices that are not axial, no coordinate is constant
        return Columns(("x", "y", "z"), "three columns of coordinates in mm")
    return None


def in_patient(xyz: NDArray[np.float64], plane: Plane | None) -> bool:
    """Return whether a coordinate lies more than a pixel outside of the slice, and so must be in mm in the patient."""
    beyond = plane is not None and bool((xyz[:, :2] > np.array([plane.columns, plane.rows]) + 1).any())
    return beyond or bool(xyz[:, :2].min() < -1)


def steady(column: NDArray[np.float64], *, whole_only: bool = True) -> bool:
    """Return whether a column keeps each value for at least three lines."""
    if whole_only and not (is_whole(column) and column.min() >= 0):
        return False
    changes = np.flatnonzero(np.diff(column)) + 1
    return int(np.diff(changes, prepend=0, append=len(column)).min()) >= 3


def is_whole(values: NDArray[np.float64]) -> bool:
    """Return whether all values are whole numbers."""
    return bool((values == np.rint(values)).all())


def check_outlines(grid: NDArray[np.float64]) -> None:
    """Raise if points are in the order of a list of pixels, for any order of columns, so that they are no outline."""
    orders = [(0, 1), (1, 0), (0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)]
    if len(grid) >= SHORTEST_PIXEL_LIST and any(
        is_scan(grid[:, order], len(order)) for order in orders if max(order) < grid.shape[1]
    ):
        raise SegmentationError(
            "lists the pixels of an area, not an outline: name the columns in a first line, as in 'x y z value', "
            "and add a value of 1 where there is none"
        )


def is_scan(grid: NDArray[np.float64], depth: int) -> bool:
    """Return whether points are in the order in which programs list pixels, row by row. No outline has this order.

    Parameters
    ----------
    grid : array of float, shape (n, ≥ depth)
        Points; the first columns are x, y and, if `depth` is 3, z.
    depth : {2, 3}
        Number of coordinates.
    """
    pixels = grid[:, :depth]
    if len(pixels) < 2 or not is_whole(pixels) or pixels.min() < 0:
        return False
    steps = np.diff(pixels, axis=0)
    in_slice = (steps[:, 2:] == 0).all(axis=1)
    in_row = in_slice & (steps[:, 1] == 0)
    down = steps[in_slice, 1]
    return bool(
        (steps[:, 2:] >= 0).all()
        and ((down >= 0).all() or (down <= 0).all())  # y decreases with ImageJ's option Invert Y
        and (steps[in_row, 0] > 0).all()
        and 2 * (steps[in_row, 0] == 1).sum() >= len(steps)
    )
