"""The widely copied notebook as a script: pydicom, SciPy, scikit-image and Pillow, one series after the other.

It shares no code with gpuprep, so it is timed as a contender and also serves as the reference for the ``classic``
recipe. It computes in float64 and writes float32.

    python bench/compare/classic.py DICOM_DIR... --out OUT
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from scipy import ndimage
from skimage.transform import resize

MIN_HU, MAX_HU = -1000.0, 400.0


def load_scan(folder):
    """Read every slice of a folder and sort them by position."""
    slices = [pydicom.dcmread(os.path.join(folder, name)) for name in os.listdir(folder) if name.endswith(".dcm")]
    slices.sort(key=lambda s: float(s.ImagePositionPatient[2]))
    return slices


def get_pixels_hu(slices):
    """Stack the slices and convert to HU; −2000 is outside the scanner's circle."""
    image = np.stack([s.pixel_array for s in slices])
    image = image.astype(np.int16)
    image[image == -2000] = 0
    hu = np.empty(image.shape, dtype=np.float64)
    for k, s in enumerate(slices):
        hu[k] = float(s.RescaleSlope) * image[k].astype(np.float64) + float(s.RescaleIntercept)
    return hu


def resample(hu, slices, new_spacing=(1, 1, 1)):
    """Zoom to 1 × 1 × 1 mm."""
    spacing = np.array([float(slices[0].SliceThickness), *map(float, slices[0].PixelSpacing)])
    new_shape = np.round(hu.shape * (spacing / new_spacing))
    return ndimage.zoom(hu, new_shape / hu.shape, order=3)


def normalize(image):
    """Window to [0, 1]."""
    image = (image - MIN_HU) / (MAX_HU - MIN_HU)
    image[image > 1] = 1.0
    image[image < 0] = 0.0
    return image


def convert(folder, out):
    """Convert one series; return the shapes of source, resampled volume and output."""
    slices = load_scan(folder)
    hu = get_pixels_hu(slices)
    resampled = resample(hu, slices)
    image = normalize(resampled)
    os.makedirs(out, exist_ok=True)
    for k in range(len(image)):
        values = resize(image[k], (512, 512)).astype(np.float32)
        Image.fromarray(values).save(os.path.join(out, f"{k:04d}.tif"))
    return hu.shape, resampled.shape, (len(image), 512, 512)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DICOM_DIR", help="folders of one series each")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    for folder in args.folders:
        shapes = convert(folder, os.path.join(args.out, Path(folder).name))
        print(folder, *shapes, sep="  ")


if __name__ == "__main__":
    main()
