"""Parses numbers, names and UIDs in text strictly, and quotes them in errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.errors import SegmentationError

FARTHEST = 1e6
"""Coordinates beyond it, in mm or pixels, are damage."""

NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""What Python takes beyond that, 1_0 and digits of other scripts, no program writes."""

LONGEST_NUMBER = 40
"""Characters; nobody writes longer ones."""

_PADDED = re.compile(rf"[ \t]*{NUMBER.pattern}[ \t]*")
_ALPHABET = re.compile(r"[0-9+\-.eE \t]*")
_UID = re.compile(r"[0-9]+(?:\.[0-9]+)+")


def lines(text: str) -> list[str]:
    r"""Return the lines of a text, whether they end in LF, CR LF or CR; a BOM is dropped."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def refusal(line: int, column: int, what: str) -> SegmentationError:
    """Return the error for something at a place of a text, both counted from 1."""
    return SegmentationError(f"line {line}, column {column}: {what}")


def is_uid(text: str) -> bool:
    """Whether a text can be a DICOM UID."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def is_number(text: str, farthest: float = FARTHEST) -> bool:
    """Whether a text is a decimal number of a size that coordinates have."""
    return len(text) <= LONGEST_NUMBER and _PADDED.fullmatch(text) is not None and -farthest <= float(text) <= farthest


def numbers(
    parts: Sequence[str], place: Callable[[int], tuple[int, int]], farthest: float = FARTHEST
) -> NDArray[np.float64]:
    """Return numbers that were written as text.

    Parameters
    ----------
    parts : sequence of str
        One number each.
    place : callable
        Gives line and column, counted from 1, of a part by its index; called only for a part that is no number.
    farthest : float
        The largest number, either way.

    Returns
    -------
    array of float

    Raises
    ------
    SegmentationError
        If a part is anything but a decimal number of that size.
    """
    # float() takes more than numbers, as 1_0, nan and the digits of all scripts: not where only these characters occur.
    if max(map(len, parts), default=0) <= LONGEST_NUMBER and _ALPHABET.fullmatch("".join(parts)):
        try:
            values = np.fromiter(map(float, parts), np.float64, len(parts))
        except ValueError:
            pass
        else:
            if (np.abs(values) <= farthest).all():
                return values
    wrong = next(i for i, part in enumerate(parts) if not is_number(part, farthest))
    raise refusal(
        *place(wrong),
        f"{quoted(parts[wrong])} is not a number from {-farthest:.0f} to {farthest:.0f}; correct it or save again",
    )


def distinct(named: Iterable[tuple[str, int]]) -> list[str]:
    """Return names no two of which are equal: those that occur more than once get their number, as in "PTV (3)"."""
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
