"""Defines `SeriesResult` and `RunRecord`, the rows of the manifest."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "fixed", "skipped", "excluded", "rejected", "failed"]
"""ok: converted. fixed: converted after its irregularities were corrected. skipped: complete and unchanged since an
earlier run. excluded: not among the series that the user chose. rejected: the files cannot be converted truthfully.
failed: an error that may not occur again."""

DONE = ("ok", "fixed", "skipped")
"""Statuses of series that have an output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFacts:
    """What is known of a series before its conversion; `gpuprep.output.columns.FACTS` explains its fields."""

    study_order: int | None = None
    frame_of_reference_uid: str | None = None
    group_id: str | None = None
    duplicate_of: str | None = None
    phase: float | None = None
    phase_unit: str | None = None
    phase_source: str | None = None
    plane: str | None = None
    rows: int | None = None
    columns: int | None = None
    slice_spacing_mm: float | None = None
    slice_thickness_mm: float | None = None
    row_spacing_mm: float | None = None
    column_spacing_mm: float | None = None
    extent_mm: float | None = None
    fov_rows_mm: float | None = None
    fov_columns_mm: float | None = None
    reconstruction_diameter_mm: float | None = None
    image_type: str | None = None
    kernel: str | None = None
    contrast: str | None = None
    kvp: float | None = None
    tube_current_ma: float | None = None
    exposure_mas: float | None = None
    ctdivol_mgy: float | None = None
    pitch: float | None = None
    manufacturer: str | None = None
    model: str | None = None
    body_part: str | None = None
    patient_position: str | None = None
    scan_options: str | None = None
    acquisition_type: str | None = None
    series_description: str | None = None
    protocol_name: str | None = None
    study_description: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult(SeriesFacts):
    """Result of one series, a row of the manifest; `gpuprep.output.columns.SERIES` explains its fields."""

    key: str
    series_uid: str
    study_uid: str
    series_number: int | None
    source: str
    status: Status
    reason: str = ""
    codes: tuple[str, ...] = ()
    irregularities: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    slices: int = 0
    source_shape: tuple[int, int, int] | None = None
    source_spacing_mm: tuple[float, float, float] | None = None
    crop: dict[str, Any] | None = None
    hu_min: float | None = None
    hu_max: float | None = None
    hu_mean: float | None = None
    padding_share: float | None = None
    quality: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    segmentations: tuple[dict[str, Any], ...] | None = None
    labels: tuple[dict[str, Any], ...] | None = None
    folder: str = ""
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    files: int = 0
    bytes: int = 0
    read_s: float = 0.0
    process_s: float = 0.0
    write_s: float = 0.0
    upload_s: float | None = None
    kernels_s: float | None = None
    download_s: float | None = None
    masks_s: float | None = None
    engine: str = ""
    backend: str = ""
    device: str = ""
    fingerprint: str = ""
    recipe_sha256: str = ""
    version: str = ""
    sha256: str | None = None
    host: str | None = None
    finished: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def now() -> str:
    """Return the current time in UTC as ISO 8601, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


State = Literal["running", "finished", "interrupted"]
"""State of a run. A killed run keeps the state "running"; its lock shows that it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run, a row of the manifest; `gpuprep.output.columns.RUNS` explains its fields."""

    started: str
    ended: str = ""
    state: State = "running"
    host: str
    pid: int
    version: str
    recipe_sha256: str
    device: str
    series: int
    skipped: int
    todo: int
    request: str


class Entry(NamedTuple):
    """Columns that decide whether the output of a series is complete and up to date."""

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
