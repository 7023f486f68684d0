"""Makes synthetic CT series and writes them as DICOM, for the demo, the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from gpuprep.core.geometry import Geometry, Vector3
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.volume import StoredVolume

OUTSIDE_CIRCLE = -2000
"""Stored value of padding outside the scanner's circle; −3024 HU with the usual intercept."""


HEART, SPINE = (0.03, -0.05, 0.09, 0.11), (0.0, 0.2, 0.05, 0.05)
"""Ellipses of `thorax`: centre (x, y) from the middle of a slice and half axes, as fractions of its width and height.
The height of the heart is multiplied by the breadth of the lungs."""


def thorax(shape: tuple[int, int, int], spacing_mm: Vector3, seed: int = 0) -> NDArray[np.int16]:
    """Return a synthetic chest as stored values: HU + 1024 inside the scanner's circle, padding outside.

    Parameters
    ----------
    shape : tuple of int
        Number of slices, rows and columns.
    spacing_mm : tuple of float
        Spacing of slices, rows and columns.
    seed : int
        Seed of noise, nodules and the width of the patient.

    Returns
    -------
    array of int16, shape (k, j, i)
    """
    rng = np.random.default_rng(seed)
    slices, rows, columns = shape
    y = ((np.arange(rows) - (rows - 1) / 2) / rows)[:, None]
    x = ((np.arange(columns) - (columns - 1) / 2) / columns)[None, :]
    z_mm = np.arange(slices) * spacing_mm[0]
    field_mm = rows * spacing_mm[1]
    width = rng.uniform(0.92, 1.0)
    nodules = [
        (rng.uniform(0.1, 0.9) * z_mm[-1], rng.uniform(-0.1, 0.1), side * rng.uniform(0.15, 0.22), radius_mm)
        for side in (-1, 1)
        for radius_mm in (4, 7, 11)
    ]

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> NDArray[np.bool_]:
        return np.asarray(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)

    stored = np.empty(shape, dtype=np.int16)
    for k in range(slices):
        breadth = _breadth(k, slices)
        hu = np.full((rows, columns), -1000.0)
        hu[ellipse(0, 0, 0.44 * width, 0.32)] = -90  # fat
        hu[ellipse(0, 0, 0.42 * width, 0.30)] = 45  # muscle
        for side in (-1, 1):
            hu[ellipse(side * 0.19, -0.02, 0.15 * breadth, 0.22 * breadth)] = -850
        hu[ellipse(*HEART[:3], HEART[3] * breadth)] = 60  # and vessels
        hu[ellipse(*SPINE)] = 350
        hu[ellipse(0, 0.2, 0.02, 0.02)] = 20
        for angle in np.linspace(0, 2 * np.pi, 14, endpoint=False):
            shift = 0.15 * np.sin(2 * np.pi * z_mm[k] / 30)  # ribs are oblique, so they move from slice to slice
            hu[ellipse(0.385 * width * np.cos(angle + shift), 0.27 * np.sin(angle + shift), 0.018, 0.012)] = 600
        for nodule_z, cy, cx, radius_mm in nodules:
            rest = radius_mm**2 - (z_mm[k] - nodule_z) ** 2
            if rest > 0:
                r = np.sqrt(rest) / field_mm
                hu[ellipse(cx, cy, r, r)] = 30
        hu += rng.normal(0, 12, hu.shape)
        stored[k] = np.clip(np.round(hu) + 1024, 0, 4095)
        stored[k][~ellipse(0, 0, 0.5, 0.5)] = OUTSIDE_CIRCLE
    return stored


def thorax_volume(shape: tuple[int, int, int], spacing_mm: Vector3) -> StoredVolume:
    """Return a `thorax` as a stacked axial series in memory; its slices declare no padding."""
    stored = thorax(shape, spacing_mm)
    affine = np.diag([*spacing_mm[::-1], 1.0])[:, [2, 1, 0, 3]]  # columns: a step of slice, row and column
    slope, intercept = np.ones(shape[0]), np.full(shape[0], -1024.0)
    return StoredVolume(stored, slope, intercept, None, Geometry(shape, affine), HuStatistics())


def _breadth(k: int, slices: int) -> float:
    """Return the relative breadth of the lungs in a slice; they are narrow at apex and base."""
    return float(0.75 + 0.25 * np.sin(np.pi * (k + 0.5) / slices))


def outlines(
    shape: tuple[int, int, int], spacing_mm: Vector3, origin_mm: Vector3 = (-100.0, -120.0, -300.0)
) -> dict[str, list[NDArray[np.float64]]]:
    """Return the outlines of heart and spine of a `thorax`, slice by slice.

    Parameters
    ----------
    shape : tuple of int
        Number of slices, rows and columns.
    spacing_mm, origin_mm : tuple of float
        Spacing and origin of `write_series`, for axial slices.

    Returns
    -------
    dict of str to list of array of float64, shape (n, 3)
        Points as (x, y, z), in millimetres, LPS.
    """
    slices, rows, columns = shape
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found: dict[str, list[NDArray[np.float64]]] = {}
    for name, (*centre, rx, ry), grows in (("heart", HEART, True), ("spine", SPINE, False)):
        found[name] = []
        for k in range(slices):
            half = np.array([rx, ry * (_breadth(k, slices) if grows else 1)])
            column_row = (np.array(centre) + half * circle) * (columns, rows) + (np.array([columns, rows]) - 1) / 2
            offset_mm = np.column_stack([column_row * spacing_mm[:0:-1], np.full(len(circle), k * spacing_mm[0])])
            found[name].append(offset_mm + origin_mm)
    return found


def write_series(
    folder: Path,
    stored: NDArray[Any],
    spacing_mm: Vector3,
    *,
    series_uid: str | None = None,
    series_number: int = 1,
    origin_mm: Vector3 = (-100.0, -120.0, -300.0),
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    change: Callable[[Dataset, int], None] | None = None,
) -> list[Path]:
    """Write a series as explicit little-endian CT images; return the files in spatial order.

    Parameters
    ----------
    folder : Path
        Output folder, made if absent.
    stored : array of int16 or uint16, shape (k, j, i)
        Stored values; HU = stored − 1024.
    spacing_mm : tuple of float
        Spacing of slices, rows and columns.
    series_uid, series_number
        *Series Instance UID* (a new one if absent) and *Series Number*. Calls with one UID write one study.
    origin_mm : tuple of float
        Centre of the first voxel, (x, y, z), LPS.
    orientation : tuple of float
        Direction cosines of a row, then of a column.
    change : callable, optional
        Called with the data set and index of each slice before it is written; may modify the data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series_uid = series_uid or generate_uid()
    study_uid = generate_uid(entropy_srcs=["study of", series_uid])  # the same study for each part of a series
    frame_uid = generate_uid()
    normal = np.cross(orientation[:3], orientation[3:])
    files = []
    for k, pixels in enumerate(stored):
        ds = _slice(pixels)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study_uid, series_uid, frame_uid
        ds.SeriesNumber, ds.InstanceNumber = series_number, len(stored) - k  # from the head down, as most scanners do
        ds.ImagePositionPatient = [_decimal(v) for v in np.array(origin_mm) + normal * spacing_mm[0] * k]
        ds.ImageOrientationPatient = [_decimal(v) for v in orientation]
        ds.PixelSpacing = [_decimal(v) for v in spacing_mm[1:]]
        ds.SliceThickness = _decimal(spacing_mm[0])
        if change is not None:
            change(ds, k)
        file = folder / f"S{series_number}-{len(stored) - k:04d}.dcm"
        ds.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def _slice(pixels: NDArray[Any]) -> Dataset:
    """Return one CT image without position and attributes of its series."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Phantom^Thorax", "PHANTOM", "19000101"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    if ds.PixelRepresentation:
        ds.add_new("PixelPaddingValue", "SS", OUTSIDE_CIRCLE)
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    return ds


def _decimal(value: float) -> str:
    """Return a number as a DICOM decimal string: at most 16 characters."""
    return next(text for digits in range(15, 0, -1) if len(text := f"{value:.{digits}g}") <= 16)
