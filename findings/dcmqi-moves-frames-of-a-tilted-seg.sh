#!/usr/bin/env bash
# dcmqi==1.5.7 (segimage2itkimage, by which 3D Slicer reads DICOM SEG), highdicom==0.28.2, pydicom==3.0.2, SimpleITK==2.5.7:
# frames that are no regular stack, as those of a CT with a tilted gantry or with uneven slices, are put on a regular grid,
# without interpolation, error or warning. SEG has a position per frame, and permits both.
# Ten slices of 2 × 2 × 3 mm, one voxel in each. Tilted: each slice lies 0.8 mm (15°) behind the one below. Uneven: the last two
# lie 1 mm further up.
# Output seen:
#   regular: exit code 0, no word of it, voxels displaced by up to 0.0 mm
#   tilted: exit code 0, no word of it, voxels displaced by up to 7.2 mm
#   uneven: exit code 0, no word of it, voxels displaced by up to 1.0 mm
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q dcmqi==1.5.7 highdicom==0.28.2 pydicom==3.0.2 SimpleITK==2.5.7
here=$(realpath "$0")
cd "$work"
venv/bin/python - >seen <<'END'
import re
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import SimpleITK
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, generate_uid


def image(position, study, series, frame):
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
    for keyword in "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split():
        setattr(ds, keyword, None)
    ds.Modality, ds.Rows, ds.Columns = "CT", 8, 10
    ds.ImagePositionPatient, ds.ImageOrientationPatient = position, [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [2, 2], 3
    return ds


CASES = {
    "regular": lambda k: [-100, -120, 3 * k],
    "tilted": lambda k: [-100, -120 + 0.8 * k, 3 * k],
    "uneven": lambda k: [-100, -120, 3 * k + (1 if k > 7 else 0)],
}
for n, (name, position) in enumerate(CASES.items()):
    uids = [generate_uid() for _ in range(3)]
    images = [image(position(k), *uids) for k in range(10)]
    mask = np.zeros((10, 8, 10), np.uint8)
    mask[:, 3, 4] = 1
    algorithm = highdicom.AlgorithmIdentificationSequence("x", codes.cid7162.ArtificialIntelligence, "1")
    segment = highdicom.seg.SegmentDescription(
        1, "liver", codes.cid7150.AnatomicalStructure, codes.SCT.Liver, "AUTOMATIC", algorithm
    )
    seg = highdicom.seg.Segmentation(
        images, mask, "BINARY", [segment], series_instance_uid=generate_uid(), series_number=1,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x", manufacturer_model_name="x",
        software_versions="1", device_serial_number="1",
    )
    seg.save_as(f"{n}.dcm")
    true = np.array([[p[0] + 4 * 2, p[1] + 3 * 2, p[2]] for p in map(position, range(10))])
    Path(f"volume{n}").mkdir()
    ran = subprocess.run(
        ["venv/bin/segimage2itkimage", "--inputDICOM", f"{n}.dcm", "--outputDirectory", f"volume{n}"],
        capture_output=True, text=True,
    )
    words = re.search("tilt|shear|irregular|uneven|not equal|inconsistent|resampl", ran.stdout + ran.stderr, re.IGNORECASE)
    volume = SimpleITK.ReadImage(f"volume{n}/1.nrrd")
    found = np.argwhere(SimpleITK.GetArrayFromImage(volume))[:, ::-1]
    found = np.array([volume.TransformIndexToPhysicalPoint(tuple(map(int, v))) for v in found])
    found = found[found[:, 2].argsort()]
    print(
        f"{name}: exit code {ran.returncode}, {'it says ' + words[0] if words else 'no word of it'}, "
        f"voxels displaced by up to {np.linalg.norm(found - true, axis=1).max():.1f} mm"
    )
END
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
