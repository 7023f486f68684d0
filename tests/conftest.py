"""Fixtures: backends, real CT if it is installed, small synthetic series, S3 server."""

from __future__ import annotations

import logging
import os
import shutil
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import both_ways
import hypothesis
import numpy as np
import pydicom
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian
from simulated_cuda import Machine
from simulated_finder import child_environment, installed

from gpuprep.compute.backend import Backend, NumpyBackend, _gpu_or_cpu, get_backend
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.volume import StoredVolume
from gpuprep.dicom import headers
from gpuprep.errors import BackendError
from gpuprep.testing import write_series

hypothesis.settings.register_profile("gpuprep", deadline=None)  # a deadline would be a timing assertion
hypothesis.settings.load_profile("gpuprep")

DATA = Path(os.environ.get("GPUPREP_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests from using the header index in the user's cache folder."""
    folder = tmp_path_factory.getbasetemp() / "caches" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the level of the package's logger, which commands with ``--quiet`` change for the whole process."""
    logger = logging.getLogger("gpuprep")
    level = logger.level
    yield
    logger.setLevel(level)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker of pytest to need it makes, and for which the others wait."""
    top = tmp_path_factory.getbasetemp()
    folder = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(autouse=True)
def headers_read_both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of DICOM, require of every header that is read in this process that pydicom gives the same result."""
    if request.path.parent.name in ("dicom", "e2e", "fuzz"):
        monkeypatch.setattr(headers, "_read_header", both_ways.read_header)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real CT; tests that use it are skipped if it is absent."""
    if not (DATA / "INDEX.json").exists():
        pytest.skip(f"real CT is absent: no INDEX.json in {DATA}; set GPUPREP_TEST_DATA")
    return DATA


@pytest.fixture(params=["numpy", "loops", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, compiled loops, and a GPU or a simulated one."""
    if request.param == "numpy":
        return NumpyBackend("matmul")
    if request.param == "loops":
        return NumpyBackend("loops")
    gpu: Backend = request.getfixturevalue("gpu")
    return gpu


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Backend:
    """Return a GPU, or a simulated one on a machine without."""
    try:
        return get_backend("gpu")
    except BackendError:
        request.getfixturevalue("cupy_on_host")
        return get_backend("gpu")


@pytest.fixture
def cupy_on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Replace CuPy by a stand-in without a GPU, in this process and its children; yield the machine that it simulates.

    A test may give the machine as the fixture's parameter. See `simulated_finder`.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles kernels for the host")
    machine = getattr(request, "param", Machine())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in child_environment(machine).items():
        monkeypatch.setenv(name, value)
    _stop_fork_server()  # workers inherit the environment in which it was started
    _gpu_or_cpu.cache_clear()
    with installed(machine):
        yield machine
    _gpu_or_cpu.cache_clear()
    _stop_fork_server()


def axial(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Geometry:
    """Return an axial grid with an arbitrary origin."""
    affine = np.array(
        [
            [0, 0, spacing_mm[2], -100.0],
            [0, spacing_mm[1], 0, -120.0],
            [spacing_mm[0], 0, 0, -300.0],
            [0, 0, 0, 1],
        ]
    )
    return Geometry(shape, affine)


def stored_volume(
    stored: NDArray[Any], spacing_mm: tuple[float, float, float], *, slope: float = 1.0, intercept: float = -1024.0
) -> StoredVolume:
    """Return a volume of the given stored values without files."""
    count = len(stored)
    return StoredVolume(
        stored, np.full(count, slope), np.full(count, intercept), None, axial(stored.shape, spacing_mm), HuStatistics()
    )


def to_numpy(array: Any) -> NDArray[Any]:
    """Return the values of a host or device array as NumPy."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.get())


@pytest.fixture
def noise() -> Callable[..., NDArray[np.int16]]:
    """Return a function that makes random stored values, in which every interpolation error shows."""

    def make(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.int16]:
        return np.random.default_rng(seed).integers(0, 3000, shape).astype(np.int16)

    return make


@pytest.fixture
def small_series(tmp_path: Path, noise: Callable[..., NDArray[np.int16]]) -> Path:
    """Write 6 slices of 20 × 24 with a spacing of 2.5 × 0.8 × 0.7 mm and return the parent of their folder."""
    write_series(tmp_path / "dicom" / "ct", noise((6, 20, 24)), (2.5, 0.8, 0.7))
    return tmp_path / "dicom"


def renamed(file: Path, syntax: str) -> None:
    """Change the transfer syntax in the meta group of a file and keep its data set."""
    meta = pydicom.dcmread(file, stop_before_pixels=True).file_meta
    body = file.read_bytes()[144 + meta.FileMetaInformationGroupLength :]
    meta.TransferSyntaxUID = UID(syntax)
    head = DicomBytesIO()
    write_file_meta_info(head, meta)
    file.write_bytes(bytes(128) + b"DICM" + head.getvalue() + body)


def encoded_natively(ds: Dataset, syntax: UID, *, meta: bool = True) -> bytes:
    """Return a data set encoded in a native transfer syntax; without preamble and meta group if `meta` is False."""
    plain = Dataset()
    for element in ds:
        plain.add(element)
    if syntax == ExplicitVRBigEndian and "PixelData" in plain:
        plain.PixelData = np.frombuffer(plain.PixelData, "<u2").astype(">u2").tobytes()
    buffer = BytesIO()
    if meta:
        plain.file_meta = ds.file_meta
        plain.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(buffer, plain, enforce_file_format=True)
    else:
        big, implicit = syntax == ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
        pydicom.dcmwrite(buffer, plain, implicit_vr=implicit, little_endian=not big)
    return buffer.getvalue()


@pytest.fixture
def memory() -> Iterator[Any]:
    """Yield fsspec's in-memory file system and clear it afterwards."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Start an S3 server on loopback, point the environment variables to it, and yield its file system."""
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs, fsspec = pytest.importorskip("s3fs"), pytest.importorskip("fsspec")
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _stop_fork_server()  # workers inherit the environment in which it was started
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "for-tests")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, "/nowhere")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        # The content of an earlier server of this process would still exist.
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        fs.mkdir("bucket")
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    _stop_fork_server()
    server.stop()


def _stop_fork_server() -> None:
    server: Any = forkserver._forkserver
    server._stop()
