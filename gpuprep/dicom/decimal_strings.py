"""Parses lists of decimal numbers, many at once, several times as fast as Python's float().

Eight digits are converted at a time: an integer of 64 bits holds eight characters, and three multiplications combine
them to a number. A value is the integer of all its digits, divided by a power of ten. Both are exact up to 15 digits,
so the quotient is the float64 nearest to the decimal number, as float() returns it.

References
----------
DICOM PS3.5, 6.2 (Decimal String); 6.4 (Value Multiplicity): values are separated by a backslash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 128 * 2**10
"""Length of text that is best parsed at once: a shorter one takes longer per number, a longer one as long."""

MOST_DIGITS = 15
"""Largest number of digits whose integer is exact in float64."""

_U = np.uint64
_WORD = 8
"""Characters of a word."""
_LAST = np.array([0] + [2**64 - 2 ** (64 - 8 * n) for n in range(1, _WORD + 1)], _U)
"""Masks of the last n characters of a word, for n from 0 to 8."""
_INTEGER_POWERS = 10 ** np.arange(MOST_DIGITS + 1, dtype=_U)
_POWERS = 10.0 ** np.arange(MOST_DIGITS + 1)
_SIGNS = np.ones(256)
_SIGNS[ord("-")] = -1
"""Sign of a number by its first character."""


def parse_decimals(texts: Sequence[bytes], largest: float) -> list[NDArray[np.float64] | None]:
    r"""Return the numbers of each text.

    Parameters
    ----------
    texts : sequence of bytes
        Decimal numbers, separated by backslashes, without padding.
    largest : float
        Largest magnitude of a number.

    Returns
    -------
    list of arrays of float64, or None
        None for a text in which any value is not an ordinary number: up to 15 digits, at most eight of them before the
        decimal point, perhaps with a minus sign. Such a text may still be valid.
    """
    data = b"\\" * _WORD + b"\\".join(texts) + b"\\"
    characters = np.frombuffer(data, np.uint8)
    separators = np.flatnonzero(characters == ord("\\"))[_WORD - 1 :]
    starts, ends = separators[:-1] + 1, separators[1:]
    points = np.flatnonzero(characters == ord("."))
    has_point: NDArray[np.bool_] | int = 1
    if len(points) != len(ends) or not ((points >= starts) & (points < ends)).all():
        last_points = np.append(0, points)[np.searchsorted(points, ends)]
        has_point = last_points >= starts
        points = np.where(has_point, last_points, ends)
    signs = _SIGNS.take(characters[starts])
    before = points - starts
    before -= signs < 0
    after = ends - points
    after -= has_point
    digits = before + after
    ordinary = (before <= _WORD) & (digits <= MOST_DIGITS) & (digits > 0)
    if not ordinary.all():
        before[~ordinary] = after[~ordinary] = 0

    # Little endian on every machine, so that the first character is the lowest byte.
    words = np.ndarray((len(data) - _WORD + 1,), "<u8", data, strides=(1,))
    wrong = np.zeros(len(ends), _U)
    whole = _integers(words[points - _WORD], before, wrong)
    whole *= _INTEGER_POWERS[after]
    if after.max() > _WORD:
        higher = np.where(after > _WORD, ends - 2 * _WORD, 0)
        whole += _integers(words[higher], np.maximum(after, _WORD) - _WORD, wrong) * _U(10**_WORD)
        whole += _integers(words[ends - _WORD], np.minimum(after, _WORD), wrong)
    else:
        whole += _integers(words[ends - _WORD], after, wrong)
    values = whole.astype(np.float64)
    values /= _POWERS[after]
    ordinary &= (wrong & _U(0x8080808080808080)) == 0
    ordinary &= values <= largest
    values *= signs

    text_ends = np.cumsum([len(text) + 1 for text in texts]) + (_WORD - 1)
    stops = np.searchsorted(ends, text_ends, side="right")
    unusual = np.searchsorted(np.flatnonzero(~ordinary), stops)
    return [
        None if number else values[start:stop]
        for start, stop, number in zip(
            [0, *stops.tolist()], stops.tolist(), np.diff(unusual, prepend=0).tolist(), strict=False
        )
    ]


def _integers(words: NDArray[np.uint64], counts: NDArray[np.intp], wrong: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the integers of the last `counts` characters of words; set the highest bit of bytes that are no digits."""
    words ^= _U(0x3030303030303030)  # digits become 0 to 9
    words &= _LAST[counts]
    over = words + _U(0x7676767676767676)
    over |= words
    wrong |= over
    # Neighbours are combined: digits to numbers of two digits, these to numbers of four, these to one of eight.
    words *= _U(10 * 2**8 + 1)
    words >>= _U(8)
    words &= _U(0x00FF00FF00FF00FF)
    words *= _U(100 * 2**16 + 1)
    words >>= _U(16)
    words &= _U(0x0000FFFF0000FFFF)
    words *= _U(10_000 * 2**32 + 1)
    words >>= _U(32)
    return words
