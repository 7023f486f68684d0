"""Names the versions of gpuprep, Python and the packages on which results depend."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from gpuprep import _version

RECORDED_PACKAGES = (
    "numpy",
    "scipy",
    "scikit-image",
    "numba",
    "pydicom",
    "tifffile",
    "imagecodecs",
    "nibabel",
    "isal",
    "zarr",
)
RECORDED_GPU_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cucim-cu12", "cucim-cu13")


@cache
def versions(gpu: bool = False) -> dict[str, str]:
    """Return the versions of gpuprep, Python and the packages on which the result depends."""
    found = {"gpuprep": _version.__version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES + (RECORDED_GPU_PACKAGES if gpu else ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
