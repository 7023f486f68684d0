"""Resamples an axis by one small banded matrix.

Zoom, spline prefilter, boundary rule and anti-aliasing are linear and act along one axis at a time, so for given
sizes they *are* a matrix: what SciPy makes of the identity. It is built once, on the host, in float64, and applied
with `matmul` by whatever library holds the voxels. SciPy's own arithmetic is thereby reproduced on every backend,
and no kernel has to be compiled for a new shape.

The matrix is almost empty. A cubic prefilter reaches everywhere, but its weights fall by 0.268 per voxel; those under
`NEGLIGIBLE` are dropped, because in float32 they turn into denormals on which BLAS slows down several times.
A block of output rows then needs only the narrow band of input rows it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_namespace, is_numpy_namespace
from numpy.typing import NDArray
from scipy import ndimage

NEGLIGIBLE = 1e-8
"""Weights below this are dropped: 28 remain around a cubic sample, and 4000 HU change by less than 1e-3 HU."""

BLOCK_ROWS = 32
"""Output rows multiplied at a time: enough for BLAS, few enough for a narrow band."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Output rows [start, stop) as weights of the input rows [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: Any
    """Array of float32, shape (stop − start, high − low)."""
    transposed: Any
    """The same, transposed and contiguous: twice as fast from the right."""


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """A banded matrix from `n_in` to `n_out` samples along one axis."""

    n_in: int
    n_out: int
    blocks: tuple[Block, ...]

    def on(self, upload: Callable[[Any], Any]) -> Operator:
        """Return the same operator with its weights where `upload` puts them."""
        blocks = (replace(b, weights=upload(b.weights), transposed=upload(b.transposed)) for b in self.blocks)
        return Operator(self.n_in, self.n_out, tuple(blocks))


@lru_cache(maxsize=512)
def build(
    n_in: int,
    n_out: int,
    *,
    along: tuple[float, ...] | None = None,
    order: int,
    mode: str,
    grid_mode: bool,
    sigma: float,
    blur_mode: str,
    block_rows: int,
) -> Operator:
    """Return the operator of a `matrix`, in blocks of `block_rows` output rows."""
    return _banded(
        matrix(n_in, n_out, along=along, order=order, mode=mode, grid_mode=grid_mode, sigma=sigma, blur_mode=blur_mode),
        block_rows,
    )


def matrix(
    n_in: int,
    n_out: int,
    *,
    along: tuple[float, ...] | None = None,
    order: int,
    mode: str,
    grid_mode: bool,
    sigma: float,
    blur_mode: str,
) -> NDArray[np.float64]:
    """Return the matrix that resamples `n_in` samples to `n_out`: array of shape (n_out, samples).

    Parameters
    ----------
    n_in, n_out : int
        Samples before and after.
    along : tuple of float, optional
        Where the samples truly lie, ascending, in units of the regular grid of `n_in`; there may be more of them than
        `n_in`, or fewer. They are interpolated by a spline through these places.
    order, mode, grid_mode
        As for `scipy.ndimage.zoom`.
    sigma : float
        Standard deviation, in input samples, of a Gaussian applied first; 0 for none.
    blur_mode : str
        Boundary rule of that Gaussian.
    """
    if along is not None and sigma == 0:
        q = np.arange(n_out)
        at = (q + 0.5) * n_in / n_out - 0.5 if grid_mode else q * (n_in - 1) / max(1, n_out - 1)
        return _interpolation(np.array(along), at, order)
    rows = np.eye(n_in) if along is None else _interpolation(np.array(along), np.arange(n_in), order)
    if sigma > 0:
        rows = ndimage.gaussian_filter1d(rows, sigma, axis=0, mode=blur_mode)
    return np.asarray(ndimage.zoom(rows, (n_out / n_in, 1), order=order, mode=mode, grid_mode=grid_mode))


def _interpolation(places: NDArray[Any], at: NDArray[Any], order: int) -> NDArray[np.float64]:
    """Return the matrix of spline interpolation from samples at `places` to `at`; beyond the ends the ends are kept."""
    at = np.clip(at, places[0], places[-1])
    if order == 0:
        nearest = np.searchsorted((places[1:] + places[:-1]) / 2, at)
        return np.eye(len(places))[nearest]
    return np.asarray(_spline(places, order)(at))


def _spline(places: NDArray[Any], order: int) -> Any:
    """Return the spline through samples at `places`, each of which is one column."""
    from scipy import interpolate  # 27 MB that only irregular stacks need

    return interpolate.make_interp_spline(places, np.eye(len(places)), k=min(order, len(places) - 1))


def shifted(n_in: int, n_out: int, shift: float, *, order: int) -> tuple[Operator, NDArray[np.bool_]]:
    """Return the operator that puts `n_in` samples at `shift` in a row of `n_out`, and where nothing is put.

    Parameters
    ----------
    n_in, n_out : int
        Samples before and after.
    shift : float
        Where the first sample comes to lie.
    order : int
        Spline order.
    """
    at = np.arange(n_out) - shift
    matrix = _shift_spline(n_in, order)(np.clip(at, 0, n_in - 1)) if order else _interpolation(np.arange(n_in), at, 0)
    return _banded(matrix, BLOCK_ROWS), (at < -0.5) | (at > n_in - 0.5)


@lru_cache(maxsize=16)
def _shift_spline(n: int, order: int) -> Any:
    """Return the spline through n even samples: what every shift of them evaluates."""
    return _spline(np.arange(n), order)


def _banded(matrix: NDArray[np.float64], block_rows: int) -> Operator:
    """Cut a dense matrix into blocks of rows, each with the columns it uses; where they begin never falls."""
    matrix[np.abs(matrix) < NEGLIGIBLE] = 0
    n_out, n_in = matrix.shape
    blocks: list[Block] = []
    later_low = n_in - 1
    for start in reversed(range(0, n_out, block_rows)):
        rows = matrix[start : start + block_rows]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (later_low, later_low + 1)
        later_low = low = min(low, later_low)
        weights = np.ascontiguousarray(rows[:, low:high], dtype=np.float32)
        blocks.insert(0, Block(start, start + len(rows), low, high, weights, np.ascontiguousarray(weights.T)))
    return Operator(n_in, n_out, tuple(blocks))


def apply_block(block: Block, band: Any, out: Any) -> Any:
    """Put the output slices of one block, the operator along axis 0, into `out` and return it.

    Parameters
    ----------
    band : array of float32, shape (high − low, j, i)
        The input slices of the block.
    out : array of float32, shape (stop − start, j, i), contiguous
    """
    xp = array_namespace(band, out)
    plane = band.shape[1] * band.shape[2]
    into = xp.reshape(out, (out.shape[0], plane), copy=False)
    _multiply(xp, block.weights, xp.reshape(band, (band.shape[0], plane)), into)
    return out


def apply_in_plane(operator: Operator, values: Any, axis: int, out: Any) -> Any:
    """Put `values` resampled along its rows (axis 1) or columns (axis 2) into `out` and return it.

    Parameters
    ----------
    values : array of float32, shape (k, j, i)
    axis : {1, 2}
    out : array of float32, shape (k, j, i) with `operator.n_out` along `axis`
    """
    xp = array_namespace(values, out)
    for b in operator.blocks:
        if axis == 1:
            _multiply(xp, b.weights, values[:, b.low : b.high, :], out[:, b.start : b.stop, :])
        else:
            _multiply(xp, values[:, :, b.low : b.high], b.transposed, out[:, :, b.start : b.stop])
    return out


def _multiply(xp: Any, a: Any, b: Any, out: Any) -> None:
    """Put the product of two matrices, or stacks of them, where `out` is a view of."""
    if is_numpy_namespace(xp) or is_cupy_namespace(xp):
        xp.matmul(a, b, out=out)
    else:  # the array API standard knows no out=
        out[...] = xp.matmul(a, b)
