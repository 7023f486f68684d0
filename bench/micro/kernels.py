"""Measures kernels and copies of one series on a GPU, and compares kernels with a lower limit from their bytes.

    python -m bench.micro.kernels [--out bench/results/kernels-….json]

The series is a phantom of 108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm, in memory, processed by the default recipe. CUDA
events time the kernels in their stream, without waiting for the host. The floor is the time to move the bytes that the
three passes of the engine ``operators`` read and write, at the bandwidth of a copy on the device, which is measured
here, too. Figures are written after each row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.measure import save, shape_argument
from gpuprep.compute.backend import Engine, get_backend
from gpuprep.compute.gpu_timing import bandwidths, pass_bytes, stage_seconds
from gpuprep.compute.memory_estimate import device_bytes
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import BackendError
from gpuprep.testing import thorax_volume

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
DTYPES: tuple[Dtype, ...] = ("float32", "uint16", "uint8")


def settings(gpu: Any, slab_slices: list[int], chunk_slices: list[int]) -> list[tuple[Engine, int, int]]:
    """Return engine, slices per slab and per chunk of each row: the default of both engines first."""
    default = gpu.slab_slices, gpu.chunk_slices
    others = [(slab, chunk) for slab in slab_slices for chunk in chunk_slices if (slab, chunk) != default]
    return [("operators", *default), ("ndimage", *default), *(("operators", *other) for other in others)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_argument, default=SHAPE, help="shape of the phantom: a small one to test")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slab-slices", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--chunk-slices", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--copied-bytes", type=int, default=2**30)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    try:
        gpu: Any = get_backend("gpu")
    except BackendError as exc:
        print(f"no figures without a GPU: {exc}", file=sys.stderr)
        raise SystemExit(exc.exit_code) from exc
    copied = bandwidths(gpu, args.copied_bytes, args.repeats)
    print(" · ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in copied.items()), flush=True)

    volume = thorax_volume(args.shape, SPACING_MM)
    rows: list[dict[str, Any]] = []
    figures = {
        "device": gpu.device,
        "shape": args.shape,
        "spacing_mm": SPACING_MM,
        "defaults": {"slab_slices": gpu.slab_slices, "chunk_slices": gpu.chunk_slices},
        "bytes_per_second": copied,
        "runs": rows,
    }
    chosen = settings(gpu, args.slab_slices, args.chunk_slices)
    for dtype in DTYPES:
        plan = make_plan(volume.geometry, Recipe(dtype=dtype))
        for engine, slab_slices, chunk_slices in chosen:
            gpu.slab_slices, gpu.chunk_slices = slab_slices, chunk_slices
            row = {"dtype": dtype, "engine": engine, "slab_slices": slab_slices, "chunk_slices": chunk_slices}
            rows.append(row | measured(volume, plan, gpu, engine, copied["device"], args.repeats))
            print(text(rows[-1]), flush=True)
            save(args.out, "bench.micro.kernels", figures, gpu=True)


def measured(
    volume: StoredVolume, plan: Plan, gpu: Any, engine: Engine, bytes_per_s: float, repeats: int
) -> dict[str, Any]:
    """Return times, floor and predicted memory; or the error, because the engine ndimage needs cuCIM."""
    try:
        taken = stage_seconds(volume, plan, gpu, engine, repeats)
    except BackendError as exc:
        return {"error": str(exc)}
    floor_s = sum(pass_bytes(plan, volume.stored.itemsize)) / bytes_per_s
    predicted = {"predicted_bytes": device_bytes(plan, gpu, engine)}
    return taken | {"floor_s": floor_s, "times_floor": taken["kernels_s"] / floor_s} | predicted


def text(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    title = f"{row['dtype']:8} {row['engine']:9} slabs of {row['slab_slices']:3}, chunks of {row['chunk_slices']:3}: "
    if "error" in row:
        return title + str(row["error"])
    return (
        f"{title}kernels {row['kernels_s'] * 1e3:7.2f} ms, {row['times_floor']:.1f} times the floor; up "
        f"{row['upload_s'] * 1e3:.2f}, down {row['download_s'] * 1e3:.2f}, "
        f"whole {row['whole_s'] * 1e3:.1f}, first {row['first_whole_s'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
