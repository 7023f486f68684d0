"""Columns of real CT series, compared with what pydicom alone reads from the files of their slices."""

from __future__ import annotations

import gzip
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
from both_ways import pydicom_alone
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.multival import MultiValue

import gpuprep
from gpuprep.core.series import Description, Dose, SliceHeader
from gpuprep.dicom import describe
from gpuprep.dicom.element_stream import read_ordinary_header
from gpuprep.dicom.header_values import Frame
from gpuprep.dicom.parse_header import parse_header
from gpuprep.output.columns import FACTS
from gpuprep.pipeline.scan import Scan

SAME_POSITION_MM = 0.02
PLANES = ("sagittal", "coronal", "axial")
NO_AGENT = {"NONE", "NO", "N", "NON", "0", "-", "NA", "N/A", "W/O", "WITHOUT", "NO CONTRAST", "UNENHANCED", "NATIVE"}

TEXTS = {
    "image_type": ("FrameType", "ImageType"),
    "kernel": ("ConvolutionKernel",),
    "manufacturer": ("Manufacturer",),
    "model": ("ManufacturerModelName",),
    "body_part": ("BodyPartExamined",),
    "patient_position": ("PatientPosition",),
    "scan_options": ("ScanOptions",),
    "acquisition_type": ("AcquisitionType",),
    "series_description": ("SeriesDescription",),
    "protocol_name": ("ProtocolName",),
    "study_description": ("StudyDescription",),
    "frame_of_reference_uid": ("FrameOfReferenceUID",),
}
NUMBERS = {
    "slice_thickness_mm": "SliceThickness",
    "kvp": "KVP",
    "reconstruction_diameter_mm": "ReconstructionDiameter",
    "pitch": "SpiralPitchFactor",
}
MEANS = {
    "tube_current_ma": ("XRayTubeCurrentInmA", "XRayTubeCurrent"),
    "exposure_mas": ("ExposureInmAs", "Exposure"),
    "ctdivol_mgy": ("CTDIvol",),
}


class Layers:
    """Macros of a frame, then the shared ones, then the image itself: the first that has an attribute tells it."""

    def __init__(self, ds: Dataset, frame: int) -> None:
        own = ds.get("PerFrameFunctionalGroupsSequence")
        shared = ds.get("SharedFunctionalGroupsSequence")
        groups = [*([own[frame]] if own else []), *(list(shared) if own and shared else [])]
        self.all: list[Dataset] = [macro[0] for group in groups for macro in sequences_of(group) if macro]
        self.all.append(ds)

    def value(self, keyword: str) -> Any:
        """Return the value as pydicom converts it; None if it is absent, empty or malformed."""
        for ds in self.all:
            if keyword in ds:
                try:
                    value = ds.get(keyword)
                except ValueError:
                    return None
                return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value
        return None

    def text(self, *keywords: str) -> str:
        """Return the first of several attributes that is not empty, as text."""
        for keyword in keywords:
            value = self.value(keyword)
            parts = [str(part).strip(" \0") for part in (value if isinstance(value, MultiValue) else [value or ""])]
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in "\\".join(parts))
            if text:
                return text[:64]
        return ""

    def number(self, *keywords: str) -> float | None:
        """Return the first of several attributes that is a single number."""
        for keyword in keywords:
            value = self.value(keyword)
            if value is not None and not isinstance(value, MultiValue):
                return float(value)
        return None

    def numbers(self, keyword: str) -> NDArray[np.float64] | None:
        """Return several numbers."""
        value = self.value(keyword)
        return None if value is None else np.array([float(v) for v in value])


def sequences_of(group: Dataset) -> Iterable[Any]:
    return [element.value for element in group if element.VR == "SQ"]


@cache
def read_by_pydicom(path: str, member: str | None) -> Dataset:
    content = Path(path).read_bytes()
    if member:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(member)
    elif member == "":
        content = gzip.decompress(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(BytesIO(content), force=True, stop_before_pixels=True)


def layers_of(slices: Iterable[SliceHeader]) -> list[Layers]:
    """Return the attributes of slices, in the order of the paths and frames."""
    ordered = sorted(slices, key=lambda s: (s.path, s.member or "", s.frame))
    return [Layers(read_by_pydicom(s.path, s.member), s.frame) for s in ordered]


def most_frequent(values: Iterable[Any], nothing: Any = None) -> Any:
    """Return the most frequent value that tells something, the first of equally frequent ones."""
    counts = Counter(value for value in values if value not in (None, "", "unknown"))
    return next((v for v in counts if counts[v] == max(counts.values())), nothing)


def contrast_of(image: Layers) -> str:
    """Return whether there was contrast medium: a phase before it overrules all else, empty attributes do not count.

    Any attribute that tells of contrast medium outweighs those that deny it.
    """
    phase = image.text("ContrastBolusAgentPhase").upper()
    if phase == "PRE_CONTRAST":
        return "no"
    told = [phase] if phase else []
    denied: list[str] = []
    for keyword in ("ContrastBolusAgent", "ContrastBolusRoute"):
        word = image.text(keyword).upper()
        if word:
            (denied if word in NO_AGENT else told).append(word)
    for keyword in ("ContrastBolusAgentAdministered", "ContrastBolusAgentDetected"):
        word = image.text(keyword).upper()
        if word in ("YES", "NO"):
            (told if word == "YES" else denied).append(word)
    volume = image.number("ContrastBolusVolume")
    if volume is not None:
        (told if volume > 0 else denied).append(f"{volume} ml")
    return "yes" if told else "no" if denied else "unknown"


class Grid(NamedTuple):
    """Geometry of a stack."""

    plane: str | None = None
    slice_spacing_mm: float | None = None
    extent_mm: float | None = None


def grid_of(images: Sequence[Layers]) -> Grid:
    orientation = images[0].numbers("ImageOrientationPatient")
    if orientation is None:
        return Grid()
    normal = np.cross(orientation[:3], orientation[3:])
    normal /= np.linalg.norm(normal)
    plane = PLANES[int(np.argmax(np.abs(normal)))]
    images_at: dict[float, set[str]] = defaultdict(set)
    along = []
    for image in images:
        position = image.numbers("ImagePositionPatient")
        if position is None:
            return Grid(plane)
        along.append(float(position @ normal))
        images_at[round(along[-1], 1)].add(image.text("SOPInstanceUID"))
    along.sort()
    distinct = along[:1]
    for place in along:
        if place - distinct[-1] > SAME_POSITION_MM:
            distinct.append(place)
    # If several images share a position, nobody knows which of them is the slice.
    if len(distinct) < 2 or any(len(uids) > 1 for uids in images_at.values()):
        return Grid(plane)
    spacing = median(np.diff(distinct).tolist())
    return Grid(plane, spacing, along[-1] - along[0] + spacing)


def expected_facts(images: Sequence[Layers]) -> dict[str, Any]:
    """Return the columns that the files of a series tell, from pydicom."""
    found: dict[str, Any] = dict(grid_of(images)._asdict())
    for name, keywords in TEXTS.items():
        found[name] = most_frequent(image.text(*keywords) for image in images)
    for name, keyword in NUMBERS.items():
        found[name] = most_frequent(image.number(keyword) for image in images)
    for name, keywords in MEANS.items():
        known = [value for image in images if (value := image.number(*keywords)) is not None]
        found[name] = fmean(known) if known else None
    found["contrast"] = most_frequent(map(contrast_of, images), "unknown")
    rows, columns, spacing = (images[0].value(k) for k in ("Rows", "Columns", "PixelSpacing"))
    between_rows, between_columns = map(float, spacing or (np.nan, np.nan))
    found |= {
        "rows": rows,
        "columns": columns,
        "row_spacing_mm": between_rows,
        "column_spacing_mm": between_columns,
        "fov_rows_mm": (rows or np.nan) * between_rows,
        "fov_columns_mm": (columns or np.nan) * between_columns,
    }
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in found.items()}


def study_orders(cohort: Iterable[Sequence[Layers]]) -> dict[tuple[str, str], int]:
    """Return the number of each dated study of a patient, by patient and study."""
    times: dict[str, dict[str, str]] = defaultdict(dict)
    for images in cohort:
        patient, study = images[0].text("PatientID"), images[0].text("StudyInstanceUID")
        dated = [image.text("StudyDate") + image.text("StudyTime") for image in images if image.text("StudyDate")]
        if patient and study and dated:
            times[patient][study] = min(times[patient].get(study, "9"), most_frequent(dated))
    return {
        (patient, study): 1 + sum((time, uid) < (studies[study], study) for uid, time in studies.items())
        for patient, studies in times.items()
        for study in studies
    }


class Found(NamedTuple):
    """Columns of one series: of gpuprep, and expected."""

    source: str
    row: dict[str, Any]
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def scanned(data: Path) -> Scan:
    return gpuprep.scan(data)


@pytest.fixture(scope="module")
def series(data: Path, scanned: Scan) -> list[Found]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid values, when pydicom converts them
        cohort = [layers_of(planned.series.slices) for planned in scanned.planned]
        orders = study_orders(cohort)
        found = []
        for images, row in zip(cohort, scanned.rows(), strict=True):
            patient, study = images[0].text("PatientID"), images[0].text("StudyInstanceUID")
            expected = expected_facts(images) | {"study_order": orders.get((patient, study))}
            source = Path(row["source"]).relative_to(data).as_posix()
            found.append(Found(f"{source} {row['key']}", row, expected))
    return found


RELATIONS = {"group_id", "duplicate_of", "phase", "phase_unit", "phase_source"}
"""Columns that no file of the series tells by itself."""
IN_NO_FILE = {"acquisition_type"}


@pytest.mark.parametrize("column", sorted(FACTS.keys() - RELATIONS))
def test_every_series_has_the_values_that_pydicom_reads_from_its_files(column: str, series: list[Found]) -> None:
    got = {found.source: found.row[column] for found in series}
    expected = {found.source: found.expected[column] for found in series}
    for source, value in expected.items():
        if isinstance(value, float):
            expected[source] = pytest.approx(value, rel=1e-9, abs=1e-9)
    assert got == expected
    assert len(got) > 30
    assert any(value is not None for value in got.values()) == (column not in IN_NO_FILE)


def test_the_only_phase_of_a_4d_scan_has_no_phase(series: list[Found]) -> None:
    # "P4^P113^S303^I10349, Gated, 40.0%B": a percentage without others of the scan may be any other one.
    (row,) = (found.row for found in series if found.source.startswith("4dlung"))
    assert row["series_description"] == "P4^P113^S303^I10349, Gated, 40.0%B"
    assert (row["phase"], row["phase_unit"], row["phase_source"]) == (None, None, None)


Told = tuple[Description, Dose, float | None]


def told_of(file: Path) -> Told:
    """Return description, dose and acquisition time of an image."""
    describe._known.clear()
    with file.open("rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = Frame(parse_header(f, no_preamble=False).dataset)
        return describe.description_of(frame), describe.dose_of(frame), describe.acquired_of(frame)


def test_headers_read_from_their_bytes_tell_the_same_as_through_pydicom(data: Path) -> None:
    different, read = {}, 0
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        with file.open("rb") as f:
            if read_ordinary_header(f) is None:  # pydicom reads it anyway
                continue
        from_bytes = told_of(file)
        with pydicom_alone():
            by_pydicom = told_of(file)
        if from_bytes != by_pydicom:
            different[file] = from_bytes, by_pydicom
        read += 1
    assert not different
    assert read > 500
