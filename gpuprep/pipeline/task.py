"""Defines `Task`: all that a worker needs to convert one series."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from gpuprep import _version
from gpuprep.compute.backend import Backend, Engine
from gpuprep.compute.pinned_transfer import DEVICE_VARIABLE
from gpuprep.core.formatting import printable
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import texts
from gpuprep.dicom.audit import Audit
from gpuprep.output.folder_store import Output
from gpuprep.output.records import SeriesResult, Status, now, this_host
from gpuprep.pipeline.planned_series import PlannedSeries

if TYPE_CHECKING:
    from gpuprep.pipeline.pseudonyms import Pseudonyms


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A planned series with the settings of its run."""

    planned: PlannedSeries
    recipe: Recipe
    engine: Engine
    backend: Backend
    output: Output
    names: Pseudonyms | None = None
    """Pseudonyms of UIDs and patients in the output; None: UIDs are stored as they are."""

    @property
    def known(self) -> bool:
        """Whether the manifest has an earlier output of this series in this folder."""
        former = self.planned.former
        return former is not None and self.planned.folder == former.folder != ""

    def public(self, result: SeriesResult) -> SeriesResult:
        """Return a result as it may be stored in OUT."""
        return result if self.names is None else self.names.public(result, self.planned.series)

    def result(self, audited: Audit | None = None) -> SeriesResult:
        """Return the result of the series as it begins: status "failed", with all that is known before conversion."""
        series, warnings = self.planned.series, self.planned.notes + texts(self.planned.match_warnings)
        return SeriesResult(
            **asdict(self.planned.facts),
            key=series.key,
            series_uid=series.series_uid,
            study_uid=series.study_uid,
            series_number=series.series_number,
            source=printable(series.folder),
            status="failed",
            codes=audited.codes if audited else (),
            irregularities=texts(audited.irregularities) if audited else (),
            warnings=warnings + (texts(audited.warnings) if audited else ()),
            audit=audited.to_dict() if audited else None,
            slices=len(series.slices),
            engine=self.engine,
            backend=self.backend.name,
            device=os.environ.get(DEVICE_VARIABLE, self.backend.device),
            fingerprint=self.planned.fingerprint,
            recipe_sha256=self.recipe.sha256,
            version=_version.__version__,
            host=this_host(),
        )

    def left_out(self) -> SeriesResult:
        """Return the result of a series that is rejected by its headers or segmentations, or excluded."""
        planned = self.planned
        status: Status = "excluded" if planned.action == "exclude" else "rejected"
        return replace(
            self.result(planned.audit), status=status, reason=planned.reason, codes=planned.codes, finished=now()
        )
