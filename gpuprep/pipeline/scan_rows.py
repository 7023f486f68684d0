"""Turns planned series into rows, with what is known of each from its headers and what a run would do with it."""

from __future__ import annotations

from typing import Any

from gpuprep.core.stacking_rules import texts
from gpuprep.output.columns import SERIES, TEXT, WHOLE, Column
from gpuprep.pipeline.planned_series import PlannedSeries
from gpuprep.pipeline.series_facts import known_row
from gpuprep.pipeline.series_query import KNOWN_COLUMNS

SCAN_COLUMNS: dict[str, Column] = {
    "action": Column("action", TEXT, 'What a run would do: "convert", "skip", "reject" or "exclude".'),
    **KNOWN_COLUMNS,
    **{name: SERIES[name] for name in ("reason", "irregularities", "warnings")},
    **{name: SERIES[name] for name in ("source_shape", "source_spacing_mm", "shape", "spacing_mm")},
    "output_bytes": Column("output_bytes", WHOLE, "Size of the voxels of the output.", optional=True, unit="bytes"),
    "audit": SERIES["audit"],
}
"""Columns of a row, by name."""


def scan_row(planned: PlannedSeries) -> dict[str, Any]:
    """Return the row of a series."""
    series, plan, audited = planned.series, planned.plan, planned.audit
    verdict = audited.verdict if audited and planned.action == "exclude" else planned.verdict
    row = known_row(series, planned.facts, verdict, planned.codes) | {
        "action": planned.action,
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
