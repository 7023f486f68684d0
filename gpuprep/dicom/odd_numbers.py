"""Reads numbers that headers write in another form than DICOM asks: binary, or with decimal commas.

References
----------
DICOM PS3.5, 6.2 (Value Representation): decimal strings (DS), integer strings (IS) and binary numbers.
"""

from __future__ import annotations

import re
import struct
from typing import Any

BINARY = {"FD": "d", "FL": "f", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
"""Formats of `struct` by VR."""
TEXT = ("DS", "IS")
SHORT_BYTES = 2
"""Length of one US or SS, in which two digits could be a number as well."""

_DIGITS = re.compile(rb"[0-9+\-.eE ,\\]+\0?")
_COMMA = re.compile(r"[+-]?([0-9]+(,[0-9]*)?|,[0-9]+)([eE][+-]?[0-9]+)?")
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
"""May be a whole number with a comma before its thousands."""


def binary_numbers(element: Any, *, short: bool) -> tuple[float, ...] | None:
    """Return the numbers of an element whose VR is binary; None where its value is text, or there is none.

    Digits under a binary VR are text all the same: as floating point, or in 32 bits, they would be numbers that no
    header has.

    Parameters
    ----------
    element : RawDataElement or DataElement
        As pydicom has read it.
    short : bool
        Whether two digits under the VR of 16 bits are a binary number.
    """
    form = BINARY.get(getattr(element, "VR", None) or "")
    if form is None:
        return None
    value = element.value
    if isinstance(value, int | float):  # pydicom has converted it
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
    """Return the number of an element that has to be binary and is text or floating point; None where it is neither."""
    vr, value = getattr(element, "VR", None), getattr(element, "value", None)
    if vr in TEXT and isinstance(value, bytes) and _DIGITS.fullmatch(value):
        try:
            return float(value.rstrip(b"\0"))
        except ValueError:
            return None
    values = binary_numbers(element, short=True) if vr in ("FD", "FL") else None
    return values[0] if values else None


def with_points(text: str, count: int, most_grouped: float) -> str:
    """Return `count` decimals with points instead of commas, parted by backslashes; "" where this could be wrong.

    A comma parts numbers where that makes `count` of them, each with a point. Else it is a decimal comma, unless a
    number with a point is beside it, or all could be commas before thousands.

    Parameters
    ----------
    text : str
        Holds a comma.
    count : int
        How many numbers are wanted.
    most_grouped : float
        The largest number that could be meant if commas were before thousands.
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
