"""Predictions in files of other programs, written here by nibabel, SimpleITK, tifffile, NumPy and Zarr."""

from __future__ import annotations

import gzip
import os
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
import zarr
from numpy.typing import NDArray

from gpuprep.core.geometry import Geometry
from gpuprep.errors import PredictionError, RequestError
from gpuprep.output.read_prediction import read_prediction

SHAPE = (4, 5, 6)
VALUES = np.random.default_rng(0).integers(0, 7, SHAPE).astype(np.uint8)
_TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = _TURN * (2.5, 0.7, 0.9), (-120.5, 33.25, -411)
GRID = Geometry(SHAPE, AFFINE)
RAS_AFFINE = np.diag([-1, -1, 1, 1]) @ AFFINE[:, [2, 1, 0, 3]]
"""Affine of the same grid for nibabel: from (i, j, k) to RAS."""


def saved(file: Path, values: NDArray[Any], affine: Any = RAS_AFFINE, **codes: int) -> Path:
    """Save values of shape (…, k, j, i) by nibabel."""
    image = nibabel.Nifti1Image(values.T, affine)
    for name, code in codes.items():
        image.header[name] = code
    nibabel.save(image, file)
    return file


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
def test_nifti_of_nibabel_and_simpleitk_is_read_as_slices_rows_columns(tmp_path: Path, ending: str) -> None:
    if ending.islower():
        found = read_prediction(saved(tmp_path / f"nibabel{ending}", VALUES), GRID)
        np.testing.assert_array_equal(found, VALUES)
    image = SimpleITK.GetImageFromArray(VALUES)
    image.SetSpacing((0.9, 0.7, 2.5))
    image.SetOrigin(AFFINE[:3, 3].tolist())
    image.SetDirection(_TURN[:, ::-1].ravel().tolist())
    file = tmp_path / f"itk{ending.lower()}"
    SimpleITK.WriteImage(image, file)
    np.testing.assert_array_equal(read_prediction(file.rename(tmp_path / f"ITK{ending}"), GRID), VALUES)


@pytest.mark.parametrize("flips", list(product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("axes", list(permutations(range(3))), ids=str)
def test_a_file_with_permuted_and_reversed_axes_is_turned(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    image = nibabel.Nifti1Image(VALUES.T, RAS_AFFINE)
    turned = image.as_reoriented(np.array([[a, -1 if flip else 1] for a, flip in zip(axes, flips, strict=True)]))
    file = tmp_path / "turned.nii"
    nibabel.save(turned, file)
    np.testing.assert_array_equal(read_prediction(file, GRID), VALUES)
    classes = np.stack([v == VALUES for v in range(7)]).astype(np.float32)
    image = nibabel.Nifti1Image(classes.T, RAS_AFFINE)
    nibabel.save(image.as_reoriented(np.array([[a, -1 if f else 1] for a, f in zip(axes, flips, strict=True)])), file)
    np.testing.assert_array_equal(read_prediction(file, GRID), classes)


def test_a_file_that_does_not_tell_where_it_lies_has_the_axes_of_the_output(tmp_path: Path) -> None:
    files = [
        saved(tmp_path / "codes.nii", VALUES, sform_code=0, qform_code=0),
        saved(tmp_path / "identity.nii", VALUES, np.eye(4)),
        saved(tmp_path / "none.nii", VALUES, None),
    ]
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VALUES), tmp_path / "itk.nii.gz")
    for file in (*files, tmp_path / "itk.nii.gz"):
        np.testing.assert_array_equal(read_prediction(file, GRID), VALUES)


def shifted(step: int) -> NDArray[np.float64]:
    affine = RAS_AFFINE.copy()
    affine[:3, 3] += RAS_AFFINE[:3, step]
    return affine


WRONG = {
    "next slice": shifted(2),
    "next column": shifted(0),
    "double": RAS_AFFINE @ np.diag([2, 2, 2, 1]),
    "sides exchanged": np.diag([-1, 1, 1, 1]) @ RAS_AFFINE,
    "spacing alone": np.diag([0.9, 0.7, 2.5, 1]),
    "half a voxel": (RAS_AFFINE + shifted(0)) / 2,
}


@pytest.mark.parametrize("affine", WRONG.values(), ids=WRONG)
def test_a_file_that_lies_elsewhere_is_refused_with_both_affines(tmp_path: Path, affine: NDArray[np.float64]) -> None:
    file = saved(tmp_path / "elsewhere.nii", VALUES, affine, qform_code=0, sform_code=1)
    with pytest.raises(PredictionError) as caught:
        read_prediction(file, GRID)
    text = str(caught.value)
    assert text.startswith(f"{file} lies elsewhere than the output: it has (4, 5, 6) slices, rows and columns")
    assert "-120.5" in text
    assert "\n" not in text


def test_a_file_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"has \(4, 5, 5\) .* the output \(4, 5, 6\)"):
        read_prediction(saved(tmp_path / "cut.nii", VALUES[:, :, :5]), GRID)


def test_affines_that_float32_and_quaternions_round_are_accepted(tmp_path: Path) -> None:
    # A volume of the size of a chest, turned by nearly 180°, where a quaternion is least exact.
    turn = np.array(SimpleITK.Euler3DTransform((0, 0, 0), 0, 0, np.pi - 1e-3).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (0.7, 0.7, 1.25), (-170, -180, -900)
    grid = Geometry((3, 512, 512), (np.diag([-1, -1, 1, 1]) @ affine)[:, [2, 1, 0, 3]])
    values = np.zeros(grid.shape, np.uint8)
    values[1, 20, 400] = 1
    image = nibabel.Nifti1Image(values.T, None)
    image.set_qform(affine, 1)
    nibabel.save(image, tmp_path / "q.nii.gz")
    read: Any = nibabel.load(tmp_path / "q.nii.gz")
    assert 0.25 < np.abs((np.linalg.inv(affine) @ read.affine - np.eye(4)) @ (511, 511, 2, 1)).max() < 0.75
    np.testing.assert_array_equal(read_prediction(tmp_path / "q.nii.gz", grid), values)


def test_a_qform_counts_where_the_sform_is_the_identity(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES.T, RAS_AFFINE).as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))
    placed = np.array(image.affine)
    for sform in (np.eye(4), np.diag([-1, -1, 1, 1])):
        image.set_sform(sform, 2)
        image.set_qform(placed, 1)
        nibabel.save(image, tmp_path / "q.nii")
        np.testing.assert_array_equal(read_prediction(tmp_path / "q.nii", GRID), VALUES)


def test_labels_that_nibabel_scaled_to_integers_are_labels_again(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES.T.astype(np.float64), RAS_AFFINE)
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "scaled.nii")
    raw: Any = nibabel.load(tmp_path / "scaled.nii")
    assert raw.dataobj.slope != 1  # otherwise nothing was tested
    np.testing.assert_array_equal(read_prediction(tmp_path / "scaled.nii", GRID), VALUES)
    image = nibabel.Nifti1Image((VALUES.T > 3).astype(np.float64), RAS_AFFINE)
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "mask.nii")
    mask: Any = nibabel.load(tmp_path / "mask.nii")
    assert mask.get_fdata().max() > 1
    np.testing.assert_array_equal(read_prediction(tmp_path / "mask.nii", GRID), VALUES > 3)
    image = nibabel.Nifti1Image(np.linspace(0, 1, 120).reshape(6, 5, 4), RAS_AFFINE)
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "probability.nii")
    found = read_prediction(tmp_path / "probability.nii", GRID)
    np.testing.assert_allclose(found, np.linspace(0, 1, 120).reshape(6, 5, 4).T, atol=1 / 255)


def test_arrays_and_slices_are_read_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    np.savez_compressed(tmp_path / "a.npz", anything=VALUES)
    softmax = np.random.default_rng(0).random((3, *SHAPE)).astype(np.float16)
    np.savez_compressed(tmp_path / "nnunet.npz", probabilities=softmax, other=VALUES)
    tifffile.imwrite(tmp_path / "stack.tif", VALUES, photometric="minisblack")
    tifffile.imwrite(tmp_path / "stack.TIFF", VALUES, photometric="minisblack")
    group = zarr.open_group(tmp_path / "volume.ome.zarr", mode="w")
    group.create_array("0", data=VALUES)
    zarr.save_array(tmp_path / "bare.zarr", VALUES)  # type: ignore[arg-type]
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "readme.txt").write_text("no slice")
    for k, plane in enumerate(VALUES):  # 8, 9, 10, 11
        tifffile.imwrite(tmp_path / "slices" / f"pred_{k + 8}.tif", plane)
    for name in ("a.npy", "a.npz", "stack.tif", "stack.TIFF", "volume.ome.zarr", "bare.zarr", "slices"):
        np.testing.assert_array_equal(read_prediction(tmp_path / name, GRID), VALUES)
    np.testing.assert_array_equal(read_prediction(tmp_path / "nnunet.npz", GRID), softmax)


def test_a_large_array_is_not_read_at_once(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    assert isinstance(read_prediction(tmp_path / "a.npy", GRID), np.memmap)


def write_good(folder: Path) -> dict[str, Path]:
    np.save(folder / "a.npy", VALUES)
    np.savez_compressed(folder / "a.npz", probabilities=np.random.default_rng(0).random((2, *SHAPE)))
    tifffile.imwrite(folder / "a.tif", VALUES, photometric="minisblack")
    return {
        "nii": saved(folder / "a.nii", VALUES),
        "nii.gz": saved(folder / "a.nii.gz", VALUES),
        "npy": folder / "a.npy",
        "npz": folder / "a.npz",
        "tif": folder / "a.tif",
    }


@pytest.mark.parametrize("name", ["nii", "nii.gz", "npy", "npz", "tif"])
def test_every_truncated_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = write_good(tmp_path)[name]
    content, whole = file.read_bytes(), read_prediction(file, GRID)
    refused: dict[int, str] = {}
    for length in (*range(0, len(content), max(1, len(content) // 60)), len(content) - 1):
        file.write_bytes(content[:length])
        try:
            found = read_prediction(file, GRID)
        except PredictionError as exc:
            refused[length] = str(exc)
        else:  # the directories after the pixels of a TIFF stack are not needed
            np.testing.assert_array_equal(found, whole)
    assert len(refused) > 20
    assert all(text.startswith(f"{file} cannot be read") and "\n" not in text for text in refused.values())


def test_damage_that_only_the_checksum_of_a_gzip_file_tells_is_noticed(tmp_path: Path) -> None:
    grid = Geometry((40, 50, 60), AFFINE)  # larger than the buffers of readers
    file = tmp_path / "p.nii.gz"
    content = gzip.compress(saved(tmp_path / "p.nii", np.zeros(grid.shape, np.uint8)).read_bytes(), 0)
    for at in (60_000, len(content) - 8, len(content) - 1):  # a voxel, stored as it is; checksum; length
        file.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        with pytest.raises(PredictionError, match="cannot be read"):
            read_prediction(file, grid)


def test_a_pipe_is_no_prediction(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.nii")
    with pytest.raises(RequestError, match="there is no prediction"):
        read_prediction(tmp_path / "p.nii", GRID)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "empty").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "volume.json").write_text("{}")
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no image" * 100))
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES)
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "mixed").mkdir()
    tifffile.imwrite(tmp_path / "mixed" / "0.tif", VALUES[0])
    tifffile.imwrite(tmp_path / "mixed" / "1.tif", VALUES[1, :2])
    (tmp_path / "empty.zarr").mkdir()
    for name, message in {
        "a.nrrd": "is no prediction: give a .nii",
        "empty": "has no slices as .tif",
        "text.nii.gz": "cannot be read",
        "two.npz": "has the arrays a, b: name one of them probabilities",
        "pickled.npy": "cannot be read",
        "mixed": "several shapes",
        "empty.zarr": "cannot be read",
    }.items():
        with pytest.raises(PredictionError, match=message) as caught:
            read_prediction(tmp_path / name, GRID)
        assert "\n" not in str(caught.value)
    for name, message in {"absent.nii": "there is no prediction", "output": "is the folder of an output"}.items():
        with pytest.raises(RequestError, match=message):
            read_prediction(tmp_path / name, GRID)


@pytest.mark.parametrize(("name", "package", "extra"), [("a.nii", "nibabel", "nifti"), ("a.zarr", "zarr", "zarr")])
def test_an_extra_that_is_absent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    if extra == "nifti":
        saved(tmp_path / name, VALUES)
    else:
        zarr.save_array(tmp_path / name, VALUES)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=rf"pip install 'gpuprep\[{extra}\]'"):
        read_prediction(tmp_path / name, GRID)
