"""Series, labels and DICOM SEG for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

import gpuprep
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.stack import Stack
from gpuprep.errors import GpuprepError
from gpuprep.masks.structure_codes import coded
from gpuprep.output.dicom_seg import Kind, SegOptions, write_seg
from gpuprep.testing import write_series

SHAPE, SPACING_MM, ORIGIN_MM = (8, 20, 24), (3.0, 2.0, 1.5), (-100.25, -120.5, -300.75)
NAMES = {1: "lung_left", 2: "liver", 5: "my structure"}
MADE = datetime(2024, 2, 3, 4, 5, 6)
KINDS: tuple[Kind, ...] = ("binary", "labelmap")
LANDMARK = (5, 3, 4)
"""Slice, row and column of a voxel of its own."""


def tilted(ds: Dataset, k: int) -> None:
    x, y, z = map(float, ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y + 0.7 * k, z]


def uneven(ds: Dataset, k: int) -> None:
    x, y, z = map(float, ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y, z + (0.8 if k > 4 else 0)]


def lost(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [*ORIGIN_MM[:2], ORIGIN_MM[2] + 3 * (k + (k > 4))]


CASES: dict[str, dict[str, Any]] = {
    "axial": {},
    "sagittal": {"orientation": (0, 1, 0, 0, 0, -1)},
    "coronal": {"orientation": (1, 0, 0, 0, 0, -1)},
    "prone": {"orientation": (-1, 0, 0, 0, -1, 0)},
    "feet first": {"orientation": (-1, 0, 0, 0, 1, 0)},
    "oblique": {"orientation": (0.6, 0.8, 0, -0.64, 0.48, 0.6)},
    "tilted": {"change": tilted},
    "uneven": {"change": uneven},
    "lost": {"change": lost},
}


def written(folder: Path, **how: Any) -> tuple[list[Path], Stack]:
    """Write a series, and return its files in spatial order with its stack."""
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.int16)
    files = write_series(folder, stored, SPACING_MM, origin_mm=ORIGIN_MM, **how)
    (series,) = gpuprep.discover(folder)
    return files, gpuprep.stack(series, gpuprep.Rules(max_missing_share=0.2))


def labels(dtype: Any = np.uint8) -> NDArray[Any]:
    """Return labels of three structures; the landmark is one of its own."""
    values = np.zeros(SHAPE, dtype)
    values[2:4, 3:6, 4:9] = 1
    values[6:, 10:, 10:23] = 2
    values[3, 0, 0] = 2
    values[LANDMARK] = 5
    return values


def masks(values: NDArray[Any], names: Mapping[int, str] = NAMES) -> dict[str, NDArray[np.bool_]]:
    return {name: values == label for label, name in names.items()}


def write(
    to: Path,
    values: NDArray[Any],
    headers: tuple[SliceHeader, ...],
    names: Mapping[int, str] = NAMES,
    **options: Any,
) -> tuple[str, ...]:
    codes = {name: coded(name) for name in names.values()}
    return write_seg(values, names, headers, codes, to, SegOptions(made=MADE, **options))


def fails(error: type[GpuprepError], expected: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
