"""Times the compiled loops one by one and compares them with limits from memory bandwidth and arithmetic throughput.

    python -m bench.micro.stages [--out bench/results/stages-….json]

One core, one series of 108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm, to uint8. Each loop has two floors: the bytes that it
moves beyond the cache (stored values, planes between the passes, output) at the speed of a copy measured in the same
run, and its multiplications at the rate of a loop that does nothing else. ``docs/performance.md`` discusses them.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from bench.measure import save
from gpuprep.compute import numba_kernels
from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.compute.slice_summary import summary
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.testing import thorax

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
ROUNDS = 9
STAGES = ("summary", "to_hu", "along_rows", "along_columns", "forwards", "backwards", "finish", "combine_rounded")


@numba.njit(fastmath=True)
def _products(values: Any, times: int) -> None:
    """Multiply and add in registers, at the peak rate of the core."""
    for x in range(0, len(values), 128):
        part = values[x : x + 128]
        for _ in range(times):
            for i in range(128):
                part[i] = part[i] * np.float32(0.999) + np.float32(0.001)


def best_s(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the seconds of the fastest run, after one warm-up run."""
    function()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)


def copy_bytes_per_s() -> float:
    """Return the bandwidth of a memory copy in bytes per second, read plus written."""
    source = np.ones(2**25, dtype=np.float32)
    target = np.empty_like(source)
    return 2 * source.nbytes / best_s(lambda: np.copyto(target, source))


def products_per_s() -> float:
    """Return the peak number of multiply-add operations per second of one core."""
    values, times = np.ones(128, dtype=np.float32), 10_000_000
    return values.size * times / best_s(lambda: _products(values, times), 3)


def stages_s(volume: StoredVolume) -> dict[str, float]:
    """Return the shortest times of each loop, and of the code between the loops, in seconds."""
    plan = make_plan(volume.geometry, Recipe(dtype="uint8"))
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            spent[name] += time.perf_counter() - started
            return result

        return run

    def convert() -> None:
        for values in volume.stored:
            summary(values, 1.0, -1024.0, None, loops=True)
        for _ in host_chunks(volume, plan, NumpyBackend("loops")):
            pass

    convert()
    originals = {name: getattr(numba_kernels, name) for name in STAGES}
    for name, function in originals.items():
        setattr(numba_kernels, name, timed(name, function))
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        spent.clear()
        started = time.perf_counter()
        convert()
        spent["between them"] = time.perf_counter() - started - sum(spent.values())
        best = {name: min(best.get(name, np.inf), s) for name, s in spent.items()}
    for name, function in originals.items():
        setattr(numba_kernels, name, function)
    return best


def needs(plan: Any) -> dict[str, tuple[float, float]]:
    """Return the bytes that each loop moves beyond the cache, and its number of multiplications."""
    n, rows, columns = plan.resample.source
    m, j, i = plan.resample.target
    _, height, width = plan.target.shape
    planes = 4.0 * n * j * i
    return {
        "summary": (2.0 * n * rows * columns, 0.0),
        "to_hu": (2.0 * n * rows * columns, 1.0 * n * rows * columns),
        "along_rows": (0.0, 3.0 * n * rows * columns + 4.0 * n * j * columns),
        "along_columns": (planes, 13.0 * n * j * columns + 4.0 * n * j * i),
        "forwards": (2 * planes, 2.0 * n * j * i),
        "backwards": (2 * planes, 1.0 * n * j * i),
        "finish": (planes, 5.0 * m * j * i + 2.0 * m * j * width),
        "combine_rounded": (1.0 * m * height * width, 2.0 * m * height * width),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    stored = thorax(SHAPE, SPACING_MM)
    affine = np.diag([*SPACING_MM, 1.0])[[2, 1, 0, 3]]
    volume = StoredVolume(
        stored, np.ones(len(stored)), np.full(len(stored), -1024.0), None, Geometry(SHAPE, affine), HuStatistics()
    )
    bandwidth, rate = copy_bytes_per_s(), products_per_s()
    seconds = stages_s(volume)
    table = {}
    for name, (size, products) in needs(make_plan(volume.geometry, Recipe(dtype="uint8"))).items():
        table[name] = {"s": seconds[name], "bytes_floor_s": size / bandwidth, "products_floor_s": products / rate}
    table["between them"] = {"s": seconds["between them"], "bytes_floor_s": 0.0, "products_floor_s": 0.0}
    table["all"] = {key: sum(row[key] for row in table.values()) for key in ("s", "bytes_floor_s", "products_floor_s")}
    print(f"copy {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.1f} products per ns, one core\n")
    print("| loop | ms | bytes, ms | products, ms | × the higher |")
    print("|---|---|---|---|---|")
    for name, row in table.items():
        spent, *floors = (row[key] * 1e3 for key in ("s", "bytes_floor_s", "products_floor_s"))
        ratio = f"{spent / max(floors):.1f}" if max(floors) else ""
        print(f"| {name} | {spent:.1f} | {floors[0]:.1f} | {floors[1]:.1f} | {ratio} |")
    figures = {"copy_bytes_per_s": bandwidth, "products_per_s": rate, "stages": table}
    save(args.out, "bench.micro.stages", figures)


if __name__ == "__main__":
    main()
