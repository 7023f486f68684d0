"""Processes one series by its plan: stored integers are uploaded once, finished chunks of slices are downloaded once.

Two engines give the same volume. ``operators`` applies one banded matrix per axis: by a kernel on a GPU
(`gpuprep.compute.cuda_engine`), in compiled loops on a CPU (`gpuprep.compute.numba_engine`), or as products of any
array library (`gpuprep.compute.resample_matrix`). ``ndimage`` calls `scipy.ndimage.zoom` and
`skimage.transform.resize`, or on a GPU `cupyx.scipy.ndimage.zoom` and `cucim.skimage.transform.resize`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

from array_api_compat import device
from numpy.typing import NDArray

from gpuprep.compute import cuda_engine, resample_matrix
from gpuprep.compute.backend import (
    Backend,
    BackendName,
    Engine,
    Transfers,
    checked_engine,
    compiled_loops,
    get_backend,
    spans_of,
)
from gpuprep.compute.crop import crop_of
from gpuprep.compute.hu_slabs import HuSlabs, Source, resample_axis
from gpuprep.compute.scratch import Scratch, SlidingWindow
from gpuprep.core.array_namespace import array_namespace
from gpuprep.core.plan import Plan, Step, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume, Volume

log = logging.getLogger(__name__)


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
    RecipeError
        If the recipe crops to structures, which this function does not know.
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
    recipe = recipe or Recipe()
    crop = crop_of(volume, recipe)
    for warning in crop.warnings if crop is not None else ():
        log.warning("%s", warning.text)  # a volume has no place for it
    plan = make_plan(volume.geometry, recipe, volume.placement, None if crop is None else crop.box)
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
    if backend.body == "kernels":
        kernels = cast(cuda_engine.KernelBackend, backend)
        return cuda_engine.chunks(HuSlabs(source, plan, backend, transfers), plan, kernels)
    return _operator_chunks(source, plan, backend, transfers)


def _compiled_chunks(source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> Iterator[Any]:
    compiled_loops()  # raises a BackendError with a remedy if Numba cannot be imported
    from gpuprep.compute import numba_engine

    hu = HuSlabs(source, plan, backend, transfers)
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
    hu = HuSlabs(source, plan, backend, transfers)
    shrunk = SlidingWindow(hu.count, backend.slab_slices, map(shrink, hu.slabs()), scratch)
    for chunk in _along_z(shrunk, along_z, backend.chunk_slices, scratch):
        for start, stop in spans_of(chunk.shape[0], backend.slab_slices):
            yield _finished(grow(chunk[start:stop, :, :]), plan, resize, backend)


def _ndimage_chunks(source: Source, plan: Plan, backend: Backend, transfers: Transfers) -> Iterator[Any]:
    """Zoom the whole volume with library calls, then window and resize it in chunks.

    The library calls need evenly spaced samples, and resample whole axes. Another axis is resampled by its operator
    first.
    """
    hu = HuSlabs(source, plan, backend, transfers).whole()
    step = plan.resample
    regular = [step.along[axis] is None and step.parts[axis] is None for axis in range(3)]
    for axis in range(3):
        if not regular[axis] and step.resamples(axis):
            hu = _resampled(hu, axis, step, backend)
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

    for start, stop in spans_of(hu.shape[0], backend.chunk_slices):
        yield _finished(hu[start:stop, :, :], plan, resize, backend)


def _operators(step: Step, backend: Backend) -> list[resample_matrix.Operator | None]:
    """Return one operator per axis; None for an axis that is not resampled."""
    operators: list[resample_matrix.Operator | None] = []
    for axis in range(3):
        operator = None
        if step.resamples(axis):
            rows = resample_matrix.BLOCK_ROWS if axis else backend.chunk_slices
            operator = resample_matrix.build(**step.matrix_arguments(axis), block_rows=rows).on(backend.to_device)
        operators.append(operator)
    return operators


def _resampled(values: Any, axis: int, step: Step, backend: Backend) -> Any:
    """Return a whole volume resampled along one axis."""
    xp = array_namespace(values)
    shape = list(values.shape)
    shape[axis] = step.target[axis]
    out = xp.empty(tuple(shape), dtype=values.dtype, device=device(values))
    matrix = resample_matrix.matrix(**step.matrix_arguments(axis))
    resample_axis(matrix, values, axis, out, backend)
    return out


def _along_z(
    window: SlidingWindow, along_z: resample_matrix.Operator | None, chunk_slices: int, scratch: Scratch
) -> Iterator[Any]:
    """Yield slices resampled along z in chunks; each block of the z operator is one chunk."""
    if along_z is None:
        window.reserve(chunk_slices)
        for start, stop in spans_of(window.count, chunk_slices):
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
    if plan.has_final_size:
        return backend.finish(hu, window, plan.recipe.dtype)
    values = resize(backend.finish(hu, window, "float32"))
    if plan.resize.target != plan.target.shape:
        values = _padded_or_cropped(values, plan)
    return backend.finish(values, None, plan.recipe.dtype)


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
