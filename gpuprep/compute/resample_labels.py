"""Resamples labels onto the grid of the image; labels are never interpolated as numbers.

The plan of the series says where the voxels of the output lie; labels are looked up there in one step from the slices
as acquired, however many steps the image takes. "nearest" takes the label of the nearest voxel. "smooth" gives each of
the eight voxels around a place its trilinear share and takes the label with the largest sum: what interpolating each
label by itself and comparing them gives. Shares are whole numbers, multiples of 2⁻²⁴, so sums do not depend on order,
and a GPU gives the same labels as a CPU, voxel for voxel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gpuprep.compute.backend import Backend
from gpuprep.core.geometry import Placement
from gpuprep.core.mask_options import Resampling
from gpuprep.core.plan import Plan

PARTS = 256
"""A place between two voxels is rounded to so many parts: the shares of three axes together then fill 24 bits."""

LABELS = 2**16
"""More than any label."""


def label_chunks(
    labels: NDArray[Any], plan: Plan, placement: Placement | None, resampling: Resampling, backend: Backend
) -> Iterator[Any]:
    """Yield the labels of the output in chunks of slices, where the backend computes; inside its session.

    Parameters
    ----------
    labels : array of uint8 or uint16, shape (slices, rows, columns)
        Of the slices as they were acquired; 0 is background.
    plan : Plan
        Of the image.
    placement : Placement, optional
        Where the slices lie, if not one in each layer of ``plan.source``.
    resampling : {"nearest", "smooth"}
        How to choose a label. Ties: the voxel that comes later along an axis, or the higher label.
    backend : Backend
        Where to compute.

    Yields
    ------
    array of the dtype of `labels`, shape (chunk, rows, columns)
    """
    look = _Lookup(labels, placement, resampling, backend)
    places = _places(plan)
    first = plan.turn.axes[0]  # the axis of the source along which the output is cut into chunks
    for start in range(0, plan.target.shape[0], backend.chunk_slices):
        part = list(places)
        part[first] = places[first][start : start + backend.chunk_slices]
        chunk = look.volume(*part)
        yield chunk if plan.turn.axes == (0, 1, 2) else array_namespace(chunk).permute_dims(chunk, plan.turn.axes)


def slice_volumes_ml(plan: Plan, placement: Placement | None) -> NDArray[np.float64]:
    """Return the volume of a voxel of each slice, half-way to its neighbours, in millilitres, shape (slices,)."""
    layer_ml = abs(float(np.linalg.det(plan.source.affine))) / 1000
    if placement is None:
        return np.full(plan.source.shape[0], layer_ml)
    middles = (placement.along[1:] + placement.along[:-1]) / 2
    return layer_ml * np.diff([placement.along[0] - 0.5, *middles, placement.along[-1] + 0.5])


def _places(plan: Plan) -> list[NDArray[np.float64]]:
    """Return where the voxels of the output lie along each axis of the source, in its voxels."""
    to_source = np.linalg.inv(plan.source.affine) @ plan.target.affine
    return [
        np.round(to_source[source, axis] * np.arange(plan.target.shape[axis]) + to_source[source, 3], 6)
        for source, axis in enumerate(np.argsort(plan.turn.axes))
    ]


@dataclass(frozen=True, slots=True)
class _Taps:
    """Along one axis, the voxels on both sides of each place, and how far it is from the first to the second."""

    low: Any
    """Index, shape (n,); 0 for places outside, where a margin without labels lies."""
    high: Any
    share: Any
    """Of the second, of `PARTS`: int32, shape (n,)."""


class _Lookup:
    """Labels at places of the source grid.

    Only the box that holds all labels, with a margin of one voxel without any, is where the backend computes.
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
        """Return the labels at all combinations of places along the three axes."""
        xp = array_namespace(self._box)
        out = xp.zeros((len(k), len(j), len(i)), dtype=self._box.dtype, device=device(self._box))
        taps: dict[tuple[float, float], tuple[_Taps, _Taps]] = {}
        for q, place in enumerate(k.tolist()):
            layers = []
            for n, share in self._slices(place):
                shift = (0.0, 0.0) if self._shift is None else tuple(self._shift[n].tolist())
                if shift not in taps:
                    taps[shift] = (self._taps(j - shift[0], 1), self._taps(i - shift[1], 2))
                layers.append((self._box[n - self._low[0], :, :], share, *taps[shift]))
            if layers:
                out[q, :, :] = _first(layers[0]) if self._nearest else _voted(layers)
        return out

    def _slices(self, place: float) -> list[tuple[int, int]]:
        """Return the slices that have a say at a place between them and have labels, each with its share."""
        if not self._along[0] - 0.5 <= place < self._along[-1] + 0.5:
            return []
        above = int(np.searchsorted(self._along, place, side="right"))
        low, high = max(above - 1, 0), min(above, self._count - 1)
        apart = self._along[high] - self._along[low]
        share = round((place - self._along[low]) / apart * PARTS) if apart else 0
        if self._nearest:
            low, share = (high, 0) if 2 * (place - self._along[low]) >= apart > 0 else (low, 0)
        labelled = range(self._low[0], self._low[0] + self._box.shape[0])
        return [(n, s) for n, s in ((low, PARTS - share), (high, share)) if s and n in labelled]

    def _taps(self, places: NDArray[np.float64], axis: int) -> _Taps:
        voxels = self._matrix[axis - 1]
        last = voxels - 1
        places = np.round(places, 6)
        inside = (places >= -0.5) & (places < voxels - 0.5)
        if self._nearest:
            low = high = np.floor(places + 0.5)
            share = np.zeros(len(places))
        else:
            low = np.clip(np.floor(places), 0, last)
            high = np.minimum(low + 1, last)
            share = np.rint(np.clip(places - low, 0, 1) * PARTS)
        start, stop = self._low[axis], self._low[axis] + self._box.shape[axis] - 2

        def index(n: NDArray[np.float64]) -> Any:
            within = inside & (n >= start) & (n < stop)
            return self._backend.to_device(np.where(within, n - start + 1, 0).astype(np.int64))

        return _Taps(index(low), index(high), self._backend.to_device(share.astype(np.int32)))


def _box(labels: NDArray[Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the first index, and one past the last, of labels along each axis; an empty box where there are none."""
    slices = np.flatnonzero([plane.any() for plane in labels])
    if not len(slices):
        return (0, 0, 0), (0, 0, 0)
    k, k_stop = int(slices[0]), int(slices[-1]) + 1
    flat = labels[k:k_stop].max(axis=0)
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    return (k, int(rows[0]), int(columns[0])), (k_stop, int(rows[-1]) + 1, int(columns[-1]) + 1)


def _first(layer: tuple[Any, int, _Taps, _Taps]) -> Any:
    plane, _, rows, columns = layer
    xp = array_namespace(plane)
    return xp.take(xp.take(plane, rows.low, axis=0), columns.low, axis=1)


def _voted(layers: list[tuple[Any, int, _Taps, _Taps]]) -> Any:
    """Return the label with the largest sum of shares at each place of one slice.

    Slices that are not among `layers` have no labels: their share goes to the background.
    """
    xp = array_namespace(layers[0][0])
    corners = [
        (xp.take(xp.take(plane, row, axis=0), column, axis=1), share, row_share, column_share)
        for plane, share, rows, columns in layers
        for row, row_share in ((rows.low, PARTS - rows.share), (rows.high, rows.share))
        for column, column_share in ((columns.low, PARTS - columns.share), (columns.high, columns.share))
    ]
    least = most = corners[0][0]
    for labels, *_ in corners[1:]:
        least, most = xp.minimum(least, labels), xp.maximum(most, labels)
    missing = PARTS - sum(share for _, share, *_ in layers)
    mixed = most != (xp.zeros_like(least) if missing else least)
    row, column = xp.nonzero(mixed)  # at the borders of labels, and only there, it has to be counted
    if not row.shape[0]:
        return most
    votes = [
        (
            xp.astype(xp.take(xp.reshape(labels, (-1,)), row * most.shape[1] + column), xp.int64),
            xp.astype(share * xp.take(row_share, row) * xp.take(column_share, column), xp.int64),
        )
        for labels, share, row_share, column_share in corners
    ]
    votes.append((xp.zeros_like(row), xp.full_like(row, missing * PARTS**2)))
    best = xp.zeros_like(row)
    for label, _ in votes:
        total = sum(xp.where(other == label, weight, 0) for other, weight in votes)
        best = xp.maximum(best, total * LABELS + label)
    nth = xp.cumulative_sum(xp.reshape(xp.astype(mixed, xp.int64), (-1,))) - 1  # of the places that were counted
    counted = xp.take(xp.astype(best % LABELS, most.dtype), xp.maximum(nth, xp.zeros_like(nth)))
    return xp.where(mixed, xp.reshape(counted, most.shape), most)
