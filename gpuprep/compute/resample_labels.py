"""Resamples label volumes onto the grid of the image; labels are never interpolated as numbers.

The plan of the series defines the positions of the output voxels. Labels are looked up there in one step from the
slices as acquired, however many resampling steps the image takes. "nearest" takes the label of the nearest voxel.
"smooth" adds up the trilinear weights of the eight surrounding voxels per label and takes the label with the largest
sum; this equals linear interpolation of each label as a binary mask, followed by the maximum. Weights are integer
multiples of 2⁻²⁴, so sums do not depend on their order, and a GPU gives the same labels as a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from gpuprep.compute.backend import Backend
from gpuprep.core.array_namespace import array_namespace
from gpuprep.core.geometry import Placement
from gpuprep.core.mask_options import Resampling
from gpuprep.core.plan import Plan

SHARE_UNITS = 256
"""Positions between two voxels are rounded to 1/256, so that products of the shares along three axes fit in 24 bits."""

LABEL_LIMIT = 2**16
"""Upper limit of label values, exclusive."""


def label_chunks(
    labels: NDArray[Any], plan: Plan, placement: Placement | None, resampling: Resampling, backend: Backend
) -> Iterator[Any]:
    """Yield the labels of the output in chunks of slices on the compute device, within a session of the backend.

    Parameters
    ----------
    labels : array of uint8 or uint16, shape (slices, rows, columns)
        Labels of the slices as acquired; 0 is background.
    plan : Plan
        Plan of the image.
    placement : Placement, optional
        Positions of the slices in ``plan.source``; None for one slice per layer.
    resampling : {"nearest", "smooth"}
        How to choose a label. Ties go to the later voxel along an axis ("nearest") or to the higher label ("smooth").
    backend : Backend
        Compute backend.

    Yields
    ------
    array of the dtype of `labels`, shape (chunk, rows, columns)
        Labels of the next slices of the output.
    """
    lookup = _Lookup(labels, placement, resampling, backend)
    positions = _positions(plan)
    chunk_axis = plan.turn.axes[0]  # source axis along which the output is split into chunks
    for start in range(0, plan.target.shape[0], backend.chunk_slices):
        chunk_positions = list(positions)
        chunk_positions[chunk_axis] = positions[chunk_axis][start : start + backend.chunk_slices]
        chunk = lookup.volume(*chunk_positions)
        yield chunk if plan.turn.axes == (0, 1, 2) else array_namespace(chunk).permute_dims(chunk, plan.turn.axes)


def slice_volumes_ml(plan: Plan, placement: Placement | None) -> NDArray[np.float64]:
    """Return the voxel volume of each slice in ml, shape (slices,). Voxels extend half-way to the neighbour slices."""
    layer_ml = abs(float(np.linalg.det(plan.source.affine))) / 1000
    if placement is None:
        return np.full(plan.source.shape[0], layer_ml)
    middles = (placement.along[1:] + placement.along[:-1]) / 2
    return layer_ml * np.diff([placement.along[0] - 0.5, *middles, placement.along[-1] + 0.5])


def _positions(plan: Plan) -> list[NDArray[np.float64]]:
    """Return the positions of the output voxels along each axis of the source, in source voxels."""
    to_source = np.linalg.inv(plan.source.affine) @ plan.target.affine
    return [
        np.round(to_source[source, axis] * np.arange(plan.target.shape[axis]) + to_source[source, 3], 6)
        for source, axis in enumerate(np.argsort(plan.turn.axes))
    ]


@dataclass(frozen=True, slots=True)
class _Taps:
    """Along one axis, the two voxels next to each position and their linear weights."""

    low: Any
    """Index of the lower voxel in the box of labels, shape (n,); 0, in the background margin, if it lies outside."""
    high: Any
    """Index of the upper voxel, likewise, shape (n,)."""
    share: Any
    """Weight of the upper voxel in units of 1/`SHARE_UNITS`: int32, shape (n,)."""


class _Lookup:
    """Looks up labels at positions of the source grid.

    Only the bounding box of the labels is on the compute device, with an in-plane margin of one background voxel.
    """

    def __init__(
        self, labels: NDArray[Any], placement: Placement | None, resampling: Resampling, backend: Backend
    ) -> None:
        self._nearest = resampling == "nearest"
        self._backend = backend
        self._count, *self._matrix = labels.shape
        self._along = np.arange(self._count, dtype=np.float64) if placement is None else placement.along
        self._shift = None if placement is None else placement.shift
        self._low, high = _box(labels)
        (k, j, i), (k_stop, j_stop, i_stop) = self._low, high
        self._box = backend.to_device(np.pad(labels[k:k_stop, j:j_stop, i:i_stop], ((0, 0), (1, 1), (1, 1))))

    def volume(self, k: NDArray[Any], j: NDArray[Any], i: NDArray[Any]) -> Any:
        """Return the labels on the grid spanned by positions along the three axes."""
        xp = array_namespace(self._box)
        out = xp.zeros((len(k), len(j), len(i)), dtype=self._box.dtype, device=device(self._box))
        taps: dict[tuple[float, float], tuple[_Taps, _Taps]] = {}
        for q, position in enumerate(k.tolist()):
            layers = []
            for n, share in self._slices(position):
                shift = (0.0, 0.0) if self._shift is None else tuple(self._shift[n].tolist())
                if shift not in taps:
                    taps[shift] = (self._taps(j - shift[0], 1), self._taps(i - shift[1], 2))
                layers.append((self._box[n - self._low[0], :, :], share, *taps[shift]))
            if layers:
                out[q, :, :] = _nearest_labels(layers[0]) if self._nearest else _majority_labels(layers)
        return out

    def _slices(self, position: float) -> list[tuple[int, int]]:
        """Return the slices with labels next to a position along the slice axis, each with its weight."""
        if not self._along[0] - 0.5 <= position < self._along[-1] + 0.5:
            return []
        above = int(np.searchsorted(self._along, position, side="right"))
        low, high = max(above - 1, 0), min(above, self._count - 1)
        apart = self._along[high] - self._along[low]
        share = round((position - self._along[low]) / apart * SHARE_UNITS) if apart else 0
        if self._nearest:
            low, share = (high, 0) if 2 * (position - self._along[low]) >= apart > 0 else (low, 0)
        labelled = range(self._low[0], self._low[0] + self._box.shape[0])
        return [(n, s) for n, s in ((low, SHARE_UNITS - share), (high, share)) if s and n in labelled]

    def _taps(self, positions: NDArray[np.float64], axis: int) -> _Taps:
        """Return the voxels next to positions along rows (axis 1) or columns (axis 2), with their weights."""
        voxels = self._matrix[axis - 1]
        last = voxels - 1
        positions = np.round(positions, 6)
        inside = (positions >= -0.5) & (positions < voxels - 0.5)
        if self._nearest:
            low = high = np.floor(positions + 0.5)
            share = np.zeros(len(positions))
        else:
            low = np.clip(np.floor(positions), 0, last)
            high = np.minimum(low + 1, last)
            share = np.rint(np.clip(positions - low, 0, 1) * SHARE_UNITS)
        start, stop = self._low[axis], self._low[axis] + self._box.shape[axis] - 2

        def index(n: NDArray[np.float64]) -> Any:
            within = inside & (n >= start) & (n < stop)
            return self._backend.to_device(np.where(within, n - start + 1, 0).astype(np.int64))

        return _Taps(index(low), index(high), self._backend.to_device(share.astype(np.int32)))


def _box(labels: NDArray[Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the start and stop indices of the bounding box of all labels; an empty box without labels."""
    slices = np.flatnonzero([plane.any() for plane in labels])
    if not len(slices):
        return (0, 0, 0), (0, 0, 0)
    k, k_stop = int(slices[0]), int(slices[-1]) + 1
    flat = labels[k:k_stop].max(axis=0)
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    return (k, int(rows[0]), int(columns[0])), (k_stop, int(rows[-1]) + 1, int(columns[-1]) + 1)


def _nearest_labels(layer: tuple[Any, int, _Taps, _Taps]) -> Any:
    """Return the labels of one slice at the nearest voxels."""
    plane, _, rows, columns = layer
    xp = array_namespace(plane)
    return xp.take(xp.take(plane, rows.low, axis=0), columns.low, axis=1)


def _majority_labels(layers: list[tuple[Any, int, _Taps, _Taps]]) -> Any:
    """Return the label with the largest sum of weights at each position of one output slice.

    Slices that are missing from `layers` have no labels: their weight goes to the background.
    """
    xp = array_namespace(layers[0][0])
    corners = [
        (xp.take(xp.take(plane, row, axis=0), column, axis=1), share, row_share, column_share)
        for plane, share, rows, columns in layers
        for row, row_share in ((rows.low, SHARE_UNITS - rows.share), (rows.high, rows.share))
        for column, column_share in ((columns.low, SHARE_UNITS - columns.share), (columns.high, columns.share))
    ]
    lowest = highest = corners[0][0]
    for labels, *_ in corners[1:]:
        lowest, highest = xp.minimum(lowest, labels), xp.maximum(highest, labels)
    missing = SHARE_UNITS - sum(share for _, share, *_ in layers)
    mixed = highest != (xp.zeros_like(lowest) if missing else lowest)
    row, column = xp.nonzero(mixed)  # only positions at the borders of labels need a vote
    if not row.shape[0]:
        return highest
    votes = [
        (
            xp.astype(xp.take(xp.reshape(labels, (-1,)), row * highest.shape[1] + column), xp.int64),
            xp.astype(share * xp.take(row_share, row) * xp.take(column_share, column), xp.int64),
        )
        for labels, share, row_share, column_share in corners
    ]
    votes.append((xp.zeros_like(row), xp.full_like(row, missing * SHARE_UNITS**2)))
    best = xp.zeros_like(row)
    for label, _ in votes:
        total = sum(xp.where(other == label, weight, 0) for other, weight in votes)
        best = xp.maximum(best, total * LABEL_LIMIT + label)
    vote_index = xp.cumulative_sum(xp.reshape(xp.astype(mixed, xp.int64), (-1,))) - 1
    voted = xp.take(xp.astype(best % LABEL_LIMIT, highest.dtype), xp.maximum(vote_index, xp.zeros_like(vote_index)))
    return xp.where(mixed, xp.reshape(voted, highest.shape), highest)
