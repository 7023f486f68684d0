"""Checks of a device, and the memory of sessions, on the stand-in for CuPy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from simulated_cuda import Gpu, Machine, simulation

from gpuprep.compute import cuda_kernels
from gpuprep.compute.backend import open_gpus
from gpuprep.errors import BackendError


def backend(ordinal: int = 0) -> Any:
    return open_gpus([ordinal])[0]


@pytest.mark.usefixtures("cupy_on_host")
def test_a_device_that_computes_in_float32_is_accepted() -> None:
    assert backend().device == "Simulated GPU (device 0)"


@pytest.mark.parametrize(
    "cupy_on_host", [Machine(gpus=(Gpu("GPU-0"), Gpu("GPU-1", memory_bytes=10**9)))], indirect=True, ids=[""]
)
@pytest.mark.usefixtures("cupy_on_host")
def test_each_device_reports_its_own_free_memory() -> None:
    free = [device.free_bytes() for device in open_gpus()]
    assert free == pytest.approx([10**10, 10**9], abs=10_000)  # a few blocks are in use


@pytest.mark.usefixtures("cupy_on_host")
def test_a_device_that_computes_wrong_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel of this device keeps few bits of the values, as for bfloat16 and TF32.
    rounded = cuda_kernels.SOURCE.replace("u.x * value", "u.x * ((value + 16384.0f) - 16384.0f)")
    assert rounded != cuda_kernels.SOURCE
    monkeypatch.setattr(cuda_kernels, "SOURCE", rounded)
    with pytest.raises(BackendError, match="a small test kernel returns wrong values: do not use this device"):
        backend()


@pytest.mark.usefixtures("cupy_on_host")
@pytest.mark.parametrize(
    ("source", "message"),
    [("#include <cstdio>", "the GPU does not work: NVRTC has no"), ("int x = ;", "the GPU does not work: .*expected")],
)
def test_a_kernel_that_does_not_compile_is_a_backend_error(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(cuda_kernels, "SOURCE", source + "\n" + cuda_kernels.SOURCE)
    with pytest.raises(BackendError, match=message):
        backend()


@pytest.mark.parametrize(
    ("cupy_on_host", "visible", "message"),
    [
        (Machine(driver_version=0), None, "CuPy finds no GPU: no NVIDIA driver is loaded: check that nvidia-smi"),
        (
            Machine(driver_version=11080, runtime_version=12090),
            None,
            r"the driver supports CUDA 11\.8, CuPy needs 12\.9: update the driver",
        ),
        (Machine(), "", "CUDA_VISIBLE_DEVICES is empty: unset it"),
        (Machine(gpus=()), None, "cudaErrorNoDevice: no CUDA-capable device is detected: check that nvidia-smi"),
        (
            Machine(),
            "GPU-of-another-machine",
            "no CUDA-capable device is detected: check .* CUDA_VISIBLE_DEVICES begins with, 'GPU-of-another-machine'",
        ),
        (Machine(), "7\n,0", r"CUDA_VISIBLE_DEVICES begins with, '7\\n,0'"),
        (Machine(gpus=(Gpu(memory_bytes=0),)), None, "the GPU has no memory left for a small test kernel: Out of mem"),
    ],
    indirect=["cupy_on_host"],
    ids=["no driver", "old driver", "none visible", "no device", "unknown device", "line break", "no memory"],
)
@pytest.mark.usefixtures("cupy_on_host")
def test_the_reason_for_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, visible: str | None, message: str) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BackendError, match=message) as caught:
        backend()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cupy_on_host", [Machine(gpus=(Gpu("GPU-0"), Gpu("GPU-1")))], indirect=True, ids=[""])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("cupy_on_host")
def test_a_session_frees_the_memory_of_its_device_before_it_begins_and_after_its_end(fails: bool) -> None:
    # Another device is current outside of the session.
    cupy = import_module("cupy")
    device = backend(ordinal=1)
    with cupy.cuda.Device(1):
        pool = cupy.get_default_memory_pool()
        cupy.empty(10_000, np.uint8)  # a free block
    other = cupy.get_default_memory_pool().total_bytes()
    assert pool.total_bytes() > 0

    def use() -> Any:
        with device.session():
            assert pool.total_bytes() == 0
            assert simulation().device().ordinal == 1
            assert cupy.cuda.get_current_stream().is_non_blocking
            temporary, kept = cupy.empty(20_000, np.uint8), cupy.empty(512, np.uint8)
            del temporary
            if fails:
                del kept
                raise KeyError("from the work")
            return kept

    if fails:
        with pytest.raises(KeyError):
            use()
        assert pool.total_bytes() == 0
    else:
        kept = use()
        assert pool.total_bytes() == pool.used_bytes() == kept.nbytes == 512
    assert cupy.get_default_memory_pool().total_bytes() == other
    assert simulation().device().ordinal == 0
