"""Defines `Segmentation`: the outlines and painted pixels of the structures of a file, in the coordinates of the file.

Nothing here depends on the series. Points have one of three coordinate frames, and slices are named by a key;
`gpuprep.masks.place_on_slices` finds the slice of each key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Geometry
from gpuprep.errors import SegmentationError

Frame = Literal["patient", "pixel", "corner"]
"""Coordinate frame of points. patient: (x, y, z) in mm, LPS. pixel: (column, row) in pixels, with the centre of the
first pixel at (0, 0). corner: (x, y) in mm from the outer corner of the first pixel, as a calibrated ImageJ writes."""

Rule = Literal["even-odd", "xor", "inside", "hole"]
"""How the contours of a structure on one slice combine. xor: by parity. even-odd: by parity, but contours that overlap
in part are united, and repeated ones count once. inside: adds the pixels inside, without those on the outline. hole:
removes the pixels inside and on the outline."""


class ImageFrame(NamedTuple):
    """Image, or one frame of an image, that a file refers to."""

    sop_uid: str
    number: int = 0
    """*Referenced Frame Number*, counted from 1; 0 for the whole image."""


class SliceKey(NamedTuple):
    """Identifier of a slice, as the file gives it."""

    by: Literal["z", "uid", "number"]
    """z: *Image Position (Patient)* z in mm. uid: SOP Instance UID. number: slice number, counted from 0 or 1, in an
    order that the file may leave open."""
    value: float | str


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """A closed outline in one slice. Whether the first point is repeated at the end makes no difference."""

    points: NDArray[np.float64]
    """Shape (n, 3) in the frame "patient", else (n, 2); at least 3 points, all finite."""
    frame: Frame
    slice: SliceKey | None = None
    """None in the frame "patient", whose points give the slice, or if the file names no slice (then an error)."""
    rule: Rule = "even-odd"


ONE_PLANE_MM = 0.01
"""Painted planes at most this far apart are one plane."""


class Slab(NamedTuple):
    """Extent of a painted plane along its normal, and how it is known."""

    below_mm: float
    above_mm: float
    """Half the distance to the next plane of the file, painted or not; half the spacing if there is none nearby."""
    is_known: bool = True
    """Whether the extent is more than a slice thickness: the spacing of planes is stated, or measured on several evenly
    spaced planes, or the plane was derived from several images."""
    source_uid: str = ""
    """*SOP Instance UID* of the image that the plane was painted on; "" if the file names none or several."""


@dataclass(frozen=True, slots=True, eq=False)
class Raster:
    """Painted pixels of one plane, in their bounding rectangle."""

    mask: NDArray[np.bool_]
    """Shape (rows, columns)."""
    row: int
    """Row of the plane at which the rectangle begins."""
    column: int
    matrix: tuple[int, int] | None
    """Rows and columns of the plane, if the file states them. Without `geometry`, the series must have the same."""
    slice: SliceKey | None = None
    geometry: Geometry | None = None
    """Geometry of the plane, shape (1, rows, columns), if the file gives its place in the patient."""
    slab: Slab | None = None
    """None: half the thickness of `geometry` to both sides."""

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Extent below and above a plane with a geometry, along its normal."""
        assert self.geometry is not None  # noqa: S101 - the caller checks it
        half_mm = self.geometry.spacing_mm[0] / 2
        return (half_mm, half_mm) if self.slab is None else (self.slab.below_mm, self.slab.above_mm)


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """Outlined or painted structure, such as an organ."""

    name: str
    contours: tuple[Contour, ...] = ()
    rasters: tuple[Raster, ...] = ()
    frame_of_reference_uid: str = ""
    """Frame of reference of the points, for formats that name one for each structure; else ""."""


class References(NamedTuple):
    """UIDs that a damaged file refers to, as far as they could be read."""

    series_uids: tuple[str, ...] = ()
    frame_of_reference_uid: str = ""
    sop_uids: frozenset[str] = frozenset()

    def attach_to(self, error: SegmentationError) -> SegmentationError:
        """Store the UIDs in an error about the file, and return the error."""
        error.series_uids, error.frame_of_reference_uid, error.sop_uids = self
        return error


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """Content of one file, or of a folder with one file per slice."""

    path: str
    """Path for messages."""
    format: str
    """Name of the format: "RTSTRUCT", "ImageJ XY coordinates", …"""
    why: str
    """Evidence by which the format was recognised."""
    structures: tuple[Structure, ...]
    """Structures in the order of the file; their names are unique."""
    series_uids: tuple[str, ...] = ()
    """Series that the file refers to."""
    study_uids: frozenset[str] = frozenset()
    """Studies that the file refers to, or its own."""
    frame_of_reference_uid: str = ""
    """Frame of reference of most structures."""
    series_by_frame: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Series that the file lists, by frame of reference."""
    sop_uids: frozenset[str] = frozenset()
    """Images that the file refers to."""
    drawn_on: frozenset[ImageFrame] = frozenset()
    """Images that single contours or painted frames refer to, not only the file as a whole."""
    per_slice: bool = False
    """Whether the file holds one slice, so that it may belong together with other files."""
    notes: tuple[str, ...] = ()
    """Parts that were left out, with the reason."""
    beside: tuple[str, ...] = ()
    """Paths of further files that were read, such as a header."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Matrix and pixel spacing of the slices of the series."""

    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float]
    """Spacing of rows and of columns."""


@dataclass(slots=True)
class Collector:
    """Collects contours and rasters by structure; structures are in the order in which their names first occur."""

    contours: dict[str, list[Contour]] = field(default_factory=dict)
    rasters: dict[str, list[Raster]] = field(default_factory=dict)

    def add(self, name: str, part: Contour | Raster) -> None:
        """Add a contour or raster to the structure of that name."""
        self.declare(name)
        if isinstance(part, Contour):
            self.contours[name].append(part)
        else:
            self.rasters[name].append(part)

    def declare(self, name: str) -> None:
        """Add an empty structure of that name, unless it exists."""
        self.contours.setdefault(name, [])
        self.rasters.setdefault(name, [])

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All structures collected so far."""
        return tuple(Structure(n, tuple(c), tuple(self.rasters[n])) for n, c in self.contours.items())


def bounding_raster(
    mask: NDArray[Any],
    slice_: SliceKey | None = None,
    geometry: Geometry | None = None,
    slab: Slab | None = None,
) -> Raster | None:
    """Return the bounding rectangle of the non-zero pixels of a plane; None if all are zero."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1] != 0
    return Raster(part, top, left, (mask.shape[0], mask.shape[1]), slice_, geometry, slab)
