"""Draws histograms with the bands of tissues, in text and as a picture, and a montage of slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gpuprep.compute.hu_histogram import BANDS, stored_edges
from gpuprep.report.inspect_series import Glance

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SHOWN_HU = (-1024, 1024)
"""Where tissues are; whatever is denser is counted with bone, and not drawn."""

ROWS = 6
"""Lines of a histogram in text."""

EIGHTHS = " ▁▂▃▄▅▆▇█"

BAND_COLOURS = {
    "air": (130, 130, 140), "lung": (90, 160, 230), "fat": (235, 200, 80), "water": (80, 205, 220),
    "blood": (220, 70, 70), "muscle": (225, 125, 105), "liver": (165, 100, 60), "bone": (235, 232, 215),
}  # fmt: skip
LETTERS = {
    "air": "a", "lung": "l", "fat": "f", "water": "w", "blood": "b", "muscle": "m", "liver": "i", "bone": "o",
}  # fmt: skip
"""Of bands in text."""
TICKS_HU = (-1000, -500, 0, 500, 1000)

TILE = 208
"""Width and height that a slice of a montage has room for, in pixels."""
ACROSS = 5
MARGIN = 16
PLOT = 220
"""Height of the histogram of a montage, in pixels."""
PAPER, INK, FAINT = (18, 20, 24), (232, 232, 228), (128, 132, 138)


def shares(quality: dict[str, Any], count: int) -> NDArray[np.float64]:
    """Return how much of a series lies in each of so many equal ranges of `SHOWN_HU`.

    Parameters
    ----------
    quality : dict
        From `gpuprep.compute.hu_histogram.Histogram.to_dict`.
    count : int
        Number of ranges.

    Returns
    -------
    array of float64, shape (count,)
        Shares of all voxels; bins are taken as evenly filled.
    """
    edges = np.array(list(stored_edges()), dtype=np.float64)
    parts = np.array(quality["histogram"]["parts"], dtype=np.float64)
    below = np.concatenate([[0.0], np.cumsum(parts)]) / max(1.0, parts.sum())
    return np.diff(np.interp(np.linspace(*SHOWN_HU, count + 1), edges, below))


def text_histogram(quality: dict[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a histogram: heights go with the square root, so that small peaks are seen; bands; HU."""
    heights = np.sqrt(shares(quality, width))
    eighths = np.rint(heights / max(float(heights.max()), 1e-9) * ROWS * 8).astype(int)
    eighths[(heights > 0) & (eighths == 0)] = 1
    for row in reversed(range(ROWS)):
        yield "".join(EIGHTHS[min(max(e - 8 * row, 0), 8)] for e in eighths)
    below = [" "] * width
    for band in reversed(BANDS):  # where they overlap the first ones are seen
        first, last = (_column(hu, width) for hu in (band.low_hu, band.high_hu))
        below[first : last + 1] = LETTERS[band.name] * (last + 1 - first)
    yield "".join(below)
    marks = [" "] * (width + 5)
    for hu in TICKS_HU:
        at = max(0, _column(hu, width) - len(str(hu)) // 2)
        marks[at : at + len(str(hu))] = str(hu)
    yield "".join(marks).rstrip() + " HU"


def _column(hu: float, width: int) -> int:
    """Return which of so many columns shows a value; beyond the last is the last."""
    low, high = SHOWN_HU
    return min(width - 1, max(0, int((hu - low) / (high - low) * width)))


def montage(seen: Glance) -> Image.Image:
    """Return a picture of slices at equal distances in true proportions, and of the histogram."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    tiles = list(_tiles(seen))
    lines = [seen.title, " ".join([seen.verdict, *seen.codes]), *grid_lines(seen)]
    top = MARGIN + 24 * len(lines) + 8
    high = max((tile.height for _, tile in tiles), default=0) + 4
    rows = -(-len(tiles) // ACROSS)
    width = 2 * MARGIN + ACROSS * TILE + (ACROSS - 1) * 4
    plot_top = top + rows * high + MARGIN
    sheet = Image.new("RGB", (width, plot_top + (PLOT + 76 if seen.quality else 0)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 24 * n), _fitting(line, font, width - 2 * MARGIN), INK if n < 2 else FAINT, font)
    for n, (k, tile) in enumerate(tiles):
        x, y = MARGIN + n % ACROSS * (TILE + 4), top + n // ACROSS * high
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y))
        pen.text((x + 4, y + 2), str(k), FAINT, small)
    if seen.quality is not None:
        _plot(pen, seen.quality, (MARGIN, plot_top, width - MARGIN, plot_top + PLOT), small)
    return sheet


def grid_lines(seen: Glance) -> Iterator[str]:
    """Yield what is to be said of a grid and of its values."""
    if seen.grid is not None:
        size, spacing = (" × ".join(f"{v:.4g}" for v in values) for values in (seen.grid.shape, seen.grid.spacing_mm))
        yield f"{size} voxels of {spacing} mm (slices, rows, columns), {seen.grid.facing}"
    if seen.hu is not None:
        low, mean, high = seen.hu
        padding = f", {seen.padding_share:.1%} padding" if seen.padding_share is not None else ""
        yield f"{low:.0f} to {high:.0f} HU, mean {mean:.0f} HU{padding}"
    if seen.quality is not None:
        peaks = (("air", "air_peak_hu"), ("soft tissue", "tissue_peak_hu"))
        told = [f"{name} at {seen.quality[key]} HU" for name, key in peaks if seen.quality[key] is not None]
        if told:
            yield f"peaks: {', '.join(told)}"
    if seen.structures:
        yield f"structures: {', '.join(seen.structures)}"


def _tiles(seen: Glance) -> Iterator[tuple[int, Image.Image]]:
    if seen.grid is None:
        return
    _, rows_mm, columns_mm = seen.grid.spacing_mm
    for k, pixels in seen.slices:
        sides_mm = pixels.shape[1] * columns_mm, pixels.shape[0] * rows_mm
        size = tuple(max(1, round(side * TILE / max(sides_mm))) for side in sides_mm)
        yield k, Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _plot(
    pen: ImageDraw.ImageDraw, quality: dict[str, Any], box: tuple[int, int, int, int], font: FreeTypeFont | Any
) -> None:
    """Draw the histogram over the bands of tissues, with the share of each."""
    left, top, right, bottom = box
    width = right - left
    for band in BANDS:
        first, last = (left + _column(hu, width) for hu in (band.low_hu, band.high_hu))
        tint = tuple((c + 3 * p) // 4 for c, p in zip(BAND_COLOURS[band.name], PAPER, strict=True))
        pen.rectangle((first, top, max(first + 1, last), bottom), fill=tint)
    heights = np.sqrt(shares(quality, width))
    tops = bottom - np.rint(heights / max(float(heights.max()), 1e-9) * (bottom - top)).astype(int)
    for x, y in enumerate(tops.tolist(), left):
        if y < bottom:
            pen.line((x, y, x, bottom), fill=INK)
    for hu in TICKS_HU:
        x = left + _column(hu, width)
        pen.line((x, bottom, x, bottom + 5), fill=FAINT)
        pen.text((max(x, left + 28), bottom + 7), f"{hu} HU", FAINT, font, anchor="ma")
    x = left
    for band in BANDS:
        share = quality["bands"][band.name]
        pen.rectangle((x, bottom + 38, x + 10, bottom + 48), fill=BAND_COLOURS[band.name])
        label = f"{band.name} {share:.1%}"
        pen.text((x + 15, bottom + 35), label, INK, font)
        x += 15 + round(pen.textlength(label, font)) + 14


def _fitting(text: str, font: FreeTypeFont | Any, width: int) -> str:
    """Return as much of the end of a text as fits, in letters that the font has."""
    cut = text.replace("×", "x").replace("−", "-")
    while font.getlength(cut) > width:
        cut = cut[1:]
    return cut
