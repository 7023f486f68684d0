"""Splits the images of one *Series Instance UID* into volumes, and leaves out images that are not slices."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpuprep.core.formatting import first_few
from gpuprep.core.series import FOLDER_UID_PREFIX, MALFORMED_UID_PREFIX, Image, Series, SliceHeader, packed
from gpuprep.core.stacking_rules import MIN_STACK_SLICES, SEVERAL_VOLUMES_ACTION, Irregularity, Rules, SeriesWarning
from gpuprep.dicom.acquisitions import split_acquisitions
from gpuprep.dicom.describe import described
from gpuprep.dicom.header_checks import MISSING_GEOMETRY
from gpuprep.dicom.ownership import split_by_owner
from gpuprep.files.filesystem import common_folder

MATERIAL_MAPS = ("Z_EFF", "ED", "EDW", "PCT", "MGML", "HU_MOD")
"""Rescale Types of material maps, computed from several energies and stored beside images in HU."""


def partition(images: Iterable[Image], rules: Rules) -> list[Series]:
    """Return the volumes that images form, sorted by folder, series number and key.

    Parameters
    ----------
    images : iterable of Image
        Images in any order.
    rules : Rules
        Whether images are grouped by UID or by folder. With policy "fix", acquisitions that share positions or
        interleave become separate volumes if each of them is regular.
    """
    groups: dict[str, list[Image]] = defaultdict(list)
    group_by_folder = rules.group_by == "folder"
    for image in sorted(images, key=_path):  # stable: frames of a file keep their order
        # Images without a UID are grouped by folder.
        key = image.series_uid if image.series_uid and not group_by_folder else f"\0{image.folder}"
        groups[key].append(image)
    if group_by_folder:
        by_folder = _series_by_folder(groups)
        series = [volume for group, notes in by_folder for volume in _with_warnings(_series(group, rules), notes)]
    else:
        series = _with_alone_counts([volume for group in groups.values() for volume in _series(group, rules)])
    series.sort(key=lambda s: (s.folder, s.series_number is None, s.series_number or 0, s.key))
    return series


def _series_by_folder(groups: dict[str, list[Image]]) -> Iterator[tuple[list[Image], tuple[SeriesWarning, ...]]]:
    """Yield the images of each folder under one series UID, with warnings.

    The UID is kept if it is the same in the whole folder and in no other one; otherwise it is made from the folder's
    path, and slices keep a hash of their own UID, as series of different UIDs may share positions.
    """
    uids = {folder: {image.series_uid for image in images} for folder, images in groups.items()}
    folders_of = Counter(uid for found in uids.values() for uid in found)
    for folder, images in groups.items():
        uid, *others = sorted(uids[folder])
        if uid and not others and folders_of[uid] == 1:
            yield images, ()
            continue
        folder_uid = f"{FOLDER_UID_PREFIX}{hashlib.sha256(os.fsencode(folder[1:])).hexdigest()[:16]}"
        shared_uids = [uid for uid in uids[folder] if uid and folders_of[uid] > 1]
        what = "images of its Series Instance UID lie in other folders too, and --group-by folder parts them"
        notes = (SeriesWarning("spread", what),) if shared_uids else ()
        yield [image._replace(series_uid=folder_uid, header=_with_uid(image)) for image in images], notes


def _with_warnings(volumes: list[Series], notes: tuple[SeriesWarning, ...]) -> list[Series]:
    return [replace(v, warnings=(*v.warnings, *notes)) for v in volumes] if notes else volumes


def _with_uid(image: Image) -> SliceHeader:
    uid = hashlib.sha256(image.series_uid.encode()).hexdigest()[:16] if image.series_uid else ""
    return image.header._replace(other=f"{image.header.other} {packed([('uid', uid)])}".strip())


def _with_alone_counts(series: list[Series]) -> list[Series]:
    """Set `alone` of series of one image to the number of such series in their folder."""
    alone = Counter(s.folder for s in series if len(s.slices) == 1)
    return [
        replace(s, alone=n) if len(s.slices) == 1 and (n := alone[s.folder]) >= MIN_STACK_SLICES else s for s in series
    ]


def _series(images: list[Image], rules: Rules) -> list[Series]:
    """Return the volumes of one UID, split by study and patient, then by geometry and acquisition."""
    by_owner, unassigned, notes = split_by_owner(images)
    volumes = []
    for n, owned in enumerate(by_owner):
        first, *others = _volumes(owned, rules)
        if n == 0 and unassigned:
            first = _with_left_out(first, unassigned)
        volumes += [first, *others]
    if notes:
        volumes = [replace(v, irregularities=(*notes, *v.irregularities)) for v in volumes]
    return volumes if len(volumes) == 1 else [replace(v, part=n) for n, v in enumerate(volumes, 1)]


def _volumes(images: list[Image], rules: Rules) -> list[Series]:
    """Return the volumes of one study and patient, split by geometry and acquisition."""
    non_slices = _non_slices(images)
    excluded = {id(image) for image, _ in non_slices}
    slices = [image for image in images if id(image) not in excluded]
    frames = _separating_ids(image.frame_of_reference_uid for image in slices)
    stack_ids = _separating_ids(image.header.stack_id for image in slices)
    stacks = _group_into_stacks(slices, frames, stack_ids)
    main, *others = stacks
    large = [
        stacked
        for stacked in others
        if len(stacked) >= MIN_STACK_SLICES and not _missing_attribute(stacked[0], main[0])
    ]
    non_slices += [(i, _difference(i, main[0], frames)) for small in others if small not in large for i in small]

    volumes = [_as_series(stacked) for stacked in (main, *large)]
    if large:
        volumes = [_with_mixed_note(volume, len(volumes), bool(stack_ids)) for volume in volumes]
    if non_slices:
        volumes[0] = _with_left_out(volumes[0], non_slices)
    return [
        part
        for volume, stacked in zip(volumes, (main, *large), strict=True)
        for part in _described(split_acquisitions(volume, rules), stacked)
    ]


def _described(parts: list[Series], images: list[Image]) -> Iterator[Series]:
    """Yield the parts of a stack, each with the description of its own images, not of those that were left out."""
    for part in parts:
        own = images
        if len(part.slices) < len(images):
            kept = {id(header) for header in part.slices}
            own = [image for image in images if id(image.header) in kept]
        yield replace(part, **described(own))


def _separating_ids(values: Iterable[str]) -> frozenset[str]:
    """Return the UIDs or IDs by which stacks are separated; none, unless two have enough images each for a stack.

    Some anonymisers give every file its own frame of reference, which then is no criterion. Absent values, and rare
    malformed ones, never are.
    """
    counts = Counter(values)
    if sum(count >= MIN_STACK_SLICES for value, count in counts.items() if value) < 2:
        return frozenset()
    return frozenset(
        value
        for value, count in counts.items()
        if value and (count >= MIN_STACK_SLICES or not value.startswith(MALFORMED_UID_PREFIX))
    )


DIRECTION_ATOL = 1e-3
"""Largest difference of direction cosines within one stack: 0.06°."""

DIRECTION_WEIGHTS = tuple(w / (30 * DIRECTION_ATOL) for w in (1, 2, 3, 5, 7, 11))
"""Weights of cosines: the weighted sums of directions that are equal within `DIRECTION_ATOL` differ by less than 1."""


def _group_into_stacks(slices: list[Image], frames: frozenset[str], stack_ids: frozenset[str]) -> list[list[Image]]:
    """Return slices grouped into stacks, the largest stack first.

    A slice without frame of reference or Stack ID is assigned by geometry, or by its folder, if that is unambiguous.
    """

    def ids_of(image: Image) -> tuple[str, str]:
        frame, stack_id = image.frame_of_reference_uid, image.header.stack_id
        return frame if frame in frames else "", stack_id if stack_id in stack_ids else ""

    complete: list[Image] = []
    incomplete: list[Image] = []
    for image in slices:
        frame, stack_id = ids_of(image)
        (incomplete if (frames and not frame) or (stack_ids and not stack_id) else complete).append(image)
    stacks = _Stacks()
    for image in complete:
        stacks.add(image, ids_of(image))
    if incomplete:
        folders = [{image.folder for image in stacked} for stacked in stacks.all]
        order = {id(image): n for n, image in enumerate(slices)}
        known = len(stacks.all)
        for image in incomplete:
            ids = ids_of(image)
            matching = [n for n in range(known) if stacks.fits(image, n, ids)]
            if len(matching) > 1:
                matching = [n for n in matching if image.folder in folders[n]]
            if len(matching) == 1:
                stacks.all[matching[0]].append(image)
            else:
                stacks.add(image, ids)
        for stacked in stacks.all:
            stacked.sort(key=lambda image: order[id(image)])
    return sorted(stacks.all, key=lambda stacked: (-len(stacked), _path(stacked[0])))


class _Stacks:
    """Stacks of slices with equal matrix, spacing, direction and IDs, filled slice by slice."""

    def __init__(self) -> None:
        self.all: list[list[Image]] = []
        self._ids: list[tuple[str, str]] = []
        self._by_exact_key: dict[tuple[object, ...], list[Image]] = {}
        self._by_bin: dict[tuple[object, ...], list[int]] = defaultdict(list)
        """Indices of stacks by IDs, matrix and binned direction, so that few stacks are compared."""

    def add(self, image: Image, ids: tuple[str, str]) -> None:
        """Add a slice to the first stack that it fits, or to a new one; `ids`: see `fits`."""
        exact = (ids, image.rows, image.columns, image.pixel_spacing_mm, image.orientation)
        if (stacked := self._by_exact_key.get(exact)) is None:
            bins: list[int | None] = [None]
            if image.orientation is not None:
                cosines = (max(-1.0, min(x, 1.0)) for x in image.orientation)  # damaged cosines may be any number
                bin_ = math.floor(sum(w * x for w, x in zip(DIRECTION_WEIGHTS, cosines, strict=True)))
                bins = [bin_, bin_ - 1, bin_ + 1]
            keys = [(ids, image.rows, image.columns, b) for b in bins]
            near = sorted(n for key in keys for n in self._by_bin.get(key, ()))
            n = next((n for n in near if self.fits(image, n, ids)), len(self.all))
            if n == len(self.all):
                self.all.append([])
                self._ids.append(ids)
                self._by_bin[keys[0]].append(n)
            stacked = self._by_exact_key[exact] = self.all[n]
        stacked.append(image)

    def fits(self, image: Image, n: int, ids: tuple[str, str]) -> bool:
        """Whether a slice fits a stack; `ids`: its frame of reference and Stack ID, "" for one that is no criterion."""
        agree = all(a in ("", b) for a, b in zip(ids, self._ids[n], strict=True))
        return agree and _same_stack(image, self.all[n][0])


def _with_mixed_note(volume: Series, count: int, by_stack_id: bool) -> Series:
    """Return one of several stacks of a series with a "mixed" irregularity."""
    unlike = "matrix, spacing, orientation" + (
        ", frame of reference or Stack ID" if by_stack_id else " or frame of reference"
    )
    what = f"{count} stacks unlike in {unlike} share a series"
    stack_id = volume.slices[0].stack_id
    note = f"; this one has Stack ID {stack_id}" if by_stack_id and stack_id.isdigit() else ""
    return replace(volume, irregularities=(Irregularity("mixed", what + note, SEVERAL_VOLUMES_ACTION),))


def _with_left_out(volume: Series, non_slices: list[tuple[Image, str]]) -> Series:
    """Return a volume with a record of the images that were left out."""
    named = first_few([f"{image.header.name} ({why})" for image, why in non_slices])
    return volume.without(
        ((image.header, why) for image, why in non_slices), f"{len(non_slices)} images are no slices: {named}"
    )


def _path(image: Image) -> str:
    return image.header.path


def _non_slices(images: list[Image]) -> list[tuple[Image, str]]:
    """Return images that are not slices, with reasons; none if all are, so that the series is judged as a whole."""
    primary = sum(not image.header.secondary for image in images) > len(images) / 2
    hu = any(image.header.rescale_type in (None, "HU") for image in images)
    non_slices = [(image, why) for image in images if (why := _non_slice_reason(image, primary, hu))]
    return non_slices if len(non_slices) < len(images) else []


def _non_slice_reason(image: Image, primary: bool, hu: bool) -> str:
    """Return why an image is not a slice, or "". `primary`: most images of the series are; `hu`: some are in HU."""
    if image.header.localizer:
        return "localizer"
    if image.header.samples_per_pixel != 1:
        return "colour"
    if hu and image.header.rescale_type in MATERIAL_MAPS:
        return "material map"
    return "secondary image" if image.header.secondary and primary else ""


def _missing_attribute(image: Image, other: Image) -> str:
    """Return which attribute an image lacks for a comparison with `other`, or "": it may be of the same stack."""
    if not (image.rows and image.columns):
        return MISSING_GEOMETRY[0]
    if (image.rows, image.columns) != (other.rows, other.columns):
        return ""
    if image.orientation is None:
        return MISSING_GEOMETRY[1]
    return MISSING_GEOMETRY[2] if image.pixel_spacing_mm is None else ""


def _same_stack(a: Image, b: Image) -> bool:
    """Whether two slices have equal matrices, spacing within 0.1 % and directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(
        a.orientation, b.orientation, atol=DIRECTION_ATOL
    )


def _difference(a: Image, b: Image, frames: frozenset[str]) -> str:
    """Return how an image differs from slice `b` of a stack; `frames`: frames of reference that separate stacks."""
    if missing := _missing_attribute(a, b):
        return missing
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


def _as_series(images: list[Image]) -> Series:
    """Return the images of one stack as a series."""
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
        patient=first.patient,
    )


def _most_frequent(values: Iterable[str]) -> str:
    """Return the most frequent value, the first of several; "" if all are empty."""
    counts = Counter(value for value in values if value)
    return max(counts, key=counts.__getitem__, default="")
