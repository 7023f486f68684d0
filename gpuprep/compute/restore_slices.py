"""Looks up a prediction on the grid of an output at the voxels of the slices as acquired.

Positions along each axis follow from the affines alone. Labels are those of the nearest voxel. The conversion takes, of
two voxels at equal distance, the later one along the source; so the earlier one is taken here, and a label returns to
the voxel from which it came. Probabilities are interpolated linearly. Voxels outside the output are background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Shape3
from gpuprep.core.restored import AxisMap, OutputGrid
from gpuprep.errors import PredictionError, RequestError

MOST_LABELS = 2**16
"""Upper limit of label values and of classes, exclusive."""

ROUNDING = 1e-3
"""Largest amount by which a probability may exceed 1, as rounding in float16 gives."""

Kind = Literal["labels", "probabilities", "classes"]
"""Integer labels; the probability of one structure; a probability for each class."""


def restore_slices(prediction: NDArray[Any], grid: OutputGrid, threshold: float | None = None) -> NDArray[Any]:
    """Return the labels of the slices as acquired.

    Parameters
    ----------
    prediction : array, shape (k, j, i) or (classes, k, j, i)
        Labels, as integers or as whole numbers in floats; or the probability of one structure, from 0 to 1; or a
        probability for each class, of which class 0 is background. It may be a memory map: planes are read one by one.
    grid : OutputGrid
        Grid of the prediction, and positions of the slices.
    threshold : float, optional
        Smallest probability of label 1, for the probability of one structure; 0.5 by default. With classes the largest
        probability decides, and of equal ones the first.

    Returns
    -------
    array of uint8 or uint16, shape (slices, rows, columns)
        Labels; uint16 if one exceeds 255.

    Raises
    ------
    PredictionError
        If the shape is not that of the grid, or values are neither labels nor probabilities.
    RequestError
        If the threshold is no probability, or is given for classes.
    GeometryError
        If the axes of both grids are not parallel.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise RequestError(f"a threshold of {threshold:g} is no probability: give one above 0, up to 1")
    prediction = checked_shape(prediction, grid.target.shape)
    kind, highest = _kind(prediction)
    maps = grid.axis_maps()
    by_source = (*range(prediction.ndim - 3), *(m.axis + prediction.ndim - 3 for m in maps))
    turned = prediction.transpose(by_source)
    if kind == "classes":
        if threshold is not None:
            raise RequestError("a threshold is for the probability of one structure; of classes the largest one counts")
        highest = len(prediction) - 1
    restored: NDArray[Any] = np.zeros(grid.slices_shape, np.uint8 if highest < 256 else np.uint16)
    weigh = _nearest if kind == "labels" else _linear
    for n, planes, rows, columns in _voxels(grid, maps, turned.shape[-3:], weigh):
        box = restored[n, rows.inside, columns.inside]
        if kind == "labels":
            box[...] = turned[planes.low[0]][rows.low][:, columns.low]
        elif kind == "probabilities":
            box[...] = _interpolated(turned, planes, rows, columns) >= (threshold or 0.5)
        else:
            box[...] = _largest(turned, planes, rows, columns)
    return restored


def checked_shape(prediction: NDArray[Any], shape: Shape3) -> NDArray[Any]:
    """Return a prediction without a first axis of length 1; raise PredictionError if it has not the shape of a grid."""
    while prediction.ndim > 3 and prediction.shape[0] == 1:
        prediction = prediction[0]
    if prediction.shape[-3:] == shape[::-1] != shape:
        raise PredictionError(
            f"the prediction has shape {prediction.shape}, and the output {shape}: its axes are reversed; give slices, "
            "rows, columns"
        )
    if prediction.ndim not in (3, 4) or prediction.shape[-3:] != shape or not prediction.size:
        raise PredictionError(
            f"the prediction has shape {prediction.shape}, but the output has {shape} slices, rows and columns: give "
            "the prediction for this output, or the output of this prediction"
        )
    return prediction


def _kind(prediction: NDArray[Any]) -> tuple[Kind, int]:
    """Return what the values are, and the highest label; raise PredictionError if they can be neither."""
    if prediction.dtype.kind not in "biuf":
        raise PredictionError(f"a prediction holds labels or probabilities, not values of type {prediction.dtype}")
    low, high, whole = np.inf, -np.inf, True
    for index in np.ndindex(prediction.shape[:-2]):
        plane = prediction[index]
        low, high = min(low, float(plane.min())), max(high, float(plane.max()))
        if prediction.dtype.kind == "f":
            if np.isnan(plane).any():
                raise PredictionError(f"the prediction has NaN in plane {index}: neither a label nor a probability")
            whole = whole and bool((plane == np.rint(plane)).all())
    if low < 0:
        raise PredictionError(
            f"the prediction has values down to {low:g}: labels and probabilities are not negative (is it an image, or "
            "are these values before softmax?)"
        )
    if prediction.ndim == 3 and whole:
        if high >= MOST_LABELS:
            raise PredictionError(f"the prediction has values up to {high:g}: labels are below {MOST_LABELS}")
        return "labels", int(high)
    if prediction.dtype.kind == "f" and high > 1 + ROUNDING:
        raise PredictionError(f"the prediction has values up to {high:g}, not all whole: probabilities are at most 1")
    if prediction.ndim == 4 and len(prediction) > MOST_LABELS:
        raise PredictionError(f"the prediction has {len(prediction)} classes: at most {MOST_LABELS} are possible")
    return ("probabilities", 1) if prediction.ndim == 3 else ("classes", 0)


class _Taps(NamedTuple):
    """Along one axis, the voxels of the output next to those voxels of the source that lie inside it."""

    inside: slice
    """Voxels of the source that lie inside."""
    low: NDArray[np.intp]
    """Index of the earlier voxel of the output."""
    high: NDArray[np.intp]
    share: NDArray[np.float32]
    """Weight of the later voxel."""


def _nearest(positions: NDArray[np.float64], axis_map: AxisMap, voxels: int) -> _Taps:
    # Of two voxels at equal distance the earlier one along the source, also if one of them is outside.
    nearest = np.floor(positions + 0.5) if axis_map.scale < 0 else np.ceil(positions - 0.5)
    inside = _range((nearest >= 0) & (nearest < voxels))
    index = nearest[inside].astype(np.intp)
    return _Taps(inside, index, index, np.zeros(len(index), np.float32))


def _linear(positions: NDArray[np.float64], _: AxisMap, voxels: int) -> _Taps:
    inside = _range((positions >= -0.5) & (positions <= voxels - 0.5))
    at = np.clip(positions[inside], 0, voxels - 1)  # constant in the outer half of the border voxels
    low = np.floor(at).astype(np.intp)
    return _Taps(inside, low, np.minimum(low + 1, voxels - 1), (at - low).astype(np.float32))


def _range(inside: NDArray[np.bool_]) -> slice:
    """Return the range of the voxels that lie inside; they are adjacent, because positions are monotonic."""
    found = np.flatnonzero(inside)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _voxels(
    grid: OutputGrid,
    maps: tuple[AxisMap, AxisMap, AxisMap],
    voxels: tuple[int, ...],
    weigh: Callable[[NDArray[np.float64], AxisMap, int], _Taps],
) -> Iterator[tuple[int, _Taps, _Taps, _Taps]]:
    """Yield the index of each slice that lies inside the output, and its taps along slices, rows and columns."""
    _, *matrix = grid.slices_shape
    in_plane: dict[tuple[int, float], _Taps] = {}  # of the last shift; nearly always there is only one
    for n, (along, shift) in enumerate(zip(grid.along, grid.shift.tolist(), strict=True)):
        planes = weigh(maps[0].at(np.array([along])), maps[0], voxels[0])
        if any((axis, shift[axis]) not in in_plane for axis in range(2)):
            in_plane = {
                (a, shift[a]): weigh(maps[a + 1].at(np.arange(matrix[a]) + shift[a]), maps[a + 1], voxels[a + 1])
                for a in range(2)
            }
        if planes.inside.stop:
            yield n, planes, in_plane[0, shift[0]], in_plane[1, shift[1]]


def _interpolated(values: NDArray[Any], planes: _Taps, rows: _Taps, columns: _Taps) -> NDArray[np.float32]:
    """Return the values at the voxels of one slice, interpolated linearly along the three axes."""
    plane = _mixed(values[planes.low[0]], values[planes.high[0]], planes.share[0])
    plane = _mixed(plane[rows.low], plane[rows.high], rows.share[:, None])
    return _mixed(plane[:, columns.low], plane[:, columns.high], columns.share)


def _mixed(low: NDArray[Any], high: NDArray[Any], share: Any) -> NDArray[np.float32]:
    first = np.asarray(low, np.float32)
    return first + share * (np.asarray(high, np.float32) - first) if np.any(share) else first


def _largest(classes: NDArray[Any], planes: _Taps, rows: _Taps, columns: _Taps) -> NDArray[np.intp]:
    """Return the class with the largest interpolated value at each voxel of one slice; of equal ones the first."""
    best = _interpolated(classes[0], planes, rows, columns)
    winner = np.zeros(best.shape, np.intp)
    for number in range(1, len(classes)):
        found = _interpolated(classes[number], planes, rows, columns)
        winner[found > best] = number
        best = np.maximum(best, found)
    return winner
