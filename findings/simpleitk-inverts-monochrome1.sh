#!/usr/bin/env bash
# simpleitk==2.5.7, pydicom==3.0.2: SimpleITK (GDCM) inverts the values of a MONOCHROME1 CT, pydicom does not.
# Photometric Interpretation defines the display of stored values; the rescale to HU comes before it (PS3.3, C.11.1 and
# C.7.6.3.1.2). SimpleITK computes low + high - value, with the limits of the 16-bit range, and then rescales.
# Output seen:
#   stored 1412, intercept -1024: pydicom 388, SimpleITK MONOCHROME2 388, MONOCHROME1 -2437
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q simpleitk==2.5.7 pydicom==3.0.2 numpy==2.4.6
"$work/venv/bin/python" - "$work" >"$work/seen" <<'END'
import sys

import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def written(photometric):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.Modality, ds.StudyInstanceUID, ds.SeriesInstanceUID = "CT", generate_uid(), generate_uid()
    ds.Rows = ds.Columns = 4
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1]
    ds.PixelData = np.full((4, 4), 1412, "<i2").tobytes()
    path = f"{sys.argv[1]}/{photometric}.dcm"
    ds.save_as(path, enforce_file_format=True)
    return path


one, two = written("MONOCHROME1"), written("MONOCHROME2")
by_pydicom = int(pydicom.dcmread(one).pixel_array[0, 0]) - 1024
by_itk = [int(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)).flat[0]) for path in (two, one)]
print(f"stored 1412, intercept -1024: pydicom {by_pydicom}, SimpleITK MONOCHROME2 {by_itk[0]}, MONOCHROME1 {by_itk[1]}")
END
cat "$work/seen"
sed -n 's/^#   //p' "$0" | diff - "$work/seen"
