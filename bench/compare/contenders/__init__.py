"""Defines the contenders: how each is run, which recipe it claims to compute, and how often it is timed.

A module of this package has either ``convert(folder, out, **options)`` for one series, as a competent user of that
library would write it, or ``convert_all(folders, out, **options)`` for a cohort. Only those of `OURS` use gpuprep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Claim = Literal["cubic", "linear", "classic"]
"""Recipe that a contender claims to compute: gpuprep's default, the same with linear resampling, or the notebook's."""

MIRRORED_VOXELS = 8
"""Width of the border in source voxels where SimpleITK's B-spline, which mirrors the volume, differs from a spline that
repeats the border voxels; further inside, the difference is below 1e-4."""


OURS = ("with_gpuprep", "with_any_build", "command_line")
"""Modules that run gpuprep."""


class AbsentError(Exception):
    """A package or device that a contender needs is missing. This does not count as a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row of the comparison: a program with its options."""

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str
    claim: Claim | None = None
    """Recipe it claims to compute; None if it uses another grid or does not resample."""
    border: int = 0
    """Width of the border, in source voxels, that is excluded from the comparison of values."""
    floor: str | None = None
    """Name of the floor with the same input and output."""
    series: int | None = None
    """Number of series per round; None for the whole cohort."""
    rounds: int = 3
    note: str = ""
    against: str = ""
    """Name of the gpuprep contender for the ratio; if empty, the one with the same dtype."""
    root: Path | None = None
    """Folder of the build of gpuprep that it runs, whose files are compared with those of `against`; None: this one."""

    @property
    def ours(self) -> bool:
        """Whether this is gpuprep."""
        return self.module in OURS

    @property
    def jobs(self) -> int:
        """Number of series converted in parallel."""
        return int(self.options.get("jobs", 1))


FLOORS = {"uint8": {"dtype": "uint8"}, "float32": {}, "uint8 stack": {"dtype": "uint8", "format": "tif-stack"}}
"""Recipe fields of the gpuprep runs that have a floor, by name of the floor."""

NOT_FLUSHED = ", not flushed"
"""End of the names of floors that do not flush their files to disk."""

SLOW: dict[str, Any] = {"series": 1, "rounds": 2}
MEDIUM: dict[str, Any] = {"series": 2, "rounds": 2}


def contenders(cores: int, gpu: bool, scratch: Path) -> list[Contender]:
    """Return all contenders; gpuprep with the default recipe in both dtypes comes first."""
    return [*_gpuprep(cores, scratch), *(_gpuprep_gpu(cores) if gpu else ()), *_rivals(), *_converters()]


def floors(cores: int, sizes_bytes: Mapping[str, dict[str, list[int]]]) -> list[Contender]:
    """Return two floors per output with known file sizes, flushed and not; `sizes_bytes` is by floor and series."""
    return [
        Contender(
            name=f"floor, {name}" + ("" if flushed else NOT_FLUSHED),
            module="floor",
            options={"sizes_bytes": sizes, "jobs": cores, "flushed": flushed},
            dtype=name.split()[0],
            against=f"gpuprep, {name}",
        )
        for flushed in (True, False)
        for name, sizes in sizes_bytes.items()
    ]


def _gpuprep(cores: int, scratch: Path) -> list[Contender]:
    def ours(name: str, floor: str | None, *, claim: Claim = "cubic", **kwargs: Any) -> Contender:
        recipe = FLOORS[floor] if floor else {"base": "classic"}
        options = {"recipe": recipe, "jobs": cores} | kwargs.pop("options", {})
        dtype = recipe.get("dtype", "float32")
        name = f"gpuprep, {name}"
        return Contender(
            name=name, module="with_gpuprep", options=options, dtype=dtype, claim=claim, floor=floor, **kwargs
        )

    fewer = [2**n for n in range(cores.bit_length()) if 2**n < cores]
    index = str(scratch / "headers.sqlite")
    return [
        ours("float32", "float32"),
        ours("uint8", "uint8"),
        ours("uint8 stack", "uint8 stack"),
        *(ours(f"uint8, {n} job{'s'[: n > 1]}", "uint8", options={"jobs": n}, rounds=2) for n in fewer),
        *(
            ours(f"{name}, headers known", name, options={"index": index}, note="index of a former scan")
            for name in ("uint8", "uint8 stack")
        ),
        ours("float32, matmul body", "float32", environment={"NUMBA_DISABLE_JIT": "1"}, rounds=2),
        ours("uint8, matmul body", "uint8", environment={"NUMBA_DISABLE_JIT": "1"}, rounds=2),
        ours("float32, engine ndimage", "float32", options={"engine": "ndimage", "jobs": 1}, series=1),
        ours("float32, classic recipe", None, claim="classic", rounds=2),
    ]


def _gpuprep_gpu(cores: int) -> list[Contender]:
    def ours(dtype: str, engine: str) -> Contender:
        return Contender(
            name=f"gpuprep, GPU, {dtype}" + (", engine ndimage" if engine == "ndimage" else ""),
            module="with_gpuprep",
            options={"recipe": FLOORS[dtype], "engine": engine, "gpu": True, "jobs": cores},
            dtype=dtype,
            claim="cubic",
            floor=dtype,
        )

    return [ours(dtype, engine) for engine in ("operators", "ndimage") for dtype in ("float32", "uint8")]


def _rivals() -> list[Contender]:
    def itk(interpolation: Claim, dtype: str, **kwargs: Any) -> Contender:
        return Contender(
            name=f"SimpleITK, {'B-spline' if interpolation == 'cubic' else 'linear'}, {dtype}",
            module="with_simpleitk",
            options={"interpolation": interpolation, "dtype": dtype},
            dtype=dtype,
            claim=interpolation,
            **kwargs,
        )

    def monai(device: str) -> Contender:
        return Contender(
            name=f"MONAI, {device.upper()}, linear, uint8",
            module="with_monai",
            options={"device": device, "dtype": "uint8"},
            dtype="uint8",
            note="different grid",
            **MEDIUM,
        )

    return [
        Contender(name="compare/classic.py, float32", module="notebook", dtype="float32", claim="classic", **SLOW),
        itk("cubic", "float32", border=MIRRORED_VOXELS, **SLOW),
        itk("cubic", "uint8", border=MIRRORED_VOXELS, **SLOW),
        itk("linear", "uint8", **MEDIUM),
        monai("cpu"),
        monai("cuda"),
        Contender(
            name="torch, CUDA, linear, uint8",
            module="with_torch",
            options={"device": "cuda", "dtype": "uint8"},
            dtype="uint8",
            claim="linear",
            **MEDIUM,
        ),
        Contender(
            name="TorchIO, linear, uint8",
            module="with_torchio",
            options={"dtype": "uint8"},
            dtype="uint8",
            note="different grid",
            **MEDIUM,
        ),
    ]


def _converters() -> list[Contender]:
    return [
        Contender(
            name=name,
            module=f"with_{name}",
            dtype="source",
            note="stack only, no resampling",
            against="gpuprep, uint8 stack",
            **MEDIUM,
        )
        for name in ("dcm2niix", "dicom2nifti")
    ]
