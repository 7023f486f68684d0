"""Uploads the slices of a series, and converts them to HU in the orientation of the plan or leaves that to the kernel.

A slab is the slices of one upload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from gpuprep.compute import cuda_engine, resample_blocks, resample_matrix
from gpuprep.compute.backend import Backend, Transfers, spans_of
from gpuprep.compute.cuda_kernels import Rescale
from gpuprep.core.array_namespace import array_namespace
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.hounsfield import AIR_HU
from gpuprep.core.plan import Plan


class Source(Protocol):
    """A stacked series: `StoredVolume` in memory, or `SeriesReader` on disk."""

    @property
    def geometry(self) -> Geometry:
        """Regular grid of the stack."""
        ...

    @property
    def placement(self) -> Placement | None:
        """Positions of the slices in that grid; None for one slice per layer."""
        ...

    @property
    def slope(self) -> NDArray[np.float64]:
        """*Rescale Slope* of each slice, shape (k,)."""
        ...

    @property
    def intercept(self) -> NDArray[np.float64]:
        """*Rescale Intercept* of each slice, shape (k,)."""
        ...

    @property
    def padding(self) -> NDArray[Any] | None:
        """Range of declared padding values of each slice, shape (k, 2); see `StoredVolume`."""
        ...

    @property
    def slab(self) -> Callable[..., NDArray[Any]]:
        """``slab(start, stop, empty=…)`` returns the stored values of slices [start, stop).

        Each slice is requested once, in ascending or descending order, perhaps by another thread. If given,
        ``empty(shape, dtype)`` allocates the array.
        """
        ...


class HuSlabs:
    """HU of a source: rescaled, shifted to their positions in the grid, and oriented as planned.

    Only stored integers are uploaded. If the slice axis of the source stays the first axis, slices are loaded slab by
    slab; otherwise the whole volume is loaded first.
    """

    def __init__(self, source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> None:
        self._part = plan.read.slices
        slices = self._part[0]
        self._slices = slices.stop - slices.start
        self._turn = plan.turn
        self.count = self._slices if plan.turn.axes[0] == 0 else plan.resample.source[0]
        self._source = source
        self._backend = backend
        self._transfers = transfers
        self._rule = plan.recipe.padding
        self._order = plan.recipe.order
        self._slope = backend.to_device(source.slope[slices].astype(np.float32))
        self._intercept = backend.to_device(source.intercept[slices].astype(np.float32))
        declared = source.padding if self._rule == "air" else None
        self._padding = None if declared is None else backend.to_device(declared[slices])
        placement = source.placement
        self._matrix = source.geometry.shape[1:] if placement is None else placement.matrix
        self._shift = None if placement is None or placement.shift is None else placement.shift[slices]
        self._direct = plan.turn.axes == (0, 1, 2) and not plan.shifted

    @property
    def flips(self) -> tuple[bool, bool, bool]:
        """Axes along which `unfinished_slabs` are stored in reverse order."""
        return self._turn.flips if self._direct else (False, False, False)

    def unfinished_slabs(self) -> Iterator[tuple[Any, Rescale | None]]:
        """Yield the volume slab by slab: stored values with their rescale, or HU of float32.

        Slabs are in the order of the plan. Within stored values, axes may still be reversed: see `flips`.
        """
        if self._direct:
            yield from self._stored_slabs(self._spans())
        else:
            yield from ((slab, None) for slab in self.slabs())

    def slabs(self) -> Iterator[Any]:
        """Yield HU of the oriented volume slab by slab: arrays of float32."""
        if self._turn.axes[0] == 0:
            yield from map(self._oriented, self._source_slabs(self._spans()))
        else:
            turned = self.whole()
            for start, stop in self._spans():
                yield turned[start:stop, :, :]

    def _spans(self) -> list[tuple[int, int]]:
        """Return the spans of slices of all slabs, in the order of the plan."""
        spans = list(spans_of(self.count, self._backend.slab_slices))
        if self._turn.axes[0] == 0 and self._turn.flips[0]:
            spans = [(self.count - high, self.count - low) for low, high in spans]
        return spans

    def whole(self) -> Any:
        """Return HU of the whole oriented volume: array of float32."""
        spans = list(spans_of(self._slices, self._backend.slab_slices))
        hu: Any = None
        for (start, stop), slab in zip(spans, self._source_slabs(spans), strict=True):
            if hu is None:
                xp = array_namespace(slab)
                hu = xp.empty((self._slices, *slab.shape[1:]), dtype=slab.dtype, device=device(slab))
            hu[start:stop, :, :] = slab
        return self._oriented(hu)

    def _oriented(self, hu: Any) -> Any:
        """Return HU with axes permuted and flipped as planned."""
        xp = array_namespace(hu)
        if self._turn.axes != (0, 1, 2):
            hu = xp.permute_dims(hu, self._turn.axes)
        for axis, flip in enumerate(self._turn.flips):
            hu = xp.flip(hu, axis=axis) if flip else hu
        return hu

    def _read(self, start: int, stop: int, *empty: Callable[..., NDArray[Any]]) -> NDArray[Any]:
        """Return the stored values of source slices [start, stop), counted from the first that the plan reads."""
        slices, rows, columns = self._part
        start, stop = start + slices.start, stop + slices.start
        if (rows.stop - rows.start, columns.stop - columns.start) == self._matrix:
            return self._source.slab(start, stop, *empty)
        stored = self._source.slab(start, stop)[:, rows, columns]
        allocate = empty[0] if empty else np.empty
        part = allocate(stored.shape, stored.dtype)
        part[...] = stored
        return part

    def _stored_slabs(self, spans: list[tuple[int, int]]) -> Iterator[tuple[Any, Rescale]]:
        """Yield the stored values of spans of source slices, with their rescale."""
        for (start, stop), stored in zip(spans, self._transfers.uploads(self._read, spans), strict=True):
            padding = None if self._padding is None else self._padding[start:stop, :]
            yield stored, Rescale(self._slope[start:stop], self._intercept[start:stop], padding, self._rule)

    def _source_slabs(self, spans: list[tuple[int, int]]) -> Iterator[Any]:
        """Yield the HU of spans of source slices, shifted to their positions in the grid."""
        placement = self._source.placement
        for (start, _), (stored, rescale) in zip(spans, self._stored_slabs(spans), strict=True):
            hu = self._backend.to_hu(stored, *rescale)
            if placement is not None and self._shift is not None:
                hu = self._shifted(hu, placement, self._shift[start : start + hu.shape[0]])
            yield hu

    def _shifted(self, hu: Any, placement: Placement, shift: NDArray[np.float64]) -> Any:
        """Return slices shifted to their positions on the canvas; the rest of the canvas is air."""
        xp = array_namespace(hu)
        for axis, (n_in, n_out) in enumerate(zip(placement.matrix, placement.canvas, strict=True), 1):
            if placement.shift is None or not placement.shift[:, axis - 1].any():
                continue
            shape = list(hu.shape)
            shape[axis] = n_out
            out = xp.empty(tuple(shape), dtype=hu.dtype, device=device(hu))
            for n in range(shape[0]):
                matrix, outside = resample_matrix.shifted(n_in, n_out, shift[n, axis - 1], order=self._order)
                out_slice = out[n : n + 1, :, :]
                resample_axis(matrix, hu[n : n + 1, :, :], axis, out_slice, self._backend)
                for low, high in _runs(outside):
                    if axis == 1:
                        out_slice[:, low:high, :] = AIR_HU
                    else:
                        out_slice[:, :, low:high] = AIR_HU
            hu = out
        return hu


def resample_axis(matrix: NDArray[np.float64], values: Any, axis: int, out: Any, backend: Backend) -> None:
    """Resample a volume of float32 along one axis by a banded matrix, and write the result to `out`."""
    if backend.body == "kernels":
        tables = resample_blocks.from_matrix(matrix, resample_matrix.NEGLIGIBLE)
        cuda_engine.along_axis(values, out, axis, tables, cast(cuda_engine.KernelBackend, backend))
        return
    operator = resample_matrix.banded(matrix, resample_matrix.BLOCK_ROWS).on(backend.to_device)
    if axis:
        resample_matrix.apply_in_plane(operator, values, axis, out)
        return
    for b in operator.blocks:
        resample_matrix.apply_block(b, values[b.low : b.high, :, :], out[b.start : b.stop, :, :])


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]
