"""SimpleITK: reading by GDCM, B-spline or linear resampling onto the same grid as gpuprep (physical extent kept)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the usual alias

from bench.compare.contenders.slices import write_slices

INTERPOLATORS = {"cubic": sitk.sitkBSpline, "linear": sitk.sitkLinear}


def convert(folder: Path, out: Path, *, interpolation: str, dtype: str) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    hu = sitk.Cast(reader.Execute(), sitk.sitkFloat32)
    hu = sitk.Threshold(hu, lower=-1024, upper=float(np.finfo(np.float32).max), outsideValue=-1000)
    size = [max(1, round(n * mm)) for n, mm in zip(hu.GetSize(), hu.GetSpacing(), strict=True)]
    values = _resampled(hu, size, INTERPOLATORS[interpolation])
    values = sitk.IntensityWindowing(values, -1000, 400, 0, 1)
    values = _resampled(values, [512, 512, size[2]], sitk.sitkLinear)
    write_slices(sitk.GetArrayViewFromImage(values), out, dtype)


def _resampled(image: sitk.Image, size: list[int], interpolator: int) -> sitk.Image:
    """Return the image resampled to `size` voxels with the same physical extent."""
    factors = [m / n for n, m in zip(image.GetSize(), size, strict=True)]
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(interpolator)
    resample.SetSize(size)
    resample.SetOutputSpacing([mm / f for mm, f in zip(image.GetSpacing(), factors, strict=True)])
    resample.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint([(1 / f - 1) / 2 for f in factors]))
    resample.SetOutputDirection(image.GetDirection())
    resample.SetUseNearestNeighborExtrapolator(True)
    resampled: sitk.Image = resample.Execute(image)
    return resampled
