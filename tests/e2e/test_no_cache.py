"""Without a writable home folder, gpuprep warns once about each disabled cache and continues."""

from __future__ import annotations

import json
import logging
import os
import pwd
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuprep
from gpuprep import Recipe
from gpuprep.cli.app import app
from gpuprep.compute import backend
from gpuprep.core.recipe import Dtype
from gpuprep.dicom.discover import discover
from gpuprep.dicom.header_cache import default_index
from gpuprep.errors import BackendError

CUPY = """import os
os.makedirs(os.path.expanduser(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")), exist_ok=True)
raise ImportError("a stand-in")
"""
"""Behaviour of CuPy 14.2 when it is imported."""


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """Path of a folder that cannot be created, not even by root."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "home"


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Restore the log level that an earlier quiet command has changed."""
    caplog.set_level(logging.WARNING, logger="gpuprep")


# Header index


@pytest.fixture
def user_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a user without a home folder and without an entry in the user database."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)

    def unknown(_: int) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("user_without_home")
def test_a_user_without_a_home_has_no_header_index_and_gets_one_warning(
    small_series: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert default_index() is None
    caplog.clear()
    done = CliRunner().invoke(app, ["scan", str(small_series), "--jobs", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["series"]) == 1
    (record,) = caplog.records
    assert "set XDG_CACHE_HOME" in record.message
    assert not (Path.cwd() / "~").exists()


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_cache_folder_that_cannot_be_created_gives_one_warning(
    small_series: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, str(nowhere))
    done = CliRunner().invoke(app, ["scan", str(small_series), "--jobs", "1", "--json"])
    assert done.exit_code == 0, done.output
    (record,) = caplog.records
    assert str(nowhere) in record.message
    assert "--index FILE|none" in record.message
    assert "XDG_CACHE_HOME" in record.message


def test_a_header_index_that_cannot_be_created_does_not_change_the_scan(small_series: Path, nowhere: Path) -> None:
    assert discover(small_series, index=nowhere / "headers.sqlite") == discover(small_series)


# CuPy


@pytest.fixture
def cupy_without_cache(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a fake CuPy whose kernel cache cannot be created; yield the folder of the cache."""
    (tmp_path / "site" / "cupy").mkdir(parents=True)
    (tmp_path / "site" / "cupy" / "__init__.py").write_text(CUPY)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [
        name for name in sys.modules if name in ("cupy", "gpuprep.compute.cupy_backend") or name.startswith("cupy.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(nowhere))
    backend._gpu_or_cpu.cache_clear()
    yield nowhere
    backend._gpu_or_cpu.cache_clear()


def test_doctor_reports_a_cupy_that_cannot_create_its_cache(cupy_without_cache: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    (gpu,) = [f for f in json.loads(done.stdout) if f["name"] == "gpu"]
    assert not gpu["ok"]
    assert str(cupy_without_cache) in gpu["detail"]
    assert "set CUPY_CACHE_DIR to a folder that can be written" in gpu["detail"]


def test_a_cupy_that_cannot_create_its_cache_falls_back_to_the_cpu(
    small_series: Path, tmp_path: Path, cupy_without_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(spacing_mm=None, size=None)
    assert gpuprep.load(small_series, recipe).shape == (6, 20, 24)
    (record,) = caplog.records
    assert str(cupy_without_cache) in record.message
    assert "the CPU computes" in record.message
    with pytest.raises(BackendError, match="set CUPY_CACHE_DIR"):
        gpuprep.load(small_series, recipe, backend="gpu")
    words = ["convert", str(small_series), "--out", str(tmp_path / "out"), "--quiet", "--backend", "gpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpuprep: CuPy cannot be imported")


@pytest.mark.usefixtures("cupy_without_cache")
def test_cupy_is_imported_if_its_cache_folder_is_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    with pytest.raises(BackendError, match="a stand-in"):
        backend.open_gpus()


# Compiled loops


@pytest.fixture(scope="module")
def warmup() -> Any:
    """Import what compiles the loops, which it does at once, while Numba still finds them in its cache."""
    pytest.importorskip("numba")
    return import_module("gpuprep.compute.numba_warmup")


@pytest.fixture
def uncached_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the loops while Numba finds no writable cache folder; yield the module."""
    numba = pytest.importorskip("numba")

    def refuse(_: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(type(numba.njit(lambda: None)), "enable_caching", refuse)
    monkeypatch.delitem(sys.modules, "gpuprep.compute.numba_kernels", raising=False)
    monkeypatch.delattr("gpuprep.compute.numba_kernels", raising=False)
    backend._warn_uncached.cache_clear()
    yield backend.import_loops()
    backend._warn_uncached.cache_clear()


def test_loops_that_cannot_be_cached_give_one_warning(uncached_loops: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert backend.compiled_loops() is backend.compiled_loops() is uncached_loops
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "in every run" in record.message
    assert os.path.join(os.path.dirname(gpuprep.__file__), "compute", "__pycache__") in record.message
    assert "set NUMBA_CACHE_DIR to a folder that can" in record.message


@pytest.mark.usefixtures("uncached_loops")
def test_doctor_reports_that_loops_cannot_be_cached(caplog: pytest.LogCaptureFixture) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    (found,) = [f for f in json.loads(done.stdout) if f["name"] == "cpu loops"]
    assert found["ok"]
    assert "set NUMBA_CACHE_DIR" in found["detail"]
    assert not [r for r in caplog.records if "loops" in r.message]


def test_a_loop_that_cannot_be_saved_counts_as_uncached(uncached_loops: Any) -> None:
    uncached_loops.uncached.clear()

    class Full:
        def save_overload(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    uncached_loops._FaultTolerantCache(Full()).save_overload()
    assert uncached_loops.uncached.is_set()


def test_loops_that_cannot_be_cached_are_compiled_for_all_dtypes_before_workers_start(
    warmup: Any, uncached_loops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert uncached_loops.uncached.is_set()
    inputs, outputs = set(), set()

    def process(volume: Any, recipe: Recipe, **_: Any) -> None:
        inputs.add(volume.stored.dtype)
        outputs.add(recipe.dtype)

    monkeypatch.setattr(warmup, "process", process)
    monkeypatch.setattr(warmup, "summary", lambda *_, **__: None)
    warmup._warm()
    assert inputs == {np.dtype(t) for t in ("int8", "uint8", "int16", "uint16")}
    assert outputs == set(get_args(Dtype))
