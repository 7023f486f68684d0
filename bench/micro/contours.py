"""Outlines to pixels against what people use: ``python -m bench.micro.contours [--out bench/results/contours-….json]``.

A structure set of 300 slices of 512 × 512 with 200 outlines of 60 points each in every slice, half of them discs with a
hole in each, all of one region. No two discs overlap: there the programs mean the same pixels. Timed is the way from
points in memory, in patient coordinates, to one mask volume:

* gpuprep: `place`, then `Placed.paint` of every slice;
* dcmrtstruct2nii: its ``DcmPatientCoords2Mask.convert``;
* rt-utils: its ``create_series_mask_from_contour_sequence``, from data elements of pydicom. It looks through all
  contours for every slice, so that time grows with their square: it gets a few slices only (``--rt-utils-slices``).

Both rivals fill with scikit-image or OpenCV, one outline after the other, and by other rules on the border: the share
of voxels that differ is reported. All run in one process, one after the other; of gpuprep's rounds the fastest counts.
Its way from an RTSTRUCT on disk to masks is timed as well. Needs ``pip install dcmrtstruct2nii rt-utils``.
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
from gpuprep.core.mask_options import Reading
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
    """Return the outlines of one slice in mm: a disc somewhere in each cell of a grid, and a hole in every one."""
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


def masked(segmentation: Segmentation, stacked: Stack) -> NDArray[np.bool_]:
    (structure, *_), _ = place(segmentation, stacked, Reading())
    mask = np.zeros(stacked.geometry.shape, dtype=bool)
    for n in structure.parts:
        within, painted = structure.paint(n, mask.shape[1:])
        mask[n][within] = painted
    return mask


def by_dcmrtstruct2nii(contours: list[NDArray[np.float64]], stacked: Stack) -> NDArray[np.bool_]:
    from dcmrtstruct2nii.adapters.convert.rtstructcontour2mask import DcmPatientCoords2Mask

    slices, rows, columns = stacked.geometry.shape
    image = SimpleITK.Image(columns, rows, slices, SimpleITK.sitkUInt8)
    image.SetSpacing(stacked.geometry.spacing_mm[::-1])
    image.SetOrigin(stacked.geometry.origin_mm)
    given = [
        {"type": "CLOSED_PLANAR", "points": {axis: c[:, n].tolist() for n, axis in enumerate("xyz")}} for c in contours
    ]
    return SimpleITK.GetArrayFromImage(DcmPatientCoords2Mask().convert(given, image, 0, 1)) > 0


def by_rt_utils(sequence: Sequence, series: list[Dataset]) -> NDArray[np.bool_]:
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
    parser.add_argument("--contours", type=int, default=200, help="in every slice")
    parser.add_argument("--rt-utils-slices", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of gpuprep; the rivals get one, of minutes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = compared(args, Path(folder))
    save(args.out, "bench.micro.contours", figures)


def compared(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write_series(folder / "ct", np.zeros((args.slices, MATRIX, MATRIX), np.int16), SPACING_MM)
    (series,) = discover(folder / "ct")
    stacked = stack(series)
    origin = np.array(stacked.geometry.origin_mm)
    by_slice = [[c + origin for c in outlines(args.contours, k * SPACING_MM[0], k)] for k in range(len(stacked.slices))]
    contours = [c for found in by_slice for c in found]
    given = Segmentation("", "", "", (Structure("discs", tuple(Contour(c, "patient") for c in contours)),))
    ours_s, ours = timed(lambda: masked(given, stacked), args.rounds)
    print(f"gpuprep          {len(contours)} outlines {ours_s:.2f} s")

    sequence = contour_sequence(contours, stacked)
    write_rtstruct(folder / "rs.dcm", sequence)
    file_s, from_file = timed(lambda: masked(read_segmentation(folder / "rs.dcm"), stacked), args.rounds)
    print(f"gpuprep, RTSTRUCT of {(folder / 'rs.dcm').stat().st_size / 1e6:.0f} MB to masks {file_s:.2f} s")

    rival_s, rival = timed(lambda: by_dcmrtstruct2nii(contours, stacked), 1)
    print(f"dcmrtstruct2nii  {len(contours)} outlines {rival_s:.2f} s: {rival_s / ours_s:.1f} times gpuprep")
    few = min(args.rt_utils_slices, args.slices)
    some = [c for found in by_slice[:few] for c in found]
    some_given = Segmentation("", "", "", (Structure("discs", tuple(Contour(c, "patient") for c in some)),))
    some_s, _ = timed(lambda: masked(some_given, stacked), args.rounds)
    headers, sequence = [rt_slice(k, stacked) for k in range(few)], contour_sequence(some, stacked)
    rt_s, rt = timed(lambda: by_rt_utils(sequence, headers), 1)
    print(f"rt-utils         {len(some)} outlines {rt_s:.2f} s, gpuprep {some_s:.2f} s")
    return {
        "outlines": len(contours),
        "points_each": POINTS,
        "gpuprep_s": ours_s,
        "gpuprep_from_rtstruct_s": file_s,
        "dcmrtstruct2nii_s": rival_s,
        "dcmrtstruct2nii_ratio": rival_s / ours_s,
        "dcmrtstruct2nii_differing_share_of_mask": float((rival != ours).sum() / ours.sum()),
        "rt_utils": {
            "outlines": len(some),
            "seconds": rt_s,
            "gpuprep_s": some_s,
            "ratio": rt_s / some_s,
            "differing_share_of_mask": float((rt != ours[:few]).sum() / ours[:few].sum()),
        },
        "rtstruct_differing_share_of_mask": float((from_file != ours).sum() / ours.sum()),
        "rivals": {name: version(name) for name in ("dcmrtstruct2nii", "rt-utils", "scikit-image", "opencv-python")},
        "python": sys.version.split()[0],
    }


def rt_slice(k: int, stacked: Stack) -> Dataset:
    """Return what rt-utils wants to know of a slice."""
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
