"""Defines `Geometry`: the shape of a volume, and the affine from indices to patient coordinates in mm (LPS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpuprep.errors import GeometryError

Shape3 = tuple[int, int, int]
Vector3 = tuple[float, float, float]

FINEST_MM, COARSEST_MM = 1e-3, 100.0
"""Plausible range of pixel spacings; values outside it are treated as damaged."""

NEGLIGIBLE_SHIFT_MM = 0.1
"""Voxel displacement that needs no warning: the default of the recipe's ``lean_tolerance_mm``."""

PERPENDICULARITY_TOLERANCE = 1e-2
"""Tolerance for the unit length and the perpendicularity of row and column direction cosines."""


def directions(orientation: ArrayLike) -> NDArray[np.float64] | None:
    """Return unit vectors along a row, along a column and along the slice normal, shape (3, 3).

    None if *Image Orientation (Patient)*, six numbers, is not a pair of perpendicular unit vectors.
    """
    pair = np.array(orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(np.clip(pair, -9, 9), axis=1)  # clipped, so that squares do not overflow
    if np.abs(lengths - 1).max() > PERPENDICULARITY_TOLERANCE or abs(pair[0] @ pair[1]) > PERPENDICULARITY_TOLERANCE:
        return None
    row, column = pair / lengths[:, None]
    normal = np.cross(row, column)
    return np.array([row, column, normal / np.linalg.norm(normal)])


_PLANES = ("sagittal", "coronal", "axial")
_LETTERS = ("LR", "PA", "SI")
"""Letters of the increasing and the decreasing direction of x, y and z (LPS)."""


def facing(axes: NDArray[np.float64]) -> tuple[str, float]:
    """Return the anatomical plane with its axis letters, and the obliqueness of the slice axis in degrees.

    The letters name the directions in which slices, rows and columns increase: "axial SPL".

    Parameters
    ----------
    axes : array of float64, shape (3, 3)
        Unit vectors, LPS: along a row, along a column, and from slice to slice.
    """
    row, column, normal = axes
    main = int(np.argmax(np.abs(normal)))
    angle = math.degrees(math.acos(min(1.0, float(abs(normal[main])))))
    letters = ""
    for direction in (normal, column, row):
        axis = int(np.argmax(np.abs(direction)))
        letters += _LETTERS[axis][0 if direction[axis] > 0 else 1]
    return f"{_PLANES[main]} {letters}", angle


class IndexBox(NamedTuple):
    """A box of voxels: those from index `start` up to, but without, `stop`, as (k, j, i)."""

    start: Shape3
    stop: Shape3

    @property
    def shape(self) -> Shape3:
        """Number of voxels along each axis."""
        k, j, i = (high - low for low, high in zip(self.start, self.stop, strict=True))
        return k, j, i

    def contains(self, other: IndexBox | None) -> bool:
        """Return whether all voxels of another box are in this one."""
        return other is None or bool(
            np.all(np.less_equal(self.start, other.start) & np.less_equal(other.stop, self.stop))
        )

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index of an array."""
        k, j, i = map(slice, self.start, self.stop)
        return k, j, i


@dataclass(frozen=True, slots=True)
class Turn:
    """Permutation and reversal of the axes of a volume, without interpolation."""

    axes: tuple[int, int, int] = (0, 1, 2)
    """Source axis of axis 0, 1 and 2 of the result."""
    flips: tuple[bool, bool, bool] = (False, False, False)
    """Whether axis 0, 1 and 2 of the result is reversed."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Positions of the slices of an irregular stack in its regular grid."""

    along: NDArray[np.float64]
    """Fractional slice index of each slice in the grid, ascending from 0, shape (n,)."""
    shift: NDArray[np.float64] | None
    """Fractional (row, column) index in the grid of the first voxel of each slice, at least 0, shape (n, 2);
    None if all are (0, 0)."""
    matrix: tuple[int, int]
    """Rows and columns of a slice."""

    @property
    def canvas(self) -> tuple[int, int]:
        """Rows and columns of the smallest grid plane that contains every shifted slice."""
        if self.shift is None:
            return self.matrix
        more = np.ceil(self.shift.max(axis=0) - 1e-6).astype(int)
        return self.matrix[0] + int(more[0]), self.matrix[1] + int(more[1])

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as JSON values."""
        return {
            "along": self.along.tolist(),
            "shift": None if self.shift is None else self.shift.tolist(),
            "matrix": list(self.matrix),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Placement:
        """Return the placement of `to_dict`."""
        rows, columns = values["matrix"]
        shift = values["shift"]
        return cls(
            np.array(values["along"], dtype=np.float64),
            None if shift is None else np.array(shift, dtype=np.float64).reshape(-1, 2),
            (int(rows), int(columns)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """A regular grid of voxels in patient space.

    Parameters
    ----------
    shape : tuple of int
        Number of slices, rows and columns: (k, j, i).
    affine : array_like of float, shape (4, 4)
        Maps the index (k, j, i, 1) of a voxel centre to (x, y, z, 1) in millimetres, LPS: x grows to the
        patient's left, y to the back (posterior), z to the head (superior).

    Raises
    ------
    GeometryError
        If an axis has no voxel, or the affine is not finite or not invertible.

    References
    ----------
    DICOM PS3.3, C.7.6.2.1.1 (Image Position and Image Orientation).

    Examples
    --------
    >>> grid = gpuprep.Geometry((10, 20, 20), [[0, 0, 2, -19], [0, 2, 0, -19], [5, 0, 0, 0], [0, 0, 0, 1]])
    >>> grid.spacing_mm, grid.facing
    ((5.0, 2.0, 2.0), 'axial SPL')
    >>> grid.points_mm([0, 0, 0]).tolist()  # x, y, z of the centre of the first voxel
    [-19.0, -19.0, 0.0]
    >>> grid.resized((50, 40, 40)).spacing_mm  # the extent is kept
    (1.0, 1.0, 1.0)
    """

    shape: Shape3
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError(f"a grid needs three axes and at least one voxel along each axis, not {self.shape}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise GeometryError(f"an affine must be a finite, invertible 4 × 4 matrix, not {affine.tolist()}")
        if affine[3].tolist() != [0, 0, 0, 1]:
            raise GeometryError(f"the last row of an affine must be 0 0 0 1, not {affine[3].tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    def __reduce__(self) -> tuple[Any, ...]:
        return Geometry, (self.shape, np.array(self.affine))

    @property
    def spacing_mm(self) -> Vector3:
        """Distance between neighbouring voxel centres along (k, j, i), in millimetres."""
        k, j, i = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(k), float(j), float(i)

    @property
    def origin_mm(self) -> Vector3:
        """Centre of voxel (0, 0, 0) as (x, y, z), in millimetres, LPS."""
        x, y, z = self.affine[:3, 3]
        return float(x), float(y), float(z)

    def points_mm(self, indices: ArrayLike) -> NDArray[np.float64]:
        """Return the patient coordinates of voxel indices.

        Parameters
        ----------
        indices : array_like of float, shape (..., 3)
            Indices as (k, j, i); fractions are allowed.

        Returns
        -------
        array of float64, shape (..., 3)
            Points as (x, y, z), in millimetres, LPS.
        """
        return np.asarray(indices, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def resized(self, shape: Shape3) -> Geometry:
        """Return the grid of `shape` voxels that covers the same extent, edge to edge.

        Index q of the new grid lies at q·n/m + (n/m − 1)/2 of this one. The outer faces of the outer voxels keep
        their positions, so the origin moves by half the change in spacing.
        """
        return self._mapped(shape, [(n / m, (n / m - 1) / 2) for n, m in zip(self.shape, shape, strict=True)])

    def corner_resized(self, shape: Shape3) -> Geometry:
        """Return the grid of `shape` voxels that keeps the centres of the first and last voxels.

        `scipy.ndimage.zoom` samples at these positions by default: index q lies at q·(n − 1)/(m − 1).
        """
        pairs = zip(self.shape, shape, strict=True)
        return self._mapped(shape, [((n - 1) / (m - 1) if m > 1 and n > 1 else 1.0, 0.0) for n, m in pairs])

    def cropped(self, start: tuple[int, int, int], shape: Shape3) -> Geometry:
        """Return the grid of `shape` voxels that begins at index `start`; it may extend beyond this grid."""
        return self._mapped(shape, [(1.0, float(s)) for s in start])

    def turned(self, turn: Turn) -> Geometry:
        """Return the same grid with its axes permuted and reversed."""
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for axis, (source, flip) in enumerate(zip(turn.axes, turn.flips, strict=True)):
            step[source, axis] = -1 if flip else 1
            step[source, 3] = self.shape[source] - 1 if flip else 0
        k, j, i = (self.shape[axis] for axis in turn.axes)
        return Geometry((k, j, i), self.affine @ step)

    @property
    def facing(self) -> str:
        """Anatomical plane, and the directions in which slices, rows and columns increase.

        "axial SPL": slices to superior, rows to posterior, columns to left.
        """
        return facing((self.affine[:3, 2::-1] / np.array(self.spacing_mm)[::-1]).T)[0]

    @property
    def lean_mm(self) -> float:
        """Largest displacement in mm of the far end of an axis due to shear; 0 for perpendicular axes."""
        spacing_mm = np.array(self.spacing_mm)
        axes, extent_mm = self.affine[:3, :3] / spacing_mm, spacing_mm * (np.array(self.shape) - 1)
        cosines = np.abs(axes.T @ axes - np.eye(3))
        return float((cosines * np.minimum.outer(extent_mm, extent_mm)).max())

    @property
    def to_axial(self) -> Turn:
        """Axis permutation and reversal to slices superior, rows posterior, columns left, as nearly as possible."""
        toward = self.affine[[2, 1, 0], :3] / np.array(self.spacing_mm)  # z, y, x by source axis
        best = max(permutations(range(3)), key=lambda p: sum(abs(toward[n, axis]) for n, axis in enumerate(p)))
        k, j, i = best
        flips = [bool(toward[n, axis] < 0) for n, axis in enumerate(best)]
        return Turn((k, j, i), (flips[0], flips[1], flips[2]))

    def is_close(self, other: Geometry, atol_mm: float = 1e-4) -> bool:
        """Return whether two grids have equal shapes and corners that agree within `atol_mm`."""
        corners = np.array(np.meshgrid(*([0, n - 1] for n in self.shape))).reshape(3, -1).T
        return self.shape == other.shape and np.allclose(
            self.points_mm(corners), other.points_mm(corners), rtol=0, atol=atol_mm
        )

    def _mapped(self, shape: Shape3, axes: list[tuple[float, float]]) -> Geometry:
        """Return the grid whose index q is index q·scale + shift of this one, per axis (scale, shift)."""
        step = np.eye(4)
        step[[0, 1, 2], [0, 1, 2]] = [scale for scale, _ in axes]
        step[:3, 3] = [shift for _, shift in axes]
        return Geometry(shape, self.affine @ step)
