"""Estimates the disk space, memory and time of a run before it begins."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Self

from gpuprep import _version
from gpuprep.core.formatting import sized
from gpuprep.core.plan import BYTES
from gpuprep.core.recipe import Recipe
from gpuprep.output.manifest import Manifest
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.decide import Needs, Outlook

REMEMBERED = 1000
"""Series of the manifest's history that are looked at."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What conversions took, by the same recipe and version on the same kind of backend."""

    s_per_voxel: float
    """Of one worker, per voxel read or written."""
    disk_share: float
    """Bytes on disk per byte of voxels."""
    series: int
    """Series it rests on."""

    @classmethod
    def of(cls, results: Iterable[SeriesResult], recipe: Recipe) -> Self | None:
        """Return what some conversions took; None if there are none."""
        seconds, voxels, written, expected, count = 0.0, 0, 0, 0, 0
        for r in results:
            if r.shape is not None and r.source_shape is not None:
                seconds += r.read_s + r.process_s + r.write_s + (r.masks_s or 0.0)
                voxels += prod(r.source_shape) + prod(r.shape)
                written += r.bytes
                expected += prod(r.shape) * BYTES[recipe.dtype]
                count += 1
        return cls(seconds / voxels, written / expected, count) if count else None


def experience(manifest: Manifest | None, recipe: Recipe, backend: str) -> Experience | None:
    """Return what the manifest's history shows; None if there is none."""
    if manifest is None:
        return None
    return Experience.of(manifest.examples(recipe.sha256, _version.__version__, backend, REMEMBERED), recipe)


@dataclass(slots=True)
class Forecast:
    """What a run would take; `add` each of its series."""

    workers: int
    room: int | None
    """Memory that the series in flight share, where that is limited."""
    at_rest_bytes: int
    """What each worker takes without a series."""
    free_disk_bytes: int | None
    experience: Experience | None
    compressed: bool
    series: int = 0
    skipped: int = 0
    rejected: int = 0
    output_bytes: int = 0
    """Of voxels, uncompressed."""
    replaced_bytes: int = 0
    """Of former outputs that go when the new ones are there."""
    voxels: int = 0
    _largest: list[int] = field(default_factory=list)

    def add(self, outlook: Outlook, needs: Needs) -> None:
        """Count a series in."""
        self.series += 1
        self.skipped += outlook.action == "skip"
        self.rejected += outlook.action == "reject"
        self.output_bytes += needs.output_bytes
        self.voxels += needs.voxels
        if outlook.action == "convert" and outlook.former is not None and outlook.former.folder == outlook.folder:
            self.replaced_bytes += outlook.former.bytes
        heapq.heappush(self._largest, needs.memory_bytes)
        if len(self._largest) > self.workers:
            heapq.heappop(self._largest)

    @property
    def todo(self) -> int:
        """Series that are not skipped."""
        return self.series - self.skipped

    @property
    def disk_share(self) -> float | None:
        """Bytes on disk per byte of voxels, where that is known."""
        if not self.compressed:
            return 1.0
        return self.experience.disk_share if self.experience else None

    @property
    def disk_bytes(self) -> int | None:
        """What the disk has to have room for; None where only a conversion can tell."""
        share = self.disk_share
        return None if share is None else max(0, int(self.output_bytes * share) - self.replaced_bytes)

    @property
    def memory_bytes(self) -> int:
        """Predicted peak, of all workers together, where the volumes are computed."""
        largest = max(self._largest, default=0)
        together = sum(self._largest)
        if self.room is not None:
            together = min(together, max(self.room, largest))
        return self.workers * self.at_rest_bytes + together

    @property
    def largest_bytes(self) -> int:
        """Predicted peak of the largest series by itself."""
        return max(self._largest, default=0)

    @property
    def expected_s(self) -> float | None:
        """Time that the series will take together; None without experience."""
        if self.experience is None:
            return None
        return self.voxels * self.experience.s_per_voxel / min(self.workers, max(1, self.todo - self.rejected))

    @property
    def misfit(self) -> str:
        """Why the run cannot fit; "" if nothing speaks against it."""
        need = self.disk_bytes
        if self.free_disk_bytes is not None and need is not None and need > self.free_disk_bytes:
            return (
                f"the outputs need {sized(need)} and {sized(self.free_disk_bytes)} are free: free some, "
                "choose another --out, a smaller --dtype or a --compression, or begin anyway with --no-room-check"
            )
        return ""

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the numbers, as JSON holds them."""
        return {
            "series": self.series,
            "skipped": self.skipped,
            "rejected": self.rejected,
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
