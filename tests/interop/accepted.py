"""Checks that nnU-Net v2, MONAI and ngff-zarr read the outputs of gpuprep correctly.

    pip install '.[nifti,zarr]' nnunetv2 monai ngff-zarr
    python tests/interop/accepted.py [DICOM_DIR...] [--roi REGEX]

Phantoms with outlines, and the series under DICOM_DIR with their RTSTRUCT and SEG, are converted to both formats for
nnU-Net, for MONAI also to .npy, and for ngff-zarr to OME-Zarr. All values and affines are compared with
``gpuprep.process``; the first difference ends the script. ``--roi`` selects structures that do not overlap.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpuprep
from gpuprep import Masks, Recipe, Volume
from gpuprep.core.recipe import Compression, Format
from gpuprep.pipeline.events import Run
from gpuprep.testing import outlines, thorax, write_series

SHAPE, SPACING_MM = (30, 128, 128), (5.0, 2.0, 2.0)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
FORMATS: tuple[tuple[Format, Compression], ...] = (
    ("nifti", "zlib"),
    ("tif-stack", "zlib"),
    ("npy", "none"),
    ("zarr", "zstd"),
)
ATOL = 1e-3
"""Tolerance in mm of affines, which some headers store in float32."""


def write_phantoms(top: Path) -> None:
    """Write three chest phantoms, and heart and spine of two of them as text."""
    for n in range(3):
        write_series(top / "dicom" / f"phantom-{n}", thorax(SHAPE, SPACING_MM, seed=n), SPACING_MM)
    for n in range(2):
        lines = ["structure x_mm y_mm z_mm"]
        for name, contours in outlines(SHAPE, SPACING_MM).items():
            lines += [f"{name} {x:.3f} {y:.3f} {z:.3f}" for points in contours for x, y, z in points]
        (top / "masks" / f"phantom-{n}").mkdir(parents=True)
        (top / "masks" / f"phantom-{n}" / "outlines.txt").write_text("\n".join(lines) + "\n")


def computed(inputs: list[str], recipe: Recipe) -> dict[str, Volume]:
    """Return the volume of each series by its UID."""
    series = gpuprep.discover(inputs)
    return {
        s.series_uid: gpuprep.process(gpuprep.read(s, recipe), recipe, backend="cpu")
        for s in series
        if gpuprep.audit(s, recipe.rules).verdict != "rejected"
    }


def check(what: str, values: NDArray[Any], expected: NDArray[Any], atol: float = 0) -> None:
    if values.shape != expected.shape or not np.allclose(values, expected, rtol=0, atol=atol):
        raise SystemExit(f"{what} differs")


def by_nnunet(out: Path, run: Run, volumes: dict[str, Volume], ending: str) -> None:
    """Verify a data set with nnU-Net's own check, and compare each image that its reader returns."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    verify_dataset_integrity(str(out), num_processes=2)
    reader = SimpleITKIO() if ending == ".nii.gz" else Tiff3DIO()
    originals = {(out / r.folder / f"volume{ending}").stat().st_ino: r for r in run.results if r.folder}
    count = 0
    for file in sorted(out.glob(f"images*/*_0000{ending}")):
        volume = volumes[originals[file.stat().st_ino].series_uid]
        values, properties = reader.read_images([str(file)])
        check(f"{file.name}: values", values[0], np.asarray(volume))
        check(f"{file.name}: spacing", np.array(properties["spacing"]), np.array(volume.spacing_mm), ATOL)
        if ending == ".nii.gz":
            itk = properties["sitk_stuff"]
            axes = np.reshape(itk["direction"], (3, 3)) * itk["spacing"]
            check(f"{file.name}: axes", axes[:, ::-1], volume.affine[:3, :3], ATOL)
            check(f"{file.name}: origin", np.array(itk["origin"]), volume.affine[:3, 3], ATOL)
        count += 1
    print(f"nnU-Net {version('nnunetv2')} accepts the data set of {ending}, and reads {count} volumes as computed")


def by_monai(out: Path, run: Run, volumes: dict[str, Volume], ending: str) -> None:
    """Compare each image that MONAI loads."""
    from monai.transforms import LoadImage

    load, count = LoadImage(image_only=True), 0
    for result in run.results:
        if not result.folder:
            continue
        volume = volumes[result.series_uid]
        image = load(str(out / result.folder / f"volume{ending}"))
        nifti = ending == ".nii.gz"
        values = image.numpy().transpose() if nifti else image.numpy()
        check(f"{result.folder}: values", values, np.asarray(volume))
        if nifti:
            affine = LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]]
            check(f"{result.folder}: affine", image.affine.numpy(), affine, ATOL)
        count += 1
    print(f"MONAI {version('monai')} loads {count} volumes of {ending} as computed")


def by_ngff_zarr(out: Path, run: Run, volumes: dict[str, Volume]) -> None:
    """Compare each image that ngff-zarr reads, and its position unless it is oblique."""
    from ngff_zarr import from_ngff_zarr  # type: ignore[import-not-found, unused-ignore]
    from ngff_zarr.rfc4 import (  # type: ignore[import-not-found, unused-ignore]
        anatomical_orientation_to_itk_direction as direction_of,
    )

    count = 0
    for result in run.results:
        if not result.folder:
            continue
        volume = volumes[result.series_uid]
        image = from_ngff_zarr(str(out / result.folder / "volume.ome.zarr"), validate=True).images[0]
        check(f"{result.folder}: values", np.asarray(image.data), np.asarray(volume))
        if not any(warning.startswith("axes are up to") for warning in result.warnings):
            words = [image.axes_orientations[axis].value for axis in "zyx"]
            axes = np.array([direction_of(w) for w in words]).T * volume.spacing_mm
            check(f"{result.folder}: axes", axes, volume.affine[:3, :3], ATOL)
            origin = np.array([image.translation[axis] for axis in "xyz"])
            check(f"{result.folder}: origin", origin, volume.affine[:3, 3], ATOL)
        count += 1
    print(f"ngff-zarr {version('ngff-zarr')} reads {count} volumes as computed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="DICOM_DIR")
    parser.add_argument("--roi")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(top / f"nnUNet_{name}")
        write_phantoms(top)
        inputs = [str(top / "dicom"), *args.inputs]
        for n, (format_, compression) in enumerate(FORMATS, 1):
            recipe = Recipe(
                spacing_mm=(3.0, 2.0, 2.0), size=None, window_hu=None, dtype="int16",
                format=format_, compression=compression, masks=Masks(roi=args.roi),
            )  # fmt: skip
            out = top / "nnUNet_raw" / f"Dataset{n:03d}_{format_}"
            run = gpuprep.convert(
                inputs, out, recipe, masks=[str(top / "masks"), *args.inputs], backend="cpu",
                layout="folders" if format_ in ("npy", "zarr") else "nnunet",
            )  # fmt: skip
            left_out = [f"{r.source}: {r.reason}" for r in run.results if not r.folder]
            print(f"\n{format_}: {run.counts}, {run.arranged}", *left_out, sep="\n  ")
            volumes = computed(inputs, recipe)
            if format_ == "zarr":
                by_ngff_zarr(out, run, volumes)
                continue
            if format_ != "npy":
                by_nnunet(out, run, volumes, recipe.ending)
            if format_ != "tif-stack":
                by_monai(out, run, volumes, recipe.ending)


if __name__ == "__main__":
    main()
