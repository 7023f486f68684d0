"""Measures kernels and copies of one series on a GPU, and compares kernels with a lower limit from their bytes.

    python -m bench.micro.kernels [--out bench/results/kernels-….json]

The series is a phantom of 108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm, in memory, processed by the default recipe. CUDA
events time the kernels in their stream, without waiting for the host. The floor is the time to read the stored integers
once and write the output once at the bandwidth of a copy on the device, which is measured here, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gpuprep.compute.backend import Engine, get_backend
from gpuprep.compute.memory_estimate import device_bytes
from gpuprep.compute.process import host_chunks
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import BackendError
from gpuprep.executors.cores import usable_cores
from gpuprep.pipeline.convert_series import versions
from gpuprep.testing import thorax

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
DTYPES: tuple[Dtype, ...] = ("float32", "uint16", "uint8")
COPIED_BYTES = 2**30


def bandwidths(cupy: Any, repeats: int) -> dict[str, float]:
    """Return the median bytes per second of uploads, downloads and copies on the device (bytes read plus written)."""
    pinned = import_module("cupyx").empty_pinned((COPIED_BYTES,), dtype="uint8")
    pinned[...] = 1
    source, target = cupy.empty(COPIED_BYTES, dtype="uint8"), cupy.empty(COPIED_BYTES, dtype="uint8")
    copies: dict[str, tuple[Callable[[], Any], int]] = {
        "up": (lambda: source.set(pinned), COPIED_BYTES),
        "down": (lambda: source.get(out=pinned, blocking=False), COPIED_BYTES),
        "device": (lambda: cupy.copyto(target, source), 2 * COPIED_BYTES),
    }
    found = {}
    for name, (copy, moved) in copies.items():
        taken = []
        for _ in range(repeats + 1):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(cupy.cuda.get_current_stream())
            copy()
            stop.record(cupy.cuda.get_current_stream())
            stop.synchronize()
            taken.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
        found[name] = moved / statistics.median(taken[1:])
    return found


def stage_times_s(volume: Any, plan: Plan, gpu: Any, engine: Engine, repeats: int) -> dict[str, float]:
    """Return the median seconds of each stage and in total, and those of the first run, which compiles kernels."""
    runs = []
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        for _ in host_chunks(volume, plan, gpu, engine, seconds):
            pass
        runs.append(seconds | {"whole_s": time.perf_counter() - started})
    return {"first_whole_s": runs[0]["whole_s"]} | {
        name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]
    }


def phantom() -> StoredVolume:
    """Return the phantom as a stacked series in memory."""
    dz, dy, dx = SPACING_MM
    affine = np.array([[0, 0, dx, 0], [0, dy, 0, 0], [dz, 0, 0, 0], [0, 0, 0, 1.0]])
    slope, intercept = np.ones(SHAPE[0]), np.full(SHAPE[0], -1024.0)
    stored = thorax(SHAPE, SPACING_MM)
    return StoredVolume(stored, slope, intercept, None, Geometry(SHAPE, affine), HuStatistics())


def main() -> None:
    parser = argparse.ArgumentParser(description="kernels and copies of one series on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--block-rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--slab-slices", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    try:
        gpu: Any = get_backend("gpu")
    except BackendError as exc:
        print(f"no figures without a GPU: {exc}", file=sys.stderr)
        raise SystemExit(exc.exit_code) from exc
    cupy: Any = import_module("cupy")
    copied = bandwidths(cupy, args.repeats)
    print(" · ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in copied.items()), flush=True)

    volume = phantom()
    defaults = gpu.block_rows, gpu.slab_slices
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        plan = make_plan(volume.geometry, Recipe(dtype=dtype))
        moved = volume.stored.nbytes + plan.output_bytes
        floor = moved / copied["device"]
        settings = [("operators", r, s) for r in args.block_rows for s in args.slab_slices]
        for engine, block_rows, slab_slices in (("operators", *defaults), ("ndimage", *defaults), *settings):
            gpu.block_rows, gpu.slab_slices = block_rows, slab_slices
            cupy.get_default_memory_pool().free_all_blocks()
            taken = stage_times_s(volume, plan, gpu, engine, args.repeats)  # type: ignore[arg-type]
            row = {"dtype": dtype, "engine": engine, "block_rows": block_rows, "slab_slices": slab_slices}
            row |= taken | {"floor_s": floor, "times_floor": taken["kernels_s"] / floor}
            row["predicted_bytes"] = device_bytes(plan, gpu, engine)  # type: ignore[arg-type]
            rows.append(row)
            print(
                f"{dtype:8} {engine:9} {block_rows:5} rows {slab_slices:3} slices: "
                f"kernels {taken['kernels_s'] * 1e3:7.2f} ms, {row['times_floor']:.1f} times the floor; up "
                f"{taken['upload_s'] * 1e3:.2f}, down {taken['download_s'] * 1e3:.2f}, "
                f"whole {taken['whole_s'] * 1e3:.1f}, first {taken['first_whole_s'] * 1e3:.0f} ms",
                flush=True,
            )
    result = {
        "command": "python -m bench.micro.kernels " + " ".join(sys.argv[1:]),
        "device": gpu.device,
        "cores": usable_cores(),
        "versions": versions(gpu=True),
        "shape": SHAPE,
        "spacing_mm": SPACING_MM,
        "defaults": {"block_rows": defaults[0], "slab_slices": defaults[1]},
        "bytes_per_second": copied,
        "runs": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
