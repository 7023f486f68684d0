"""Compares two readings of stored words by the differences between neighbouring pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.hounsfield import LOWEST_HU, TISSUE_HU
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.pixel_padding import circle

PLAUSIBLE_HU = (-10240.0, 32767.0)
"""Range of plausible HU: extended CT scales begin at −10240 HU and end at 30710 HU."""


ENOUGH_PAIRS = 1000
"""Pairs of neighbours that are enough evidence without reading all slices, if `NEARLY_ALL` of them agree."""


NEARLY_ALL = 0.95


MIN_PAIRS = 16
"""Smallest number of pairs of neighbours that count as evidence."""


MAJORITY = 2 / 3


NORMAL_STEP_FACTOR = 4.0
"""Differences between neighbours are normal up to this many times the median of the other pairs."""


MIN_DISTINCT_VALUES = 16
"""Fewer distinct values than this, all air or lower, are fill."""


MIN_AIR_FRACTION = 0.1
"""Values that are air with the other sign count as air, and not metal, from this fraction of all pixels on."""


GRAPHIC_CHANGE_RATIO = 0.5
"""Bits that change between neighbours less often than this many times the lowest bit of an image are graphics."""


class PixelFormat(NamedTuple):
    """Format of the stored words as the header declares it."""

    coded: bool
    """Whether the pixels are a code stream, which has no bits beside those of its samples."""
    allocated: int
    """*Bits Allocated*."""
    stored: int
    """*Bits Stored*."""
    high_bit: int
    """*High Bit*; *Bits Stored* − 1 if absent or impossible."""
    signed: bool
    """*Pixel Representation*."""
    stream: str | None
    """Sign and bits of the JPEG 2000 code stream, as in `SliceHeader.stream`."""


Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Two readings of the same slice, each of shape (rows, columns)."""


def low_bits(words: NDArray[Any], bits: int, signed: bool) -> NDArray[np.int32]:
    """Return the numbers in the lowest `bits` bits of words."""
    return signed_from(words, bits) if signed else words.astype(np.int32) & (2**bits - 1)


def signed_from(words: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Return the lowest `bits` bits of words as two's complement; higher bits are dropped."""
    return np.asarray((words.astype(np.int32) << (32 - bits)) >> (32 - bits))


@dataclass(slots=True)
class Readings:
    """Statistics of two readings of the same words.

    A pair of neighbouring pixels is *affected* if its difference is not the same in both readings.
    """

    smoother_pairs: list[int] = field(default_factory=lambda: [0, 0])
    """Number of affected pairs that differ less in the first reading, and in the second."""
    affected_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2**17, np.int64))
    """Histogram of affected pairs by their difference in the first reading."""
    other_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2**17, np.int64))
    """Histogram of the other pairs by their difference."""
    hu_ranges: list[list[float]] = field(default_factory=lambda: [[np.inf, -np.inf], [np.inf, -np.inf]])
    """Lowest and highest HU of each reading inside the reconstruction circle; outside is fill."""
    max_magnitude: int = 0
    """Largest magnitude in the second reading."""
    changed_words: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(2**16, np.bool_))
    """Whether each word, by its 16 bits, occurs and differs between the readings."""
    pixel_count: int = 0
    """Number of pixels without declared padding."""
    air_count: int = 0
    """Number of pixels that differ between the readings and are air in the second."""
    sign_extended: bool = False
    """Whether a negative number is equal in both readings: words are sign-extended."""

    def add(self, header: SliceHeader, first: NDArray[np.int32], second: NDArray[np.int32]) -> None:
        """Add a slice; pixels that are declared padding in either reading are ignored."""
        not_padding = np.ones(first.shape, bool)
        if header.padding is not None:
            limit = header.padding if header.padding_limit is None else header.padding_limit
            low, high = sorted((header.padding, limit))
            not_padding = ((first < low) | (first > high)) & ((second < low) | (second > high))
        if not not_padding.any():
            return
        slope, intercept = rescale_of(header)
        other = second[not_padding & (first != second)]
        self.changed_words[other & 0xFFFF] = True
        self.pixel_count += int(np.count_nonzero(not_padding))
        hu = other * slope + intercept
        self.air_count += int(np.count_nonzero((hu >= LOWEST_HU) & (hu <= TISSUE_HU[0])))
        self.sign_extended |= bool(((first == second) & (first < 0) & not_padding).any())
        inside = not_padding & circle(*first.shape)
        for hu_range, values in zip(self.hu_ranges, (first[inside], second[inside]), strict=True):
            if not values.size:
                continue
            reached_hu = [int(v) * slope + intercept for v in (values.min(), values.max())]
            hu_range[:] = min(hu_range[0], *reached_hu), max(hu_range[1], *reached_hu)
        self.max_magnitude = max(self.max_magnitude, int(np.abs(second[not_padding]).max()))
        for axis in (0, 1):
            both = np.logical_and(*_neighbours(not_padding, axis))
            a, b = (np.abs(np.diff(values, axis=axis))[both] for values in (first, second))
            steps = np.diff(second - first, axis=axis)[both]
            affected = steps != 0
            self.smoother_pairs[0] += int(np.count_nonzero(a[affected] < b[affected]))
            self.smoother_pairs[1] += int(np.count_nonzero(b[affected] < a[affected]))
            self.affected_steps += np.bincount(a[affected], minlength=2**17)
            self.other_steps += np.bincount(a[~affected], minlength=2**17)

    @property
    def smoother_reading(self) -> int | None:
        """Reading in which most affected pairs differ less, 0 or 1; None if they are few or without a majority."""
        total = sum(self.smoother_pairs)
        if total < MIN_PAIRS:
            return None
        return next((n for n in (0, 1) if self.smoother_pairs[n] >= MAJORITY * total), None)

    @property
    def differ(self) -> bool:
        """Whether any pixel differs between the readings."""
        return bool(self.changed_words.any())

    @property
    def clearly_smoother(self) -> int | None:
        """Reading in which nearly all affected pairs differ less, 0 or 1; None if there is none."""
        smoother = self.smoother_reading
        return smoother if max(self.smoother_pairs) >= NEARLY_ALL * sum(self.smoother_pairs) else None

    @property
    def conclusive(self) -> bool:
        """Whether the evidence is sufficient without more slices."""
        return sum(self.smoother_pairs) >= ENOUGH_PAIRS and self.clearly_smoother is not None

    @property
    def first_is_smooth(self) -> bool | None:
        """Whether affected pairs differ in the first reading no more than others; None if no pair is affected."""
        if not self.affected_steps.any():
            return None
        usual = self.other_steps.copy()
        usual[0] = 0  # constant fill around the circle would lower the median
        return _median(self.affected_steps) <= NORMAL_STEP_FACTOR * max(_median(usual), 1)

    def is_plausible(self, n: int, lowest_hu: float = PLAUSIBLE_HU[0]) -> bool:
        """Whether the HU of a reading stay within the range of CT numbers."""
        return lowest_hu <= self.hu_ranges[n][0] and self.hu_ranges[n][1] <= PLAUSIBLE_HU[1]

    @property
    def gains_air(self) -> bool:
        """Whether a large fraction of the pixels is air in the second reading only."""
        return self.air_count >= MIN_AIR_FRACTION * self.pixel_count

    @property
    def many_words_differ(self) -> bool:
        """Whether more distinct words differ than the few values of fill."""
        return bool(np.count_nonzero(self.changed_words) >= MIN_DISTINCT_VALUES)

    def is_one_plane_above(self, stored: int) -> bool:
        """Whether all words that differ have the same bits above `stored`, not all 0, like one overlay plane."""
        above = np.unique(np.flatnonzero(self.changed_words) >> stored)
        return bool(above.size == 1 and above[0] > 0)

    def span(self, n: int) -> str:
        """Return the HU range of a reading as text."""
        return f"{self.hu_ranges[n][0]:g} to {self.hu_ranges[n][1]:g} HU"


def _neighbours(values: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return (values[:-1], values[1:]) if axis == 0 else (values[:, :-1], values[:, 1:])


def has_no_negative_tissue(header: SliceHeader) -> bool:
    """Whether all negative stored values of a slice are air or lower."""
    slope, intercept = rescale_of(header)
    return slope > 0 and intercept - slope < TISSUE_HU[0]


def rescale_of(header: SliceHeader) -> tuple[float, float]:
    """Return *Rescale Slope* and *Rescale Intercept* of a slice; 1 and 0 if absent."""
    return header.rescale_slope or 1.0, header.rescale_intercept or 0.0


def _median(counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))


class BitStatistics:
    """Statistics of single bits: which vary, and how often between neighbours."""

    def __init__(self, declared: PixelFormat) -> None:
        self._said = declared
        self._shift = declared.high_bit - declared.stored + 1
        self._ones, self._zeros = 0, (1 << declared.allocated) - 1
        self._ends = [0, 0]
        self._changes = np.zeros(declared.allocated, np.int64)
        self._low = Readings()
        self.readings = Readings()

    def add(self, header: SliceHeader, words: NDArray[Any]) -> None:
        """Add the words of a slice."""
        declared = self._said
        self._ones |= int(np.bitwise_or.reduce(words, axis=None))
        self._zeros &= int(np.bitwise_and.reduce(words, axis=None))
        signed = signed_from(words, declared.allocated)
        self._ends = [min(self._ends[0], int(signed.min())), max(self._ends[1], int(signed.max()))]
        for axis in (0, 1):
            changed = np.bitwise_xor(*_neighbours(words, axis))
            self._changes += [np.count_nonzero(changed & (1 << bit)) for bit in range(declared.allocated)]
        without_padding = header._replace(padding=None)
        low, high = (low_bits(w, declared.stored, declared.signed) for w in (words, words >> self._shift))
        self._low.add(without_padding, low, words.astype(np.int32))
        self.readings.add(without_padding, high, low)

    @property
    def varying(self) -> int:
        """Mask of the bits that are not equal in all words."""
        return self._ones & ~self._zeros

    @property
    def above_is_constant(self) -> bool:
        """Whether the bits above the low ones are constant or a sign extension."""
        stored = self._said.stored
        sign_extended = self._said.signed and -(2 ** (stored - 1)) <= self._ends[0] <= self._ends[1] < 2 ** (stored - 1)
        return sign_extended or not self.varying >> stored

    @property
    def below_is_constant(self) -> bool:
        """Whether the bits below those that the header declares are constant."""
        return not self.varying & (2**self._shift - 1)

    @property
    def above_is_graphic(self) -> bool:
        """Whether the low bits are an image, with the lowest bits changing most, and those above are not part of it."""
        finest = self._changes[0]
        fine = self._changes[self._said.stored - 1] < GRAPHIC_CHANGE_RATIO * finest and not self.below_is_graphic
        return bool(fine and self._low.first_is_smooth)

    @property
    def below_is_graphic(self) -> bool:
        """Whether the bits below those that the header declares change too rarely for the low bits of an image."""
        return bool(self._changes[: self._shift].max() < GRAPHIC_CHANGE_RATIO * self._changes[self._shift])
