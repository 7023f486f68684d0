"""Parses numbers, names and UIDs in text strictly, and quotes them in errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.errors import SegmentationError

LARGEST_COORDINATE = 1e6
"""Largest magnitude of a coordinate, in mm or pixels; larger ones are treated as damage."""

NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""Decimal number. Python's float() also accepts 1_0 and the digits of other scripts, which no program writes."""

LONGEST_NUMBER = 40
"""Characters of the longest number; longer ones are treated as damage."""

_PADDED_NUMBER = re.compile(rf"[ \t]*{NUMBER.pattern}[ \t]*")
_NUMBER_CHARACTERS = re.compile(r"[0-9+\-.eE \t]*")
_UID = re.compile(r"[0-9]+(?:\.[0-9]+)+")


def lines(text: str) -> list[str]:
    r"""Return the lines of a text, which may end in LF, CR LF or CR, without the byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def refusal(line: int, column: int, what: str) -> SegmentationError:
    """Return the error for a line and column of a text, both counted from 1."""
    return SegmentationError(f"line {line}, column {column}: {what}")


def is_uid(text: str) -> bool:
    """Return whether a text can be a DICOM UID."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def is_number(text: str, largest: float = LARGEST_COORDINATE) -> bool:
    """Return whether a text is a decimal number with a magnitude of at most `largest`."""
    if len(text) > LONGEST_NUMBER or _PADDED_NUMBER.fullmatch(text) is None:
        return False
    return -largest <= float(text) <= largest


def numbers(
    parts: Sequence[str], position: Callable[[int], tuple[int, int]], largest: float = LARGEST_COORDINATE
) -> NDArray[np.float64]:
    """Return numbers that are written as text.

    Parameters
    ----------
    parts : sequence of str
        Text of each number.
    position : callable
        Returns line and column, counted from 1, of the part with a given index. Called only for an invalid part.
    largest : float
        Largest magnitude of a number.

    Returns
    -------
    array of float

    Raises
    ------
    SegmentationError
        If a part is not a decimal number, or is too large.
    """
    # float() also accepts 1_0, nan and the digits of other scripts. The check of characters excludes all these.
    if max(map(len, parts), default=0) <= LONGEST_NUMBER and _NUMBER_CHARACTERS.fullmatch("".join(parts)):
        try:
            values = np.fromiter(map(float, parts), np.float64, len(parts))
        except ValueError:
            pass
        else:
            if (np.abs(values) <= largest).all():
                return values
    wrong = next(i for i, part in enumerate(parts) if not is_number(part, largest))
    raise refusal(
        *position(wrong),
        f"{quoted(parts[wrong])} is not a number from {-largest:.0f} to {largest:.0f}; correct it or save again",
    )


def unique_names(named: Iterable[tuple[str, int]]) -> list[str]:
    """Return unique names: each name that occurs more than once gets its number appended, as in "PTV (3)"."""
    named = list(named)
    count = Counter(name for name, _ in named)
    taken = {name for name, n in count.items() if n == 1}
    result = []
    for name, number in named:
        if count[name] > 1:
            name = f"{name} ({number})"
            while name in taken:
                name += f" ({number})"
            taken.add(name)
        result.append(name)
    return result
