"""Positions of voxels in mm, from originals and from DICOM SEG, by pydicom alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

Points = dict[str, NDArray[np.float64]]
"""Positions of the voxels of each structure, (x, y, z) in mm, LPS, sorted."""


def _plane(
    mask: NDArray[Any], position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """Return the positions of the pixels of a plane (PS3.3, C.7.6.2.1.1)."""
    row, column = np.nonzero(mask)
    along_row, along_column = np.array(orientation, dtype=float).reshape(2, 3)
    down, across = map(float, spacing)
    return (
        np.array(position, dtype=float)
        + np.outer(column * across, along_row)
        + np.outer(row * down, along_column)
    )  # fmt: skip


def _joined(planes: Mapping[str, list[NDArray[np.float64]]]) -> Points:
    return {name: in_order(np.concatenate(found)) for name, found in planes.items()}


def in_order(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return positions in an order that does not depend on their rounding."""
    return points[np.lexsort(np.round(points, 3).T)]


def _geometry(file: Path, frame: int) -> tuple[Any, Any, Any]:
    """Return position, orientation and pixel spacing of a frame, from 0, or of a single-frame image."""
    ds = pydicom.dcmread(file, stop_before_pixels=True)
    if "PerFrameFunctionalGroupsSequence" not in ds:
        return ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    groups = [ds.PerFrameFunctionalGroupsSequence[frame], ds.SharedFunctionalGroupsSequence[0]]
    found = []
    for sequence, keyword in (
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ("PixelMeasuresSequence", "PixelSpacing"),
    ):
        found.append(next(group[sequence][0][keyword].value for group in groups if sequence in group))
    return found[0], found[1], found[2]


def of_images(images: Sequence[Path | tuple[Path, int]], masks: Mapping[str, NDArray[np.bool_]]) -> Points:
    """Return the positions of the voxels of masks on images, or frames from 0; plane k of a mask is on image k."""
    planes: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for k, image in enumerate(images):
        geometry = _geometry(*image) if isinstance(image, tuple) else _geometry(image, 0)
        for name, mask in masks.items():
            planes[name].append(_plane(mask[k], *geometry))
    return _joined(planes)


def heights_mm(images: Sequence[tuple[Path, int]]) -> list[float]:
    """Return the positions of images along row × column, in mm."""
    found = []
    for image in images:
        position, orientation, _ = _geometry(*image)
        row, column = np.array(orientation, dtype=float).reshape(2, 3)
        found.append(float(np.cross(row, column) @ np.array(position, dtype=float)))
    return found


def of_seg(file: Path) -> Points:
    """Return the positions of the voxels of each segment, by its label."""
    ds = pydicom.dcmread(file)
    pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in ds.SegmentSequence}
    shared = ds.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    planes: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for frame, own in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        position = own.PlanePositionSequence[0].ImagePositionPatient
        identified = own.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
        for value in set(np.unique(frame).tolist()) - {0}:
            number = int(identified[0].ReferencedSegmentNumber) if identified else value
            planes[names[number]].append(_plane(frame == value, position, orientation, spacing))
    return _joined(planes)


def check_same(found: Points, expected: Points, atol_mm: float = 1e-9) -> None:
    """Check that structures have the same voxels at the same places."""
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name].shape == points.shape
        np.testing.assert_allclose(found[name], points, rtol=0, atol=atol_mm)
