"""Rasterisation of contours, compare with other programs.

    python -m bench.micro.contours [--out bench/results/contours-….json]

The structure set has 300 slices of 512 × 512 pixels and one region. Each slice has 200 outlines of 60 points, which are
100 discs with a hole each. Discs do not overlap, so all programs should fill the same pixels. The time is measured from
points in memory, in patient coordinates, to one mask volume:

* gpuprep: `place`, then `PlacedStructure.paint` of every slice;
* dcmrtstruct2nii: its ``DcmPatientCoords2Mask.convert``;
* rt-utils: its ``create_series_mask_from_contour_sequence``, from data elements of pydicom. It searches all contours
  for each slice, so the time is quadratic in the number of slices; it gets a few slices only (``--rt-utils-slices``).

Both other programs fill one outline after the other, with scikit-image or OpenCV, and have other rules for pixels on
the border; the share of differing voxels is reported. All run in one process, one after the other. The fastest round of
gpuprep is reported. Its time from an RTSTRUCT on disk to masks is measured as well. Needs
``pip install dcmrtstruct2nii rt-utils``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydicom import Dataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from bench.measure import save
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.discover import discover
from gpuprep.dicom.stack import Stack, stack
from gpuprep.masks.model import Contour, Segmentation, Structure
from gpuprep.masks.place_on_slices import place
from gpuprep.masks.read import read_segmentation
from gpuprep.testing import write_series

SPACING_MM = (3.0, 0.7, 0.7)
MATRIX = 512
POINTS = 60


def outlines(n: int, z: float, seed: int) -> list[NDArray[np.float64]]:
    """Return the outlines of one slice in mm: a disc with a hole at a random position in each cell of a grid."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    found = []
    cells = math.ceil(math.sqrt(n // 2))
    half_mm = MATRIX * SPACING_MM[1] / cells / 2
    for cell in range(n // 2):
        radius = rng.uniform(0.2, 0.8) * half_mm
        middle = half_mm * (2 * np.array(divmod(cell, cells)) + 1)
        centre = np.append(middle + rng.uniform(-1, 1, 2) * (half_mm - radius), z)
        found += [centre + radius * circle, centre + radius / 2 * circle]
    return found


def gpuprep_mask(segmentation: Segmentation, stacked: Stack) -> NDArray[np.bool_]:
    (structure, *_), _ = place(segmentation, stacked, ReadingOptions())
    mask = np.zeros(stacked.geometry.shape, dtype=bool)
    for n in structure.parts:
        box, painted = structure.paint(n, mask.shape[1:])
        mask[n][box] = painted
    return mask


def dcmrtstruct2nii_mask(contours: list[NDArray[np.float64]], stacked: Stack) -> NDArray[np.bool_]:
    from dcmrtstruct2nii.adapters.convert.rtstructcontour2mask import DcmPatientCoords2Mask

    slices, rows, columns = stacked.geometry.shape
    image = SimpleITK.Image(columns, rows, slices, SimpleITK.sitkUInt8)
    image.SetSpacing(stacked.geometry.spacing_mm[::-1])
    image.SetOrigin(stacked.geometry.origin_mm)
    given = [
        {"type": "CLOSED_PLANAR", "points": {axis: c[:, n].tolist() for n, axis in enumerate("xyz")}} for c in contours
    ]
    return SimpleITK.GetArrayFromImage(DcmPatientCoords2Mask().convert(given, image, 0, 1)) > 0


def rt_utils_mask(sequence: Sequence, series: list[Dataset]) -> NDArray[np.bool_]:
    from rt_utils import image_helper

    mask: NDArray[np.bool_] = image_helper.create_series_mask_from_contour_sequence(series, sequence)
    return np.moveaxis(mask, 2, 0)


def contour_sequence(contours: list[NDArray[np.float64]], stacked: Stack) -> Sequence:
    uids = {round(s.position_mm[2], 3): s.sop_instance_uid for s in stacked.slices if s.position_mm}
    items = []
    for points in contours:
        item, image = Dataset(), Dataset()
        image.ReferencedSOPInstanceUID = uids[round(float(points[0, 2]), 3)]
        item.ContourImageSequence = Sequence([image])
        item.ContourGeometricType = "CLOSED_PLANAR"
        item.NumberOfContourPoints = len(points)
        item.ContourData = [f"{v:.4f}" for v in points.ravel()]
        items.append(item)
    return Sequence(items)


def write_rtstruct(path: Path, sequence: Sequence) -> None:
    roi, contour, ds = Dataset(), Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 1, "discs"
    contour.ReferencedROINumber, contour.ContourSequence = 1, sequence
    ds.SOPClassUID, ds.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    ds.StructureSetROISequence, ds.ROIContourSequence = Sequence([roi]), Sequence([contour])
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)


def timed(function: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = function()
        taken.append(time.perf_counter() - started)
    return min(taken), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--contours", type=int, default=200, help="outlines per slice")
    parser.add_argument("--rt-utils-slices", type=int, default=20)
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of gpuprep; the other programs take minutes and run once"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(args, Path(folder))
    save(args.out, "bench.micro.contours", figures)


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write_series(folder / "ct", np.zeros((args.slices, MATRIX, MATRIX), np.int16), SPACING_MM)
    (series,) = discover(folder / "ct")
    stacked = stack(series)
    origin = np.array(stacked.geometry.origin_mm)
    by_slice = [[c + origin for c in outlines(args.contours, k * SPACING_MM[0], k)] for k in range(len(stacked.slices))]
    contours = [c for found in by_slice for c in found]
    given = Segmentation("", "", "", (Structure("discs", tuple(Contour(c, "patient") for c in contours)),))
    ours_s, ours = timed(lambda: gpuprep_mask(given, stacked), args.rounds)
    print(f"gpuprep          {len(contours)} outlines {ours_s:.2f} s")

    sequence = contour_sequence(contours, stacked)
    write_rtstruct(folder / "rs.dcm", sequence)
    file_s, from_file = timed(lambda: gpuprep_mask(read_segmentation(folder / "rs.dcm"), stacked), args.rounds)
    print(f"gpuprep, RTSTRUCT of {(folder / 'rs.dcm').stat().st_size / 1e6:.0f} MB to masks {file_s:.2f} s")

    dcmrtstruct2nii_s, dcmrtstruct2nii = timed(lambda: dcmrtstruct2nii_mask(contours, stacked), 1)
    ratio = dcmrtstruct2nii_s / ours_s
    print(f"dcmrtstruct2nii  {len(contours)} outlines {dcmrtstruct2nii_s:.2f} s: {ratio:.1f} times gpuprep")
    few = min(args.rt_utils_slices, args.slices)
    subset = [c for found in by_slice[:few] for c in found]
    subset_given = Segmentation("", "", "", (Structure("discs", tuple(Contour(c, "patient") for c in subset)),))
    subset_s, _ = timed(lambda: gpuprep_mask(subset_given, stacked), args.rounds)
    headers, sequence = [slice_header(k, stacked) for k in range(few)], contour_sequence(subset, stacked)
    rt_s, rt = timed(lambda: rt_utils_mask(sequence, headers), 1)
    print(f"rt-utils         {len(subset)} outlines {rt_s:.2f} s, gpuprep {subset_s:.2f} s")
    return {
        "outlines": len(contours),
        "points_each": POINTS,
        "gpuprep_s": ours_s,
        "gpuprep_from_rtstruct_s": file_s,
        "dcmrtstruct2nii_s": dcmrtstruct2nii_s,
        "dcmrtstruct2nii_ratio": ratio,
        "dcmrtstruct2nii_differing_share_of_mask": float((dcmrtstruct2nii != ours).sum() / ours.sum()),
        "rt_utils": {
            "outlines": len(subset),
            "seconds": rt_s,
            "gpuprep_s": subset_s,
            "ratio": rt_s / subset_s,
            "differing_share_of_mask": float((rt != ours[:few]).sum() / ours[:few].sum()),
        },
        "rtstruct_differing_share_of_mask": float((from_file != ours).sum() / ours.sum()),
        "rivals": {name: version(name) for name in ("dcmrtstruct2nii", "rt-utils", "scikit-image", "opencv-python")},
        "python": sys.version.split()[0],
    }


def slice_header(k: int, stacked: Stack) -> Dataset:
    """Return a data set with the elements of a slice that rt-utils needs."""
    ds = Dataset()
    header = stacked.slices[k]
    ds.SOPInstanceUID = header.sop_instance_uid
    ds.ImagePositionPatient = list(header.position_mm or ())
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = list(SPACING_MM[1:])
    ds.SliceThickness = SPACING_MM[0]
    ds.Rows = ds.Columns = MATRIX
    return ds


if __name__ == "__main__":
    main()
