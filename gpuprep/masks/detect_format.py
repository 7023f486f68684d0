"""Detects the format of a segmentation text from its content, and refuses text that fits two formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpuprep.core.formatting import format_count, quoted
from gpuprep.core.mask_options import TEXT_FORMATS, ReadingOptions
from gpuprep.errors import NotASegmentationError, SegmentationError
from gpuprep.masks.formats import column_roles, cxt, lidc, pinnacle
from gpuprep.masks.formats.column_roles import HEADER_HINT, MOST_LABELS, Columns
from gpuprep.masks.formats.number_tables import TABLES
from gpuprep.masks.formats.parse_numbers import Table, parse
from gpuprep.masks.model import Plane, Segmentation
from gpuprep.masks.text_parsing import NUMBER


class TextFormat(NamedTuple):
    """A text format with a signature, such as a header or an XML element."""

    recognised: Callable[[str], str | None]
    """Returns how a text was recognised as this format; None if it is not."""
    read: Callable[[str, str], Segmentation]
    """Returns the segmentation of a text, given its path."""


TEXTS = {
    "cxt": TextFormat(cxt.recognised, cxt.read),
    "pinnacle": TextFormat(pinnacle.recognised, pinnacle.read),
    "lidc-xml": TextFormat(lidc.recognised_xml, lidc.read_xml),
    "pylidc": TextFormat(lidc.recognised_table, lidc.read_table),
}
"""Text formats with a signature, by their names for ``--text-format``."""

UNKNOWN_FORMAT = "mask-unknown"
"""Code of the error for files of unknown content, which may be meant as segmentations."""

HEAD = 65536
"""Number of characters at the beginning in which signatures are searched."""

_LEGEND = "an ITK-SNAP label description: a legend only"
_JIM = "a list of pixels of Xinapse Jim, which is not read"
_KNOWN_OTHERS = (
    (r"(?i)\A(?:[ \t]*#[^\n]*\n)*[ \t]*#[ \t]*ITK-SnAP Label Description", _LEGEND),
    (r'(?m)^[ \t]*[0-9]+(?:[ \t]+[0-9.]+){6}[ \t]+"[^"\n]*"[ \t]*$', _LEGEND),
    (r"<(?:bndbox|xmin)\s*>", "a Pascal VOC annotation: boxes, not contours"),
    (r"\A[ \t]*#[ \t]*(?:[RL][ \t]*[AP][ \t]*[SI]|x[ \t]+y[ \t]+z)[ \t]*\n[ \t]*#", _JIM),
    (r"(?m)^[ \t]*\.\.m\.\.[ \t]*$", "a 3dm of segmentum, which is not read"),
    (r"\A\s*[{\[]", "JSON (GeoJSON, COCO, LabelMe…), which is not read"),
    (r"\A(?:NDims|ObjectType)[ \t]*=", "a MetaImage header, which is not read"),
    (r"\A# vtk DataFile", "a VTK file, which is not read"),
    (r"\AIout", "an ImageJ .roi: in ImageJ, save it with Save As > XY Coordinates"),
    (r"\A\s*(?:<\?xml|<[A-Za-z!])", "XML or HTML of no known kind"),
)  # fmt: skip
_OTHERS = tuple((re.compile(pattern), what) for pattern, what in _KNOWN_OTHERS[:-1])
_MARKUP = re.compile(_KNOWN_OTHERS[-1][0]), _KNOWN_OTHERS[-1][1]


NO_ROLES = Columns((), "")
"""Columns of images and polygons."""


@dataclass(frozen=True, slots=True, eq=False)
class Recognised:
    """Format of a text, how it was recognised, and the parts that were parsed for that."""

    format: str
    """One of `TEXT_FORMATS`."""
    why: str
    table: Table | None = None
    """None for text with a signature."""
    columns: Columns = NO_ROLES


def recognise(text: str, name: str, reading: ReadingOptions, plane: Plane | None) -> Recognised:
    """Return the format of a text.

    A table of numbers is recognised by the number of columns. Two are the outline on one slice (``imagej-xy``). Three
    to five are points on several slices (``points``), or pixels if they are in scan order (``imagej-values``). Six and
    more are one polygon per line (``polygons``), or the image of a slice (``imagej-text-image``) if it has the matrix
    of the series, or at least half of its values are 0, or there are at most two different values.

    Parameters
    ----------
    text : str
        Content of the file; lines end with a line feed.
    name : str
        Name of the file, for messages only.
    reading : Reading
        If it has a text format, no other is tried.
    plane : Plane or None
        Matrix and pixel spacing of the series, if known.

    Raises
    ------
    SegmentationError
        If the format is unknown or ambiguous.
    """
    forced = reading.text_format
    if forced is not None and forced not in TEXT_FORMATS:
        raise SegmentationError(f"--text-format {quoted(forced)} is none of {', '.join(TEXT_FORMATS)}")
    if not text or text.isspace():
        raise SegmentationError("is empty")
    if forced is not None:
        if forced in TEXTS:
            return Recognised(forced, f"--text-format {forced}")
        table = parse(text)
        return Recognised(forced, f"--text-format {forced}", table, _columns_of(forced, table, reading, plane))
    if not _begins_with_number(text):
        head = text[:HEAD]
        for pattern, what in _OTHERS:
            if pattern.search(head):
                raise NotASegmentationError(f"is {what}")
        for key, known in TEXTS.items():
            if why := known.recognised(text):
                return Recognised(key, why)
        if _MARKUP[0].match(head):
            raise NotASegmentationError(f"is {_MARKUP[1]}")
        _check_first_line(text, name)
    elif found := next((what for pattern, what in _OTHERS if pattern.search(text[:HEAD])), None):
        raise NotASegmentationError(f"is {found}")
    return _of_numbers(parse(text), reading, plane)


def _first_line(text: str) -> str:
    """Return the first line that is neither blank nor a comment."""
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at:end].strip(" \t")
        if line and not line.startswith(("#", "//")):
            return line
        at = end + 1
    return ""


def _begins_with_number(text: str) -> bool:
    return _first_line(text)[:1] in tuple("0123456789+-.")


def _check_first_line(text: str, name: str) -> None:
    """Raise if a text begins neither with the names of columns nor with a label before numbers."""
    words = re.split(r"[ \t,;]+", _first_line(text)[:HEAD].strip(" \t,;"))
    names = {re.split(r"[^a-z]", word.strip('"').lower())[0] for word in words}
    numbers = [word for word in words if NUMBER.fullmatch(word)]
    if len(numbers) < 2 and not names & {"x", "y", "xmin", "ymin", "xcoord", "ycoord", "col", "column", "row"}:
        # The message does not quote the text, which may be a report with the name of a patient.
        raise NotASegmentationError(
            f"is no known kind of segmentation text: {quoted(name)} begins with no coordinates and no names of them",
            UNKNOWN_FORMAT,
        )


def _of_numbers(table: Table, reading: ReadingOptions, plane: Plane | None) -> Recognised:
    if table.header:
        found = column_roles.named(table.header, table.labels is not None)
        _check_width(table, found)
        if "value" in found.roles:
            return Recognised("imagej-values", found.why, table, found)
        if found.roles == ("x", "y") and table.labels is None:
            return Recognised("imagej-xy", found.why, table, found)
        return Recognised("points", found.why, table, found)
    counts = table.counts
    width, ragged = int(counts[0]), bool((counts != counts[0]).any())
    if width >= 6:
        return _ragged(table) if ragged or table.labels or len(counts) == 1 else _wide(table, plane)
    grid = table.grid()  # raises if lines have different lengths
    if not table.labels:
        if width == 1:
            raise SegmentationError("one number in every line: coordinates take two at least")
        if width in (3, 4) and column_roles.is_scan(grid, width - 1):
            pixels = Columns(TABLES["imagej-values"].roles[width], "")
            return Recognised("imagej-values", "pixels with values, row by row", table, pixels)
        column_roles.check_outlines(grid)
        if width == 2:
            return Recognised("imagej-xy", "two numbers in every line", table, Columns(("x", "y"), ""))
        if width == 5 and column_roles.is_whole(grid[:, 0]) and grid[:, 1:].min() >= 0 and grid[:, 1:].max() <= 1:
            raise NotASegmentationError("holds YOLO detections (class, centre and size): boxes, not contours")
    if found_points := column_roles.of_points(table, reading, plane):
        return Recognised("points", found_points.why, table, found_points)
    if width == 4 and bool((grid[:, :2] < grid[:, 2:]).all()):
        raise NotASegmentationError("four numbers in every line, two smaller and two larger: boxes, not contours")
    raise SegmentationError(
        f"{format_count(width)} in every line, which could mean many things: {HEADER_HINT}, or choose a --text-format"
    )


def _ragged(table: Table) -> Recognised:
    """Return polygons of different lengths; raise if the text is an image with a damaged line."""
    counts = table.counts
    if table.labels is None and len(counts) > 1 and _like_mask(table):
        table.grid()
    why = "a polygon in every line"
    return Recognised("polygons", f"{why}, after a label" if table.labels else why, table)


def _wide(table: Table, plane: Plane | None) -> Recognised:
    """Distinguish polygons of equal length from an image."""
    grid = table.grid()
    rows, width = grid.shape
    is_plane = plane is not None and (plane.rows, plane.columns) == grid.shape
    whole = column_roles.is_whole(grid)
    first_whole = column_roles.is_whole(grid[:, 0])
    if not whole and first_whole and grid[:, 1:].min() >= 0 and grid[:, 1:].max() <= 1 and not is_plane:
        return Recognised("polygons", "fractions of the slice after a class in every line", table)
    size = f"{format_count(rows, 'line')} of {format_count(width)} each"
    settle = "; if it holds polygons: --text-format polygons"
    if not whole or grid.min() < 0 or _distinct(grid) > MOST_LABELS:
        what = f"with decimals, negative ones or more than {MOST_LABELS} different"
        raise SegmentationError(f"{size}, {what}: an image, not a mask{settle}")
    if is_plane:
        return Recognised("imagej-text-image", f"{size}, as the slices of the series have", table)
    if _like_mask(table):
        return Recognised("imagej-text-image", f"{size}, few of them different, or half of them 0", table)
    if plane is not None:
        return Recognised("polygons", f"{size}, which is not the size of a slice", table)
    raise SegmentationError(f"{size}: could be an image or polygons; say --text-format imagej-text-image or polygons")


def _like_mask(table: Table) -> bool:
    values = table.values
    if not column_roles.is_whole(values) or values.min() < 0:
        return False
    return bool(2 * np.count_nonzero(values) <= len(values)) or _distinct(values) <= 2


def _distinct(values: Any) -> int:
    """Return the number of different values."""
    if values.max() - values.min() <= 65536 and column_roles.is_whole(values):
        return int(np.count_nonzero(np.bincount((values.ravel() - values.min()).astype(np.int64))))
    return len(np.unique(values))


def _check_width(table: Table, found: Columns) -> None:
    width = table.grid().shape[1]
    if width != len(found.roles):
        raise SegmentationError(
            f"line {table.lines[0]}: {format_count(width)}, where the header names "
            f"{format_count(len(found.roles), 'column')}"
        )


def _columns_of(forced: str, table: Table, reading: ReadingOptions, plane: Plane | None) -> Columns:
    """Return the columns of a table whose format the user chose; raise if they do not fit."""
    format_ = TABLES[forced]
    if not format_.roles:
        if table.header:
            raise SegmentationError(f"its header names columns, which --text-format {forced} has none of")
        return NO_ROLES
    if table.header:
        found = column_roles.named(table.header, table.labels is not None)
        _check_width(table, found)
    else:
        width = table.grid().shape[1]
        if width in format_.roles:
            found = Columns(format_.roles[width], "")
        elif format_.guessed is not None and (guessed := format_.guessed(table, reading, plane)):
            found = guessed
        else:
            raise SegmentationError(
                f"{format_count(width)} in every line: not --text-format {forced}, unless you {HEADER_HINT}"
            )
    more = set(found.roles) - format_.needed - {""}
    if not format_.needed <= set(found.roles) or (more and not format_.has_more):
        raise SegmentationError(f"its columns are not those of --text-format {forced}")
    if table.labels and not format_.has_labels:
        raise SegmentationError(f"line {table.lines[0]}, column 1: a word, of which --text-format {forced} has none")
    return found
