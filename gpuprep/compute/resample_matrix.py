"""Resamples an axis with a banded matrix.

Zoom, spline prefilter, boundary rule and anti-aliasing are linear and act along one axis at a time. For given sizes
they equal one matrix, which SciPy computes from the identity. The matrix is built once, on the host, in float64, and is
applied with `matmul` of the array library that holds the voxels. So every backend reproduces the arithmetic of SciPy,
and no kernel has to be compiled for a new shape.

The matrix is sparse. A cubic prefilter has infinite support, but its weights fall by a factor of 0.268 per voxel.
Weights under `NEGLIGIBLE` are dropped, because in float32 they become denormals, which slow BLAS down several times.
A block of output rows then depends on a narrow band of input rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import is_cupy_namespace, is_numpy_namespace
from numpy.typing import NDArray

from gpuprep.core.array_namespace import array_namespace
from gpuprep.core.axis_part import AxisPart

NEGLIGIBLE = 1e-8
"""Smaller weights are dropped: 28 remain per cubic sample, and a result of 4000 HU changes by less than 1e-3 HU."""

BLOCK_ROWS = 32
"""Output rows per block: enough for BLAS to be efficient, few enough for a narrow band."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Block of the matrix: output rows [start, stop), computed from input rows [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: Any
    """Array of float32, shape (stop − start, high − low)."""
    transposed: Any
    """`weights` transposed and contiguous, which makes products from the right twice as fast."""


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """A banded matrix from `n_in` to `n_out` samples along one axis."""

    n_in: int
    n_out: int
    blocks: tuple[Block, ...]

    def on(self, upload: Callable[[Any], Any]) -> Operator:
        """Return the operator with its weights copied to a device by `upload`."""
        blocks = (replace(b, weights=upload(b.weights), transposed=upload(b.transposed)) for b in self.blocks)
        return Operator(self.n_in, self.n_out, tuple(blocks))


@lru_cache(maxsize=512)
def build(n_in: int, n_out: int, *, block_rows: int, **step: Any) -> Operator:
    """Return `matrix`, which has the other arguments, as an operator with blocks of `block_rows` output rows."""
    return banded(matrix(n_in, n_out, **step), block_rows)


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
    part: AxisPart | None = None,
) -> NDArray[np.float64]:
    """Return the matrix that resamples `n_in` samples to `n_out`: array of shape (n_out, number of samples).

    Parameters
    ----------
    n_in, n_out : int
        Number of samples before and after.
    along : tuple of float, optional
        Positions of unevenly spaced samples, ascending, in units of the regular grid of `n_in`; their number may
        differ from `n_in`. They are interpolated by a spline through these positions.
    order, mode, grid_mode
        As for `scipy.ndimage.zoom`.
    sigma : float
        Standard deviation, in input samples, of a Gaussian applied first; 0 for none.
    blur_mode : str
        Boundary rule of that Gaussian.
    part : AxisPart, optional
        Outputs and samples to which the matrix is restricted.
    """
    if part is not None:
        whole = matrix(
            n_in, n_out, along=along, order=order, mode=mode, grid_mode=grid_mode, sigma=sigma, blur_mode=blur_mode
        )
        return whole[part.start : part.stop, part.low : part.high].copy()
    from scipy import ndimage  # the import is slow, and compiled loops have no matrix

    if along is not None and sigma == 0:
        q = np.arange(n_out)
        at = (q + 0.5) * n_in / n_out - 0.5 if grid_mode else q * (n_in - 1) / max(1, n_out - 1)
        return _interpolation(np.array(along), at, order)
    rows = np.eye(n_in) if along is None else _interpolation(np.array(along), np.arange(n_in), order)
    if sigma > 0:
        rows = ndimage.gaussian_filter1d(rows, sigma, axis=0, mode=blur_mode)
    return np.asarray(ndimage.zoom(rows, (n_out / n_in, 1), order=order, mode=mode, grid_mode=grid_mode))


def _interpolation(positions: NDArray[Any], at: NDArray[Any], order: int) -> NDArray[np.float64]:
    """Return the matrix of spline interpolation from samples at `positions` to `at`, constant beyond both ends."""
    at = np.clip(at, positions[0], positions[-1])
    if order == 0:
        nearest = np.searchsorted((positions[1:] + positions[:-1]) / 2, at)
        return np.eye(len(positions))[nearest]
    return np.asarray(_spline(positions, order)(at))


def _spline(positions: NDArray[Any], order: int) -> Any:
    """Return the interpolating spline for samples at `positions`; column n is its response to a unit sample n."""
    from scipy import interpolate  # takes 27 MB, and only irregular stacks need it

    return interpolate.make_interp_spline(positions, np.eye(len(positions)), k=min(order, len(positions) - 1))


def shifted(n_in: int, n_out: int, shift: float, *, order: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the matrix that shifts `n_in` samples in a line of `n_out`, and the mask of outputs without a source.

    Parameters
    ----------
    n_in, n_out : int
        Number of samples before and after.
    shift : float
        Position of the first sample in the output, in samples.
    order : int
        Spline order.
    """
    at = np.arange(n_out) - shift
    matrix = _shift_spline(n_in, order)(np.clip(at, 0, n_in - 1)) if order else _interpolation(np.arange(n_in), at, 0)
    return np.asarray(matrix), (at < -0.5) | (at > n_in - 0.5)


@lru_cache(maxsize=16)
def _shift_spline(n: int, order: int) -> Any:
    """Return the spline through `n` evenly spaced samples, which all shifts evaluate."""
    return _spline(np.arange(n), order)


def banded(matrix: NDArray[np.float64], block_rows: int) -> Operator:
    """Split a dense matrix into blocks of rows with their non-zero columns; first columns are non-decreasing."""
    matrix[np.abs(matrix) < NEGLIGIBLE] = 0
    n_out, n_in = matrix.shape
    blocks: list[Block] = []
    next_low = n_in - 1
    for start in reversed(range(0, n_out, block_rows)):
        rows = matrix[start : start + block_rows]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (next_low, next_low + 1)
        next_low = low = min(low, next_low)
        weights = np.ascontiguousarray(rows[:, low:high], dtype=np.float32)
        blocks.insert(0, Block(start, start + len(rows), low, high, weights, np.ascontiguousarray(weights.T)))
    return Operator(n_in, n_out, tuple(blocks))


def apply_block(block: Block, band: Any, out: Any) -> Any:
    """Apply one block along axis 0, write the output slices to `out`, and return it.

    Parameters
    ----------
    band : array of float32, shape (high − low, j, i)
        Input slices of the block.
    out : array of float32, shape (stop − start, j, i), contiguous
        Output slices.
    """
    xp = array_namespace(band, out)
    plane = band.shape[1] * band.shape[2]
    flat_out = xp.reshape(out, (out.shape[0], plane), copy=False)
    _multiply(xp, block.weights, xp.reshape(band, (band.shape[0], plane)), flat_out)
    return out


def apply_in_plane(operator: Operator, values: Any, axis: int, out: Any) -> Any:
    """Resample `values` along axis 1 (rows) or 2 (columns), write the result to `out`, and return it.

    Parameters
    ----------
    operator : Operator
        Operator along that axis.
    values : array of float32, shape (k, j, i)
        Slices.
    axis : {1, 2}
        Axis to resample.
    out : array of float32, shape (k, j, i) with `operator.n_out` along `axis`
        Resampled slices.
    """
    xp = array_namespace(values, out)
    for b in operator.blocks:
        if axis == 1:
            _multiply(xp, b.weights, values[:, b.low : b.high, :], out[:, b.start : b.stop, :])
        else:
            _multiply(xp, values[:, :, b.low : b.high], b.transposed, out[:, :, b.start : b.stop])
    return out


def _multiply(xp: Any, a: Any, b: Any, out: Any) -> None:
    """Write the product of two matrices, or stacks of matrices, to `out`, which may be a view."""
    if is_numpy_namespace(xp) or is_cupy_namespace(xp):
        xp.matmul(a, b, out=out)
    else:  # the array API standard has no out=
        out[...] = xp.matmul(a, b)
