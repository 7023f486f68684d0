"""Sorts the outlines of one structure on one slice into nested, overlapping and repeated ones.

The standard combines outlines by exclusive disjunction only where they say so (CLOSEDPLANAR_XOR). Of others it says
nothing, and files use both: an outline inside another one is a hole, and outlines that overlap in part are one area
that was drawn in pieces. Parity serves the first, and all that does not overlap. So only outlines that overlap in part
have to be found; they are united before parity is taken. An outline that is stored twice counts once.

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
"""Pixels by which an outline may pass beyond another one and still lie inside, or beside it: coordinates are rounded in
files, and walls that were cut out of a structure share edges with it."""

SAME_PX = 1e-3
"""Pixels by which the points of two outlines may differ that are the same."""

STEP_PX = 0.5
"""Distance of the places at which an outline is compared with another one."""

FEW = 8
"""Places that are compared first."""

MOST_AT_ONCE = 2**20
"""Pairs of a place and an edge that are compared at one time."""

SMALLEST = 1e-30
"""Of a squared length that something is divided by."""

PARTS = 2**14
"""Parts of a pixel to which crossings are rounded."""

Polygon = NDArray[np.float64]


@dataclass(slots=True)
class Arranged:
    """Outlines of one structure on one slice."""

    alone: list[Polygon]
    """Outlines that overlap no other one in part."""
    united: list[list[Polygon]] = field(default_factory=list)
    """Groups of outlines that overlap in part: each group is one area."""
    repeated: int = 0
    """Outlines that were there already, and are left out."""
    holes: int = 0
    """Outlines that lie inside an odd number of others."""


def arranged(polygons: Sequence[Polygon], shape: tuple[int, int]) -> Arranged:
    """Return how some outlines belong together: by parity of those alone and of the areas that groups of others are.

    Parameters
    ----------
    polygons : sequence of array of float, shape (n, 2)
        Points as (column, row) in pixels, each outline closed by itself.
    shape : tuple of int
        Rows and columns of the slice.
    """
    if len(polygons) < 2:
        return Arranged(list(polygons))
    edges = _Edges.of(polygons)
    boxes = np.hstack([at.reduceat(edges.start, edges.first) for at in (np.minimum, np.maximum)])
    pairs = _overlapping(boxes)
    if not len(pairs):
        return Arranged(list(polygons))
    inside, undecided = _by_rows(polygons, pairs, boxes, shape)
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
    for n, of in enumerate(group.tolist()):
        if n not in repeated:
            members[of].append(polygons[n])
    return Arranged(
        [found[0] for found in members.values() if len(found) == 1],
        [found for found in members.values() if len(found) > 1],
        len(repeated),
        sum(len(groups) % 2 for groups in outer.values()),
    )


def _overlapping(boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs of boxes (left, top, right, bottom) that overlap, shape (n, 2), the first before the second."""
    order = np.argsort(boxes[:, 0], kind="stable")
    left, top, right, bottom = boxes[order].T
    # In the order of left sides, those that begin before a box ends follow it.
    count = np.maximum(np.searchsorted(left, right) - np.arange(len(left)) - 1, 0)
    first = np.repeat(np.arange(len(left)), count)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    overlap = (top[first] < bottom[second]) & (top[second] < bottom[first])
    pairs = np.sort(order[np.stack([first[overlap], second[overlap]], axis=1)], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _by_rows(
    polygons: Sequence[Polygon], pairs: NDArray[np.int64], boxes: NDArray[np.float64], shape: tuple[int, int]
) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """Return which outlines lie inside which others, and the pairs that have to be looked at more closely.

    Outlines that do not cross are inside one another altogether or not at all, wherever they cross a row of pixels.
    """
    rows, columns = shape
    known, index = np.unique(pairs, return_inverse=True)
    found = crossings([polygons[n] for n in known], 0, rows)
    # One sorted list of whole numbers for all outlines, rows and columns: as an outline crosses each row an even number
    # of times, what comes before a place in its list is odd in number where the place is inside.
    width = (columns + 3) * PARTS
    x = np.rint((np.clip(found.x, -1, columns + 1) + 1) * PARTS).astype(np.int64)
    keys = np.sort((found.outline * rows + found.row) * width + x)
    count = np.bincount(found.outline, minlength=len(known))
    starts = np.cumsum(count) - count
    pair = index.reshape(-1, 2)
    outer, inner = pair.ravel(), pair[:, ::-1].ravel()  # first and second, then second and first
    asked = np.repeat(np.arange(len(inner)), count[inner])
    nth = np.arange(len(asked)) - np.repeat(np.cumsum(count[inner]) - count[inner], count[inner])
    places = keys[starts[inner][asked] + nth] + ((outer - inner) * rows * width)[asked]
    hits = np.bincount(asked, np.searchsorted(keys, places) & 1, minlength=len(inner)).astype(np.int64)
    of_second, of_first = hits.reshape(-1, 2).T  # crossings of one outline that lie inside the other
    of_all = count[pair]
    second_inside = (of_second == of_all[:, 1]) & (of_first == 0)
    first_inside = (of_first == of_all[:, 0]) & (of_second == 0)
    drawn = (of_all > 0).all(axis=1)  # on the rows of the slice
    away = boxes[pairs[:, 0]] - boxes[pairs[:, 1]]
    first_beyond = np.maximum(-away[:, :2], away[:, 2:]).max(axis=1) > TOUCHING_PX
    second_beyond = np.maximum(away[:, :2], -away[:, 2:]).max(axis=1) > TOUCHING_PX
    first_inside &= drawn & ~first_beyond
    second_inside &= drawn & ~second_beyond
    apart = ~drawn | ((of_first == 0) & (of_second == 0))
    inside = [*map(tuple, pairs[first_inside].tolist()), *map(tuple, pairs[second_inside][:, ::-1].tolist())]
    return inside, pairs[~(first_inside | second_inside | apart)]


def _is_same(a: Polygon, b: Polygon) -> bool:
    """Whether two outlines have the same points in the same order, wherever they begin and whichever way they run."""
    a, b = _open(a), _open(b)
    if len(a) != len(b):
        return False
    for start in np.flatnonzero(np.abs(b - a[0]).max(axis=1) <= SAME_PX).tolist():
        forwards = np.roll(b, -start, axis=0)
        for other in (forwards, np.roll(forwards[::-1], 1, axis=0)):
            if np.abs(a - other).max() <= SAME_PX:
                return True
    return False


def _open(polygon: Polygon) -> Polygon:
    """Return the points of an outline without those that repeat the one before, as a last one may the first."""
    moved = np.abs(polygon - np.roll(polygon, 1, axis=0)).max(axis=1) > SAME_PX
    return polygon[moved] if moved.any() else polygon[:1]


@dataclass(frozen=True, slots=True)
class _Edges:
    """Edges of all outlines, one outline after the other."""

    start: NDArray[np.float64]
    """First end of each edge, shape (n, 2)."""
    step: NDArray[np.float64]
    """From there to the other end, shape (n, 2)."""
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    """Index of the first edge of each outline, and how many it has."""

    @staticmethod
    def of(polygons: Sequence[Polygon]) -> _Edges:
        """Return those of some outlines."""
        count = np.array([len(p) for p in polygons])
        first = np.cumsum(count) - count
        start = np.concatenate(polygons)
        stop = np.roll(start, -1, axis=0)
        stop[first + count - 1] = start[first]
        return _Edges(start, stop - start, first, count)

    def along(self, outline: int) -> NDArray[np.float64]:
        """Return places along an outline, none farther from the next than a step, shape (n, 2)."""
        own = slice(self.first[outline], self.first[outline] + self.count[outline])
        start, step = self.start[own], self.step[own]
        count = np.ceil(np.hypot(*step.T) / STEP_PX).astype(np.int64).clip(1)
        edge = np.repeat(np.arange(len(start)), count)
        part = (np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
        return np.asarray(start[edge] + step[edge] * part[:, None])

    def depths(self, points: NDArray[np.float64], outlines: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how deep each point lies inside an outline of its own, in pixels, shape (n,); negative outside."""
        chunks = np.flatnonzero(np.diff(np.cumsum(self.count[outlines]) // MOST_AT_ONCE)) + 1
        parts = zip(np.split(points, chunks), np.split(outlines, chunks), strict=True)
        return np.concatenate([self._depths(*part) for part in parts])

    def _depths(self, points: NDArray[np.float64], outlines: NDArray[np.int64]) -> NDArray[np.float64]:
        count = self.count[outlines]
        begins = np.cumsum(count) - count
        edge = np.arange(count.sum()) + np.repeat(self.first[outlines] - begins, count)
        (start_x, start_y), (step_x, step_y) = (np.ascontiguousarray(v.T)[:, edge] for v in (self.start, self.step))
        x, y = (np.repeat(points[:, axis], count) - start for axis, start in enumerate((start_x, start_y)))
        squared = np.maximum(step_x**2 + step_y**2, SMALLEST)
        share = np.clip((x * step_x + y * step_y) / squared, 0, 1)
        away = np.sqrt(np.minimum.reduceat((x - share * step_x) ** 2 + (y - share * step_y) ** 2, begins))
        # Edges that a ray from the point to the right crosses, whichever way they run.
        turn = x * step_y - y * step_x
        crossed = ((y < 0) != (y < step_y)) & ((turn < 0) == (step_y > 0))
        return np.where(np.add.reduceat(crossed, begins, dtype=np.int64) % 2, away, -away)


def _overlap_clearly(pairs: NDArray[np.int64], edges: _Edges) -> list[bool]:
    """Return whether a few of the points of each pair of outlines show that the two overlap in part."""
    if not len(pairs):
        return []
    nth = (edges.count[:, None] * np.arange(FEW)) // FEW + edges.first[:, None]
    inner, outer = pairs.ravel(), pairs[:, ::-1].ravel()
    depths = edges.depths(edges.start[nth[inner].ravel()], np.repeat(outer, FEW)).reshape(-1, 2, FEW)
    beyond = (depths.min(axis=2) < -TOUCHING_PX).all(axis=1)
    clear: list[bool] = (beyond & (depths.max(axis=(1, 2)) > TOUCHING_PX)).tolist()
    return clear


def _relation(a: int, b: int, edges: _Edges) -> Literal["first inside", "second inside", "apart", "united"]:
    """Return how two outlines lie, one of which may reach a little beyond the other."""
    of_a, of_b = edges.along(a), edges.along(b)
    depth_a = edges.depths(of_a, np.full(len(of_a), b))
    depth_b = edges.depths(of_b, np.full(len(of_b), a))
    a_beyond, b_beyond = depth_a.min() < -TOUCHING_PX, depth_b.min() < -TOUCHING_PX
    if a_beyond and b_beyond:
        return "united" if max(depth_a.max(), depth_b.max()) > TOUCHING_PX else "apart"
    if not a_beyond and not b_beyond:
        return "united"
    return "second inside" if a_beyond else "first inside"
