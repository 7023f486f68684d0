"""Tests of `gpuprep.dicom.hu_range`: counts of HU above CT numbers or outside the output type, and rejections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from gpuprep import Recipe
from gpuprep.dicom.discover import discover
from gpuprep.dicom.hu_range import HuRangeCheck
from gpuprep.dicom.read import SeriesReader
from gpuprep.errors import IntensityError
from gpuprep.testing import write_series

INT16 = Recipe(window_hu=None, size=None, dtype="int16", policy="keep")


def warned_counts(check: HuRangeCheck) -> list[int]:
    """Return the counts of voxels in the warnings."""
    return [int(w.text.split("voxel")[0].split()[-1]) for w in check.warnings]


SLICES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 65535), min_size=4, max_size=4), st.sampled_from([1.0, 0.5, -1.0, 2.0]),
        st.sampled_from([-1024.0, 0.0, 1000.0]), st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 999)),
    ),
    max_size=6,
)  # fmt: skip


@given(SLICES, st.sampled_from(["air", "keep"]))
def test_voxels_out_of_range_are_counted_once_without_padding(slices: Any, padding: Any) -> None:
    check = HuRangeCheck(
        Recipe(window_hu=None, size=None, dtype="int16", policy="keep", padding=padding), 4 * len(slices)
    )
    above_limit = clipped = 0
    for stored, slope, intercept, declared in slices:
        span = None if declared is None else (declared[0], declared[0] + declared[1])
        values = np.array(stored, dtype=np.int32).reshape(2, 2)
        pair = None if span is None else np.array(span)
        check.add("a.dcm", values, (int(values.min()), int(values.max())), slope, intercept, pair)
        for value in stored:
            hu = value * slope + intercept
            is_padding = span is not None and span[0] <= value <= span[1]
            above_limit += hu > 30000 and not is_padding
            # Under "air", padding and everything below −1024 HU becomes −1000 HU, which int16 holds.
            becomes_air = padding == "air" and (is_padding or hu < -1024)
            clipped += not -32768 <= hu <= 32767 and not becomes_air
    assert warned_counts(check) == [n for n in (above_limit, clipped) if n]


@pytest.mark.parametrize(
    ("window_hu", "dtype", "clipped"),
    [
        (None, "int16", True),
        (None, "float32", False),
        ((-1000.0, 400.0), "int16", False),
        ((-1000.0, 32767.0), "int16", False),
        ((-1000.0, 50000.0), "int16", True),
        ((-1000.0, 50000.0), "uint16", False),
        ((-1000.0, 400.0), "uint8", False),
    ],
)
def test_values_outside_the_window_are_not_counted_as_clipped_by_the_type(
    window_hu: Any, dtype: Any, clipped: bool
) -> None:
    check = HuRangeCheck(Recipe(window_hu=window_hu, dtype=dtype), 1000)
    check.add("a.dcm", np.array([[0, 40000]]), (0, 40000), 1.0, 0.0, None)
    assert [("clipped to the range" in w.text) for w in check.warnings] == [False, True][: 1 + clipped]


def read_all(reader: SeriesReader, backwards: bool) -> None:
    for k in range(6)[:: -1 if backwards else 1]:
        reader.slab(k, k + 1)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize(("padding_fraction", "accepted"), [(0.0, 28), (0.5, 14)])
def test_up_to_one_percent_of_the_voxels_may_be_above_ct_numbers(
    tmp_path: Path, padding_fraction: float, accepted: int, loops: bool
) -> None:
    # Of 6 × 20 × 24 = 2880 voxels, 28 are less than 1 %, 29 are more. Padding is excluded.
    stored = np.random.default_rng(0).integers(0, 3000, (6, 20, 24)).astype(np.uint16)
    stored[:, : int(20 * padding_fraction)] = 65535

    def change(ds: Dataset, _: int) -> None:
        ds.PixelPaddingValue = 65535

    def reader(folder: Path, metal: int) -> SeriesReader:
        stored[0, 10:].reshape(-1)[:metal] = 60000
        write_series(tmp_path / folder, stored, (2.5, 0.8, 0.7), change=change)
        (series,) = discover(tmp_path / folder)
        return SeriesReader(series, Recipe(), loops=loops)

    few = reader(Path("few"), accepted)
    few.slab(0, 6)
    (warning,) = [w for w in few.warnings if w.code == "hu-range"]
    assert warning.text.startswith(
        f"HU of {accepted} voxels are above 30000, the upper limit of CT numbers: up to 58976 in "
    )
    # Read backwards, the metal comes last: the result is the same.
    for backwards in (False, True):
        many = reader(Path(f"many-{backwards}"), accepted + 1)
        with pytest.raises(IntensityError, match="more than 1% of the voxels are above 30000 HU") as caught:
            read_all(many, backwards)
        assert caught.value.code == "hu-range"
