"""TorchIO: its transforms, linear.

`Resample` rounds the number of voxels down and keeps 1 mm, so its grid is not quite gpuprep's. Its B-spline is
SimpleITK's.
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
            tio.Lambda(_air_outside),
            tio.Resample(1),
            tio.Clamp(-1000, 400),
            tio.RescaleIntensity((0, 1), in_min_max=(-1000, 400)),
            tio.Resize((512, 512, -1)),
        ]
    )


def _air_outside(hu: torch.Tensor) -> torch.Tensor:
    hu = hu.float()
    hu[hu < -1024] = -1000
    return hu
