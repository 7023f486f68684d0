#!/usr/bin/env bash
# SimpleITK==2.5.7, highdicom==0.28.2, pydicom==3.0.2: SimpleITK reads a DICOM SEG of one segment on adjacent slices with its
# spacing. If a slice between them has no voxel, and so no frame, the same call returns other voxel sizes and places.
# Nothing is raised or warned. Voxels of 2 × 2 × 3 mm; one of the segment on each slice, or on each but the second.
# Output seen:
#   adjacent: spacing 2 × 2 × 3 mm
#   adjacent: voxels in the file at x = -92 mm, z = -3, -6, -9, -12, -15 mm
#   adjacent: voxels in SimpleITK at x = -92 mm, z = -3, -6, -9, -12, -15 mm
#   with a gap: spacing 1 × 1 × 1 mm
#   with a gap: voxels in the file at x = -92 mm, z = -3, -6, -9, -15 mm
#   with a gap: voxels in SimpleITK at x = -96 mm, z = -3, -2, -1, 0 mm
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q highdicom==0.28.2 pydicom==3.0.2 SimpleITK==2.5.7
here=$(realpath "$0")
cd "$work"
venv/bin/python - >seen <<'END'
import highdicom
import numpy as np
import pydicom
import SimpleITK
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, generate_uid

study, series, frame = generate_uid(), generate_uid(), generate_uid()
images = []
for k in range(5):
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
    for keyword in "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split():
        setattr(ds, keyword, None)
    ds.Modality, ds.Rows, ds.Columns = "CT", 8, 10
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-100, -120, -15 + 3 * k], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [2, 2], 3
    images.append(ds)
algorithm = highdicom.AlgorithmIdentificationSequence("x", codes.cid7162.ArtificialIntelligence, "1")
segment = highdicom.seg.SegmentDescription(
    1, "liver", codes.cid7150.AnatomicalStructure, codes.SCT.Liver, "AUTOMATIC", algorithm
)
for what in ("adjacent", "with a gap"):
    mask = np.zeros((5, 8, 10), np.uint8)
    mask[:, 3, 4] = 1
    if what == "with a gap":
        mask[1] = 0
    seg = highdicom.seg.Segmentation(
        images, mask, "BINARY", [segment], series_instance_uid=generate_uid(), series_number=1,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x", manufacturer_model_name="x",
        software_versions="1", device_serial_number="1",
    )
    seg.save_as("seg.dcm")
    positions = [f.PlanePositionSequence[0].ImagePositionPatient for f in seg.PerFrameFunctionalGroupsSequence]
    true = [(p[0] + 4 * 2, p[2]) for p in positions]
    image = SimpleITK.ReadImage("seg.dcm")
    assert SimpleITK.GetArrayFromImage(image)[:, 3, 4].all()
    read = [image.TransformIndexToPhysicalPoint((4, 3, k))[::2] for k in range(len(true))]
    print(f"{what}: spacing {' × '.join(f'{s:g}' for s in image.GetSpacing())} mm")
    for name, points in (("in the file", true), ("in SimpleITK", read)):
        print(f"{what}: voxels {name} at x = {points[0][0]:g} mm, z = {', '.join(f'{z:g}' for _, z in points)} mm")
END
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
