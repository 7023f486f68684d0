"""Joins the files of a segmentation that has one file per slice."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from gpuprep.core.formatting import printable
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Contour, Raster, Segmentation, SliceKey, Structure


def group_paths(found: Sequence[SegmentationFile]) -> list[str]:
    """Return for each file the path of its segmentation: its folder if the folder has one file per slice, else itself.

    The files of a folder belong together if they have the same format and hold one slice each.
    """
    groups = [(os.path.dirname(f.path), f.format) for f in found]
    sizes = Counter(group for f, group in zip(found, groups, strict=True) if f.per_slice)
    return [group[0] if f.per_slice and sizes[group] > 1 else f.path for f, group in zip(found, groups, strict=True)]


class SegmentationFile(Protocol):
    """Attributes of a file that `group_paths` reads."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def per_slice(self) -> bool: ...


def joined(found: Sequence[Segmentation]) -> list[Segmentation]:
    """Return segmentations, with those of one file per slice merged by folder and format."""
    groups: dict[tuple[str, str], list[Segmentation]] = defaultdict(list)
    for path, segmentation in zip(group_paths(found), found, strict=True):
        groups[path, segmentation.format].append(segmentation)
    return [members[0] if len(members) == 1 else _merged(path, members) for (path, _), members in groups.items()]


def _merged(path: str, members: Sequence[Segmentation]) -> Segmentation:
    contours: dict[str, list[Contour]] = defaultdict(list)
    rasters: dict[str, list[Raster]] = defaultdict(list)
    owners: dict[tuple[str, SliceKey | None], Segmentation] = {}
    for member in members:
        for structure in member.structures:
            for key in {c.slice for c in structure.contours} | {r.slice for r in structure.rasters}:
                if (other := owners.setdefault((structure.name, key), member)) is not member:
                    first, second = (printable(os.path.basename(m.path)) for m in (other, member))
                    raise SegmentationError(
                        f"{first} and {second} both hold {printable(structure.name)} on one slice: keep one of them, "
                        "or put them into different folders"
                    )
            contours[structure.name] += structure.contours
            rasters[structure.name] += structure.rasters
    return replace(
        members[0],
        path=path,
        why=f"{members[0].why}; {len(members)} files",
        structures=tuple(Structure(n, tuple(c), tuple(rasters[n])) for n, c in contours.items()),
        notes=tuple(note for m in members for note in m.notes),
    )
