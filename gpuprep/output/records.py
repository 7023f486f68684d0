"""Defines `SeriesResult` and `RunRecord`: what workers send home and the manifest keeps."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "fixed", "skipped", "rejected", "failed"]
"""ok: converted. fixed: converted, and what was irregular put right. skipped: complete and unchanged since an earlier
run. rejected: what is on disk cannot be converted truthfully. failed: something went wrong on the way."""


DONE = ("ok", "fixed", "skipped")
"""Of a series whose output is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult:
    """One line of the manifest."""

    key: str
    """Series Instance UID, with ``#part`` where one UID stands for several stacks."""
    series_uid: str
    study_uid: str
    series_number: int | None
    source: str
    """Folder the slices lie in."""
    status: Status
    reason: str = ""
    """Why it was rejected or failed: "Error: text"."""
    codes: tuple[str, ...] = ()
    """Why it was rejected, or what was irregular, for programs: "gap", "tilt", …"""
    irregularities: tuple[str, ...] = ()
    """What was irregular and what was done about it, for people."""
    warnings: tuple[str, ...] = ()
    slices: int = 0
    source_shape: tuple[int, int, int] | None = None
    source_spacing_mm: tuple[float, float, float] | None = None
    hu_min: float | None = None
    """Of the stacked series, before padding is replaced."""
    hu_max: float | None = None
    hu_mean: float | None = None
    padding_share: float | None = None
    """Of the voxels of the stack."""
    quality: dict[str, Any] | None = None
    """Distribution of the HU of what was measured: see `Histogram.to_dict`."""
    audit: dict[str, Any] | None = None
    """What was measured on the headers: see `Audit.to_dict`."""
    segmentations: tuple[dict[str, Any], ...] | None = None
    """Files that masks were made of, each with its format and by what that was recognised."""
    labels: tuple[dict[str, Any], ...] | None = None
    """Structures, each with its value and file, and voxels and ml before and after resampling: see `Label`."""
    folder: str = ""
    """Relative to OUT."""
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    files: int = 0
    bytes: int = 0
    read_s: float = 0.0
    process_s: float = 0.0
    write_s: float = 0.0
    upload_s: float | None = None
    """Of the device's time; the device works while the host reads and writes."""
    kernels_s: float | None = None
    download_s: float | None = None
    masks_s: float | None = None
    engine: str = ""
    backend: str = ""
    device: str = ""
    fingerprint: str = ""
    """Of the input: see `Series.fingerprint`."""
    recipe_sha256: str = ""
    version: str = ""
    sha256: str | None = None
    """Of ``volume.json``, which has the checksum of every other file of the output."""
    host: str | None = None
    finished: str = ""
    """UTC, ISO 8601."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def now() -> str:
    """Return the time for `SeriesResult.finished`; as text it sorts as it should."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


State = Literal["running", "finished", "interrupted"]
"""Of a run. One that was killed is still called running: whether it is, its lock says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run, as the manifest keeps it."""

    started: str
    """UTC, ISO 8601."""
    ended: str = ""
    state: State = "running"
    host: str
    pid: int
    version: str
    recipe_sha256: str
    device: str
    series: int
    """In the whole cohort, or in the shard."""
    skipped: int
    """Of these, complete and unchanged."""
    todo: int
    """… and to be converted or rejected in this run."""
    request: str
    """What was asked for, to ask for it again: JSON."""


class Entry(NamedTuple):
    """What says whether an output stands for an input."""

    status: Status
    folder: str
    files: int
    bytes: int
    fingerprint: str
    recipe_sha256: str
    version: str


def this_host() -> str:
    """Return the name of this machine."""
    return platform.node()
