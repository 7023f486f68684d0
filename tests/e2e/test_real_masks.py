"""Masks of real segmentations, compared with the masks that other programs made from them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from numpy.typing import NDArray

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.core.mask_options import Layout

IMAGEJ = Path("/usr/share/java/ij.jar")


def native(**masks: Any) -> Recipe:
    return Recipe(spacing_mm=None, size=None, image=False, masks=Masks(**masks))


def converted(
    dicom: Path, segmentation: Path | str, out: Path, recipe: Recipe | None = None
) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Return the masks of each series by the name of its folder, by structure."""
    run = gpuprep.convert(dicom, out, recipe or native(), masks=segmentation)
    found = {}
    for result in run.results:
        assert result.status == "ok", result.reason
        folder = out / result.folder
        masks = {}
        for label in json.loads((folder / "volume.json").read_text())["labels"]:
            files = sorted((folder / label["file"]).iterdir())
            masks[label["name"]] = np.stack([tifffile.imread(f) for f in files]) == label["value"]
        found[result.folder] = masks
    return found


def read_image(path: Path) -> NDArray[np.bool_]:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)) > 0


def test_structure_sets_of_ibsi_equal_the_official_masks_in_every_voxel(data: Path, tmp_path: Path) -> None:
    # Traps 37, 39 and 40; the NIfTI files were made by MIRP and equal those of plastimatch.
    found = converted(data / "ibsi-sts-4" / "dicom", "auto", tmp_path)
    patients = {folder.split("/")[1]: masks for folder, masks in found.items()}
    assert sorted(patients) == ["STS_002", "STS_008", "STS_019", "STS_042"]
    for patient, masks in patients.items():
        truth = read_image(data / "ibsi-sts-4" / "nifti" / patient / "CT_mask.nii.gz")
        assert list(masks) == ["GTV_Mass_CT"]
        assert truth.sum() > 5000
        np.testing.assert_array_equal(masks["GTV_Mass_CT"], truth)


@pytest.fixture(scope="module")
def slice_of_imagej(data: Path) -> tuple[Path, NDArray[np.bool_]]:
    mask = np.asarray(tifffile.imread(data / "txt-formats" / "imagej" / "lidc0001_z-125_mask_imagej_fill.tif")) > 0
    assert mask.sum() == 418
    return data / "txt-formats" / "imagej", mask


@pytest.mark.parametrize("file", ["xy_uncalibrated_px", "xy_calibrated_mm", "mask_textimage"])
def test_contours_and_text_images_of_imagej_give_the_mask_of_imagej(
    data: Path, tmp_path: Path, slice_of_imagej: tuple[Path, NDArray[np.bool_]], file: str
) -> None:
    folder, truth = slice_of_imagej
    found = converted(data / "lidc-0001-jls", folder / f"lidc0001_z-125_{file}.txt", tmp_path)
    ((mask,),) = (masks.values() for masks in found.values())
    assert mask.shape == (133, 512, 512)
    (k,) = np.flatnonzero(mask.any(axis=(1, 2)))
    np.testing.assert_array_equal(mask[k], truth)
    # Measured with pydicom alone: the lowest slice is at −340 mm, and the slices are 2.5 mm apart.
    assert -340 + 2.5 * k == -125


@pytest.mark.imagej
def test_a_subpixel_contour_is_filled_like_imagej_fills_it(
    data: Path, tmp_path: Path, slice_of_imagej: tuple[Path, NDArray[np.bool_]]
) -> None:
    # Its points are on the whole-pixel contour, 1.5 pixels apart, so it cuts corners: ImageJ fills 415 pixels.
    java, screen = shutil.which("java"), shutil.which("xvfb-run")
    if java is None or screen is None or not IMAGEJ.exists():
        pytest.skip("ImageJ or a virtual screen is absent: apt-get install imagej xvfb xauth")
    path = slice_of_imagej[0] / "lidc0001_z-125_xy_subpixel_px.txt"
    macro = tmp_path / "fill.ijm"
    macro.write_text(
        f'lines = split(File.openAsString("{path}"), "\\n"); x = newArray(lines.length); y = newArray(lines.length);'
        'for (i = 0; i < lines.length; i++) { p = split(lines[i], "\\t"); x[i] = parseFloat(p[0]); '
        'y[i] = parseFloat(p[1]); } newImage("m", "8-bit black", 512, 512, 1); makeSelection("polygon", x, y); '
        f'run("Create Mask"); saveAs("Tiff", "{tmp_path / "fill.tif"}"); run("Quit");'
    )
    command = [screen, "-a", java, "-jar", str(IMAGEJ), "-batch", str(macro)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    truth = tifffile.imread(tmp_path / "fill.tif") > 0
    assert truth.sum() == 415
    found = converted(data / "lidc-0001-jls", path, tmp_path / "out", native(units="px"))
    ((mask,),) = (masks.values() for masks in found.values())
    np.testing.assert_array_equal(mask.any(axis=0), truth)


def test_cxt_and_structure_set_of_one_case_give_the_same_masks(data: Path, tmp_path: Path) -> None:
    dicom = data / "4dlung-113-crop"
    (from_rtstruct,) = converted(dicom, "auto", tmp_path / "rs").values()
    cxt = data / "txt-formats" / "plastimatch_cxt" / "4dlung-113_0.cxt"
    (from_cxt,) = converted(dicom, cxt, tmp_path / "cxt").values()
    assert set(from_cxt) == set(from_rtstruct)
    for name, mask in from_rtstruct.items():
        assert mask.any()
        np.testing.assert_array_equal(from_cxt[name], mask)
    # Voxel counts of plastimatch's masks of the complete series; all ROIs are inside the part of it used here.
    reference = json.loads((data / "INDEX.json").read_text())["rt_references"]["4dlung-113"]["rtstruct"][0][
        "plastimatch"
    ]
    for name, mask in from_rtstruct.items():
        assert mask.sum() == pytest.approx(reference[name]["voxels"], rel=0.002)


def test_lidc_xml_and_pylidc_lists_of_one_case_give_the_same_masks(data: Path, tmp_path: Path) -> None:
    # Trap 38: both exclude the outline. All readers marked the same nodule, so the structures overlap.
    layout: Layout = "per-roi"
    dicom = data / "lidc-0001-jls"
    (from_xml,) = converted(dicom, "auto", tmp_path / "xml", native(layout=layout)).values()
    lists = data / "txt-formats" / "pylidc_coords" / "LIDC-IDRI-0001_contours.tsv"
    (from_lists,) = converted(dicom, lists, tmp_path / "tsv", native(layout=layout)).values()
    assert len(from_xml) == len(from_lists) == 4
    by_size = [sorted(masks.values(), key=lambda m: int(m.sum())) for masks in (from_xml, from_lists)]
    for one, other in zip(*by_size, strict=True):
        assert one.sum() > 2000
        np.testing.assert_array_equal(one, other)


def test_overlapping_nodules_of_several_readers_are_refused_as_labels(data: Path, tmp_path: Path) -> None:
    # The readers agree on the position of the nodule, so one label volume cannot represent all of them.
    run = gpuprep.convert(data / "lidc-0001-jls", tmp_path, native(), masks="auto")
    assert run.results[0].codes == ("mask-overlap",)
    assert "--mask-layout per-roi" in run.results[0].reason


@pytest.mark.parametrize("folder", ["24x38x3", "23x38x3"])
def test_a_seg_on_its_own_series_equals_the_nrrd(data: Path, tmp_path: Path, folder: str) -> None:
    case = data / "dcmqi-seg" / folder
    found = converted(case / "image", case / "seg" / "label.seg", tmp_path)
    ((mask,),) = (masks.values() for masks in found.values())
    np.testing.assert_array_equal(mask, read_image(case / "nrrd" / "label.nrrd"))
