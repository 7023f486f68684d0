"""Estimates, without a GPU, the time of each kernel launch and the memory per worker, for two cards.

    python -m bench.micro.gpu_estimate

The engine runs with a backend that records its launches and computes nothing. For each launch there are three lower
limits: its bytes at the memory bandwidth of the card, its loads and stores per warp at one per clock and
multiprocessor, and its instructions at four per clock and multiprocessor. Results that the next launch reads are not
counted as bytes of the memory if they fit in the second-level cache. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.cuda_kernels import grid
from gpuprep.compute.memory_estimate import CONTEXT_BYTES, USABLE_SHARE, device_bytes, worker_count
from gpuprep.compute.process import host_chunks
from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.testing import thorax_volume

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
DTYPES: tuple[Dtype, ...] = ("uint8", "float32")

LOAD_INSTRUCTIONS, STORED_INSTRUCTIONS, STORE_INSTRUCTIONS = 16, 8, 6
"""Instructions per sample of a block, more of them if it is a stored value, and instructions per output."""


@dataclass(frozen=True, slots=True)
class Card:
    """Published figures of a graphics card."""

    name: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    """Bandwidth of its memory."""
    cache_bytes: int
    """Size of its second-level cache."""
    memory_bytes: int
    host_bytes_per_s: float
    """Bandwidth of the bus in each direction, as copies reach it."""


CARDS = (
    Card("H200 SXM (PCIe 5.0 × 16)", 132, 1.98e9, 4.8e12, 50 * 10**6, 141 * 10**9, 55e9),
    Card("RTX 4080 Laptop, 12 GB (PCIe 4.0 × 16)", 58, 2.28e9, 432e9, 48 * 10**6, 12 * 10**9, 25e9),
)


@dataclass(slots=True)
class Launch:
    """Work of one launch."""

    stage: str
    read_bytes: int
    written_bytes: int
    width: int
    """Samples per block of outputs."""
    warps: int
    """Warps that compute."""
    transposed: bool
    stored: bool
    from_cache: bool
    """Whether the values were written by the launch before."""
    to_cache: bool = False
    """Whether the next launch reads the result."""

    def limits_s(self, card: Card) -> tuple[float, float, float]:
        """Return the lower limits by memory, by loads and stores, and by instructions."""
        moved = 0
        for size, cached in ((self.read_bytes, self.from_cache), (self.written_bytes, self.to_cache)):
            moved += 0 if cached and size <= card.cache_bytes else size
        per_warp = 3 * self.width + (3 if self.transposed else 1) * OUTPUTS
        instructions = self.width * (LOAD_INSTRUCTIONS + self.stored * STORED_INSTRUCTIONS)
        instructions += OUTPUTS * STORE_INSTRUCTIONS
        clocks = self.warps / card.multiprocessors / card.clock_hz
        return moved / card.bytes_per_s, per_warp * clocks, instructions / 4 * clocks


class Recorder(NumpyBackend):
    """Backend that records launches of the kernel instead of computing."""

    name = "gpu"

    def __init__(self) -> None:
        super().__init__("kernels")
        self.chunk_slices, self.slab_slices = 64, 32
        self.launches: list[Launch] = []
        self._last: Any = None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def resample(self, values: Any, out: Any, tables: BlockTables, **options: Any) -> None:
        transposed, stored = options.get("transposed", False), options.get("rescale") is not None
        cached = self._last is not None and np.shares_memory(values, self._last)
        if cached:
            self.launches[-1].to_cache = True
        if stored or (cached and self.launches[-1].stored):
            stage = "source slices"
        else:
            stage = "output slices" if transposed else "across slices"
        width = int(tables.weights.shape[1])
        blocks_x, _, outer = grid(values.shape, tables.n_out)
        warps = blocks_x * outer * -(-tables.n_out // OUTPUTS)
        rows = min(values.shape[1], int(tables.first[-1]) + width - int(tables.first[0]))
        columns = values.shape[0] * values.shape[2]
        read, written = rows * columns * values.itemsize, tables.n_out * columns * out.itemsize
        self.launches.append(Launch(stage, read, written, width, warps, transposed, stored, cached))
        self._last = out


def recorded(volume: StoredVolume, dtype: Dtype) -> tuple[list[Launch], Plan]:
    """Return the launches for a series, and its plan."""
    plan, recorder = make_plan(volume.geometry, Recipe(dtype=dtype)), Recorder()
    for _ in host_chunks(volume, plan, recorder):
        pass
    return recorder.launches, plan


def main() -> None:
    """Print a table per card and output type."""
    volume = thorax_volume(SHAPE, SPACING_MM)
    for dtype in DTYPES:
        launches, plan = recorded(volume, dtype)
        for card in CARDS:
            print(f"\n{card.name}, {dtype}, {len(launches)} launches\n")
            print("| stage | launches | by bytes, ms | by loads and stores, ms | by instructions, ms | highest, ms |")
            print("|---|---|---|---|---|---|")
            total = np.zeros(4)
            for stage in dict.fromkeys(launch.stage for launch in launches):
                limits = np.array([x.limits_s(card) for x in launches if x.stage == stage])
                figures = np.array([*limits.sum(axis=0), limits.max(axis=1).sum()]) * 1e3
                total += figures
                print(f"| {stage} | {len(limits)} | " + " | ".join(f"{f:.3f}" for f in figures) + " |")
            print(f"| kernels | {len(launches)} | " + " | ".join(f"{f:.3f}" for f in total) + " |")
            copied = volume.stored.nbytes / card.host_bytes_per_s * 1e3, plan.output_bytes / card.host_bytes_per_s * 1e3
            print(f"| copies up and down | | {copied[0]:.2f} + {copied[1]:.2f} | | | {sum(copied):.2f} |")
            need, workers = device_bytes(plan, Recorder(), "operators"), worker_count(card.memory_bytes, 16)
            fit = int(USABLE_SHARE * card.memory_bytes) // (CONTEXT_BYTES + need)
            print(
                f"\nA series needs {need / 1e6:.0f} MB beside {CONTEXT_BYTES / 1e6:.0f} MB of the process: "
                f"{fit} workers with a series each would fit; of 16 that are asked for, gpuprep starts {workers}."
            )


if __name__ == "__main__":
    main()
