"""Compares pixels of images and of series, to find copies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gpuprep.core.series import Series, SliceHeader
from gpuprep.dicom.read import PixelReader, stored_dtype
from gpuprep.errors import DecodeError, InputError


def are_copies(pairs: Sequence[tuple[SliceHeader, SliceHeader]], matrix: tuple[int, int]) -> bool:
    """Whether the images of every pair have equal stored values and rescale; False if one cannot be read.

    Parameters
    ----------
    pairs : sequence of (SliceHeader, SliceHeader)
        Images that pass `gpuprep.dicom.header_checks.check`. Pairs in the middle are read first, as the first and
        last slices of different acquisitions may both be air.
    matrix : tuple of int
        Rows and columns of the images.
    """
    readers = PixelReader(), PixelReader()
    middle = len(pairs) // 2
    for pair in (*pairs[middle:], *pairs[:middle]):
        one, other = pair
        if (one.rescale_slope, one.rescale_intercept) != (other.rescale_slope, other.rescale_intercept):
            return False
        values = [np.empty(matrix, dtype=stored_dtype(header)) for header in pair]
        try:
            for reader, header, out in zip(readers, pair, values, strict=True):
                reader.read(header, out)
        except DecodeError:
            return False
        if not np.array_equal(values[0], values[1]):
            return False
    return True


def digest_of_some_slices(series: Series) -> str:
    """Return a hash of the HU of three slices in the middle of a series; "" if one of them cannot be read.

    Parameters
    ----------
    series : Series
        A series of which every slice has a position.
    """
    ordered = sorted(series.slices, key=lambda s: s.position_mm or ())
    reader, digest = PixelReader(), hashlib.sha256()
    for n in sorted({len(ordered) // 4, len(ordered) // 2, len(ordered) * 3 // 4}):
        header = ordered[n]
        try:
            values = np.empty((series.rows, series.columns), dtype=stored_dtype(header))
            reader.read(header, values)
        except (InputError, OSError, ValueError):
            return ""
        slope = 1.0 if header.rescale_slope is None else header.rescale_slope
        intercept = 0.0 if header.rescale_intercept is None else header.rescale_intercept
        digest.update((values * np.float64(slope) + intercept).tobytes())
    return digest.hexdigest()
