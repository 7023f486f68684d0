"""Counts how neighbouring pixels speak for one reading of stored words or another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.hounsfield import LOWEST_HU, TISSUE_HU
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.pixel_padding import circle

CT_HU = (-10240.0, 32767.0)
"""No CT number lies beyond: extended scales begin at −10240 HU and end at 30710 HU."""


ENOUGH_PAIRS = 1000
"""Pairs of neighbours that settle a question without a look at all slices, if `NEARLY_ALL` of them agree."""


NEARLY_ALL = 0.95


FEW_PAIRS = 16
"""Fewer pairs of neighbours settle nothing."""


MAJORITY = 2 / 3


UNDISTURBED = 4.0
"""Differences between neighbours are ordinary up to so many times the median of the others."""


FEW_VALUES = 16
"""Fewer distinct values that are air or lower are fill."""


MUCH_AIR = 0.1
"""Values that are air with the other sign are air, and not metal, if they are at least this share of all."""


GRAPHIC = 0.5
"""Bits that change less than so many times as often between neighbours as the lowest bit of an image are graphics."""


class Claim(NamedTuple):
    """What a header says of its words."""

    coded: bool
    """Whether they are samples of a code stream, which have no bits beside them."""
    allocated: int
    stored: int
    high_bit: int
    """Where the topmost stored bit lies: *Bits Stored* − 1 where *High Bit* is absent or impossible."""
    signed: bool
    stream: str | None


Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""The same slice, read in two ways."""


def low_bits(words: NDArray[Any], bits: int, signed: bool) -> NDArray[np.int32]:
    """Return what the low bits of words are."""
    return signed_from(words, bits) if signed else words.astype(np.int32) & (2**bits - 1)


def signed_from(words: NDArray[Any], bit: int) -> NDArray[np.int32]:
    """Return words of `bit` bits as signed numbers, the topmost bit being the sign; what lies above is dropped."""
    return np.asarray((words.astype(np.int32) << (32 - bit)) >> (32 - bit))


@dataclass(slots=True)
class Readings:
    """Two readings of the same words: how far neighbours differ in each, where the two part, and what HU they reach."""

    pairs: list[int] = field(default_factory=lambda: [0, 0])
    """Pairs of neighbours between which the readings part: those that differ less in the first, and in the second."""
    apart: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2**17, np.int64))
    """Number of these pairs by their difference in the first reading."""
    ordinary: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2**17, np.int64))
    """Number of the other pairs by their difference."""
    hu: list[list[float]] = field(default_factory=lambda: [[np.inf, -np.inf], [np.inf, -np.inf]])
    """Lowest and highest of each reading within the scanner's circle; outside there is fill."""
    top: int = 0
    """Largest magnitude of the second reading."""
    values: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(2**16, np.bool_))
    """Which words differ between the readings."""
    pixels: int = 0
    """Number of all pixels so far but declared padding."""
    air: int = 0
    """Number of these that are air in the second reading, and not in the first."""
    extended: bool = False
    """Whether a negative number of the first reading is the same number in the second."""

    def add(self, header: SliceHeader, first: NDArray[np.int32], second: NDArray[np.int32]) -> None:
        """Take in a slice. Declared padding, by either reading, tells nothing."""
        measured = np.ones(first.shape, bool)
        if header.padding is not None:
            limit = header.padding if header.padding_limit is None else header.padding_limit
            low, high = sorted((header.padding, limit))
            measured = ((first < low) | (first > high)) & ((second < low) | (second > high))
        if not measured.any():
            return
        slope, intercept = rescale_of(header)
        other = second[measured & (first != second)]
        self.values[other & 0xFFFF] = True
        self.pixels += int(np.count_nonzero(measured))
        hu = other * slope + intercept
        self.air += int(np.count_nonzero((hu >= LOWEST_HU) & (hu <= TISSUE_HU[0])))
        self.extended |= bool(((first == second) & (first < 0) & measured).any())
        inside = measured & circle(*first.shape)
        for ends, values in zip(self.hu, (first[inside], second[inside]), strict=True):
            if not values.size:
                continue
            reached = [int(v) * slope + intercept for v in (values.min(), values.max())]
            ends[:] = min(ends[0], *reached), max(ends[1], *reached)
        self.top = max(self.top, int(np.abs(second[measured]).max()))
        for axis in (0, 1):
            both = np.logical_and(*_neighbours(measured, axis))
            a, b = (np.abs(np.diff(values, axis=axis))[both] for values in (first, second))
            steps = np.diff(second - first, axis=axis)[both]
            part = steps != 0
            self.pairs[0] += int(np.count_nonzero(a[part] < b[part]))
            self.pairs[1] += int(np.count_nonzero(b[part] < a[part]))
            self.apart += np.bincount(a[part], minlength=2**17)
            self.ordinary += np.bincount(a[~part], minlength=2**17)

    @property
    def favours(self) -> int | None:
        """The reading in which neighbours differ less, 0 or 1; None where the pairs are few or do not agree."""
        total = sum(self.pairs)
        if total < FEW_PAIRS:
            return None
        return next((n for n in (0, 1) if self.pairs[n] >= MAJORITY * total), None)

    @property
    def differ(self) -> bool:
        """Whether any pixel does."""
        return bool(self.values.any())

    @property
    def agreed(self) -> int | None:
        """The reading in which nearly all neighbours differ less; None where the pairs are few or do not agree."""
        favours = self.favours
        return favours if max(self.pairs) >= NEARLY_ALL * sum(self.pairs) else None

    @property
    def settled(self) -> bool:
        """Whether no look at more slices is needed."""
        return sum(self.pairs) >= ENOUGH_PAIRS and self.agreed is not None

    @property
    def undisturbed(self) -> bool | None:
        """Whether neighbours differ in the first reading as usual where the readings part; None where they do not."""
        if not self.apart.any():
            return None
        usual = self.ordinary.copy()
        usual[0] = 0  # fill around the circle is constant, and would make every image look odd
        return _median(self.apart) <= UNDISTURBED * max(_median(usual), 1)

    def possible(self, n: int, lowest_hu: float = CT_HU[0]) -> bool:
        """Whether a reading stays within CT numbers."""
        return lowest_hu <= self.hu[n][0] and self.hu[n][1] <= CT_HU[1]

    @property
    def airy(self) -> bool:
        """Whether much is air in the second reading only."""
        return self.air >= MUCH_AIR * self.pixels

    @property
    def varied(self) -> bool:
        """Whether the words that differ are more than the few values of fill."""
        return bool(np.count_nonzero(self.values) >= FEW_VALUES)

    def is_one_plane_above(self, stored: int) -> bool:
        """Whether the words that differ are alike above the bits stored, and hold something there."""
        above = np.unique(np.flatnonzero(self.values) >> stored)
        return bool(above.size == 1 and above[0] > 0)

    def span(self, n: int) -> str:
        """Return what HU a reading reaches, in words."""
        return f"{self.hu[n][0]:g} to {self.hu[n][1]:g} HU"


def _neighbours(values: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return (values[:-1], values[1:]) if axis == 0 else (values[:, :-1], values[:, 1:])


def has_no_negative_tissue(header: SliceHeader) -> bool:
    """Whether all negative values of a slice would be air or lower."""
    slope, intercept = rescale_of(header)
    return slope > 0 and intercept - slope < TISSUE_HU[0]


def rescale_of(header: SliceHeader) -> tuple[float, float]:
    """Return the slope and the intercept of a slice; 1 and 0 where they are absent."""
    return header.rescale_slope or 1.0, header.rescale_intercept or 0.0


def _median(counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))


class Bits:
    """Which bits of words vary, and how often between neighbours."""

    def __init__(self, said: Claim) -> None:
        self._said = said
        self._shift = said.high_bit - said.stored + 1
        self._ones, self._zeros = 0, (1 << said.allocated) - 1
        self._ends = [0, 0]
        self._changes = np.zeros(said.allocated, np.int64)
        self._low = Readings()
        self.readings = Readings()

    def add(self, header: SliceHeader, words: NDArray[Any]) -> None:
        """Take in a slice."""
        said = self._said
        self._ones |= int(np.bitwise_or.reduce(words, axis=None))
        self._zeros &= int(np.bitwise_and.reduce(words, axis=None))
        signed = signed_from(words, said.allocated)
        self._ends = [min(self._ends[0], int(signed.min())), max(self._ends[1], int(signed.max()))]
        for axis in (0, 1):
            changed = np.bitwise_xor(*_neighbours(words, axis))
            self._changes += [np.count_nonzero(changed & (1 << bit)) for bit in range(said.allocated)]
        bare = header._replace(padding=None)
        low, high = (low_bits(w, said.stored, said.signed) for w in (words, words >> self._shift))
        self._low.add(bare, low, words.astype(np.int32))
        self.readings.add(bare, high, low)

    @property
    def varying(self) -> int:
        """The bits that are not alike in all words."""
        return self._ones & ~self._zeros

    @property
    def above_is_constant(self) -> bool:
        """Whether nothing but a sign lies above the low bits."""
        stored = self._said.stored
        extended = self._said.signed and -(2 ** (stored - 1)) <= self._ends[0] <= self._ends[1] < 2 ** (stored - 1)
        return extended or not self.varying >> stored

    @property
    def below_is_constant(self) -> bool:
        """Whether nothing lies below the bits that the header says."""
        return not self.varying & (2**self._shift - 1)

    @property
    def above_is_graphic(self) -> bool:
        """Whether the low bits are an image, finer at their lower end, which the bits above do not continue."""
        finest = self._changes[0]
        fine = self._changes[self._said.stored - 1] < GRAPHIC * finest and not self.below_is_graphic
        return bool(fine and self._low.undisturbed)

    @property
    def below_is_graphic(self) -> bool:
        """Whether the bits below those that the header says change too rarely for the lowest of an image."""
        return bool(self._changes[: self._shift].max() < GRAPHIC * self._changes[self._shift])
