"""An extra that is not installed is named in one line, with the command that installs it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry
from typer.testing import CliRunner

from gpuprep.cli.app import app
from gpuprep.output.manifest import Manifest, manifest_path

FOR_DEVELOPERS = {"test", "lint", "bench"}
with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as _file:
    EXTRAS = {
        extra: [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]  # type: ignore[index]
        for extra, requirements in tomllib.load(_file)["project"]["optional-dependencies"].items()
        if extra not in FOR_DEVELOPERS
    }
MODULES = {
    "cupy-cuda12x": "cupy", "cupy-cuda13x": "cupy", "cucim-cu12": "cucim", "cucim-cu13": "cucim", "dask": "distributed",
}  # fmt: skip
"""Imported module by package, if it has another name."""

OUT = ["--quiet", "--out", "out", "--backend", "cpu"]
USES: dict[str, list[str]] = {
    "fast": ["doctor", "--json"],
    "cuda12": ["convert", "dicom", "--quiet", "--out", "out", "--backend", "gpu"],
    "cuda13": ["convert", "dicom", "--quiet", "--out", "out", "--backend", "gpu"],
    "s3": ["scan", "s3://bucket/dicom"],
    "gcs": ["scan", "gs://bucket/dicom"],
    "dask": ["convert", "dicom", *OUT, "--scheduler", "local"],
    "parquet": ["manifest", "out", "--parquet", "--to", "manifest.parquet"],
    "nifti": ["convert", "dicom", *OUT, "--format", "nifti"],
    "zarr": ["convert", "dicom", *OUT, "--format", "zarr"],
    "seg": ["restore", "dicom", "--to", "out", "--out", "segs", "--as", "seg", "--dicom", "dicom"],
}
"""A command that needs the extra, by extra; it runs in a folder with a series, and with a manifest in ``out``."""


def loops_finding(stdout: str) -> str:
    """Return what doctor prints about the loops on the CPU."""
    return "\n".join(f["detail"] for f in json.loads(stdout) if f["name"] == "cpu loops")


def test_every_extra_of_the_project_is_tested() -> None:
    assert {*USES, "torch"} == set(EXTRAS)  # torch has no command: it is for Python


@pytest.mark.parametrize(
    ("extra", "package"),
    # cuCIM is needed only when a GPU works: see tests/gpu/test_gpu_checks.py.
    [(e, package) for e, packages in EXTRAS.items() for package in packages if not package.startswith("cucim")],
)
def test_an_extra_that_is_absent_is_named(
    extra: str, package: str, small_series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_series.parent)
    Path("out").mkdir()
    Manifest(manifest_path(Path("out"))).close()
    monkeypatch.setitem(sys.modules, MODULES.get(package, package), None)
    for protocol in ("s3", "gs"):  # fsspec may have imported them already
        monkeypatch.delitem(_registry, protocol, raising=False)
    found: Any = Distribution.from_name

    def others(name: str) -> Distribution:
        there: Distribution = found("absent" if name == package else name)
        return there

    monkeypatch.setattr(Distribution, "from_name", others)
    if extra == "torch":
        monkeypatch.delitem(sys.modules, "gpuprep.torch", raising=False)
        with pytest.raises(ImportError, match=r"pip install 'gpuprep\[torch\]'$"):
            import_module("gpuprep.torch")
        return
    result = CliRunner().invoke(app, USES[extra], catch_exceptions=False)
    line = loops_finding(result.stdout) if extra == "fast" else result.stderr  # without "fast", all commands work
    assert line.count("\n") <= 1, line
    assert f"pip install 'gpuprep[{extra}]'" in line or f"or 'gpuprep[{extra}]'" in line
    if extra != "fast":
        assert result.exit_code in (2, 4)
        assert line.startswith("gpuprep: ")
