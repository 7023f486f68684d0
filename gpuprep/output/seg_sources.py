"""Reads from the original images what a DICOM SEG has to repeat: patient, study, and the plane of each slice."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Vector3, directions
from gpuprep.core.series import MALFORMED_UID_PREFIX, SliceHeader
from gpuprep.dicom.header_values import Frame, decimal_of, decimals_of, frames_of
from gpuprep.errors import DecodeError, GeometryError, InputError, MissingTagError
from gpuprep.files.bounded_reader import open_bounded

if TYPE_CHECKING:
    import pydicom
    from pydicom import Dataset

_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"

_REPEATED = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientSize",
    "PatientWeight", "EthnicGroup", "PatientComments", "PatientIdentityRemoved", "DeidentificationMethod",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID", "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription", "PositionReferenceIndicator",
)  # fmt: skip
"""Attributes of patient, study and frame of reference that are repeated, where the first image has them."""

_NEEDED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes that a SEG has in any case, if without value (type 2)."""

NEGLIGIBLE_MM = 0.05
"""Distance of a slice from a regular grid that needs no note."""

_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


@dataclass(frozen=True, slots=True)
class Original:
    """The image of one slice, as others refer to it."""

    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None
    """Number of the frame, from 1; None for a single-frame image."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Original images of the slices."""

    images: list[Dataset]
    """A single-frame image for each slice, as highdicom needs it, also for a frame of a multi-frame image. Its SOP
    Instance UID is its number."""
    originals: tuple[Original, ...]
    notes: tuple[str, ...]

    def refer(self, seg: Dataset) -> None:
        """Replace the references of a data set to `images` by those to the originals."""
        from pydicom import Dataset

        by_series: dict[str, dict[str, Dataset]] = defaultdict(dict)
        for original in self.originals:
            by_series[original.series_uid].setdefault(original.sop_instance_uid, _reference(original))
        seg.SourceImageSequence = [item for items in by_series.values() for item in items.values()]
        seg.ReferencedSeriesSequence = []
        for uid, items in by_series.items():
            series = Dataset()
            series.SeriesInstanceUID = uid
            series.ReferencedInstanceSequence = list(items.values())
            seg.ReferencedSeriesSequence.append(series)
        derivations = [d for f in seg.PerFrameFunctionalGroupsSequence for d in f.get("DerivationImageSequence", ())]
        # Frames of different segments share an item.
        for item in {id(item): item for d in derivations for item in d.SourceImageSequence}.values():
            original = self.originals[int(item.ReferencedSOPInstanceUID.rpartition(".")[2])]
            item.update(_reference(original))
            if original.frame is not None:
                item.ReferencedFrameNumber = original.frame

    def uids(self, values: NDArray[Any], *texts: Any) -> Callable[[str], str]:
        """Return a function from a purpose to a UID that depends on the labels, the originals and `texts`."""
        from pydicom.uid import generate_uid

        digest = hashlib.sha256(np.ascontiguousarray(values).data)
        digest.update(repr((self.originals, texts)).encode(errors="surrogatepass"))
        return lambda purpose: str(generate_uid(entropy_srcs=[purpose, digest.hexdigest()]))


def read_sources(headers: Sequence[SliceHeader], matrix: tuple[int, ...]) -> Sources:
    """Read the headers of the original images.

    Parameters
    ----------
    headers : sequence of SliceHeader
        Slices in spatial order.
    matrix : tuple of int
        Rows and columns of the labels.

    Raises
    ------
    InputError
        If an original cannot be read, has changed since the scan, or lacks what a segmentation has to repeat.
    """
    notes: list[str] = []
    images: list[Dataset] = []
    originals: list[Original] = []
    common: Dataset | None = None
    for header, ds in _opened(headers):
        original = _original(header, ds)
        if (rows_columns := (ds.get("Rows"), ds.get("Columns"))) != tuple(matrix):
            raise InputError(
                f"{header.name} has {rows_columns[0]} × {rows_columns[1]} pixels, and the labels {matrix[0]} × "
                f"{matrix[1]}: restore them on the original slices first"
            )
        if common is None:
            common = _common(header, ds, original, notes)
        elif ds.get("StudyInstanceUID") != common.StudyInstanceUID:
            raise InputError(f"{header.name} is of another study than {headers[0].name}")
        if ds.get("LossyImageCompression") == "01":
            for keyword in _LOSSY:
                if keyword in ds:
                    common[keyword] = ds[keyword]
        images.append(_image(len(images), header, common))
        originals.append(original)
    _check_distinct(headers, originals)
    if common is not None and (deviation_mm := _deviation_mm(headers, common.ImageOrientationPatient)) > NEGLIGIBLE_MM:
        notes.append(
            f"slices leave a regular grid by up to {deviation_mm:.2g} mm: programs that read a SEG as a volume (dcmqi, "
            "3D Slicer) move them there"
        )
    if common is not None and "LossyImageCompression" in common:  # also those before the first lossy one
        for image in images:
            image.update({common[keyword].tag: common[keyword] for keyword in _LOSSY if keyword in common})
    return Sources(images, tuple(originals), tuple(notes))


def _opened(headers: Iterable[SliceHeader]) -> Iterator[tuple[SliceHeader, pydicom.Dataset]]:
    """Yield each header with the data set of its file, without pixels; the last file is kept for its other frames."""
    import pydicom

    last: tuple[tuple[str, str | None], pydicom.Dataset] | None = None
    for header in headers:
        key = header.path, header.member
        if last is None or last[0] != key:
            try:
                with open_bounded(header.path, header.member) as f:
                    ds = pydicom.dcmread(f, force=True, stop_before_pixels=True)
            except OSError as exc:
                raise DecodeError(f"{header.name} cannot be read: {exc.strerror or exc}") from exc
            except Exception as exc:  # pydicom raises exceptions of many types for damaged files
                raise DecodeError(f"{header.name} cannot be read: {' '.join(str(exc).split())}") from exc
            last = key, ds
        yield header, last[1]


def _original(header: SliceHeader, ds: pydicom.Dataset) -> Original:
    uids = [str(ds.get(keyword) or "") for keyword in ("SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")]
    if not all(uids) or not ds.get("StudyInstanceUID"):
        raise MissingTagError(
            f"{header.name} lacks a UID of study, series, SOP class or SOP instance: a segmentation cannot refer to it"
        )
    known = header.sop_instance_uid
    if uids[2] != known and not known.startswith(MALFORMED_UID_PREFIX):
        raise DecodeError(f"{header.name} changed since the scan: run the same command again", "changed")
    return Original(uids[0], uids[1], uids[2], header.frame + 1 if "NumberOfFrames" in ds else None)


def _common(header: SliceHeader, ds: pydicom.Dataset, original: Original, notes: list[str]) -> Dataset:
    """Return what all images share: patient, study, frame of reference, orientation and pixel spacing."""
    from pydicom import Dataset
    from pydicom.uid import generate_uid
    from pydicom.valuerep import DA, TM, format_number_as_ds

    try:
        frame, _ = frames_of(ds)[min(header.frame, header.frames - 1)]
    except (ValueError, IndexError) as exc:
        raise DecodeError(f"{header.name} changed since the scan: run the same command again", "changed") from exc
    orientation = _numbers(header, frame, "ImageOrientationPatient", "Image Orientation (Patient)", 6)
    spacing = _numbers(header, frame, "PixelSpacing", "Pixel Spacing", 2)
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _REPEATED:
        with suppress(Exception):  # a malformed value is not repeated
            value = ds.get(keyword)
            if value is None:
                continue
            if keyword.endswith("Date"):
                DA(value)
            elif keyword.endswith("Time"):
                TM(value)
            setattr(common, keyword, str(value) if keyword.endswith("Name") else value)
    if common.get("PatientSex") not in ("M", "F", "O"):
        common.PatientSex = None
    for keyword in _NEEDED:
        if keyword not in common:
            setattr(common, keyword, None)
    common.FrameOfReferenceUID = ds.get("FrameOfReferenceUID")
    if not common.FrameOfReferenceUID:
        common.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame of reference", original.series_uid])
        notes.append(f"{header.name} has no Frame of Reference UID: the segmentation has a new one")
    common.Modality, common.SOPClassUID, common.SeriesInstanceUID = "CT", _CT_IMAGE, original.series_uid
    common.Rows, common.Columns = ds.Rows, ds.Columns
    common.ImageOrientationPatient = orientation
    common.PixelSpacing = spacing
    thickness_mm = decimal_of(frame, "SliceThickness")
    common.SliceThickness = None if thickness_mm is None else format_number_as_ds(thickness_mm)
    return common


def _numbers(header: SliceHeader, frame: Frame, keyword: str, name: str, count: int) -> list[str]:
    """Return numbers of an image as decimal strings."""
    from pydicom.valuerep import format_number_as_ds

    found = decimals_of(frame, keyword, count)
    if found is None:
        raise MissingTagError(f"{header.name} has no readable {name}")
    return [str(format_number_as_ds(v)) for v in found]


def _image(number: int, header: SliceHeader, common: Dataset) -> Dataset:
    """Return a slice as a single-frame image."""
    from pydicom import Dataset
    from pydicom.valuerep import format_number_as_ds

    if header.position_mm is None:
        raise MissingTagError(f"{header.name} has no Image Position (Patient)")
    image = Dataset()
    image.update(common)
    image.SOPInstanceUID = f"2.25.{number}"
    image.ImagePositionPatient = [format_number_as_ds(v) for v in header.position_mm]
    return image


def _check_distinct(headers: Sequence[SliceHeader], originals: Sequence[Original]) -> None:
    named: dict[Original, SliceHeader] = {}
    for header, original in zip(headers, originals, strict=True):
        if (former := named.setdefault(original, header)) is not header:
            raise InputError(
                f"{former.name} and {header.name} share a SOP Instance UID: a segmentation cannot refer to one of them",
                "duplicate",
            )
    seen: dict[Vector3 | None, SliceHeader] = {}
    for header in headers:
        if (other := seen.get(header.position_mm)) is not None:
            raise GeometryError(
                f"{other.name} and {header.name} share a position: a segmentation has one frame there", "duplicate"
            )
        seen[header.position_mm] = header


def _deviation_mm(headers: Sequence[SliceHeader], orientation: Any) -> float:
    """Return the largest distance in mm of a slice from an evenly spaced stack; missing slices do not matter."""
    axes = directions([float(v) for v in orientation])
    if axes is None:
        raise GeometryError(f"{headers[0].name} has no perpendicular Image Orientation (Patient)", "orientation")
    if len(headers) < 2:
        return 0.0
    offsets_mm = np.array([header.position_mm for header in headers], dtype=np.float64)
    offsets_mm -= offsets_mm[0]
    along_mm = offsets_mm @ axes[2]
    lateral_mm = np.linalg.norm(offsets_mm - along_mm[:, None] * axes[2], axis=1)
    steps = np.rint(along_mm / np.median(np.diff(along_mm)))
    # The spacing is measured over all slices: over many, the rounding of the nearest two would add up.
    return float(max(lateral_mm.max(), np.abs(along_mm - steps * (along_mm[-1] / max(steps[-1], 1))).max()))


def _reference(original: Original) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = original.sop_class_uid
    item.ReferencedSOPInstanceUID = original.sop_instance_uid
    return item
