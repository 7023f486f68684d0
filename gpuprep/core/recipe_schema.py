"""Builds the JSON Schema of recipe files from the fields of a recipe, their limits and their docstrings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, cast, get_args

from gpuprep.core import mask_options
from gpuprep.core import recipe as recipes
from gpuprep.core.mask_options import Masks, Reading
from gpuprep.core.recipe import PRESETS, Recipe
from gpuprep.core.stacking_rules import Rules

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file.

    What it refuses `Recipe.from_dict` refuses too. The other way round there are rules that a schema cannot tell, such
    as which end of a window is the lower one.

    Returns
    -------
    dict
        As JSON holds it.

    References
    ----------
    JSON Schema, draft 2020-12: https://json-schema.org/draft/2020-12
    """
    told = _told(Recipe) | _told(Rules)
    properties = {f.name: _described(_of_recipe(f.name), told, f.name, Recipe().to_dict()) for f in fields(Recipe)}
    base = {
        "description": "The preset that is changed by what else is given.",
        "default": "default",
        "oneOf": [{"const": name, "description": preset.why} for name, preset in PRESETS.items()],
    }
    compressions = get_args(recipes.Compression)
    return {
        "$schema": DRAFT,
        "title": "A recipe of gpuprep",
        "type": "object",
        "additionalProperties": False,
        "properties": {"base": base} | properties,
        "allOf": [
            _never("dtype", recipes.SPREAD, "window_hu", ["none"]),
            *(
                _never("format", [name], "compression", [c for c in compressions if c not in endings])
                for name, endings in recipes.ENDINGS.items()
                if len(endings) < len(compressions)
            ),
        ],
    }


def _of_recipe(name: str) -> dict[str, Any]:
    """Return the schema of a field of the recipe."""
    if name == "masks":
        told = _told(Masks) | _told(Reading)
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                f.name: _described(_of_masks(f.name), told, f.name, Masks().to_dict()) for f in fields(Masks)
            },
        }
    if name in recipes.CHOICES:
        return {"enum": list(get_args(recipes.CHOICES[name]))}
    if name in recipes.LIMITS:
        low, high = recipes.LIMITS[name]
        kind = "integer" if isinstance(getattr(Recipe(), name), int) else "number"
        return {"type": kind, "minimum": low, "maximum": high}
    if name == "order":
        return {"type": "integer", "minimum": 0, "maximum": recipes.HIGHEST_ORDER}
    if name == "window_hu":
        end = {"type": "number", "minimum": -recipes.LARGEST_NUMBER, "maximum": recipes.LARGEST_NUMBER}
        return {"anyOf": [{"const": "none"}, _several(end, 2)]}
    if name in ("spacing_mm", "size"):
        one = {"type": "number", "minimum": recipes.SMALLEST_STEP, "maximum": recipes.LARGEST_AXIS}
        if name == "size":
            one |= {"type": "integer", "minimum": 1}
        return {"anyOf": [{"const": "none"}, one, _several(one, 2 if name == "size" else 3)]}
    return {"type": "boolean"}


def _of_masks(name: str) -> dict[str, Any]:
    """Return the schema of a field of the table ``[masks]``."""
    if name in mask_options.CHOICES:
        return {"enum": [*mask_options.CHOICES[name], *(["none"] if name in mask_options.OPTIONAL else [])]}
    if name == "threshold":
        return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    if name == "aliases":
        name_ = {"type": "string", "pattern": r"\S"}
        others = {"anyOf": [name_, {"type": "array", "items": name_}]}
        pair = _several({}, 2)  # as Python has them
        return {"anyOf": [{"type": "object", "additionalProperties": others}, {"type": "array", "items": pair}]}
    return {"type": "string", "format": "regex"}


def _never(one: str, ones: Sequence[str], other: str, others: Sequence[str]) -> dict[str, Any]:
    """Return a schema that refuses some values of a field beside some values of another, if both are given."""
    both = {one: {"enum": list(ones)}, other: {"enum": list(others)}}
    return {"not": {"required": [one, other], "properties": both}}


def _several(one: dict[str, Any], count: int) -> dict[str, Any]:
    return {"type": "array", "items": one, "minItems": count, "maxItems": count}


def _described(schema: dict[str, Any], told: dict[str, str], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field with what is said of it, and what it is by default."""
    return schema | ({"description": told[name]} if name in told else {}) | {"default": defaults[name]}


def _told(cls: type) -> dict[str, str]:
    """Return the text under each field of a class, as it stands in the source."""
    definition = cast("ast.ClassDef", ast.parse(inspect.getsource(cls)).body[0])
    told = {}
    for statement, below in pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    told[statement.target.id] = " ".join(text.split())
    return told
