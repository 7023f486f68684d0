"""`load`: one series to a volume in memory, which other array libraries use without a copy."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import gpuprep
from gpuprep.errors import GeometryError, RequestError
from gpuprep.testing import write_series

RECIPE = gpuprep.Recipe(size=(30, 30))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(2):
        stored = np.random.default_rng(n).integers(0, 3000, (6, 20, 24)).astype(np.int16)
        write_series(tmp_path / f"p{n}", stored, (2.5, 0.8, 0.7), series_uid=f"1.2.{n}")
    return tmp_path


def test_a_volume_equals_the_output_of_a_conversion(folder: Path, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    run = gpuprep.convert(folder / "p0", tmp_path / "out", RECIPE, backend="cpu")
    written = tmp_path / "out" / run.results[0].folder
    volume = gpuprep.load(folder / "p0", RECIPE, backend="cpu")
    assert volume.shape == (15, 30, 30)  # 6 · 2.5 mm at 1 mm
    np.testing.assert_array_equal(volume, [tifffile.imread(f) for f in sorted(written.glob("*.tif"))])


def test_dlpack_shares_the_values_without_a_copy(folder: Path) -> None:
    volume = gpuprep.load(folder / "p0", RECIPE, backend="cpu")
    taken = np.from_dlpack(volume)
    assert taken.ctypes.data == volume.values.ctypes.data


@pytest.mark.usefixtures("cupy_on_host")
def test_values_stay_on_the_device(folder: Path) -> None:
    volume = gpuprep.load(folder / "p0", RECIPE, backend="gpu")
    assert type(volume.values) is import_module("cupy").ndarray
    on_cpu = gpuprep.load(folder / "p0", RECIPE, backend="cpu")
    np.testing.assert_allclose(volume.values.get(), on_cpu.values, rtol=0, atol=1e-5)


def test_one_of_several_series_is_chosen_by_uid(folder: Path) -> None:
    one = gpuprep.load(folder, RECIPE, series_uid="1.2.1", backend="cpu")
    np.testing.assert_array_equal(one, gpuprep.load(folder / "p1", RECIPE, backend="cpu"))


def test_several_series_without_a_choice_are_refused_with_their_uids(folder: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"there are 2 CT series in .*choose one by series_uid \(--series-uid\): 1\.2\.0 \(6 slices\)",
    ):
        gpuprep.load(folder, RECIPE)


def test_an_absent_series_uid_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"^there is no series 1\.2\.3 in .*, but 2 others$"):
        gpuprep.load(folder, RECIPE, series_uid="1.2.3")


def test_a_folder_without_ct_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 64)
    with pytest.raises(RequestError, match=r"^there is no CT series in .*, but 1 files that cannot be read$"):
        gpuprep.load(tmp_path)
    with pytest.raises(RequestError, match=r"absent"):
        gpuprep.load(tmp_path / "absent")


def test_a_series_that_cannot_be_stacked_raises_a_geometry_error(folder: Path) -> None:
    sorted((folder / "p0").iterdir())[3].unlink()
    with pytest.raises(GeometryError, match=r"^slices are"):
        gpuprep.load(folder / "p0", RECIPE)
