"""Rescales stored values to HU, HU to the window, and the window to the output type.

Each function takes arrays of one library and returns arrays of that library, on the same device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from gpuprep.core.array_namespace import array_namespace

AIR_HU = -1000.0
"""CT number of air."""

LOWEST_HU = -1024.0
"""Lowest CT number of a patient. Scanners fill the corners outside the field of view with lower values (often −2048
or −3024), frequently without declaring them in *Pixel Padding Value*."""

HIGHEST_HU = 30_000.0
"""Highest CT number. 12 bits end at 3071 HU; metal on a scanner's extended scale reaches about 30,000."""

TISSUE_HU = (-900.0, 3071.0)
"""HU range of tissue. A declared padding value in this range is ignored, since it would cut holes into tissue."""


def stored_to_hu(stored: Any, slope: Any, intercept: Any) -> Any:
    """Return CT numbers: each slice of stored values with its rescale applied.

    Parameters
    ----------
    stored : array of integers, shape (k, j, i)
        Stored values, before rescaling.
    slope, intercept : array of float32, shape (k,)
        *Rescale Slope* (HU per unit) and *Rescale Intercept* (HU) of each slice.

    Returns
    -------
    array of float32, shape (k, j, i)
        HU, in the library and on the device of `stored`.

    References
    ----------
    DICOM PS3.3, C.11.1 (Modality LUT module).
    """
    xp = array_namespace(stored, slope, intercept)
    hu = xp.astype(stored, xp.float32)
    hu *= slope[:, None, None]
    hu += intercept[:, None, None]
    return hu


def padding_to_air(hu: Any, stored: Any, padding: Any | None) -> Any:
    """Return `hu` with air in place of padding.

    Parameters
    ----------
    hu : array of float32, shape (k, j, i)
        CT numbers.
    stored : array of integers, shape (k, j, i)
        Stored values of the same voxels.
    padding : array of the dtype of `stored`, shape (k, 2), or None
        Lowest and highest stored value of padding per slice; lowest > highest for a slice without padding.

    Returns
    -------
    array of float32, shape (k, j, i)
        HU; declared padding and everything under `LOWEST_HU` is `AIR_HU`.

    References
    ----------
    DICOM PS3.3, C.7.5.1.1.2 (Pixel Padding Value and Pixel Padding Range Limit).
    """
    xp = array_namespace(hu, stored)
    outside = hu < LOWEST_HU
    if padding is not None:
        outside |= (stored >= padding[:, 0][:, None, None]) & (stored <= padding[:, 1][:, None, None])
    return xp.where(outside, xp.asarray(AIR_HU, dtype=xp.float32, device=device(hu)), hu)


def zero_minus_2000(stored: Any) -> Any:
    """Return stored values with −2000 replaced by 0, as a widely copied notebook does before rescaling."""
    xp = array_namespace(stored)
    if xp.isdtype(stored.dtype, "unsigned integer"):  # cannot hold −2000
        return stored
    return xp.where(stored == -2000, xp.asarray(0, dtype=stored.dtype, device=device(stored)), stored)


def window(hu: Any, low_hu: float, high_hu: float, scale: float, shift_hu: float) -> Any:
    """Return `hu` clipped to [`low_hu`, `high_hu`], then shifted and multiplied: (HU + `shift_hu`) · `scale`.

    Array of float32, any shape.
    """
    values = array_namespace(hu).clip(hu, low_hu, high_hu)
    if (scale, shift_hu) != (1.0, 0.0):
        values += shift_hu
        values *= scale
    return values


def quantise(values: Any, dtype: str) -> Any:
    """Return values in the output type: unchanged for float32, else rounded half to even and clipped to its range.

    Parameters
    ----------
    values : array of float32, any shape
        Output units.
    dtype : {"float32", "uint8", "uint16", "int16"}
        Output type.
    """
    if dtype == "float32":
        return values
    xp = array_namespace(values)
    target = getattr(xp, dtype)
    limits = xp.iinfo(target)
    return xp.astype(xp.clip(xp.round(values), float(limits.min), float(limits.max)), target)


def representable_hu(window_hu: tuple[float, float] | None, dtype: str) -> tuple[float, float]:
    """Return the range of HU beyond which the output type clips values that the window does not.

    Only ``int16`` clips, as it stores unscaled HU. The other integers store the scaled window, and float32 holds all
    HU. Infinite bounds mean no clipping.
    """
    if dtype != "int16":
        return -math.inf, math.inf
    low, high = window_hu or (-math.inf, math.inf)
    return -math.inf if low >= -32768 else -32768.0, math.inf if high <= 32767 else 32767.0


def to_hu(stored: Any, slope: Any, intercept: Any, padding: Any | None, rule: str) -> Any:
    """Return stored values as HU, with a recipe's padding rule applied: "air", "keep" or "minus2000-to-0".

    The arguments are those of `stored_to_hu` and `padding_to_air`.
    """
    if rule == "minus2000-to-0":
        stored = zero_minus_2000(stored)
    hu = stored_to_hu(stored, slope, intercept)
    return padding_to_air(hu, stored, padding) if rule == "air" else hu


def finish(values: Any, window_: tuple[float, float, float, float] | None, dtype: str) -> Any:
    """Return values windowed (`window_`: arguments of `window`; None: not windowed) and quantised to `dtype`."""
    return quantise(values if window_ is None else window(values, *window_), dtype)


@dataclass(slots=True)
class HuStatistics:
    """Minimum, maximum and mean of a stack in HU, accumulated slice by slice on the host, in float64.

    A slice's rescale is linear, so the extremes and the sum of its stored integers determine them exactly.
    """

    low: float = math.inf
    """Minimum in HU."""
    high: float = -math.inf
    """Maximum in HU."""
    _sum: float = 0.0
    _count: int = 0

    @property
    def voxels(self) -> int:
        """Number of voxels added."""
        return self._count

    @property
    def mean(self) -> float:
        """Mean in HU of the voxels added; NaN if there are none."""
        return self._sum / self._count if self._count else math.nan

    def add(self, low: int, high: int, total: int, voxels: int, slope: float, intercept: float) -> None:
        """Add a slice: lowest and highest stored value, sum and number of stored values, and rescale."""
        extremes = low * slope + intercept, high * slope + intercept
        self.low, self.high = min(self.low, *extremes), max(self.high, *extremes)
        self._sum += total * slope + intercept * voxels
        self._count += voxels
