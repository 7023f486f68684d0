"""MONAI: transforms on torch tensors with linear interpolation, on the CPU or on a GPU.

`Spacing` aligns the centres of the first voxels, so the grid differs from gpuprep's. Its cubic interpolation on the CPU
is that of SciPy and is not timed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch

from bench.compare.contenders import AbsentError
from bench.compare.contenders.slices import write_slices


def convert(folder: Path, out: Path, *, device: str, dtype: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise AbsentError("torch finds no CUDA device")
    values = _transforms(device)(str(folder))[0].permute(2, 1, 0).cpu().numpy()  # from (i, j, k)
    write_slices(values, out, dtype)


@cache
def _transforms(device: str) -> Any:
    return mt.Compose(
        [
            mt.LoadImage(reader="PydicomReader", ensure_channel_first=True),
            mt.EnsureType(device=device),
            mt.ThresholdIntensity(threshold=-1024, above=True, cval=-1000),
            mt.Spacing(pixdim=(1, 1, 1), mode="bilinear", padding_mode="border", dtype=np.float32),
            mt.ScaleIntensityRange(a_min=-1000, a_max=400, b_min=0, b_max=1, clip=True),
            mt.Resize(spatial_size=(512, 512, -1), mode="trilinear"),
        ]
    )
