"""A cohort of 60 patients, with the series that a hospital exports for each, written from a table."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import Dataset
from pydicom.uid import UID, SecondaryCaptureImageStorage

from gpuprep.testing import write_series

PATIENTS = 60
EXTENT_MM = 20.0
AXIAL = (1, 0, 0, 0, 1, 0)
CORONAL = (1, 0, 0, 0, 0, -1)


class Made(NamedTuple):
    """One series of every patient."""

    name: str
    """Folder, and end of the UID."""
    thickness_mm: float
    kernel: str
    acquired: str
    """*Acquisition Time*."""
    description: str
    image_type: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "AXIAL")
    agent: str = ""


SERIES = (
    Made("scout", 1.0, "T20s", "100000", "Topogram", ("ORIGINAL", "PRIMARY", "LOCALIZER")),
    Made("soft-1", 1.25, "B30f", "100100", "Thorax 1.25 B30f"),
    Made("soft-2", 2.5, "B30f", "100100", "Thorax 2.5 B30f"),
    Made("soft-5", 5.0, "B30f", "100100", "Thorax 5 B30f"),
    Made("sharp-1", 1.25, "B70f", "100100", "Thorax 1.25 B70f"),
    Made("sharp-2", 2.5, "B70f", "100100", "Thorax 2.5 B70f"),
    Made("sharp-5", 5.0, "B70f", "100100", "Thorax 5 B70f"),
    Made("arterial", 2.0, "B20f", "101000", "Abdomen arterial", agent="Iomeprol"),
    Made("venous", 2.0, "B20f", "101100", "Abdomen venous", agent="Iomeprol"),
    Made("coronal", 2.5, "B30f", "100100", "Thorax coronal", ("DERIVED", "PRIMARY", "MPR")),
    Made("dose", 1.0, "", "102000", "Patient Protocol"),
    Made("twin", 1.25, "B30f", "100100", "Thorax 1.25 B30f"),
)
"""The twin has the pixels of soft-1. In six patients soft-1 and its twin lack their middle half."""


NUMBERS = {made.name: n for n, made in enumerate(SERIES, 1)}


def study_uid(patient: int) -> str:
    """Return the UID of the study of a patient; all are of one length."""
    return f"1.2.826.0.1.{patient + 100}"


def uid(patient: int, name: str) -> str:
    """Return the UID of a series."""
    return f"{study_uid(patient)}.{NUMBERS[name]}"


def is_broken(patient: int) -> bool:
    """Whether soft-1 and its twin of a patient are rejected."""
    return patient % 10 == 3


def write_cohort(root: Path, patients: int = PATIENTS) -> Path:
    """Write the cohort: a folder per patient and series."""
    template = root / "template"
    for made in SERIES:
        files = _write(template / made.name, made)
        lost = set(files[len(files) // 4 : len(files) * 3 // 4]) if made.name in ("soft-1", "twin") else set()
        for file in files:
            content = file.read_bytes()
            for patient in range(patients):
                if not (is_broken(patient) and file in lost):
                    (folder := root / f"p{patient:02}" / made.name).mkdir(parents=True, exist_ok=True)
                    (folder / file.name).write_bytes(_of_patient(patient, content))
    shutil.rmtree(template)
    return root


def _of_patient(patient: int, content: bytes) -> bytes:
    """Return a file of the first patient as that of another one, with another last pixel."""
    content = content.replace(study_uid(0).encode(), study_uid(patient).encode())
    content = content.replace(_day(0).encode(), _day(patient).encode()).replace(b"P00", f"P{patient:02}".encode())
    return content[:-2] + patient.to_bytes(2, "little")


def _day(patient: int) -> str:
    """Return the date of the study of a patient."""
    return f"2020{patient // 28 + 1:02}{patient % 28 + 1:02}"


def _write(folder: Path, made: Made) -> list[Path]:
    count = 1 if made.name in ("scout", "dose") else round(EXTENT_MM / made.thickness_mm)
    # The twin has the pixels of soft-1.
    stored = np.random.default_rng(NUMBERS["soft-1" if made.name == "twin" else made.name]).integers(
        0, 2000, (count, 8, 8)
    )
    return write_series(
        folder,
        stored.astype(np.int16),
        (made.thickness_mm, 2.5, 2.5),
        series_uid=uid(0, made.name),
        series_number=NUMBERS[made.name],
        # Half of an outer slice or row lies beyond its centre, so all extents are equal.
        origin_mm=(-10.0, 10.0, 18.75) if made.name == "coronal" else (-10.0, -10.0, made.thickness_mm / 2),
        orientation=CORONAL if made.name == "coronal" else AXIAL,
        change=partial(_change, made),
    )


def _change(made: Made, ds: Dataset, k: int) -> None:
    ds.PatientID, ds.StudyInstanceUID = "P00", study_uid(0)
    ds.FrameOfReferenceUID = f"{ds.StudyInstanceUID}.0"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"{uid(0, made.name)}.{k + 1}")
    ds.StudyDate = ds.AcquisitionDate = _day(0)
    ds.StudyTime, ds.AcquisitionTime = "095959", made.acquired
    ds.ImageType, ds.SeriesDescription = list(made.image_type), made.description
    ds.KVP, ds.XRayTubeCurrent, ds.Exposure = "120", "200", "100"
    ds.Manufacturer, ds.ManufacturerModelName, ds.BodyPartExamined = "SIEMENS", "Sensation 64", "CHEST"
    ds.PatientPosition, ds.StudyDescription = "HFS", "Routine"
    if made.kernel:
        ds.ConvolutionKernel = made.kernel
    if made.agent:
        ds.ContrastBolusAgent = made.agent
    if made.name == "dose":
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
