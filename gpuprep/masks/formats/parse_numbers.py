"""Parses lines of numbers at once where the text is clean, else word by word to say what is wrong where.

Numbers are separated by blanks, tabs, commas or semicolons. Lines that begin with ``#`` or ``//`` are comments; the
first other line may name the columns, and each line may begin with a word, its label.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import numbered, quoted
from gpuprep.errors import SegmentationError
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, NUMBER

MOST_CHARACTERS = 2**27
"""Numbers and their places take some twenty times that while they are read."""

_FOREIGN = re.compile(r"[^0-9eE+\-.,; \t\n]")
"""What is in no number and between none."""
_WORD = re.compile(r"[^ \t,;\n]+")
_LABEL = re.compile(r'[ \t]*("[^"\n]*"|[^\W\d][^ \t,;\n]*)[ \t]*[,;]?')
_NO_LABEL = re.compile(r"(?i)nan|inf|infinity|e[+-]?[0-9]+")
_LIKE_NUMBER = re.compile(r"(?i)[-+.\d]|nan$|inf(inity)?$")
_EMPTY_FIELD = re.compile(r"(?m)^[ \t]*[,;]|[,;][ \t]*[,;]")
_TIGHT_COMMA = re.compile(r"[0-9],[0-9]")
_OTHER_SEPARATOR = re.compile(r"[0-9](?:[ \t]+|[ \t]*;[ \t]*)[-+.0-9]")
_BETWEEN = np.zeros(256, dtype=bool)
_BETWEEN[list(b" \t,;\n")] = True
_TO_BLANKS = bytes.maketrans(b",;", b"  ")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The numbers of a text, line by line; n lines hold any."""

    values: NDArray[np.float64]
    """Of all lines, one after the other."""
    starts: NDArray[np.int64]
    """Where in `values` each line begins, and the last one ends: shape (n + 1,)."""
    lines: NDArray[np.int64]
    """Numbers of the lines in the file, from 1: shape (n,)."""
    apart: NDArray[np.bool_]
    """Whether a blank line goes before: shape (n,)."""
    labels: tuple[str, ...] | None
    """The word that each line begins with."""
    header: tuple[str, ...] | None
    """Names of the columns."""
    pointed: bool
    """Whether any number is written with a decimal point or an exponent."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Numbers in each line."""
        return np.diff(self.starts)

    def grid(self) -> NDArray[np.float64]:
        """Return the numbers as lines × columns; raise SegmentationError where a line has more or fewer."""
        counts = self.counts
        if odd := np.flatnonzero(counts != counts[0]).tolist():
            raise SegmentationError(
                f"line {self.lines[odd[0]]}: {numbered(int(counts[odd[0]]))}, where line {self.lines[0]} has "
                f"{counts[0]}: the file is damaged, or lines of it belong elsewhere"
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
        Of at least one line.

    Raises
    ------
    SegmentationError
        If it holds anything else, or no numbers; the message names line and column.
    """
    if len(text) > MOST_CHARACTERS:
        raise SegmentationError(f"has {len(text) / 2**20:.0f} MiB of text: give each structure a file of its own")
    text, labels, header, passed = _words_taken_out(text)
    _check_separators(text)
    data = text.encode("ascii")
    array = np.frombuffer(data, dtype=np.uint8)
    begins = ~_BETWEEN[array]
    begins[1:] &= _BETWEEN[array[:-1]]
    places = np.flatnonzero(begins)
    del begins
    if not len(places):
        raise SegmentationError("holds no numbers: it is empty, or cut short")
    values = _converted(data, len(places))
    if values is None:
        raise _no_number(text)
    with np.errstate(invalid="ignore"):
        if not (fine := np.abs(values) <= LARGEST_COORDINATE).all():
            at = int(places[np.argmin(fine)])
            raise SegmentationError(
                f"{_where(text, at)}: {quoted(_word(text, at))} is beyond ±{LARGEST_COORDINATE:.0f}: "
                "the file is damaged, or no list of coordinates"
            )
    ends = np.append(np.searchsorted(places, np.flatnonzero(array == ord("\n"))), len(places))
    counts = np.diff(ends, prepend=0)
    lines = np.flatnonzero(counts)
    blank = counts == 0
    blank[passed] = False
    blanks = np.cumsum(blank)[lines]
    apart = np.diff(blanks, prepend=blanks[0]) > 0
    if apart[1:].all():  # every second line is blank: that separates nothing
        apart[:] = False
    if labels and (bare := np.flatnonzero(~np.isin(lines, list(labels))).tolist()):
        raise SegmentationError(
            f"line {lines[bare[0]] + 1}, column 1: no label, where line {next(iter(labels)) + 1} begins with one"
        )
    return Table(
        values,
        np.append(0, ends[lines]),
        lines + 1,
        apart,
        tuple(labels[n] for n in lines.tolist()) if labels else None,
        header,
        b"." in data or b"e" in data or b"E" in data,
    )


def _words_taken_out(text: str) -> tuple[str, dict[int, str], tuple[str, ...] | None, list[int]]:
    """Return a text with blanks for its words; its labels by line; its header; lines that are neither data nor blank.

    Lines are counted from 0.
    """
    labels: dict[int, str] = {}
    header: tuple[str, ...] | None = None
    passed: list[int] = []
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
            passed.append(line)
        elif first and (names := _names(content)):
            header, first = names, False
            passed.append(line)
        else:
            first = False
            label = _LABEL.match(content)
            if label is None or _NO_LABEL.fullmatch(label[1]):
                raise _no_number(content, line)
            labels[line] = label[1].strip('"').strip()
            # As many blanks, so that columns stay what they are in messages.
            pieces.append(" " * label.end() + content[label.end() :])
            if _FOREIGN.search(content, label.end()):
                raise _no_number(pieces[-1], line)
        done = end
    pieces.append(text[done:])
    return "".join(pieces), labels, header, passed


def _names(line: str) -> tuple[str, ...] | None:
    """Return the names of columns in a line; none if anything in it is a number, or looks like one."""
    mark = next((m for m in "\t,;" if m in line), None)
    names = tuple(n.strip().strip('"').strip() for n in (line.split(mark) if mark else line.split()))
    if any(NUMBER.fullmatch(n) or _NO_LABEL.fullmatch(n.lstrip("+-")) for n in names):
        return None
    return names if any(n[:1].isalpha() for n in names) else None


def _check_separators(text: str) -> None:
    """Raise for what would shift columns without a word: empty fields, decimal commas."""
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
    """Return the numbers of a text; none if any of its words is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # what NumPy says when it stops in the middle
        try:
            values = np.fromstring(data.translate(_TO_BLANKS).decode("ascii"), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None
    return values if len(values) == count else None  # "1-2" is two to NumPy


def _no_number(text: str, line: int = 0) -> SegmentationError:
    """Return the error for the first word of a text that is no number; the line of its beginning is counted from 0."""
    bad = next(word for word in _WORD.finditer(text) if not NUMBER.fullmatch(word[0]))
    # A word that does not look like one may be from a report, with the name of a patient: it is not repeated.
    shown = quoted(bad[0]) if _LIKE_NUMBER.match(bad[0]) or len(bad[0]) <= 2 else "a word"
    return SegmentationError(f"{_where(text, bad.start(), line)}: {shown} is no number")


def _word(text: str, at: int) -> str:
    found = _WORD.match(text, at)
    return found[0] if found else ""


def _where(text: str, at: int, line: int = 0) -> str:
    return f"line {line + text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"
