"""Builds the JSON Schema of recipe files from the fields of a recipe, their limits and their docstrings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, cast, get_args

from gpuprep.core import coded_concepts, mask_options, select_options
from gpuprep.core import recipe as recipes
from gpuprep.core.mask_options import Masks, ReadingOptions
from gpuprep.core.recipe import PRESETS, Recipe
from gpuprep.core.select_options import Select
from gpuprep.core.stacking_rules import Rules

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file.

    `Recipe.from_dict` refuses everything that the schema refuses. It also checks rules that a schema cannot express,
    such as the order of the two ends of a window.

    Returns
    -------
    dict
        The schema, with values that JSON supports.

    References
    ----------
    JSON Schema, draft 2020-12: https://json-schema.org/draft/2020-12
    """
    docs = _field_docstrings(Recipe) | _field_docstrings(Rules)
    defaults = Recipe().to_dict()
    properties = {f.name: _described(_recipe_field_schema(f.name), docs, f.name, defaults) for f in fields(Recipe)}
    base = {
        "description": "Preset that provides the fields left out here.",
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
            _forbidden("dtype", recipes.SCALED_DTYPES, "window_hu", ["none"]),
            *(
                _forbidden("format", [name], "compression", [c for c in compressions if c not in endings])
                for name, endings in recipes.ENDINGS.items()
                if len(endings) < len(compressions)
            ),
        ],
    }


def _recipe_field_schema(name: str) -> dict[str, Any]:
    """Return the schema of a field of the recipe."""
    if name == "masks":
        docs = _field_docstrings(Masks) | _field_docstrings(ReadingOptions)
        return _table(Masks(), _masks_field_schema, docs)
    if name == "select":
        return _table(Select(), _select_field_schema, _field_docstrings(Select))
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
        return {"anyOf": [{"const": "none"}, _array_of(end, 2)]}
    if name == "crop":
        return {"anyOf": [{"const": "none"}, {"type": "string", "pattern": f"^({recipes.CROP_PATTERN})$"}]}
    if name in ("spacing_mm", "size"):
        one = {"type": "number", "minimum": recipes.SMALLEST_SPACING_MM, "maximum": recipes.LARGEST_AXIS}
        if name == "size":
            one |= {"type": "integer", "minimum": 1}
        return {"anyOf": [{"const": "none"}, one, _array_of(one, 2 if name == "size" else 3)]}
    return {"type": "boolean"}


def _table(default: Masks | Select, schema_of: Callable[[str], dict[str, Any]], docs: dict[str, str]) -> dict[str, Any]:
    """Return the schema of a table of the recipe."""
    values = default.to_dict()
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {f.name: _described(schema_of(f.name), docs, f.name, values) for f in fields(default)},
    }


def _select_field_schema(name: str) -> dict[str, Any]:
    """Return the schema of a field of the table ``[select]``."""
    if name == "best_per":
        return {"enum": [*get_args(select_options.BestPer), "none"]}
    if name in select_options.TEXTS:
        return {"type": "string", "pattern": r"\S", "maxLength": select_options.LONGEST_EXPRESSION}
    return {"type": "boolean"}


def _masks_field_schema(name: str) -> dict[str, Any]:
    """Return the schema of a field of the table ``[masks]``."""
    if name in mask_options.CHOICES:
        return {"enum": [*mask_options.CHOICES[name], *(["none"] if name in mask_options.OPTIONAL else [])]}
    if name == "threshold":
        return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    if name == "aliases":
        name_ = {"type": "string", "pattern": r"\S"}
        others = {"anyOf": [name_, {"type": "array", "items": name_}]}
        pair = _array_of({}, 2)  # the form of aliases in Python
        return {"anyOf": [{"type": "object", "additionalProperties": others}, {"type": "array", "items": pair}]}
    if name == "codes":
        text = {"type": "string", "pattern": f"^{coded_concepts.SHORT_FORM}$"}
        keys = {
            "scheme": {"type": "string", "pattern": r"^[^\s\\]{1,16}$"},
            "value": {"type": "string", "pattern": r"^[^\s\\]{1,16}$"},
            "meaning": {"type": "string", "pattern": r"^[^\\]*$", "maxLength": coded_concepts.LONGEST_MEANING},
            "side": {"enum": list(get_args(coded_concepts.Side))},
        }
        table = {"type": "object", "additionalProperties": False, "required": ["scheme", "value"], "properties": keys}
        pair = _array_of({}, 2)
        codes = {
            "type": "object",
            "propertyNames": {"pattern": r"\S"},
            "additionalProperties": {"anyOf": [text, table]},
        }
        return {"anyOf": [codes, {"type": "array", "items": pair}]}
    return {"type": "string", "format": "regex"}


def _forbidden(field: str, values: Sequence[str], other: str, other_values: Sequence[str]) -> dict[str, Any]:
    """Return a schema that refuses `values` of a field together with `other_values` of another field."""
    both = {field: {"enum": list(values)}, other: {"enum": list(other_values)}}
    return {"not": {"required": [field, other], "properties": both}}


def _array_of(items: dict[str, Any], count: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": count, "maxItems": count}


def _described(schema: dict[str, Any], docs: dict[str, str], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field with its description and default."""
    return schema | ({"description": docs[name]} if name in docs else {}) | {"default": defaults[name]}


def _field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a class, parsed from its source."""
    definition = cast("ast.ClassDef", ast.parse(inspect.getsource(cls)).body[0])
    docs = {}
    for statement, below in pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    docs[statement.target.id] = " ".join(text.split())
    return docs
