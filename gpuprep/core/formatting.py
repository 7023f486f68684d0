"""Formats text for messages: printable, quoted, counted, listed."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text with unprintable characters escaped, lone surrogates included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


QUOTED = 40
"""Maximum number of characters of a file's content that a message quotes."""


def quoted(text: str) -> str:
    """Return part of a file's content for a message: quoted, escaped and shortened."""
    return f"'{printable(text[:QUOTED])}{'…' if len(text) > QUOTED else ''}'"


def plain_reason(reason: str) -> str:
    """Return a reason without the leading name of its error class."""
    return re.sub(r"^[A-Z]\w*: ", "", reason)


def format_count(count: int, what: str = "number") -> str:
    """Return a count with its noun, in the plural unless the count is 1."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def first_few(parts: Sequence[str], most: int = 3, what: str = "") -> str:
    """Return the first `most` texts, and the number of the remaining ones."""
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {more} more {what}".rstrip() if more > 0 else "")


def format_bytes(count: int) -> str:
    """Return a number of bytes in B, kB, MB or GB, with three significant digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return format_count(count, "byte")


def format_cuda_version(number: int) -> str:
    """Return a version number of CUDA, 1000 · major + 10 · minor, as text; "" for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
