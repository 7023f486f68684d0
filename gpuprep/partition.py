"""Images of one *Series Instance UID* to volumes: what is no slice is left out, what is several stacks is parted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np

from gpuprep.acceptance import DAMAGED, listed
from gpuprep.errors import InputError
from gpuprep.places import common_folder
from gpuprep.rules import Irregularity, Rules
from gpuprep.series import Image, Series, SliceHeader
from gpuprep.stacking import along_normal_mm, has_doubles, stack

SMALLEST_PART = 3
"""Fewer slices of another matrix, spacing or orientation are strays, and no volume of their own."""

MATERIAL_MAPS = ("Z_EFF", "ED", "EDW", "PCT", "MGML", "HU_MOD")
"""Rescale types of what is computed from several energies, and lies beside images in HU."""

ACQUISITION: dict[str, Callable[[SliceHeader], Hashable]] = {
    "temporal position": lambda s: s.temporal_position,
    "cardiac phase or stack": lambda s: s.phase,
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
    strays = _strays(images)
    aside = {id(image) for image, _ in strays}
    frames = Counter(image.frame_of_reference_uid for image in images if id(image) not in aside)
    # Some anonymisers give every file a frame of reference of its own: then it says nothing.
    framed = sum(count >= SMALLEST_PART for count in frames.values()) > 1
    stacks: list[list[Image]] = []
    for image in images:
        if id(image) in aside:
            continue
        for stacked in stacks:
            if _same_stack(image, stacked[0], framed):
                stacked.append(image)
                break
        else:
            stacks.append([image])
    stacks.sort(key=lambda stacked: (-len(stacked), _path(stacked[0])))
    main, *others = stacks
    large = [stacked for stacked in others if len(stacked) >= SMALLEST_PART and not _lack(stacked[0], main[0])]
    strays += [(image, _unlike(image, main[0])) for small in others if small not in large for image in small]

    volumes = [_joined(stacked) for stacked in (main, *large)]
    if large:
        what = f"{len(volumes)} stacks unlike in matrix, spacing, orientation or frame of reference share a series"
        note = Irregularity("mixed", what, "each is a volume")
        volumes = [replace(v, irregularities=(note,)) for v in volumes]
    if strays:
        left_out = tuple((image.header.name, why) for image, why in strays)
        what = f"{len(left_out)} images are no slices: " + listed([f"{name} ({why})" for name, why in left_out])
        note = Irregularity("left-out", what, "left out of the volume")
        volumes[0] = replace(volumes[0], left_out=left_out, irregularities=(*volumes[0].irregularities, note))
    volumes = [part for volume in volumes for part in _acquisitions(volume, rules)]
    return volumes if len(volumes) == 1 else [replace(v, part=n) for n, v in enumerate(volumes, 1)]


def _path(image: Image) -> str:
    return image.header.path


def _strays(images: list[Image]) -> list[tuple[Image, str]]:
    """Return images that are no slices, and why; none if there is nothing else: then the whole is to be judged."""
    primary = sum(not image.header.secondary for image in images) > len(images) / 2
    hu = any(image.header.rescale_type in (None, "HU") for image in images)
    strays = [(image, why) for image in images if (why := _stray(image, primary, hu))]
    return strays if len(strays) < len(images) else []


def _stray(image: Image, primary: bool, hu: bool) -> str:
    """Return why an image is no slice; "" for one that may be. `primary`: most images of the series are; `hu`: some."""
    if image.header.localizer:
        return "localizer"
    if image.header.samples_per_pixel != 1:
        return "colour"
    if hu and image.header.rescale_type in MATERIAL_MAPS:
        return "material map"
    return "secondary image" if image.header.secondary and primary else ""


def _lack(image: Image, other: Image) -> str:
    """Return what an image lacks that would say whether it is of another kind than `other`: it may be a slice."""
    if not (image.rows and image.columns):
        return DAMAGED[0]
    if (image.rows, image.columns) != (other.rows, other.columns):
        return ""
    return DAMAGED[1] if image.orientation is None else DAMAGED[2] if image.pixel_spacing_mm is None else ""


def _same_stack(a: Image, b: Image, framed: bool) -> bool:
    """Whether two slices can lie in one stack: equal matrices, spacing within 0.1 %, directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns) or (framed and a.frame_of_reference_uid != b.frame_of_reference_uid):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(a.orientation, b.orientation, atol=1e-3)


def _unlike(a: Image, b: Image) -> str:
    """Return in what an image differs from a stack that it does not belong to."""
    if lack := _lack(a, b):
        return lack
    if (a.rows, a.columns) != (b.rows, b.columns):
        return "other matrix"
    if not _close(a.orientation, b.orientation, atol=1e-3):
        return "other orientation"
    if not _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3):
        return "other pixel spacing"
    return "other frame of reference"


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
        folder=common_folder({image.folder for image in images}),
        slices=tuple(image.header for image in images),
    )


def _acquisitions(volume: Series, rules: Rules) -> list[Series]:
    """Return the acquisitions that lie in the same place, each as a volume; the volume itself where it holds but one.

    They share positions, or lie between each other: slices of two scans 2.5 mm apart then look like one of 1.25 mm.
    """
    keys = {name: key for name, key in ACQUISITION.items() if len({key(s) for s in volume.slices}) > 1}
    if not keys:
        return [volume]
    sharing = has_doubles(volume, rules)
    # What tells images at one position apart may take several attributes; what lies in between has to differ in one.
    for count in range(1, len(keys) + 1 if sharing else 2):
        for chosen in combinations(keys, count):
            groups: dict[Hashable, list[SliceHeader]] = defaultdict(list)
            for s in volume.slices:
                groups[tuple(keys[name](s) for name in chosen)].append(s)
            apart = _apart(volume, list(groups.values()), rules, sharing)
            if not apart or not (sharing or (_interleaved(apart) and not _numbered_through(volume))):
                continue
            what = f"{len(apart)} acquisitions lie in one place, told apart by {' and '.join(chosen)}"
            if rules.policy != "fix":
                note = Irregularity("acquisitions", what, "stacked as one")
                return [replace(volume, irregularities=(*volume.irregularities, note))]
            note = Irregularity("acquisitions", what, "each is a volume")
            return [replace(part, irregularities=(*part.irregularities, note)) for part in apart]
    return [volume]


def _apart(volume: Series, groups: list[list[SliceHeader]], rules: Rules, sharing: bool) -> list[Series]:
    """Return groups of slices as volumes, if that explains them; else none.

    Each has to be a stack. Where slices share positions, most have to be in one: an acquisition that was broken off, or
    lacks slices, must not cost the others; it is left out, or judged by itself.
    """
    groups.sort(key=lambda g: (-len(g), min((s.instance_number or 0, s.path, s.frame) for s in g)))
    large = [group for group in groups if len(group) >= SMALLEST_PART]
    parts = [replace(volume, slices=tuple(group), left_out=(), irregularities=()) for group in large]
    stacked = sum(len(part.slices) for part in parts if _is_stack(part, rules))
    if not parts or 2 * stacked <= len(volume.slices):
        return []
    if not sharing and stacked < len(volume.slices):
        return []
    others = tuple((s.name, "other acquisition") for group in groups if group not in large for s in group)
    parts[0] = replace(parts[0], left_out=volume.left_out + others, irregularities=volume.irregularities)
    return parts


def _is_stack(part: Series, rules: Rules) -> bool:
    try:
        stack(part, replace(rules, policy="fix"))
    except InputError:
        return False
    return True


def _interleaved(parts: list[Series]) -> bool:
    """Whether two stacks overlap by more than half of the shorter one."""
    ends = [(float(along.min()), float(along.max())) for along in map(along_normal_mm, parts)]
    return any(
        min(top_a, top_b) - max(low_a, low_b) > 0.5 * min(top_a - low_a, top_b - low_b)
        for (low_a, top_a), (low_b, top_b) in combinations(ends, 2)
    )


def _numbered_through(volume: Series) -> bool:
    """Whether instance numbers follow the positions of all slices: then they were made as one stack."""
    numbers = [s.instance_number for s in volume.slices]
    if None in numbers:
        return False
    steps = np.diff(np.array(numbers)[np.argsort(along_normal_mm(volume), kind="stable")])
    return bool((steps > 0).all() or (steps < 0).all())
