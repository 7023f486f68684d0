"""HU histogram, its metrics and flags; the preview picture of a volume."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from conftest import axial
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gpuprep
from gpuprep.compute.hu_histogram import FLAGS, Histogram, flags, sampled
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.discover import discover
from gpuprep.dicom.read import SeriesReader
from gpuprep.output.checksums import checksum
from gpuprep.output.preview import COLOURS, GAP, HEIGHT, WIDTH, MiddlePlanes, draw_preview, encode_jpeg
from gpuprep.output.records import SeriesResult
from gpuprep.testing import write_series

QUALITY: dict[str, Any] = {"air_peak_hu": -1000, "tissue_peak_hu": 50, "clipped_share": 0.01}
UNREMARKABLE = SeriesResult(
    key="1.2", series_uid="1.2", study_uid="1", series_number=1, source="/data/p", status="ok", slices=100,
    source_spacing_mm=(2.5, 0.7, 0.7), padding_share=0.2, quality=QUALITY,
)  # fmt: skip


def histogram(hu: dict[int, int], window_hu: tuple[float, float] | None = None) -> Histogram:
    """Return a histogram from numbers of voxels by HU; stored values are HU + 1024."""
    counted = Histogram(window_hu)
    counted.add(np.repeat(np.array([v + 1024 for v in hu], dtype=np.int16), list(hu.values())), 1.0, -1024.0)
    return counted


def triangle(top: int, width: int = 20) -> dict[int, int]:
    """Return numbers of voxels by HU that form a triangular peak at `top`."""
    return {top + d: 10 * (width - abs(d)) for d in range(-width + 1, width)}


def test_stored_values_are_counted_as_hu_by_the_rescale_of_their_slice() -> None:
    counted = Histogram()
    # 2 · v − 1024: −1000, 0, 40 and 50 HU; then another slice with v − 1000: 0, 50 HU.
    counted.add(np.array([[12, 512], [532, 537]], dtype=np.uint16), 2.0, -1024.0)
    counted.add(np.array([1000, 1050], dtype=np.uint16), 1.0, -1000.0)
    counts = {int(n) - 1024: int(counted.counts[n]) for n in np.flatnonzero(counted.counts)}
    assert counts == {-1000: 1, 0: 2, 40: 1, 50: 2}
    found = counted.to_dict()
    assert found is not None
    assert found["voxels"] == 6
    assert found["bands"] == pytest.approx(
        {"air": 1 / 6, "lung": 0, "fat": 0, "water": 2 / 6, "blood": 1 / 6, "muscle": 3 / 6, "liver": 2 / 6, "bone": 0},
        abs=1e-5,
    )
    assert found["below_share"] is found["above_share"] is found["clipped_share"] is None


def test_declared_and_undeclared_padding_is_not_counted() -> None:
    counted = Histogram()
    stored = np.array([-2000, -1025, -1024, 40, 41, 5000], dtype=np.int16)
    counted.add(stored, 1.0, 0.0, np.array([40, 40], dtype=np.int16))
    assert {int(n) - 1024 for n in np.flatnonzero(counted.counts)} == {-1024, 41, 3071}  # 5000 is in the highest bin
    assert counted.voxels == 3
    empty = Histogram((-1000, 400))
    empty.add(np.array([-3000], dtype=np.int16), 1.0, 0.0)
    assert empty.to_dict() is None


def test_clipped_shares_count_voxels_outside_the_window() -> None:
    # Of 100 voxels, 20 are air below the window, 10 lie on its limits, 60 inside, 8 above; 2 at −900 HU are below it,
    # but not air.
    found = histogram({-1000: 20, -500: 5, 100: 5, 0: 60, 101: 8, -900: 2}, (-500, 100)).to_dict()
    assert found is not None
    assert (found["below_share"], found["above_share"]) == (0.22, 0.08)
    assert found["clipped_share"] == 10 / 80


def test_peaks_are_at_the_hu_with_most_voxels() -> None:
    counted = histogram(triangle(-993) | triangle(47) | triangle(-105) | {-1024: 9000, 0: 1})
    assert (counted.peak_hu(-1100, -925), counted.peak_hu(-60, 200)) == (-993, 47)


@pytest.mark.parametrize(
    "hu", [triangle(-100), {-1024: 5000}, triangle(700), triangle(-60, 30) | {150: 3, 152: 3}, {700: 100_000, 50: 5}]
)
def test_a_slope_a_few_voxels_or_a_peak_outside_the_range_give_no_peak(hu: dict[int, int]) -> None:
    counted = histogram(hu)
    assert counted.peak_hu(-50, 200) is None
    assert counted.peak_hu(-1100, -925) is None


def test_a_stored_histogram_has_narrow_bins_in_the_range_of_soft_tissue() -> None:
    found = histogram({-1000: 1, -993: 1, 0: 2, 7: 1, 8: 1, 330: 1, 1024: 1, 3000: 2}).to_dict()
    assert found is not None
    parts = found["histogram"]["parts"]
    # 52 bins of 16 HU from −1024, 64 of 8 HU from −192, 22 of 32 HU from 320, 16 of 128 HU from 1024 to 3072.
    assert found["histogram"]["steps"] == [[-1024, 16], [-192, 8], [320, 32], [1024, 128], [3072, 0]]
    assert len(parts) == 52 + 64 + 22 + 16
    assert {n: v for n, v in enumerate(parts) if v} == {
        1: 20_000, 52 + 24: 30_000, 52 + 25: 10_000, 116: 10_000, 138: 10_000, 153: 20_000,
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


SLICES = st.lists(
    st.tuples(
        st.lists(st.integers(-3000, 4000), min_size=1, max_size=30), st.sampled_from([0.5, 1.0, 2.0]),
        st.sampled_from([-1024.0, -1000.0, 0.0]), st.none() | st.tuples(st.integers(-50, 50), st.integers(0, 50)),
    ),
    max_size=12,
)  # fmt: skip


@given(SLICES, st.sampled_from([np.int16, np.int32]))
def test_counts_of_random_slices_equal_a_voxel_by_voxel_count(
    slices: list[tuple[list[int], float, float, tuple[int, int] | None]], dtype: Any
) -> None:
    counted = Histogram((-200, 300))
    expected: Counter[int] = Counter()
    outside = [0, 0]
    for values, slope, intercept, padding in slices:
        declared = None if padding is None else (padding[0], padding[0] + padding[1])
        counted.add(np.array(values, dtype=dtype), slope, intercept, None if declared is None else np.array(declared))
        for v in values:
            hu = v * slope + intercept
            if hu < -1024 or (declared is not None and declared[0] <= v <= declared[1]):
                continue
            expected[min(3071, max(-1024, round(hu)))] += 1
            outside[0] += hu < -200
            outside[1] += hu > 300
    assert {int(n) - 1024: int(counted.counts[n]) for n in np.flatnonzero(counted.counts)} == dict(expected)
    found = counted.to_dict()
    if found is not None:
        shares = found["below_share"], found["above_share"]
        assert shares == tuple(pytest.approx(n / expected.total(), abs=1e-5) for n in outside)


def test_a_large_slice_is_sampled_in_every_nth_row_and_column() -> None:
    values = np.arange(512 * 700).reshape(512, 700)
    assert sampled(values).tolist() == values[::4, ::5].tolist()
    assert sampled(values[:127, :255]).tolist() == values[:127, :255].tolist()


def test_a_reader_counts_sampled_voxels_of_the_slices_it_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    stored = rng.integers(0, 2000, (4, 256, 300)).astype(np.int16)
    write_series(tmp_path / "ct", stored, (2.0, 1.0, 1.0))
    (series,) = discover(tmp_path)
    for loops in (False, True):
        reader = SeriesReader(series, Recipe(), loops=loops)
        reader.slab(0, 3)
        reader.slab(3, 4)
        assert reader.histogram.counts.tolist() == np.bincount(stored[:, ::2, ::2].ravel(), minlength=4096).tolist()


def test_undeclared_fill_around_the_circle_is_not_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    stored = rng.integers(900, 1100, (3, 64, 64)).astype(np.int16)
    y, x = np.ogrid[:64, :64]
    outside = (y - 31.5) ** 2 + (x - 31.5) ** 2 > 32**2
    stored[:, outside] = 1500
    write_series(tmp_path / "ct", stored, (2.0, 1.0, 1.0))
    (series,) = discover(tmp_path)
    reader = SeriesReader(series, Recipe())
    reader.slab(0, 3)
    assert [i.code for i in reader.irregularities] == ["padding"]
    assert reader.histogram.counts.tolist() == np.bincount(stored[:, ~outside].ravel(), minlength=4096).tolist()


@pytest.mark.parametrize(
    ("code", "changed", "text"),
    [
        ("air-peak", {"quality": QUALITY | {"air_peak_hu": -976}}, "air peaks at −976 HU instead of −1000"),
        ("tissue-peak", {"quality": QUALITY | {"tissue_peak_hu": 140}}, "soft tissue peaks at 140 HU"),
        ("tissue-peak", {"quality": QUALITY | {"tissue_peak_hu": None}}, "nothing peaks between −60 and 200 HU"),
        ("slice-spacing", {"source_spacing_mm": (10.0, 0.7, 0.7)}, "slices are 10 mm apart"),
        ("slice-spacing", {"source_spacing_mm": (0.1, 0.7, 0.7)}, "slices are 0.1 mm apart"),
        ("pixel-spacing", {"source_spacing_mm": (2.5, 1.75, 1.75)}, "pixels are 1.75 × 1.75 mm"),
        ("pixel-spacing", {"source_spacing_mm": (2.5, 0.7, 0.8)}, "pixels are 0.7 × 0.8 mm"),
        ("padding-share", {"padding_share": 0.5}, "50% of the voxels are padding"),
        ("few-slices", {"slices": 1}, "only 1 slice"),
        ("clipped", {"quality": QUALITY | {"clipped_share": 0.25}}, "the window clips 25% of what is not air"),
    ],
)
def test_a_metric_outside_its_thresholds_is_flagged(code: str, changed: dict[str, Any], text: str) -> None:
    assert flags(UNREMARKABLE) == []
    assert flags(replace(UNREMARKABLE, **changed)) == [(code, text)]
    assert code in FLAGS


def test_missing_metrics_raise_no_flags() -> None:
    older = replace(UNREMARKABLE, quality=None, padding_share=None, source_spacing_mm=None)
    assert flags(older) == []
    assert flags(replace(UNREMARKABLE, quality=QUALITY | {"air_peak_hu": None})) == []  # no air in the field of view


# Preview picture


def planes(values: NDArray[Any]) -> MiddlePlanes:
    """Return the middle planes of a volume that is passed in chunks of different sizes."""
    counted = MiddlePlanes((len(values), values.shape[1], values.shape[2]))
    passed = list(counted.collecting(iter([values[:1], values[1:4], values[4:]])))
    assert np.array_equal(np.concatenate(passed), values)
    return counted


def test_middle_planes_are_collected_from_passing_chunks() -> None:
    values = np.arange(7 * 6 * 5, dtype=np.float32).reshape(7, 6, 5)
    across, along_rows, along_columns = planes(values).values
    assert across.tolist() == values[3].tolist()
    assert along_rows.tolist() == values[:, 3].tolist()
    assert along_columns.tolist() == values[:, :, 2].tolist()
    large = np.random.default_rng(1).random((2, 600, 1024))
    across, along_rows, along_columns = planes(np.repeat(large, 3, axis=0)).values
    assert across.tolist() == large[1, ::2, ::4].tolist()
    assert along_rows.shape == (6, 256)
    assert along_columns.shape == (6, 300)


def test_planes_are_side_by_side_in_true_proportions() -> None:
    # 64 slices of 2 mm, 128 rows of 1 mm, 64 columns of 1 mm: 128 × 128 × 64 mm.
    values = np.zeros((64, 128, 64), dtype=np.float32)
    values[:, :64] = 400.0  # the front half
    values[63] = 800.0  # the topmost slice, beyond white
    shown = draw_preview(planes(values), axial((64, 128, 64), (2.0, 1.0, 1.0)), -400.0, 400.0)
    assert shown.shape == (HEIGHT, 64 + GAP + 64 + GAP + 128, 3)
    across, front, side = shown[:, :64], shown[:, 68:132], shown[:, 136:]
    assert np.unique(across[:64]).tolist() == [255]
    assert np.unique(across[64:]).tolist() == [128]  # 0 HU is the middle of the range: 127.5, rounded to even
    assert np.unique(front[:2]).tolist() == [255]  # the topmost slice is on top
    assert np.unique(front[2:]).tolist() == [128]
    assert np.unique(side[2:, :64]).tolist() == [255]
    assert np.unique(side[2:, 64:]).tolist() == [128]
    assert np.unique(shown[:, 64:68]).tolist() == [0]


def test_planes_of_a_flat_volume_are_limited_in_width() -> None:
    shown = draw_preview(planes(np.ones((8, 100, 100))), axial((8, 100, 100), (5.0, 4.0, 4.0)), 0.0, 1.0)
    # 40 × 400 × 400 mm: one plane of 128 × 128 pixels and two of 160 × 16 pixels, centred vertically.
    assert shown.shape == (HEIGHT, HEIGHT + GAP + WIDTH + GAP + WIDTH, 3)
    lit = np.flatnonzero(shown[:, 140, 0])
    assert (lit[0], lit[-1]) == (56, 71)


def test_each_structure_is_outlined_in_its_own_colour() -> None:
    grid = axial((128, 128, 128), (1.0, 1.0, 1.0))
    one, other = (np.zeros((128, 128, 128), dtype=np.uint8) for _ in range(2))
    one[50:80, 40:90, 60:70] = 1
    one[50:80, 10:20, 60:70] = 2
    other[60:70, 100:110, 60:70] = 1  # label 1 of the second volume has the second colour
    shown = draw_preview(None, grid, 0.0, 1.0, [planes(one), planes(other)])
    across = shown[:, :128]
    expected = np.zeros((128, 128, 3), dtype=np.uint8)
    for top, bottom, colour in ((40, 90, 0), (10, 20, 1), (100, 110, 1)):
        expected[top:bottom, 60:70] = COLOURS[colour]
        expected[top + 1 : bottom - 1, 61:69] = 0
    assert np.array_equal(across, expected)
    front = shown[:, 132:260]  # row 64, the highest slice on top
    assert front[128 - 80, 65].tolist() == list(COLOURS[0])
    assert not front[128 - 79, 65].any()


def test_a_picture_survives_jpeg() -> None:
    y, x = np.mgrid[:128, :200]
    pixels = np.stack([y, x, 255 - y], axis=2).astype(np.uint8)
    data = encode_jpeg(pixels)
    assert data[:3] == b"\xff\xd8\xff"
    assert np.abs(imagecodecs.jpeg8_decode(data).astype(int) - pixels).max() < 16


# Pipeline


@pytest.mark.parametrize("format_", ["tif", "tif-stack"])
def test_metrics_and_picture_are_part_of_an_output(
    small_series: Path, tmp_path: Path, noise: Callable[..., NDArray[np.int16]], format_: Any
) -> None:
    out = tmp_path / "out"
    recipe = Recipe(spacing_mm=None, size=None, format=format_)
    (result,) = gpuprep.convert(small_series, out, recipe, backend="cpu").results
    hu = noise((6, 20, 24)).astype(int) - 1024
    assert result.quality is not None
    assert result.quality["voxels"] == hu.size
    assert result.quality["above_share"] == pytest.approx((hu > 400).mean(), abs=1e-5)
    assert result.quality["bands"]["bone"] == pytest.approx((hu >= 250).mean(), abs=1e-5)

    folder = out / result.folder
    sidecar = json.loads((folder / "volume.json").read_text())
    assert sidecar["source"]["quality"] == result.quality
    preview = folder / "preview.jpg"
    assert sidecar["outputs"]["preview.jpg"] == {"bytes": preview.stat().st_size, "crc32": checksum(preview)}
    # 15 × 16 × 16.8 mm. In the first plane 16 mm are 128 pixels and 16.8 mm are 134. In the others 15 mm are 128
    # pixels, so 16.8 mm are 143 and 16 mm are 137.
    shown = imagecodecs.jpeg8_decode(preview.read_bytes())
    assert shown.shape == (128, 134 + GAP + 143 + GAP + 137, 3)
    expected = np.clip((hu[3] + 1000) / 1400, 0, 1) * 255
    seen = shown[3::6, :134][:, [round((2 * i + 1) * 134 / 48) for i in range(24)]][:20, :, 0]
    assert np.corrcoef(seen.ravel(), expected[[(6 * n + 3) * 20 // 128 for n in range(20)]].ravel())[0, 1] > 0.9


def test_metrics_survive_the_loss_of_the_manifest(small_series: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (first,) = gpuprep.convert(small_series, out, Recipe(size=(8, 8)), backend="cpu").results
    (out / "manifest.sqlite").unlink()
    (again,) = gpuprep.convert(small_series, out, Recipe(size=(8, 8)), backend="cpu").results
    assert again.quality == first.quality is not None
    assert again.read_s == 0  # the output was recognised, not converted again


def test_a_manifest_without_a_column_for_metrics_can_be_continued(small_series: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gpuprep.convert(small_series, out, Recipe(size=(8, 8)), backend="cpu")
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as old:
        old.execute("ALTER TABLE series DROP COLUMN quality")
    run = gpuprep.convert(small_series, out, Recipe(size=(8, 8)), backend="cpu")
    assert run.counts == {"skipped": 1}
    assert run.results[0].quality is None
