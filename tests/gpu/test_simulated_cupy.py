"""The stand-in for CuPy: it gives right values to right programs, and each mistake shows."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import array_api_compat
import numpy as np
import pytest
from cuda_on_host import KernelFault, LaunchError
from simulated_cuda import DOWNLOAD_S, KERNEL_S, UPLOAD_S, Gpu, Machine, simulate, simulation
from simulated_finder import installed

pytestmark = pytest.mark.usefixtures("cupy_on_host")

TWO = Machine(gpus=(Gpu("GPU-0a", "first"), Gpu("GPU-0b", "second")))
two_gpus = pytest.mark.parametrize("cupy_on_host", [TWO], indirect=True)
NAN = np.float32("nan")


@pytest.fixture
def cupy() -> Any:
    return import_module("cupy")


def outcomes(program: Callable[[Any], Any]) -> set[Any]:
    """Return the results of a program for thirty orders of work."""
    found = set()
    for seed in range(30):
        simulate(Machine(seed=seed))
        found.add(program(import_module("cupy")))
    return found


def pinned(values: Any) -> Any:
    host = import_module("cupyx").empty_pinned(np.shape(values), np.float32)
    host[...] = values
    return host


def test_an_array_is_converted_to_numpy_only_explicitly(cupy: Any) -> None:
    array = cupy.asarray(np.arange(6.0).reshape(2, 3))
    conversions: list[Callable[[Any], Any]] = [np.asarray, np.array, lambda a: np.concatenate([a])]
    for convert in conversions:
        with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
            convert(array)
    for host in (array.get(), cupy.asnumpy(array)):
        assert type(host) is np.ndarray
        assert host.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_host_arrays_are_not_mixed_with_device_arrays(cupy: Any) -> None:
    array = cupy.zeros(3, np.float32)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
        array + np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
        array[:2] = np.ones(2, np.float32)
    with pytest.raises(TypeError, match="float64 array cannot be set to float32 array"):
        array.set(np.ones(3))
    with pytest.raises(ValueError, match="Shape mismatch"):
        array.get(out=np.ones(2, np.float32))


def test_new_memory_is_not_a_number(cupy: Any) -> None:
    assert np.isnan(cupy.empty(5, np.float32).get()).all()
    assert cupy.empty(2, np.int16).get().tolist() == [0x7FFD, 0x7FFD]
    assert np.isnan(import_module("cupyx").empty_pinned(5, np.float32)).all()


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_that_changes_before_its_copy_has_run_is_uploaded_changed(cupy: Any, waits: bool) -> None:
    host, array = pinned([1, 2]), cupy.empty(2, np.float32)
    array.set(host)
    event = cupy.cuda.Event(block=True, disable_timing=True)
    event.record()
    if waits:
        event.synchronize()
    host[...] = 7
    assert array.get().tolist() == ([1, 2] if waits else [7, 7])


def test_pageable_memory_may_change_after_the_call(cupy: Any) -> None:
    host, array = np.ones(2, np.float32), cupy.empty(2, np.float32)
    array.set(host)
    host[...] = 7
    assert array.get().tolist() == [1, 1]


def test_a_download_is_complete_when_it_is_waited_for(cupy: Any) -> None:
    array, host = cupy.asarray(np.ones(2, np.float32)), pinned([5, 5])
    array.get(out=host, blocking=False)
    assert host.tolist() == [5, 5]
    cupy.cuda.get_current_stream().synchronize()
    assert host.tolist() == [1, 1]
    pageable = np.zeros(2, np.float32)
    array.get(out=pageable, blocking=False)  # CUDA waits, because it copies through a buffer of its own
    assert pageable.tolist() == [1, 1]


def test_a_deleted_page_locked_buffer_is_reused_although_it_is_still_being_copied(cupy: Any) -> None:
    array, host = cupy.empty(200, np.float32), pinned(np.ones(200))
    array.set(host)
    del host
    other = pinned(np.full(200, 3))
    assert set(array.get().tolist()) == {3}
    assert other[0] == 3


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_ordered_only_by_events(waits: bool) -> None:
    def program(cupy: Any) -> float:
        first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with first:
            array = cupy.zeros(1, np.float32)
            array[...] = 4
        if waits:
            second.wait_event(first.record())
        with second:
            return float((array + 1).get()[0])

    found = outcomes(program)
    assert (found == {5}) if waits else (5 in found and len(found) > 1)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_only_a_non_blocking_stream_does_not_wait_for_the_null_stream(non_blocking: bool) -> None:
    def program(cupy: Any) -> tuple[float, float]:
        array = cupy.zeros(1, np.float32)
        array[...] = 4
        with cupy.cuda.Stream(non_blocking=non_blocking):
            copy = array + 1
        seen = float((copy + 0).get()[0])  # in the null stream again
        return (round(seen, 3), 0) if seen == seen else (-1, 0)

    found = outcomes(program)
    assert (5, 0) in found
    assert (len(found) > 1) == non_blocking


def test_a_new_stream_gets_the_handle_of_a_deleted_one(cupy: Any) -> None:
    stream, other = cupy.cuda.Stream(), cupy.cuda.Stream()
    handle = stream.ptr
    assert handle != other.ptr
    del stream
    assert cupy.cuda.Stream(non_blocking=True).ptr == handle


@pytest.mark.parametrize("frees", [True, False])
def test_memory_of_a_deleted_array_is_reused_while_another_stream_reads_it(frees: bool) -> None:
    def program(cupy: Any) -> float:
        mine = cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            array = cupy.full(1000, 4, np.float32)
            stream.synchronize()
        del stream
        with mine:
            total = array + 1
        del array
        if frees:
            cupy.get_default_memory_pool().free_all_blocks()
        with cupy.cuda.Stream(non_blocking=True) as later:  # has the handle of the first stream, and its arena
            cupy.full(1000, 9, np.float32)
            later.synchronize()
        with mine:
            return float(np.nan_to_num(total.get()[0], nan=-1))

    found = outcomes(program)
    assert (found == {5}) if frees else (5 in found and found & {10, -1})


def test_current_device_and_stream_are_restored_in_each_thread(cupy: Any) -> None:
    null = cupy.cuda.get_current_stream()
    assert null.ptr == 0
    with cupy.cuda.Stream() as outer:
        with pytest.raises(KeyError), cupy.cuda.Stream():
            raise KeyError
        assert cupy.cuda.get_current_stream() == outer
    assert cupy.cuda.get_current_stream() == null


@two_gpus
def test_each_device_has_its_own_stream_pool_and_arrays(cupy: Any) -> None:
    pool = cupy.get_default_memory_pool
    array = cupy.zeros(1000, np.float32)
    assert pool().used_bytes() == 4096
    with cupy.cuda.Stream() as stream, cupy.cuda.Device(1):
        assert cupy.cuda.Device() == cupy.cuda.Device(1)
        assert cupy.cuda.get_current_stream().ptr == 0
        assert pool().used_bytes() == 0
        with pytest.raises(ValueError, match="array device = 0 while current = 1"):
            array + 1
        with pytest.raises(RuntimeError, match=r"created on \(0\) does not match with the current device \(1\)"):
            stream.__enter__()
        del array
        pool().free_all_blocks()  # of the other device
    assert (pool().used_bytes(), pool().total_bytes(), pool().free_bytes()) == (0, 4096, 4096)
    pool().free_all_blocks()
    assert pool().total_bytes() == 0
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice: invalid device ordinal"), cupy.cuda.Device(2):
        pass


def test_the_pool_splits_and_merges_blocks_like_cupys(cupy: Any) -> None:
    pool = cupy.get_default_memory_pool()
    large = cupy.empty(4096, np.uint8)
    del large
    small = cupy.empty(1000, np.uint8)  # 1024 bytes of the block of 4096
    assert (pool.used_bytes(), pool.total_bytes(), pool.n_free_blocks()) == (1024, 4096, 1)
    pool.free_all_blocks()  # not a part of a block
    assert pool.total_bytes() == 4096
    with cupy.cuda.Stream():
        other = cupy.empty(1000, np.uint8)  # another stream, another arena
    assert (pool.used_bytes(), pool.total_bytes()) == (2048, 5120)
    del small, other
    assert pool.n_free_blocks() == 2
    pool.free_all_blocks()
    assert pool.total_bytes() == 0


def test_the_last_view_of_an_array_keeps_its_memory(cupy: Any) -> None:
    view = cupy.asarray(np.arange(10, dtype=np.float32))[2:4]
    cupy.zeros(10, np.float32)
    assert view.get().tolist() == [2, 3]
    assert cupy.get_default_memory_pool().used_bytes() == 512


@pytest.mark.parametrize("cupy_on_host", [Machine(gpus=(Gpu(memory_bytes=10_000),))], indirect=True)
def test_lack_of_memory_has_the_words_of_cupy(cupy: Any) -> None:
    pool, error = cupy.get_default_memory_pool(), cupy.cuda.memory.OutOfMemoryError
    kept = cupy.empty(6000, np.uint8)
    with pytest.raises(error, match=r"^Out of memory allocating 4,096 bytes \(allocated so far: 6,144 bytes\)\.$"):
        cupy.empty(4000, np.uint8)
    assert cupy.cuda.Device(0).mem_info == (10_000 - 6144, 10_000)
    del kept
    assert cupy.empty(9000, np.uint8).size == 9000  # the free block of 6144 bytes goes back to the device first
    pool.free_all_blocks()
    pool.set_limit(size=2048)
    with pytest.raises(error, match=r"3,072 bytes \(allocated so far: .* bytes, limit set to: 2,048 bytes\)"):
        cupy.empty(3000, np.uint8)
    assert error.__module__ == "cupy.cuda.memory"


def test_a_hook_sees_every_allocation(cupy: Any) -> None:
    class Sizes(cupy.cuda.MemoryHook):  # type: ignore[misc]
        seen: ClassVar[list[int]] = []

        def malloc_postprocess(self, **details: Any) -> None:
            self.seen.append(details["size"])

    cupy.empty(7, np.float32)
    with Sizes():
        cupy.empty(5, np.float32)
    assert Sizes.seen == [20]


def test_elapsed_time_needs_two_recorded_and_completed_events_with_timing(cupy: Any) -> None:
    elapsed, error = cupy.cuda.get_elapsed_time, cupy.cuda.runtime.CUDARuntimeError
    start, stop, untimed = cupy.cuda.Event(), cupy.cuda.Event(block=True), cupy.cuda.Event(disable_timing=True)
    with pytest.raises(error, match="cudaErrorInvalidResourceHandle"):
        elapsed(start, stop)
    start.record()
    array = cupy.empty(2, np.float32)
    array.set(np.ones(2, np.float32))
    cupy.RawKernel('extern "C" __global__ void add(float* a) { a[threadIdx.x] += 1; }', "add")((1,), (2,), (array,))
    stop.record()
    untimed.record()
    with pytest.raises(error, match="cudaErrorNotReady"):
        elapsed(start, stop)
    stop.synchronize()
    assert elapsed(start, stop) == 1000 * (UPLOAD_S + KERNEL_S)
    untimed.synchronize()
    with pytest.raises(error, match="cudaErrorInvalidResourceHandle"):
        elapsed(start, untimed)
    array.get()
    stop.record()
    stop.synchronize()
    assert elapsed(start, stop) == 1000 * (UPLOAD_S + KERNEL_S + DOWNLOAD_S)


def test_polling_an_event_ends(cupy: Any) -> None:
    cupy.zeros(4) + 1
    event = cupy.cuda.get_current_stream().record()
    assert not event.done
    while not event.done:
        pass


@pytest.mark.parametrize("cupy_on_host", [Machine(fatal_value=77)], indirect=True)
def test_a_lost_device_fails_every_later_call(cupy: Any) -> None:
    array = cupy.empty(2, np.int16)
    array.set(np.array([1, 77], np.int16))  # is only queued
    for call in (
        array.get,
        lambda: cupy.empty(2),
        cupy.cuda.Stream,
        cupy.cuda.Event,
        cupy.cuda.Device(0).synchronize,
        lambda: cupy.cuda.Device(0).mem_info,
    ):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorIllegalAddress: an illegal memory"):
            call()


MIG = Machine(gpus=(Gpu("MIG-1", "H200 MIG 1g.18gb"), Gpu("MIG-2", "H200 MIG 2g.35gb")))


@pytest.mark.parametrize(
    ("machine", "visible", "names"),
    [
        (TWO, None, ["first", "second"]),
        (TWO, "1", ["second"]),
        (TWO, "1,0", ["second", "first"]),
        (TWO, "GPU-0b", ["second"]),
        (TWO, "GPU-0", []),  # not unique
        (TWO, "0,7,1", ["first"]),  # CUDA stops at the first that does not exist
        (TWO, "", []),
        (MIG, None, ["H200 MIG 1g.18gb"]),
        (MIG, "MIG-2", ["H200 MIG 2g.35gb"]),
        (MIG, "MIG-2,MIG-3", ["H200 MIG 2g.35gb"]),
    ],
)
def test_the_visible_devices_are_those_that_cuda_lists(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, machine: Machine, visible: str | None, names: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runtime = cupy.cuda.runtime
    with installed(machine):
        if names:
            count = runtime.getDeviceCount()
            assert [runtime.getDeviceProperties(n)["name"].decode() for n in range(count)] == names
        else:
            with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorNoDevice: no CUDA-capable device"):
                runtime.getDeviceCount()
            assert not cupy.is_available()


def test_without_a_driver_of_the_right_version_there_is_no_device(cupy: Any) -> None:
    for driver in (0, 11080):
        with installed(Machine(driver_version=driver, runtime_version=12090)):
            assert cupy.cuda.runtime.driverGetVersion() == driver
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInsufficientDriver"):
                cupy.cuda.runtime.getDeviceCount()


def test_cuda_does_not_work_in_a_forked_process(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.zeros(1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInitializationError"):
        cupy.zeros(1)


SCALE = """
extern "C" __global__ void scale(FLOAT* a, const float by, const int n) {
    if (threadIdx.x < n) a[threadIdx.x] *= by;
}
"""


def test_a_raw_kernel_gets_views_and_scalars(cupy: Any) -> None:
    kernel = cupy.RawKernel(SCALE, "scale", ("-DFLOAT=float",))
    array = cupy.ones(6, np.float32)
    kernel((0,), (32,), (array[2:4], np.float32(3), np.int32(2)))  # CuPy makes one block of none
    assert array.get().tolist() == [1, 1, 3, 3, 1, 1]
    for wrong in ((array, 3.0, np.int32(2)), (array, np.float32(3), 2), (array, np.float32(3))):
        with pytest.raises(LaunchError):
            kernel((1,), (32,), wrong)
    with pytest.raises(TypeError, match=r"numpy.ndarray of shape \(6,\) as a kernel parameter"):
        kernel((1,), (32,), (np.ones(6, np.float32), np.float32(3), np.int32(2)))
    with pytest.raises(TypeError, match="tuple"):
        kernel([1], (32,), (array, np.float32(3), np.int32(2)))


def test_a_mistake_of_a_kernel_shows_when_it_has_run(cupy: Any) -> None:
    kernel = cupy.RawKernel(SCALE, "scale", ("-DFLOAT=float",))
    array, neighbour = cupy.ones(6, np.float32), cupy.ones(6, np.float32)
    kernel((1,), (32,), (array, np.float32(3), np.int32(7)))
    with pytest.raises(KernelFault, match="outside of every array; nearest is array 0 of 24 bytes, at byte 24"):
        neighbour.get()


def test_each_source_is_compiled_once_for_its_options(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compiled = cupy.cuda.compiler, []
    original = compiler._compile_module_with_cache

    def count(source: str, *args: Any, **options: Any) -> Any:
        compiled.append(source)
        return original(source, *args, **options)

    monkeypatch.setattr(compiler, "_compile_module_with_cache", count)
    for _ in range(2):
        for kind, dtype in (("float", np.float32), ("double", np.float64), ("float", np.float32)):
            array = cupy.ones(3, dtype)
            cupy.RawKernel(SCALE, "scale", (f"-DFLOAT={kind}",))((1,), (3,), (array, np.float32(2), np.int32(3)))
    assert len(compiled) == 2
    with pytest.raises(compiler.CompileException, match="FLOAT"):
        cupy.RawModule(code=SCALE).get_function("scale").compile()


def test_the_array_namespace_computes_like_numpys(cupy: Any) -> None:
    host = np.arange(12, dtype=np.int32).reshape(3, 4)
    array = cupy.asarray(host)
    xp = array_api_compat.array_namespace(array)
    assert array_api_compat.is_cupy_namespace(xp)
    assert array_api_compat.device(array) == cupy.cuda.Device(0)
    results = {
        "flip": (xp.flip(xp.permute_dims(array, (1, 0)), axis=0), host.T[::-1]),
        "take": (xp.take(array, cupy.asarray([2, 0]), axis=0), host[[2, 0]]),
        "where": (xp.where(array > 4, array, 0), np.where(host > 4, host, 0)),
        "sum": (xp.cumulative_sum(xp.reshape(xp.astype(array, xp.int64), (-1,))), host.ravel().cumsum()),
        "full": (xp.full((2,), 3.5, dtype=xp.float32), np.full(2, 3.5)),
        "mask": (array[array > 7], np.array([8, 9, 10, 11])),
        "reduced": (array.max(), np.array(11)),
        "remainder": (array % 5 * 2 - array // 3, host % 5 * 2 - host // 3),
        "power": (-(array**2), -(host**2)),
        "concat": (xp.concat([array, array], axis=1), np.hstack([host, host])),
    }
    for name, (found, expected) in results.items():
        np.testing.assert_array_equal(found.get(), expected, name)
    view = xp.reshape(array, (4, 3), copy=False)
    view[...] = 1
    array += 1
    assert array.get().tolist() == [[2] * 4] * 3
    assert bool(array[0, 0] == 2)
    assert not hasattr(cupy, "insert")


ANTI_ALIASING = ("anti_aliasing", "anti_aliasing_sigma")


def test_the_library_functions_have_the_parameters_of_cupy_and_cucim() -> None:
    # Of CuPy 14.2 and cuCIM 26.10, read from their signatures.
    functions = [
        import_module("cupyx.scipy.ndimage").zoom,
        import_module("cupyx.scipy.ndimage").gaussian_filter,
        import_module("cucim.skimage.transform").resize,
    ]
    names = [list(inspect.signature(function).parameters) for function in functions]
    assert names == [
        ["input", "zoom", "output", "order", "mode", "cval", "prefilter", "grid_mode"],
        ["input", "sigma", "order", "output", "mode", "cval", "truncate", "radius", "axes"],
        [*("image", "output_shape", "order", "mode", "cval", "clip", "preserve_range"), *ANTI_ALIASING],
    ]


def test_a_child_process_finds_the_stand_in_and_imports_nothing_before() -> None:
    code = """
import sys
before = [m for m in ("numpy", "simulated_cupy", "cupy") if m in sys.modules]
import cupy
print(before, (cupy.ones(3) * 2).get().sum(), cupy.cuda.runtime.getDeviceProperties(0)["name"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 6.0 b'Simulated GPU'"


def test_cupy_is_gone_afterwards(cupy: Any) -> None:
    with installed(TWO):
        assert import_module("cupy").cuda.runtime.getDeviceCount() == 2
        inner = import_module("gpuprep.compute.cupy_backend")
    assert import_module("gpuprep.compute.cupy_backend") is not inner
    assert cupy.cuda.runtime.getDeviceCount() == len(simulation().devices()) == 1
