"""Collects the HU histogram of a series, derives quality metrics from it, and flags series by thresholds.

Voxels are counted slab by slab while a series is read, from every n-th row and column. Flags are derived later from the
metrics in the manifest, so thresholds can change without another conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count
from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU

if TYPE_CHECKING:
    from gpuprep.output.records import SeriesResult


class Band(NamedTuple):
    """Typical HU range of a tissue."""

    name: str
    low_hu: int
    high_hu: int
    """Upper limit, inclusive."""


BANDS = (
    Band("air", -1024, -951),
    Band("lung", -950, -550),
    Band("fat", -120, -50),
    Band("water", -10, 10),
    Band("blood", 30, 45),
    Band("muscle", 35, 55),
    Band("liver", 50, 70),
    Band("bone", 250, 3071),
)
"""HU ranges of tissues. They overlap, as tissues do; `SOURCES` cites the literature."""

SOURCES = (
    "Air is −1000 HU and water 0 HU by definition (IAEA, Diagnostic Radiology Physics, 2014). Tissues without contrast "
    "medium: W. A. Kalender, Computed Tomography, 2011 (lung, muscle, liver, compact bone); M. Prokop and M. Galanski, "
    "Spiral and Multislice Computed Tomography of the Body, 2003 (fat, blood). Books differ by 10 HU and more."
)

MIN_SAMPLED_ROWS = 128
"""Minimum number of rows and columns sampled in a slice; up to twice as many are sampled."""

LOWEST_BIN_HU, HIGHEST_BIN_HU = int(LOWEST_HU), 3071
"""HU range of 12-bit CT numbers. Higher values (metal) are counted in the highest bin; lower ones are padding."""

STORED_STEPS = ((-1024, 16), (-192, 8), (320, 32), (1024, 128), (3072, 0))
"""Bins of a stored histogram, as (first HU, bin width in HU). Narrow in the range of soft tissue."""

STORED_PARTS = 100_000
"""A stored histogram holds the share of voxels in each bin in units of 1/100,000."""

AIR_SEARCH_HU = (-1100, -925)
TISSUE_SEARCH_HU = (-60, 200)
"""HU ranges in which the peaks of air and of soft tissue are searched."""

SLICES_PER_COUNT = 8
"""Slices whose samples are counted together: a quarter of a MB, which fits into the cache."""

MIN_PEAK_SHARE = 0.002
"""Minimum share of all voxels around a peak."""

MIN_PEAK_HEIGHT = 0.25
"""Minimum height of a peak, relative to the highest value in its search range."""

_SMOOTHING_KERNEL = np.convolve(np.ones(8), np.ones(8))
"""Triangular smoothing kernel, 15 HU wide: wider than counting noise, narrower than the distance between tissues."""


class Histogram:
    """Histogram of the HU of a series, with bins of 1 HU centred on integers.

    Parameters
    ----------
    window_hu : (float, float), optional
        Window of the recipe; None if it does not clip.
    """

    def __init__(self, window_hu: tuple[float, float] | None = None) -> None:
        self._window = window_hu
        self._counts: NDArray[np.int64] = np.zeros(HIGHEST_BIN_HU - LOWEST_BIN_HU + 1, dtype=np.int64)
        self._below = self._above = 0
        self._pending: list[NDArray[Any]] = []
        self._pending_rescale: tuple[float, float, int, int] = (1.0, 0.0, 0, 0)
        """Slope, intercept, lowest and highest declared padding value of the pending slices."""

    def add(self, stored: NDArray[Any], slope: float, intercept: float, padding: NDArray[Any] | None = None) -> None:
        """Add voxels of a slice. Declared padding and values below `LOWEST_HU` are not counted.

        Parameters
        ----------
        stored : array of integers, any shape
            Stored values. They are counted later, so the array must not change afterwards.
        slope, intercept : float
            *Rescale Slope* (HU per unit) and *Rescale Intercept* (HU) of the slice.
        padding : array of integers, shape (2,), optional
            Lowest and highest declared padding value.
        """
        low, high = (1, 0) if padding is None else (int(padding[0]), int(padding[1]))
        if self._pending_rescale != (slope, intercept, low, high) or len(self._pending) >= SLICES_PER_COUNT:
            self._count()
        self._pending_rescale = slope, intercept, low, high
        self._pending.append(stored.reshape(-1))

    def _count(self) -> None:
        """Count the pending stored values, then convert each distinct value to HU once."""
        if not self._pending:
            return
        stored, voxels = _value_counts(np.concatenate(self._pending))
        self._pending.clear()
        slope, intercept, low, high = self._pending_rescale
        hu = stored * slope + intercept
        measured = (hu >= LOWEST_HU) & ((stored < low) | (stored > high))
        hu, voxels = hu[measured], voxels[measured]
        np.add.at(
            self._counts, np.clip(np.rint(hu), LOWEST_BIN_HU, HIGHEST_BIN_HU).astype(np.intp) - LOWEST_BIN_HU, voxels
        )
        if self._window is not None:
            self._below += int(voxels[hu < self._window[0]].sum())
            self._above += int(voxels[hu > self._window[1]].sum())

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of voxels in each bin, from `LOWEST_BIN_HU` on, shape (4096,)."""
        self._count()
        return self._counts

    @property
    def voxels(self) -> int:
        """Number of voxels counted."""
        return int(self.counts.sum())

    def within(self, low_hu: float, high_hu: float) -> int:
        """Return the number of voxels in the bins from `low_hu` to `high_hu`, inclusive."""
        first, last = math.ceil(low_hu) - LOWEST_BIN_HU, math.floor(high_hu) - LOWEST_BIN_HU
        return int(self.counts[max(first, 0) : max(last + 1, 0)].sum())

    def peak_hu(self, low_hu: int, high_hu: int) -> int | None:
        """Return the HU of the highest peak in a range, the middle of a flat one; None without a peak.

        The lowest bin is ignored: scanners clip noise there and fill the corners of slices with that value.
        """
        counts = self.counts.astype(np.float64)
        counts[0] = 0
        smooth = np.convolve(counts, _SMOOTHING_KERNEL, mode="same") / _SMOOTHING_KERNEL.sum()
        inner = smooth[1:-1]
        tops = np.flatnonzero((inner >= smooth[:-2]) & (inner > smooth[2:])) + 1
        tops = tops[(tops >= low_hu - LOWEST_BIN_HU) & (tops <= high_hu - LOWEST_BIN_HU)]
        if not len(tops):
            return None
        top = int(tops[np.argmax(smooth[tops])])
        highest = smooth[max(0, low_hu - LOWEST_BIN_HU) : high_hu - LOWEST_BIN_HU + 1].max()
        around = counts[max(0, top - len(_SMOOTHING_KERNEL) // 2) : top + len(_SMOOTHING_KERNEL) // 2 + 1].sum()
        first = top
        while first and smooth[first - 1] == smooth[top]:
            first -= 1
        stands_out = around >= MIN_PEAK_SHARE * max(1, self.voxels) and smooth[top] >= MIN_PEAK_HEIGHT * highest
        return (first + top) // 2 + LOWEST_BIN_HU if stands_out else None

    def to_dict(self) -> dict[str, Any] | None:
        """Return the metrics as JSON values for the manifest and ``volume.json``; None without voxels.

        Keys: ``voxels`` (number counted); ``below_share`` and ``above_share`` (voxels outside the window);
        ``clipped_share`` (voxels clipped by the window, as a share of those that are not air); ``air_peak_hu`` and
        ``tissue_peak_hu``; ``bands`` (share of each band); ``histogram`` with ``steps`` (first HU and width of the
        bins, see `STORED_STEPS`) and ``parts`` (voxels per bin, in units of 1/100,000).
        """
        voxels = self.voxels
        if not voxels:
            return None
        edges = np.array(list(stored_edges()))
        parts = np.add.reduceat(self.counts, edges[:-1] - LOWEST_BIN_HU) * STORED_PARTS / voxels
        clipped: dict[str, float | None] = dict.fromkeys(("below_share", "above_share", "clipped_share"))
        if self._window is not None:
            air_hu = BANDS[0].high_hu
            not_air = self.within(air_hu + 1, HIGHEST_BIN_HU)
            lost = self._above + self.within(air_hu + 1, math.ceil(self._window[0]) - 1)
            clipped = {
                "below_share": round(self._below / voxels, 5),
                "above_share": round(self._above / voxels, 5),
                "clipped_share": round(min(1.0, lost / not_air), 5) if not_air else 0.0,
            }
        return {
            "voxels": voxels,
            **clipped,
            "air_peak_hu": self.peak_hu(*AIR_SEARCH_HU),
            "tissue_peak_hu": self.peak_hu(*TISSUE_SEARCH_HU),
            "bands": {b.name: round(self.within(b.low_hu, b.high_hu) / voxels, 5) for b in BANDS},
            "histogram": {"steps": [list(s) for s in STORED_STEPS], "parts": np.rint(parts).astype(int).tolist()},
        }


def stored_edges() -> Iterator[int]:
    """Yield the bin edges of a stored histogram in HU, including the end of the last bin."""
    for (start, width), (stop, _) in pairwise(STORED_STEPS):
        yield from range(start, stop, width)
    yield STORED_STEPS[-1][0]


def sampled(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of every n-th row and column of a slice: at least `MIN_SAMPLED_ROWS` of each if it has as many."""
    rows, columns = values.shape
    return values[:: max(1, rows // MIN_SAMPLED_ROWS), :: max(1, columns // MIN_SAMPLED_ROWS)]


def _value_counts(stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return stored values and the number of voxels with each."""
    if stored.dtype.itemsize > 2:
        values, voxels = np.unique(stored, return_counts=True)
        return values, voxels.astype(np.int64)
    low = int(stored.min(initial=0))
    voxels = np.bincount(stored.astype(np.intp) - low)
    return np.arange(low, low + len(voxels)), voxels.astype(np.int64)


AIR_PEAK_TOLERANCE_HU = 20
"""Scanners are calibrated to a few HU; a larger deviation comes from software that shifted the values."""
TISSUE_PEAK_HU = (-15, 100)
"""Expected range: from water to soft tissue with contrast medium."""
SLICE_SPACING_MM = (0.3, 5.5)
IN_PLANE_SPACING_MM = (0.2, 1.5)
PIXEL_ASPECT_TOLERANCE = 0.01
"""Tolerated deviation of row spacing / column spacing from 1."""
PADDING_SHARE = 0.4
"""Upper limit. The corners around the circular field of view are 0.21 of a slice."""
FEW_SLICES = 20
CLIPPED_SHARE = 0.2


def _hu(value: float) -> str:
    """Return a number of HU as text, with a typographic minus sign."""
    return f"{value:g}".replace("-", "−")


class Flag(NamedTuple):
    """Unusual property of a series, for review by a person."""

    code: str
    text: str


FLAGS = {
    "air-peak": f"Air peaks more than {AIR_PEAK_TOLERANCE_HU} HU away from {_hu(AIR_HU)} HU: is the rescale right?",
    "tissue-peak": "Soft tissue peaks outside of {} to {} HU, or nowhere between {} and {} HU: is the rescale right? "
    "Is this a patient?".format(*map(_hu, TISSUE_PEAK_HU + TISSUE_SEARCH_HU)),
    "slice-spacing": "Slices are closer than {} mm or further apart than {} mm.".format(*SLICE_SPACING_MM),
    "pixel-spacing": "Pixels are smaller than {} mm, larger than {} mm, ".format(*IN_PLANE_SPACING_MM)
    + f"or more than {PIXEL_ASPECT_TOLERANCE:.0%} longer than wide.",
    "padding-share": f"More than {PADDING_SHARE:.0%} of the voxels are padding; the corners around a circle are 21 %.",
    "few-slices": f"There are fewer than {FEW_SLICES} slices.",
    "clipped": f"The window clips more than {CLIPPED_SHARE:.0%} of the voxels that are not air.",
}
"""Explanation of each flag by code. The report also shows codes of the audit, such as ``gap``, as flags."""


def flags(result: SeriesResult) -> list[Flag]:
    """Return the flags of a series: metrics outside the thresholds above."""
    found = []
    quality = result.quality or {}
    air, tissue = quality.get("air_peak_hu"), quality.get("tissue_peak_hu")
    if air is not None and abs(air - AIR_HU) > AIR_PEAK_TOLERANCE_HU:
        found.append(Flag("air-peak", f"air peaks at {_hu(air)} HU instead of {_hu(AIR_HU)}"))
    if tissue is None:
        if quality:
            found.append(Flag("tissue-peak", "nothing peaks between {} and {} HU".format(*map(_hu, TISSUE_SEARCH_HU))))
    elif not TISSUE_PEAK_HU[0] <= tissue <= TISSUE_PEAK_HU[1]:
        found.append(Flag("tissue-peak", f"soft tissue peaks at {_hu(tissue)} HU"))
    if result.source_spacing_mm is not None:
        slices_mm, rows_mm, columns_mm = result.source_spacing_mm
        if not SLICE_SPACING_MM[0] <= slices_mm <= SLICE_SPACING_MM[1]:
            found.append(Flag("slice-spacing", f"slices are {slices_mm:.4g} mm apart"))
        low, high = IN_PLANE_SPACING_MM
        outside = not low <= rows_mm <= high or not low <= columns_mm <= high
        if outside or abs(rows_mm / columns_mm - 1) > PIXEL_ASPECT_TOLERANCE:
            found.append(Flag("pixel-spacing", f"pixels are {rows_mm:.4g} × {columns_mm:.4g} mm"))
    if (result.padding_share or 0) > PADDING_SHARE:
        found.append(Flag("padding-share", f"{result.padding_share:.0%} of the voxels are padding"))
    if result.slices < FEW_SLICES:
        found.append(Flag("few-slices", f"only {format_count(result.slices, 'slice')}"))
    if (quality.get("clipped_share") or 0) > CLIPPED_SHARE:
        found.append(Flag("clipped", f"the window clips {quality['clipped_share']:.0%} of what is not air"))
    return found
