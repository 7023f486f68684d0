"""Words and numbers of headers that are written in another way than DICOM asks: the same facts, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset

import gpuprep
from gpuprep.errors import IntensityError
from gpuprep.phantom import write_series
from gpuprep.series import Series

SPACING_MM = (2.5, 0.8, 0.7)
STORED = np.random.default_rng(0).integers(0, 3000, (4, 12, 14)).astype(np.int16)


def found(folder: Path) -> Series:
    (series,) = gpuprep.discover(folder)
    return series


# Rescale Type


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("US", "US"),
        ("HU_MOD", "HU_MOD"),
        ("Z_EFF", "Z_EFF"),
        ("PCT", "PCT"),
        ("DENSITY", "DENSITY"),
        ("HUMAN", "HUMAN"),
        ("Hounsfield Ward", "another"),
        ("Hunt^Hugh", "another"),
        ("HUANG LI", "another"),
        ("Hughes", "another"),
        ("A" * 17, "another"),
    ],
)
def test_another_unit_is_refused_and_shown_where_it_is_a_code(tmp_path: Path, word: str, shown: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.RescaleType = word

    write_series(tmp_path, STORED, SPACING_MM, change=change)
    with pytest.raises(IntensityError) as caught:
        gpuprep.read(found(tmp_path))
    assert caught.value.code == "rescale-type"
    assert str(caught.value).startswith(f"Rescale Type not HU ({shown}) in ")
    assert shown == word or word not in str(caught.value)
