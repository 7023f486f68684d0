"""Draws HU histograms with tissue bands, as text and as a picture, and a montage of slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gpuprep.compute.hu_histogram import BANDS, stored_edges
from gpuprep.report.inspect_series import SeriesSummary

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SHOWN_HU = (-1024, 1024)
"""HU range of the histogram. Denser voxels are not drawn; up to 3071 HU they count as bone."""

TEXT_ROWS = 6
"""Height of a text histogram in lines."""

EIGHTHS = " ▁▂▃▄▅▆▇█"

BAND_COLOURS = {
    "air": (130, 130, 140), "lung": (90, 160, 230), "fat": (235, 200, 80), "water": (80, 205, 220),
    "blood": (220, 70, 70), "muscle": (225, 125, 105), "liver": (165, 100, 60), "bone": (235, 232, 215),
}  # fmt: skip
LETTERS = {
    "air": "a", "lung": "l", "fat": "f", "water": "w", "blood": "b", "muscle": "m", "liver": "i", "bone": "o",
}  # fmt: skip
"""Letter of each band below a text histogram."""
TICKS_HU = (-1000, -500, 0, 500, 1000)

TILE_SIZE = 208
"""Maximum width and height of a slice in the montage, in pixels."""
TILES_PER_ROW = 5
MARGIN = 16
PLOT_HEIGHT = 220
"""Height of the histogram in the montage, in pixels."""
BACKGROUND, FOREGROUND, MUTED = (18, 20, 24), (232, 232, 228), (128, 132, 138)


def shares(quality: dict[str, Any], count: int) -> NDArray[np.float64]:
    """Return the share of voxels in each of `count` equal parts of `SHOWN_HU`.

    Parameters
    ----------
    quality : dict
        HU metrics from `gpuprep.compute.hu_histogram.Histogram.to_dict`.
    count : int
        Number of parts.

    Returns
    -------
    array of float64, shape (count,)
        Shares of all voxels. Voxels are assumed to be evenly distributed within each stored bin.
    """
    edges = np.array(list(stored_edges()), dtype=np.float64)
    parts = np.array(quality["histogram"]["parts"], dtype=np.float64)
    below = np.concatenate([[0.0], np.cumsum(parts)]) / max(1.0, parts.sum())
    return np.diff(np.interp(np.linspace(*SHOWN_HU, count + 1), edges, below))


def text_histogram(quality: dict[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a text histogram, its bands and its HU axis. Heights are square roots, to show small peaks."""
    heights = np.sqrt(shares(quality, width))
    eighths = np.rint(heights / max(float(heights.max()), 1e-9) * TEXT_ROWS * 8).astype(int)
    eighths[(heights > 0) & (eighths == 0)] = 1
    for row in reversed(range(TEXT_ROWS)):
        yield "".join(EIGHTHS[min(max(e - 8 * row, 0), 8)] for e in eighths)
    bands = [" "] * width
    for band in reversed(BANDS):  # the first of overlapping bands is shown
        first, last = (_column(hu, width) for hu in (band.low_hu, band.high_hu))
        bands[first : last + 1] = LETTERS[band.name] * (last + 1 - first)
    yield "".join(bands)
    axis = [" "] * (width + 5)
    for hu in TICKS_HU:
        start = max(0, _column(hu, width) - len(str(hu)) // 2)
        axis[start : start + len(str(hu))] = str(hu)
    yield "".join(axis).rstrip() + " HU"


def _column(hu: float, width: int) -> int:
    """Return the column of an HU value among `width` columns, clipped to the first and the last."""
    low, high = SHOWN_HU
    return min(width - 1, max(0, int((hu - low) / (high - low) * width)))


def montage(seen: SeriesSummary) -> Image.Image:
    """Return a picture of slices at equal distances, with the pixel aspect ratio of the grid, and of the histogram."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    tiles = list(_tiles(seen))
    lines = [seen.title, " ".join([seen.verdict, *seen.codes]), *grid_lines(seen)]
    top = MARGIN + 24 * len(lines) + 8
    tile_height = max((tile.height for _, tile in tiles), default=0) + 4
    rows = -(-len(tiles) // TILES_PER_ROW)
    width = 2 * MARGIN + TILES_PER_ROW * TILE_SIZE + (TILES_PER_ROW - 1) * 4
    plot_top = top + rows * tile_height + MARGIN
    sheet = Image.new("RGB", (width, plot_top + (PLOT_HEIGHT + 76 if seen.quality else 0)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for n, line in enumerate(lines):
        pen.text(
            (MARGIN, MARGIN + 24 * n), _fitted(line, font, width - 2 * MARGIN), FOREGROUND if n < 2 else MUTED, font
        )
    for n, (k, tile) in enumerate(tiles):
        x, y = MARGIN + n % TILES_PER_ROW * (TILE_SIZE + 4), top + n // TILES_PER_ROW * tile_height
        sheet.paste(tile, (x + (TILE_SIZE - tile.width) // 2, y))
        pen.text((x + 4, y + 2), str(k), MUTED, small)
    if seen.quality is not None:
        _plot(pen, seen.quality, (MARGIN, plot_top, width - MARGIN, plot_top + PLOT_HEIGHT), small)
    return sheet


def grid_lines(seen: SeriesSummary) -> Iterator[str]:
    """Yield lines of text about grid, HU, peaks and structures."""
    if seen.grid is not None:
        size, spacing = (" × ".join(f"{v:.4g}" for v in values) for values in (seen.grid.shape, seen.grid.spacing_mm))
        yield f"{size} voxels of {spacing} mm (slices, rows, columns), {seen.grid.facing}"
    if seen.hu is not None:
        low, mean, high = seen.hu
        padding = f", {seen.padding_share:.1%} padding" if seen.padding_share is not None else ""
        yield f"{low:.0f} to {high:.0f} HU, mean {mean:.0f} HU{padding}"
    if seen.quality is not None:
        peaks = (("air", "air_peak_hu"), ("soft tissue", "tissue_peak_hu"))
        found = [f"{name} at {seen.quality[key]} HU" for name, key in peaks if seen.quality[key] is not None]
        if found:
            yield f"peaks: {', '.join(found)}"
    if seen.structures:
        yield f"structures: {', '.join(seen.structures)}"


def _tiles(seen: SeriesSummary) -> Iterator[tuple[int, Image.Image]]:
    if seen.grid is None:
        return
    _, rows_mm, columns_mm = seen.grid.spacing_mm
    for k, pixels in seen.slices:
        sides_mm = pixels.shape[1] * columns_mm, pixels.shape[0] * rows_mm
        size = tuple(max(1, round(side * TILE_SIZE / max(sides_mm))) for side in sides_mm)
        yield k, Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _plot(
    pen: ImageDraw.ImageDraw, quality: dict[str, Any], box: tuple[int, int, int, int], font: FreeTypeFont | Any
) -> None:
    """Draw the histogram on top of the tissue bands, and a legend with the share of each band."""
    left, top, right, bottom = box
    width = right - left
    for band in BANDS:
        first, last = (left + _column(hu, width) for hu in (band.low_hu, band.high_hu))
        tint = tuple((c + 3 * p) // 4 for c, p in zip(BAND_COLOURS[band.name], BACKGROUND, strict=True))
        pen.rectangle((first, top, max(first + 1, last), bottom), fill=tint)
    heights = np.sqrt(shares(quality, width))
    tops = bottom - np.rint(heights / max(float(heights.max()), 1e-9) * (bottom - top)).astype(int)
    for x, y in enumerate(tops.tolist(), left):
        if y < bottom:
            pen.line((x, y, x, bottom), fill=FOREGROUND)
    for hu in TICKS_HU:
        x = left + _column(hu, width)
        pen.line((x, bottom, x, bottom + 5), fill=MUTED)
        pen.text((max(x, left + 28), bottom + 7), f"{hu} HU", MUTED, font, anchor="ma")
    x = left
    for band in BANDS:
        share = quality["bands"][band.name]
        pen.rectangle((x, bottom + 38, x + 10, bottom + 48), fill=BAND_COLOURS[band.name])
        label = f"{band.name} {share:.1%}"
        pen.text((x + 15, bottom + 35), label, FOREGROUND, font)
        x += 15 + round(pen.textlength(label, font)) + 14


def _fitted(text: str, font: FreeTypeFont | Any, width: int) -> str:
    """Return the text with characters of the font only, cut at its start to fit the width."""
    cut = text.replace("×", "x").replace("−", "-")
    while font.getlength(cut) > width:
        cut = cut[1:]
    return cut
