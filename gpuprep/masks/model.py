"""Defines `Segmentation`: the structures of a file, made of outlines and of painted pixels, in its own terms.

Nothing here knows the series. Where a point lies is said in one of three frames, and on which slice by a key; what a
key means, and whether there is such a slice, `gpuprep.masks.place_on_slices` finds out.
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
"""patient: (x, y, z) in mm, LPS. pixel: (column, row) in pixels, the centre of the first pixel at (0, 0). corner:
(x, y) in mm from the outer corner of the first pixel, as a calibrated ImageJ writes them."""

Rule = Literal["even-odd", "xor", "inside", "hole"]
"""xor: with all other such contours of the structure on the slice, by parity. even-odd: by parity too, but contours
that overlap in part are united, and one that is there twice counts once. inside: strictly inside, the outline itself is
not part of it. hole: taken away, the outline too."""


class ImageFrame(NamedTuple):
    """An image, or one frame of it, that a file refers to."""

    sop_uid: str
    number: int = 0
    """*Referenced Frame Number*, counted from 1; 0: the whole image."""


class SliceKey(NamedTuple):
    """How a file says which slice it means."""

    by: Literal["z", "uid", "number"]
    """z: *Image Position (Patient)* z in mm. uid: SOP Instance UID. number: it counts slices, from 0 or 1, in an order
    that the file may leave open."""
    value: float | str


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """A closed outline in one slice. Whether the first point is repeated at the end makes no difference."""

    points: NDArray[np.float64]
    """Shape (n, 3) in the frame "patient", else (n, 2); at least 3 points, all finite."""
    frame: Frame
    slice: SliceKey | None = None
    """None where the points themselves say it, or where the file does not (then the series must have one slice)."""
    rule: Rule = "even-odd"


ONE_PLANE_MM = 0.01
"""Painted planes that lie closer together are one."""


class Slab(NamedTuple):
    """Extent of a painted plane along its normal, and how it is known."""

    below_mm: float
    above_mm: float
    """Up to half-way to the neighbouring planes of the file, painted or not."""
    is_known: bool = True
    """Whether that is more than a thickness: the distance between planes is stated, or measured on several even ones,
    or the plane was made from several images."""
    source_uid: str = ""
    """*SOP Instance UID* of the one image that the plane was painted on; "" where the file names none or several."""


@dataclass(frozen=True, slots=True, eq=False)
class Raster:
    """Painted pixels of one plane: a rectangle of it that holds them all."""

    mask: NDArray[np.bool_]
    """Shape (rows, columns)."""
    row: int
    """Of the plane, at which the rectangle begins."""
    column: int
    matrix: tuple[int, int] | None
    """Rows and columns of the plane, which the series has to share; None where the file does not say."""
    slice: SliceKey | None = None
    geometry: Geometry | None = None
    """Of the plane, shape (1, rows, columns), where the file says where it lies in the patient."""
    slab: Slab | None = None
    """Absent: half the thickness of `geometry` to both sides."""


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """One thing that was outlined or painted."""

    name: str
    contours: tuple[Contour, ...] = ()
    rasters: tuple[Raster, ...] = ()
    frame_of_reference_uid: str = ""
    """In which its points lie, where a file may hold structures of several; "" where that is not known."""


class References(NamedTuple):
    """What a file names, as far as it could be read."""

    series_uids: tuple[str, ...] = ()
    frame_of_reference_uid: str = ""
    sop_uids: frozenset[str] = frozenset()

    def told_by(self, error: SegmentationError) -> SegmentationError:
        """Return an error about the file that tells them too."""
        error.series_uids, error.frame_of_reference_uid, error.sop_uids = self
        return error


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """What one file, or the files of one folder, one per slice, hold."""

    path: str
    """For messages."""
    format: str
    """Name of the format: "RTSTRUCT", "ImageJ XY coordinates", …"""
    why: str
    """By what it was recognised."""
    structures: tuple[Structure, ...]
    """In the order of the file, names as they stand there; no two have the same name."""
    series_uids: tuple[str, ...] = ()
    """Series it says it belongs to."""
    study_uids: frozenset[str] = frozenset()
    """Studies it says it belongs to."""
    frame_of_reference_uid: str = ""
    """Of most of its structures."""
    series_by_frame: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Series that it lists under each frame of reference."""
    sop_uids: frozenset[str] = frozenset()
    """Images it refers to."""
    drawn_on: frozenset[ImageFrame] = frozenset()
    """Of these, the images that its contours or painted frames say they were made on, where each of them says so."""
    per_slice: bool = False
    """Whether it is one of several files, one for each slice, that belong together."""
    notes: tuple[str, ...] = ()
    """What was left out of it, and why."""
    beside: tuple[str, ...] = ()
    """Other files that were read to understand it."""


@dataclass(frozen=True, slots=True)
class Plane:
    """What a reader has to know of the slices of the series, where it is known already."""

    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float]
    """Between rows, between columns."""


@dataclass(slots=True)
class Collector:
    """Structures as they are found in a file, by name, in order."""

    contours: dict[str, list[Contour]] = field(default_factory=dict)
    rasters: dict[str, list[Raster]] = field(default_factory=dict)

    def add(self, name: str, part: Contour | Raster) -> None:
        """Add to the structure of that name."""
        self.declare(name)
        if isinstance(part, Contour):
            self.contours[name].append(part)
        else:
            self.rasters[name].append(part)

    def declare(self, name: str) -> None:
        """Make sure that there is a structure of that name, be it empty."""
        self.contours.setdefault(name, [])
        self.rasters.setdefault(name, [])

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All of them, in the order in which their names came up."""
        return tuple(Structure(n, tuple(c), tuple(self.rasters[n])) for n, c in self.contours.items())


def painted(
    mask: NDArray[Any],
    slice_: SliceKey | None = None,
    geometry: Geometry | None = None,
    slab: Slab | None = None,
) -> Raster | None:
    """Return the rectangle of a plane that holds its non-zero pixels; None where there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1] != 0
    return Raster(part, top, left, (mask.shape[0], mask.shape[1]), slice_, geometry, slab)
