"""Boxes of finished outputs are read as they were computed, in every format; damaged files raise clear errors."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_convert_masks import LEFT_BOX, RIGHT_BOX, Ct, rtstruct

import gpuprep
from gpuprep import Masks
from gpuprep.core.geometry import Geometry
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import ENDINGS, Recipe
from gpuprep.errors import OutputError, RequestError
from gpuprep.output.read_volume import Box, FinishedOutput, full_box
from gpuprep.output.writers import WRITERS
from gpuprep.output.writers.content import Content, ignore_finished_file

nibabel = pytest.importorskip("nibabel")

RAW = Recipe(spacing_mm=None, size=None)
KINDS = [(format_, compression) for format_, endings in ENDINGS.items() for compression in endings]


class Opened:
    """A converted phantom with two structures: its output, and its volume in memory."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        ct = Ct(root / "dicom" / "patient-1")
        run = gpuprep.convert(root / "dicom", root / "out", recipe, masks=rtstruct(root / "rs.dcm", ct), backend="cpu")
        assert run.counts == {"ok": 1}, run.results[0].reason
        self.finished = FinishedOutput(root / "out" / run.results[0].folder)
        self.volume = gpuprep.load(ct.folder, recipe, backend="cpu")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    format_, compression = request.param
    return Opened(tmp_path_factory.mktemp("opening"), replace(RAW, format=format_, compression=compression))


def test_a_whole_volume_is_read_as_it_was_computed(opened: Opened) -> None:
    finished = opened.finished
    image = finished.image()
    np.testing.assert_array_equal(image, opened.volume.values)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(finished.geometry.affine, opened.volume.affine)
    assert finished.hu == (opened.volume.hu_slope, opened.volume.hu_intercept)
    assert finished.values == {"left": 1, "right": 2}
    (file,) = set(finished.files.values())
    np.testing.assert_array_equal(finished.mask(file), LEFT_BOX + 2 * RIGHT_BOX)


@settings(max_examples=20)
@given(data=st.data())
def test_a_box_is_read_as_the_same_part_of_the_volume(opened: Opened, data: st.DataObject) -> None:
    box = data.draw(boxes(opened.volume.shape))
    np.testing.assert_array_equal(opened.finished.image(box), np.asarray(opened.volume)[box])


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, int, int]) -> Box:
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    k, j, i = (slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))
    return k, j, i


def test_a_pickled_output_reads_the_same_values(opened: Opened) -> None:
    box = (slice(1, 3), slice(2, 4), slice(0, 5))
    expected = opened.finished.image(box)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened.finished)).image(box), expected)  # noqa: S301


def test_arrays_are_copies_of_the_file(opened: Opened) -> None:
    image = opened.finished.image()
    assert image.base is None
    assert image.flags.owndata
    assert image.flags.c_contiguous


@pytest.mark.parametrize("format_", ENDINGS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_integers_come_back_as_they_are_stored(tmp_path: Path, format_: Any, dtype: Any) -> None:
    opened = Opened(tmp_path, replace(RAW, format=format_, dtype=dtype))
    image = opened.finished.image()
    assert image.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(image, opened.volume.values)


@pytest.mark.parametrize("values", [2, 8])
def test_labels_that_were_saved_again_with_nibabel_are_read_as_integers(tmp_path: Path, values: int) -> None:
    # The file keeps its size, so only the header differs. Eight labels become 0.988, 2.004, 2.992 …
    nibabel = pytest.importorskip("nibabel")
    finished = Opened(tmp_path, replace(RAW, format="nifti")).finished
    file = finished.folder / "labels.nii"
    size = file.stat().st_size
    image = nibabel.load(file)
    edited = image.get_fdata()
    edited[:values, 0, 0] = np.arange(values)
    nibabel.save(nibabel.Nifti1Image(edited, image.affine, image.header), file)
    read = nibabel.load(file)
    assert file.stat().st_size == size
    assert (read.get_fdata() != edited).any()
    labels = finished.mask("labels.nii")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, edited.transpose())
    box = (slice(0, 1), slice(0, 1), slice(1, values))
    np.testing.assert_array_equal(finished.mask("labels.nii", box)[0, 0], range(1, values))


@pytest.mark.parametrize(("format_", "compression"), KINDS)
def test_structures_in_separate_volumes_are_read(tmp_path: Path, format_: Any, compression: Any) -> None:
    recipe = replace(RAW, format=format_, compression=compression, masks=Masks(layout="per-roi"))
    finished = Opened(tmp_path, recipe).finished
    assert set(finished.files) == {"left", "right"}
    box = (slice(1, 4), slice(4, 9), slice(6, 14))
    for name, expected in {"left": LEFT_BOX, "right": RIGHT_BOX}.items():
        np.testing.assert_array_equal(finished.mask(finished.files[name], box), expected[box])


def files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("volume.json", "zarr.json")
    )


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def shortened(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(("format_", "compression"), KINDS)
@pytest.mark.parametrize("damage", [emptied, halved, shortened, Path.unlink])
def test_a_damaged_volume_raises_a_one_line_error(tmp_path: Path, format_: Any, compression: Any, damage: Any) -> None:
    finished = Opened(tmp_path, replace(RAW, format=format_, compression=compression)).finished
    for file in files(finished.folder):
        damage(file)
    with pytest.raises(OutputError, match=r"patient-1.* cannot be read \(.*: see gpuprep verify$"):
        finished.image()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shape": 3}', '{"recipe": {"format": "jpeg"}}', "[" * 100_000])
def test_a_damaged_sidecar_raises_a_one_line_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "volume.json").write_text(content)
    with pytest.raises(OutputError, match=r"see gpuprep verify$"):
        FinishedOutput(tmp_path).image()
    with pytest.raises(OutputError, match=r"see gpuprep verify$"):
        FinishedOutput(tmp_path).geometry  # noqa: B018


def test_a_folder_without_sidecar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is no finished output .*No such file.*see gpuprep verify$"):
        FinishedOutput(tmp_path).image()


@pytest.mark.parametrize(("format_", "library"), [("nifti", "nibabel.nifti1"), ("zarr", "zarr")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: Any, library: str
) -> None:
    finished = Opened(tmp_path, replace(RAW, format=format_)).finished
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RequestError, match=rf"pip install 'gpuprep\[{format_}\]'$"):
        finished.image()


def bytes_read(read: Any) -> int:
    """Return how many bytes this process reads from files during a call, as counted by the system."""

    def now() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    read()  # the first call also imports modules
    before = now()
    counting = now() - before
    read()
    return now() - before - 2 * counting


def test_reading_a_patch_of_zarr_reads_a_small_part_of_its_bytes(tmp_path: Path) -> None:
    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not say what a process reads")
    shape = (160, 512, 512)
    recipe = Recipe(spacing_mm=None, size=None, format="zarr", dtype="uint8")
    values: NDArray[np.uint8] = np.random.default_rng(0).integers(1, 255, shape, np.uint8)
    content = Content.image(make_plan(Geometry(shape, np.eye(4)), recipe))
    WRITERS["zarr"](tmp_path / "volume.ome.zarr", iter(np.array_split(values, 8)), content, ignore_finished_file)
    (tmp_path / "volume.json").write_text(
        json.dumps({"shape": shape, "affine_lps": np.eye(4).tolist(), "recipe": recipe.to_dict(), "outputs": {}})
    )
    box = (slice(40, 104), slice(200, 264), slice(300, 364))
    finished = FinishedOutput(tmp_path)
    np.testing.assert_array_equal(finished.image(box), values[box])
    whole_bytes = bytes_read(lambda: finished.image(full_box(shape)))
    assert whole_bytes >= values.nbytes  # so reads are counted
    # The patch lies in 12 chunks of 131,072 bytes, which is 4 %. They are in 3 of 5 shards, which is 60 %. Zarr also
    # reads the gap between two chunks if that costs less than another request: 13 % with Zarr 3.4.
    assert values[box].nbytes < bytes_read(lambda: finished.image(box)) < 0.2 * values.nbytes


def in_memory(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    size = path.stat().st_size
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        held = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        there = np.frombuffer(memory, np.uint8)
        assert ctypes.CDLL(None).mincore(*map(ctypes.c_void_p, (there.ctypes.data, size, held.ctypes.data))) == 0
        del there
    return int(np.count_nonzero(held & 1)) * mmap.PAGESIZE


def forget(path: Path) -> None:
    """Remove a file from the page cache."""
    with open(path, "r+b") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path):
        pytest.skip("the file system keeps everything in memory")


PATCH = (slice(100, 164), slice(200, 264), slice(300, 364))


def sparse_npy(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    return np.lib.format.open_memmap(path, "w+", np.dtype(np.float32), shape)


def sparse_tif(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    return np.asarray(tifffile.memmap(path, shape=shape, dtype="<f4"))


def sparse_nii(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape[::-1])
    header.set_data_dtype("<f4")
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(header.binaryblock + bytes(4))
    os.truncate(path, 352 + 4 * int(np.prod(shape)))
    return np.memmap(path, "<f4", "r+", 352, shape)


@pytest.fixture
def disk() -> Iterator[Path]:
    """Yield a folder of the system's place for temporary files, even if --basetemp names a file system in memory."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page cache by mincore of Linux")
@pytest.mark.parametrize(("format_", "make"), [("npy", sparse_npy), ("tif-stack", sparse_tif), ("nifti", sparse_nii)])
def test_reading_a_patch_of_a_mapped_file_reads_a_small_part_of_its_bytes(
    disk: Path, format_: Any, make: Callable[[Path, tuple[int, int, int]], NDArray[Any]]
) -> None:
    shape = (324, 512, 512)
    recipe = Recipe(spacing_mm=None, size=None, format=format_)
    path = disk / f"volume{recipe.ending}"
    values = make(path, shape)  # 340 MB, but a sparse file
    expected = np.random.default_rng(0).random((64, 64, 64), np.float32)
    values[PATCH] = expected
    del values
    outputs = {path.name: {"bytes": path.stat().st_size}}
    (disk / "volume.json").write_text(
        json.dumps({"shape": shape, "affine_lps": np.eye(4).tolist(), "recipe": recipe.to_dict(), "outputs": outputs})
    )
    forget(path)
    found = FinishedOutput(disk).image(PATCH)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.dtype("=f4")
    assert expected.nbytes < in_memory(path) < 0.1 * path.stat().st_size
