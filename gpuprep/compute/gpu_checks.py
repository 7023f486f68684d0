"""Examines the GPUs of a machine: compares their results with those of the host, and measures their speed."""

from __future__ import annotations

import math
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute import cuda_engine, resample_blocks
from gpuprep.compute.backend import Engine, NumpyBackend, import_cupy_backend
from gpuprep.compute.cuda_kernels import STORED_TYPES, VARIANTS
from gpuprep.compute.gpu_environment import environment_findings, software_findings
from gpuprep.compute.gpu_findings import GpuFinding, GpuReport
from gpuprep.compute.gpu_timing import bandwidths, pass_bytes, stage_seconds
from gpuprep.compute.memory_estimate import needed_bytes, volume_memory_bytes, worker_count
from gpuprep.compute.process import host_chunks
from gpuprep.core import hounsfield
from gpuprep.core.formatting import format_bytes, format_count, printable
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import BackendError

TOLERANCE_HU: dict[Engine, float] = {"operators": 0.01, "ndimage": 0.5}
"""Largest difference between GPU and host that counts as equal. CuPy computes the positions of samples in float32."""

PRESETS = ("default", "classic")
PARITY_SIZE = (128, 128)
"""Rows and columns of the output in comparisons with the host."""

PADDING_RULES = ("air", "keep", "minus2000-to-0")
WINDOWS = ((-1000.0, 400.0, 255 / 1400, 1000.0), (-160.0, 240.0, 65535 / 400, 160.0), (-1350.0, 150.0, 1.0, 0.0))
"""Arguments of `gpuprep.core.hounsfield.window`."""

SERIES_RECIPE = Recipe()
"""Recipe for times, memory and repeated runs."""

IDENTITY_SHAPE = (4, 512, 512)
COPIED_BYTES, COPIES, RUNS = 2**28, 5, 5


class _Failed(Exception):  # noqa: N818 - the result of a check
    """A check found wrong values."""


Found = tuple[str, dict[str, Any]]
"""Text and figures of a check that has passed."""


@dataclass(frozen=True, slots=True)
class Phantoms:
    """Series on which the GPU is examined."""

    small: StoredVolume
    """Series for comparisons with the host, as int16; negative values become 0 where uint16 is compared."""
    series: StoredVolume
    """Series of a usual size, for times and memory."""


def examine_gpus(make_phantoms: Callable[[], Phantoms], cores: int) -> GpuReport:
    """Examine software, environment and all visible GPUs; errors of a check are findings, too.

    Parameters
    ----------
    make_phantoms : callable
        Makes the series to compute; called if there is a device.
    cores : int
        Number of worker processes that a run would start without limits.
    """
    try:
        module = import_cupy_backend()
    except Exception as exc:  # a broken installation of CuPy can raise any exception
        findings = [*software_findings(None), *environment_findings(), _unusable(None, exc)]
        return GpuReport(0, findings)
    findings = [*software_findings(module.cuda_versions()), *environment_findings()]
    findings.append(_checked("version", "cuCIM import", _cucim, module))
    backends = {}
    count = module.device_count()
    for ordinal in range(max(1, count)):
        try:
            backends[ordinal] = module.CupyBackend(ordinal)
        except BackendError as exc:
            findings.append(_unusable(ordinal if count else None, exc))
    if not backends:
        return GpuReport(0, findings)
    phantoms = make_phantoms()
    for ordinal, backend in backends.items():
        found = _device_findings(module, backend, ordinal, phantoms, cores)
        findings += [replace(finding, device=ordinal) for finding in found]
    return GpuReport(len(backends), findings)


def _unusable(ordinal: int | None, exc: Exception) -> GpuFinding:
    name = "GPU" if ordinal is None else "test kernel"
    return GpuFinding("device", name, False, _text(exc), decisive=True, device=ordinal)


def _device_findings(module: Any, backend: Any, ordinal: int, phantoms: Phantoms, cores: int) -> Iterator[GpuFinding]:
    """Yield the findings about one device."""
    plan = make_plan(phantoms.series.geometry, SERIES_RECIPE)
    rates: dict[str, float] = {}
    yield _checked("device", "properties", device, module, ordinal)
    yield _checked("exact", "identity", identity, backend, decisive=True)
    yield _checked("exact", "HU", exact_hu, backend, decisive=True)
    yield _checked("exact", "output types", exact_outputs, backend, decisive=True)
    for engine in get_args(Engine):
        for preset in PRESETS:
            finding = _checked(
                "equal to host", f"{engine}, {preset}", parity, backend, phantoms.small, engine, preset, decisive=True
            )
            # An engine that does not run gives no results that could be wrong.
            yield finding if engine == "operators" or finding.figures else replace(finding, decisive=False)
    yield _checked("repeatable", "two runs", repeatable, backend, phantoms.series, plan, decisive=True)
    yield _checked("memory", "workers", workers, backend, plan, cores)
    yield _checked("speed", "compiler", compiler, module, backend)
    yield _checked("speed", "copies", copies, backend, rates)
    yield _checked("speed", "kernels", kernels, backend, phantoms.series, plan, rates)


def _checked(topic: str, name: str, check: Callable[..., Found], *arguments: Any, decisive: bool = False) -> GpuFinding:
    """Run a check; every exception becomes a finding. Only checks that have run to their end have figures."""
    try:
        detail, figures = check(*arguments)
    except _Failed as exc:
        detail, figures = exc.args
        return GpuFinding(topic, name, False, detail, decisive, figures)
    except Exception as exc:
        return GpuFinding(topic, name, False, _text(exc), decisive)
    return GpuFinding(topic, name, True, detail, decisive, figures)


def _text(exc: Exception) -> str:
    """Return an error as one line."""
    text = str(exc) if isinstance(exc, BackendError) else f"{type(exc).__name__}: {exc}"
    return printable(text.replace("\n", " "))


def _cucim(module: Any) -> Found:
    """Import the libraries of the engine ndimage."""
    module.check_ndimage()
    return "works", {}


def device(module: Any, ordinal: int) -> Found:
    """Return the properties of a device."""
    found = module.device_properties(ordinal)
    name = found["name"].decode(errors="replace")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    figures = {
        "name": name,
        "compute_capability": f"{found['major']}.{found['minor']}",
        "multiprocessors": found.get("multiProcessorCount"),
        "l2_bytes": found.get("l2CacheSize"),
        "total_bytes": found.get("totalGlobalMem"),
        "free_bytes": found["freeMem"],
        "ecc": bool(found["ECCEnabled"]) if "ECCEnabled" in found else None,
        "mig": "MIG" in name or any(entry.strip().startswith("MIG-") for entry in visible.split(",")),
        "uuid": str(uuid.UUID(bytes=found["uuid"])) if len(found.get("uuid", b"")) == 16 else None,
    }
    parts = [
        name,
        f"compute capability {figures['compute_capability']}",
        f"{figures['multiprocessors']} multiprocessors",
        f"L2 {format_bytes(figures['l2_bytes'] or 0)}",
        f"{format_bytes(figures['free_bytes'])} of {format_bytes(figures['total_bytes'] or 0)} free",
        "ECC " + {True: "on", False: "off", None: "unknown"}[figures["ecc"]],
        *(["MIG instance"] if figures["mig"] else []),
        f"UUID {figures['uuid']}",
    ]
    return ", ".join(parts), figures


def identity(backend: Any) -> Found:
    """Check that resampling by the identity returns values bit for bit, along each axis."""
    expected = np.arange(math.prod(IDENTITY_SHAPE), dtype=np.float32).reshape(IDENTITY_SHAPE) % 4095
    expected += np.float32(1 + 2**-12)  # needs all 24 bits of the mantissa
    wrong = {}
    for axis in range(3):
        n = IDENTITY_SHAPE[axis]
        with backend.session() as transfers:
            out = backend.empty(IDENTITY_SHAPE, np.float32)
            tables = resample_blocks.selection(n, 0, n)
            cuda_engine.along_axis(backend.to_device(expected), out, axis, tables, backend)
            (found,) = _downloaded(transfers, [out])
        wrong[f"wrong_values_axis_{axis}"] = int((found.view(np.uint32) != expected.view(np.uint32)).sum())
    shape = " × ".join(map(str, IDENTITY_SHAPE))
    if any(wrong.values()):
        raise _Failed(f"{max(wrong.values())} of {expected.size} values changed: do not use this device", wrong)
    return f"{shape} values of 1 + 2⁻¹² and more are unchanged along each axis", wrong


def exact_hu(backend: Any) -> Found:
    """Check that HU of all types of stored values are bit-identical to the host's."""
    shape, wrong = (6, 64, 64), {}
    slope = np.linspace(0.7, 1.3, shape[0], dtype=np.float32)
    intercept = np.linspace(-1024, -8.3, shape[0], dtype=np.float32)
    rng = np.random.default_rng(0)
    for stored_type in STORED_TYPES:
        limits = np.iinfo(stored_type)
        low, high = max(limits.min, -2100), min(limits.max, 4000)
        stored = rng.integers(low, high, shape, dtype=stored_type, endpoint=True)
        stored[0, 0, :2] = limits.min, limits.max
        padding = np.array([[5, 40]] * 3 + [[1, 0]] * 3, dtype=stored_type)
        for rule in PADDING_RULES:
            expected = hounsfield.to_hu(stored, slope, intercept, padding, rule)
            with backend.session() as transfers:
                arguments = map(backend.to_device, (stored, slope, intercept, padding))
                (found,) = _downloaded(transfers, [backend.to_hu(*arguments, rule)])
            if differs := int((found.view(np.uint32) != expected.view(np.uint32)).sum()):
                wrong[f"{stored_type}, {rule}"] = differs
    figures = {"stored_types": list(STORED_TYPES), "wrong_values": wrong}
    if wrong:
        raise _Failed(f"HU differ from the host's for {'; '.join(wrong)}: do not use this device", figures)
    return f"bit-identical to the host's for {', '.join(STORED_TYPES)}", figures


def exact_outputs(backend: Any) -> Found:
    """Check that windowed and rounded values of all output types are bit-identical to the host's."""
    hu = np.random.default_rng(0).normal(-300, 700, (6, 64, 64)).astype(np.float32)
    hu[0, 0, :8] = np.arange(8) - 3.5  # halves are rounded to even
    wrong = {}
    for dtype in get_args(Dtype):
        for window in (None, *WINDOWS):
            expected = hounsfield.finish(hu.copy(), window, dtype)
            with backend.session() as transfers:
                (found,) = _downloaded(transfers, [backend.finish(backend.to_device(hu), window, dtype)])
            if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                wrong[f"{dtype}, window {window[:2] if window else None}"] = int((found != expected).sum())
    figures = {"output_types": list(get_args(Dtype)), "wrong_values": wrong}
    if wrong:
        raise _Failed(f"values differ from the host's for {'; '.join(wrong)}: do not use this device", figures)
    return f"bit-identical to the host's for {', '.join(get_args(Dtype))}", figures


def parity(backend: Any, small: StoredVolume, engine: Engine, preset: str) -> Found:
    """Compare the output of a recipe with the host's, for int16 and uint16 and for all output types."""
    compared: list[dict[str, Any]] = []
    for stored_type in ("int16", "uint16"):
        volume = replace(small, stored=np.maximum(small.stored, np.iinfo(stored_type).min).astype(stored_type))
        for dtype in get_args(Dtype):
            plan = make_plan(volume.geometry, replace(Recipe.preset(preset), size=PARITY_SIZE, dtype=dtype))
            row: dict[str, Any] = {"stored": stored_type, "written": dtype}
            row["limit_hu"] = limit_hu(plan, engine)
            row["largest_difference_hu"] = largest_difference_hu(volume, plan, backend, engine)
            row["largest_steps"] = None if dtype == "float32" else round(row["largest_difference_hu"] / plan.hu_slope)
            row["ok"] = row["largest_difference_hu"] <= row["limit_hu"]  # False for NaN
            compared.append(row)
    figures = {"tolerance_hu": TOLERANCE_HU[engine], "compared": compared}
    worst = [max((r for r in compared if r["written"] == d), key=_difference_hu) for d in get_args(Dtype)]
    detail = "largest difference " + ", ".join(
        f"{r['written']} " + (f"{_difference_hu(r):.2g} HU" if r["written"] == "float32" else _steps(r)) for r in worst
    )
    if wrong := [f"{r['stored']} to {r['written']}" for r in compared if not r["ok"]]:
        raise _Failed(f"{detail}; too large for {', '.join(wrong)}: do not use this device", figures)
    return f"{detail} (allowed: {TOLERANCE_HU[engine]:g} HU, and for integers one step more)", figures


def largest_difference_hu(volume: StoredVolume, plan: Plan, backend: Any, engine: Engine) -> float:
    """Return the largest difference of an output from that of NumPy and SciPy on the host, in HU; NaN if one is NaN."""
    expected = _whole(volume, plan, NumpyBackend("matmul"), engine)
    found = _whole(volume, plan, backend, engine)
    return float(np.abs(np.subtract(found, expected, dtype=np.float64)).max()) * plan.hu_slope


def limit_hu(plan: Plan, engine: Engine) -> float:
    """Return the largest difference that counts as equal: integers may differ by one step more, by rounding."""
    return TOLERANCE_HU[engine] + (0 if plan.recipe.dtype == "float32" else plan.hu_slope)


def _difference_hu(row: dict[str, Any]) -> float:
    return float(row["largest_difference_hu"])


def _steps(row: dict[str, Any]) -> str:
    return format_count(row["largest_steps"], "step")


def repeatable(backend: Any, series: StoredVolume, plan: Plan) -> Found:
    """Check that two runs give the same bits."""
    sums = [_checksums(series, plan, backend) for _ in range(2)]
    figures = {"chunks": len(sums[0]), "different_chunks": sum(a != b for a, b in zip(*sums, strict=True))}
    if figures["different_chunks"]:
        raise _Failed(
            f"two runs differ in {figures['different_chunks']} of {figures['chunks']} chunks: do not use this device",
            figures,
        )
    return f"two runs of {_shape(series)} voxels are bit-identical", figures


def workers(backend: Any, plan: Plan, cores: int) -> Found:
    """Return how many worker processes and series fit on a device."""
    free, need = backend.free_bytes(), needed_bytes(plan, backend, "operators")
    count = worker_count(free, cores)
    budget = volume_memory_bytes(free, count)
    figures = {
        "free_bytes": free, "workers": count, "needed_bytes_per_series": need, "series_at_once": budget // need,
    }  # fmt: skip
    detail = f"{count} workers for {cores} cores; {format_bytes(need)} per series of {_shape(plan.source)}"
    if budget < need:
        raise _Failed(f"{detail}, but {format_bytes(budget)} are left for all: free memory of the device", figures)
    return f"{detail}, {budget // need} at once", figures


def compiler(module: Any, backend: Any) -> Found:
    """Return the time to compile one variant of the kernel."""
    with backend.session():
        seconds = module.compiler_seconds(VARIANTS[0])
    return f"{seconds:.2f} s for one of {len(VARIANTS)} variants of the kernel, without a cache", {"compile_s": seconds}


def copies(backend: Any, rates: dict[str, float]) -> Found:
    """Measure the bandwidths of copies, and add them to `rates`."""
    rates |= bandwidths(backend, min(COPIED_BYTES, backend.free_bytes() // 8), COPIES)
    detail = (
        f"up {rates['up'] / 1e9:.1f} GB/s ({rates['up_pageable'] / 1e9:.1f} pageable), down {rates['down'] / 1e9:.1f} "
        f"({rates['down_pageable'] / 1e9:.1f}), on the device {rates['device'] / 1e9:.0f}"
    )
    return detail, {f"{name}_bytes_per_s": rate for name, rate in rates.items()}


def kernels(backend: Any, series: StoredVolume, plan: Plan, rates: dict[str, float]) -> Found:
    """Return the times of a series, and the least time for the bytes of its passes, if the bandwidth is known."""
    taken = stage_seconds(series, plan, backend, "operators", RUNS)
    moved = sum(pass_bytes(plan, series.stored.itemsize))
    floor_s = moved / rates["device"] if rates else None
    figures = taken | {"moved_bytes": moved, "floor_s": floor_s}
    detail = f"{_shape(series)} to {plan.recipe.dtype}: kernels {taken['kernels_s'] * 1e3:.2f} ms"
    if floor_s is not None:
        detail += f", {taken['kernels_s'] / floor_s:.1f} times the least time for {format_bytes(moved)}"
    detail += (
        f"; up {taken['upload_s'] * 1e3:.2f} ms, down {taken['download_s'] * 1e3:.2f} ms, "
        f"whole {taken['whole_s'] * 1e3:.0f} ms, first run {taken['first_whole_s'] * 1e3:.0f} ms"
    )
    return detail, figures


def _downloaded(transfers: Any, arrays: list[Any]) -> list[NDArray[Any]]:
    return [array.copy() for array in transfers.downloads(iter(arrays))]


def _checksums(volume: StoredVolume, plan: Plan, backend: Any) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(chunk).data) for chunk in host_chunks(volume, plan, backend)]


def _whole(volume: StoredVolume, plan: Plan, backend: Any, engine: Engine) -> NDArray[Any]:
    return np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, backend, engine)])


def _shape(of: Any) -> str:
    return " × ".join(map(str, getattr(of, "geometry", of).shape))
