"""Images of one *Series Instance UID* to volumes: what is no slice is left out, what is several stacks is parted."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import combinations

from gpuprep.errors import InputError
from gpuprep.rules import Irregularity, Rules
from gpuprep.series import Image, Series, SliceHeader
from gpuprep.stacking import Measures, has_doubles, stack

SMALLEST_PART = 3
"""Fewer slices of another matrix, spacing or orientation are strays, and no volume of their own."""

ACQUISITION: dict[str, Callable[[SliceHeader], Hashable]] = {
    "temporal position": lambda s: s.temporal_position,
    "acquisition number": lambda s: s.acquisition_number,
    "reconstruction": lambda s: s.reconstruction,
    "acquisition time": lambda s: s.acquisition_time,
}
"""What tells images at the same place apart, in the order in which it is tried."""


def partition(images: Iterable[Image], rules: Rules) -> list[Series]:
    """Return the volumes that images form, by folder, series number and key.

    Parameters
    ----------
    images : iterable of Image
        In any order.
    rules : Rules
        With policy "fix", images at the same place but of different acquisitions become volumes of their own where
        each of these is regular.
    """
    by_uid: dict[str, list[Image]] = defaultdict(list)
    for image in sorted(images, key=_path):  # what one file holds stays in its order
        # Without a UID nothing says which files belong together; a folder at least keeps strangers apart.
        by_uid[image.series_uid or f"\0{image.folder}"].append(image)
    series = [volume for group in by_uid.values() for volume in _volumes(group, rules)]
    series.sort(key=lambda s: (s.folder, s.series_number is None, s.series_number or 0, s.key))
    return series


def _volumes(images: list[Image], rules: Rules) -> list[Series]:
    """Return the volumes of one UID."""
    strays = [(image, why) for image in images if (why := _stray(image))]
    if len(strays) == len(images):
        strays = []  # nothing else is there: let the whole be judged
    aside = {id(image) for image, _ in strays}
    stacks: list[list[Image]] = []
    for image in images:
        if id(image) in aside:
            continue
        for stacked in stacks:
            if _same_stack(image, stacked[0]):
                stacked.append(image)
                break
        else:
            stacks.append([image])
    stacks.sort(key=lambda stacked: (-len(stacked), _path(stacked[0])))
    main, *others = stacks
    large = [stacked for stacked in others if len(stacked) >= SMALLEST_PART]
    strays += [(image, _unlike(image, main[0])) for small in others if small not in large for image in small]

    volumes = [_joined(stacked) for stacked in (main, *large)]
    if large:
        note = Irregularity(
            "mixed", f"{len(volumes)} stacks unlike in matrix, spacing or orientation share a series: each is a volume"
        )
        volumes = [replace(v, irregularities=(note,)) for v in volumes]
    if strays:
        left_out = tuple((image.header.name, why) for image, why in strays)
        first = ", ".join(f"{name} ({why})" for name, why in left_out[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        note = Irregularity("left-out", f"{len(left_out)} images are no slices of the volume: {first}{more}")
        volumes[0] = replace(volumes[0], left_out=left_out, irregularities=(*volumes[0].irregularities, note))
    if rules.policy == "fix":
        volumes = [part for volume in volumes for part in _acquisitions(volume, rules)]
    return volumes if len(volumes) == 1 else [replace(v, part=n) for n, v in enumerate(volumes, 1)]


def _path(image: Image) -> str:
    return image.header.path


def _stray(image: Image) -> str:
    """Return why an image is no slice; "" for one that may be."""
    s = image.header
    if s.localizer:
        return "localizer"
    if s.samples_per_pixel != 1:
        return "colour"
    if s.position_mm is None or image.orientation is None:
        return "no position"
    return ""


def _same_stack(a: Image, b: Image) -> bool:
    """Whether two slices can lie in one stack: equal matrices, spacing within 0.1 %, directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(a.orientation, b.orientation, atol=1e-3)


def _unlike(a: Image, b: Image) -> str:
    """Return in what an image differs from a stack that it does not belong to."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return "other matrix"
    return "other orientation" if not _close(a.orientation, b.orientation, atol=1e-3) else "other pixel spacing"


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, rtol: float = 0.0, atol: float = 0.0) -> bool:
    if a == b or a is None or b is None:
        return a == b
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b, strict=True))


def _joined(images: list[Image]) -> Series:
    """Return images that form one stack as a series."""
    first = images[0]
    return Series(
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        series_number=first.series_number,
        rows=first.rows,
        columns=first.columns,
        pixel_spacing_mm=first.pixel_spacing_mm,
        orientation=first.orientation,
        part=0,
        folder=os.path.commonpath({image.folder for image in images}),
        slices=tuple(image.header for image in images),
    )


def _acquisitions(volume: Series, rules: Rules) -> list[Series]:
    """Return the regular stacks that lie in the same place in a volume; itself where it holds but one, or none."""
    if not has_doubles(volume, rules):
        return [volume]
    measures = Measures()
    with suppress(InputError):
        stack(volume, rules, measures)
    if not measures.different:
        return [volume]
    keys = {name: key for name, key in ACQUISITION.items() if len({key(s) for s in volume.slices}) > 1}
    for count in range(1, len(keys) + 1):
        for chosen in combinations(keys, count):
            groups: dict[Hashable, list[SliceHeader]] = defaultdict(list)
            for s in volume.slices:
                groups[tuple(keys[name](s) for name in chosen)].append(s)
            if parts := _regular(volume, list(groups.values()), " and ".join(chosen), rules):
                return parts
    return [volume]


def _regular(volume: Series, groups: list[list[SliceHeader]], by: str, rules: Rules) -> list[Series]:
    """Return groups of slices as volumes if each is a regular stack; none if one is not."""
    if min(map(len, groups)) < SMALLEST_PART:
        return []
    note = Irregularity("acquisitions", f"{len(groups)} acquisitions share positions: told apart by {by}")
    groups.sort(key=lambda g: (-len(g), min((s.instance_number or 0, s.path, s.frame) for s in g)))
    parts = []
    for group in groups:
        part = replace(volume, slices=tuple(group), irregularities=(*volume.irregularities, note))
        try:
            stack(part, rules)
        except InputError:
            return []
        parts.append(part)
    return parts
