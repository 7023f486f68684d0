"""Codes of structures: those of pydicom's tables, by any spelling of a name, and never those of another structure."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from gpuprep.core.coded_concepts import Code, checked_code
from gpuprep.masks.structure_codes import _COUNTED, _COUNTED_AND_PAIRED, _PAIRED, _SINGLE, PRIVATE_SCHEME, coded

LEFT, RIGHT = ("SCT", "7771000"), ("SCT", "24028007")
TABLES = {**_SINGLE, **_PAIRED, **_COUNTED, **_COUNTED_AND_PAIRED}


def short(name: str) -> tuple[str, str]:
    """Return meaning and side of the code of a name; ("", "") for a private code."""
    found = coded(name)
    if found.type.scheme_designator == PRIVATE_SCHEME:
        assert found.side is None
        return "", ""
    return found.type.meaning, found.side.meaning if found.side else ""


@pytest.mark.parametrize("keyword", TABLES)
def test_every_code_of_the_tables_is_one_of_snomed_ct_in_pydicom(keyword: str) -> None:
    kind = getattr(codes.SCT, keyword)
    assert kind.scheme_designator == "SCT"
    assert 0 < len(kind.meaning) <= 64
    for name in TABLES[keyword]:
        assert coded(name).type == kind


def test_no_name_stands_for_two_structures() -> None:
    names = [name for found in TABLES.values() for name in found]
    assert len(names) == len(set(names))
    assert all(re.fullmatch("[a-z]+", name) for name in names)


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        # TotalSegmentator
        ("liver", "Liver", ""), ("lung_upper_lobe_left", "Upper lobe of lung", "Left"),
        ("lung_middle_lobe_right", "Middle lobe of right lung", ""), ("vertebrae_L1", "Vertebra", ""),
        ("vertebrae_T12", "Vertebra", ""), ("vertebrae_C3", "Vertebra", ""), ("rib_left_10", "Rib", "Left"),
        ("adrenal_gland_right", "Adrenal gland", "Right"), ("urinary_bladder", "Bladder", ""),
        ("inferior_vena_cava", "Inferior vena cava", ""), ("small_bowel", "Small intestine", ""),
        ("femur_left", "Femur", "Left"), ("spinal_cord", "Spinal cord", ""), ("heart_atrium_left", "Atrium", "Left"),
        # AMOS, BTCV, FLARE
        ("right kidney", "Kidney", "Right"), ("gall bladder", "Gallbladder", ""), ("arota", "Aorta", ""),
        ("postcava", "Inferior vena cava", ""), ("left adrenal gland", "Adrenal gland", "Left"),
        ("IVC", "Inferior vena cava", ""),
        # LIDC-IDRI, radiotherapy
        ("nodule", "Nodule", ""), ("Nodule 003", "Nodule", ""), ("Lung_L", "Lung", "Left"), ("LUNG R", "Lung", "Right"),
        ("LeftLung", "Lung", "Left"), ("LungRight", "Lung", "Right"), ("SpinalCord", "Spinal cord", ""),
        ("Glnd_Submand_L", "Submandibular gland", "Left"), ("Parotid_R", "Parotid gland", "Right"),
        ("Heart", "Heart", ""),
        ("GTV-1", "GTV", ""), ("GTVp", "GTV", ""), ("PTV_1", "PTV", ""), ("Oesophagus", "Esophagus", ""),
        ("Bowel_Small", "Small intestine", ""), ("Femur_Head_R", "Femoral head", "Right"),
    ],
)  # fmt: skip
def test_names_of_well_known_data_sets_have_codes(name: str, meaning: str, side: str) -> None:
    assert short(name) == (meaning, side)


@pytest.mark.parametrize(
    "name",
    [
        "liver_left", "kidney_cyst_left", "lung_vessels", "prostate/uterus", "portal_vein_and_splenic_vein", "aorta2",
        "L", "left", "left right lung", "Lung_L_R", "heart_myocardium", "liver tumor", "not liver", "Lunge", "kidney2",
        "vertebrae_L", "vertebra left", "GTV_L", "vertebrae_T14", "spleen_1", "1", "", "🫁",
    ],
)  # fmt: skip
def test_a_name_that_could_be_something_else_gets_a_private_code(name: str) -> None:
    found = coded(name)
    assert found.type.scheme_designator == PRIVATE_SCHEME
    assert 0 < len(found.type.value) <= 16
    assert found.side is None
    assert found.category.meaning == "Tissue"


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("liver", "Anatomical Structure"), ("nodule", "Morphologically Abnormal Structure"),
        ("tumor", "Morphologically Abnormal Structure"), ("GTV", "Spatial and Relational Concept"),
        ("femoral head left", "Anatomical Structure"),
    ],
)  # fmt: skip
def test_the_category_fits_the_type(name: str, category: str) -> None:
    assert coded(name).category.meaning == category


@given(st.sampled_from(sorted(_PAIRED)), st.sampled_from(["left", "L", "Lt"]), st.sampled_from(" _-."), st.booleans())
def test_the_place_and_the_spelling_of_the_side_do_not_matter(keyword: str, side: str, sep: str, before: bool) -> None:
    name = _PAIRED[keyword][0]
    found = coded(f"{side}{sep}{name}" if before else f"{name.upper()}{sep}{side}")
    assert found.type == getattr(codes.SCT, keyword)
    assert found.side is not None
    assert (found.side.scheme_designator, found.side.value) == LEFT


@given(st.text(max_size=80), st.text(max_size=80))
def test_private_codes_are_short_and_differ_with_the_name(one: str, other: str) -> None:
    a, b = coded(one), coded(other)
    assert 0 < len(a.type.value) <= 16
    assert len(a.type.meaning) <= 64
    assert "\\" not in a.type.meaning
    if PRIVATE_SCHEME in (a.type.scheme_designator, b.type.scheme_designator) and a.type.value == b.type.value:
        assert re.findall(r"[^\W_]+", one.casefold()) == re.findall(r"[^\W_]+", other.casefold())


def test_a_blank_meaning_is_looked_up() -> None:
    given = checked_code("x", {"scheme": "SCT", "value": "80891009", "meaning": " "})
    assert coded("x", given).type.meaning == "Heart"


def test_the_code_of_a_recipe_goes_before_the_name() -> None:
    found = coded("liver", Code("SCT", "78961009"))
    assert (found.type.value, found.type.meaning, found.category.value) == ("78961009", "Spleen", "91723000")
    found = coded("x", Code("SCT", "64033007", side="right"))
    assert (found.type.meaning, (found.side.scheme_designator, found.side.value) if found.side else ()) == (
        "Kidney",
        RIGHT,
    )
    found = coded("my vein", Code("FMA", "7197", "Vein of mine"))
    assert (found.type.scheme_designator, found.type.meaning, found.category.meaning) == (
        "FMA",
        "Vein of mine",
        "Tissue",
    )
    assert coded("my vein", Code("99X", "1")).type.meaning == "my vein"
    assert coded("my vein", Code("dir", "1")).type.meaning == "my vein"
