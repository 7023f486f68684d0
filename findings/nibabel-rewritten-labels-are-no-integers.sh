#!/usr/bin/env bash
# nibabel==5.4.2, numpy==2.4.6: labels loaded with get_fdata() and saved with their old header are no integers.
# The header says uint8, so nibabel scales the floats to 0..255 and writes a slope. Labels 0..3 are then loaded as
# 1.00000002 etc., and labels 0..7 change their values in a cast to int, which truncates.
# Output seen:
#   stored 0 85 170 255; labels that come back, to 8 decimals: 0.00000000 1.00000002 2.00000004 3.00000006
#   labels 0..7 cast to int: 0 0 2 2 4 4 6 7
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q nibabel==5.4.2 numpy==2.4.6
here=$(realpath "$0")
cd "$work"
venv/bin/python - >seen <<'END'
import nibabel
import numpy as np


def rewritten(count):
    labels = np.arange(count, dtype=np.uint8).reshape(count, 1, 1)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), "labels.nii")
    image = nibabel.load("labels.nii")
    edited = image.get_fdata().copy()
    nibabel.save(nibabel.Nifti1Image(edited, image.affine, image.header), "edited.nii")
    return nibabel.load("edited.nii")


four = rewritten(4)
stored = np.asarray(four.dataobj.get_unscaled()).ravel()
print("stored", *stored, end="; labels that come back, to 8 decimals: ")
print(*(f"{v:.8f}" for v in four.get_fdata().ravel()))
print("labels 0..7 cast to int:", *rewritten(8).get_fdata().ravel().astype(int))
END
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
