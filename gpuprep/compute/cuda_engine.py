"""Runs the ``operators`` engine on a GPU in three passes over memory, by the one kernel of `cuda_kernels`.

Stored values of a few slices become HU and are resampled along rows and columns; then slices are resampled across; then
a few output slices are windowed, resized along rows and columns, and rounded. Between rows and columns the slices stay
in the cache of the GPU, if it holds them (23 MB for 32 slices of 512 × 512). Only the source slices that an output
still needs are kept, in a ring, so that memory does not grow with the series.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from gpuprep.compute import resample_blocks
from gpuprep.compute.backend import Backend, spans_of
from gpuprep.compute.cuda_kernels import Rescale, Window
from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables
from gpuprep.compute.scratch import Scratch
from gpuprep.core.hounsfield import quantise
from gpuprep.core.plan import Plan, Step

if TYPE_CHECKING:
    from gpuprep.compute.hu_slabs import HuSlabs


class KernelBackend(Backend, Protocol):
    """A backend that runs the kernel."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array on the device. Its contents are undefined."""
        ...

    def resample(
        self,
        values: Any,
        out: Any,
        tables: BlockTables,
        *,
        transposed: bool = False,
        window: Window | None = None,
        rescale: Rescale | None = None,
    ) -> None:
        """Run the kernel: see `gpuprep.compute.cuda_kernels.arguments`."""
        ...


def chunks(hu: HuSlabs, plan: Plan, backend: KernelBackend) -> Iterator[Any]:
    """Yield the output in chunks of slices on the device, each valid until the next is requested.

    Parameters
    ----------
    hu : HuSlabs
        Source slices.
    plan : Plan
        Plan of the series.
    backend : KernelBackend
        Device.
    """
    scratch = Scratch()
    ring = _Ring(hu, plan.resample, backend, scratch)
    finish = _Finisher(plan, backend, scratch)
    resampled = plan.resampled.shape
    across = _tables(plan.resample, 0) or _all(resampled[0])
    on_device = across.on(backend.to_device)
    spans = list(spans_of(across.n_out, slices_per_chunk(backend.chunk_slices)))
    needed = [across.part(*span).samples for span in spans]
    ring.reserve(max(high - low for low, high in needed))
    most = max(stop - start for start, stop in spans)
    chunk = finish.out(most) if finish.is_last else backend.empty((most, *resampled[1:]), np.float32)
    for span, (_, high) in zip(spans, needed, strict=True):
        ring.load(high)
        target = chunk[: span[1] - span[0]]
        # The window precedes the resize, which interpolates windowed values.
        backend.resample(_flat(ring.slices), _flat(target), on_device.part(*span), window=finish.window)
        yield from [target] if finish.is_last else finish.resized(target)
    ring.load(hu.count)  # the remaining slices are read too: their values are recorded


def slices_per_chunk(chunk_slices: int) -> int:
    """Return the number of output slices that are computed together: whole blocks of the tables, at least one."""
    return max(1, chunk_slices // OUTPUTS) * OUTPUTS


def ring_slices(needed: int, slab_slices: int, count: int) -> int:
    """Return how many of `count` slices a ring has to hold, so that `needed` remain while whole slabs are added.

    That is all of them, or a multiple of `slab_slices`, so that no slab crosses the end of the ring.
    """
    return min(count, -(-(needed + slab_slices - 1) // slab_slices) * slab_slices)


def along_axis(values: Any, out: Any, axis: int, tables: BlockTables, backend: KernelBackend) -> None:
    """Resample a volume of float32 along one axis into `out`."""
    on_device = tables.on(backend.to_device)
    if axis == 0:
        backend.resample(_flat(values), _flat(out), on_device)
    elif axis == 1:
        backend.resample(values, out, on_device)
    else:
        in_plane(values, out, _all(values.shape[1]).on(backend.to_device), on_device, backend, Scratch())


def in_plane(
    values: Any,
    out: Any,
    rows: BlockTables,
    columns: BlockTables | None,
    backend: KernelBackend,
    scratch: Scratch,
    *,
    window: Window | None = None,
    rescale: Rescale | None = None,
) -> None:
    """Resample slices along rows, and along columns if there are tables for them.

    Parameters
    ----------
    values : array of stored values or float32, shape (k, j, i)
        Slices.
    out : array of float32 or an integer type, shape (k, j, i)
        Resampled slices; adjacent along the last axis.
    rows, columns : BlockTables
        Tables along both axes.
    backend : KernelBackend
        Device.
    scratch : Scratch
        Buffers.
    window : Window, optional
        Window for the result.
    rescale : Rescale, optional
        Rescale of stored values.
    """
    if columns is None:
        backend.resample(values, out, rows, window=window, rescale=rescale)
        return
    shape = values.shape[0], values.shape[2], rows.n_out
    between = scratch.of(shape, ("transposed", shape[1:]), lambda: backend.empty(shape, np.float32))
    backend.resample(values, between, rows, transposed=True, rescale=rescale)
    backend.resample(between, out, columns, transposed=True, window=window)


class _Ring:
    """The last source slices, resampled in their planes; slice k is in layer k modulo the number of layers."""

    def __init__(self, hu: HuSlabs, step: Step, backend: KernelBackend, scratch: Scratch) -> None:
        self._hu, self._backend, self._scratch = hu, backend, scratch
        self._slabs = hu.unfinished_slabs()
        self._reversed, *flipped = hu.flips
        rows, columns = (_tables(step, axis, flipped[axis - 1]) for axis in (1, 2))
        if columns is None and flipped[1]:
            columns = _all(step.source[2], flipped=True)
        rows = rows or _all(step.source[1], flipped=flipped[0])
        self._rows = rows.on(backend.to_device)
        self._columns = None if columns is None else columns.on(backend.to_device)
        self._plane = step.target[1:]
        self._stop = 0
        self.slices: Any = None

    def reserve(self, needed: int) -> None:
        """Allocate memory in which `needed` slices remain while further slabs are added."""
        layers = ring_slices(needed, self._backend.slab_slices, self._hu.count)
        self.slices = self._backend.empty((layers, *self._plane), np.float32)

    def load(self, stop: int) -> None:
        """Add slabs until all slices before `stop` have been added."""
        while self._stop < stop:
            values, rescale = next(self._slabs)
            layer = self._stop % self.slices.shape[0]
            out = self.slices[layer : layer + values.shape[0]]
            out = out[::-1] if self._reversed else out
            in_plane(values, out, self._rows, self._columns, self._backend, self._scratch, rescale=rescale)
            self._stop += values.shape[0]


class _Finisher:
    """Resizes, crops or pads windowed slices, and rounds them to the output type."""

    def __init__(self, plan: Plan, backend: KernelBackend, scratch: Scratch) -> None:
        self._backend, self._scratch = backend, scratch
        self._dtype, self._target = plan.recipe.dtype, plan.target.shape[1:]
        self.is_last = plan.has_final_size
        """Whether slices are finished when they have been resampled across."""
        self.window = None
        if plan.recipe.window_hu is not None:
            self.window = Window(*plan.recipe.window_hu, plan.shift_hu, plan.scale)
        self._air = quantise(np.array(plan.air, dtype=np.float32), self._dtype)
        self._top, self._left = (max(0, -offset) for offset in plan.offset)
        rows, columns = (
            _tables(plan.resize, axis + 1)
            or resample_blocks.selection(n, max(0, offset), min(n, offset + self._target[axis]))
            for axis, (n, offset) in enumerate(zip(plan.resampled.shape[1:], plan.offset, strict=True))
        )
        self._pads = (rows.n_out, columns.n_out) != self._target
        self._rows, self._columns = rows.on(backend.to_device), columns.on(backend.to_device)

    def out(self, slices: int) -> Any:
        """Return memory for finished slices."""
        out = self._backend.empty((slices, *self._target), self._dtype)
        if self._pads:
            out[...] = self._air  # the margins stay so
        return out

    def resized(self, chunk: Any) -> Iterator[Any]:
        """Yield the slices of a chunk in their final size, a few at a time."""
        step = min(self._backend.slab_slices, chunk.shape[0])
        rows, columns = self._rows, self._columns
        for start, stop in spans_of(chunk.shape[0], step):
            values = chunk[start:stop]
            # A lambda would keep this object, and so its buffers, as long as an error that is raised within it.
            out = self._scratch.of((values.shape[0],), "out", partial(self.out, step))
            inner = out[:, self._top : self._top + rows.n_out, self._left : self._left + columns.n_out]
            in_plane(values, inner, rows, columns, self._backend, self._scratch)
            yield out


def _tables(step: Step, axis: int, flipped: bool = False) -> BlockTables | None:
    """Return the tables of an axis; None if it is not resampled."""
    if not step.resamples(axis):
        return None
    return resample_blocks.build(**step.matrix_arguments(axis), flipped=flipped)


def _all(n: int, *, flipped: bool = False) -> BlockTables:
    """Return the tables that leave a line of `n` samples unchanged, or reverse it."""
    return resample_blocks.selection(n, 0, n, flipped=flipped)


def _flat(slices: Any) -> Any:
    """Return slices as one plane with a slice per row, for resampling across them."""
    return slices.reshape(1, slices.shape[0], slices.shape[1] * slices.shape[2])
