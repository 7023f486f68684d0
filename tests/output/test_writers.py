"""Written volumes have the computed values and positions for common readers: nibabel, SimpleITK, NumPy, Zarr."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from conftest import axial
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_convert_masks import LEFT, LEFT_BOX, RIGHT, RIGHT_BOX, Ct, rtstruct
from test_tiff import some_values

import gpuprep
from gpuprep import Masks
from gpuprep.core import recipe as recipes
from gpuprep.core.geometry import Geometry
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.errors import RecipeError
from gpuprep.executors.processes import InProcessExecutor
from gpuprep.output.folder_store import remove_output
from gpuprep.output.own_files import is_own
from gpuprep.output.verify import verify
from gpuprep.output.writers import WRITERS, gzipping, nifti, omezarr
from gpuprep.output.writers.content import Content, ignore_finished_file

nibabel = pytest.importorskip("nibabel")

SHAPE = (5, 6, 7)
RAW = Recipe(spacing_mm=None, size=None)
STORED = {"float32": (1, 0), "int16": (1, 0), "uint8": (1400 / 255, -1000), "uint16": (1400 / 65535, -1000)}
"""HU per unit and HU of value 0 in the header, by type, for the window −1000 to 400 HU; float32 and int16 have none."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotated(angles: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return a rotation about x, then y, then z."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        one = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one[a, a] = one[b, b] = np.cos(angle)
        one[b, a], one[a, b] = np.sin(angle), -np.sin(angle)
        turn = one @ turn
    return turn


def on(grid: Geometry, recipe: Recipe, values: NDArray[Any], path: Path) -> Path:
    """Write an image on a grid, in two chunks, check the CRC-32 of finished files, and return the file."""
    file = path / f"volume{recipe.ending}"
    chunks = iter([values[:1], values[1:]])
    finished: dict[str, int | None] = {}

    def finish(file: str | os.PathLike[str], crc32: int | None = None) -> None:
        finished[os.fspath(file)] = crc32

    assert WRITERS[recipe.format](file, chunks, Content.image(make_plan(grid, recipe)), finish) == ()
    for name, crc32 in finished.items():
        assert crc32 in (None, zlib.crc32(Path(name).read_bytes()))
    if recipe.compression == "none" and recipe.format in ("nifti", "npy"):
        assert None not in finished.values()  # it would be read again
    return file


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("compression", ["none", "zlib"])
def test_nibabel_and_simpleitk_read_nifti(tmp_path: Path, dtype: Any, compression: Any) -> None:
    values = some_values(dtype)
    recipe = replace(RAW, dtype=dtype, format="nifti", compression=compression)
    file = on(axial(SHAPE, (2.5, 0.75, 0.5)), recipe, values, tmp_path)
    assert file.name == {"none": "volume.nii", "zlib": "volume.nii.gz"}[compression]
    slope, intercept = STORED[dtype]
    image = nibabel.load(file)
    assert image.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(image.dataobj.get_unscaled()).transpose(), values)
    hu = values.astype(np.float64) * slope + intercept
    np.testing.assert_allclose(image.get_fdata().transpose(), hu, rtol=1e-6, atol=1e-4)
    read = SimpleITK.ReadImage(str(file))
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(read), hu, rtol=1e-6, atol=1e-4)


def test_nifti_has_the_affine_in_ras(tmp_path: Path) -> None:
    # By hand: axial slices at 2.5 mm from z = −300 upwards, rows of 0.75 mm to the back from y = −120, columns of
    # 0.5 mm to the left from x = −100, all LPS; in RAS x and y change their signs.
    file = on(axial(SHAPE, (2.5, 0.75, 0.5)), replace(RAW, format="nifti"), some_values("float32"), tmp_path)
    header = nibabel.load(file).header
    ras: NDArray[np.float64] = np.array([[-0.5, 0, 0, 100], [0, -0.75, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1]])
    np.testing.assert_allclose(header.get_sform(), ras)
    np.testing.assert_allclose(header.get_qform(), ras, atol=1e-5)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert header.get_intent()[0] == "none"
    assert header.get_data_shape() == (7, 6, 5)
    read = SimpleITK.ReadImage(str(file))
    assert read.GetOrigin() == (-100, -120, -300)
    assert read.GetSpacing() == (0.5, 0.75, 2.5)
    assert read.GetDirection() == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0, 1))


angle = st.floats(-3.1, 3.1)
place_mm = st.floats(-500, 500)
step_mm = st.floats(0.2, 5)


@settings(max_examples=30)
@given(st.tuples(angle, angle, angle), st.tuples(step_mm, step_mm, step_mm), st.tuples(place_mm, place_mm, place_mm))
def test_simpleitk_and_nibabel_place_oblique_voxels_correctly(
    tmp_path_factory: pytest.TempPathFactory, angles: Any, steps: Any, origin: Any
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotated(angles)[:, ::-1] * np.array(steps)
    affine[:3, 3] = origin
    grid = Geometry((2, 3, 4), affine)
    file = on(grid, replace(RAW, format="nifti"), some_values("float32", grid.shape), tmp_path_factory.mktemp("n"))
    index = np.array([1, 2, 3, 1])  # (k, j, i)
    expected = (affine @ index)[:3]
    read = SimpleITK.ReadImage(str(file))
    assert read.TransformIndexToPhysicalPoint([3, 2, 1]) == pytest.approx(tuple(expected), abs=1e-3)
    image = nibabel.load(file)
    np.testing.assert_allclose((LPS_TO_RAS @ image.affine @ [3, 2, 1, 1])[:3], expected, atol=1e-3)
    np.testing.assert_allclose(image.header.get_zooms(), steps[::-1], rtol=1e-5)
    # nibabel sets the first part of a quaternion to 0 if its square is under 3.6e-7: it is then off by 1.2e-3 radians.
    off_mm = 1e-3 + 1.2e-3 * float(np.linalg.norm(expected - np.array(origin)))
    np.testing.assert_allclose((LPS_TO_RAS @ image.header.get_qform() @ [3, 2, 1, 1])[:3], expected, atol=off_mm)


@pytest.mark.parametrize("turned_rad", [1e-4, 5e-4, 1e-3, 1.1e-3, 2e-3])
def test_a_slightly_turned_patient_has_a_quaternion_and_no_warning(tmp_path: Path, turned_rad: float) -> None:
    # About the axis of the scanner. RAS is LPS turned by 180° about it, where nibabel rounds such turns away.
    c, s = np.cos(turned_rad), np.sin(turned_rad)
    affine = np.array([[0, -0.7 * s, 0.7 * c, -180], [0, 0.7 * c, 0.7 * s, -180], [2, 0, 0, -300], [0, 0, 0, 1.0]])
    grid = Geometry((2, 512, 512), affine)
    content = Content.image(make_plan(grid, replace(RAW, format="nifti")))
    file = tmp_path / "volume.nii"
    values = np.zeros(grid.shape, np.float32)
    assert WRITERS["nifti"](file, iter([values]), content, ignore_finished_file) == ()
    header = nibabel.load(file).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    # nifti1.h: a = √(1 − b² − c² − d²); the turn in LPS is the distance from 180°. float32 holds it to 5e-4 radians.
    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    assert 2 * np.arctan2(a, abs(d)) == pytest.approx(turned_rad, abs=5e-4)
    corner = affine @ [1, 511, 511, 1]
    place = SimpleITK.ReadImage(str(file)).TransformIndexToPhysicalPoint([511, 511, 1])
    assert place == pytest.approx(tuple(corner[:3]), abs=1e-3)


@given(st.tuples(angle, angle, angle), st.tuples(step_mm, step_mm, step_mm), st.floats(0, 0.5))
def test_sform_and_pixdim_have_the_same_voxel_sizes(angles: Any, steps: Any, lean: float) -> None:
    # MONAI drops an sform whose column lengths differ from pixdim by 1e-5.
    affine = np.eye(4)
    affine[:3, :3] = rotated(angles)[:, ::-1] @ [[1, 0, 0], [lean, 1, 0], [0, 0, 1]] * steps
    header = nifti._header(Content.image(make_plan(Geometry(SHAPE, affine), replace(RAW, format="nifti"))))
    lengths = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
    np.testing.assert_allclose(lengths, header["pixdim"][1:4], rtol=5e-7)


@settings(max_examples=30)
@given(st.tuples(angle, angle, angle), st.floats(0.01, 0.5), st.sampled_from([-1, 1]))
def test_nibabel_places_sheared_voxels_correctly(
    tmp_path_factory: pytest.TempPathFactory, angles: Any, lean: float, sign: int
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotated(angles) @ [[0, 0, 0.7], [sign * lean * 2, 0.7, 0], [2, 0, 0]]
    grid = Geometry((20, 3, 4), affine)
    file = tmp_path_factory.mktemp("n") / "volume.nii"
    content = Content.image(make_plan(grid, replace(RAW, format="nifti")))
    (warning,) = WRITERS["nifti"](file, iter([some_values("float32", grid.shape)]), content, ignore_finished_file)
    assert "slices lean" in warning
    assert int(nibabel.load(file).header["qform_code"]) == 0  # a quaternion cannot describe shear
    expected = (affine @ [1, 2, 3, 1])[:3]
    np.testing.assert_allclose((LPS_TO_RAS @ nibabel.load(file).affine @ [3, 2, 1, 1])[:3], expected, atol=1e-3)


@pytest.mark.parametrize("lean_mm", [0, 0.01, 0.08])
def test_slices_that_lean_by_less_than_a_tenth_of_a_millimetre_open_in_simpleitk(
    tmp_path: Path, lean_mm: float
) -> None:
    # ITK refuses axes that are perpendicular to three digits only, unless a quaternion nearly agrees with them.
    affine = axial((6, 3, 4), (1, 0.5, 0.5)).affine + np.zeros((4, 4))
    affine[0, 0] = lean_mm / 5  # from the first slice to the last one
    values = some_values("float32", (6, 3, 4))
    file = on(Geometry((6, 3, 4), affine), replace(RAW, format="nifti"), values, tmp_path)
    place = SimpleITK.ReadImage(str(file)).TransformIndexToPhysicalPoint([3, 2, 5])
    assert place == pytest.approx(tuple((affine @ [5, 2, 3, 1])[:3]), abs=0.1)
    np.testing.assert_allclose((LPS_TO_RAS @ nibabel.load(file).affine @ [3, 2, 5, 1])[:3], (affine @ [5, 2, 3, 1])[:3])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 70), max_size=12), st.integers(1, 3))
def test_blocks_deflated_in_parallel_are_one_gzip_member(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], threads: int
) -> None:
    rng = np.random.default_rng(len(sizes))
    parts = [rng.integers(0, 4, size, dtype=np.uint8).tobytes() for size in sizes]
    file = tmp_path_factory.mktemp("gzip") / "parts.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzipping, "BLOCK_BYTES", 32)
        patch.setattr(gzipping, "MOST_THREADS", threads)
        with gzipping.gzipped(file) as append:
            for part in parts:
                append(memoryview(part))
    assert gzip.decompress(file.read_bytes()) == b"".join(parts)
    member = zlib.decompressobj(31)
    member.decompress(file.read_bytes())
    assert (member.eof, member.unused_data) == (True, b"")  # a single member


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_zarr_reads_the_written_values(tmp_path: Path, dtype: Any, compression: Any) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    shape = (40, 6, 131)
    values = some_values(dtype, shape)
    recipe = replace(RAW, dtype=dtype, format="zarr", compression=compression)
    file = on(axial(shape, (2.5, 0.75, 0.5)), recipe, values, tmp_path)
    array = zarr.open_array(file / "0", mode="r", zarr_format=3)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    np.testing.assert_array_equal(array[:], values)
    # 40 slices in two of 20, 131 columns in three of 44; a file holds all chunks of its slices.
    assert (array.chunks, array.shards) == ((20, 6, 44), (20, 6, 132))
    files = sorted(f.relative_to(file).as_posix() for f in file.rglob("*") if f.is_file())
    assert files == ["0/c/0/0/0", "0/c/1/0/0", "0/zarr.json", "zarr.json"]
    codec = json.loads((file / "0" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    expected = {"none": [], "zlib": ["gzip"], "zstd": ["blosc"]}[compression]
    assert [c["name"] for c in codec] == ["bytes", *expected]


def test_zarr_has_the_metadata_of_ome_zarr(tmp_path: Path) -> None:
    # OME-Zarr 0.5, "multiscales": two to five axes, spatial axes last and with units; scale, then translation; the
    # dimension names of the array equal the names of the axes.
    zarr = pytest.importorskip("zarr", minversion="3")
    file = on(axial(SHAPE, (2.5, 0.75, 0.5)), replace(RAW, format="zarr"), some_values("float32"), tmp_path)
    group = zarr.open_group(file, mode="r", zarr_format=3)
    assert group.attrs["ome"] == {
        "version": "0.5",
        "multiscales": [
            {
                "name": "volume",
                "axes": [
                    {
                        "name": name,
                        "type": "space",
                        "unit": "millimeter",
                        "orientation": {"type": "anatomical", "value": direction},
                    }
                    for name, direction in (
                        ("z", "inferior-to-superior"),
                        ("y", "anterior-to-posterior"),
                        ("x", "right-to-left"),
                    )
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [2.5, 0.75, 0.5]},
                            {"type": "translation", "translation": [-300, -120, -100]},
                        ],
                    }
                ],
            }
        ],
    }
    assert group["0"].metadata.dimension_names == ("z", "y", "x")
    own = group.attrs["gpuprep"]
    assert own["affine_lps"] == [[0, 0, 0.5, -100], [0, 0.75, 0, -120], [2.5, 0, 0, -300], [0, 0, 0, 1]]
    assert (own["hu_slope"], own["hu_intercept"]) == (1400, -1000)


DIRECTIONS = {
    "right-to-left": (1, 0, 0), "left-to-right": (-1, 0, 0), "anterior-to-posterior": (0, 1, 0),
    "posterior-to-anterior": (0, -1, 0), "inferior-to-superior": (0, 0, 1), "superior-to-inferior": (0, 0, -1),
}  # fmt: skip
"""Unit vectors in LPS by the terms of RFC-4."""


def placed_by_readers(file: Path) -> NDArray[np.float64]:
    """Return the affine, (k, j, i) to LPS, of OME-Zarr metadata: orientation times scale, and translation."""
    ((scales, dataset),) = (
        (m["axes"], m["datasets"][0]["coordinateTransformations"])
        for m in json.loads((file / "zarr.json").read_text())["attributes"]["ome"]["multiscales"]
    )
    affine = np.eye(4)
    for n, axis in enumerate(scales):
        assert axis["orientation"]["type"] == "anatomical"
        affine[:3, n] = np.array(DIRECTIONS[axis["orientation"]["value"]]) * dataset[0]["scale"][n]
        affine["xyz".index(axis["name"]), 3] = dataset[1]["translation"][n]
    return affine


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_zarr_has_direction_and_origin_of_every_axis_aligned_volume(
    tmp_path: Path, order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * np.array(signs) * (2.0, 0.75, 0.5)
    affine[:3, 3] = -10, 20, 30
    file = on(Geometry(SHAPE, affine), replace(RAW, format="zarr"), some_values("float32"), tmp_path)
    np.testing.assert_allclose(placed_by_readers(file), affine, atol=1e-12)


def test_zarr_has_the_nearest_directions_of_oblique_axes_and_a_warning(tmp_path: Path) -> None:
    # 20° about x: slices ascend and go slightly anterior, rows go posterior and slightly up.
    affine = np.eye(4)
    affine[:3, :3] = rotated((np.deg2rad(20), 0, 0))[:, ::-1] * (2.0, 0.75, 0.5)
    plan = make_plan(Geometry(SHAPE, affine), replace(RAW, format="zarr"))
    file = tmp_path / "volume.ome.zarr"
    (note,) = WRITERS["zarr"](file, iter([some_values("float32")]), Content.image(plan), ignore_finished_file)
    assert note.startswith("axes are up to 20° off those of the patient")
    straight = np.diag([1.0, 1, 1, 1])
    straight[:3, :3] = np.eye(3)[:, ::-1] * (2.0, 0.75, 0.5)
    np.testing.assert_allclose(placed_by_readers(file), straight, atol=1e-12)
    own = json.loads((file / "zarr.json").read_text())["attributes"]["gpuprep"]
    np.testing.assert_allclose(own["affine_lps"], affine, atol=1e-12)


def test_the_warning_about_an_oblique_zarr_is_given_once(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1", orientation=(1, 0, 0, 0, 0.8, 0.6))
    (series,) = gpuprep.discover(ct.folder)
    corners = [(2, 4, 4), (2, 4, 9), (2, 9, 9), (2, 9, 4)]
    masks = rtstruct(tmp_path / "rs.dcm", ct, a=[gpuprep.read(series).geometry.points_mm(corners)])
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", replace(RAW, format="zarr"), masks=masks, backend="cpu")
    assert [w.split(",")[0] for w in run.results[0].warnings] == ["axes are up to 36.9° off those of the patient"]


def test_zarr_marks_labels_as_image_label(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1, 2, 3] = 2
    content = Content.labels(make_plan(axial(SHAPE, (2.5, 0.75, 0.5)), replace(RAW, format="zarr")), "uint8", 2)
    WRITERS["zarr"](tmp_path / "labels.ome.zarr", iter([labels]), content, ignore_finished_file)
    attributes = json.loads((tmp_path / "labels.ome.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["ome"]["image-label"] == {}  # all its fields are optional
    assert attributes["ome"]["multiscales"][0]["name"] == "labels"
    assert set(attributes["gpuprep"]) == {"affine_lps"}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([2**25, 5000]))
@settings(max_examples=15)
def test_zarr_accepts_chunks_of_any_thickness(
    tmp_path_factory: pytest.TempPathFactory, thick: list[int], shard_bytes: int
) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    values = some_values("uint16", (sum(thick), 10, 50))
    file = tmp_path_factory.mktemp("zarr") / "volume.ome.zarr"
    content = Content.image(make_plan(axial(values.shape, (1, 1, 1)), replace(RAW, dtype="uint16", format="zarr")))
    settled: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omezarr, "SHARD_BYTES", shard_bytes)
        WRITERS["zarr"](
            file, iter(np.split(values, np.cumsum(thick)[:-1])), content, lambda file, _=None: settled.append(file)
        )
    array = zarr.open_array(file / "0", mode="r")
    np.testing.assert_array_equal(array[:], values)
    assert array.chunks[0] * 1000 <= shard_bytes
    assert sorted(settled) == sorted(f for f in (file / "0" / "c").rglob("*") if f.is_file())
    assert len(settled) == -(-len(values) // array.chunks[0])


@pytest.mark.parametrize("dtype", STORED)
def test_npy_can_be_memory_mapped(tmp_path: Path, dtype: Any) -> None:
    values = some_values(dtype)
    file = on(axial(SHAPE, (2.5, 0.75, 0.5)), replace(RAW, dtype=dtype, format="npy"), values, tmp_path)
    read = np.load(file, mmap_mode="r")
    assert isinstance(read, np.memmap)
    assert (read.dtype, read.flags.c_contiguous) == (values.dtype, True)
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize(
    ("format_", "compression", "choose"),
    [("nifti", "zstd", "none or zlib"), ("npy", "zlib", "none"), ("npy", "zstd", "none")],
)
def test_unsupported_combinations_of_format_and_compression_are_refused(
    format_: Any, compression: Any, choose: str
) -> None:
    with pytest.raises(RecipeError, match=f"choose compression = {choose},"):
        Recipe(format=format_, compression=compression)


def test_a_missing_or_old_package_is_named_before_anything_is_read(
    tmp_path: Path, small_series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(package: str) -> str:
        if package == "zarr":
            return "2.18.3"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(recipes, "version", old)
    for recipe, words in (
        (Recipe(format="zarr"), r"needs zarr 3 or later, and there is 2\.18\.3: pip install 'gpuprep\[zarr\]'"),
        (Recipe(format="nifti"), r"needs nibabel 5 or later, and there is none: pip install 'gpuprep\[nifti\]'"),
    ):
        with pytest.raises(RecipeError, match=words):
            gpuprep.convert(small_series, tmp_path / "out", recipe, backend="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("volume.nii.gz", True),
        ("labels.nii", True),
        ("masks/left lung.npy", True),
        ("volume.nii.zst", False),
        ("volume.ome.zarr/zarr.json", True),
        ("masks/heart.ome.zarr/0/zarr.json", True),
        ("labels.ome.zarr/0/c/10/0/0", True),
        ("volume.ome.zarr/labels/zarr.json", True),
        ("volume.ome.zarr/labels/left lung/zarr.json", True),
        ("volume.ome.zarr/labels/left lung/0/c/10/0/0", True),
        ("volume.ome.zarr/labels/left lung/notes.txt", False),
        ("labels.ome.zarr/labels/zarr.json", False),
        ("volume.ome.zarr/0/c/10/0", False),
        ("volume.ome.zarr/1/zarr.json", False),
        ("notes.ome.zarr/zarr.json", False),
        ("volume.ome.zarr/0/c/0/0/0/notes.txt", False),
    ],
)
def test_own_file_names_are_recognised(name: str, own: bool) -> None:
    assert is_own(name) is own


def read_back(file: Path) -> NDArray[Any]:
    """Return the stored values of a volume, read by another library."""
    if file.name.endswith((".nii", ".nii.gz")):
        stored: NDArray[Any] = np.asarray(nibabel.load(file).dataobj.get_unscaled()).transpose()
        return stored
    if file.suffix == ".npy":
        return np.asarray(np.load(file))
    if file.suffix == ".tif":
        return tifffile.imread(file)
    return np.asarray(pytest.importorskip("zarr", minversion="3").open_array(file / "0", mode="r")[:])


EVERY = [
    ("tif-stack", "zstd"),
    ("nifti", "none"),
    ("nifti", "zlib"),
    ("npy", "none"),
    ("zarr", "none"),
    ("zarr", "zstd"),
]
ENDINGS = {"tif-stack": ".tif", "npy": ".npy", "zarr": ".ome.zarr"}


@pytest.mark.parametrize(("format_", "compression"), EVERY)
def test_a_series_and_its_labels_are_written_as_computed(tmp_path: Path, format_: Any, compression: Any) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    masks = rtstruct(tmp_path / "rs.dcm", ct)
    recipe = Recipe(spacing_mm=(1.5, 1, 1), size=(20, 24), dtype="uint16", format=format_, compression=compression)
    out = tmp_path / "out"
    run = gpuprep.convert(tmp_path / "dicom", out, recipe, masks=masks, backend="cpu")
    assert run.counts == {"ok": 1}
    folder = out / run.results[0].folder
    ending = ENDINGS.get(format_, ".nii" if compression == "none" else ".nii.gz")
    labels_name = "volume.ome.zarr/labels/labels" if format_ == "zarr" else f"labels{ending}"
    beside = [] if format_ == "zarr" else [labels_name]
    assert sorted(f.name for f in folder.iterdir()) == [*beside, "preview.jpg", "volume.json", f"volume{ending}"]
    volume = gpuprep.process(gpuprep.read(gpuprep.discover(ct.folder)[0]), recipe, backend="cpu")
    np.testing.assert_array_equal(read_back(folder / f"volume{ending}"), np.asarray(volume.values))
    # Six slices of 2 mm become eight of 1.5 mm, whose centres lie at source index 0.75 k − 0.125; rounded:
    nearest = [0, 1, 1, 2, 3, 4, 4, 5]
    np.testing.assert_array_equal(read_back(folder / labels_name), (LEFT_BOX + 2 * RIGHT_BOX)[nearest])
    if format_ == "nifti":
        image, labels = (nibabel.load(folder / f"{name}{ending}") for name in ("volume", "labels"))
        np.testing.assert_allclose(LPS_TO_RAS @ image.affine, volume.affine[:, [2, 1, 0, 3]], atol=1e-4)
        np.testing.assert_array_equal(labels.affine, image.affine)
        assert set(np.unique(labels.get_fdata())) == {0, 1, 2}  # not scaled
    sidecar = json.loads((folder / "volume.json").read_text())
    assert {label["file"] for label in sidecar["labels"]} == {labels_name}
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert set(sidecar["outputs"]) == files - {"volume.json"}
    assert list(verify(out, InProcessExecutor(), lambda: None)) == []
    assert gpuprep.convert(tmp_path / "dicom", out, recipe, masks=masks, backend="cpu").counts == {"skipped": 1}


@pytest.mark.parametrize(("format_", "compression"), EVERY)
def test_each_structure_can_have_a_separate_volume_in_every_format(
    tmp_path: Path, format_: Any, compression: Any
) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    names = {"left/lung": LEFT, "RIGHT": RIGHT, "right": LEFT, "zarr.json": RIGHT}
    masks = rtstruct(tmp_path / "rs.dcm", ct, **names)
    recipe = replace(RAW, format=format_, compression=compression, masks=Masks(layout="per-roi"))
    out = tmp_path / "out"
    run = gpuprep.convert(tmp_path / "dicom", out, recipe, masks=masks, backend="cpu")
    (result,) = run.results
    assert result.labels is not None
    ending = ENDINGS.get(format_, ".nii" if compression == "none" else ".nii.gz")
    files = [label["file"] for label in result.labels]
    plain = ["left%2Flung", "RIGHT", "right~2", "zarr.json~2"]
    if format_ == "zarr":
        assert files == [f"volume.ome.zarr/labels/{name}" for name in plain]
        group = json.loads((out / result.folder / "volume.ome.zarr" / "labels" / "zarr.json").read_text())
        assert group["attributes"] == {"ome": {"version": "0.5", "labels": plain}}  # by OME-Zarr 0.5, "labels"
        one = json.loads((out / result.folder / files[0] / "zarr.json").read_text())
        assert one["attributes"]["ome"]["image-label"] == {"source": {"image": "../../"}}
    else:
        assert files == [f"masks/{name}{ending}" for name in plain]
    for file, expected in zip(files, (LEFT_BOX, RIGHT_BOX, LEFT_BOX, RIGHT_BOX), strict=True):
        np.testing.assert_array_equal(read_back(out / result.folder / file), expected)
    assert list(verify(out, InProcessExecutor(), lambda: None)) == []
    remove_output(out / result.folder, result.key)
    assert not (out / result.folder).exists()


def test_an_output_in_another_format_replaces_the_former_one(tmp_path: Path, small_series: Path) -> None:
    pytest.importorskip("zarr", minversion="3")
    for format_, name in (("zarr", "volume.ome.zarr"), ("nifti", "volume.nii"), ("zarr", "volume.ome.zarr")):
        recipe = Recipe.from_dict({"format": format_, "size": 16})
        run = gpuprep.convert(small_series, tmp_path / "out", recipe, backend="cpu")
        folder = tmp_path / "out" / run.results[0].folder
        assert sorted(f.name for f in folder.iterdir()) == ["preview.jpg", "volume.json", name]
    shard = folder / name / "0" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / name / "0" / "notes.txt").write_text("mine")
    found = {(f.kind, f.path) for f in verify(tmp_path / "out", InProcessExecutor(), lambda: None)}
    here = f"{run.results[0].folder}/{name}/0"
    assert found == {("torn", f"{here}/c/0/0/0"), ("stray", f"{here}/notes.txt")}
    remove_output(folder, run.results[0].key)  # keeps foreign files
    assert [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()] == [f"{name}/0/notes.txt"]


@pytest.mark.parametrize("orient", ["native", "LPS"])
def test_a_real_series_has_the_voxel_positions_that_simpleitk_reads_from_dicom(
    tmp_path: Path, data: Path, orient: Any
) -> None:
    folder = str(data / "ibsi2-digital" / "orientation")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    expected = reader.Execute()
    recipe = replace(RAW, window_hu=None, dtype="int16", format="nifti", compression="zlib", orient=orient)
    run = gpuprep.convert(folder, tmp_path / "out", recipe, backend="cpu")
    read = SimpleITK.ReadImage(str(tmp_path / "out" / run.results[0].folder / "volume.nii.gz"))
    assert read.GetSize() == expected.GetSize()
    for index in ((0, 0, 0), (31, 0, 0), (0, 47, 0), (0, 0, 63), (5, 6, 7)):
        place = expected.TransformIndexToPhysicalPoint(index)
        assert read.TransformIndexToPhysicalPoint(index) == pytest.approx(place, abs=1e-4)
        assert read[index] == expected[index]
    assert np.array_equal(SimpleITK.GetArrayFromImage(read), SimpleITK.GetArrayFromImage(expected))


def test_a_folder_in_a_store_is_replaced_with_all_of_its_chunks(memory: Any, small_series: Path) -> None:
    pytest.importorskip("zarr", minversion="3")
    url = "memory://bucket/out"
    run = gpuprep.convert(small_series, url, Recipe(size=(16, 16), format="zarr"), backend="cpu")
    place = f"/bucket/out/{run.results[0].folder}"
    names = [f.removeprefix(f"{place}/") for f in memory.find(place)]
    assert names == [
        "preview.jpg",
        "volume.json",
        *(f"volume.ome.zarr/{n}" for n in ("0/c/0/0/0", "0/zarr.json", "zarr.json")),
    ]
    again = gpuprep.convert(small_series, url, Recipe(size=(16, 16), format="npy"), backend="cpu")
    assert again.counts == {"ok": 1}
    assert [f.removeprefix(f"{place}/") for f in memory.find(place)] == ["preview.jpg", "volume.json", "volume.npy"]
    assert list(verify(url, InProcessExecutor(), lambda: None)) == []
