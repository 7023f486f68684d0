"""Tests of the presets, and of the JSON Schema of recipe files against the checks of `Recipe`."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recipe import BAD, RECIPES
from typer.testing import CliRunner

from gpuprep.cli.app import app
from gpuprep.core.mask_options import Masks
from gpuprep.core.recipe import PRESETS, Recipe
from gpuprep.core.recipe_schema import recipe_schema
from gpuprep.errors import RecipeError

SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

NOT_EXPRESSIBLE: list[dict[str, Any]] = [
    *({name: 3.0} for name in ("order", "max_missing")),  # to JSON 3.0 is a whole number
    *({"size": size} for size in (512.0, [512, 512.0])),
    {"max_missing": 2.0},
    *({"window_hu": window} for window in ([400, 400], [401, 400], [-1000, -1000])),
    *({"masks": {"roi": roi}} for roi in ("(", "*")),
    {"masks": {"aliases": {"a": ["x"], "b": ["X"]}}},
    {"masks": {"aliases": {"": ["x"]}}},
    {"masks": {"codes": {"a": "SCT:1", "A ": "SCT:2"}}},
]


def test_the_schema_is_valid_in_its_draft_and_json_holds_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_the_schema_has_every_field_with_description_and_default() -> None:
    assert list(SCHEMA["properties"]) == ["base", *(f.name for f in fields(Recipe))]
    assert list(SCHEMA["properties"]["masks"]["properties"]) == [f.name for f in fields(Masks)]
    assert SCHEMA["properties"]["order"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 5,
        "description": "Spline order of the resampling: 0 nearest, 1 linear, 3 cubic, up to 5.",
        "default": 3,
    }
    assert SCHEMA["properties"]["policy"]["description"].startswith('"fix": irregularities that can be corrected')
    assert SCHEMA["properties"]["max_missing"]["type"] == "integer"
    assert SCHEMA["properties"]["spacing_tolerance"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "description": "Allowed deviation of a slice distance from the median distance, as a fraction of the median. "
        "The larger of this and the position tolerance applies.",
        "default": 0.01,
    }
    assert SCHEMA["properties"]["dtype"]["enum"] == ["float32", "uint8", "uint16", "int16"]
    everything = SCHEMA["properties"] | SCHEMA["properties"]["masks"]["properties"]
    assert [name for name, field in everything.items() if not field["description"]] == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_equals_its_toml(name: str) -> None:
    text = PRESETS[name].to_toml()
    table = tomllib.loads(text)
    VALIDATOR.validate(table)
    assert Recipe.from_dict(table) == Recipe.preset(name)
    assert text.startswith(f"# {PRESETS[name].why}\n# Source: {PRESETS[name].source}\n\n")


@given(RECIPES)
def test_every_recipe_is_valid(recipe: Recipe) -> None:
    VALIDATOR.validate(tomllib.loads(recipe.to_toml()))


def test_short_forms_are_valid() -> None:
    for table in ({}, {"base": "lung"}, {"spacing_mm": 2, "size": 64}, {"masks": {"aliases": {"a": "b", "c": ["d"]}}}):
        VALIDATOR.validate(table)
        Recipe.from_dict(table)


def _is_expressible(table: dict[str, Any]) -> bool:
    try:
        json.dumps(table, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return table not in NOT_EXPRESSIBLE


@pytest.mark.parametrize("table", [table for name, value in BAD if _is_expressible(table := {name: value})])
def test_the_schema_refuses_invalid_values(table: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(table)


@pytest.mark.parametrize("table", NOT_EXPRESSIBLE)
def test_a_recipe_refuses_what_the_schema_cannot_express(table: dict[str, Any]) -> None:
    VALIDATOR.validate(table)
    with pytest.raises(RecipeError):
        Recipe.from_dict(table)


@pytest.mark.parametrize(
    "table",
    [
        {"base": "clasic"},
        {"base": 1},
        {"ordr": 1},
        {"recipe": {"order": 1}},
        {"window_hu": "none", "dtype": "uint8"},
        {"format": "nifti", "compression": "zstd"},
        {"format": "npy", "compression": "zlib"},
        {"masks": {"rois": "x"}},
        {"window_hu": [-1e7, 0]},
    ],
)
def test_schema_and_recipe_refuse_invalid_keys_and_combinations(table: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(table)
    with pytest.raises(RecipeError):
        Recipe.from_dict(table)


WORDS = [
    "none",
    "",
    "fix",
    "LPS",
    "air",
    "corner",
    "pad",
    "uint8",
    "int16",
    "npy",
    "nifti",
    "zlib",
    "zstd",
    "lung",
    "mm",
]
NUMBERS = st.sampled_from([-1, 0, 0.001, 0.005, 0.01, 0.5, 1, 1.0, 2, 5, 6, 400, 1000, 1001, 16384, 16385, 1e6, 2e6])
SIMPLE = NUMBERS | st.sampled_from(WORDS) | st.booleans()
VALUES = SIMPLE | st.lists(SIMPLE, max_size=4) | st.lists(NUMBERS, min_size=2, max_size=3)
MASKS = st.dictionaries(st.sampled_from([f.name for f in fields(Masks)]), VALUES, max_size=2)
ALIASES = st.fixed_dictionaries({"aliases": st.dictionaries(st.sampled_from("ab"), VALUES, max_size=2)})
CODE = st.sampled_from(["SCT:1", "SCT", "SCT:1\n", "a:b:c", "S:\t"]) | st.dictionaries(
    st.sampled_from(["scheme", "value", "meaning", "side", "x"]),
    st.sampled_from(["SCT", "1", "", "left", "a b", "a\\b", "m" * 17, "m" * 65, "a\nb"]) | SIMPLE,
    max_size=4,
)
CODES = st.fixed_dictionaries({"codes": st.dictionaries(st.sampled_from(["a", "", " "]), CODE | VALUES, max_size=2)})


@given(
    st.dictionaries(st.sampled_from(["base", *(f.name for f in fields(Recipe))]), VALUES, max_size=3)
    | st.fixed_dictionaries({"masks": MASKS | ALIASES | CODES})
)
def test_a_recipe_refuses_everything_that_the_schema_refuses(table: dict[str, Any]) -> None:
    if not VALIDATOR.is_valid(table):
        with pytest.raises(RecipeError):
            Recipe.from_dict(table)


def test_nnunet_ct_keeps_spacing_size_and_hu_as_scanned() -> None:
    changed = {k: v for k, v in Recipe.preset("nnunet-ct").to_dict().items() if Recipe().to_dict()[k] != v}
    off = dict.fromkeys(("spacing_mm", "window_hu", "size"), "none")
    assert changed == off | {"dtype": "int16", "format": "nifti", "compression": "zlib"}


@pytest.mark.parametrize(
    ("name", "width_hu", "level_hu"), [("lung", 1500, -600), ("soft-tissue", 400, 50), ("bone", 1800, 400)]
)
def test_window_presets_match_the_cited_source(name: str, width_hu: float, level_hu: float) -> None:
    window_hu = (level_hu - width_hu / 2, level_hu + width_hu / 2)
    assert Recipe.preset(name) == replace(Recipe(), window_hu=window_hu)
    assert f"width {width_hu} HU" in PRESETS[name].why
    assert PRESETS[name].source.endswith("radiopaedia.org/articles/52108")


def test_luna16_matches_the_cited_paper() -> None:
    changed = {k: v for k, v in Recipe.preset("luna16").to_dict().items() if Recipe().to_dict()[k] != v}
    assert changed == {"window_hu": [-1200.0, 600.0], "dtype": "uint8", "size": "none"}
    assert Recipe.preset("luna16").spacing_mm == (1.0, 1.0, 1.0)


def test_the_command_lists_presets_prints_one_and_the_schema(tmp_path: Path) -> None:
    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["recipes", *args], catch_exceptions=False)

    listed = run().stdout
    assert all(name in listed and preset.why.split(":")[0] in listed for name, preset in PRESETS.items())
    file = tmp_path / "bone.toml"
    file.write_text(run("bone").stdout, "utf-8")
    assert Recipe.load(file) == Recipe.preset("bone")
    assert json.loads(run("--schema").stdout) == SCHEMA
    refused = run("bnoe")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("gpuprep: there is no recipe 'bnoe' (did you mean 'bone'?): default, ")
    assert run("bone", "--schema").exit_code == 2
