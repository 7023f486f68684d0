"""TorchIO: transforms with linear interpolation.

`Resample` keeps 1 mm and rounds the number of voxels down, so the grid differs slightly from gpuprep's. Its B-spline
interpolation is that of SimpleITK and is not timed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchio as tio

from bench.compare.contenders.slices import write_slices


def convert(folder: Path, out: Path, *, dtype: str) -> None:
    image = _transforms()(tio.ScalarImage(folder))
    write_slices(image.data[0].permute(2, 1, 0).numpy(), out, dtype)  # from (i, j, k)


@cache
def _transforms() -> Any:
    return tio.Compose(
        [
            tio.Lambda(_padding_to_air),
            tio.Resample(1),
            tio.Clamp(-1000, 400),
            tio.RescaleIntensity((0, 1), in_min_max=(-1000, 400)),
            tio.Resize((512, 512, -1)),
        ]
    )


def _padding_to_air(hu: torch.Tensor) -> torch.Tensor:
    hu = hu.float()
    hu[hu < -1024] = -1000
    return hu
