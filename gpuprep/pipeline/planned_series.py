"""Defines `PlannedSeries`: one series of a run, and what will be done with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from gpuprep.core.plan import Plan
from gpuprep.core.series import Description, Series
from gpuprep.core.stacking_rules import SeriesWarning, codes
from gpuprep.dicom.audit import Audit, Verdict
from gpuprep.output.records import Entry, SeriesFacts
from gpuprep.pipeline.segmentation_files import SegmentationSummary


class Needs(NamedTuple):
    """Resources that the conversion of one series takes."""

    output_bytes: int
    """Size of its voxels on disk, uncompressed."""
    memory_bytes: int
    """Peak memory on the host, or on the device that computes."""
    voxels: int
    """Number of voxels read and written; the time is proportional to it."""


NO_NEEDS = Needs(0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSeries:
    """One series of a run, and what will be done with it: known from headers and the manifest alone.

    Its conversion turns it into a `SeriesResult`, one row of the manifest.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> files[4].unlink()
    >>> (planned,) = gpuprep.scan("dicom").planned
    >>> planned.action, planned.verdict, planned.codes, planned.plan.target.shape
    ('convert', 'fixed', ('gap',), (36, 512, 512))
    """

    series: Series
    action: Literal["convert", "skip", "reject", "exclude"]
    folder: str = ""
    """Output folder, relative to OUT."""
    plan: Plan | None = None
    """None for a series that is skipped or rejected."""
    audit: Audit | None = None
    """None for a series that is skipped."""
    facts: SeriesFacts = SeriesFacts()  # noqa: RUF009 - immutable
    """What is known of it; nothing for a series that is skipped."""
    reason: str = ""
    """Why it is rejected, "Error: text", or excluded, "code: text"."""
    code: str = ""
    """Code of an exclusion, or of a rejection that is not in the audit."""
    notes: tuple[str, ...] = ()
    """Warnings about the files around the series."""
    fingerprint: str = ""
    """Hash of the input as it may be stored in OUT: see `fingerprint_in_out`."""
    former: Entry | None = None
    """Entry of the manifest from an earlier run."""
    segmentations: tuple[SegmentationSummary, ...] = ()
    """Segmentations that belong to the series."""
    structures: tuple[str, ...] = ()
    """Names under which their structures are converted."""
    label_values: tuple[tuple[str, int], ...] = ()
    """Structures and their label values, where structures share a volume."""
    needs: Needs = NO_NEEDS

    @property
    def verdict(self) -> Verdict | Literal["skipped", "excluded"]:
        """Verdict of the headers, or what else is done with it."""
        if self.action == "exclude":
            return "excluded"
        if self.action == "reject":
            return "rejected"
        return "skipped" if self.audit is None else self.audit.verdict

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of the reasons for the verdict, and of warnings."""
        if self.code:
            return (self.code,)
        return () if self.audit is None else tuple(dict.fromkeys(self.audit.codes + codes(self.warnings)))

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """Warnings about the headers, the plan, and the match of segmentations."""
        if self.audit is None:
            return ()
        planned = self.plan.warnings if self.plan is not None and self.plan.recipe.image else ()
        return self.audit.warnings + planned + self.match_warnings

    @property
    def match_warnings(self) -> tuple[SeriesWarning, ...]:
        """Warnings about which segmentations go to the series."""
        return tuple(warning for s in self.segmentations if (warning := s.warning) is not None)

    def for_worker(self) -> Self:
        """Return the series as a worker needs it.

        Plan and audit are large, and made anew from the headers. The description may name anybody.
        """
        series = replace(self.series, description=Description(), patient="")
        return replace(self, series=series, plan=None, audit=None)

    def excluded(self, reason: str, code: str) -> Self:
        """Return the series as one that the user did not choose."""
        return replace(self, action="exclude", folder="", plan=None, reason=reason, code=code, notes=(), needs=NO_NEEDS)

    def rejected(self, reason: str, code: str = "") -> Self:
        """Return the series as one that is not converted."""
        return replace(self, action="reject", folder="", plan=None, reason=reason, code=code, notes=(), needs=NO_NEEDS)
