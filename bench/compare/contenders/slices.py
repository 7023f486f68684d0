"""Writes outputs of other programs with tifffile, one file per slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray


def write_slices(values: NDArray[Any], out: Path, dtype: str) -> None:
    """Write values in [0, 1] of shape (k, j, i) as float32, or scaled to the range of uint8."""
    out.mkdir(parents=True)
    for k, image in enumerate(values):
        pixels = np.rint(image * 255).astype(np.uint8) if dtype == "uint8" else image.astype(np.float32, copy=False)
        tifffile.imwrite(out / f"{k:04d}.tif", pixels)
