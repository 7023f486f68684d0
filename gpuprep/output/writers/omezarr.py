"""Writes OME-Zarr: chunks for patches, many to a file, in a Zarr 3 group.

A chunk holds about 32 × 64 × 64 voxels, so a patch costs little more than itself. A shard is one file with all chunks
of as many slices as a chunk has; these are what is buffered, so that each file is written once.

OME-Zarr 0.5 has no affine. Each axis says the direction of the patient that it is nearest to (RFC-4), and the
translation is the centre of the first voxel: "z", "y" and "x" of it in LPS, in whichever direction the axes run.
ngff-zarr makes and reads ITK images so: translation is origin, orientation is direction. The affine is among our own
attributes.

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

from gpuprep.core.geometry import UNSEEN_MM, Geometry, Shape3
from gpuprep.output.writers.content import Content, Settle, nothing

CHUNK = (32, 64, 64)
"""About; each axis is divided evenly, so that little is padded at its end."""

ORIENTATIONS = (
    ("inferior-to-superior", "superior-to-inferior"),
    ("anterior-to-posterior", "posterior-to-anterior"),
    ("right-to-left", "left-to-right"),
)
"""Words of RFC-4 for an axis along growing and falling z, y and x of LPS."""

LABELS_GROUP = "labels"
"""Group of the label volumes of an image, inside that of the image."""

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
        # A lost file then reads as air, not as 0 HU, which is water; and as none is left out, a lost one is missed.
        fill_value=content.fill,
        config={"write_empty_chunks": True},
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
                settle(path / "0" / "c" / str(start // depth) / "0" / "0")
                start, held = start + held, 0
    if (apart_deg := _obliqueness_deg(content.grid)) is None:
        return ()
    return (
        f"axes are up to {apart_deg:.3g}° off those of the patient, which OME-Zarr cannot say: its readers take them "
        'for straight; the affine is "affine_lps" under "gpuprep" in its attributes',
    )


def list_labels(image: Path, names: list[str]) -> None:
    """Make the group by which readers find the label volumes inside an image's group."""
    import zarr

    zarr.create_group(image / LABELS_GROUP, zarr_format=3, attributes={"ome": {"version": "0.5", "labels": names}})


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
                        "orientation": {"type": "anatomical", "value": words},
                    }
                    for name, words in zip("zyx", _orientations(grid), strict=True)
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
        inside = path.parent.name == LABELS_GROUP
        ome["image-label"] = {"source": {"image": "../../"}} if inside else {}
    else:
        own |= {"hu_slope": content.hu[0], "hu_intercept": content.hu[1]}
    return {"ome": ome, "gpuprep": own}


def _orientations(grid: Geometry) -> list[str]:
    """Return the direction of the patient that each axis is nearest to, no two along the same line."""
    turn, found = grid.to_axial, ["", "", ""]
    for words, axis, falls in zip(ORIENTATIONS, turn.axes, turn.flips, strict=True):
        found[axis] = words[falls]
    return found


def _obliqueness_deg(grid: Geometry) -> float | None:
    """Return how far axes are off the directions of the patient; None where no voxel is visibly misplaced by it."""
    turn = grid.to_axial
    axial = grid.affine[:3, list(turn.axes)] * np.where(turn.flips, -1, 1)  # columns near +z, +y, +x
    spacing_mm = np.linalg.norm(axial, axis=0)
    apart_mm = np.abs(axial - np.eye(3)[:, ::-1] * spacing_mm) @ np.array(grid.shape)[list(turn.axes)]
    if apart_mm.max() <= UNSEEN_MM:
        return None
    cosines = axial[[2, 1, 0], [0, 1, 2]] / spacing_mm
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))
