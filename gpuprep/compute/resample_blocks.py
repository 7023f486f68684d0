"""Builds tables that resample a line in blocks of eight outputs, as the CUDA kernel of `cuda_kernels` reads them.

A thread of that kernel computes the eight outputs of a block together: each sample is then loaded once for all of them.
The outputs of a block have the same samples, with weights of 0 where a sample does not contribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute import resample_taps

OUTPUTS = 8
"""Outputs per block. The source of the kernel is written out for eight."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockTables:
    """Tables that resample a line of `n_in` samples to `n_out`."""

    n_in: int
    n_out: int
    first: Any
    """Index of the first sample of each block; array of int32, shape (blocks,)."""
    weights: Any
    """Weights of that sample and the following ones for the outputs of a block; array of float32, shape
    (blocks, width, OUTPUTS)."""

    def on(self, upload: Callable[[Any], Any]) -> BlockTables:
        """Return the tables copied to a device by `upload`."""
        return replace(self, first=upload(self.first), weights=upload(self.weights))

    def part(self, start: int, stop: int) -> BlockTables:
        """Return the tables of the outputs [start, stop); `start` must be a multiple of `OUTPUTS`."""
        blocks = slice(start // OUTPUTS, -(-stop // OUTPUTS))
        return replace(self, n_out=stop - start, first=self.first[blocks], weights=self.weights[blocks])

    @property
    def samples(self) -> tuple[int, int]:
        """Range [low, high) of the samples that all outputs need; for tables on the host."""
        return int(self.first.min()), int(self.first.max()) + int(self.weights.shape[1])


@lru_cache(maxsize=64)
def build(n_in: int, n_out: int, *, flipped: bool = False, **step: Any) -> BlockTables:
    """Return the tables of `resample_taps.weights_of_samples` in blocks.

    Parameters
    ----------
    n_in, n_out : int
        Number of samples before and after.
    flipped : bool
        Whether the samples are stored in reverse order.
    **step
        Further arguments of `gpuprep.compute.resample_taps.weights_of_samples`, all of them.
    """
    first, weights = resample_taps.weights_of_samples(n_in, n_out, **step)
    samples = n_in if step["along"] is None else len(step["along"])
    if (part := step.get("part")) is not None:
        samples = part.samples
    return _blocks(samples, first, weights, flipped)


@lru_cache(maxsize=64)
def selection(n_in: int, start: int, stop: int, *, flipped: bool = False) -> BlockTables:
    """Return the tables that select the samples [start, stop) of a line of `n_in`."""
    return _blocks(n_in, np.arange(start, stop), np.ones((stop - start, 1)), flipped)


def from_matrix(matrix: NDArray[np.float64], negligible: float) -> BlockTables:
    """Return the tables of a banded matrix of shape (outputs, samples); weights below `negligible` are 0."""
    return _blocks(matrix.shape[1], *resample_taps.band_of(matrix, negligible))


def _blocks(n_in: int, first: NDArray[Any], weights: NDArray[np.float64], flipped: bool = False) -> BlockTables:
    n_out, taps = weights.shape
    if flipped:
        first, weights = n_in - taps - first, weights[:, ::-1]
    outputs = np.arange(n_out)
    starts = np.arange(0, n_out, OUTPUTS)
    low = np.minimum.reduceat(first, starts)
    width = int((np.maximum.reduceat(first, starts) + taps - low).max())
    low = np.minimum(low, n_in - width)
    table = np.zeros((len(starts), width, OUTPUTS), dtype=np.float32)
    block = outputs // OUTPUTS
    table[block[:, None], (first - low[block])[:, None] + np.arange(taps), (outputs % OUTPUTS)[:, None]] = weights
    return BlockTables(n_in, n_out, low.astype(np.int32), table)
