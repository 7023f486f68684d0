"""Writes OME-Zarr as a Zarr 3 group, with small chunks for reading patches and many chunks in each file (shard).

A chunk holds about 32 × 64 × 64 voxels, so that reading a patch decodes little more than the patch. A shard is one file
with all chunks of as many slices as a chunk has. These slices are buffered, so that each file is written once.

OME-Zarr 0.5 has no affine. Each axis has the patient direction that it is nearest to (RFC-4) as its orientation. The
translation is the centre of the first voxel: its "z", "y" and "x" in LPS, whatever the directions of the axes.
ngff-zarr converts ITK images in the same way: translation is origin, orientation is direction. The exact affine is
among the "gpuprep" attributes.

References
----------
OME-Zarr (NGFF) 0.5: ``multiscales``, ``labels``, ``image-label``; RFC-4 (axis orientation); Zarr core specification 3;
sharding codec (ZEP 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import NEGLIGIBLE_SHIFT_MM, Geometry, Shape3
from gpuprep.output.writers.content import Content, OnFileFinished, ignore_finished_file

CHUNK = (32, 64, 64)
"""Approximate shape of a chunk; each axis is divided evenly, so that the last chunk has little padding."""

ORIENTATIONS = (
    ("inferior-to-superior", "superior-to-inferior"),
    ("anterior-to-posterior", "posterior-to-anterior"),
    ("right-to-left", "left-to-right"),
)
"""Terms of RFC-4 for axes along increasing and decreasing z, y and x of LPS."""

LABELS_GROUP = "labels"
"""Name of the group of label volumes inside the group of an image."""

SHARD_BYTES = 2**25
"""Maximum size of the buffered slices, of which Zarr makes some copies. Chunks of very large slices are thinner."""


def write_omezarr(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, finish_file: OnFileFinished = ignore_finished_file
) -> tuple[str, ...]:
    """Write a group with array "0": axes z, y, x in mm, and gpuprep's attributes under "gpuprep"."""
    import zarr  # takes a second, and is an optional dependency

    depth, rows, columns = _chunk_shape(content)
    padded = tuple(math.ceil(n / chunk) * chunk for n, chunk in zip(content.shape[1:], (rows, columns), strict=True))
    group = zarr.create_group(path, zarr_format=3, attributes=_attributes(path, content))
    array = group.create_array(
        "0",
        shape=content.shape,
        dtype=content.dtype,
        chunks=(depth, rows, columns),
        shards=(depth, *padded),
        # A lost file then reads as air, not as 0. Since empty chunks are written too, a missing file is noticed.
        fill_value=content.fill,
        config={"write_empty_chunks": True},
        compressors=_compressor(content),
        dimension_names=("z", "y", "x"),
    )
    slab = np.empty((depth, *content.shape[1:]), dtype=content.dtype)
    start = filled = 0
    for chunk in chunks:
        while len(chunk):
            count = min(len(chunk), depth - filled)
            slab[filled : filled + count], chunk = chunk[:count], chunk[count:]
            filled += count
            if filled == depth or start + filled == content.shape[0]:
                array[start : start + filled] = slab[:filled]
                finish_file(path / "0" / "c" / str(start // depth) / "0" / "0")
                start, filled = start + filled, 0
    if (angle_deg := _obliqueness_deg(content.grid)) is None:
        return ()
    return (
        f"axes are up to {angle_deg:.3g}° off those of the patient, which OME-Zarr cannot express: its readers treat "
        'them as parallel to those; the exact affine is "affine_lps" under "gpuprep" in its attributes',
    )


def list_labels(image: Path, names: list[str]) -> None:
    """Make the group that lists the label volumes inside the group of an image."""
    import zarr

    zarr.create_group(image / LABELS_GROUP, zarr_format=3, attributes={"ome": {"version": "0.5", "labels": names}})


def _chunk_shape(content: Content) -> Shape3:
    k, j, i = (math.ceil(n / math.ceil(n / about)) for n, about in zip(content.shape, CHUNK, strict=True))
    return min(k, max(1, SHARD_BYTES * content.shape[0] // content.bytes)), j, i


def _compressor(content: Content) -> Any:
    """Return the codec of the chunks.

    On CT, Blosc with zstd at level 1 compresses int16 with bit shuffle to 0.39 of its size, at 130 MB/s (without
    shuffle: 0.49 at 80 MB/s), uint8 to 0.44 (0.48), and float32 with byte shuffle to 0.66 (0.68; bit shuffle: 0.70).
    Higher levels of zstd and of gzip save 1 to 3 % and take twice the time.
    """
    from zarr.codecs import BloscCodec, GzipCodec

    if content.compression == "zstd":
        return BloscCodec(cname="zstd", clevel=1, shuffle="shuffle" if content.dtype == "float32" else "bitshuffle")
    return GzipCodec(level=1) if content.compression == "zlib" else None


def _attributes(path: Path, content: Content) -> dict[str, Any]:
    grid = content.grid
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": path.name.removesuffix(".ome.zarr"),
                "axes": [
                    {
                        "name": name,
                        "type": "space",
                        "unit": "millimeter",
                        "orientation": {"type": "anatomical", "value": direction},
                    }
                    for name, direction in zip("zyx", _orientations(grid), strict=True)
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": list(content.spacing_mm)},
                            {"type": "translation", "translation": list(grid.origin_mm[::-1])},
                        ],
                    }
                ],
            }
        ],
    }
    own: dict[str, Any] = {"affine_lps": grid.affine.tolist()}
    if content.hu is None:
        in_image_group = path.parent.name == LABELS_GROUP
        ome["image-label"] = {"source": {"image": "../../"}} if in_image_group else {}
    else:
        own |= {"hu_slope": content.hu[0], "hu_intercept": content.hu[1]}
    return {"ome": ome, "gpuprep": own}


def _orientations(grid: Geometry) -> list[str]:
    """Return the nearest patient direction of each axis, no two along the same line."""
    turn, orientations = grid.to_axial, ["", "", ""]
    for directions, axis, flipped in zip(ORIENTATIONS, turn.axes, turn.flips, strict=True):
        orientations[axis] = directions[flipped]
    return orientations


def _obliqueness_deg(grid: Geometry) -> float | None:
    """Return the largest angle between an axis and its patient direction; None if it shifts no voxel visibly."""
    turn = grid.to_axial
    axial = grid.affine[:3, list(turn.axes)] * np.where(turn.flips, -1, 1)  # columns near +z, +y, +x
    spacing_mm = np.linalg.norm(axial, axis=0)
    apart_mm = np.abs(axial - np.eye(3)[:, ::-1] * spacing_mm) @ np.array(grid.shape)[list(turn.axes)]
    if apart_mm.max() <= NEGLIGIBLE_SHIFT_MM:
        return None
    cosines = axial[[2, 1, 0], [0, 1, 2]] / spacing_mm
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))
