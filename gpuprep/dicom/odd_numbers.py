"""Parses numbers that violate their VR: binary instead of text, text instead of binary, or with decimal commas.

References
----------
DICOM PS3.5, 6.2 (Value Representation): decimal strings (DS), integer strings (IS) and binary numbers.
"""

from __future__ import annotations

import re
import struct
from typing import Any

BINARY = {"FD": "d", "FL": "f", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
"""Format characters of `struct` by VR."""
TEXT = ("DS", "IS")
SHORT_BYTES = 2
"""Length of one US or SS: two digits may also be a binary number."""

_DIGITS = re.compile(rb"[0-9+\-.eE ,\\]+\0?")
_COMMA = re.compile(r"[+-]?([0-9]+(,[0-9]*)?|,[0-9]+)([eE][+-]?[0-9]+)?")
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
"""Possibly a whole number with a thousands separator."""


def binary_numbers(element: Any, *, short: bool) -> tuple[float, ...] | None:
    """Return the numbers of an element with a binary VR; None if the VR is not binary, or the value is text or invalid.

    A value of digits is text even under a binary VR: as floating point, or as 32 bits, its bytes would be an
    implausible number.

    Parameters
    ----------
    element : RawDataElement or DataElement
        The element as pydicom returns it.
    short : bool
        Whether two bytes that are digits count as a binary number of 16 bits.
    """
    form = BINARY.get(getattr(element, "VR", None) or "")
    if form is None:
        return None
    value = element.value
    if isinstance(value, int | float):  # converted by pydicom
        return (float(value),)
    if not isinstance(value, bytes):
        return tuple(map(float, value or ()))
    if _DIGITS.fullmatch(value) and not (short and len(value) == SHORT_BYTES):
        return None
    if len(value) % struct.calcsize(form):
        return None
    order = "<" if element.is_little_endian else ">"
    return tuple(float(number) for (number,) in struct.iter_unpack(order + form, value))


def written_number(element: Any) -> float | None:
    """Return the number of an element that should be US or SS and is text or floating point instead; else None."""
    vr, value = getattr(element, "VR", None), getattr(element, "value", None)
    if vr in TEXT and isinstance(value, bytes) and _DIGITS.fullmatch(value):
        try:
            return float(value.rstrip(b"\0"))
        except ValueError:
            return None
    values = binary_numbers(element, short=True) if vr in ("FD", "FL") else None
    return values[0] if values else None


def with_points(text: str, count: int, most_grouped: float) -> str:
    """Return `count` decimals with points instead of commas, separated by backslashes; "" if the commas are ambiguous.

    Commas are separators if they separate exactly `count` numbers that all have points. Otherwise they are decimal
    commas, unless another number has a point, or all commas could be thousands separators.

    Parameters
    ----------
    text : str
        Value that contains a comma.
    count : int
        Expected number of values.
    most_grouped : float
        Largest plausible number; if all are within it with commas as thousands separators, the text is ambiguous.
    """
    parts = [part.strip() for part in text.split("\\")]
    listed = text.split(",")
    if len(parts) == 1 < count:
        return "\\".join(listed) if len(listed) == count and all("." in part for part in listed) else ""
    if not all(_COMMA.fullmatch(part) for part in parts):
        return ""
    with_comma = [part for part in parts if "," in part]
    if all(_GROUPED.fullmatch(part) for part in with_comma):
        largest = max(abs(int(part.replace(",", ""))) for part in with_comma)
        if largest <= most_grouped:
            return ""
    return "\\".join(parts).replace(",", ".")
