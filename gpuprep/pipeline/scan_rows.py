"""Turns planned series into rows, with what is known of each from its headers and what a run would do with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gpuprep.core.formatting import printable
from gpuprep.core.stacking_rules import texts
from gpuprep.output.columns import SERIES, TEXT, WHOLE, Column
from gpuprep.pipeline.planned_series import PlannedSeries
from gpuprep.pipeline.series_query import KNOWN_COLUMNS

SCAN_COLUMNS: dict[str, Column] = {
    "action": Column("action", TEXT, 'What a run would do: "convert", "skip", "reject" or "exclude".'),
    **KNOWN_COLUMNS,
    **{name: SERIES[name] for name in ("reason", "irregularities", "warnings", "source_shape", "source_spacing_mm")},
    **{name: SERIES[name] for name in ("shape", "spacing_mm")},
    "output_bytes": Column("output_bytes", WHOLE, "Size of the voxels of the output.", optional=True, unit="bytes"),
    "audit": SERIES["audit"],
}
"""Columns of a row, by name."""


def scan_row(planned: PlannedSeries) -> dict[str, Any]:
    """Return the row of a series."""
    series, plan, audited = planned.series, planned.plan, planned.audit
    row = asdict(planned.facts) | {
        "action": planned.action,
        "key": series.key,
        "series_uid": series.series_uid,
        "study_uid": series.study_uid,
        "series_number": series.series_number,
        "source": printable(series.folder),
        "slices": len(series.slices),
        "verdict": audited.verdict if audited and planned.action == "exclude" else planned.verdict,
        "codes": planned.codes,
        "reason": planned.reason,
        "irregularities": texts(audited.irregularities) if audited else (),
        "warnings": texts(planned.warnings),
        "source_shape": plan and plan.source.shape,
        "source_spacing_mm": plan and plan.source.spacing_mm,
        "shape": plan and plan.target.shape,
        "spacing_mm": plan and plan.target.spacing_mm,
        "output_bytes": plan and plan.output_bytes,
        "audit": audited and audited.to_dict(),
    }
    return {name: row[name] for name in SCAN_COLUMNS}
