"""dicom2nifti: DICOM to one NIfTI file, without resampling."""

from __future__ import annotations

from pathlib import Path

from dicom2nifti.convert_dicom import dicom_series_to_nifti


def convert(folder: Path, out: Path) -> None:
    out.mkdir(parents=True)
    dicom_series_to_nifti(str(folder), str(out / "volume.nii"), reorient_nifti=False)
