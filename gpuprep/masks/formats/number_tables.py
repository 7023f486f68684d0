"""Turns tables of numbers into structures: outlines, points, polygons, lists of pixels, images of labels.

In pixel coordinates, the centre of the first pixel is at (0, 0), or at (1, 1) with ``--pixel-base 1``. In the format
``imagej-xy`` it is at (0.5, 0.5), because ImageJ counts from the corner of the image. Two columns that count from pixel
centres are read with ``--text-format points``. Fractions of a slice (YOLO) count from its corner too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count, printable
from gpuprep.core.mask_options import ReadingOptions, Units
from gpuprep.dicom.header_checks import LARGEST_SIDE
from gpuprep.errors import SegmentationError
from gpuprep.masks.filename_hints import slice_and_structure, stem
from gpuprep.masks.formats import column_units
from gpuprep.masks.formats.column_roles import MOST_LABELS, MOST_LIST_LABELS, Columns, is_scan, is_whole, of_points
from gpuprep.masks.formats.parse_numbers import Table
from gpuprep.masks.model import Collector, Contour, Frame, Plane, Raster, Segmentation, SliceKey, bounding_raster
from gpuprep.masks.text_parsing import LARGEST_COORDINATE

MOST_CELLS = 2**30
"""Largest number of pixels in the bounding rectangles of a list of pixels; more means scattered pixels."""

EMPTY = "nothing is painted: every value is 0"

NO_AREA = "of fewer than 3 points, which have no area"


@dataclass(frozen=True, slots=True)
class Source:
    """A table of numbers, the options for reading it, and the structures found so far."""

    path: str
    """Gives slice and structure if the content does not."""
    table: Table
    columns: Columns
    reading: ReadingOptions
    plane: Plane | None
    """Matrix and pixel spacing of the series, if known."""
    found: Collector = field(default_factory=Collector)


Result = tuple[tuple[str, ...], bool]
"""Notes, and whether the file holds one slice."""


@dataclass(frozen=True, slots=True)
class TableFormat:
    """A format of tables of numbers, which is recognised from its columns."""

    title: str
    reader: Callable[[Source], Result]
    """Collects the structures of a table."""
    roles: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Roles of columns without a header, by the number of columns; empty: it has no columns."""
    guessed: Callable[[Table, ReadingOptions, Plane | None], Columns | None] | None = None
    """Returns the roles of other numbers of columns; None: they cannot be of this format."""
    needed: frozenset[str] = frozenset()
    """Roles that its columns must have."""
    has_more: bool = True
    """Whether columns of other roles are allowed."""
    has_labels: bool = False
    """Whether a line may begin with a word, which is its label."""

    def read(self, source: Source, why: str) -> Segmentation:
        """Return the structures of a table.

        Parameters
        ----------
        source : Source
            The table.
        why : str
            How its format was recognised.

        Raises
        ------
        SegmentationError
            If the content does not fit the format, or the units are ambiguous.
        """
        notes, per_slice = self.reader(source)
        return Segmentation(source.path, self.title, why, source.found.structures, per_slice=per_slice, notes=notes)


def _outline(source: Source) -> Result:
    table, reading = source.table, source.reading
    roles = source.columns.roles
    points = table.grid()[:, [roles.index("x"), roles.index("y")]]
    stated = column_units.stated(reading, source.columns)
    _check_not_patient(points, stated)
    unit = stated or column_units.of_outline(points, table.pointed, source.plane)
    frame: Frame = "pixel" if unit == "px" else "corner"
    points = _in_mm(points, unit) if frame == "corner" else points - 0.5
    key, name = slice_and_structure(source.path, reading.slice_from)
    return _collect(source, [(name, key)], points, np.flatnonzero(table.follows_blank), frame, closing=False), True


def _points(source: Source) -> Result:
    table, reading, columns = source.table, source.reading, source.columns
    grid = table.grid()
    by_role = {role: grid[:, n] for n, role in enumerate(columns.roles) if role}
    unit = column_units.stated(reading, columns)
    xy = np.stack([by_role["x"], by_role["y"]], axis=1)
    base = reading.pixel_base
    keys: NDArray[np.float64] | None = by_role.get("slice", by_role.get("z"))
    by = "number"
    frame: Frame = "pixel"
    points = xy - base
    if "z" in by_role:
        xyz = np.stack([by_role["x"], by_role["y"], by_role["z"]], axis=1)
        if (unit or column_units.of_points(xyz, source.plane)) != "px":
            frame, points, keys = "patient", _in_mm(xyz, unit), None
        elif reading.slice_from == "z":
            by = "z"
    else:
        _check_not_patient(xy, unit)
        if unit in ("mm", "cm"):
            if keys is not None:
                raise SegmentationError(
                    "coordinates in mm with a slice number: in mm, x, y and z are needed; use --units px for pixels"
                )
            frame, points = "corner", _in_mm(xy, unit)
    if keys is not None and by == "number":
        if not is_whole(keys) or keys.min() < 0:
            bad = int(np.argmax((keys != np.rint(keys)) | (keys < 0)))
            hint = ": use --slice-from z if it is in mm" if "z" in by_role else ""
            raise SegmentationError(f"line {table.lines[bad]}: {keys[bad]:g} is no slice number{hint}")
        if reading.slice_from not in (None, "column"):
            raise SegmentationError(f"--slice-from {reading.slice_from}: a column gives the slice; omit the option")

    changes = table.follows_blank.copy()
    for role in ("slice", "object", "contour"):
        if role in by_role:
            changes[1:] |= np.diff(by_role[role]) != 0
    if table.labels:
        changes[1:] |= np.array([a != b for a, b in zip(table.labels, table.labels[1:], strict=False)], dtype=bool)
    if "z" in by_role:
        steps = np.diff(by_role["z"]) != 0
        if frame == "pixel" or 3 * (np.count_nonzero(steps) + 1) <= len(steps) + 1:
            changes[1:] |= steps  # more frequent steps are within contours of slices that are not axial
    per_slice = frame != "patient" and keys is None
    key, name = (
        slice_and_structure(source.path, reading.slice_from) if per_slice else (None, printable(stem(source.path)))
    )
    starts = np.flatnonzero(changes)
    firsts = np.append(0, starts) if not len(starts) or starts[0] else starts
    targets: list[tuple[str, SliceKey | None]] = []
    for n in firsts.tolist():
        label = table.labels[n] if table.labels else f"{by_role['object'][n]:g}" if "object" in by_role else name
        if keys is not None:
            key = SliceKey("z", float(keys[n])) if by == "z" else SliceKey("number", float(keys[n]))
        targets.append((printable(label) or name, key))
    return _collect(source, targets, points, starts, frame, closing=True), per_slice


def _collect(
    source: Source,
    targets: list[tuple[str, SliceKey | None]],
    points: NDArray[np.float64],
    starts: NDArray[np.int64],
    frame: Frame,
    *,
    closing: bool,
) -> tuple[str, ...]:
    """Collect contours; return notes.

    A piece begins at the first point and at each of `starts`. `targets` has the structure and slice of each piece, or
    of all. With `closing`, a contour ends where its first point recurs, and the next contour of the piece begins.
    """
    firsts = [0, *(n for n in starts.tolist() if n)]
    recurrences = _recurrences(points) if closing else None
    too_short: list[int] = []
    kept = False
    for n, (begin, end) in enumerate(zip(firsts, [*firsts[1:], len(points)], strict=True)):
        name, key = targets[n if len(targets) > 1 else 0]
        for first, last in _closed_parts(recurrences, begin, end):
            if last - first < 3:
                too_short.append(first)
                continue
            source.found.add(name, Contour(points[first:last], frame, key))
            kept = True
    if not kept:
        raise SegmentationError(
            f"holds {format_count(len(points), 'point')}, but no contour: one takes at least 3 points"
        )
    if not too_short:
        return ()
    first_line = source.table.lines[too_short[0]]
    return (f"{format_count(len(too_short), 'contour')} {NO_AREA}, the first in line {first_line}",)


def _recurrences(points: NDArray[np.float64]) -> list[int]:
    """Return for each point the index of the next equal point, or the number of points if there is none."""
    order = np.lexsort(points.T)  # stable
    same = (points[order[1:]] == points[order[:-1]]).all(axis=1)
    following = np.full(len(points), len(points))
    following[order[:-1][same]] = order[1:][same]
    return following.tolist()


def _closed_parts(recurrences: list[int] | None, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the range of each part of a piece of points; a part ends where its first point recurs."""
    while recurrences is not None and begin < end:
        close = recurrences[begin]
        while close < end and close - begin < 3:
            close = recurrences[close]
        if close >= end - 1:
            break
        yield begin, close + 1
        begin = close + 1
    if begin < end:
        yield begin, end


def _polygons(source: Source) -> Result:
    table, reading, plane = source.table, source.reading, source.plane
    counts = table.counts
    odd = counts % 2 == 1
    if odd.any() and (table.labels is not None or not odd.all()):
        at = int(np.argmax(odd != odd[0])) if table.labels is None else int(np.argmax(odd))
        expected = "odd" if table.labels is None and odd[0] else "even"
        raise SegmentationError(
            f"line {table.lines[at]}: {format_count(int(counts[at]))}, but an {expected} count is expected: cut short "
            "or damaged"
        )
    if (few := counts - odd < 6).any():
        at = int(np.argmax(few))
        raise SegmentationError(
            f"line {table.lines[at]}: {format_count(int(counts[at]))}: a polygon takes at least 3 points"
        )
    numeric = bool(odd.all())
    coordinates = np.ones(len(table.values), dtype=bool)
    coordinates[table.starts[:-1]] = not numeric
    values = table.values[coordinates]
    classes = table.values[table.starts[:-1]]
    if numeric and not is_whole(classes):
        at = int(np.argmax(classes != np.rint(classes)))
        raise SegmentationError(f"line {table.lines[at]}: {classes[at]:g} is no class number before pairs x, y")
    unit = reading.units
    fractions = unit is None and table.pointed and _are_fractions(values)
    rest = np.delete(table.values, table.starts[:-1])
    if (
        unit is None
        and not numeric
        and not table.labels
        and is_whole(classes)
        and not is_whole(rest)
        and _are_fractions(rest)
    ):
        raise SegmentationError(
            "fractions after a whole number, but an even count of numbers: is there a confidence? Remove it"
        )
    points = values.reshape(-1, 2)
    frame: Frame = "pixel"
    if fractions:
        if plane is None:
            raise SegmentationError("its coordinates are fractions of a slice, but the size of the slice is not known")
        points = points * [plane.columns, plane.rows] - 0.5
    elif unit in ("mm", "cm"):
        frame, points = "corner", _in_mm(points, unit)
    else:
        points = points - reading.pixel_base
    if not fractions:
        _check_not_patient(points, unit)
    key, name = slice_and_structure(source.path, reading.slice_from)
    ends = np.cumsum((counts - odd) // 2).tolist()
    for n, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        label = table.labels[n] if table.labels else f"{classes[n]:g}" if numeric else name
        source.found.add(printable(label) or name, Contour(points[begin:end], frame, key))
    return (), True


def _are_fractions(values: NDArray[np.float64]) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def _pixel_list(source: Source) -> Result:
    grid = source.table.grid()
    by_role = {role: grid[:, n] for n, role in enumerate(source.columns.roles) if role}
    depth = "z" if "z" in by_role else "slice"
    x, y = _pixel_columns(source, by_role, depth)
    values = by_role["value"]
    notes: tuple[str, ...] = ()
    if not _are_labels(values, by_role):
        notes = ("values are intensities; all the pixels listed are taken as the mask",)
        values = np.ones_like(values)
    key, name = (
        slice_and_structure(source.path, source.reading.slice_from)
        if depth not in by_role
        else (None, printable(stem(source.path)))
    )
    slices = by_role.get(depth, np.zeros_like(values))
    labels = np.unique(values[values != 0]).tolist()
    cells = 0
    order_by_slice = np.lexsort((values, slices))
    slice_changes = np.flatnonzero(np.diff(slices[order_by_slice]) != 0) + 1
    value_changes = np.flatnonzero(np.diff(values[order_by_slice]) != 0) + 1
    for part in np.split(order_by_slice, np.union1d(slice_changes, value_changes)):
        if not (value := float(values[part[0]])):
            continue
        if depth in by_role:
            key = SliceKey("number", float(slices[part[0]]))
        top, left = int(y[part].min()), int(x[part].min())
        shape = int(y[part].max()) - top + 1, int(x[part].max()) - left + 1
        cells += shape[0] * shape[1]
        if cells > MOST_CELLS:
            raise SegmentationError("its pixels are scattered over the slices: damaged, or no list of pixels")
        mask = np.zeros(shape, dtype=bool)
        mask[y[part] - top, x[part] - left] = True
        source.found.add(
            _label_name(value, labels, name, whole_series=depth in by_role), Raster(mask, top, left, None, key)
        )
    if not labels:
        notes = (EMPTY,)
    return notes, depth not in by_role


def _pixel_columns(
    source: Source, by_role: dict[str, NDArray[np.float64]], depth: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return columns (x) and rows (y) of the pixels of a list, counted from 0.

    Raises
    ------
    SegmentationError
        If a coordinate is no pixel or slice number, or the list is no mask.
    """
    table, reading = source.table, source.reading
    for role in ("x", "y", depth):
        bad = (
            (by_role[role] != np.rint(by_role[role])) | (by_role[role] < 0)
            if role in by_role
            else np.zeros(1, dtype=bool)
        )
        if role != depth:
            bad |= by_role[role] - reading.pixel_base >= LARGEST_SIDE
        if bad.any():
            at = int(np.argmax(bad))
            raise SegmentationError(
                f"line {table.lines[at]}: {role} = {by_role[role][at]:g} is no pixel or slice number"
            )
    x, y = ((by_role[role] - reading.pixel_base).astype(np.int64) for role in ("x", "y"))
    if min(x.min(), y.min()) < 0:
        raise SegmentationError("--pixel-base 1, but its pixels are counted from 0: omit the option")
    if column_units.stated(reading, source.columns) not in (None, "px"):
        raise SegmentationError("a list of pixels has coordinates in pixels, not mm or cm: correct --units or header")
    order = ["x", "y", depth] if depth in by_role else ["x", "y"]
    if is_scan(np.stack([by_role[role] for role in order], axis=1), len(order)) and _runs_upwards(by_role, depth):
        raise SegmentationError("y runs upwards (in ImageJ, Edit > Options > Invert Y): save it with y downwards")
    if (plane := source.plane) is not None and depth not in by_role and len(x) >= plane.rows * plane.columns:
        raise SegmentationError("lists every pixel of the slice: an image, not a mask")
    return x, y


def _runs_upwards(by_role: dict[str, NDArray[np.float64]], depth: str) -> bool:
    steps = np.diff(by_role["y"])
    if depth in by_role:
        steps = steps[np.diff(by_role[depth]) == 0]
    return bool((steps < 0).any())


def _are_labels(values: NDArray[np.float64], by_role: dict[str, NDArray[np.float64]]) -> bool:
    """Return whether values are labels: few, and mostly equal in neighbouring pixels, unlike intensities."""
    if not is_whole(values) or values.min() < 0:
        return False
    distinct = len(np.unique(values))
    if distinct <= 2:
        return True
    side_by_side = (np.diff(by_role["x"]) == 1) & (np.diff(by_role["y"]) == 0)
    equal = np.diff(values)[side_by_side] == 0
    return distinct <= MOST_LIST_LABELS and bool(2 * np.count_nonzero(equal) >= len(equal))


def _text_image(source: Source) -> Result:
    table, reading = source.table, source.reading
    if table.labels:
        raise SegmentationError(f"line {table.lines[0]}, column 1: a word in an image of numbers")
    grid = table.grid()
    if max(grid.shape) > LARGEST_SIDE:
        raise SegmentationError(f"an image of {grid.shape[0]} × {grid.shape[1]}: larger than any slice")
    bad = (grid != np.rint(grid)) | (grid < 0)
    if bad.any():
        row, column = (int(n) for n in np.argwhere(bad)[0])
        raise SegmentationError(
            f"line {table.lines[row]}, number {column + 1}: {grid[row, column]:g} is no label: an image, not a mask"
        )
    labels = np.unique(grid[grid != 0]).tolist()
    if len(labels) >= MOST_LABELS:
        raise SegmentationError(f"more than {MOST_LABELS} different values: an image, not a mask")
    key, name = slice_and_structure(source.path, reading.slice_from)
    for label in labels:
        if (raster := bounding_raster(grid == label, key)) is not None:
            source.found.add(_label_name(label, labels, name, whole_series=False), raster)
    return () if labels else (EMPTY,), True


def _label_name(label: float, labels: list[float], name: str, *, whole_series: bool) -> str:
    """Return the name of a structure: the name from the file's path if it is the only label, else the label.

    A file of one slice may hold one of several labels, and other files the others. So the only label of such a file
    gets the name from the path only if it is 1 or 255, the values of masks.
    """
    alone = len(labels) == 1 and (whole_series or label in (1, 255))
    return name if alone else f"{label:g}"


def _in_mm(points: NDArray[np.float64], unit: Units | None) -> NDArray[np.float64]:
    if unit != "cm":
        return points
    if np.abs(points).max() * 10 > LARGEST_COORDINATE:
        raise SegmentationError(f"a coordinate of {np.abs(points).max():g} cm is too large: omit --units cm")
    return points * 10


def _check_not_patient(points: NDArray[np.float64], stated: Units | None) -> None:
    """Raise if coordinates in a slice lie more than 1 before its first pixel, unless pixels are stated as the units."""
    if stated != "px" and points.min() < -1:
        raise SegmentationError(
            f"a coordinate of {points.min():g} lies before the slice: coordinates in the patient need x, y and z; "
            "for pixels outside of the slice, use --units px"
        )


_XY = frozenset({"x", "y"})

TABLES = {
    "imagej-xy": TableFormat("ImageJ XY coordinates", _outline, {2: ("x", "y")}, needed=_XY, has_more=False),
    "imagej-text-image": TableFormat("ImageJ text image", _text_image),
    "imagej-values": TableFormat(
        "ImageJ pixel list", _pixel_list, {3: ("x", "y", "value"), 4: ("x", "y", "z", "value")}, needed=_XY | {"value"}
    ),
    "points": TableFormat("list of points", _points, {2: ("x", "y")}, of_points, needed=_XY, has_labels=True),
    "polygons": TableFormat("polygon per line", _polygons),
}
"""Formats of tables of numbers, by what ``--text-format`` calls them."""
