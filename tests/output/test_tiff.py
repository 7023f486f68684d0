"""TIFF files have the computed values and voxel sizes for common readers: tifffile, Pillow, ImageJ."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import axial
from numpy.typing import NDArray
from PIL import Image

import gpuprep
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.output.writers import WRITERS, tiff
from gpuprep.output.writers.content import Content, ignore_finished_file

DTYPES = ["float32", "uint8", "uint16", "int16"]
IMAGEJ = Path("/usr/share/java/ij.jar")
RAW = Recipe(spacing_mm=None, size=None)


def some_plan(recipe: Recipe, shape: tuple[int, int, int] = (5, 6, 7)) -> Plan:
    return make_plan(axial(shape, (2.5, 0.75, 0.5)), recipe)


def some_values(dtype: str, shape: tuple[int, int, int] = (5, 6, 7)) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    if dtype == "float32":
        return rng.random(shape, dtype=np.float32)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


def write(folder: Path, recipe: Recipe, values: NDArray[Any]) -> tuple[str, ...]:
    folder.mkdir()
    chunks = iter([values[:2], values[2:]])
    path = folder if recipe.format == "tif" else folder / "volume.tif"
    return WRITERS[recipe.format](path, chunks, Content.image(some_plan(recipe, values.shape)), ignore_finished_file)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("format_", ["tif", "tif-stack"])
def test_tifffile_reads_the_written_values(tmp_path: Path, dtype: Any, compression: Any, format_: Any) -> None:
    recipe = replace(RAW, dtype=dtype, compression=compression, format=format_)
    values = some_values(dtype)
    assert write(tmp_path / "out", recipe, values) == ()
    files = sorted((tmp_path / "out").iterdir())
    names = ["volume.tif"] if format_ == "tif-stack" else [f"000{k}.tif" for k in range(5)]
    assert [f.name for f in files] == names
    read = tifffile.imread(files[0]) if format_ == "tif-stack" else np.stack([tifffile.imread(f) for f in files])
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)
    expected = {"none": 1, "zlib": 8, "zstd": 50000}[compression]  # TIFF tag 259
    with tifffile.TiffFile(files[0]) as tif:
        assert tif.pages[0].compression == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", ["none", "zlib"])
def test_pillow_reads_slices(tmp_path: Path, dtype: Any, compression: Any) -> None:
    values = some_values(dtype)
    write(tmp_path / "out", replace(RAW, dtype=dtype, compression=compression), values)
    for k in range(5):
        with Image.open(tmp_path / "out" / f"000{k}.tif") as image:
            np.testing.assert_array_equal(np.asarray(image).astype(values.dtype), values[k])


def test_voxel_size_is_in_the_tags_of_a_slice(tmp_path: Path) -> None:
    # Trap 35: columns and rows are not the same; the resolution is in pixels per centimetre.
    write(tmp_path / "out", RAW, some_values("float32"))
    with Image.open(tmp_path / "out" / "0003.tif") as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
    assert tags[296] == 3  # centimetre
    assert 10 / float(tags[282]) == pytest.approx(0.5)  # XResolution: between columns
    assert 10 / float(tags[283]) == pytest.approx(0.75)
    description = json.loads(tags[270])
    assert description["spacing_mm"] == [2.5, 0.75, 0.5]
    assert (description["hu_slope"], description["hu_intercept"]) == (1400.0, -1000.0)


def test_a_stack_has_z_y_x_axes_and_a_calibration(tmp_path: Path) -> None:
    # Trap 36: slices are slices and not channels.
    write(tmp_path / "out", replace(RAW, format="tif-stack"), some_values("float32"))
    with tifffile.TiffFile(tmp_path / "out" / "volume.tif") as tif:
        assert tif.is_imagej
        assert tif.series[0].axes == "ZYX"
        metadata = tif.imagej_metadata or {}
        assert (metadata["spacing"], metadata["unit"], metadata["min"], metadata["max"]) == (2.5, "mm", 0.0, 1.0)
        x, y = (tif.pages.first.tags[t].value for t in (282, 283))
        assert (x[1] / x[0], y[1] / y[0]) == pytest.approx((0.5, 0.75))


def test_a_stack_above_four_gigabytes_is_a_bigtiff_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traps 31, 36: with a lower limit, so that the test needs no large file.
    monkeypatch.setattr(tiff, "BIGTIFF_BYTES", 100)
    values = some_values("uint16")
    warnings = write(tmp_path / "out", replace(RAW, dtype="uint16", format="tif-stack"), values)
    assert len(warnings) == 1
    assert "BigTIFF" in warnings[0]
    with tifffile.TiffFile(tmp_path / "out" / "volume.tif") as tif:
        assert tif.is_bigtiff
        np.testing.assert_array_equal(tif.asarray(), values)


def test_names_of_more_than_ten_thousand_slices_sort_in_order(tmp_path: Path) -> None:
    values = np.zeros((10001, 1, 1), dtype=np.uint8)
    write(tmp_path / "out", replace(RAW, dtype="uint8"), values)
    names = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert (names[0], names[-1]) == ("00000.tif", "10000.tif")


def imagej(macro: str, tmp_path: Path) -> list[str]:
    """Run a macro in ImageJ on a virtual screen, which it needs, and return what it printed."""
    java, screen = shutil.which("java"), shutil.which("xvfb-run")
    if java is None or screen is None or not IMAGEJ.exists():
        pytest.skip("ImageJ or a virtual screen is absent: apt-get install imagej xvfb xauth")
    script = tmp_path / "macro.ijm"
    script.write_text(macro)
    run = subprocess.run(
        [screen, "-a", java, "-jar", str(IMAGEJ), "-batch", str(script)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith("answer ")]
    assert len(lines) == 1, run.stdout + run.stderr
    return lines[0].split()[1:]


MACRO = """
open("{file}");
getVoxelSize(width, height, depth, unit);
getMinAndMax(low, high);
setSlice(3);
print("answer", nSlices, getWidth(), getHeight(), width, height, depth, unit, low, high, calibrate(getPixel(4, 2)));
"""


@pytest.mark.imagej
@pytest.mark.parametrize("compression", ["none", "zlib"])
@pytest.mark.parametrize(
    ("dtype", "window", "low", "high"),
    [
        ("float32", (-1000.0, 400.0), 0, 1),
        ("float32", None, -1000, 400),
        ("int16", (-160.0, 240.0), -160, 240),
        ("int16", None, -1000, 400),
        ("uint8", (-1000.0, 400.0), -1000, 400),  # ImageJ applies the calibration and shows HU
        ("uint16", (-160.0, 240.0), -160, 240),
    ],
)
def test_imagej_opens_a_stack_as_a_volume(
    tmp_path: Path, dtype: Any, window: Any, low: float, high: float, compression: Any
) -> None:
    recipe = replace(RAW, dtype=dtype, window_hu=window, format="tif-stack", compression=compression)
    plan = some_plan(recipe)
    values = some_values(dtype)
    write(tmp_path / "out", recipe, values)
    slices, columns, rows, width, height, depth, unit, shown_low, shown_high, value = imagej(
        MACRO.format(file=tmp_path / "out" / "volume.tif"), tmp_path
    )
    assert (int(slices), int(columns), int(rows)) == (5, 7, 6)
    assert (float(width), float(height), float(depth), unit) == (0.5, 0.75, 2.5, "mm")
    assert (float(shown_low), float(shown_high)) == pytest.approx((low, high), abs=0.01)
    calibrated = dtype in ("uint8", "uint16")
    expected = float(values[2, 2, 4]) * (plan.hu_slope if calibrated else 1) + (plan.hu_intercept if calibrated else 0)
    assert float(value) == pytest.approx(expected, abs=0.01)


@pytest.mark.imagej
def test_imagej_reads_the_pixel_size_of_a_converted_slice(tmp_path: Path, small_series: Path) -> None:
    run = gpuprep.convert(small_series, tmp_path / "out", Recipe(size=(32, 40), dtype="int16"), backend="cpu")
    file = tmp_path / "out" / run.results[0].folder / "0007.tif"
    spacing = run.results[0].spacing_mm
    assert spacing is not None
    macro = (
        'open("{file}"); getVoxelSize(w, h, d, unit); '
        'print("answer", getWidth(), getHeight(), w, h, unit, getPixel(5, 4));'
    )
    columns, rows, width, height, unit, value = imagej(macro.format(file=file), tmp_path)
    assert (columns, rows, unit) == ("40", "32", "cm")
    assert (float(width) * 10, float(height) * 10) == pytest.approx((spacing[2], spacing[1]), abs=1e-3)
    assert float(value) - 32768 == tifffile.imread(file)[4, 5]
