"""From DICOM through a conversion and back to the slices, against positions read by pydicom, and real segmentations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from numpy.typing import NDArray
from pydicom import Dataset
from test_geometry_end_to_end import OBLIQUE

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.output.write_restored import write_nifti
from gpuprep.testing import write_series

SHAPE, SPACING_MM = (20, 40, 48), (2.5, 0.8, 0.9)


def moved(
    along_mm: Callable[[int], float] = lambda _: 0.0, rows_mm: Callable[[int], float] = lambda _: 0.0
) -> Callable[[Dataset, int], None]:
    """Return a change that moves slices along the normal and along their columns."""

    def change(ds: Dataset, k: int) -> None:
        row, column = np.array(ds.ImageOrientationPatient).reshape(2, 3)
        position = np.array(ds.ImagePositionPatient, float) + np.cross(row, column) * along_mm(k) + column * rows_mm(k)
        ds.ImagePositionPatient = [f"{v:.10g}" for v in position]
        del ds.PixelPaddingValue

    return change


def jittered(k: int) -> float:
    return 0.0 if k in (0, SHAPE[0] - 1) else 0.9 * np.sin(2.3 * k)


def tilted(k: int) -> float:
    return 0.71 * k


SERIES: dict[str, tuple[tuple[float, ...], Any]] = {
    "axial": ((1, 0, 0, 0, 1, 0), moved()),
    "oblique": (OBLIQUE, moved()),
    "sagittal": ((0, 1, 0, 0, 0, -1), moved()),
    "coronal": ((1, 0, 0, 0, 0, -1), moved()),
    "prone": ((-1, 0, 0, 0, -1, 0), moved()),
    "feet first": ((-1, 0, 0, 0, 1, 0), moved()),
    "tilted": ((1, 0, 0, 0, 1, 0), moved(rows_mm=tilted)),
    "uneven": ((1, 0, 0, 0, 1, 0), moved(jittered)),
    "tilted and uneven, oblique": (OBLIQUE, moved(jittered, tilted)),
}
REGULAR = ("axial", "oblique", "sagittal", "coronal", "prone", "feet first")


def positions_mm(folder: Path) -> NDArray[np.float64]:
    """Return where the voxels of a series lie, slices in order along the normal, by pydicom (DICOM PS3.3, C.7.6.2.1.1).

    Shape (slices, rows, columns, 3).
    """
    found = []
    for file in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        row, column = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        first = np.array(ds.ImagePositionPatient, float)
        between_rows, between_columns = map(float, ds.PixelSpacing)
        j, i = np.indices((ds.Rows, ds.Columns))[..., None]
        found.append((np.cross(row, column) @ first, first + column * between_rows * j + row * between_columns * i))
    return np.stack([points for _, points in sorted(found, key=lambda pair: float(pair[0]))])


def converted(folder: Path, out: Path, recipe: Recipe, **options: Any) -> Path:
    """Return the folder of the output of the only series in a folder."""
    run = gpuprep.convert(folder, out, recipe, backend="cpu", **options)
    (result,) = run.results
    assert result.status in ("ok", "fixed"), result.reason
    return out / str(result.folder)


def sidecar_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "volume.json").read_text())
    return found


RECIPES = {
    "1 mm": Recipe(size=None, window_hu=None, order=1, format="npy"),
    "padded, turned": Recipe(size=(100, 100), fit="pad", window_hu=None, order=1, format="npy", orient="LPS"),
    "coarse": Recipe(spacing_mm=(3.0, 1.2, 1.3), size=None, window_hu=None, order=1, format="npy"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("orientation", "change"), SERIES.values(), ids=SERIES)
def test_a_bright_box_returns_to_its_place_in_mm(
    tmp_path: Path, orientation: tuple[float, ...], change: Any, recipe: Recipe
) -> None:
    stored = np.zeros(SHAPE, np.int16)  # -1024 HU
    stored[5:9, 9:18, 27:38] = 2048
    write_series(
        tmp_path / "dicom", stored, SPACING_MM, orientation=orientation, origin_mm=(-12.5, 33, -101), change=change
    )
    folder = converted(tmp_path / "dicom", tmp_path / "out", recipe)
    restored = gpuprep.restore(np.load(folder / "volume.npy") > 0, folder)
    assert restored.values.shape == SHAPE
    points_mm = positions_mm(tmp_path / "dicom")
    np.testing.assert_allclose(restored.first_voxels_mm, points_mm[:, 0, 0], atol=1e-3)
    found_mm, true_mm = points_mm[restored.values > 0].mean(axis=0), points_mm[stored > 0].mean(axis=0)
    axes = np.array([[*orientation[:3]], [*orientation[3:]], np.cross(orientation[:3], orientation[3:])])
    coarser_mm = np.maximum(SPACING_MM[::-1], (recipe.spacing_mm or SPACING_MM)[::-1])  # columns, rows, slices
    assert (np.abs(axes @ (found_mm - true_mm)) < coarser_mm / 2).all()
    # Its border is half-way between two slices, rows or columns, and linear interpolation finds it to half a voxel.
    assert restored.values[6:8, 10:17, 28:37].all()
    restored.values[4:10, 8:19, 26:39] = 0
    assert not restored.values.any()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("orientation", "change"), SERIES.values(), ids=SERIES)
def test_each_label_is_at_the_voxel_nearest_in_mm(
    tmp_path: Path, orientation: tuple[float, ...], change: Any, recipe: Recipe
) -> None:
    write_series(tmp_path / "dicom", np.zeros(SHAPE, np.int16), SPACING_MM, orientation=orientation, change=change)
    folder = converted(tmp_path / "dicom", tmp_path / "out", recipe)
    sidecar = sidecar_of(folder)
    affine, shape = np.array(sidecar["affine_lps"]), sidecar["shape"]
    points_mm = positions_mm(tmp_path / "dicom")
    prediction = np.zeros(shape, np.uint8)
    marks = {1: (3, 5, 7), 2: (10, 30, 41), 3: (17, 12, 20), 4: (0, 0, 0), 5: (19, 39, 47)}
    for value, mark in marks.items():
        at = np.linalg.inv(affine) @ [*points_mm[mark], 1]
        away = np.abs(np.indices(shape) - at[:3, None, None, None]).max(axis=0)
        prediction[away < 0.5 + 1e-6] = value  # of two voxels at equal distance, both
    restored = gpuprep.restore(prediction, folder).values
    half_mm = np.array(sidecar["spacing_mm"]) / 2
    for value, mark in marks.items():
        assert restored[mark] == value
        away_mm = (points_mm[restored == value] - points_mm[mark]) @ (affine[:3, :3] / (2 * half_mm))
        assert (np.abs(away_mm) <= 2 * half_mm + 1e-3).all()  # half a voxel from the mark's, and as much to another


def read_by_simpleitk(file: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the voxels of a file and where they lie, by SimpleITK."""
    image = SimpleITK.ReadImage(file)
    values = SimpleITK.GetArrayFromImage(image)
    n, j, i = np.indices(values.shape).reshape(3, -1)
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return values, (np.stack([i, j, n]).T @ direction.T + image.GetOrigin()).reshape(*values.shape, 3)


def read_by_nibabel(file: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the voxels of a file and where they lie (LPS), by nibabel."""
    image: Any = nibabel.load(file)
    values = np.asarray(image.dataobj).T
    n, j, i = np.indices(values.shape).reshape(3, -1)
    points = nibabel.affines.apply_affine(image.affine, np.stack([i, j, n]).T) * (-1, -1, 1)
    return values, points.reshape(*values.shape, 3)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", SERIES)
def test_nifti_files_lie_where_the_slices_lie(tmp_path: Path, name: str, ending: str) -> None:
    orientation, change = SERIES[name]
    write_series(tmp_path / "dicom", np.zeros(SHAPE, np.int16), SPACING_MM, orientation=orientation, change=change)
    folder = converted(tmp_path / "dicom", tmp_path / "out", Recipe(size=None, format="npy"))
    prediction = np.random.default_rng(0).integers(0, 5, sidecar_of(folder)["shape"])
    restored = gpuprep.restore(prediction, folder)
    file = tmp_path / f"result{ending}"
    notes = write_nifti(restored, file)
    values, points_mm = read_by_nibabel(file)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, restored.values)
    away_mm = np.linalg.norm(points_mm - positions_mm(tmp_path / "dicom"), axis=-1).max()
    if name in REGULAR:
        assert notes == ()
        np.testing.assert_array_equal(read_by_simpleitk(file)[0], restored.values)
        np.testing.assert_allclose(read_by_simpleitk(file)[1], points_mm, atol=1e-3)
        assert away_mm < 1e-3
    elif name == "tilted":
        (note,) = notes
        # cos = 0.71 / hypot(2.5, 0.71), along the shorter of both axes: 39 rows of 0.8 mm
        assert "slices lean by 8.52 mm in all" in note
        assert "ITK refuses the file" in note
        assert away_mm < 1e-3
        with pytest.raises(RuntimeError, match="orthonormal"):
            SimpleITK.ReadImage(file)
    else:
        assert "unevenly placed" in notes[-1]
        assert f"up to {away_mm:.3g} mm" in notes[-1]
        assert 0.5 < away_mm < 1.3  # they were moved by up to 0.9 mm


def test_a_series_kept_with_its_tilt_returns_to_leaning_slices(tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", np.zeros(SHAPE, np.int16), SPACING_MM, change=moved(rows_mm=tilted))
    folder = converted(tmp_path / "dicom", tmp_path / "out", Recipe(size=None, format="npy", policy="keep"))
    prediction = np.random.default_rng(0).integers(0, 5, sidecar_of(folder)["shape"])
    restored = gpuprep.restore(prediction, folder)
    np.testing.assert_allclose(restored.first_voxels_mm, positions_mm(tmp_path / "dicom")[:, 0, 0], atol=1e-3)


# Real segmentations ---------------------------------------------------------------------------------------------------


def axis_index(positions: NDArray[np.float64], voxels: int, *, later: bool) -> NDArray[np.intp]:
    """Return the nearest of some voxels to each position, by distance; −1 if that is a voxel outside."""
    away = np.abs(np.round(positions, 6)[:, None] - np.arange(-1, voxels + 1))
    nearest = voxels - away[:, ::-1].argmin(axis=1) if later else away.argmin(axis=1) - 1
    return np.where(nearest < voxels, nearest, -1)


def looked_up(values: NDArray[Any], index: list[NDArray[np.intp]]) -> NDArray[Any]:
    """Return values at an index along each axis; 0 where one is −1."""
    k, j, i = np.ix_(*index)
    return np.where((k >= 0) & (j >= 0) & (i >= 0), values[k, j, i], 0).astype(values.dtype)


def on_output(native: NDArray[Any], sidecar: dict[str, Any]) -> NDArray[Any]:
    """Return native labels of a regular series at the voxels of its output, axis by axis, by the affines alone."""
    assert sidecar["source"]["placement"] is None
    step = np.linalg.inv(sidecar["source"]["affine_lps"]) @ sidecar["affine_lps"]
    index, order = [], []
    for axis, voxels in enumerate(native.shape):
        output = int(np.abs(step[axis, :3]).argmax())
        order.append(output)
        positions = step[axis, output] * np.arange(sidecar["shape"][output]) + step[axis, 3]
        index.append(axis_index(positions, voxels, later=True))
    return looked_up(native, index).transpose(np.argsort(order))


def on_slices(output: NDArray[Any], sidecar: dict[str, Any]) -> NDArray[Any]:
    """Return the labels of an output at the voxels of the slices of a regular series, axis by axis."""
    step = np.linalg.inv(sidecar["affine_lps"]) @ sidecar["source"]["affine_lps"]
    index, order = [], []
    for axis, voxels in enumerate(output.shape):
        native = int(np.abs(step[axis, :3]).argmax())
        order.append(native)
        positions = step[axis, native] * np.arange(sidecar["source"]["shape"][native]) + step[axis, 3]
        index.append(axis_index(positions, voxels, later=bool(step[axis, native] < 0)))
    return looked_up(output, index).transpose(np.argsort(order))


def there_and_back(native: NDArray[Any], sidecar: dict[str, Any]) -> NDArray[Any]:
    return on_slices(on_output(native, sidecar), sidecar)


EXACT: dict[str, dict[str, Any]] = {
    "default": {"spacing_mm": (1.0, 1.0, 1.0), "size": (512, 512)},
    "padded": {"spacing_mm": None, "size": (540, 550), "fit": "pad"},
    "as acquired": {"spacing_mm": None, "size": None},
    "as acquired, turned": {"spacing_mm": None, "size": None, "orient": "LPS"},
    "finer": {"spacing_mm": (0.9, 0.5, 0.45), "size": None},
    "no window": {"spacing_mm": None, "size": None, "window_hu": None},
}
"""Recipes that only keep, pad or turn the grid, or make it finer: labels must return unchanged."""
COARSER: dict[str, dict[str, Any]] = {
    "2 mm": {"spacing_mm": (2.0, 2.0, 2.0), "size": None},
    "size 256": {"size": (256, 256)},
    "cropped": {"spacing_mm": None, "size": (30, 33), "fit": "crop"},
    "cropped at 1.5 mm, turned": {"spacing_mm": (1.5, 1.5, 1.5), "size": (41, 44), "fit": "crop", "orient": "LPS"},
    "corners": {"spacing_mm": (2.2, 1.7, 1.8), "size": None, "align": "corner"},
}
"""Recipes that lose voxels, so that labels return as those of two nearest lookups."""


def check(
    dicom: Path, masks: Any, truth: NDArray[Any], out: Path, changes: dict[str, Any], *, exact: bool, **o: Any
) -> None:
    """Convert masks by a recipe, restore them, and compare them with the true ones."""
    recipe = Recipe(**{"image": False, "format": "npy", "masks": Masks(**o), **changes})
    folder = converted(dicom, out, recipe, masks=masks)
    file = sidecar_of(folder)["labels"][0]["file"]
    restored = gpuprep.restore(folder / file, folder)
    assert truth.any()
    wanted = there_and_back(truth, sidecar_of(folder))
    if exact:
        np.testing.assert_array_equal(wanted, truth)
    np.testing.assert_array_equal(restored.values, wanted)


def params(**cases: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("changes", "exact"),
        [pytest.param(c, kind == "exact", id=name) for kind, found in cases.items() for name, c in found.items()],
    )


@params(exact=EXACT, coarser=COARSER)
@pytest.mark.parametrize("patient", ["STS_002", "STS_008", "STS_019", "STS_042"])
def test_official_masks_of_ibsi_return(
    data: Path, tmp_path: Path, patient: str, changes: dict[str, Any], exact: bool
) -> None:
    case = data / "ibsi-sts-4"
    truth = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(case / "nifti" / patient / "CT_mask.nii.gz"))
    (dicom,) = [p for p in (case / "dicom").rglob(patient) if p.is_dir()][:1]
    check(dicom, "auto", (truth > 0).astype(np.uint8), tmp_path / "out", changes, exact=exact)


@params(exact=EXACT, coarser=COARSER)
def test_masks_of_a_seg_return(data: Path, tmp_path: Path, changes: dict[str, Any], exact: bool) -> None:
    case = data / "dcmqi-seg" / "24x38x3"
    truth = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(case / "nrrd" / "label.nrrd"))
    check(
        case / "image", case / "seg" / "label.seg", (truth > 0).astype(np.uint8), tmp_path / "o", changes, exact=exact
    )


@params(exact=EXACT, coarser=COARSER)
@pytest.mark.parametrize("kernel", ["B70f", "B40f"])
def test_boxes_of_lungdx_return(data: Path, tmp_path: Path, kernel: str, changes: dict[str, Any], exact: bool) -> None:
    # The boxes are no format of gpuprep, so they are put on the grid of the output here.
    (dicom,) = (data / "lungdx-a0002" / "dicom").glob(f"*/*{kernel}*")
    slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in dicom.iterdir()]
    truth = np.zeros((30, 512, 512), np.uint8)
    for k, ds in enumerate(sorted(slices, key=lambda ds: float(ds.ImagePositionPatient[2]))):
        assert ds.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
        for file in (data / "lungdx-a0002" / "annotation").glob(f"{ds.SOPInstanceUID}.xml"):
            corners = {tag: int(found) for tag, found in re.findall(r"<([xy]m..)>(\d+)<", file.read_text())}
            truth[k, corners["ymin"] : corners["ymax"] + 1, corners["xmin"] : corners["xmax"] + 1] = 1
    assert len(np.flatnonzero(truth.any(axis=(1, 2)))) == {"B70f": 8, "B40f": 10}[kernel]
    changes = changes | ({"size": (300, 310)} if changes.get("fit") == "crop" else {})
    folder = converted(dicom, tmp_path / "out", Recipe(**{"format": "npy", "dtype": "int16", **changes}))
    prediction = on_output(truth, sidecar_of(folder))
    restored = gpuprep.restore(prediction, folder).values
    np.testing.assert_array_equal(restored, truth if exact else on_slices(prediction, sidecar_of(folder)))


@params(exact={k: EXACT[k] for k in ("default", "finer")}, coarser={k: COARSER[k] for k in ("2 mm", "size 256")})
def test_a_nodule_of_lidc_returns(data: Path, tmp_path: Path, changes: dict[str, Any], exact: bool) -> None:
    lidc = data / "lidc-0001-jls"
    options: dict[str, Any] = {"layout": "per-roi"}
    native: dict[str, Any] = {"spacing_mm": None, "size": None, "image": False, "format": "npy"}
    folder = converted(
        lidc / "dicom", tmp_path / "native", Recipe(**native, masks=Masks(**options)), masks=lidc / "annotation"
    )
    truth = np.load(folder / sidecar_of(folder)["labels"][0]["file"])
    check(lidc / "dicom", lidc / "annotation", truth, tmp_path / "out", changes, exact=exact, **options)
