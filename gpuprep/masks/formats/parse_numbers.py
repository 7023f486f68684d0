"""Parses lines of numbers: all at once if the text is clean, else word by word to locate the error.

Numbers are separated by blanks, tabs, commas or semicolons. Lines that begin with ``#`` or ``//`` are comments; the
first other line may name the columns, and each line may begin with a word, its label.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count, quoted
from gpuprep.errors import SegmentationError
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, NUMBER

MOST_CHARACTERS = 2**27
"""Limit of the length of a text; parsing takes about twenty times as many bytes of memory."""

_FOREIGN = re.compile(r"[^0-9eE+\-.,; \t\n]")
"""Character that occurs neither in numbers nor between them."""
_WORD = re.compile(r"[^ \t,;\n]+")
_LABEL = re.compile(r'[ \t]*("[^"\n]*"|[^\W\d][^ \t,;\n]*)[ \t]*[,;]?')
_NO_LABEL = re.compile(r"(?i)nan|inf|infinity|e[+-]?[0-9]+")
_RESEMBLES_NUMBER = re.compile(r"(?i)[-+.\d]|nan$|inf(inity)?$")
_EMPTY_FIELD = re.compile(r"(?m)^[ \t]*[,;]|[,;][ \t]*[,;]")
_TIGHT_COMMA = re.compile(r"[0-9],[0-9]")
_OTHER_SEPARATOR = re.compile(r"[0-9](?:[ \t]+|[ \t]*;[ \t]*)[-+.0-9]")
_IS_SEPARATOR = np.zeros(256, dtype=bool)
_IS_SEPARATOR[list(b" \t,;\n")] = True
_TO_BLANKS = bytes.maketrans(b",;", b"  ")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Numbers of a text by line, for the n lines that hold numbers."""

    values: NDArray[np.float64]
    """Numbers of all lines, one line after the other."""
    starts: NDArray[np.int64]
    """Index in `values` at which each line begins, and at which the last line ends, shape (n + 1,)."""
    lines: NDArray[np.int64]
    """Line numbers in the file, counted from 1, shape (n,)."""
    follows_blank: NDArray[np.bool_]
    """Whether a blank line precedes each line, shape (n,)."""
    labels: tuple[str, ...] | None
    """Word at the beginning of each line; None if there are none."""
    header: tuple[str, ...] | None
    """Names of the columns; None if there is no header."""
    pointed: bool
    """Whether any number is written with a decimal point or an exponent."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Count of numbers in each line."""
        return np.diff(self.starts)

    def grid(self) -> NDArray[np.float64]:
        """Return the numbers as lines × columns; raise SegmentationError if lines have different counts."""
        counts = self.counts
        if odd := np.flatnonzero(counts != counts[0]).tolist():
            raise SegmentationError(
                f"line {self.lines[odd[0]]}: {format_count(int(counts[odd[0]]))}, where line {self.lines[0]} has "
                f"{counts[0]}: the file is damaged, or has lines of another kind"
            )
        return self.values.reshape(len(counts), -1)


def parse(text: str) -> Table:
    """Return the numbers of a text.

    Parameters
    ----------
    text : str
        Lines end with a line feed.

    Returns
    -------
    Table
        Table of at least one line.

    Raises
    ------
    SegmentationError
        If the text holds no numbers, or anything else than numbers; the message names line and column.
    """
    if len(text) > MOST_CHARACTERS:
        raise SegmentationError(f"has {len(text) / 2**20:.0f} MiB of text: put each structure into its own file")
    text, labels, header, skipped = _without_words(text)
    _check_separators(text)
    data = text.encode("ascii")
    array = np.frombuffer(data, dtype=np.uint8)
    begins = ~_IS_SEPARATOR[array]
    begins[1:] &= _IS_SEPARATOR[array[:-1]]
    positions = np.flatnonzero(begins)
    del begins
    if not len(positions):
        raise SegmentationError("holds no numbers: it is empty, or cut short")
    values = _converted(data, len(positions))
    if values is None:
        raise _no_number(text)
    with np.errstate(invalid="ignore"):
        if not (in_range := np.abs(values) <= LARGEST_COORDINATE).all():
            at = int(positions[np.argmin(in_range)])
            raise SegmentationError(
                f"{_where(text, at)}: {quoted(_word(text, at))} is beyond ±{LARGEST_COORDINATE:.0f}: "
                "the file is damaged, or no list of coordinates"
            )
    ends = np.append(np.searchsorted(positions, np.flatnonzero(array == ord("\n"))), len(positions))
    counts = np.diff(ends, prepend=0)
    lines = np.flatnonzero(counts)
    blank = counts == 0
    blank[skipped] = False
    blanks = np.cumsum(blank)[lines]
    follows_blank = np.diff(blanks, prepend=blanks[0]) > 0
    if follows_blank[1:].all():  # blank lines between all lines separate no contours
        follows_blank[:] = False
    if labels and (unlabelled := np.flatnonzero(~np.isin(lines, list(labels))).tolist()):
        raise SegmentationError(
            f"line {lines[unlabelled[0]] + 1}, column 1: no label, where line {next(iter(labels)) + 1} begins with one"
        )
    return Table(
        values,
        np.append(0, ends[lines]),
        lines + 1,
        follows_blank,
        tuple(labels[n] for n in lines.tolist()) if labels else None,
        header,
        b"." in data or b"e" in data or b"E" in data,
    )


def _without_words(text: str) -> tuple[str, dict[int, str], tuple[str, ...] | None, list[int]]:
    """Return the text with labels blanked and header and comments removed; labels by line; header; removed lines.

    Lines are counted from 0.
    """
    labels: dict[int, str] = {}
    header: tuple[str, ...] | None = None
    skipped: list[int] = []
    pieces: list[str] = []
    done, line, first = 0, 0, True
    while found := _FOREIGN.search(text, done):
        begin = text.rfind("\n", done, found.start()) + 1 or done
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        line += text.count("\n", done, begin)
        first = first and _WORD.search(text, done, begin) is None
        pieces.append(text[done:begin])
        content = text[begin:end]
        if content.lstrip(" \t").startswith(("#", "//")):
            skipped.append(line)
        elif first and (names := _names(content)):
            header, first = names, False
            skipped.append(line)
        else:
            first = False
            label = _LABEL.match(content)
            if label is None or _NO_LABEL.fullmatch(label[1]):
                raise _no_number(content, line)
            labels[line] = label[1].strip('"').strip()
            # As many blanks as the label has characters, so that messages name the right column.
            pieces.append(" " * label.end() + content[label.end() :])
            if _FOREIGN.search(content, label.end()):
                raise _no_number(pieces[-1], line)
        done = end
    pieces.append(text[done:])
    return "".join(pieces), labels, header, skipped


def _names(line: str) -> tuple[str, ...] | None:
    """Return the names of columns in a line; None if a word in it is a number or resembles one."""
    mark = next((m for m in "\t,;" if m in line), None)
    names = tuple(n.strip().strip('"').strip() for n in (line.split(mark) if mark else line.split()))
    if any(NUMBER.fullmatch(n) or _NO_LABEL.fullmatch(n.lstrip("+-")) for n in names):
        return None
    return names if any(n[:1].isalpha() for n in names) else None


def _check_separators(text: str) -> None:
    """Raise for empty fields and decimal commas, which would shift columns unnoticed."""
    if "," not in text and ";" not in text:
        return
    if found := _EMPTY_FIELD.search(text):
        raise SegmentationError(f"{_where(text, found.end() - 1)}: nothing before the {quoted(text[found.end() - 1])}")
    if (comma := _TIGHT_COMMA.search(text)) and (other := _OTHER_SEPARATOR.search(text)):
        raise SegmentationError(
            f"{_where(text, comma.start() + 1)}: a comma between digits, and other separators too "
            f"({_where(text, other.start() + 1)}): decimal commas are not read; write points, and one kind of separator"
        )


def _converted(data: bytes, count: int) -> NDArray[np.float64] | None:
    """Return the numbers of a text; None if a word is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy's warning if it stops before the end of the text
        try:
            values = np.fromstring(data.translate(_TO_BLANKS).decode("ascii"), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None
    return values if len(values) == count else None  # NumPy reads "1-2" as two numbers


def _no_number(text: str, line: int = 0) -> SegmentationError:
    """Return the error for the first word of `text` that is no number; `text` begins in `line`, counted from 0."""
    bad = next(word for word in _WORD.finditer(text) if not NUMBER.fullmatch(word[0]))
    # Other words are not shown: the file may be a report that names a patient.
    shown = quoted(bad[0]) if _RESEMBLES_NUMBER.match(bad[0]) or len(bad[0]) <= 2 else "a word"
    return SegmentationError(f"{_where(text, bad.start(), line)}: {shown} is no number")


def _word(text: str, at: int) -> str:
    found = _WORD.match(text, at)
    return found[0] if found else ""


def _where(text: str, at: int, line: int = 0) -> str:
    return f"line {line + text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"
