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


def of_images(files: Sequence[Path], masks: Mapping[str, NDArray[np.bool_]]) -> Points:
    """Return the positions of the voxels of masks on single-frame images; plane k of a mask is on file k."""
    planes: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for k, file in enumerate(files):
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        for name, mask in masks.items():
            planes[name].append(_plane(mask[k], ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing))
    return _joined(planes)


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


def in_spatial_order(folder: Path) -> list[Path]:
    """Return the images of a series, sorted along row × column."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            ds = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            if "ImagePositionPatient" in ds:
                row, column = np.array(ds.ImageOrientationPatient, dtype=float).reshape(2, 3)
                found.append((float(np.cross(row, column) @ np.array(ds.ImagePositionPatient, dtype=float)), file))
    return [file for _, file in sorted(found)]
