"""Defines `AxisPart`: the part of an axis that is resampled when a volume is cropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

SPLINE_REACH = {0: 2, 1: 3, 2: 26, 3: 32, 4: 42, 5: 52}
"""Input samples with a weight of at least 1e-8 for an output sample, by spline order, with a margin."""

UNEVEN = 2
"""Factor of that reach between unevenly spaced samples, whose weights fall by at least a half per sample."""


class AxisPart(NamedTuple):
    """Outputs [start, stop) of an axis of `n_in` samples that is resampled to `n_out`, and the samples they need.

    Samples beyond the box of a crop are among them, as far as the spline reaches: the outputs are those of the whole
    axis.
    """

    n_in: int
    n_out: int
    start: int
    stop: int
    low: int
    high: int
    """Samples [low, high) are read."""

    @property
    def samples(self) -> int:
        """Number of samples that are read."""
        return self.high - self.low

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.stop - self.start

    @classmethod
    def of(
        cls,
        n_in: int,
        n_out: int,
        box: tuple[int, int],
        *,
        corner: bool,
        along: Sequence[float] | None,
        order: int,
        sigma: float,
        cut: bool,
    ) -> Self:
        """Return the part of an axis whose outputs touch the voxels [low, high) of a box.

        Parameters
        ----------
        n_in, n_out : int
            Number of voxels before and after resampling.
        box : (int, int)
            First voxel of the box, and the one after its last.
        corner : bool
            Whether the centres of the outer voxels are kept, not the outer edges of the volume.
        along : sequence of float, optional
            Positions of the samples in voxels, if they are uneven.
        order, sigma : int, float
            Spline order, and standard deviation of the Gaussian in voxels.
        cut : bool
            Whether samples that no output needs can be left out.
        """
        samples = n_in if along is None else len(along)
        if n_in == n_out and along is None:
            return cls(n_in, n_out, *box, *(box if cut else (0, samples)))
        step, first = ((n_in - 1) / max(1, n_out - 1), 0.0) if corner else (n_in / n_out, (n_in / n_out - 1) / 2)
        # Output q extends by half a step to both sides of first + q · step, and a voxel by 0.5.
        low, high = ((edge - 0.5 - first) / step for edge in box) if step else (0.0, n_out - 1.0)
        start = min(max(math.floor(round(low + 0.5, 6)), 0), n_out - 1)
        stop = max(min(math.ceil(round(high + 0.5, 6)), n_out), start + 1)
        if not cut:
            return cls(n_in, n_out, start, stop, 0, samples)
        reach = SPLINE_REACH[order] // 2 + 1
        # Uneven samples that are blurred are first interpolated to voxels.
        voxels = reach + math.ceil(4 * sigma) if along is None or sigma else 1
        needed = math.floor(first + start * step) - voxels, math.ceil(first + (stop - 1) * step) + voxels + 1
        if along is not None:  # the reach is a number of samples: a gap between them may be wider than that in voxels
            before, after = np.searchsorted(along, needed)
            needed = int(before) - UNEVEN * reach, int(after) + UNEVEN * reach
        return cls(n_in, n_out, start, stop, max(0, needed[0]), min(samples, needed[1]))
