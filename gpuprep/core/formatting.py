"""Formats text for messages: printable, quoted, counted, listed."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text with everything escaped that a terminal, a table or UTF-8 cannot hold."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


QUOTED = 40
"""Characters of a file that a message repeats."""


def quoted(text: str) -> str:
    """Return a piece of a file for a message: in quotes, printable, not long."""
    return f"'{printable(text[:QUOTED])}{'…' if len(text) > QUOTED else ''}'"


def plain_reason(reason: str) -> str:
    """Return a reason as a person reads it: without the class of the error, which programs look for."""
    return re.sub(r"^[A-Z]\w*: ", "", reason)


def numbered(count: int, what: str = "number") -> str:
    """Return a count with its noun."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def first_few(parts: Sequence[str], most: int = 3, what: str = "") -> str:
    """Return the first few of some texts, and how many more there are."""
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {more} more {what}".rstrip() if more > 0 else "")


def sized(count: int) -> str:
    """Return a number of bytes as people say it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return numbered(count, "byte")
