"""Computes the positions at which `scipy.ndimage.zoom` samples an axis, and the samples it leaves at 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sample_positions(n_in: int, n_out: int, mode: str, grid_mode: bool) -> NDArray[Any] | None:
    """Return the input index that `scipy.ndimage.zoom` samples for each output; None for unsupported modes."""
    q = np.arange(n_out)
    if (mode, grid_mode) == ("nearest", True):
        return (q + 0.5) * (n_in / n_out) - 0.5
    if (mode, grid_mode) == ("mirror", True):
        return np.asarray((n_in - 1) - np.abs((n_in - 1) - np.abs((q + 0.5) * (n_in / n_out) - 0.5)))
    if (mode, grid_mode) == ("constant", False):
        return q * ((n_in - 1) / max(1, n_out - 1))
    return None


def lost_samples(n_in: int, n_out: int, mode: str, grid_mode: bool) -> NDArray[np.intp]:
    """Return the ascending indices of the outputs that `scipy.ndimage.zoom` leaves at 0.

    With ``mode="constant"`` the last output lies on the last input sample. For some sizes, rounding in float64 puts it
    beyond that sample, and SciPy treats it as outside.
    """
    positions = sample_positions(n_in, n_out, mode, grid_mode) if mode == "constant" else None
    return np.zeros(0, dtype=np.intp) if positions is None else np.flatnonzero(positions > n_in - 1)
