"""Splits the images of one *Series Instance UID* into volumes, and leaves out images that are no slices."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpuprep.core.formatting import first_few
from gpuprep.core.series import FOLDER_UID, MALFORMED, Image, Series, SliceHeader, packed
from gpuprep.core.stacking_rules import EACH_A_VOLUME, SMALLEST_PART, Irregularity, Rules, SeriesWarning
from gpuprep.dicom.acquisitions import acquisitions
from gpuprep.dicom.header_checks import DAMAGED
from gpuprep.dicom.ownership import owners
from gpuprep.files.filesystem import common_folder

MATERIAL_MAPS = ("Z_EFF", "ED", "EDW", "PCT", "MGML", "HU_MOD")
"""Rescale types of what is computed from several energies, and lies beside images in HU."""


def partition(images: Iterable[Image], rules: Rules) -> list[Series]:
    """Return the volumes that images form, by folder, series number and key.

    Parameters
    ----------
    images : iterable of Image
        In any order.
    rules : Rules
        Whether a UID or a folder makes a series. With policy "fix", images of different acquisitions at the same place,
        or between each other, become volumes of their own where each of these is regular.
    """
    groups: dict[str, list[Image]] = defaultdict(list)
    by_folder = rules.group_by == "folder"
    for image in sorted(images, key=_path):  # what one file holds stays in its order
        # Without a UID nothing says which files belong together; a folder at least keeps strangers apart.
        key = image.series_uid if image.series_uid and not by_folder else f"\0{image.folder}"
        groups[key].append(image)
    if by_folder:
        series = [volume for group, notes in _folders(groups) for volume in _warned(_series(group, rules), notes)]
    else:
        series = _counted_alone([volume for group in groups.values() for volume in _series(group, rules)])
    series.sort(key=lambda s: (s.folder, s.series_number is None, s.series_number or 0, s.key))
    return series


def _folders(groups: dict[str, list[Image]]) -> Iterator[tuple[list[Image], tuple[SeriesWarning, ...]]]:
    """Yield the images of each folder with the UID of their series: their own, if all have the same and no others do.

    Else it is made of the folder's path. Where UIDs differ, the slices keep a hash of theirs, since series of different
    UIDs may lie in one place.
    """
    uids = {folder: {image.series_uid for image in images} for folder, images in groups.items()}
    folders_of = Counter(uid for found in uids.values() for uid in found)
    for folder, images in groups.items():
        uid, *others = sorted(uids[folder])
        if uid and not others and folders_of[uid] == 1:
            yield images, ()
            continue
        made = f"{FOLDER_UID}{hashlib.sha256(os.fsencode(folder[1:])).hexdigest()[:16]}"
        spread = [uid for uid in uids[folder] if uid and folders_of[uid] > 1]
        what = "images of its Series Instance UID lie in other folders too, and --group-by folder parts them"
        notes = (SeriesWarning("spread", what),) if spread else ()
        yield [image._replace(series_uid=made, header=_with_uid(image)) for image in images], notes


def _warned(volumes: list[Series], notes: tuple[SeriesWarning, ...]) -> list[Series]:
    return [replace(v, warnings=(*v.warnings, *notes)) for v in volumes] if notes else volumes


def _with_uid(image: Image) -> SliceHeader:
    uid = hashlib.sha256(image.series_uid.encode()).hexdigest()[:16] if image.series_uid else ""
    return image.header._replace(other=f"{image.header.other} {packed([('uid', uid)])}".strip())


def _counted_alone(series: list[Series]) -> list[Series]:
    """Return series, those of one image with the number of such series in their folder."""
    alone = Counter(s.folder for s in series if len(s.slices) == 1)
    return [
        replace(s, alone=n) if len(s.slices) == 1 and (n := alone[s.folder]) >= SMALLEST_PART else s for s in series
    ]


def _series(images: list[Image], rules: Rules) -> list[Series]:
    """Return the volumes of one UID: first by study and patient, then by what they show."""
    of_owners, lost, notes = owners(images)
    volumes = []
    for n, owned in enumerate(of_owners):
        first, *others = _volumes(owned, rules)
        if n == 0 and lost:
            first = _without(first, lost)
        volumes += [first, *others]
    if notes:
        volumes = [replace(v, irregularities=(*notes, *v.irregularities)) for v in volumes]
    return volumes if len(volumes) == 1 else [replace(v, part=n) for n, v in enumerate(volumes, 1)]


def _volumes(images: list[Image], rules: Rules) -> list[Series]:
    """Return the volumes of one series."""
    strays = _strays(images)
    aside = {id(image) for image, _ in strays}
    slices = [image for image in images if id(image) not in aside]
    frames = _telling(image.frame_of_reference_uid for image in slices)
    stack_ids = _telling(image.header.stack_id for image in slices)
    stacks = _stacked(slices, frames, stack_ids)
    main, *others = stacks
    large = [stacked for stacked in others if len(stacked) >= SMALLEST_PART and not _lack(stacked[0], main[0])]
    strays += [(i, _unlike(i, main[0], frames)) for small in others if small not in large for i in small]

    volumes = [_joined(stacked) for stacked in (main, *large)]
    if large:
        volumes = [_mixed(volume, len(volumes), bool(stack_ids)) for volume in volumes]
    if strays:
        volumes[0] = _without(volumes[0], strays)
    return [part for volume in volumes for part in acquisitions(volume, rules)]


def _telling(values: Iterable[str]) -> frozenset[str]:
    """Return the UIDs or IDs that tell stacks apart: none, unless two have enough images each to be stacks.

    Some anonymisers give every file a frame of reference of its own: then it says nothing. One that is absent, or too
    damaged to be one and rare, never does.
    """
    counts = Counter(values)
    if sum(count >= SMALLEST_PART for value, count in counts.items() if value) < 2:
        return frozenset()
    return frozenset(
        value
        for value, count in counts.items()
        if value and (count >= SMALLEST_PART or not value.startswith(MALFORMED))
    )


DIRECTION_ATOL = 1e-3
"""Cosines of slices of one stack differ by no more: 0.06°."""

DIRECTION_WEIGHTS = tuple(w / (30 * DIRECTION_ATOL) for w in (1, 2, 3, 5, 7, 11))
"""Of cosines, for a sum that differs by less than 1 between directions that are one within `DIRECTION_ATOL`."""


def _stacked(slices: list[Image], frames: frozenset[str], stack_ids: frozenset[str]) -> list[list[Image]]:
    """Return slices that can lie in one stack together, the largest stack first.

    A slice that lacks a frame of reference or a Stack ID belongs where the rest, or its folder, leaves but one choice.
    """

    def told(image: Image) -> tuple[str, str]:
        frame, stack_id = image.frame_of_reference_uid, image.header.stack_id
        return frame if frame in frames else "", stack_id if stack_id in stack_ids else ""

    complete: list[Image] = []
    lacking: list[Image] = []
    for image in slices:
        frame, stack_id = told(image)
        (lacking if (frames and not frame) or (stack_ids and not stack_id) else complete).append(image)
    stacks = _Stacks()
    for image in complete:
        stacks.add(image, told(image))
    if lacking:
        folders = [{image.folder for image in stacked} for stacked in stacks.all]
        order = {id(image): n for n, image in enumerate(slices)}
        known = len(stacks.all)
        for image in lacking:
            own = told(image)
            fitting = [n for n in range(known) if stacks.fits(image, n, own)]
            if len(fitting) > 1:
                fitting = [n for n in fitting if image.folder in folders[n]]
            if len(fitting) == 1:
                stacks.all[fitting[0]].append(image)
            else:
                stacks.add(image, own)
        for stacked in stacks.all:
            stacked.sort(key=lambda image: order[id(image)])
    return sorted(stacks.all, key=lambda stacked: (-len(stacked), _path(stacked[0])))


class _Stacks:
    """Stacks of slices of equal matrices, spacing and direction, as they are found."""

    def __init__(self) -> None:
        self.all: list[list[Image]] = []
        self._told: list[tuple[str, str]] = []
        self._exactly: dict[tuple[object, ...], list[Image]] = {}
        self._near: dict[tuple[object, ...], list[int]] = defaultdict(list)
        """Numbers of stacks by matrix and roughly by direction, for many may differ in it."""

    def add(self, image: Image, told: tuple[str, str]) -> None:
        """Add a slice to the first stack in which it can lie, or to a new one; `told`: see `fits`."""
        exact = (told, image.rows, image.columns, image.pixel_spacing_mm, image.orientation)
        if (stacked := self._exactly.get(exact)) is None:
            bins: list[int | None] = [None]
            if image.orientation is not None:
                cosines = (max(-1.0, min(x, 1.0)) for x in image.orientation)  # damaged ones may be any number
                here = math.floor(sum(w * x for w, x in zip(DIRECTION_WEIGHTS, cosines, strict=True)))
                bins = [here, here - 1, here + 1]
            keys = [(told, image.rows, image.columns, b) for b in bins]
            near = sorted(n for key in keys for n in self._near.get(key, ()))
            n = next((n for n in near if self.fits(image, n, told)), len(self.all))
            if n == len(self.all):
                self.all.append([])
                self._told.append(told)
                self._near[keys[0]].append(n)
            stacked = self._exactly[exact] = self.all[n]
        stacked.append(image)

    def fits(self, image: Image, n: int, told: tuple[str, str]) -> bool:
        """Whether a slice can lie in a stack; `told`: its frame of reference and Stack ID, "" where it says none."""
        agree = all(a in ("", b) for a, b in zip(told, self._told[n], strict=True))
        return agree and _same_stack(image, self.all[n][0])


def _mixed(volume: Series, count: int, numbered: bool) -> Series:
    """Return one of several stacks that share a series, with a note."""
    unlike = "matrix, spacing, orientation" + (
        ", frame of reference or Stack ID" if numbered else " or frame of reference"
    )
    what = f"{count} stacks unlike in {unlike} share a series"
    stack_id = volume.slices[0].stack_id
    here = f"; this one has Stack ID {stack_id}" if numbered and stack_id.isdigit() else ""
    return replace(volume, irregularities=(Irregularity("mixed", what + here, EACH_A_VOLUME),))


def _without(volume: Series, strays: list[tuple[Image, str]]) -> Series:
    """Return a volume with the images named that were left out of it."""
    named = first_few([f"{image.header.name} ({why})" for image, why in strays])
    return volume.without(
        ((image.header, why) for image, why in strays), f"{len(strays)} images are no slices: {named}"
    )


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


def _same_stack(a: Image, b: Image) -> bool:
    """Whether two slices can lie in one stack: equal matrices, spacing within 0.1 %, directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(
        a.orientation, b.orientation, atol=DIRECTION_ATOL
    )


def _unlike(a: Image, b: Image, frames: frozenset[str]) -> str:
    """Return in what an image differs from a stack that it does not belong to; `frames`: those that tell stacks."""
    if lack := _lack(a, b):
        return lack
    if (a.rows, a.columns) != (b.rows, b.columns):
        return "other matrix"
    if not _close(a.orientation, b.orientation, atol=DIRECTION_ATOL):
        return "other orientation"
    if not _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3):
        return "other pixel spacing"
    if frames and a.frame_of_reference_uid not in frames:
        return "no Frame of Reference UID"
    return (
        "other frame of reference" if frames and a.frame_of_reference_uid != b.frame_of_reference_uid else "other stack"
    )


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, rtol: float = 0.0, atol: float = 0.0) -> bool:
    if a == b or a is None or b is None:
        return a == b
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b, strict=True))


def _joined(images: list[Image]) -> Series:
    """Return images that form one stack as a series."""
    first = images[0]
    return Series(
        series_uid=first.series_uid,
        study_uid=next((image.study_uid for image in images if image.study_uid), ""),
        frame_of_reference_uid=_most_frequent(image.frame_of_reference_uid for image in images),
        series_number=first.series_number,
        rows=first.rows,
        columns=first.columns,
        pixel_spacing_mm=first.pixel_spacing_mm,
        orientation=first.orientation,
        part=0,
        folder=common_folder({image.folder for image in images}),
        slices=tuple(image.header for image in images),
    )


def _most_frequent(values: Iterable[str]) -> str:
    """Return the value that most have, the first of several; "" where none has any."""
    counts = Counter(value for value in values if value)
    return max(counts, key=counts.__getitem__, default="")
