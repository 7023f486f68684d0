"""Audits a series from its headers: measures, irregularities, and a verdict with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import Irregularity, Rules, SeriesWarning, codes
from gpuprep.dicom.header_checks import warnings
from gpuprep.dicom.slice_positions import Measures
from gpuprep.dicom.stack import Stack, stack
from gpuprep.errors import InputError

Verdict = Literal["ok", "fixed", "rejected"]

MAX_LISTED = 100
"""Largest number of entries of a list in the record; `to_dict` adds the total."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit of one series.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> files[4].unlink()
    >>> audited = gpuprep.audit(gpuprep.discover("dicom")[0])
    >>> audited.verdict, audited.codes
    ('fixed', ('gap',))
    >>> print(audited.irregularities[0].done)
    interpolated from the slices around
    """

    series: Series
    stack: Stack | None
    error: InputError | None
    """Reason for a rejection."""
    measures: Measures
    policy: str

    @property
    def verdict(self) -> Verdict:
        """Return "ok" (regular, or kept by policy "keep"), "fixed" (irregularities corrected) or "rejected"."""
        if self.stack is None:
            return "rejected"
        return "fixed" if self.irregularities and self.policy == "fix" else "ok"

    @property
    def irregularities(self) -> tuple[Irregularity, ...]:
        """Irregularities that were corrected, or kept by policy "keep"."""
        return self.stack.irregularities if self.stack is not None else self.series.irregularities

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """Doubtful attributes that are left as they are."""
        return warnings(self.series)

    @property
    def codes(self) -> tuple[str, ...]:
        """Machine-readable codes of the reasons for the verdict and of the warnings."""
        if self.error is not None:
            return (self.error.code,)
        return codes((*self.irregularities, *self.warnings))

    @property
    def reason(self) -> str:
        """Human-readable reason for a rejection; "" if the series is not rejected."""
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as a JSON-serialisable dictionary; None for those that could not be taken."""
        slices, m = self.series.slices, self.measures
        return {
            "slices": len(slices),
            "spacing_mm": m.spacing_mm,
            "spacing_deviation_mm": m.spacing_deviation_mm,
            "gaps": [{"after": name, "mm": mm, "missing": missing} for name, mm, missing in m.gaps[:MAX_LISTED]],
            "missing": sum(missing for *_, missing in m.gaps),
            "duplicates": {"identical": m.identical, "different": m.different},
            "tilt_deg": m.tilt_deg,
            "obliqueness_deg": m.obliqueness_deg,
            "orientation": m.orientation or None,
            "padding": sorted({s.padding for s in slices if s.padding is not None}),
            "rescales": len({(s.rescale_slope, s.rescale_intercept) for s in slices}),
            "bits_stored": sorted({s.bits_stored for s in slices if s.bits_stored is not None}),
            "transfer_syntaxes": sorted({s.transfer_syntax for s in slices}),
            "left_out": [{"image": name, "why": why} for name, why in self.series.left_out[:MAX_LISTED]],
            "left_out_images": len(self.series.left_out),
        }


def audit(series: Series, rules: Rules | None = None) -> Audit:
    """Return the audit of a series; problems are reported in it and not raised.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`, with the same rules.
    rules : Rules, optional
        Policy and tolerances; `Rules()` by default.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> audited = gpuprep.audit(gpuprep.discover("dicom")[0])
    >>> audited.verdict, audited.measures.spacing_mm, audited.measures.orientation
    ('ok', 3.0, 'axial SPL')
    """
    rules = rules or Rules()
    measures = Measures()
    try:
        stacked = stack(series, rules, measures)
    except InputError as exc:
        return Audit(series, None, exc, measures, rules.policy)
    return Audit(series, stacked, None, measures, rules.policy)
