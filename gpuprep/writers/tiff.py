"""TIFF: one file per slice, or one stack that ImageJ opens as a volume.

zstd is preceded by horizontal differencing (for float32 by its floating-point twin), which makes it faster and smaller;
zlib is not, because ImageJ reads zlib only without.

References
----------
TIFF 6.0 (Adobe, 1992), sections 8 and 14; ImageJ 1.x source, ``ij.io.TiffDecoder`` and ``ij.io.FileInfo``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from gpuprep.plan import Plan

BIGTIFF_BYTES = 2**32 - 2**25
"""Offsets of a classic TIFF have 32 bits; this leaves room for its directories."""

ZSTD_LEVEL = 1
ZLIB_LEVEL = 6


def write_slices(folder: Path, chunks: Iterator[NDArray[Any]], plan: Plan) -> tuple[str, ...]:
    """Write ``0000.tif``, ``0001.tif``, … along k; voxel size in the resolution tags and the description."""
    count = plan.target.shape[0]
    digits = max(4, len(str(count - 1)))
    description = {
        "axes": "YX",
        "spacing_mm": list(plan.target.spacing_mm),
        "hu_slope": plan.hu_slope,
        "hu_intercept": plan.hu_intercept,
    }
    encode = _Encoder(plan, description)
    k = 0
    for chunk in chunks:
        for values in chunk:
            with open(folder / f"{k:0{digits}d}.tif", "wb", buffering=0) as f:
                for part in encode(values):
                    view = memoryview(part).cast("B")
                    while view:  # without a buffer a write may be a short one
                        view = view[f.write(view) :]
            k += 1
    return ()


class _Encoder:
    """Slices to TIFF. Uncompressed ones differ in nothing but pixels, so tifffile makes one header for all."""

    def __init__(self, plan: Plan, description: dict[str, Any]) -> None:
        self._options = _compression(plan) | _per_cm(plan) | {"metadata": description, "photometric": "minisblack"}
        self._reusable = plan.recipe.compression == "none"
        self._header: bytes | None = None

    def __call__(self, values: NDArray[Any]) -> tuple[Any, ...]:
        """Return the parts of a file, to be written one after the other."""
        if self._header is None:
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, values, **self._options)
            whole = buffer.getvalue()
            if not self._reusable:
                return (whole,)
            self._header = whole[: len(whole) - values.nbytes]
        return self._header, np.ascontiguousarray(values).data


def write_stack(folder: Path, chunks: Iterator[NDArray[Any]], plan: Plan) -> tuple[str, ...]:
    """Write ``volume.tif``: axes ZYX, voxel size in mm, display range; HU calibration where ImageJ knows one.

    ImageJ keeps 32-bit offsets. A larger volume becomes a BigTIFF, which it opens only through Bio-Formats.
    """
    spacing_z, spacing_y, spacing_x = plan.target.spacing_mm
    low, high = _display_range(plan)
    metadata: dict[str, Any] = {
        "axes": "ZYX",
        "spacing": spacing_z,
        "unit": "mm",
        "min": low,
        "max": high,
        "loop": False,
    }
    if plan.recipe.dtype in ("uint8", "uint16"):
        metadata |= {"cf": 0, "c0": plan.hu_intercept, "c1": plan.hu_slope, "vunit": "HU"}
    big = plan.output_bytes > BIGTIFF_BYTES
    place = _per_cm(plan) if big else {"resolution": (1 / spacing_x, 1 / spacing_y)}
    with tifffile.TiffWriter(folder / "volume.tif", bigtiff=big, imagej=not big) as tiff:
        tiff.write(
            (values for chunk in chunks for values in chunk),
            shape=plan.target.shape,
            dtype=plan.recipe.dtype,
            photometric="minisblack",
            metadata=metadata,
            **_compression(plan),
            **place,
        )
    return ("larger than 4 GB, so volume.tif is a BigTIFF: ImageJ opens it through Bio-Formats only",) if big else ()


def _per_cm(plan: Plan) -> dict[str, Any]:
    """Resolution in pixels per centimetre, the only metric unit that TIFF has."""
    _, between_rows, between_columns = plan.target.spacing_mm
    return {"resolution": (10 / between_columns, 10 / between_rows), "resolutionunit": "CENTIMETER"}


def _compression(plan: Plan) -> dict[str, Any]:
    recipe = plan.recipe
    if recipe.compression == "none":
        return {}
    level = ZSTD_LEVEL if recipe.compression == "zstd" else ZLIB_LEVEL
    predictor = recipe.compression == "zstd"
    return {"compression": recipe.compression, "compressionargs": {"level": level}, "predictor": predictor}


def _display_range(plan: Plan) -> tuple[float, float]:
    """Black and white in output units: the window, or for unwindowed HU what is usual for CT."""
    low, high = plan.recipe.window_hu or (-1000.0, 400.0)
    offset = 32768 if plan.recipe.dtype == "int16" else 0  # ImageJ holds signed integers as unsigned ones
    return (low + plan.shift_hu) * plan.scale + offset, (high + plan.shift_hu) * plan.scale + offset
