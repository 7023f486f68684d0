"""Reads a table of a recipe, such as ``[masks]``."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import fields
from typing import Any

from gpuprep.errors import RecipeError


def fields_of_table(name: str, values: Any, base: Any, optional: Container[str]) -> dict[str, Any]:
    """Return the fields of a table: those that TOML gives, and the others of `base`.

    Parameters
    ----------
    name : str
        Name of the table, for messages.
    values : dict
        The table.
    base : dataclass
        Provides the fields that the table leaves out.
    optional : container of str
        Fields that may be "none", which stands for None.

    Raises
    ------
    RecipeError
        If it is no table, or has an unknown key.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{name} = {values!r}: give a table")
    known = [f.name for f in fields(base)]
    for key in values:
        if key not in known:
            raise RecipeError(f"a recipe has no {name}.{key}; its keys there: {', '.join(known)}")
    given = {k: None if v == "none" and k in optional else v for k, v in values.items()}
    return {name: getattr(base, name) for name in known} | given
