"""Processes one series by its plan: stored integers are uploaded once, finished chunks of slices are downloaded once.

Two engines give the same volume. ``operators`` multiplies by one banded matrix per axis
(`gpuprep.compute.resample_matrix`). ``ndimage`` calls `scipy.ndimage.zoom` and `skimage.transform.resize`, or on a GPU
`cupyx.scipy.ndimage.zoom` and `cucim.skimage.transform.resize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from gpuprep.compute import resample_matrix
from gpuprep.compute.backend import Backend, BackendName, Engine, Transfers, checked_engine, compiled_loops, get_backend
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
    """Process a stacked series by a recipe.

    Parameters
    ----------
    volume : StoredVolume
        Stacked series from `gpuprep.read`.
    recipe : Recipe, optional
        Settings; the default recipe if absent.
    backend : {"auto", "cpu", "gpu"} or Backend
        Compute backend. With a GPU, the values stay on the device.
    engine : {"operators", "ndimage"}
        Resampling method: banded matrices, or calls to SciPy, scikit-image and their GPU counterparts.

    Returns
    -------
    Volume
        Values in the dtype of the recipe, as a NumPy or CuPy array of shape (k, j, i).

    Raises
    ------
    PlanError
        If the recipe cannot be applied to the series.
    BackendError
        If the backend cannot run, or its memory is exhausted.

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
    with backend.session() as transfers:
        values: Any = None
        start = 0
        for chunk in device_chunks(volume, plan, backend, engine, transfers):
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


def host_chunks(
    source: Source,
    plan: Plan,
    backend: Backend,
    engine: Engine = "operators",
    seconds: dict[str, float] | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield the output as NumPy arrays of a few slices each, in order; each is valid until the next is requested.

    After the last one, `seconds` is updated with the result of `Transfers.seconds`.
    """
    with backend.session() as transfers:
        yield from transfers.downloads(device_chunks(source, plan, backend, engine, transfers))
        if seconds is not None:
            seconds.update(transfers.seconds())


def device_chunks(source: Source, plan: Plan, backend: Backend, engine: Engine, transfers: Transfers) -> Iterator[Any]:
    """Yield the output in chunks on the compute device, within a session of the backend.

    A chunk is valid until the next one is requested.
    """
    if checked_engine(engine) == "ndimage":
        return _ndimage_chunks(source, plan, backend, transfers)
    if backend.body == "loops":
        return _compiled_chunks(source, plan, backend, transfers)
    return _operator_chunks(source, plan, backend, transfers)


def _compiled_chunks(source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> Iterator[Any]:
    compiled_loops()  # raises a BackendError with a remedy if Numba cannot be imported
    from gpuprep.compute import numba_engine

    hu = _HuSlabs(source, plan, backend, transfers)
    return numba_engine.chunks(hu.slabs(), hu.count, plan)


def _operator_chunks(source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> Iterator[Any]:
    """Resample in-plane axes that shrink before z and those that grow after it, a few slices at a time."""
    along_z, *in_plane = _operators(plan.resample, backend)
    shrinking = [(axis, op) for axis, op in enumerate(in_plane, 1) if op is not None and op.n_out <= op.n_in]
    growing = [(axis, op) for axis, op in enumerate(in_plane, 1) if op is not None and op.n_out > op.n_in]
    resizing = [(axis, op) for axis, op in enumerate(_operators(plan.resize, backend)) if op is not None]
    scratch = Scratch()

    def in_plane_resampler(operators: list[tuple[int, resample_matrix.Operator]], name: str) -> Callable[[Any], Any]:
        def apply(values: Any) -> Any:
            for axis, op in operators:
                shape = list(values.shape)
                shape[axis] = op.n_out
                values = resample_matrix.apply_in_plane(op, values, axis, scratch.like(values, shape, (name, axis)))
            return values

        return apply

    shrink, grow = in_plane_resampler(shrinking, "shrink"), in_plane_resampler(growing, "grow")
    resize = in_plane_resampler(resizing, "resize")
    hu = _HuSlabs(source, plan, backend, transfers)
    shrunk = SlidingWindow(hu.count, backend.slab_slices, map(shrink, hu.slabs()), scratch)
    for chunk in _along_z(shrunk, along_z, backend.chunk_slices, scratch):
        for start, stop in _spans(chunk.shape[0], backend.slab_slices):
            yield _finished(grow(chunk[start:stop, :, :]), plan, resize, backend)


def _ndimage_chunks(source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> Iterator[Any]:
    """Zoom the whole volume with library calls, then window and resize it in chunks.

    The library calls need evenly spaced samples. An axis with uneven ones is resampled by its operator first.
    """
    hu = _HuSlabs(source, plan, backend, transfers).whole()
    step = plan.resample
    regular = [positions is None for positions in step.along]
    for axis, operator in enumerate(_operators(step, backend)):
        if operator is not None and not regular[axis]:
            hu = _resampled(hu, axis, operator)
    sigma = [s if r else 0.0 for s, r in zip(step.sigma, regular, strict=True)]
    if any(sigma):
        hu = backend.gaussian_filter(hu, sigma, mode=step.blur_mode)
    factors = [m / n if r else 1.0 for n, m, r in zip(step.source, step.target, regular, strict=True)]
    if factors != [1, 1, 1]:
        hu = backend.zoom(hu, factors, order=step.order, mode=step.mode, grid_mode=step.grid_mode)

    def resize(values: Any) -> Any:
        if plan.resize.is_identity:
            return values
        shape = (values.shape[0], *plan.resize.target[1:])
        mode = "reflect" if plan.resize.mode == "mirror" else "edge"  # names of numpy.pad
        return backend.resize(values, shape, mode=mode, anti_aliasing=any(plan.resize.sigma))

    for start, stop in _spans(hu.shape[0], backend.chunk_slices):
        yield _finished(hu[start:stop, :, :], plan, resize, backend)


class _HuSlabs:
    """HU of a source: rescaled, shifted to their positions in the grid, and oriented as planned.

    Only stored integers are uploaded. If the slice axis of the source stays the first axis, slices are loaded slab by
    slab; otherwise the whole volume is loaded first.
    """

    def __init__(self, source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> None:
        self._slices = len(source.slope)
        self._turn = plan.turn
        self.count = self._slices if plan.turn.axes[0] == 0 else plan.resample.source[0]
        self._source = source
        self._backend = backend
        self._transfers = transfers
        self._rule = plan.recipe.padding
        self._order = plan.recipe.order
        self._slope = backend.to_device(source.slope.astype(np.float32))
        self._intercept = backend.to_device(source.intercept.astype(np.float32))
        declared = source.padding if self._rule == "air" else None
        self._padding = None if declared is None else backend.to_device(declared)

    def slabs(self) -> Iterator[Any]:
        """Yield HU of the oriented volume slab by slab: arrays of float32."""
        if self._turn.axes[0] == 0:
            spans = list(_spans(self.count, self._backend.slab_slices))
            if self._turn.flips[0]:
                spans = [(self.count - high, self.count - low) for low, high in spans]
            yield from map(self._oriented, self._source_slabs(spans))
        else:
            turned = self.whole()
            for start, stop in _spans(self.count, self._backend.slab_slices):
                yield turned[start:stop, :, :]

    def whole(self) -> Any:
        """Return HU of the whole oriented volume: array of float32."""
        spans = list(_spans(self._slices, self._backend.slab_slices))
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

    def _source_slabs(self, spans: list[tuple[int, int]]) -> Iterator[Any]:
        """Yield the HU of spans of source slices, shifted to their positions in the grid."""
        placement = self._source.placement
        for (start, stop), stored in zip(spans, self._transfers.uploads(self._source.slab, spans), strict=True):
            padding = None if self._padding is None else self._padding[start:stop, :]
            slope, intercept = self._slope[start:stop], self._intercept[start:stop]
            hu = self._backend.to_hu(stored, slope, intercept, padding, self._rule)
            yield hu if placement is None or placement.shift is None else self._shifted(hu, placement, start)

    def _shifted(self, hu: Any, placement: Placement, start: int) -> Any:
        """Return slices shifted to their positions on the canvas; the rest of the canvas is air."""
        xp = array_namespace(hu)
        shift = np.zeros((self._slices, 2)) if placement.shift is None else placement.shift
        for axis, (n_in, n_out) in enumerate(zip(placement.matrix, placement.canvas, strict=True), 1):
            if not shift[:, axis - 1].any():
                continue
            shape = list(hu.shape)
            shape[axis] = n_out
            out = xp.empty(tuple(shape), dtype=hu.dtype, device=device(hu))
            for n in range(shape[0]):
                operator, outside = resample_matrix.shifted(n_in, n_out, shift[start + n, axis - 1], order=self._order)
                out_slice = out[n : n + 1, :, :]
                operator = operator.on(self._backend.to_device)
                resample_matrix.apply_in_plane(operator, hu[n : n + 1, :, :], axis, out_slice)
                for low, high in _runs(outside):
                    if axis == 1:
                        out_slice[:, low:high, :] = AIR_HU
                    else:
                        out_slice[:, :, low:high] = AIR_HU
            hu = out
        return hu


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]


def _operators(step: Step, backend: Backend) -> list[resample_matrix.Operator | None]:
    """Return one operator per axis; None for an axis that is not resampled."""
    operators: list[resample_matrix.Operator | None] = []
    for axis in range(3):
        operator = None
        if step.resamples(axis):
            rows = backend.block_rows if axis else backend.chunk_slices
            operator = resample_matrix.build(**step.matrix_arguments(axis), block_rows=rows).on(backend.to_device)
        operators.append(operator)
    return operators


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


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Return spans [start, stop) of length `step` that cover `count`; the last one may be shorter."""
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _along_z(
    window: SlidingWindow, along_z: resample_matrix.Operator | None, chunk_slices: int, scratch: Scratch
) -> Iterator[Any]:
    """Yield slices resampled along z in chunks; each block of the z operator is one chunk."""
    if along_z is None:
        window.reserve(chunk_slices)
        for start, stop in _spans(window.count, chunk_slices):
            yield window.get(start, stop)
        return
    window.reserve(max(b.high - b.low for b in along_z.blocks))
    for block in along_z.blocks:
        band = window.get(block.low, block.high)
        yield resample_matrix.apply_block(
            block, band, scratch.like(band, (block.stop - block.start, *band.shape[1:]), "chunk")
        )
    window.get(window.count, window.count)  # read the remaining slices too: they count in the HU statistics


def _finished(hu: Any, plan: Plan, resize: Callable[[Any], Any], backend: Backend) -> Any:
    """Window, resize, pad or crop, and quantise a chunk of resampled HU; in one pass if its size does not change."""
    window = None if plan.recipe.window_hu is None else (*plan.recipe.window_hu, plan.scale, plan.shift_hu)
    pads_or_crops = plan.offset != (0, 0) or plan.resize.target[1:] != plan.target.shape[1:]
    if plan.resize.is_identity and not pads_or_crops:
        return backend.finish(hu, window, plan.recipe.dtype)
    values = resize(backend.finish(hu, window, "float32"))
    return backend.finish(_padded_or_cropped(values, plan) if pads_or_crops else values, None, plan.recipe.dtype)


def _padded_or_cropped(values: Any, plan: Plan) -> Any:
    """Return slices cropped or padded with air to the target size."""
    xp = array_namespace(values)
    shape = (values.shape[0], *plan.target.shape[1:])
    out = xp.full(shape, plan.air, dtype=values.dtype, device=device(values))
    source, target = [], []
    for offset, n_in, n_out in zip(plan.offset, values.shape[1:], shape[1:], strict=True):
        low, high = max(0, offset), min(n_in, offset + n_out)
        source.append(slice(low, high))
        target.append(slice(low - offset, high - offset))
    out[:, target[0], target[1]] = values[:, source[0], source[1]]
    return out
