"""Counts the HU of a series in a histogram, reduces it to figures, and raises flags by thresholds.

Numbers are gathered slab by slab while a series is read, from every n-th row and column; flags are raised afterwards,
from what the manifest holds, so that thresholds may change without converting again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import numbered
from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU

if TYPE_CHECKING:
    from gpuprep.output.records import SeriesResult


class Band(NamedTuple):
    """HU that a tissue usually has."""

    name: str
    low_hu: int
    high_hu: int
    """Included."""


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
"""They overlap, as tissues do; `SOURCES` says where they come from."""

SOURCES = (
    "Air is −1000 HU and water 0 HU by definition (IAEA, Diagnostic Radiology Physics, 2014). Tissues without contrast "
    "medium: W. A. Kalender, Computed Tomography, 2011 (lung, muscle, liver, compact bone); M. Prokop and M. Galanski, "
    "Spiral and Multislice Computed Tomography of the Body, 2003 (fat, blood). Books differ by 10 HU and more."
)

SAMPLES = 128
"""Rows and columns of a slice that are looked at, or up to twice as many."""

LOWEST, HIGHEST = int(LOWEST_HU), 3071
"""What 12 bits hold. Higher values, of metal, count as the highest; lower ones are padding."""

STORED_STEPS = ((-1024, 16), (-192, 8), (320, 32), (1024, 128), (3072, 0))
"""Bins of a stored histogram: from which HU on they have which width. Fine where soft tissues lie."""

STORED_PARTS = 100_000
"""A stored histogram says how many of so many voxels are in each bin."""

AIR_SEARCH_HU = (-1100, -925)
TISSUE_SEARCH_HU = (-60, 200)
"""Where the peaks of air and of soft tissue are looked for."""

SLICES_AT_A_TIME = 8
"""Whose samples are counted together: a quarter of a MB, which stays in the cache."""

LEAST_PEAK = 0.002
"""Share of all voxels around a peak, below which it is none …"""

LEAST_HEIGHT = 0.25
"""… and its height, as a share of the highest value in the range where it is looked for."""

_SMOOTH = np.convolve(np.ones(8), np.ones(8))
"""Weights of a triangle 15 HU wide: wider than the noise of counting, narrower than the distance of tissues."""


class Histogram:
    """HU of a series in bins of 1 HU, centred on whole numbers.

    Parameters
    ----------
    window_hu : (float, float), optional
        What the recipe clips to; None if it does not.
    """

    def __init__(self, window_hu: tuple[float, float] | None = None) -> None:
        self._window = window_hu
        self._counts: NDArray[np.int64] = np.zeros(HIGHEST - LOWEST + 1, dtype=np.int64)
        self._below = self._above = 0
        self._waiting: list[NDArray[Any]] = []
        self._how: tuple[float, float, int, int] = (1.0, 0.0, 0, 0)
        """Slope, intercept, lowest and highest declared padding of what is waiting."""

    def add(self, stored: NDArray[Any], slope: float, intercept: float, padding: NDArray[Any] | None = None) -> None:
        """Take in voxels of a slice; what is declared as padding or lies below all CT numbers does not count.

        Parameters
        ----------
        stored : array of integers, any shape
            Stored values, which must stay as they are from then on.
        slope, intercept : float
            Rescale of the slice.
        padding : array of integers, shape (2,), optional
            Lowest and highest declared value.
        """
        low, high = (1, 0) if padding is None else (int(padding[0]), int(padding[1]))
        if self._how != (slope, intercept, low, high) or len(self._waiting) >= SLICES_AT_A_TIME:
            self._count()
        self._how = slope, intercept, low, high
        self._waiting.append(stored.reshape(-1))

    def _count(self) -> None:
        """Count the stored values that are waiting, and only then look at what each of them means."""
        if not self._waiting:
            return
        stored, voxels = _levels(np.concatenate(self._waiting))
        self._waiting.clear()
        slope, intercept, low, high = self._how
        hu = stored * slope + intercept
        measured = (hu >= LOWEST_HU) & ((stored < low) | (stored > high))
        hu, voxels = hu[measured], voxels[measured]
        np.add.at(self._counts, np.clip(np.rint(hu), LOWEST, HIGHEST).astype(np.intp) - LOWEST, voxels)
        if self._window is not None:
            self._below += int(voxels[hu < self._window[0]].sum())
            self._above += int(voxels[hu > self._window[1]].sum())

    @property
    def counts(self) -> NDArray[np.int64]:
        """Voxels of each HU from `LOWEST` on, shape (4096,)."""
        self._count()
        return self._counts

    @property
    def voxels(self) -> int:
        """Number of voxels taken in."""
        return int(self.counts.sum())

    def within(self, low_hu: float, high_hu: float) -> int:
        """Return the number of voxels in bins from one HU to another, both included."""
        first, last = math.ceil(low_hu) - LOWEST, math.floor(high_hu) - LOWEST
        return int(self.counts[max(first, 0) : max(last + 1, 0)].sum())

    def peak_hu(self, low_hu: int, high_hu: int) -> int | None:
        """Return where most voxels are between two HU, in the middle if equally many are at several; None for nowhere.

        The lowest value that 12 bits hold does not count: scanners cut noise off there, and fill their corners with it.
        """
        counts = self.counts.astype(np.float64)
        counts[0] = 0
        smooth = np.convolve(counts, _SMOOTH, mode="same") / _SMOOTH.sum()
        inner = smooth[1:-1]
        tops = np.flatnonzero((inner >= smooth[:-2]) & (inner > smooth[2:])) + 1
        tops = tops[(tops >= low_hu - LOWEST) & (tops <= high_hu - LOWEST)]
        if not len(tops):
            return None
        top = int(tops[np.argmax(smooth[tops])])
        highest = smooth[max(0, low_hu - LOWEST) : high_hu - LOWEST + 1].max()
        around = counts[max(0, top - len(_SMOOTH) // 2) : top + len(_SMOOTH) // 2 + 1].sum()
        first = top
        while first and smooth[first - 1] == smooth[top]:
            first -= 1
        stands_out = around >= LEAST_PEAK * max(1, self.voxels) and smooth[top] >= LEAST_HEIGHT * highest
        return (first + top) // 2 + LOWEST if stands_out else None

    def to_dict(self) -> dict[str, Any] | None:
        """Return the metrics as plain values, as the manifest and ``volume.json`` hold them; None without voxels.

        ``voxels`` looked at; ``below_share`` and ``above_share`` of the window; ``clipped_share``, what the window
        clips of all that is not air; ``air_peak_hu`` and ``tissue_peak_hu``; ``bands``, the share of each;
        ``histogram``, whose ``steps`` say from which HU on bins have which width, and ``parts`` how many of 100,000
        voxels are in each.
        """
        voxels = self.voxels
        if not voxels:
            return None
        edges = np.array(list(stored_edges()))
        parts = np.add.reduceat(self.counts, edges[:-1] - LOWEST) * STORED_PARTS / voxels
        clipped: dict[str, float | None] = dict.fromkeys(("below_share", "above_share", "clipped_share"))
        if self._window is not None:
            air_hu = BANDS[0].high_hu
            matter = self.within(air_hu + 1, HIGHEST)
            lost = self._above + self.within(air_hu + 1, math.ceil(self._window[0]) - 1)
            clipped = {
                "below_share": round(self._below / voxels, 5),
                "above_share": round(self._above / voxels, 5),
                "clipped_share": round(min(1.0, lost / matter), 5) if matter else 0.0,
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
    """Yield the HU at which bins of a stored histogram begin, and where the last one ends."""
    for (start, width), (stop, _) in pairwise(STORED_STEPS):
        yield from range(start, stop, width)
    yield STORED_STEPS[-1][0]


def sampled(values: NDArray[Any]) -> NDArray[Any]:
    """Return every n-th row and column of a slice, a view of at least `SAMPLES` of each; all of a small slice."""
    rows, columns = values.shape
    return values[:: max(1, rows // SAMPLES), :: max(1, columns // SAMPLES)]


def _levels(stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return stored values and how many voxels have each."""
    if stored.dtype.itemsize > 2:
        values, voxels = np.unique(stored, return_counts=True)
        return values, voxels.astype(np.int64)
    low = int(stored.min(initial=0))
    voxels = np.bincount(stored.astype(np.intp) - low)
    return np.arange(low, low + len(voxels)), voxels.astype(np.int64)


AIR_PEAK_TOLERANCE_HU = 20
"""Calibration of scanners is held to a few HU; what is further off was shifted by somebody's software."""
TISSUE_PEAK_HU = (-15, 100)
"""From water to soft tissue with contrast medium."""
SLICE_SPACING_MM = (0.3, 5.5)
IN_PLANE_SPACING_MM = (0.2, 1.5)
PIXEL_ASPECT = 0.01
"""By how much of it a pixel may be longer than wide."""
PADDING_SHARE = 0.4
"""A circle leaves 0.21 of its square."""
FEW_SLICES = 20
CLIPPED_SHARE = 0.2


def _hu(value: float) -> str:
    """Return a number of HU as people write it."""
    return f"{value:g}".replace("-", "−")


class Flag(NamedTuple):
    """Something about a series that a person should look at."""

    code: str
    text: str


FLAGS = {
    "air-peak": f"Air peaks more than {AIR_PEAK_TOLERANCE_HU} HU away from {_hu(AIR_HU)} HU: is the rescale right?",
    "tissue-peak": "Soft tissue peaks outside of {} to {} HU, or nowhere between {} and {} HU: is the rescale right? "
    "Is this a patient?".format(*map(_hu, TISSUE_PEAK_HU + TISSUE_SEARCH_HU)),
    "slice-spacing": "Slices are closer than {} mm or further apart than {} mm.".format(*SLICE_SPACING_MM),
    "pixel-spacing": "Pixels are smaller than {} mm, larger than {} mm, ".format(*IN_PLANE_SPACING_MM)
    + f"or more than {PIXEL_ASPECT:.0%} longer than wide.",
    "padding-share": f"More than {PADDING_SHARE:.0%} of the voxels are padding; the corners around a circle are 21 %.",
    "few-slices": f"There are fewer than {FEW_SLICES} slices.",
    "clipped": f"The window clips more than {CLIPPED_SHARE:.0%} of the voxels that are not air.",
}
"""What each flag means, by its code. Codes of the audit, such as ``gap``, are flags too."""


def flags(result: SeriesResult) -> list[Flag]:
    """Return what stands out in the metrics of a series, by the thresholds above."""
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
        odd = not low <= rows_mm <= high or not low <= columns_mm <= high
        if odd or abs(rows_mm / columns_mm - 1) > PIXEL_ASPECT:
            found.append(Flag("pixel-spacing", f"pixels are {rows_mm:.4g} × {columns_mm:.4g} mm"))
    if (result.padding_share or 0) > PADDING_SHARE:
        found.append(Flag("padding-share", f"{result.padding_share:.0%} of the voxels are padding"))
    if result.slices < FEW_SLICES:
        found.append(Flag("few-slices", f"only {numbered(result.slices, 'slice')}"))
    if (quality.get("clipped_share") or 0) > CLIPPED_SHARE:
        found.append(Flag("clipped", f"the window clips {quality['clipped_share']:.0%} of what is not air"))
    return found
