"""torch on a GPU: linear interpolation on the same grid as gpuprep (physical extent kept)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import torch
from torch.nn.functional import interpolate

from bench.compare.contenders import AbsentError
from bench.compare.contenders.slices import write_slices


def convert(folder: Path, out: Path, *, device: str, dtype: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise AbsentError("torch finds no CUDA device")
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[2])
    first = slices[0]
    z_mm = slices[1].ImagePositionPatient[2] - first.ImagePositionPatient[2]
    stored = torch.from_numpy(np.stack([ds.pixel_array for ds in slices])).to(device)
    hu = stored.float() * float(first.RescaleSlope) + float(first.RescaleIntercept)
    hu[hu < -1024] = -1000
    spacing_mm = (z_mm, *first.PixelSpacing)
    shape = [max(1, round(n * float(mm))) for n, mm in zip(hu.shape, spacing_mm, strict=True)]
    values = interpolate(hu[None, None], size=shape, mode="trilinear")
    values = (values.clamp(-1000, 400) + 1000) / 1400
    values = interpolate(values[0, 0, :, None], size=(512, 512), mode="bilinear")
    write_slices(values[:, 0].cpu().numpy(), out, dtype)
