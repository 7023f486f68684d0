"""Tests of `Recipe`: the TOML round trip, presets, and the refusal of invalid values."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuprep.core.coded_concepts import Code
from gpuprep.core.mask_options import Masks
from gpuprep.core.recipe import Recipe
from gpuprep.core.select_options import Select
from gpuprep.core.stacking_rules import Rules
from gpuprep.errors import RecipeError, RequestError

SPACINGS = st.none() | st.tuples(*[st.floats(0.01, 16384)] * 3)
SIZES = st.none() | st.tuples(*[st.integers(1, 16384)] * 2)
WINDOWS = st.tuples(st.integers(-100_000, 100_000), st.floats(0.01, 100_000)).map(lambda w: (float(w[0]), w[0] + w[1]))
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "policy": st.sampled_from(["fix", "strict", "keep"]),
    "spacing_tolerance": st.floats(0, 1),
    "position_tolerance_mm": st.floats(1e-6, 10),
    "lean_tolerance_mm": st.floats(1e-6, 1000),
    "max_missing": st.integers(0, 1000),
    "max_missing_share": st.floats(0, 1),
    "assume_hu": st.booleans(),
    "group_by": st.sampled_from(["uid", "folder"]),
    "orient": st.sampled_from(["native", "LPS"]),
    "padding": st.sampled_from(["air", "minus2000-to-0", "keep"]),
    "crop": st.sampled_from([None, "body", "lungs", "mask", "mask:heart,left lung"]),
    "crop_margin_mm": st.floats(0, 1000),
    "crop_missing": st.sampled_from(["whole", "reject"]),
    "spacing_mm": SPACINGS,
    "order": st.integers(0, 5),
    "align": st.sampled_from(["edge", "corner"]),
    "anti_alias": st.sampled_from(["none", "resample", "resize", "both"]),
    "size": SIZES,
    "fit": st.sampled_from(["stretch", "pad", "crop"]),
    "format": st.sampled_from(["tif", "tif-stack"]),
    "compression": st.sampled_from(["none", "zlib", "zstd"]),
}
RECIPES = st.builds(
    Recipe, window_hu=WINDOWS, dtype=st.sampled_from(["float32", "uint8", "uint16", "int16"]), **COMMON
) | st.builds(Recipe, window_hu=st.none(), dtype=st.sampled_from(["float32", "int16"]), **COMMON)

ONE_CHANGE: list[dict[str, Any]] = [
    {"policy": "strict"},
    {"policy": "keep"},
    {"spacing_tolerance": 0.02},
    {"position_tolerance_mm": 0.01},
    {"lean_tolerance_mm": 0.2},
    {"max_missing": 2},
    {"max_missing_share": 0.2},
    {"assume_hu": True},
    {"group_by": "folder"},
    {"orient": "LPS"},
    {"padding": "keep"},
    {"padding": "minus2000-to-0"},
    {"crop": "body"},
    {"crop": "mask"},
    {"crop": "mask:heart"},
    {"crop": "body", "crop_margin_mm": 5.0},
    {"crop": "body", "crop_missing": "reject"},
    {"spacing_mm": None},
    {"spacing_mm": (1.0, 1.0, 1.5)},
    {"spacing_mm": (1.5, 1.0, 1.0)},
    {"order": 1},
    {"align": "corner"},
    {"anti_alias": "resize"},
    {"anti_alias": "both"},
    {"window_hu": None},
    {"window_hu": (-1000.0, 400.5)},
    {"size": None},
    {"size": (512, 256)},
    {"size": (256, 512)},
    {"fit": "crop"},
    {"dtype": "int16"},
    {"format": "tif-stack"},
    {"compression": "zlib"},
    {"image": False},
    {"masks": Masks(roi="lung")},
    {"masks": Masks(aliases=(("lung_l", ("Lung_L",)),))},
    {"masks": Masks(layout="per-roi")},
    {"masks": Masks(resampling="smooth")},
    {"masks": Masks(units="px")},
    {"masks": Masks(index_base=1)},
    {"masks": Masks(threshold=0.25)},
]


@settings(deadline=None)
@given(RECIPES)
def test_a_recipe_survives_toml(recipe: Recipe) -> None:
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@settings(deadline=None)
@given(RECIPES)
def test_toml_holds_every_field_by_its_name(recipe: Recipe) -> None:
    table = tomllib.loads(recipe.to_toml())
    assert set(table) == {f.name for f in fields(Recipe)}
    for name, value in table.items():
        wanted = getattr(recipe, name)
        if name in ("masks", "select"):
            assert set(value) == {f.name for f in fields(Masks if name == "masks" else Select)}
        else:
            assert value == ("none" if wanted is None else list(wanted) if isinstance(wanted, tuple) else wanted)


@settings(deadline=None)
@given(RECIPES)
def test_equal_recipes_have_equal_hashes(recipe: Recipe) -> None:
    again = Recipe.from_dict(recipe.to_dict())
    assert again is not recipe
    assert again.sha256 == recipe.sha256
    assert len(bytes.fromhex(recipe.sha256)) == 32


def test_every_field_but_the_choice_of_series_changes_the_hash() -> None:
    recipes = [Recipe(), *(replace(Recipe(), **change) for change in ONE_CHANGE)]
    assert {name for change in ONE_CHANGE for name in change} == {f.name for f in fields(Recipe)} - {"select"}
    assert Recipe(select=Select(where="slices > 9")).sha256 == Recipe().sha256
    assert Recipe(masks=Masks(codes=(("liver", Code("SCT", "10200004")),))).sha256 == Recipe().sha256
    assert Recipe(crop_margin_mm=5.0, crop_missing="reject").sha256 == Recipe().sha256  # nothing is cropped
    assert len({r.sha256 for r in recipes}) == len(recipes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Recipe(spacing_mm=(1, 2, 3)), Recipe(spacing_mm=(1.0, 2.0, 3.0))),
        (Recipe(window_hu=[-500, 500]), Recipe(window_hu=(-500.0, 500.0))),  # type: ignore[arg-type]
        (Recipe(window_hu=(-0.0, 80.0)), Recipe(window_hu=(0.0, 80.0))),
        (Recipe(crop="body", crop_margin_mm=10), Recipe(crop="body", crop_margin_mm=10.0)),
        (Recipe(max_missing_share=-0.0), Recipe(max_missing_share=0)),
    ],
    ids=["whole numbers", "lists", "minus zero", "whole number", "minus zero alone"],
)
def test_two_ways_to_write_one_recipe_have_one_hash(one: Recipe, other: Recipe) -> None:
    assert one == other
    assert one.sha256 == other.sha256


def test_the_default_recipe_has_the_documented_values() -> None:
    assert Recipe() == Recipe(
        policy="fix",
        spacing_tolerance=0.01,
        position_tolerance_mm=0.02,
        lean_tolerance_mm=0.1,
        max_missing=3,
        max_missing_share=0.1,
        assume_hu=False,
        group_by="uid",
        orient="native",
        padding="air",
        spacing_mm=(1.0, 1.0, 1.0),
        order=3,
        align="edge",
        anti_alias="none",
        window_hu=(-1000.0, 400.0),
        size=(512, 512),
        fit="stretch",
        dtype="float32",
        format="tif",
        compression="none",
        image=True,
        masks=Masks(roi=None, aliases=(), layout="labels", resampling="nearest", threshold=0.5),
        select=Select(where=None, best_per=None, prefer=None, drop_duplicates=False),
    )
    assert Recipe.preset("default") == Recipe()
    assert Recipe.from_dict({}) == Recipe()


def test_classic_differs_from_the_default_in_padding_alignment_and_blur_only() -> None:
    # Trap 26.
    default, classic = Recipe().to_dict(), Recipe.preset("classic").to_dict()
    changed = {k: v for k, v in classic.items() if default[k] != v}
    assert changed == {"padding": "minus2000-to-0", "align": "corner", "anti_alias": "resize"}


def test_a_file_may_start_from_a_preset() -> None:
    recipe = Recipe.from_dict({"base": "classic", "order": 1})
    assert recipe == replace(Recipe.preset("classic"), order=1)


def test_an_unknown_preset_suggests_the_right_one() -> None:
    words = r"no recipe 'clasic' \(did you mean 'classic'\?\): default, classic"
    with pytest.raises(RecipeError, match=words):
        Recipe.preset("clasic")
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({"base": "clasic"})


@pytest.mark.parametrize(
    ("slip", "meant"),
    [("windw_hu", "window_hu"), ("spacing", "spacing_mm"), ("antialias", "anti_alias"), ("Dtype", "dtype")],
)
def test_an_unknown_key_suggests_the_right_one(slip: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf"no '{slip}' \(did you mean '{meant}'\?\); its keys: base, policy, "):
        Recipe.from_dict({slip: 1})


def test_an_unknown_key_unlike_any_other_gets_the_list_of_keys_only() -> None:
    with pytest.raises(
        RecipeError,
        match=r"no 'zzz'; its keys: base, policy, spacing_tolerance, .*order, .*compression, image, masks, select$",
    ):
        Recipe.from_dict({"zzz": 1})


def test_none_switches_off_optional_fields() -> None:
    recipe = Recipe.from_dict({"spacing_mm": "none", "window_hu": "none", "size": "none"})
    assert (recipe.spacing_mm, recipe.window_hu, recipe.size) == (None, None, None)
    assert Recipe.from_dict({"spacing_mm": None, "window_hu": None, "size": None}) == recipe


def test_none_is_an_ordinary_choice_of_anti_alias_and_compression() -> None:
    recipe = Recipe.from_dict({"base": "classic", "anti_alias": "none", "compression": "none"})
    assert (recipe.anti_alias, recipe.compression) == ("none", "none")


@pytest.mark.parametrize(
    "name",
    ["policy", "max_missing", "assume_hu", "group_by", "orient", "padding", "order", "align", "fit", "dtype", "format"],
)
def test_none_is_refused_for_required_fields(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        Recipe.from_dict({name: "none"})


def test_one_number_stands_for_all_axes_in_a_file() -> None:
    assert Recipe.from_dict({"spacing_mm": 2, "size": 64}) == Recipe(spacing_mm=(2.0, 2.0, 2.0), size=(64, 64))
    assert Recipe.from_dict({"spacing_mm": 0.5}).spacing_mm == (0.5, 0.5, 0.5)


BAD_VALUES: dict[str, list[Any]] = {
    "policy": ["", "Fix", 0, None, True, ["fix"]],
    "spacing_tolerance": ["", "0.01", -0.1, 1.1, math.nan, math.inf, None, True, [0.01], 10**400],
    "position_tolerance_mm": ["0.02", 0, -1, 10.1, math.nan, None, True, [0.02]],
    "lean_tolerance_mm": ["0.1", 0, -1, 1001, math.nan, None, True, [0.1]],
    "max_missing": ["3", -1, 1001, 2.0, 2.5, math.nan, None, True, [3]],
    "max_missing_share": ["0.1", -0.1, 1.1, math.nan, None, True, [0.1]],
    "assume_hu": ["", "yes", "true", 1, 0, None],
    "group_by": ["", "series", "UID", True, None],
    "orient": ["", "lps", "RAS", 1, None],
    "padding": ["", "Air", 0, None, True, ["air"]],
    "spacing_mm": [
        *("", "1,1,1", True, [], [1.0], [1.0, 1.0], [1.0] * 4, {}, {"z": 1.0}),
        *(0, -1, math.nan, math.inf, 1e9, 1e-9),
        *([1.0, v, 1.0] for v in (0, -1.0, math.nan, math.inf, -math.inf, True, "1", None, [1.0], 1e9, 10**400)),
    ],
    "order": [-1, 6, 3.0, "3", True, None, math.nan, [3]],
    "align": ["", "centre", 1, None],
    "anti_alias": ["", "yes", True, False, None],
    "window_hu": [
        *("", "-1000,400", 400, True, [], [400], [0, 1, 2], {}),
        *([v, 400] for v in (400, 401, math.nan, math.inf, -math.inf, True, "0", None)),
        *([-1000, v] for v in (-1000, math.nan, math.inf, True, "0", None, 10**400)),
    ],
    "size": [
        *("", "512", True, 0, -1, 512.0, [], [512], [512] * 3, {}),
        *([512, v] for v in (0, -1, 1.5, 512.0, math.nan, True, "512", None, 16385, 10**400)),
    ],
    "fit": ["", "squeeze", 1, None],
    "dtype": ["", "float64", "uint32", float, None],
    "format": ["", "tiff", "nii", None],
    "compression": ["", "lzw", 1, None, True],
    "image": ["", "yes", 1, 0, None],
    "masks": [
        *("", "none", None, True, [], {"rois": "x"}),
        *({"roi": v} for v in ("(", "*", 1, ["a"])),
        *(
            {"aliases": v}
            for v in ("a", ["a"], {"a": 1}, {"a": [1]}, {"a": [""]}, {"a": ["x"], "b": ["X"]}, {"": ["x"]})
        ),
        *({"layout": v} for v in ("", "roi", None, 1)),
        *({"resampling": v} for v in ("", "linear", None)),
        *({"units": v} for v in ("", "m", 1)),
        *({"index_base": v} for v in (2, -1, "0", True)),
        *({"pixel_base": v} for v in (2, -1, "0", True, None)),
        *({"slice_from": v} for v in ("", "file", 1)),
        *({"slice_order": v} for v in ("", "z", 1)),
        *({"threshold": v} for v in (0, -0.5, 1.1, math.nan, "0.5", True, None)),
        *({"text_format": v} for v in ("", "excel", 1)),
        *({"codes": v} for v in ("a", ["a"], {"": "SCT:1"}, {"a": "SCT:1", "A ": "SCT:2"})),
        *({"codes": {"a": v}} for v in ("", "SCT", "10200004", "SCT:", ":1", "A:B:C", "SCT:1 2", 1, ["SCT:1"])),
        {"codes": {"a": {}}},
        {"codes": {"a": "S" * 17 + ":1"}},
        *({"codes": {"a": {"scheme": "SCT", "value": v}}} for v in ("", "1 2", "1" * 17, 1, "a\\b")),
        *({"codes": {"a": {"scheme": v, "value": "1"}}} for v in ("", " ", "S" * 17, 1)),
        *(
            {"codes": {"a": {"scheme": "SCT", "value": "1", key: v}}}
            for key, v in (
                *(("meaning", v) for v in ("m" * 65, "a\\b", 1)),
                *(("side", v) for v in ("l", "", None)),
                ("x", ""),
            )
        ),
    ],
}
"""10**400 is a whole number beyond the range of floats, which TOML allows."""
BAD = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_an_invalid_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        Recipe.from_dict({name: value})


@pytest.mark.parametrize(("name", "value"), BAD)
def test_an_invalid_value_is_refused_in_python_too(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        Recipe(**{name: value})


@pytest.mark.parametrize("window", [(-1e308, 1e308), (0.0, 5e-324), (0.0, 1e-300), (-1e40, 1e40)])
def test_a_window_beyond_float32_arithmetic_is_refused(window: tuple[float, float]) -> None:
    # The scale would be 0 or infinite, at least in float32: every voxel would be NaN, or every series would fail.
    with pytest.raises(RecipeError, match="window_hu"):
        Recipe(window_hu=window)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_an_unsigned_type_without_a_window_is_refused_with_the_remedy(dtype: Any) -> None:
    with pytest.raises(RecipeError, match=rf"dtype = '{dtype}' scales the window.*give a window, or choose float32"):
        Recipe(dtype=dtype, window_hu=None)


def test_a_recipe_error_ends_the_run_as_a_bad_request_and_is_a_value_error() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(order=9)
    assert isinstance(caught.value, RequestError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@settings(deadline=None)
@given(RECIPES)
def test_rules_have_the_stacking_fields_of_the_recipe(recipe: Recipe) -> None:
    rules = asdict(recipe.rules)
    assert set(rules) == {
        "policy", "spacing_tolerance", "position_tolerance_mm", "lean_tolerance_mm", "max_missing",
        "max_missing_share", "assume_hu", "group_by",
    }  # fmt: skip
    assert rules == {name: getattr(recipe, name) for name in rules}
    assert Recipe().rules == Rules()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Recipe().order = 1  # type: ignore[misc]


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lung.toml"
    file.write_text('base = "classic"\nspacing_mm = 2\nwindow_hu = "none"\nsize = [64, 48]\n# Größe\n', "utf-8")
    wanted = replace(Recipe.preset("classic"), spacing_mm=(2.0, 2.0, 2.0), window_hu=None, size=(64, 48))
    assert Recipe.load(file) == wanted
    assert Recipe.load(str(file)) == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"order = \n", "is not TOML"),
        (b"spacing_mm = [1, 1\n", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
        ("# Größe\n".encode("latin-1"), "is not TOML"),
        (b"order = 9\n", "order = 9"),
        (b"spacing_mm = [nan, 1, 1]\n", "spacing_mm"),
        (b"size = 1979-05-27\n", "size"),
        (b"[recipe]\norder = 1\n", "a recipe has no 'recipe'"),
        (b"ordr = 1\n", "did you mean 'order'"),
        (b'base = "clasic"\n', "did you mean 'classic'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_fault(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(file)
    assert str(caught.value).startswith(str(file))


def test_an_absent_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent\.toml: No such file"):
        Recipe.load(tmp_path / "absent.toml")


def test_a_folder_is_refused_as_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: Is a directory"):
        Recipe.load(tmp_path)


def test_codes_of_structures_are_texts_or_tables(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[masks.codes]\nliver = "SCT:10200004"\n'
        '"My Kidney" = {scheme = "SCT", value = "64033007", meaning = "Kidney", side = "left"}\n'
    )
    recipe = Recipe.load(file)
    assert recipe.masks.code("LIVER") == Code("SCT", "10200004")
    assert recipe.masks.code("my  kidney") == Code("SCT", "64033007", "Kidney", "left")
    assert recipe.masks.code("kidney") is None
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
