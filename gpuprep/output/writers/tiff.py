"""Writes TIFF: one file per slice, or one stack that ImageJ opens as a volume.

zstd is used with the horizontal predictor (for float32 the floating-point predictor), which makes it faster and files
smaller. zlib is used without a predictor, because ImageJ reads zlib only so.

References
----------
TIFF 6.0 (Adobe, 1992), sections 8 and 14; ImageJ 1.x source, ``ij.io.TiffDecoder`` and ``ij.io.FileInfo``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from gpuprep.output.writers.appending import appended
from gpuprep.output.writers.content import Content, OnFileFinished, ignore_finished_file

BIGTIFF_BYTES = 2**32 - 2**25
"""Maximum size of the voxels of a classic TIFF. Its offsets have 32 bits; the difference is for its directories."""

ZSTD_LEVEL = 1
ZLIB_LEVEL = 6


def write_slices(
    folder: Path, chunks: Iterator[NDArray[Any]], content: Content, finish_file: OnFileFinished = ignore_finished_file
) -> tuple[str, ...]:
    """Write ``0000.tif``, ``0001.tif``, … along k; voxel size in the resolution tags and the description."""
    folder.mkdir(exist_ok=True)
    digits = max(4, len(str(content.shape[0] - 1)))
    description: dict[str, Any] = {"axes": "YX", "spacing_mm": list(content.spacing_mm)}
    if content.hu is not None:
        description |= {"hu_slope": content.hu[0], "hu_intercept": content.hu[1]}
    encode = _Encoder(content, description)
    k = 0
    for chunk in chunks:
        for values in chunk:
            with appended(os.path.join(folder, f"{k:0{digits}d}.tif"), finish_file) as append:
                for part in encode(values):
                    append(part)
            k += 1
    return ()


class _Encoder:
    """Encodes slices as TIFF. Uncompressed slices differ only in their pixels, so tifffile makes one header for all."""

    def __init__(self, content: Content, description: dict[str, Any]) -> None:
        self._options = _compression(content) | _per_cm(content)
        self._options |= {"metadata": description, "photometric": "minisblack"}
        self._reusable = content.compression == "none"
        self._header: bytes | None = None

    def __call__(self, values: NDArray[Any]) -> tuple[Any, ...]:
        """Return the consecutive parts of the file of a slice, shape (rows, columns)."""
        if self._header is None:
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, values, **self._options)
            whole = buffer.getvalue()
            if not self._reusable:
                return (whole,)
            self._header = whole[: len(whole) - values.nbytes]
        return self._header, np.ascontiguousarray(values)


def write_stack(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, finish_file: OnFileFinished = ignore_finished_file
) -> tuple[str, ...]:
    """Write a stack: axes ZYX, voxel size in mm, display range; for unsigned integers also the calibration to HU.

    The stack of ImageJ has 32-bit offsets. A larger volume becomes a BigTIFF, which ImageJ opens only with Bio-Formats.
    """
    spacing_z, spacing_y, spacing_x = content.spacing_mm
    offset = 32768 if content.dtype == "int16" else 0  # ImageJ holds signed integers as unsigned ones
    low, high = content.display
    metadata: dict[str, Any] = {
        "axes": "ZYX",
        "spacing": spacing_z,
        "unit": "mm",
        "min": low + offset,
        "max": high + offset,
        "loop": False,
    }
    if content.hu is not None and content.dtype in ("uint8", "uint16"):
        metadata |= {"cf": 0, "c0": content.hu[1], "c1": content.hu[0], "vunit": "HU"}
    big = content.bytes > BIGTIFF_BYTES
    resolution = _per_cm(content) if big else {"resolution": (1 / spacing_x, 1 / spacing_y)}
    plain = content.compression == "none"
    with tifffile.TiffWriter(path, bigtiff=big, imagej=not big) as tiff:
        place = tiff.write(
            None if plain else (values for chunk in chunks for values in chunk),
            shape=content.shape,
            dtype=content.dtype,
            photometric="minisblack",
            metadata=metadata,
            returnoffset=plain,
            **_compression(content),
            **resolution,
        )
    if place is None:
        finish_file(path)
    else:  # tifffile has left a gap for the voxels
        with appended(path, finish_file, start=place[0]) as append:
            for chunk in chunks:
                append(np.ascontiguousarray(chunk))
    return (f"larger than 4 GB, so {path.name} is a BigTIFF: ImageJ opens it only with Bio-Formats",) if big else ()


def _per_cm(content: Content) -> dict[str, Any]:
    """Return the resolution in pixels per centimetre, the only metric unit of TIFF."""
    _, between_rows, between_columns = content.spacing_mm
    return {"resolution": (10 / between_columns, 10 / between_rows), "resolutionunit": "CENTIMETER"}


def _compression(content: Content) -> dict[str, Any]:
    if content.compression == "none":
        return {}
    zstd = content.compression == "zstd"
    level = ZSTD_LEVEL if zstd else ZLIB_LEVEL
    return {"compression": content.compression, "compressionargs": {"level": level}, "predictor": zstd}
