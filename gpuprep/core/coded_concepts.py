"""Defines `Code`, a coded concept of DICOM, and checks those that a recipe gives to structures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from gpuprep.errors import RecipeError

Side = Literal["left", "right"]

LONGEST_SCHEME, LONGEST_VALUE, LONGEST_MEANING = 16, 16, 64
"""Maximum lengths of *Coding Scheme Designator*, *Code Value* and *Code Meaning* (PS3.3, 8.8)."""

SHORT_FORM = r"[^\s:\\]{1,16}:[^\s:\\]{1,16}"
"""A code in one text: scheme and value."""


class Code(NamedTuple):
    """A coded concept: what a structure is, in a terminology that other programs know.

    Examples
    --------
    >>> from gpuprep.core.coded_concepts import Code
    >>> Code("SCT", "64033007", "Kidney", "left").to_dict()
    {'scheme': 'SCT', 'value': '64033007', 'meaning': 'Kidney', 'side': 'left'}
    """

    scheme: str
    """*Coding Scheme Designator*, such as "SCT" for SNOMED CT."""
    value: str
    """*Code Value*."""
    meaning: str = ""
    """*Code Meaning*; "" if the value is to be looked up in the code tables of pydicom."""
    side: Side | None = None
    """Laterality, a modifier of the code."""

    def to_dict(self) -> dict[str, str]:
        """Return the fields that are set, as a table of a recipe."""
        return {name: value for name, value in self._asdict().items() if value}


def checked_code(name: str, given: Any) -> Code:
    """Return the code that a recipe gives to a structure, as ``"SCT:10200004"`` or as a table.

    Raises
    ------
    RecipeError
        If it is neither.
    """
    where = f"masks.codes: {name!r} = {given!r}"
    if isinstance(given, Code):
        given = given.to_dict()
    if isinstance(given, str):
        if not re.fullmatch(SHORT_FORM, given):
            raise RecipeError(f'{where}: give scheme and value, as in "SCT:10200004", or a table of both')
        scheme, value = given.split(":")
        return Code(scheme, value)
    if not isinstance(given, Mapping):
        raise RecipeError(f'{where}: give a text such as "SCT:10200004", or a table')
    for key in given:
        if key not in Code._fields:
            raise RecipeError(f"{where}: a code has no {key!r}; its keys: {', '.join(Code._fields)}")
    for key, most in (("scheme", LONGEST_SCHEME), ("value", LONGEST_VALUE), ("meaning", LONGEST_MEANING)):
        text = given.get(key, "")
        if not isinstance(text, str) or len(text) > most or "\\" in text or not text.isprintable():
            raise RecipeError(f"{where}: {key} is a text of up to {most} characters without backslash")
        if key != "meaning" and not re.fullmatch(r"\S+", text):
            raise RecipeError(f"{where}: {key} is needed, without blanks")
    if "side" in given and given["side"] not in get_args(Side):
        raise RecipeError(f"{where}: side is one of {', '.join(get_args(Side))}")
    return Code(given["scheme"], given["value"], given.get("meaning", "").strip(), given.get("side"))


def long_string(text: str) -> str:
    """Return a text as a value of VR LO: up to 64 printable characters without backslash."""
    return "".join(c if c.isprintable() and c != "\\" else "_" for c in text)[:LONGEST_MEANING]
