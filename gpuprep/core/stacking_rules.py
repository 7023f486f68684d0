"""Defines `Rules`: which irregularities of a series are accepted, put right or rejected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Policy = Literal["fix", "strict", "keep"]
GroupBy = Literal["uid", "folder"]

SMALLEST_PART = 3
"""Fewer images of another study, matrix, spacing, orientation or acquisition are strays, and no volume of their own."""

EACH_A_VOLUME = "each is a volume"
"""What is done about several volumes in one series."""


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
    """"fix": what can be put right truthfully is, and is recorded. "strict": whatever is irregular is rejected.
    "keep": slices are stacked as they are, as if evenly spaced, and the irregularity is recorded."""
    spacing_tolerance: float = 0.01
    """Distances between neighbours may differ from their median by this share of it …"""
    position_tolerance_mm: float = 0.02
    """… or by this much, whichever is more: positions are often rounded to hundredths. In pixels finer than 0.1 mm it
    shrinks in proportion to them, to a fifth of a pixel by default."""
    lean_tolerance_mm: float = 0.1
    """Slices may lie this far beside the line along their normal; more is a tilted gantry or a moved table. In pixels
    finer than 0.3 mm it shrinks in proportion to them, to a third of a pixel by default."""
    max_missing: int = 3
    """Slices missing in a row that are still filled by interpolation."""
    max_missing_share: float = 0.1
    """Share of all slices, the missing ones included, that may be missing."""
    assume_hu: bool = False
    """Take rescaled values as HU although *Rescale Type* says otherwise, and stored values where nothing is said."""
    group_by: GroupBy = "uid"
    """"uid": images of one *Series Instance UID* form a series. "folder": images of one folder do, for files each of
    which has a UID of its own, or none."""


@dataclass(frozen=True, slots=True)
class Irregularity:
    """Something about a series that is not as it should be."""

    code: str
    """For programs: "gap", "tilt", … (docs/irregular-series.md lists them)."""
    what: str
    """For people: what, where, how much."""
    done: str
    """What was done about it."""

    @property
    def text(self) -> str:
        """Both in one line."""
        return f"{self.what}; {self.done}"


@dataclass(frozen=True, slots=True)
class SeriesWarning:
    """Something doubtful about a series that is left as it is: the verdict stays what it was."""

    code: str
    """For programs: "padding-ignored", "blank", … (docs/irregular-series.md lists them)."""
    text: str
    """For people: what, where, how much."""


def codes(found: Iterable[Irregularity | SeriesWarning]) -> tuple[str, ...]:
    """Return the codes of irregularities and warnings, each once."""
    return tuple(dict.fromkeys(f.code for f in found))


def texts(found: Iterable[Irregularity | SeriesWarning]) -> tuple[str, ...]:
    """Return the texts of irregularities and warnings."""
    return tuple(f.text for f in found)
