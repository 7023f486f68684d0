"""Defines `Shard`: a reproducible part of a cohort, for runs that are split over several machines."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from gpuprep.errors import RequestError


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Shard `number` of `count`, counted from 1.

    Examples
    --------
    >>> first, second = gpuprep.Shard(1, 2), gpuprep.Shard.parse("2/2")
    >>> first.has("1.2.3"), second.has("1.2.3")
    (True, False)
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard written as ``i/n``.

        Raises
        ------
        RequestError
            Unless 1 ≤ i ≤ n.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise RequestError(f"shard = {text!r}: give i/n with i from 1 to n, such as 1/4 … 4/4")
        return cls(number, count)

    @property
    def name(self) -> str:
        """Name of its working folder and part of its manifest's name; "" for the whole cohort."""
        return "" if self.count == 1 else f"{self.number}-of-{self.count}"

    def has(self, series_uid: str) -> bool:
        """Return whether a series belongs to this shard.

        Only the UID is hashed, so the parts of one series stay together.
        """
        digest = hashlib.sha256(series_uid.encode()).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number - 1


WHOLE_COHORT = Shard(1, 1)
"""The whole cohort."""
