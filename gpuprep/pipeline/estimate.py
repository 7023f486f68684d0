"""Estimates the disk space, memory and time of a run before it begins."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Self

from gpuprep import _version
from gpuprep.core.formatting import format_bytes
from gpuprep.core.plan import BYTES_PER_VOXEL
from gpuprep.core.recipe import Recipe
from gpuprep.output.manifest import Manifest
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.planned_series import PlannedSeries

REMEMBERED = 1000
"""Number of series of the manifest from which an experience is computed, the latest first."""


@dataclass(frozen=True, slots=True)
class Experience:
    """Time and disk space of earlier conversions with the same recipe, version and kind of backend."""

    s_per_voxel: float
    """Time of one worker per voxel read or written, in s."""
    disk_share: float
    """Bytes on disk per byte of voxels."""
    series: int
    """Number of series from which it was computed."""

    @classmethod
    def of(cls, results: Iterable[SeriesResult], recipe: Recipe) -> Self | None:
        """Return the experience of some conversions; None if there are none."""
        seconds, voxels, written, expected, count = 0.0, 0, 0, 0, 0
        for r in results:
            if r.shape is not None and r.source_shape is not None:
                seconds += r.read_s + r.process_s + r.write_s + (r.masks_s or 0.0)
                voxels += prod(r.source_shape) + prod(r.shape)
                written += r.bytes
                expected += prod(r.shape) * BYTES_PER_VOXEL[recipe.dtype]
                count += 1
        return cls(seconds / voxels, written / expected, count) if count else None


def experience(manifest: Manifest | None, recipe: Recipe, backend: str) -> Experience | None:
    """Return the experience of the conversions in a manifest; None if there are none."""
    if manifest is None:
        return None
    return Experience.of(manifest.examples(recipe.sha256, _version.__version__, backend, REMEMBERED), recipe)


@dataclass(slots=True)
class Forecast:
    """Disk space, memory and time that a run will take; `add` each of its series."""

    workers: int
    budget_bytes: int | None
    """Memory in bytes that concurrent series share; None: no limit."""
    at_rest_bytes: int
    """Memory of each worker without a series."""
    free_disk_bytes: int | None
    experience: Experience | None
    compressed: bool
    series: int = 0
    skipped: int = 0
    rejected: int = 0
    excluded: int = 0
    output_bytes: int = 0
    """Size of all voxels, uncompressed."""
    replaced_bytes: int = 0
    """Size of former outputs that are removed once the new ones are complete."""
    voxels: int = 0
    _largest: list[int] = field(default_factory=list)

    def add(self, planned: PlannedSeries) -> None:
        """Add a series."""
        needs, former = planned.needs, planned.former
        self.series += 1
        self.skipped += planned.action == "skip"
        self.rejected += planned.action == "reject"
        self.excluded += planned.action == "exclude"
        self.output_bytes += needs.output_bytes
        self.voxels += needs.voxels
        if planned.action == "convert" and former is not None and former.folder == planned.folder:
            self.replaced_bytes += former.bytes
        heapq.heappush(self._largest, needs.memory_bytes)
        if len(self._largest) > self.workers:
            heapq.heappop(self._largest)

    @property
    def todo(self) -> int:
        """Series that are not skipped."""
        return self.series - self.skipped

    @property
    def disk_share(self) -> float | None:
        """Bytes on disk per byte of voxels; None where compression makes it unknown."""
        if not self.compressed:
            return 1.0
        return self.experience.disk_share if self.experience else None

    @property
    def disk_bytes(self) -> int | None:
        """Disk space that the run takes; None where it is unknown before a conversion."""
        share = self.disk_share
        return None if share is None else max(0, int(self.output_bytes * share) - self.replaced_bytes)

    @property
    def memory_bytes(self) -> int:
        """Predicted peak memory of all workers together, on the host or device that computes."""
        largest = max(self._largest, default=0)
        together = sum(self._largest)
        if self.budget_bytes is not None:
            together = min(together, max(self.budget_bytes, largest))
        return self.workers * self.at_rest_bytes + together

    @property
    def largest_bytes(self) -> int:
        """Predicted peak memory of the largest series."""
        return max(self._largest, default=0)

    @property
    def expected_s(self) -> float | None:
        """Time of the run in s; None without experience."""
        if self.experience is None:
            return None
        converted = self.todo - self.rejected - self.excluded
        return self.voxels * self.experience.s_per_voxel / min(self.workers, max(1, converted))

    @property
    def misfit(self) -> str:
        """Reason why the run does not fit on the disk; "" if it does, or that is unknown."""
        need = self.disk_bytes
        if self.free_disk_bytes is not None and need is not None and need > self.free_disk_bytes:
            return (
                f"the outputs need {format_bytes(need)} and {format_bytes(self.free_disk_bytes)} are free: free some, "
                "choose another --out, a smaller --dtype or a --compression, or begin anyway with --no-room-check"
            )
        return ""

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the numbers as JSON values."""
        return {
            "series": self.series,
            "skipped": self.skipped,
            "rejected": self.rejected,
            "excluded": self.excluded,
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "memory_bytes": self.memory_bytes,
            "largest_series_bytes": self.largest_bytes,
            "workers": self.workers,
            "expected_s": self.expected_s,
            "experience_series": self.experience.series if self.experience else 0,
            "misfit": self.misfit,
        }
