"""Derives what is known of each series before its conversion, and which series of a cohort belong together."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import directions
from gpuprep.core.series import Description, Series
from gpuprep.dicom.acquisition_keys import ACQUISITION
from gpuprep.dicom.slice_positions import Measures
from gpuprep.output.columns import FREE_TEXT
from gpuprep.output.records import SeriesFacts

SAME_EXTENT_SHARE = 0.9
"""Least share of the common extent of two series of one acquisition that both cover."""

PHASES = (
    ("NominalPercentageOfRespiratoryPhase", "%", ACQUISITION["respiratory phase"].value),
    ("NominalPercentageOfCardiacPhase", "%", ACQUISITION["cardiac phase"].value),
    ("NominalRespiratoryTriggerDelayTime", "ms", ACQUISITION["respiratory trigger delay"].value),
    ("NominalCardiacTriggerDelayTime", "ms", ACQUISITION["cardiac trigger delay"].value),
    ("TriggerTime", "ms", ACQUISITION["trigger time"].value),
    ("TemporalPositionTimeOffset", "s", ACQUISITION["temporal offset"].value),
    ("TemporalPositionIdentifier", "index", ACQUISITION["temporal position"].value),
)
"""Attributes of phases in the order in which they are tried: keyword, unit, and value of an image."""

_PERCENT = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d+)?)\s*%")
_ITERATIVE = re.compile(r"\b(ASI?R|ASIR-V|SAFIRE|ADMIRE|IDOSE|IMR|AIDR|VEO|FBP|BLEND)\W*(V\W*)?\d", re.IGNORECASE)
"""Words before a percentage that is the strength of an iterative reconstruction."""


class Phase(NamedTuple):
    """Phase of a 4D scan."""

    value: float
    unit: str
    source: str
    """Keyword of the DICOM attribute that it was read from."""


class Relation(NamedTuple):
    """Relations of a series to the others of its cohort."""

    study_order: int | None
    group_id: str
    phase: Phase | None
    reach_mm: float | None
    """Distance from the first to the last slice along the normal."""


def facts_of(series: Series, measures: Measures, relation: Relation, duplicate_of: str | None) -> SeriesFacts:
    """Return what is known of a series; `measures` are those of its audit."""
    said, dose = series.description, series.dose
    spacing, between = series.pixel_spacing_mm, measures.spacing_mm
    phase, reach_mm = relation.phase, relation.reach_mm
    values = {
        "study_order": relation.study_order,
        "frame_of_reference_uid": series.frame_of_reference_uid,
        "group_id": relation.group_id,
        "duplicate_of": duplicate_of,
        "phase": phase and phase.value,
        "phase_unit": phase and phase.unit,
        "phase_source": phase and phase.source,
        "plane": measures.orientation.partition(" ")[0],
        "rows": series.rows or None,
        "columns": series.columns or None,
        "slice_spacing_mm": between,
        "row_spacing_mm": spacing and spacing[0],
        "column_spacing_mm": spacing and spacing[1],
        "extent_mm": reach_mm + between if reach_mm is not None and between else None,
        "fov_rows_mm": (spacing and spacing[0] * series.rows) or None,
        "fov_columns_mm": (spacing and spacing[1] * series.columns) or None,
        **{name: getattr(said, name) for name in _SAID},
        **dose._asdict(),
    }
    return SeriesFacts(**{name: None if value == "" else value for name, value in values.items()})


_SAID = [f.name for f in fields(SeriesFacts) if f.name in Description._fields]
"""Facts that the description of a series has as they are."""


def known_row(series: Series, facts: SeriesFacts, verdict: str, codes: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of the columns that are known before a conversion, by name."""
    return asdict(facts) | {
        "key": series.key,
        "series_uid": series.series_uid,
        "study_uid": series.study_uid,
        "series_number": series.series_number,
        "source": printable(series.folder),
        "slices": len(series.slices),
        "verdict": verdict,
        "codes": codes,
    }


def public_facts(facts: SeriesFacts, record: Iterable[str]) -> SeriesFacts:
    """Return facts as they may be stored in OUT: of the free texts only those in `record`."""
    return replace(facts, **dict.fromkeys(set(FREE_TEXT).difference(record)))


def relations(cohort: Sequence[Series]) -> dict[str, Relation]:
    """Return the relations of each series of a cohort, by its key."""
    studies = _study_orders(cohort)
    extents = {s.key: _extent(s) for s in cohort}
    groups = _groups(cohort, extents)
    phases = _described_phases(cohort) | _measured_phases(cohort)
    return {
        s.key: Relation(
            studies.get((s.patient, s.study_uid)),
            groups[s.key],
            phases.get(s.key),
            extent.reach_mm if (extent := extents[s.key]) is not None else None,
        )
        for s in cohort
    }


def _study_orders(cohort: Iterable[Series]) -> dict[tuple[str, str], int]:
    """Return the number of each dated study among those of its patient, by patient and study."""
    times: dict[str, dict[str, str]] = defaultdict(dict)
    for series in cohort:
        if series.patient and series.study_uid and series.description.study_time:
            studies = times[series.patient]
            time = series.description.study_time
            studies[series.study_uid] = min(time, studies.get(series.study_uid, time))
    return {
        (patient, study): n
        for patient, studies in times.items()
        for n, study in enumerate(sorted(studies, key=lambda uid: (studies[uid], uid)), 1)
    }


@dataclass(slots=True)
class _Scan:
    """What the series of one acquisition have in common."""

    key: str
    """Smallest key of them."""
    acquisition_uid: str
    acquired_s: tuple[float, float] | None
    height_mm: tuple[float, float]
    """Lowest and highest position along the axis of the patient."""

    def includes(self, other: _Scan) -> bool:
        same_uid = bool(self.acquisition_uid) and self.acquisition_uid == other.acquisition_uid
        one, two = self.acquired_s, other.acquired_s
        same_time = one is not None and two is not None and one[0] <= two[1] and two[0] <= one[1]
        (a, b), (c, d) = self.height_mm, other.height_mm
        return (same_uid or same_time) and min(b, d) - max(a, c) >= SAME_EXTENT_SHARE * (max(b, d) - min(a, c))


def _groups(cohort: Iterable[Series], extents: Mapping[str, _Extent | None]) -> dict[str, str]:
    """Return the ID of the group of each series, by its key."""
    scans: dict[tuple[str, str], list[_Scan]] = defaultdict(list)
    members: dict[str, _Scan] = {}
    for series in cohort:
        extent = extents[series.key]
        height = extent.height_mm if extent is not None else None
        scan = _Scan(series.key, series.description.acquisition_uid, series.acquired_s, height or (0.0, 0.0))
        if height is not None and series.frame_of_reference_uid:
            others = scans[series.study_uid, series.frame_of_reference_uid]
            known = next((other for other in others if other.includes(scan)), None)
            if known is None:
                others.append(scan)
            else:
                known.key = min(known.key, scan.key)
                scan = known
        members[series.key] = scan
    return {key: hashlib.sha256(scan.key.encode()).hexdigest()[:8] for key, scan in members.items()}


class _Extent(NamedTuple):
    """Extent of a series."""

    reach_mm: float
    """Distance from the first to the last slice along the normal."""
    height_mm: tuple[float, float] | None
    """Lowest and highest position along the axis of the patient, with the halves of the outer voxels."""


def _extent(series: Series) -> _Extent | None:
    """Return the extent of a series; None if the positions of its slices are unknown."""
    axes = directions(series.orientation) if series.orientation is not None else None
    positions = [p for s in series.slices if (p := s.position_mm) is not None]
    if axes is None or len(positions) < len(series.slices):
        return None
    x, y, z = map(float, axes[2])
    along = [x * p[0] + y * p[1] + z * p[2] for p in positions]
    reach_mm = max(along) - min(along)
    if not series.pixel_spacing_mm:
        return _Extent(reach_mm, None)
    between_rows, between_columns = series.pixel_spacing_mm
    row, column = float(axes[0][2]), float(axes[1][2])
    # From the outermost slices to the corners of their matrices.
    corners = [
        i * between_columns * row + j * between_rows * column
        for i in (-0.5, series.columns - 0.5)
        for j in (-0.5, series.rows - 0.5)
    ]
    half = abs(z) * reach_mm / max(1, len(set(along)) - 1) / 2
    heights = [p[2] for p in positions]
    return _Extent(reach_mm, (min(heights) + min(corners) - half, max(heights) + max(corners) + half))


def _measured_phases(cohort: Iterable[Series]) -> dict[str, Phase]:
    """Return the phase of each series whose slices all have the same, by its key.

    Delays and numbers count only if they differ between series of one frame of reference: ordinary scans have them too.
    """
    found: dict[str, Phase] = {}
    values: dict[tuple[str, str, str], set[float]] = defaultdict(set)
    for series in cohort:
        for keyword, unit, value_of in PHASES:
            value = value_of(series.slices[0])
            if value not in (None, "") and all(value_of(s) == value for s in series.slices):
                found[series.key] = own = Phase(float(str(value)), unit, keyword)
                values[series.study_uid, series.frame_of_reference_uid, keyword].add(own.value)
                break
    return {
        s.key: phase
        for s in cohort
        if (phase := found.get(s.key)) is not None
        and (phase.unit == "%" or len(values[s.study_uid, s.frame_of_reference_uid, phase.source]) > 1)
    }


def _described_phases(cohort: Iterable[Series]) -> dict[str, Phase]:
    """Return percentages in *Series Description* by which series of one grid differ, by the key of the series.

    Other numbers in the description may differ, too.
    """
    alike: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for series in cohort:
        text = series.description.series_description
        found = _PERCENT.findall(text)
        if len(found) != 1 or float(found[0]) > 100 or _ITERATIVE.search(text):
            continue
        said = series.description
        grid = (series.rows, series.columns, series.pixel_spacing_mm, len(series.slices), said.slice_thickness_mm)
        words = re.sub(r"\d+", "#", _PERCENT.sub("%", text))
        alike[series.study_uid, series.frame_of_reference_uid, *grid, said.kernel, words][series.key] = float(found[0])
    return {
        key: Phase(percent, "%", "SeriesDescription")
        for phases in alike.values()
        if len(set(phases.values())) == len(phases) > 1
        for key, percent in phases.items()
    }
