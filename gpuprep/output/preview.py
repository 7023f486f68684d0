"""Draws the preview picture of a volume: its three middle planes, with outlines of structures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Geometry, IndexBox

HEIGHT, WIDTH = 128, 160
"""Height of the picture and maximum width of each plane, in pixels."""

SAMPLES = 2 * HEIGHT
"""Minimum number of rows and columns of a plane that are kept, if the volume has so many."""

GAP = 4
"""Distance between planes in pixels."""

SHOWN_HU = (-1000, 400)
"""HU that are shown as black and as white above a cropped volume."""

BOX_LABEL = 3
"""Label in whose colour the box of a crop is drawn: yellow, unlike the first structures."""

QUALITY = 80
"""JPEG quality, 0 to 100."""

COLOURS = (
    (255, 99, 92), (64, 196, 255), (255, 213, 79), (105, 230, 140), (224, 130, 255), (255, 160, 66), (77, 235, 222),
    (255, 130, 180), (178, 235, 92), (140, 160, 255), (255, 190, 160), (200, 200, 120),
)  # fmt: skip
"""Colours of outlines: red, green, blue. Label n of label volume m, the first being 0, has the colour n - 1 + m, modulo
their number."""


Plane = NDArray[Any]


class Planes(Protocol):
    """Three planes of a volume."""

    @property
    def values(self) -> tuple[Plane, Plane, Plane]:
        """A slice (j, i), a plane along rows (k, i), and one along columns (k, j); perhaps subsampled."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GivenPlanes:
    """Planes that were cut out of a volume."""

    values: tuple[Plane, Plane, Plane]


class MiddlePlanes:
    """The three middle planes of a volume, collected while its chunks are written.

    Parameters
    ----------
    shape : tuple of int
        Slices, rows, columns of the volume.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._next = 0
        """Index of the next slice."""
        self._across: Plane = np.zeros((0, 0))
        self._along_rows: list[Plane] = []
        self._along_columns: list[Plane] = []

    def collecting(self, chunks: Iterable[Plane]) -> Iterator[Plane]:
        """Yield chunks of a few slices unchanged, and keep their part of the planes."""
        for chunk in chunks:
            self.add(chunk)
            yield chunk

    def add(self, chunk: Plane) -> None:
        """Keep the part of the planes that lies in the next few slices: host array, shape (n, j, i)."""
        slices, rows, columns = self._shape
        each_row, each_column = (slice(None, None, max(1, n // SAMPLES)) for n in (rows, columns))
        start, stop = self._next, self._next + len(chunk)
        if start <= slices // 2 < stop:
            self._across = chunk[slices // 2 - start, each_row, each_column].copy()
        self._along_rows.append(chunk[:, rows // 2, each_column].copy())
        self._along_columns.append(chunk[:, each_row, columns // 2].copy())
        self._next = stop

    @property
    def values(self) -> tuple[Plane, Plane, Plane]:
        """Subsampled planes: middle slice (j, i), through the middle row (k, i), through the middle column (k, j)."""
        return self._across, np.concatenate(self._along_rows), np.concatenate(self._along_columns)


def draw_preview(
    image: Planes | None, geometry: Geometry, black: float, white: float, labels: Sequence[Planes] = ()
) -> NDArray[np.uint8]:
    """Return the planes of a volume side by side: middle slice, through the middle row, through the middle column.

    Each plane is scaled to HEIGHT or WIDTH with the patient's aspect ratio. If slices ascend (+z in LPS), the topmost
    slice is shown at the top.

    Parameters
    ----------
    image : Planes or None
        Planes of the image; None for black.
    geometry : Geometry
        Grid of the volume.
    black, white : float
        Image values that are shown as black and as white.
    labels : sequence of Planes
        Planes of label volumes on the same grid, drawn one over the other as outlines in `COLOURS`; 0 is background.

    Returns
    -------
    array of uint8, shape (HEIGHT, width, 3)
        Red, green, blue.
    """
    k, j, i = geometry.shape
    dk, dj, di = geometry.spacing_mm
    upwards = geometry.affine[2, 0] > 0
    sides_mm = ((j * dj, i * di), (k * dk, i * di), (k * dk, j * dj))
    image_planes = None if image is None else image.values
    label_planes = [planes.values for planes in labels]
    panels = []
    for n, (high_mm, wide_mm) in enumerate(sides_mm):
        scale = min(HEIGHT / high_mm, WIDTH / wide_mm)
        size = max(1, round(high_mm * scale)), max(1, round(wide_mm * scale))
        grey = np.zeros(size, dtype=np.uint8)
        if image_planes is not None:
            bright = (_resized(image_planes[n].astype(np.float32), size) - black) / (white - black)
            grey = np.rint(np.clip(bright, 0, 1) * 255).astype(np.uint8)
        panel = np.repeat(grey[:, :, None], 3, axis=2)
        for number, values in enumerate(label_planes):
            _outline(panel, _nearest(values[n], size), number)
        if n and upwards:
            panel = panel[::-1]
        canvas = np.zeros((HEIGHT, size[1], 3), dtype=np.uint8)
        top = (HEIGHT - size[0]) // 2
        canvas[top : top + size[0]] = panel
        panels += [canvas, np.zeros((HEIGHT, GAP, 3), dtype=np.uint8)]
    return np.concatenate(panels[:-1], axis=1)


def draw_crop(coarse: NDArray[np.int16], grid: Geometry, box: IndexBox) -> NDArray[np.uint8]:
    """Return three planes of a stack through the middle of a box, with the outline of the box.

    Parameters
    ----------
    coarse : array of int16, shape (slices, rows, columns)
        HU of the slices as acquired, of every n-th row and column.
    grid : Geometry
        Grid of the stack. Slices are drawn in it as if they were even and not shifted.
    box : IndexBox
        Box of voxels of that grid.

    Returns
    -------
    array of uint8, shape (HEIGHT, width, 3)
        Red, green, blue.
    """
    share = np.array(coarse.shape) / grid.shape
    low = np.floor(np.array(box.start) * share).astype(int)
    high = np.maximum(np.ceil(np.array(box.stop) * share).astype(int), low + 1)
    inside = np.zeros(coarse.shape, dtype=np.uint8)
    inside[tuple(map(slice, low, high))] = BOX_LABEL
    k, j, i = (low + high) // 2
    image, outline = (GivenPlanes((v[k], v[:, j], v[:, :, i])) for v in (coarse, inside))
    return draw_preview(image, grid, *SHOWN_HU, [outline])


def below(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two pictures, one below the other."""
    width = max(upper.shape[1], lower.shape[1])
    rows = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0))) for p in (upper, lower)]
    return np.concatenate([rows[0], np.zeros((GAP, width, 3), dtype=np.uint8), rows[1]])


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return a picture as JPEG: array of uint8, shape (rows, columns, 3)."""
    from imagecodecs import jpeg8_encode  # imports in a third of Pillow's time

    return bytes(jpeg8_encode(pixels, level=QUALITY, subsampling="444"))  # thin coloured outlines stay sharp


def _resized(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a plane in another size: block means along axes that shrink, nearest values along axes that grow."""
    for axis, want in enumerate(size):
        have = plane.shape[axis]
        edges = np.arange(want) * have // want
        if want < have:
            widths = np.diff(edges, append=have).astype(np.float32)
            plane = np.add.reduceat(plane, edges, axis=axis) / (widths if axis else widths[:, None])
        else:
            plane = plane.take(edges, axis=axis)
    return plane


def _nearest(plane: Plane, size: tuple[int, int]) -> Plane:
    """Return the value of a plane at the centre of each pixel of another size."""
    rows, columns = (
        ((2 * np.arange(want) + 1) * have) // (2 * want) for have, want in zip(plane.shape, size, strict=True)
    )
    found: Plane = plane[rows[:, None], columns]
    return found


def _outline(panel: NDArray[np.uint8], labels: Plane, number: int) -> None:
    """Draw the border pixels of each label of a label volume into a panel, shape (rows, columns, 3)."""
    framed = np.pad(labels, 1)
    inner = framed[1:-1, 1:-1]
    edge = np.zeros(labels.shape, dtype=bool)
    for other in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        edge |= inner != other
    edge &= inner != 0
    colours = np.array(COLOURS, dtype=np.uint8)
    panel[edge] = colours[(labels[edge].astype(np.int64) - 1 + number) % len(colours)]
