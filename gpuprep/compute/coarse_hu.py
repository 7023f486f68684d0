"""Samples a series in HU at every fourth row and column, on the host, for the search of the crop box."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.hounsfield import to_hu
from gpuprep.core.volume import StoredVolume

STEP = 4
"""Distance between sampled rows, and between sampled columns, in pixels."""

SLAB_SLICES = 8
"""Slices at a time, so that they stay in the cache of the processor."""


def coarse_hu(volume: StoredVolume) -> NDArray[np.int16]:
    """Return HU of every fourth row and column of all slices.

    Parameters
    ----------
    volume : StoredVolume
        Stacked series.

    Returns
    -------
    array of int16, shape (slices, ceil(rows / 4), ceil(columns / 4))
        HU, rounded and clipped to int16; declared padding and everything below −1024 HU is air (−1000).
    """
    rows, columns = (-(-n // STEP) for n in volume.stored.shape[1:])
    coarse = np.empty((len(volume.stored), rows, columns), dtype=np.int16)
    slope, intercept = volume.slope.astype(np.float32), volume.intercept.astype(np.float32)
    limits = np.iinfo(np.int16)
    for start in range(0, len(coarse), SLAB_SLICES):
        slab = slice(start, start + SLAB_SLICES)
        sampled = np.ascontiguousarray(volume.stored[slab, ::STEP, ::STEP])
        hu = to_hu(
            sampled, slope[slab], intercept[slab], None if volume.padding is None else volume.padding[slab], "air"
        )
        np.rint(np.clip(hu, limits.min, limits.max, out=hu), out=hu)
        coarse[slab] = hu
    return coarse
