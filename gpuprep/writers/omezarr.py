"""OME-Zarr: chunks for patches, many to a file, in a Zarr 3 group that viewers and loaders know.

A chunk holds about 32 × 64 × 64 voxels, so a patch costs little more than itself. A shard is one file with all chunks
of as many slices as a chunk has; these are what is buffered, so that each file is written once.

References
----------
OME-Zarr (NGFF) 0.5: ``multiscales``, ``image-label``; Zarr core specification 3; sharding codec (ZEP 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.geometry import Geometry, Shape3
from gpuprep.writers.content import Content, Settle, nothing

CHUNK = (32, 64, 64)
"""About; each axis is divided evenly, so that little is padded at its end."""

SHARD_BYTES = 2**25
"""Slices that are buffered take no more; a chunk of very large slices has fewer. Zarr makes some copies of them."""


def write_omezarr(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, settle: Settle = nothing
) -> tuple[str, ...]:
    """Write a group with array "0": axes z, y, x in mm, and our own attributes under "gpuprep"."""
    import zarr  # takes a second, and is an extra

    depth, rows, columns = _chunk(content)
    planes = tuple(math.ceil(n / of) * of for n, of in zip(content.shape[1:], (rows, columns), strict=True))
    group = zarr.create_group(path, zarr_format=3, attributes=_attributes(path, content))
    array = group.create_array(
        "0",
        shape=content.shape,
        dtype=content.dtype,
        chunks=(depth, rows, columns),
        shards=(depth, *planes),
        compressors=_compressor(content),
        dimension_names=("z", "y", "x"),
    )
    slab = np.empty((depth, *content.shape[1:]), dtype=content.dtype)
    start = held = 0
    for chunk in chunks:
        while len(chunk):
            taken = min(len(chunk), depth - held)
            slab[held : held + taken], chunk = chunk[:taken], chunk[taken:]
            held += taken
            if held == depth or start + held == content.shape[0]:
                array[start : start + held] = slab[:held]
                shard = path / "0" / "c" / str(start // depth) / "0" / "0"
                if shard.exists():  # there is none for zeros alone
                    settle(shard)
                start, held = start + held, 0
    return ()


def _chunk(content: Content) -> Shape3:
    """Return the shape of a chunk."""
    k, j, i = (math.ceil(n / math.ceil(n / about)) for n, about in zip(content.shape, CHUNK, strict=True))
    return min(k, max(1, SHARD_BYTES * content.shape[0] // content.bytes)), j, i


def _compressor(content: Content) -> Any:
    """Return the codec of the chunks.

    On CT, Blosc with zstd's level 1 makes 0.39 of int16 with bits shuffled, at 130 MB/s (plain: 0.49 at 80), 0.44 of
    uint8 (0.48) and 0.66 of float32 with bytes shuffled (0.68, bits: 0.70). Higher levels save 1 to 3 % and take twice
    the time; so do those of gzip.
    """
    from zarr.codecs import BloscCodec, GzipCodec

    if content.compression == "zstd":
        return BloscCodec(cname="zstd", clevel=1, shuffle="shuffle" if content.dtype == "float32" else "bitshuffle")
    return GzipCodec(level=1) if content.compression == "zlib" else None


def _attributes(path: Path, content: Content) -> dict[str, Any]:
    placing: list[dict[str, Any]] = [{"type": "scale", "scale": list(content.spacing_mm)}]
    if _runs_along_the_patient(content.grid):  # OME-Zarr knows no rotation yet
        placing.append({"type": "translation", "translation": list(content.grid.origin_mm[::-1])})
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": path.name.removesuffix(".ome.zarr"),
                "axes": [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"],
                "datasets": [{"path": "0", "coordinateTransformations": placing}],
            }
        ],
    }
    own: dict[str, Any] = {"affine_lps": content.grid.affine.tolist()}
    if content.hu is None:
        ome["image-label"] = {}
    else:
        own |= {"hu_slope": content.hu[0], "hu_intercept": content.hu[1]}
    return {"ome": ome, "gpuprep": own}


def _runs_along_the_patient(grid: Geometry) -> bool:
    """Whether slices go up, rows to the back and columns to the left, so that index times spacing is a place in LPS."""
    return np.allclose(grid.affine[2::-1, :3], np.diag(grid.spacing_mm), rtol=0, atol=1e-6)
