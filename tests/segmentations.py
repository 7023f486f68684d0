"""Writers of RTSTRUCT and SEG like those of other programs, and checks of what reads them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from pydicom.valuerep import format_number_as_ds

from gpuprep.core.geometry import Geometry
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.dicom_objects import read_object
from gpuprep.masks.model import Segmentation, Structure

CT = "1.2.840.10008.5.1.4.1.1.2"
DEFLATED_FRAMES = UID("1.2.840.10008.1.2.8.1")
UNCOMPRESSED = UID("1.2.840.10008.1.2.1.98")
ENCODERS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
"""Plugins for encoding; pydicom would use GDCM if it is installed, which ends the process on small frames."""


def read(path: Path, threshold: float = 0.5) -> Segmentation:
    """Read a structure set or segmentation image."""
    return read_object(str(path), ReadingOptions(threshold=threshold))


def refused(path: Path) -> str:
    """Return the message of the error of a file that cannot be read; it must be one line without the patient."""
    with pytest.raises(SegmentationError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert "Doe" not in text
    assert "4711" not in text
    return text


def check_truncations_are_refused(path: Path, content: bytes) -> None:
    """Write every proper beginning of a content to a file, and check that it is refused."""
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


def read_damaged(path: Path, data: st.DataObject) -> Segmentation | None:
    """Change up to 4 bytes of a file; return its structures, or None if it is refused with one line."""
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        return read(path)
    except SegmentationError as exc:
        assert "\n" not in str(exc)  # noqa: PT017 - damage may be harmless
        return None


def setting(**attributes: Any) -> Callable[[Dataset], None]:
    """Return a function that sets attributes of a data set."""

    def change(ds: Dataset) -> None:
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)

    return change


def write_rtstruct(
    path: Path,
    rois: Mapping[str, Sequence[ArrayLike]],
    *,
    series_uid: str = "1.2.3.4",
    frame_uid: str = "1.2.3.5",
    sop_uids: Sequence[str] = (),
    kind: str = "CLOSED_PLANAR",
    syntax: UID = ExplicitVRLittleEndian,
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Write a structure set; ROIs are numbered from 1.

    Parameters
    ----------
    path : Path
        The file.
    rois : mapping of str to arrays of shape (n, 3)
        Contours of each ROI, points as (x, y, z) in mm.
    series_uid, frame_uid : str
        UIDs of the series and of its frame of reference.
    sop_uids : sequence of str
        UIDs of the images of the series.
    kind : str
        *Contour Geometric Type* of all contours.
    syntax : UID
        Transfer syntax.
    change : callable, optional
        Function that changes the data set before it is written.
    """
    ds = _object("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", syntax)
    ds.StructureSetLabel = "test"
    image = [_item(ReferencedSOPClassUID=CT, ReferencedSOPInstanceUID=u) for u in sop_uids]
    series = _item(SeriesInstanceUID=series_uid, ContourImageSequence=image)
    study = _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID="1.2.3.6",
        RTReferencedSeriesSequence=[series],
    )
    ds.ReferencedFrameOfReferenceSequence = [_item(FrameOfReferenceUID=frame_uid, RTReferencedStudySequence=[study])]
    ds.StructureSetROISequence = [
        _item(ROINumber=n, ReferencedFrameOfReferenceUID=frame_uid, ROIName=name, ROIGenerationAlgorithm="MANUAL")
        for n, name in enumerate(rois, 1)
    ]
    ds.ROIContourSequence = []
    for n, contours in enumerate(rois.values(), 1):
        roi = _item(ROIDisplayColor=[255, 0, 0], ReferencedROINumber=n)
        if contours:
            roi.ContourSequence = [_contour(np.asarray(points, dtype=float), kind) for points in contours]
        ds.ROIContourSequence.append(roi)
    return _written(path, ds, change)


def _contour(points: NDArray[np.float64], kind: str) -> Dataset:
    item = _item(NumberOfContourPoints=len(points))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CLOSED_PLANAR_XOR exceeds the 16 characters of a code string
        item.ContourGeometricType = kind
    item.ContourData = [format_number_as_ds(float(v)) for v in points.ravel()]
    return item


def write_seg(
    path: Path,
    masks: Mapping[str, NDArray[Any]],
    geometry: Geometry,
    *,
    kind: Literal["binary", "fractional", "labelmap"] = "binary",
    sparse: bool = True,
    numbers: Sequence[int] | None = None,
    bits: int | None = None,
    whole: int = 255,
    padding: int | None = None,
    series_uid: str = "1.2.3.4",
    frame_uid: str = "1.2.3.5",
    sop_uids: Sequence[str] = (),
    placed: bool = True,
    syntax: UID = ExplicitVRLittleEndian,
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Write a segmentation image.

    Parameters
    ----------
    path : Path
        The file.
    masks : mapping of str to array, shape (k, rows, columns)
        Masks of the segments; for a fractional object, shares from 0 to 1. In a label map, later segments overwrite.
    geometry : Geometry
        Grid of the masks.
    kind : str
        *Segmentation Type*.
    sparse : bool
        Whether to omit frames without pixels; one frame is written in any case.
    numbers : sequence of int, optional
        *Segment Number* of each segment; by default 1, 2, ….
    bits : int, optional
        *Bits Allocated*; by default 1 for a binary object, else 8.
    whole : int
        *Maximum Fractional Value*.
    padding : int, optional
        *Pixel Padding Value*, the background of a label map.
    series_uid, frame_uid : str
        UIDs of the series and of its frame of reference.
    sop_uids : sequence of str
        UID of the image of each slice.
    placed : bool
        Whether frames have a position, an orientation and a pixel spacing.
    syntax : UID
        Transfer syntax; also RLE, JPEG-LS, JPEG 2000, deflated frames and uncompressed fragments.
    change : callable, optional
        Function that changes the data set before it is written.
    """
    numbers = numbers or range(1, len(masks) + 1)
    bits = bits or (1 if kind == "binary" else 8)
    label_map = "1.2.840.10008.5.1.4.1.1.66.7"
    ds = _object(label_map if kind == "labelmap" else "1.2.840.10008.5.1.4.1.1.66.4", "SEG", ExplicitVRLittleEndian)
    ds.FrameOfReferenceUID = frame_uid
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows, ds.Columns = geometry.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.SegmentationType = kind.upper()
    if kind == "fractional":
        ds.SegmentationFractionalType, ds.MaximumFractionalValue = "PROBABILITY", whole
    if padding is not None:
        ds.PixelPaddingValue = padding
    ds.SegmentSequence = [
        _item(SegmentNumber=n, SegmentLabel=name, SegmentAlgorithmType="MANUAL")
        for n, name in zip(numbers, masks, strict=True)
    ]
    images = [_item(ReferencedSOPClassUID=CT, ReferencedSOPInstanceUID=u) for u in sop_uids]
    ds.ReferencedSeriesSequence = [_item(SeriesInstanceUID=series_uid, ReferencedInstanceSequence=images)]

    frames: list[tuple[int | None, int, NDArray[Any]]] = []
    if kind == "labelmap":
        values = np.full(geometry.shape, padding or 0, "<u2" if bits == 16 else "u1")
        for n, mask in zip(numbers, masks.values(), strict=True):
            values[mask] = n
        frames = [(None, k, plane) for k, plane in enumerate(values)]
        kept = [f for f in frames if (f[2] != (padding or 0)).any()]
    else:
        for n, mask in zip(numbers, masks.values(), strict=True):
            stored = np.rint(mask * whole).astype("<u2" if bits == 16 else "u1") if kind == "fractional" else mask
            frames += [(n, k, plane) for k, plane in enumerate(stored)]
        kept = [f for f in frames if f[2].any()]
    if sparse:
        frames = kept or frames[:1]
    step, column, row = geometry.affine[:3, :3].T
    shared = _item()
    if placed:
        cosines = [*(row / np.linalg.norm(row)), *(column / np.linalg.norm(column))]
        shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=_decimals(cosines))]
        spacing = [np.linalg.norm(column), np.linalg.norm(row)]
        thickness = _decimals([np.linalg.norm(step)])
        shared.PixelMeasuresSequence = [
            _item(SliceThickness=thickness, SpacingBetweenSlices=thickness, PixelSpacing=_decimals(spacing))
        ]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for number, k, _ in frames:
        group = _item()
        if sop_uids:
            group.DerivationImageSequence = [_item(SourceImageSequence=[images[k]])]
        if placed:
            where = _item(ImagePositionPatient=_decimals(geometry.points_mm((k, 0, 0))))
            group.PlanePositionSequence = [where]
        if number is not None:
            group.SegmentIdentificationSequence = [_item(ReferencedSegmentNumber=number)]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.NumberOfFrames = len(frames)
    stack = np.array([plane for _, _, plane in frames])
    _put_pixels(ds, stack, bits, syntax)
    _written(path, ds, change)
    if syntax == DEFLATED_FRAMES:
        path.write_bytes(path.read_bytes().replace(JPEG2000Lossless.encode(), syntax.encode() + b"\0", 1))
    return path


def _put_pixels(ds: Dataset, stack: NDArray[Any], bits: int, syntax: UID) -> None:
    def packed(values: NDArray[Any]) -> bytes:
        if bits == 1:
            return np.packbits(values.ravel() != 0, bitorder="little").tobytes()
        return values.astype("<u2" if bits == 16 else "u1").tobytes()

    data = packed(stack)
    ds["PixelData"] = pydicom.DataElement(0x7FE0_0010, "OW" if bits == 16 else "OB", data + bytes(len(data) % 2))
    if syntax == UNCOMPRESSED:
        ds.file_meta.TransferSyntaxUID = syntax
        streams = [packed(plane) for plane in stack]
        ds["PixelData"] = pydicom.DataElement(0x7FE0_0010, "OB", encapsulate(streams), is_undefined_length=True)
    elif syntax == DEFLATED_FRAMES:
        streams = []
        for plane in stack:
            pack = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            streams.append(pack.compress(packed(plane)) + pack.flush())
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless  # pydicom cannot write the right one; replaced later
        ds["PixelData"] = pydicom.DataElement(0x7FE0_0010, "OB", encapsulate(streams), is_undefined_length=True)
    elif syntax.is_encapsulated:
        ds.compress(syntax, encoding_plugin=ENCODERS[syntax], generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = syntax


def placed(structure: Structure, geometry: Geometry) -> NDArray[np.bool_]:
    """Return the mask of a structure on a grid; the pixels of its rasters must coincide with voxels of the grid."""
    volume = np.zeros(geometry.shape, dtype=bool)
    back = np.linalg.inv(geometry.affine)
    for raster in structure.rasters:
        assert raster.geometry is not None
        corners = np.array([[0, 0, 0], [0, *np.array(raster.geometry.shape[1:]) - 1]])
        exact = raster.geometry.points_mm(corners) @ back[:3, :3].T + back[:3, 3]
        first, last = np.rint(exact).astype(int)
        np.testing.assert_allclose(exact, [first, last], atol=1e-3)
        assert first[0] == last[0]
        assert (last - first)[1:].tolist() == [raster.geometry.shape[1] - 1, raster.geometry.shape[2] - 1]
        row, column = first[1] + raster.row, first[2] + raster.column
        rows, columns = raster.mask.shape
        volume[first[0], row : row + rows, column : column + columns] |= raster.mask
    return volume


def _object(sop_class: str, modality: str, syntax: UID) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(sop_class)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID("1.2.3.7")
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.Modality = modality
    ds.PatientName, ds.PatientID = "Doe^Jane", "secret-4711"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.8", "1.2.3.9"
    return ds


def _item(**attributes: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def _decimals(values: ArrayLike) -> list[str]:
    return [format_number_as_ds(float(v)) for v in np.ravel(values)]


def _written(path: Path, ds: Dataset, change: Callable[[Dataset], None] | None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests write invalid values
        if change is not None:
            change(ds)
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path
