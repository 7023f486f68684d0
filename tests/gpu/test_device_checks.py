"""Checks of a device, and the memory of sessions, on a simulated CuPy that computes with NumPy and logs its calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuprep.errors import BackendError

OURS = "gpuprep.compute.cupy_backend"


class RoundedArray(np.ndarray):
    """Array whose products round their factors to a number of mantissa bits, as tensor cores do."""

    mantissa_bits = 23

    def __matmul__(self, other: Any) -> Any:
        return np.asarray(self._rounded()) @ np.asarray(other)

    def _rounded(self) -> Any:
        bits = np.asarray(self).view(np.uint32)
        dropped = 23 - RoundedArray.mantissa_bits
        half = np.uint32(1 << dropped >> 1)
        return ((bits + half) >> dropped << dropped).view(np.float32)


class SimulatedCuda:
    """State of the simulated CUDA, and a log of its calls with the device that was current."""

    def __init__(self) -> None:
        self.devices = [0]
        self.log: list[tuple[str, int]] = []
        self.count = 1
        self.driver = 12090
        self.error = ""

    def note(self, call: str) -> None:
        self.log.append((call, self.devices[-1]))

    @contextmanager
    def device(self, ordinal: int) -> Iterator[None]:
        self.devices.append(ordinal)
        try:
            yield
        finally:
            self.devices.pop()

    @contextmanager
    def stream(self, *, non_blocking: bool) -> Iterator[None]:
        assert non_blocking
        self.note("stream")
        yield
        self.note("stream ends")


class SimulatedCudaError(RuntimeError):
    """Error of the simulated CUDA runtime."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    cuda = SimulatedCuda()

    def device_count() -> int:
        if cuda.error:
            raise SimulatedCudaError(cuda.error)
        return cuda.count

    def event(**_: Any) -> Any:
        return SimpleNamespace(record=lambda _: None, synchronize=lambda: cuda.note("wait"))

    cupy: Any = ModuleType("cupy")
    cupy.float32 = np.float32
    cupy.ElementwiseKernel = lambda *_: None
    cupy.asarray = lambda array: np.asarray(array).view(RoundedArray)
    cupy.asnumpy = np.asarray
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: cuda.note("free"))
    cupy.cuda = SimpleNamespace(
        Device=cuda.device,
        Stream=cuda.stream,
        Event=event,
        get_current_stream=lambda: None,
        compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
        memory=SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (Exception,), {})),
        runtime=SimpleNamespace(
            getDeviceCount=device_count,
            driverGetVersion=lambda: cuda.driver,
            runtimeGetVersion=lambda: 12090,
            CUDARuntimeError=SimulatedCudaError,
            getDeviceProperties=lambda ordinal: {"name": f"simulated {ordinal}".encode()},
        ),
    )
    modules = {"cupy": cupy, "cupyx": ModuleType("cupyx")}
    for name in ("cupyx.scipy", "cupyx.scipy.ndimage", "cucim", "cucim.skimage", "cucim.skimage.transform"):
        modules[name] = ModuleType(name)
    modules["cucim.skimage.transform"].resize = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # The backend is imported anew with the simulated CuPy; setting an item first makes sure that it is removed again.
    monkeypatch.setitem(sys.modules, OURS, ModuleType(OURS))
    monkeypatch.delitem(sys.modules, OURS)
    monkeypatch.setattr(import_module("gpuprep.compute"), "cupy_backend", None, raising=False)
    monkeypatch.setattr(RoundedArray, "mantissa_bits", 23)
    for variable in ("CUPY_TF32", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    return cuda


def backend(ordinal: int = 0) -> Any:
    return import_module(OURS).CupyBackend(ordinal)


@pytest.mark.usefixtures("cuda")
def test_a_device_that_multiplies_in_float32_is_accepted() -> None:
    assert backend().device == "simulated 0 (device 0)"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("mantissa_bits", [10, 7], ids=["TF32", "bfloat16"])
def test_a_device_whose_products_have_fewer_bits_is_refused(
    monkeypatch: pytest.MonkeyPatch, mantissa_bits: int
) -> None:
    monkeypatch.setattr(RoundedArray, "mantissa_bits", mantissa_bits)
    with pytest.raises(BackendError, match="not the precision of float32: unset NVIDIA_TF32_OVERRIDE"):
        backend()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_any_value_of_cupy_tf32_but_0_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUPY_TF32", "0")
    assert backend().device
    monkeypatch.setenv("CUPY_TF32", value)
    with pytest.raises(BackendError, match=f"CUPY_TF32 is '{value}': .*unset it"):
        import_module(OURS)._checked_device(1)


INSUFFICIENT = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize(
    ("error", "driver", "visible", "message"),
    [
        (INSUFFICIENT, 0, None, "CuPy finds no GPU: no NVIDIA driver is loaded: check that nvidia-smi"),
        (INSUFFICIENT, 11080, None, r"the driver supports CUDA 11\.8, CuPy needs 12\.9: update the driver"),
        ("cudaErrorNoDevice: no CUDA-capable device is detected", 12090, "", "CUDA_VISIBLE_DEVICES is empty: unset it"),
        (
            "cudaErrorNoDevice: no CUDA-capable device is detected",
            12090,
            None,
            "no CUDA-capable device is detected: ch",
        ),
        ("", 12090, None, "CUDA lists none: check that nvidia-smi lists the GPU"),
    ],
    ids=["no driver", "old driver", "none visible", "no device", "count 0"],
)
def test_the_reason_for_no_gpu_is_one_line(
    cuda: SimulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    driver: int,
    visible: str | None,
    message: str,
) -> None:
    cuda.error, cuda.driver, cuda.count = error, driver, 0
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BackendError, match=message) as caught:
        backend()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_frees_the_memory_of_its_device_before_it_gets_a_stream_and_after_its_end(
    cuda: SimulatedCuda, fails: bool
) -> None:
    # Another device is current outside of the session.
    device = backend(ordinal=1)
    cuda.devices, cuda.log = [0], []

    def use() -> None:
        with device.session():
            cuda.note("work")
            if fails:
                raise KeyError("from the work")

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    calls = [call for call, _ in cuda.log if call not in ("wait", "stream ends")]
    assert calls == ["free", "stream", "work", "free"]
    assert {ordinal for _, ordinal in cuda.log} == {1}
