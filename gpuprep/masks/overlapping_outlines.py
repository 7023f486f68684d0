"""Sorts the outlines of one structure on one slice into nested, overlapping and repeated ones.

The standard combines outlines of type CLOSEDPLANAR_XOR by exclusive or. It does not define how other outlines combine,
and files use two conventions: an outline inside another one is a hole, and outlines that overlap in part are one area
drawn in pieces. Parity is right for holes and for separate outlines. So outlines that overlap in part are found and
united before parity is taken. An outline that is stored twice counts once.

References
----------
DICOM PS3.3, C.8.8.6.3 (Representing Inner and Outer Contours).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpuprep.masks.rasterize import crossings

TOUCHING_PX = 0.25
"""Pixels by which an outline may cross another one and still count as inside or beside it. Files round coordinates, and
the outline of a cavity may share edges with the outline around it."""

SAME_PX = 1e-3
"""Largest difference, in pixels, between the points of two equal outlines."""

STEP_PX = 0.5
"""Largest distance between the sample points at which an outline is compared with another one."""

FIRST_SAMPLES = 8
"""Points of each outline that are compared before all sample points are."""

MOST_AT_ONCE = 2**20
"""Pairs of a point and an edge that are compared at a time, approximately; limits memory."""

MIN_SQUARED_LENGTH = 1e-30
"""Smallest squared edge length, to avoid division by zero."""

SUBPIXELS = 2**14
"""Fractions of a pixel to which crossings are rounded."""

Polygon = NDArray[np.float64]


@dataclass(slots=True)
class OutlineGroups:
    """Outlines of one structure on one slice, sorted by overlap."""

    alone: list[Polygon]
    """Outlines that overlap no other one in part."""
    united: list[list[Polygon]] = field(default_factory=list)
    """Groups of outlines that overlap in part; each group is one area."""
    repeated: int = 0
    """Number of outlines left out because they repeat another one."""
    holes: int = 0
    """Number of outlines inside an odd number of other areas."""


def grouped(polygons: Sequence[Polygon], shape: tuple[int, int]) -> OutlineGroups:
    """Return outlines sorted by overlap; the area they enclose is the parity of `alone` and of the areas of `united`.

    Parameters
    ----------
    polygons : sequence of array of float, shape (n, 2)
        Points as (column, row) in pixels, each outline closed by itself.
    shape : tuple of int
        Rows and columns of the slice.
    """
    if len(polygons) < 2:
        return OutlineGroups(list(polygons))
    edges = _Edges.of(polygons)
    boxes = np.hstack([at.reduceat(edges.start, edges.first) for at in (np.minimum, np.maximum)])
    pairs = _overlapping(boxes)
    if not len(pairs):
        return OutlineGroups(list(polygons))
    inside, undecided = _nested_pairs(polygons, pairs, boxes, shape)
    group = np.arange(len(polygons))
    repeated: set[int] = set()
    for (a, b), is_clear in zip(undecided.tolist(), _overlap_clearly(undecided, edges), strict=True):
        if a in repeated or b in repeated:
            continue
        if np.abs(boxes[a] - boxes[b]).max() <= SAME_PX and _is_same(polygons[a], polygons[b]):
            repeated.add(b)
            continue
        relation = "united" if is_clear else _relation(a, b, edges)
        if relation == "united":
            group[group == group[b]] = group[a]
        elif relation != "apart":
            inside.append((a, b) if relation == "first inside" else (b, a))
    outer: dict[int, set[int]] = defaultdict(set)
    for a, b in inside:
        if not {a, b} & repeated and group[a] != group[b]:
            outer[a].add(int(group[b]))
    members: dict[int, list[Polygon]] = defaultdict(list)
    for n, number in enumerate(group.tolist()):
        if n not in repeated:
            members[number].append(polygons[n])
    return OutlineGroups(
        [found[0] for found in members.values() if len(found) == 1],
        [found for found in members.values() if len(found) > 1],
        len(repeated),
        sum(len(groups) % 2 for groups in outer.values()),
    )


def _overlapping(boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs of boxes (left, top, right, bottom) that overlap, shape (n, 2), the first before the second."""
    order = np.argsort(boxes[:, 0], kind="stable")
    left, top, right, bottom = boxes[order].T
    # Boxes are sorted by left side, so the ones that begin before a box ends come directly after it.
    count = np.maximum(np.searchsorted(left, right) - np.arange(len(left)) - 1, 0)
    first = np.repeat(np.arange(len(left)), count)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    overlap = (top[first] < bottom[second]) & (top[second] < bottom[first])
    pairs = np.sort(order[np.stack([first[overlap], second[overlap]], axis=1)], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _nested_pairs(
    polygons: Sequence[Polygon], pairs: NDArray[np.int64], boxes: NDArray[np.float64], shape: tuple[int, int]
) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """Return the pairs (inner, outer) of nested outlines, and the pairs that these crossings do not decide.

    The points at which outlines cross the centre lines of pixel rows are compared. If two outlines do not intersect,
    all crossings of one lie inside the other, or none do.
    """
    rows, columns = shape
    known, index = np.unique(pairs, return_inverse=True)
    found = crossings([polygons[n] for n in known], 0, rows)
    # One sorted list of integer keys for all outlines, rows and columns. An outline crosses each row an even number of
    # times, so a point is inside an outline if an odd number of keys precedes the point's key for that outline.
    width = (columns + 3) * SUBPIXELS
    x = np.rint((np.clip(found.x, -1, columns + 1) + 1) * SUBPIXELS).astype(np.int64)
    keys = np.sort((found.outline * rows + found.row) * width + x)
    count = np.bincount(found.outline, minlength=len(known))
    starts = np.cumsum(count) - count
    pair = index.reshape(-1, 2)
    outer, inner = pair.ravel(), pair[:, ::-1].ravel()  # first and second, then second and first
    comparison = np.repeat(np.arange(len(inner)), count[inner])
    nth = np.arange(len(comparison)) - np.repeat(np.cumsum(count[inner]) - count[inner], count[inner])
    wanted = keys[starts[inner][comparison] + nth] + ((outer - inner) * rows * width)[comparison]
    hits = np.bincount(comparison, np.searchsorted(keys, wanted) & 1, minlength=len(inner)).astype(np.int64)
    hits_of_second, hits_of_first = hits.reshape(-1, 2).T  # crossings of one outline that lie inside the other
    totals = count[pair]
    second_inside = (hits_of_second == totals[:, 1]) & (hits_of_first == 0)
    first_inside = (hits_of_first == totals[:, 0]) & (hits_of_second == 0)
    cross_rows = (totals > 0).all(axis=1)
    offset = boxes[pairs[:, 0]] - boxes[pairs[:, 1]]
    first_beyond = np.maximum(-offset[:, :2], offset[:, 2:]).max(axis=1) > TOUCHING_PX
    second_beyond = np.maximum(offset[:, :2], -offset[:, 2:]).max(axis=1) > TOUCHING_PX
    first_inside &= cross_rows & ~first_beyond
    second_inside &= cross_rows & ~second_beyond
    apart = ~cross_rows | ((hits_of_first == 0) & (hits_of_second == 0))
    inside = [*map(tuple, pairs[first_inside].tolist()), *map(tuple, pairs[second_inside][:, ::-1].tolist())]
    return inside, pairs[~(first_inside | second_inside | apart)]


def _is_same(a: Polygon, b: Polygon) -> bool:
    """Return whether two outlines have the same points in the same cyclic order, in either direction."""
    a, b = _without_repeats(a), _without_repeats(b)
    if len(a) != len(b):
        return False
    for start in np.flatnonzero(np.abs(b - a[0]).max(axis=1) <= SAME_PX).tolist():
        forwards = np.roll(b, -start, axis=0)
        for other in (forwards, np.roll(forwards[::-1], 1, axis=0)):
            if np.abs(a - other).max() <= SAME_PX:
                return True
    return False


def _without_repeats(polygon: Polygon) -> Polygon:
    """Return the points of an outline without those that repeat the previous one, cyclically."""
    moved = np.abs(polygon - np.roll(polygon, 1, axis=0)).max(axis=1) > SAME_PX
    return polygon[moved] if moved.any() else polygon[:1]


@dataclass(frozen=True, slots=True)
class _Edges:
    """Edges of all outlines, one outline after the other."""

    start: NDArray[np.float64]
    """First end of each edge, shape (n, 2)."""
    step: NDArray[np.float64]
    """Vector from the first end to the other end, shape (n, 2)."""
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    """Index of the first edge of each outline, and its number of edges."""

    @staticmethod
    def of(polygons: Sequence[Polygon]) -> _Edges:
        """Return the edges of outlines."""
        count = np.array([len(p) for p in polygons])
        first = np.cumsum(count) - count
        start = np.concatenate(polygons)
        stop = np.roll(start, -1, axis=0)
        stop[first + count - 1] = start[first]
        return _Edges(start, stop - start, first, count)

    def samples(self, outline: int) -> NDArray[np.float64]:
        """Return points along an outline, at most `STEP_PX` apart, shape (n, 2)."""
        own = slice(self.first[outline], self.first[outline] + self.count[outline])
        start, step = self.start[own], self.step[own]
        count = np.ceil(np.hypot(*step.T) / STEP_PX).astype(np.int64).clip(1)
        edge = np.repeat(np.arange(len(start)), count)
        fraction = (np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
        return np.asarray(start[edge] + step[edge] * fraction[:, None])

    def depths(self, points: NDArray[np.float64], outlines: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the depth of each point inside its outline in `outlines`, in pixels, shape (n,); negative outside."""
        chunks = np.flatnonzero(np.diff(np.cumsum(self.count[outlines]) // MOST_AT_ONCE)) + 1
        parts = zip(np.split(points, chunks), np.split(outlines, chunks), strict=True)
        return np.concatenate([self._depths(*part) for part in parts])

    def _depths(self, points: NDArray[np.float64], outlines: NDArray[np.int64]) -> NDArray[np.float64]:
        count = self.count[outlines]
        begins = np.cumsum(count) - count
        edge = np.arange(count.sum()) + np.repeat(self.first[outlines] - begins, count)
        (start_x, start_y), (step_x, step_y) = (np.ascontiguousarray(v.T)[:, edge] for v in (self.start, self.step))
        x, y = (np.repeat(points[:, axis], count) - start for axis, start in enumerate((start_x, start_y)))
        squared_length = np.maximum(step_x**2 + step_y**2, MIN_SQUARED_LENGTH)
        fraction = np.clip((x * step_x + y * step_y) / squared_length, 0, 1)
        distance = np.sqrt(np.minimum.reduceat((x - fraction * step_x) ** 2 + (y - fraction * step_y) ** 2, begins))
        # Edges that a ray from the point to the right crosses.
        cross_product = x * step_y - y * step_x
        crossed = ((y < 0) != (y < step_y)) & ((cross_product < 0) == (step_y > 0))
        return np.where(np.add.reduceat(crossed, begins, dtype=np.int64) % 2, distance, -distance)


def _overlap_clearly(pairs: NDArray[np.int64], edges: _Edges) -> list[bool]:
    """Return for each pair of outlines whether `FIRST_SAMPLES` points of each show that the two overlap in part."""
    if not len(pairs):
        return []
    nth = (edges.count[:, None] * np.arange(FIRST_SAMPLES)) // FIRST_SAMPLES + edges.first[:, None]
    inner, outer = pairs.ravel(), pairs[:, ::-1].ravel()
    depths = edges.depths(edges.start[nth[inner].ravel()], np.repeat(outer, FIRST_SAMPLES))
    depths = depths.reshape(-1, 2, FIRST_SAMPLES)
    beyond = (depths.min(axis=2) < -TOUCHING_PX).all(axis=1)
    clear: list[bool] = (beyond & (depths.max(axis=(1, 2)) > TOUCHING_PX)).tolist()
    return clear


def _relation(a: int, b: int, edges: _Edges) -> Literal["first inside", "second inside", "apart", "united"]:
    """Return the relation of two outlines; crossings of up to `TOUCHING_PX` are ignored."""
    samples_a, samples_b = edges.samples(a), edges.samples(b)
    depth_a = edges.depths(samples_a, np.full(len(samples_a), b))
    depth_b = edges.depths(samples_b, np.full(len(samples_b), a))
    a_beyond, b_beyond = depth_a.min() < -TOUCHING_PX, depth_b.min() < -TOUCHING_PX
    if a_beyond and b_beyond:
        return "united" if max(depth_a.max(), depth_b.max()) > TOUCHING_PX else "apart"
    if not a_beyond and not b_beyond:
        return "united"
    return "second inside" if a_beyond else "first inside"
