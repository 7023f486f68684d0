"""Finds the codes of structures by their names, in the code tables of pydicom.

Names are as in TotalSegmentator, AMOS, BTCV, FLARE, LIDC-IDRI and radiotherapy (AAPM TG-263). A name that is not known
for certain gets a private code, never that of another structure.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from gpuprep.core.coded_concepts import LONGEST_VALUE, Code, Side, long_string

if TYPE_CHECKING:
    from pydicom.sr.coding import Code as PydicomCode

PRIVATE_SCHEME = "99GPUPREP"
"""Scheme of codes that are made from a name. Private schemes begin with 99 (PS3.16, 8.2)."""

_SINGLE: dict[str, tuple[str, ...]] = {
    "AirwayStructure": ("airway", "airways"),
    "AdiposeTissue": ("fat",),
    "Aorta": ("aorta", "arota"),  # as in the list of labels of AMOS
    "BloodVessel": ("vessel", "vessels", "bloodvessel", "bloodvessels"),
    "Bone": ("bone", "bones"),
    "BrachiocephalicTrunk": ("brachiocephalictrunk",),
    "Brain": ("brain",),
    "BrainStem": ("brainstem",),
    "Colon": ("colon", "colonbowel", "largebowel", "bowellarge"),
    "Duodenum": ("duodenum",),
    "Esophagus": ("esophagus", "oesophagus"),
    "Gallbladder": ("gallbladder",),
    "Heart": ("heart",),
    "InferiorVenaCava": ("inferiorvenacava", "ivc", "postcava", "venacavainf"),
    "Larynx": ("larynx",),
    "Liver": ("liver",),
    "Mandible": ("mandible", "bonemandible"),
    "Mediastinum": ("mediastinum",),
    "MiddleLobeOfRightLung": ("lungmiddleloberight", "rightmiddlelobe", "middlelobeofrightlung"),
    "Muscle": ("muscle", "muscles"),
    "OralCavity": ("oralcavity", "cavityoral"),
    "Pancreas": ("pancreas",),
    "Pericardium": ("pericardium",),
    "Pituitary": ("pituitary", "pituitarygland"),
    "PortalVein": ("portalvein",),
    "Prostate": ("prostate",),
    "PulmonaryArtery": ("pulmonaryartery", "apulmonary"),
    "PulmonaryVein": ("pulmonaryvein",),
    "Rectum": ("rectum",),
    "Sacrum": ("sacrum",),
    "Skin": ("skin",),
    "Skull": ("skull",),
    "SmallIntestine": ("smallintestine", "smallbowel", "bowelsmall"),
    "SpinalCord": ("spinalcord",),
    "Spine": ("spine", "vertebralcolumn"),
    "Spleen": ("spleen",),
    "Sternum": ("sternum",),
    "Stomach": ("stomach",),
    "SuperiorVenaCava": ("superiorvenacava", "svc", "venacavasup"),
    "Thymus": ("thymus",),
    "Thyroid": ("thyroid", "thyroidgland", "glndthyroid"),
    "Trachea": ("trachea",),
    "Bladder": ("bladder", "urinarybladder"),
    "Uterus": ("uterus",),
}
"""Names of structures that have no side, by the keyword of the code in pydicom."""

_PAIRED: dict[str, tuple[str, ...]] = {
    "AdrenalGland": ("adrenalgland", "adrenal", "adrenalglands", "glndadrenal"),
    "Atrium": ("heartatrium", "atrium"),
    "BrachiocephalicVein": ("brachiocephalicvein",),
    "Breast": ("breast", "breasts"),
    "Bronchus": ("bronchus",),
    "Clavicle": ("clavicle", "clavicula", "claviculas"),
    "CommonCarotidArtery": ("commoncarotidartery",),
    "CommonIliacArtery": ("iliacartery", "commoniliacartery"),
    "CommonIliacVein": ("iliacvena", "commoniliacvein"),
    "ErectorSpinaeMuscle": ("autochthon",),
    "Eye": ("eye", "eyes"),
    "Femur": ("femur",),
    "FemoralHead": ("femoralhead", "femurhead", "headoffemur"),
    "Humerus": ("humerus",),
    "Kidney": ("kidney", "kidneys"),
    "LowerLobeOfLung": ("lunglowerlobe", "lowerlobe"),
    "Lung": ("lung", "lungs"),
    "OpticNerve": ("opticnerve", "opticnrv"),
    "Ovary": ("ovary",),
    "ParotidGland": ("parotid", "parotidgland", "glndparotid"),
    "Pleura": ("pleura",),
    "Scapula": ("scapula",),
    "SubclavianArtery": ("subclavianartery",),
    "SubmandibularGland": ("submandibulargland", "glndsubmand"),
    "Testis": ("testis",),
    "UpperLobeOfLung": ("lungupperlobe", "upperlobe"),
    "Ureter": ("ureter",),
    "Ventricle": ("heartventricle",),
}
"""Names of structures, without their side, that may have one."""

_COUNTED: dict[str, tuple[str, ...]] = {
    "CTV": ("ctv",),
    "GTV": ("gtv", "gtvp", "gtvn", "grosstumorvolume"),
    "PTV": ("ptv",),
    "Vertebra": ("vertebra", "vertebrae"),
}
"""Names of structures that may have a number at their end."""

_COUNTED_AND_PAIRED: dict[str, tuple[str, ...]] = {
    "Cyst": ("cyst",),
    "Lesion": ("lesion",),
    "LymphNode": ("lymphnode",),
    "Mass": ("mass",),
    "Neoplasm": ("tumor", "tumour", "neoplasm"),
    "Nodule": ("nodule", "lungnodule", "pulmonarynodule"),
    "Rib": ("rib", "ribs"),
}
"""Names of structures, without their side, that may have both."""

_LEVEL = re.compile(r"(?<=vertebra)(e?)(c[1-7]|t[1-9]|t1[0-3]|l[1-6]|s1)$")
"""The level of a vertebra, which the tables of pydicom do not have."""

_SIDES: dict[str, Side] = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}

_CATEGORIES = {
    "cid7194": "MorphologicallyAbnormalStructure",
    "cid7192": "AnatomicalStructure",
    "cid7191": "Tissue",
    "cid7193": "PhysicalObject",
    "cid9534": "SpatialAndRelationalConcept",
}
"""Context group of property types by SNOMED CT, with the keyword of its category (PS3.16, CID 7150)."""


class Coded(NamedTuple):
    """Codes of a segment, as (value, scheme, meaning, version)."""

    category: PydicomCode
    type: PydicomCode
    side: PydicomCode | None


def coded(name: str, given: Code | None = None) -> Coded:
    """Return the codes of a structure.

    Parameters
    ----------
    name : str
        Name of the structure, in any spelling: "lung_left", "Lung_L" and "left lung" are the same.
    given : Code, optional
        Code of the recipe; by default the name decides.

    Notes
    -----
    The category follows from the context group that has the code. If none has, it is "Anatomical Structure" for a known
    name, and "Tissue" for others: the most general one, and the default of 3D Slicer.
    """
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code as PydicomCode

    default = "Tissue"
    if given is not None:
        found = _known(given)
        meaning = given.meaning or long_string(found.meaning if found else name)
        kind, side = PydicomCode(given.value, given.scheme, meaning), given.side
    else:
        keyword, side = _keyword(name)
        kind = getattr(codes.SCT, keyword) if keyword else _private(name)
        default = "AnatomicalStructure" if keyword else default
    modifier = None if side is None else getattr(codes.SCT, side.capitalize())
    return Coded(_category(kind, default), kind, modifier)


def _known(code: Code) -> PydicomCode | None:
    """Return a code with the meaning that it has as a property type, or elsewhere in the tables of pydicom."""
    from pydicom.sr.codedict import codes

    groups = [*_CATEGORIES, *(scheme for scheme in codes.schemes() if scheme == code.scheme)]
    for group in groups:
        known: dict[str, PydicomCode] = getattr(codes, group).concepts
        for found in known.values():
            if (found.scheme_designator, found.value) == (code.scheme, code.value):
                return found
    return None


def _category(kind: PydicomCode, default: str) -> PydicomCode:
    from pydicom.sr.codedict import codes

    keyword = next((keyword for cid, keyword in _CATEGORIES.items() if kind in getattr(codes, cid)), default)
    category: PydicomCode = getattr(codes.cid7150, keyword)
    return category


def _private(name: str) -> PydicomCode:
    """Return a code that is made from a name; equal for spellings that differ in case and separators."""
    from pydicom.sr.coding import Code as PydicomCode

    value = "_".join(_words(name)).upper()
    if not 0 < len(value) <= LONGEST_VALUE or not value.isascii():
        value = hashlib.sha256(name.casefold().encode(errors="surrogatepass")).hexdigest()[:LONGEST_VALUE].upper()
    return PydicomCode(value, PRIVATE_SCHEME, long_string(name))


def _keyword(name: str) -> tuple[str, Side | None]:
    """Return the keyword of a name in pydicom's table of SNOMED CT, "" if unknown, and the side."""
    words = _words(name)
    whole = "".join(words)
    if found := _table().get(whole):
        return found[0], None
    sides = [n for n, word in enumerate(words) if word in _SIDES]
    side = _SIDES[words[sides[0]]] if len(sides) == 1 else None
    if side is not None:
        whole = "".join(word for word in words if word not in _SIDES)
    plain = _LEVEL.sub("", whole)
    for candidate in dict.fromkeys((whole, re.sub(r"\d{1,3}$", "", plain))):
        keyword, paired, counted = _table().get(candidate, ("", False, False))
        if keyword and (paired or side is None) and (counted or candidate == whole):
            return keyword, side
    return "", None


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: "Glnd_Submand_L", "LeftLung" and "GTV-1" have 3, 2 and 2."""
    name = re.sub(r"(?<=[a-z])(?=(?:Left|Right)$)|(?<=^Left)(?=[A-Z])|(?<=^Right)(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", name.casefold())


@cache
def _table() -> dict[str, tuple[str, bool, bool]]:
    """Return keyword, whether it may have a side, and whether it may have a number, by name."""
    tables = (
        (_SINGLE, False, False), (_PAIRED, True, False), (_COUNTED, False, True), (_COUNTED_AND_PAIRED, True, True),
    )  # fmt: skip
    return {
        name: (keyword, paired, counted)
        for table, paired, counted in tables
        for keyword, names in table.items()
        for name in names
    }
