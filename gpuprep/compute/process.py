"""Processes one series by its plan: stored integers go up once, finished chunks of slices come down once.

Two engines give the same volume. ``operators`` multiplies with one banded matrix per axis
(`gpuprep.compute.resample_matrix`); ``ndimage`` makes the literal library calls: `scipy.ndimage.zoom` and
`skimage.transform.resize`, or on a GPU `cupyx.scipy.ndimage.zoom` and `cucim.skimage.transform.resize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gpuprep.compute import resample_matrix
from gpuprep.compute.backend import Backend, BackendName, Engine, Lane, checked_engine, compiled_loops, get_backend
from gpuprep.compute.scratch import Scratch, SlidingWindow
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.hounsfield import AIR_HU
from gpuprep.core.plan import Plan, Step, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume, Volume


def process(
    volume: StoredVolume,
    recipe: Recipe | None = None,
    *,
    backend: Backend | BackendName = "auto",
    engine: Engine = "operators",
) -> Volume:
    """Return a stacked series as the recipe wants it.

    Parameters
    ----------
    volume : StoredVolume
        From `gpuprep.read`.
    recipe : Recipe, optional
        The default recipe where absent.
    backend : {"auto", "cpu", "gpu"} or Backend
        Where to compute. On a GPU the values stay there.
    engine : {"operators", "ndimage"}
        How to compute.

    Returns
    -------
    Volume
        Values in the recipe's dtype, as a NumPy or CuPy array of shape (k, j, i).

    Raises
    ------
    PlanError
        If the series does not fit the recipe.
    BackendError
        If the backend cannot run here, or its memory is exhausted.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> stored = gpuprep.read(gpuprep.discover("dicom")[0])
    >>> volume = gpuprep.process(stored, gpuprep.Recipe(size=None), backend="cpu")
    >>> volume.shape, volume.spacing_mm
    ((36, 288, 288), (1.0, 1.0, 1.0))
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    plan = make_plan(volume.geometry, recipe or Recipe(), volume.placement)
    with backend.session() as lane:
        values: Any = None
        start = 0
        for chunk in device_chunks(volume, plan, backend, engine, lane):
            xp = array_namespace(chunk)
            if values is None:
                values = xp.empty(plan.target.shape, dtype=chunk.dtype, device=device(chunk))
            values[start : start + chunk.shape[0], :, :] = chunk
            start += chunk.shape[0]
    return Volume(values, plan.target, plan.hu_slope, plan.hu_intercept)


class Source(Protocol):
    """A stacked series: `StoredVolume` in memory, or `SeriesReader` on disk."""

    @property
    def geometry(self) -> Geometry:
        """Regular grid of the stack."""
        ...

    @property
    def placement(self) -> Placement | None:
        """Where the slices lie in that grid, if not one in each layer."""
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
        """Declared padding of each slice, shape (k, 2); see `StoredVolume`."""
        ...

    @property
    def slab(self) -> Callable[..., NDArray[Any]]:
        """``slab(start, stop, empty=…)`` returns the stored values of slices [start, stop).

        Each slice is asked for once, upwards or downwards, perhaps by another thread. ``empty(shape, dtype)``, where
        given, makes the array.
        """
        ...


def host_chunks(
    source: Source,
    plan: Plan,
    backend: Backend,
    engine: Engine = "operators",
    seconds: dict[str, float] | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield the output as NumPy arrays of a few slices each, in order; each is valid until the next is asked for.

    Into `seconds` goes, after the last, what `Lane.seconds` returns.
    """
    with backend.session() as lane:
        yield from lane.downloads(device_chunks(source, plan, backend, engine, lane))
        if seconds is not None:
            seconds.update(lane.seconds())


def device_chunks(source: Source, plan: Plan, backend: Backend, engine: Engine, lane: Lane) -> Iterator[Any]:
    """Yield the output in chunks that are still where they were computed; inside the backend's session.

    A chunk is valid until the next one is asked for.
    """
    if checked_engine(engine) == "ndimage":
        return _ndimage_chunks(source, plan, backend, lane)
    if backend.body == "loops":
        return _compiled_chunks(source, plan, backend, lane)
    return _operator_chunks(source, plan, backend, lane)


def _compiled_chunks(source: Source, plan: Plan, backend: Backend, lane: Lane) -> Iterator[Any]:
    compiled_loops()  # or it says why there are none
    from gpuprep.compute import numba_engine

    hu = _Hu(source, plan, backend, lane)
    return numba_engine.chunks(hu.slabs(), hu.count, plan)


def _operator_chunks(source: Source, plan: Plan, backend: Backend, lane: Lane) -> Iterator[Any]:
    """Shrink in-plane on the few source slices, then grow along z and in-plane, a few slices at a time."""
    along_z, *in_plane = _operators(plan.resample, backend)
    first = [(axis, op) for axis, op in enumerate(in_plane, 1) if op is not None and op.n_out <= op.n_in]
    last = [(axis, op) for axis, op in enumerate(in_plane, 1) if op is not None and op.n_out > op.n_in]
    resize = [(axis, op) for axis, op in enumerate(_operators(plan.resize, backend)) if op is not None]
    scratch = Scratch()

    def in_plane_by(todo: list[tuple[int, resample_matrix.Operator]], name: str) -> Callable[[Any], Any]:
        def apply(values: Any) -> Any:
            for axis, op in todo:
                shape = list(values.shape)
                shape[axis] = op.n_out
                values = resample_matrix.apply_in_plane(op, values, axis, scratch.like(values, shape, (name, axis)))
            return values

        return apply

    shrink, grow, size = in_plane_by(first, "shrink"), in_plane_by(last, "grow"), in_plane_by(resize, "resize")
    hu = _Hu(source, plan, backend, lane)
    shrunk = SlidingWindow(hu.count, backend.slab_slices, map(shrink, hu.slabs()), scratch)
    for chunk in _along_z(shrunk, along_z, backend.chunk_slices, scratch):
        for start, stop in _pieces(chunk.shape[0], backend.slab_slices):
            yield _finish(grow(chunk[start:stop, :, :]), plan, size, backend)


def _ndimage_chunks(source: Source, plan: Plan, backend: Backend, lane: Lane) -> Iterator[Any]:
    """Make the library calls: zoom the whole volume, then window and resize it a chunk at a time.

    Uneven slices are beyond those calls; along them, the operator is applied first.
    """
    hu = _Hu(source, plan, backend, lane).whole()
    step = plan.resample
    even = [places is None for places in step.along]
    for axis, operator in enumerate(_operators(step, backend)):
        if operator is not None and not even[axis]:
            hu = _resampled(hu, axis, operator)
    sigma = [s if e else 0.0 for s, e in zip(step.sigma, even, strict=True)]
    if any(sigma):
        hu = backend.gaussian_filter(hu, sigma, mode=step.blur_mode)
    factors = [m / n if e else 1.0 for n, m, e in zip(step.source, step.target, even, strict=True)]
    if factors != [1, 1, 1]:
        hu = backend.zoom(hu, factors, order=step.order, mode=step.mode, grid_mode=step.grid_mode)

    def resize(values: Any) -> Any:
        if plan.resize.idle:
            return values
        shape = (values.shape[0], *plan.resize.target[1:])
        mode = "reflect" if plan.resize.mode == "mirror" else "edge"  # numpy.pad's words
        return backend.resize(values, shape, mode=mode, anti_aliasing=any(plan.resize.sigma))

    for start, stop in _pieces(hu.shape[0], backend.chunk_slices):
        yield _finish(hu[start:stop, :, :], plan, resize, backend)


class _Hu:
    """HU of the slices of a source, upright and turned as planned.

    Stored integers go up to the device, and nothing else of that size. Where slices stay slices, they are loaded a
    slab at a time; where another axis takes their place, all are, once.
    """

    def __init__(self, source: Source, plan: Plan, backend: Backend, lane: Lane) -> None:
        self._slices = len(source.slope)
        self._turn = plan.turn
        self.count = self._slices if plan.turn.axes[0] == 0 else plan.resample.source[0]
        self._source = source
        self._backend = backend
        self._lane = lane
        self._rule = plan.recipe.padding
        self._order = plan.recipe.order
        self._slope = backend.to_device(source.slope.astype(np.float32))
        self._intercept = backend.to_device(source.intercept.astype(np.float32))
        declared = source.padding if self._rule == "air" else None
        self._padding = None if declared is None else backend.to_device(declared)

    def slabs(self) -> Iterator[Any]:
        """Yield HU of the turned volume a slab at a time: arrays of float32."""
        if self._turn.axes[0] == 0:
            spans = list(_pieces(self.count, self._backend.slab_slices))
            if self._turn.flips[0]:
                spans = [(self.count - high, self.count - low) for low, high in spans]
            yield from map(self._in_direction, self._loaded(spans))
        else:
            turned = self.whole()
            for start, stop in _pieces(self.count, self._backend.slab_slices):
                yield turned[start:stop, :, :]

    def whole(self) -> Any:
        """Return HU of the whole turned volume: array of float32."""
        spans = list(_pieces(self._slices, self._backend.slab_slices))
        hu: Any = None
        for (start, stop), slab in zip(spans, self._loaded(spans), strict=True):
            if hu is None:
                xp = array_namespace(slab)
                hu = xp.empty((self._slices, *slab.shape[1:]), dtype=slab.dtype, device=device(slab))
            hu[start:stop, :, :] = slab
        return self._in_direction(hu)

    def _in_direction(self, hu: Any) -> Any:
        xp = array_namespace(hu)
        if self._turn.axes != (0, 1, 2):
            hu = xp.permute_dims(hu, self._turn.axes)
        for axis, flip in enumerate(self._turn.flips):
            hu = xp.flip(hu, axis=axis) if flip else hu
        return hu

    def _loaded(self, spans: list[tuple[int, int]]) -> Iterator[Any]:
        """Yield HU of spans of slices of the source."""
        placement = self._source.placement
        for (start, stop), stored in zip(spans, self._lane.uploads(self._source.slab, spans), strict=True):
            padding = None if self._padding is None else self._padding[start:stop, :]
            slope, intercept = self._slope[start:stop], self._intercept[start:stop]
            hu = self._backend.to_hu(stored, slope, intercept, padding, self._rule)
            yield hu if placement is None or placement.shift is None else self._upright(hu, placement, start)

    def _upright(self, hu: Any, placement: Placement, start: int) -> Any:
        """Return slices shifted to where they belong, in air."""
        xp = array_namespace(hu)
        shift = np.zeros((self._slices, 2)) if placement.shift is None else placement.shift
        for axis, (have, want) in enumerate(zip(placement.matrix, placement.canvas, strict=True), 1):
            if not shift[:, axis - 1].any():
                continue
            shape = list(hu.shape)
            shape[axis] = want
            out = xp.empty(tuple(shape), dtype=hu.dtype, device=device(hu))
            for n in range(shape[0]):
                operator, outside = resample_matrix.shifted(have, want, shift[start + n, axis - 1], order=self._order)
                moved = out[n : n + 1, :, :]
                resample_matrix.apply_in_plane(operator.on(self._backend.to_device), hu[n : n + 1, :, :], axis, moved)
                for low, high in _runs(outside):
                    if axis == 1:
                        moved[:, low:high, :] = AIR_HU
                    else:
                        moved[:, :, low:high] = AIR_HU
            hu = out
        return hu


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]


def _operators(step: Step, backend: Backend) -> list[resample_matrix.Operator | None]:
    """Return one operator per axis; None where the axis is left alone."""
    found: list[resample_matrix.Operator | None] = []
    for axis in range(3):
        operator = None
        if step.moves(axis):
            rows = backend.block_rows if axis else backend.chunk_slices
            operator = resample_matrix.build(**step.arguments(axis), block_rows=rows).on(backend.to_device)
        found.append(operator)
    return found


def _resampled(values: Any, axis: int, operator: resample_matrix.Operator) -> Any:
    """Return a whole volume with an operator applied along one axis."""
    xp = array_namespace(values)
    shape = list(values.shape)
    shape[axis] = operator.n_out
    out = xp.empty(tuple(shape), dtype=values.dtype, device=device(values))
    if axis:
        return resample_matrix.apply_in_plane(operator, values, axis, out)
    for b in operator.blocks:
        resample_matrix.apply_block(b, values[b.low : b.high, :, :], out[b.start : b.stop, :, :])
    return out


def _pieces(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of pieces of `step`, the last one shorter."""
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _along_z(
    window: SlidingWindow, along_z: resample_matrix.Operator | None, chunk_slices: int, scratch: Scratch
) -> Iterator[Any]:
    """Yield the output slices in chunks; each block of the z operator is one chunk."""
    if along_z is None:
        window.reserve(chunk_slices)
        for start, stop in _pieces(window.count, chunk_slices):
            yield window.get(start, stop)
        return
    window.reserve(max(b.high - b.low for b in along_z.blocks))
    for block in along_z.blocks:
        band = window.get(block.low, block.high)
        yield resample_matrix.apply_block(
            block, band, scratch.like(band, (block.stop - block.start, *band.shape[1:]), "chunk")
        )
    window.get(window.count, window.count)  # the rest counts in the statistics even where no output needs it


def _finish(hu: Any, plan: Plan, resize: Callable[[Any], Any], backend: Backend) -> Any:
    """Window, size and quantise a chunk of resampled HU; window and quantise at once where nothing is between them."""
    window = None if plan.recipe.window_hu is None else (*plan.recipe.window_hu, plan.scale, plan.shift_hu)
    placed = plan.offset != (0, 0) or plan.resize.target[1:] != plan.target.shape[1:]
    if plan.resize.idle and not placed:
        return backend.finish(hu, window, plan.recipe.dtype)
    values = resize(backend.finish(hu, window, "float32"))
    return backend.finish(_place(values, plan) if placed else values, None, plan.recipe.dtype)


def _place(values: Any, plan: Plan) -> Any:
    """Return slices cut or padded with air about their centre."""
    xp = array_namespace(values)
    shape = (values.shape[0], *plan.target.shape[1:])
    out = xp.full(shape, plan.air, dtype=values.dtype, device=device(values))
    inside, outside = [], []
    for offset, have, want in zip(plan.offset, values.shape[1:], shape[1:], strict=True):
        low, high = max(0, offset), min(have, offset + want)
        inside.append(slice(low, high))
        outside.append(slice(low - offset, high - offset))
    out[:, outside[0], outside[1]] = values[:, inside[0], inside[1]]
    return out
