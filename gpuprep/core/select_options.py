"""Defines `Select`: which series of a cohort are converted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from gpuprep.core.formatting import QUOTED
from gpuprep.core.recipe_table import fields_of_table
from gpuprep.errors import RecipeError

BestPer = Literal["study", "patient", "frame-of-reference"]

TEXTS = ("where", "prefer")
OPTIONAL = (*TEXTS, "best_per")
"""Fields that may be "none"."""

LONGEST_EXPRESSION = 10_000
"""Maximum number of characters of an expression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """The table ``[select]`` of a recipe.

    Raises
    ------
    RecipeError
        If a value is impossible.

    Examples
    --------
    >>> select = gpuprep.Select(where="kernel LIKE 'B3%'", best_per="study", prefer="slice_thickness_mm, -slices")
    >>> recipe = gpuprep.Recipe(select=select)
    """

    where: str | None = None
    """SQL condition over the columns of ``gpuprep scan --columns``: only series for which it is true are converted."""
    best_per: BestPer | None = None
    """Converts one series per study, patient or frame of reference: the first by `prefer`, and a sound one if there
    is any."""
    prefer: str | None = None
    """SQL terms separated by commas, as after ORDER BY: the series for which the first term is smallest, then the
    second, is preferred. Unknown values are last."""
    drop_duplicates: bool = False
    """Whether only one of several series with equal pixels is converted."""

    def __post_init__(self) -> None:
        for name in TEXTS:
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.strip() and len(text) <= LONGEST_EXPRESSION):
                most = f"up to {LONGEST_EXPRESSION} characters"
                raise RecipeError(f"select.{name} = {str(text)[:QUOTED]!r}: give SQL of {most}, or none")
        if self.best_per is not None and self.best_per not in get_args(BestPer):
            raise RecipeError(
                f"select.best_per = {self.best_per!r}: choose one of {', '.join(get_args(BestPer))}, or none"
            )
        if not isinstance(self.drop_duplicates, bool):
            raise RecipeError(f"select.drop_duplicates = {self.drop_duplicates!r}: give true or false")
        if self.prefer is not None and self.best_per is None:
            raise RecipeError("select.prefer orders the series of each group: give select.best_per too")

    @property
    def is_choice(self) -> bool:
        """Whether any series may be left out."""
        return self != Select()

    @classmethod
    def from_dict(cls, values: Any, base: Select) -> Self:
        """Return the options of a TOML table; `base` provides the other fields."""
        return cls(**fields_of_table("select", values, base, OPTIONAL))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a table for TOML and JSON."""
        return {k: "none" if v is None else v for k, v in asdict(self).items()}
