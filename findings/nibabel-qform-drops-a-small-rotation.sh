#!/usr/bin/env bash
# nibabel==5.4.2, numpy==2.4.6, SimpleITK==2.5.5: get_qform() loses a rotation of less than 0.07° from a half turn.
# An axial CT is turned by 180° from LPS to RAS, so this is any CT with a slightly turned patient axis. The file holds the
# quaternion, and SimpleITK reads it; nibabel sets its first part to 0 if its square is under 3.6e-7. Without an sform, the far
# corner of 512 × 512 pixels of 0.7 mm is misplaced.
# Output seen:
#   turned by 0.0573°; get_qform() says 0.0000°; corner off by 0.358 mm in nibabel, 0.008 mm in SimpleITK
#   turned by 0.0859°; get_qform() says 0.0885°; corner off by 0.016 mm in nibabel, 0.016 mm in SimpleITK
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q nibabel==5.4.2 numpy==2.4.6 SimpleITK==2.5.5
here=$(realpath "$0")
cd "$work"
venv/bin/python - >seen <<'END'
import math

import nibabel
import numpy as np
import SimpleITK

for turn in (0.001, 0.0015):
    c, s = math.cos(turn), math.sin(turn)
    affine = np.diag([0, 0, 2.0, 1])
    affine[:2, :2] = 0.7 * np.array([[-c, s], [-s, -c]])
    image = nibabel.Nifti1Image(np.zeros((512, 512, 2), np.int16), affine)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    nibabel.save(image, "volume.nii")
    qform = nibabel.load("volume.nii").header.get_qform()
    far = [511, 511, 1]
    true = affine @ [*far, 1]
    itk = np.array(SimpleITK.ReadImage("volume.nii").TransformIndexToPhysicalPoint(far)) * [-1, -1, 1]
    print(
        f"turned by {math.degrees(turn):.4f}°; get_qform() says {abs(math.degrees(math.atan2(qform[1, 0], -qform[0, 0]))):.4f}°; "
        f"corner off by {np.abs(qform @ [*far, 1] - true).max():.3f} mm in nibabel, "
        f"{np.abs(itk - true[:3]).max():.3f} mm in SimpleITK"
    )
END
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
