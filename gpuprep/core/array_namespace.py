"""Returns the array API namespace of arrays."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np


def array_namespace(*arrays: Any) -> Any:
    """Return the namespace of `array_api_compat` for arrays; for NumPy's arrays NumPy itself.

    NumPy has had the functions of the array API since version 2.1. The namespace of `array_api_compat` for it imports
    all modules of NumPy, even its compiler of Fortran, which takes as long as Numba.
    """
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np
    return array_api_compat.array_namespace(*arrays)
