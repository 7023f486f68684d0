"""Defines `Rules`: which irregularities of a series are accepted, corrected or rejected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Policy = Literal["fix", "strict", "keep"]
GroupBy = Literal["uid", "folder"]

MIN_STACK_SLICES = 3
"""Minimum number of images of another study, matrix, spacing, orientation or acquisition that form their own volume;
fewer are treated as strays."""

SEVERAL_VOLUMES_ACTION = "each is a volume"
"""Action taken for a series that holds several volumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Policy and tolerances, as a `Recipe` holds them.

    Examples
    --------
    >>> rules = gpuprep.Rules(policy="strict", max_missing=0)
    >>> gpuprep.Recipe(max_missing=5).rules.max_missing
    5
    """

    policy: Policy = "fix"
    """"fix": irregularities that can be corrected truthfully are corrected and recorded. "strict": irregular series are
    rejected. "keep": slices are stacked as if evenly spaced, and irregularities are recorded."""
    spacing_tolerance: float = 0.01
    """Allowed deviation of a slice distance from the median distance, as a fraction of the median. The larger of this
    and the position tolerance applies."""
    position_tolerance_mm: float = 0.02
    """Allowed deviation of a slice distance in mm, as positions are often rounded to hundredths. For pixels finer than
    0.1 mm it shrinks in proportion to them, by default to a fifth of a pixel."""
    lean_tolerance_mm: float = 0.1
    """Allowed distance in mm of a slice from the line along the normal; more means gantry tilt or a moved table. For
    pixels finer than 0.3 mm it shrinks in proportion to them, by default to a third of a pixel."""
    max_missing: int = 3
    """Maximum number of consecutive missing slices that are interpolated."""
    max_missing_share: float = 0.1
    """Maximum number of missing slices, as a fraction of all slices including the missing ones."""
    assume_hu: bool = False
    """Treat rescaled values as HU despite another *Rescale Type*, and stored values as HU if no rescale is given."""
    group_by: GroupBy = "uid"
    """"uid": images of one *Series Instance UID* form a series. "folder": images of one folder form a series, for files
    with a UID each or without UIDs."""


@dataclass(frozen=True, slots=True)
class Irregularity:
    """A deviation of a series from a regular one that was handled by the policy."""

    code: str
    """Code for programs: "gap", "tilt", … (docs/irregular-series.md lists them)."""
    what: str
    """Description for people: what, where, how much."""
    done: str
    """Action that was taken."""

    @property
    def text(self) -> str:
        """Description and action in one line."""
        return f"{self.what}; {self.done}"


@dataclass(frozen=True, slots=True)
class SeriesWarning:
    """A doubtful finding about a series that is left unchanged and does not affect the verdict."""

    code: str
    """Code for programs: "padding-ignored", "blank", … (docs/irregular-series.md lists them)."""
    text: str
    """Description for people: what, where, how much."""


def codes(found: Iterable[Irregularity | SeriesWarning]) -> tuple[str, ...]:
    """Return the distinct codes of irregularities and warnings, in order."""
    return tuple(dict.fromkeys(f.code for f in found))


def texts(found: Iterable[Irregularity | SeriesWarning]) -> tuple[str, ...]:
    """Return the texts of irregularities and warnings."""
    return tuple(f.text for f in found)
