"""Images of one *Series Instance UID* to volumes: images that are no slices are left out, several stacks are parted."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from gpuprep.acceptance import DAMAGED, listed
from gpuprep.errors import InputError
from gpuprep.ownership import owners
from gpuprep.places import common_folder
from gpuprep.rules import EACH_A_VOLUME, SMALLEST_PART, Irregularity, Rules, SeriesWarning
from gpuprep.series import FOLDER_UID, MALFORMED, Image, Series, SliceHeader, packed, unpacked
from gpuprep.stacking import acquisition, along_normal_mm, position_tolerance_mm, same_image, stack

MATERIAL_MAPS = ("Z_EFF", "ED", "EDW", "PCT", "MGML", "HU_MOD")
"""Rescale types of what is computed from several energies, and lies beside images in HU."""

JUMP = 4.5
"""So many times the usual step from image to image ends a run of slices."""

MOST_KEYS = 3
"""So many attributes together may tell acquisitions apart."""


@dataclass(frozen=True, slots=True)
class Key:
    """An attribute that tells images at one place apart."""

    of: Callable[[SliceHeader], Hashable]
    """Its value; None or "" where there is none."""
    unit: str | None = None
    """What follows the value in a message; None: the value is a hash, and not for people."""


def _phase(name: str, unit: str) -> Key:
    return Key(lambda s: unpacked(s.phase, name) if s.phase else "", unit)


def _other(name: str) -> Key:
    return Key(lambda s: unpacked(s.other, name))


ACQUISITION: dict[str, Key] = {
    "series UID": _other("uid"),
    "temporal position": Key(lambda s: s.temporal_position, ""),
    "temporal offset": _phase("offset", " s"),
    "respiratory phase": _phase("respiratory", " %"),
    "cardiac phase": _phase("cardiac", " %"),
    "cardiac trigger delay": _phase("delay", " ms"),
    "respiratory trigger delay": _phase("respiratory-delay", " ms"),
    "trigger time": _phase("trigger", " ms"),
    "energy": _phase("energy", " keV"),
    "acquisition number": Key(lambda s: s.acquisition_number, ""),
    "reconstruction": Key(lambda s: s.reconstruction),
    "acquisition time": Key(lambda s: s.acquisition_time),
}
"""Attributes that say of which acquisition an image is, in the order in which they are tried."""

LAST_RESORT: dict[str, Key] = {
    "scan options": _other("options"),
    "series time": _other("series"),
    "content time": _other("content"),
    "instance": Key(lambda s: (s.path, s.member) if s.frames > 1 else ""),
}
"""Attributes that vary for other reasons too: they are tried last, and have to explain every image."""


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
    return [part for volume in volumes for part in _acquisitions(volume, rules)]


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

    complete, lacking = [], []
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
                here = math.floor(sum(w * x for w, x in zip(DIRECTION_WEIGHTS, image.orientation, strict=True)))
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
    left_out = tuple((image.header.name, why) for image, why in strays)
    what = f"{len(left_out)} images are no slices: " + listed([f"{name} ({why})" for name, why in left_out])
    note = Irregularity("left-out", what, "left out of the volume")
    return replace(volume, left_out=(*volume.left_out, *left_out), irregularities=(*volume.irregularities, note))


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


Groups = list[list[int]]
"""Slices of each group, by their number in the volume."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Where the slices of a volume lie along their normal."""

    volume: Series
    along_mm: NDArray[np.float64]
    """Along the normal, in the order of the slices, shape (n,)."""
    place: NDArray[np.int_]
    """Position of each slice, counted upwards; images within the tolerance share one. Shape (n,)."""
    gaps_mm: NDArray[np.float64]
    """From each position to the next."""
    tolerance_mm: float
    """Gaps that differ from each other by less are equal."""
    crowded: bool
    """Whether different images share a position, as far as headers tell."""
    repeated: bool
    """Whether images of different instances or frames share a position."""

    @classmethod
    def of(cls, volume: Series, rules: Rules) -> _Layout | None:
        """Return the layout; None where slices do not say where they are."""
        if any(s.position_mm is None for s in volume.slices):
            return None
        try:
            along = along_normal_mm(volume)
        except InputError:
            return None
        order = np.argsort(along, kind="stable")
        gaps = np.diff(along[order])
        nearest = position_tolerance_mm(volume, rules)
        new = gaps > nearest
        place = np.empty(len(along), dtype=int)
        place[order] = np.concatenate([[0], np.cumsum(new)])
        crowded = repeated = False
        for n in np.flatnonzero(~new):
            a, b = volume.slices[order[n]], volume.slices[order[n + 1]]
            crowded = crowded or not same_image(a, b)
            repeated = repeated or (a.sop_instance_uid, a.frame) != (b.sop_instance_uid, b.frame)
        typical = float(np.median(gaps[new])) if new.any() else 0.0
        return cls(volume, along, place, gaps[new], max(nearest, rules.spacing_tolerance * typical), crowded, repeated)

    def overlapping(self, groups: Groups) -> NDArray[np.bool_]:
        """Return which gaps lie within the extent of two groups or more."""
        covered = np.zeros(len(self.gaps_mm) + 1, dtype=int)
        for group in groups:
            low, high = int(self.place[group].min()), int(self.place[group].max())
            if low == high:  # a single slice lies between its neighbours
                low, high = max(0, low - 1), min(len(self.gaps_mm), high + 1)
            covered[low] += 1
            covered[high] -= 1
        return np.cumsum(covered)[:-1] > 1

    def is_even(self, among: NDArray[np.bool_], share: float) -> bool:
        """Whether gaps are as wide as most of the stack, but for a share of them."""
        odd = np.abs(self.gaps_mm[among] - np.median(self.gaps_mm)) > self.tolerance_mm
        return bool(odd.sum() <= share * len(odd))

    def inside(self, few: Groups, groups: Groups, share: float) -> bool:
        """Whether some slices are no more than a share of all, and lie within the extent of one of the groups each."""
        extents = [(self.place[group].min(), self.place[group].max()) for group in groups]
        places = [self.place[n] for group in few for n in group]
        return len(places) <= share * len(self.place) and all(
            any(low < place < high for low, high in extents) for place in places
        )

    def repeats(self, group: list[int]) -> bool:
        """Whether images of different instances or frames of a group share a position."""
        images = {(self.volume.slices[n].sop_instance_uid, self.volume.slices[n].frame) for n in group}
        return len({int(self.place[n]) for n in group}) < len(images)

    def counted_through(self) -> bool:
        """Whether instances, or positions in a stack, are numbered as slices lie: they were made as one stack then."""
        order = np.argsort(self.place, kind="stable")
        for numbers in ([s.instance_number for s in self.volume.slices], [s.in_stack for s in self.volume.slices]):
            if None not in numbers:
                steps = np.diff(np.array(numbers, dtype=np.int64)[order])
                if (steps > 0).all() or (steps < 0).all():
                    return True
        return False

    def runs(self) -> Groups:
        """Return slices by the order of their instance numbers.

        A run ends where they turn back, stay in place, or jump farther than slices that are missing would make them.
        There are no runs where numbers are absent or repeated, or a run is too short to be a stack.
        """
        numbers = [s.instance_number for s in self.volume.slices]
        if None in numbers or len(set(numbers)) < len(numbers):
            return []
        order = np.argsort(np.array(numbers, dtype=np.int64))
        steps_mm = np.abs(np.diff(self.along_mm[order]))
        farthest_mm = JUMP * np.median(steps_mm)
        runs: Groups = [[int(order[0])]]
        direction = 0
        for (before, n), step_mm in zip(pairwise(order), steps_mm, strict=True):
            step = int(np.sign(self.place[n] - self.place[before]))
            if step == 0 or step == -direction or step_mm > farthest_mm:
                runs.append([])
                step = 0
            runs[-1].append(int(n))
            direction = step
        return runs if min(map(len, runs)) >= SMALLEST_PART else []


def _acquisitions(volume: Series, rules: Rules) -> list[Series]:
    """Return the acquisitions that lie in the same place, each as a volume; the volume itself where it holds but one.

    They share positions, or lie between each other: slices of two scans 2.5 mm apart then look like one of 1.25 mm, or
    like one of uneven spacing. Acquisitions that follow each other along the normal are one volume.
    """
    _, *others = {(acquisition(s), s.other, s.frames > 1 and s.path) for s in volume.slices}
    if not others or (layout := _Layout.of(volume, rules)) is None or not len(layout.gaps_mm):
        return [volume]
    everywhere = np.ones(len(layout.gaps_mm), dtype=bool)
    if not layout.repeated and layout.is_even(everywhere, 0) and layout.counted_through():
        return [volume]
    runs = layout.runs()
    if found := _best(layout, _candidates(volume, ACQUISITION, MOST_KEYS if layout.crowded else 1), rules):
        names, groups, parts = found
        if _joins(runs, groups) and (joined := _apart(layout, runs, rules, sharing=layout.crowded)):
            names, parts = (*names, "instance number"), joined
        return _told(volume, parts, names, rules)
    for name in ("acquisition number", "acquisition time"):
        groups = _grouped(volume, [ACQUISITION[name]])
        if _joins(runs, groups) and (parts := _apart(layout, runs, rules, sharing=layout.crowded)):
            return _told(volume, parts, (name, "instance number"), rules)
    found = _best(layout, _candidates(volume, LAST_RESORT | _dimensions(volume), MOST_KEYS), rules, last_resort=True)
    if found and sum(len(part.slices) for part in found[2]) == len(volume.slices):
        return _told(volume, found[2], found[0], rules)
    return [volume]


Candidate = tuple[tuple[str, ...], Groups]
"""Names of attributes, and the groups that they make."""


def _candidates(volume: Series, keys: Mapping[str, Key], most: int) -> Iterator[Candidate]:
    """Yield the groups that each attribute makes, then two of them together, up to `most`."""
    telling = {name: groups for name, key in keys.items() if len(groups := _grouped(volume, [key])) > 1}
    # More attributes make smaller groups: one that makes groups of a slice or two is of no use.
    useful = [name for name, groups in telling.items() if 2 * _in_large(groups) > len(volume.slices)]
    for count in range(1, most + 1):
        for names in combinations(useful, count):
            yield names, telling[names[0]] if count == 1 else _grouped(volume, [keys[name] for name in names])


def _grouped(volume: Series, keys: Sequence[Key]) -> Groups:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, s in enumerate(volume.slices):
        groups[tuple(key.of(s) for key in keys)].append(n)
    return list(groups.values())


def _in_large(groups: Groups) -> int:
    return sum(len(group) for group in groups if len(group) >= SMALLEST_PART)


def _dimensions(volume: Series) -> dict[str, Key]:
    """Return the dimensions of multi-frame images by number, where all of these have as many."""
    indices = {unpacked(s.other, "index").count(",") for s in volume.slices if s.frames > 1 and "index=" in s.other}
    if len(indices) != 1 or any("index=" not in s.other for s in volume.slices):
        return {}
    return {
        f"dimension index {n + 1}": Key(lambda s, n=n: unpacked(s.other, "index").split(",")[n], "")  # type: ignore[misc]
        for n in range(indices.pop() + 1)
    }


def _joins(runs: Groups, groups: Groups) -> bool:
    """Whether several runs of instance numbers hold the groups, each of them whole, and some several."""
    run_of = {n: k for k, run in enumerate(runs) for n in run}
    return 1 < len(runs) < len(groups) and all(len({run_of[n] for n in group}) == 1 for group in groups)


def _best(
    layout: _Layout, candidates: Iterable[Candidate], rules: Rules, *, last_resort: bool = False
) -> tuple[tuple[str, ...], Groups, list[Series]] | None:
    """Return the first candidate that makes a volume of every slice, else the first that does of most."""
    most = None
    sharing = layout.repeated if last_resort else layout.crowded
    for names, groups in candidates:
        if parts := _apart(layout, groups, rules, sharing=sharing, last_resort=last_resort):
            if sum(len(part.slices) for part in parts) == len(layout.volume.slices):
                return names, groups, parts
            most = most or (names, groups, parts)
    return most


def _apart(layout: _Layout, groups: Groups, rules: Rules, *, sharing: bool, last_resort: bool = False) -> list[Series]:
    """Return groups of slices as volumes, if that explains them; else none.

    Each has to be a stack. Where slices share positions, most have to be in one: an acquisition that was broken off, or
    lacks slices, must not cost the others; it is left out, or judged by itself. Where they lie between each other, all
    have to, but for a few that lie inside of a regular stack. If slices are evenly spaced together, they may be one
    stack: then each group has to be without gaps, and slices must not be counted through.
    """
    volume = layout.volume
    groups = sorted(groups, key=lambda g: (-len(g), min(_rank(volume.slices[n]) for n in g)))
    large = [group for group in groups if len(group) >= SMALLEST_PART]
    small = [group for group in groups if len(group) < SMALLEST_PART]
    parts = [
        replace(volume, slices=tuple(volume.slices[n] for n in group), left_out=(), irregularities=())
        for group in large
    ]
    if 2 * sum(map(len, large)) <= len(volume.slices):
        return []
    if last_resort and any(layout.repeats(group) for group in groups):
        return []
    if sharing:
        places = {(int(layout.place[n]), k) for k, group in enumerate(groups) for n in group}
        if len(places) == len({place for place, _ in places}):  # they follow each other: something else is doubled
            return []
        if 2 * sum(len(part.slices) for part in parts if _found(part, rules) is not None) <= len(volume.slices):
            return []
    else:
        among = layout.overlapping(groups)
        even = layout.is_even(among, rules.max_missing_share)
        everywhere = np.ones(len(among), dtype=bool)
        one = last_resort or (layout.counted_through() and layout.is_even(everywhere, rules.max_missing_share))
        if not among.any() or (even and one):
            return []
        if small and (even or not layout.inside(small, large, rules.max_missing_share)):
            return []
        found = [_found(part, rules) for part in parts]
        if None in found or ((even or small) and any({"gap", "uneven"} & (codes or set()) for codes in found)):
            return []
    others = tuple((volume.slices[n].name, "other acquisition") for group in small for n in group)
    kept = tuple(note for note in volume.irregularities if note.code != "left-out")
    first, *more = parts
    first = replace(first, left_out=volume.left_out + others, irregularities=volume.irregularities)
    return [first, *(replace(part, irregularities=kept) for part in more)]


def _rank(s: SliceHeader) -> tuple[int, str, int]:
    return s.instance_number or 0, s.path, s.frame


def _found(part: Series, rules: Rules) -> set[str] | None:
    """Return the codes of what is irregular about a stack; None if it is none."""
    try:
        return {note.code for note in stack(part, replace(rules, policy="fix")).irregularities}
    except InputError:
        return None


def _told(volume: Series, parts: list[Series], names: tuple[str, ...], rules: Rules) -> list[Series]:
    """Return volumes with a note of what told them apart; the one they came from, where nothing is to be put right."""
    count = len(parts) if len(parts) > 1 else "several"
    what = f"{count} acquisitions lie in one place, told apart by {' and '.join(names)}"
    if rules.policy != "fix":
        note = Irregularity("acquisitions", what, "stacked as one")
        return [replace(volume, irregularities=(*volume.irregularities, note))]
    told = []
    for part in parts:
        note = Irregularity("acquisitions", what + _which(part, names), EACH_A_VOLUME)
        told.append(replace(part, irregularities=(*part.irregularities, note)))
    # What one attribute tells apart may still be several by another.
    return [piece for part in told for piece in _acquisitions(part, rules)] if len(told) > 1 else told


def _which(part: Series, names: tuple[str, ...]) -> str:
    """Return the values that tell a volume from the others, of attributes whose values may be told."""
    keys = ACQUISITION | _dimensions(part)
    told = []
    for name in names:
        key = keys.get(name)
        if key is None or key.unit is None:
            continue
        values = {key.of(s) for s in part.slices}
        if len(values) == 1 and (value := values.pop()) not in (None, ""):
            told.append(f"{name}{' = ' if name[-1].isdigit() else ' '}{value}{key.unit}")
    return f"; this is {' and '.join(told)}" if told else ""
