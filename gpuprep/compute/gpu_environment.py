"""Reports the software and the environment variables on which the GPU path depends, and pairs that do not fit."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpuprep.compute.backend import CACHE_REMEDY
from gpuprep.compute.gpu_findings import GpuFinding
from gpuprep.core.formatting import format_bytes, format_cuda_version, printable

VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUPY_CACHE_DIR", "CUPY_GPU_MEMORY_LIMIT", "CUDA_PATH")
"""Environment variables that act on the GPU path."""

WITHOUT_EFFECT = ("NVIDIA_TF32_OVERRIDE", "CUPY_TF32")
"""Environment variables that change the precision of matrix products, which gpuprep does not use on a GPU."""

KERNEL_MODULE = Path("/proc/driver/nvidia/version")

EXTRAS = "pip install 'gpuprep[cuda{0}]'"


def environment_findings() -> list[GpuFinding]:
    """Return findings about environment variables and the cache folder of compiled kernels."""
    found = []
    for name in VARIABLES:
        value = os.environ.get(name)
        found.append(GpuFinding("environment", name, True, _shown(value), figures={"value": value}))
    for name in WITHOUT_EFFECT:
        if (value := os.environ.get(name)) is not None:
            detail = f"{_shown(value)}: without effect, because gpuprep uses no matrix products on a GPU"
            found.append(GpuFinding("environment", name, True, detail, figures={"value": value}))
    return [*found, cache_finding()]


def cache_finding() -> GpuFinding:
    """Return path, size and write permission of the folder in which CuPy keeps compiled kernels."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))
    size = 0
    with suppress(OSError):
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    figures: dict[str, Any] = {"path": str(folder), "size_bytes": size, "writable": True}
    try:
        existing = next(f for f in (folder, *folder.parents) if f.exists())  # CuPy makes the others
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as exc:
        figures["writable"] = False
        return GpuFinding(
            "environment",
            "kernel cache",
            False,
            f"{printable(str(folder))}: {exc.strerror}: {CACHE_REMEDY}",
            figures=figures,
        )
    return GpuFinding(
        "environment", "kernel cache", True, f"{printable(str(folder))}, {format_bytes(size)}", figures=figures
    )


def software_findings(cuda: dict[str, int] | None) -> list[GpuFinding]:
    """Return findings about driver, CUDA libraries and packages, and about pairs of them that do not fit.

    Parameters
    ----------
    cuda : dict of str to int or None
        Result of `gpuprep.compute.cupy_backend.cuda_versions`; None if CuPy cannot be imported.
    """
    loaded = kernel_module_version()
    works = bool(loaded or (cuda or {}).get("driver"))
    detail = loaded or (f"unknown: no {KERNEL_MODULE}" if works else "not loaded")
    found = [GpuFinding("version", "NVIDIA driver", works, detail, figures={"version": loaded})]
    for name, what in (("driver", "CUDA of the driver"), ("runtime", "CUDA of CuPy"), ("nvrtc", "NVRTC")):
        number = (cuda or {}).get(name, 0)
        missing = "unknown without CuPy" if cuda is None else "not found"
        figures = {"version": format_cuda_version(number)}
        found.append(GpuFinding("version", what, bool(number), figures["version"] or missing, figures=figures))
    cupy, cucim = installed("cupy"), installed("cucim")
    for name, packages in (("CuPy", cupy), ("cuCIM", cucim)):
        detail = ", ".join(f"{package} {version}" for package, version in packages.items())
        missing = f"not installed: {EXTRAS.format(12)} or 'gpuprep[cuda13]'"
        found.append(GpuFinding("version", name, bool(packages), detail or missing, figures={"packages": packages}))
    torch = torch_version()
    if torch is not None:
        version, torch_cuda = torch
        detail = f"{version}, for {f'CUDA {torch_cuda}' if torch_cuda else 'the CPU only'}"
        figures = {"version": version, "cuda": torch_cuda}
        found.append(GpuFinding("version", "torch", True, detail, figures=figures))
    return found + pair_findings(cuda or {}, cupy, cucim, torch[1] if torch else "")


def pair_findings(
    cuda: dict[str, int], cupy: dict[str, str], cucim: dict[str, str], torch_cuda: str
) -> list[GpuFinding]:
    """Return one finding for each pair of CUDA versions, and for several packages of CuPy.

    Parameters
    ----------
    cuda : dict of str to int
        Versions of "driver", "runtime" and "nvrtc"; 0 or absent if unknown.
    cupy, cucim : dict of str to str
        Installed packages and their versions.
    torch_cuda : str
        CUDA version of torch; "" for none.
    """
    found = []

    def add(name: str, fits: bool, detail: str, remedy: str) -> None:
        found.append(GpuFinding("pair", name, fits, detail if fits else f"{detail}: {remedy}"))

    if len(cupy) > 1:
        add(
            "CuPy twice", False, " and ".join(cupy), f"pip uninstall {' '.join(cupy)}, then {EXTRAS.format('12')} again"
        )
    driver, runtime, nvrtc = (cuda.get(name, 0) for name in ("driver", "runtime", "nvrtc"))
    major = runtime // 1000
    if driver and runtime:
        # Within a major version, an older driver runs programs of a later CUDA.
        detail = f"CUDA {format_cuda_version(driver)} and {format_cuda_version(runtime)}"
        remedy = f"update the driver, or {EXTRAS.format(driver // 1000)}"
        add("driver and CuPy", driver // 1000 >= major, detail, remedy)
    if nvrtc and runtime:
        remedy = (
            f"pip uninstall nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12, then pip install 'cupy-cuda{major}x[ctk]'; or "
            "unset CUDA_PATH and LD_LIBRARY_PATH"
        )
        detail = f"CUDA {format_cuda_version(nvrtc)} and {format_cuda_version(runtime)}"
        add("NVRTC and CuPy", nvrtc // 1000 == major, detail, remedy)
    for name in cucim:
        if (its := re.search(r"-cu(\d+)$", name)) and major:
            detail = f"{name} and CUDA {format_cuda_version(runtime)}"
            add("cuCIM and CuPy", int(its[1]) == major, detail, f"pip uninstall {name}, then {EXTRAS.format(major)}")
    if torch_cuda and major:
        its_major = int(torch_cuda.split(".")[0])
        detail = f"CUDA {torch_cuda} and {format_cuda_version(runtime)}"
        remedy = f"to use both in one process, {EXTRAS.format(its_major)}, or install torch for CUDA {major}"
        add("torch and CuPy", its_major == major, detail, remedy)
    return found


def kernel_module_version() -> str | None:
    """Return the version of NVIDIA's kernel module, such as 570.86.15; None if it is not loaded."""
    with suppress(OSError):
        if found := re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", KERNEL_MODULE.read_text().splitlines()[0]):
            return found[0]
    return None


def installed(prefix: str) -> dict[str, str]:
    """Return the versions of the installed packages whose name begins with `prefix` and an optional suffix."""
    names = re.compile(rf"{prefix}(-cu\w*)?$", re.IGNORECASE)
    found = {d.name: d.version for d in distributions() if d.name and names.match(d.name)}
    return dict(sorted(found.items()))


def torch_version() -> tuple[str, str] | None:
    """Return version and CUDA version ("" for none) of torch, without importing it; None if it is not installed."""
    with suppress(ImportError, ValueError):
        spec = find_spec("torch")
        if spec is not None and spec.origin is not None:
            text = ""
            with suppress(OSError):
                text = (Path(spec.origin).parent / "version.py").read_text()
            its = {
                name: re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
                for name in ("__version__", "cuda")
            }
            version, cuda = its["__version__"], its["cuda"]
            return version[1] if version else "unknown version", cuda[1] if cuda else ""
    return None


def _shown(value: str | None) -> str:
    return "not set" if value is None else printable(value) or "empty"
