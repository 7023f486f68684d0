"""Parts acquisitions of one series that lie in one place or between each other; each becomes a volume."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few
from gpuprep.core.series import Series, SliceHeader, unpacked
from gpuprep.core.stacking_rules import EACH_A_VOLUME, SMALLEST_PART, Irregularity, Rules
from gpuprep.dicom.acquisition_keys import ACQUISITION, EXPLICIT, LAST_RESORT, Key
from gpuprep.dicom.header_checks import check
from gpuprep.dicom.read import are_copies
from gpuprep.dicom.slice_places import position_tolerance_mm
from gpuprep.dicom.stack import acquisition, along_normal_mm, same_image, stack
from gpuprep.errors import InputError

JUMP = 4.5
"""So many times the usual step from image to image ends a run of slices."""

MOST_KEYS = 3
"""So many attributes together may tell acquisitions apart."""


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

    def sorted_out(self, groups: Groups) -> tuple[Groups, Groups]:
        """Return the groups of enough positions to be a stack, and the others."""
        large: Groups = []
        small: Groups = []
        for group in groups:
            (large if len({int(self.place[n]) for n in group}) >= SMALLEST_PART else small).append(group)
        return large, small

    def explained_by(self, large: Groups, small: Groups) -> bool:
        """Whether large groups have more images than there are positions in small ones.

        Many images at one position, as of a bolus that is watched there, are one slice that belongs to no stack.
        """
        return sum(map(len, large)) > len({int(self.place[n]) for group in small for n in group})

    def take_turns(self, groups: Groups) -> bool:
        """Whether the slices of evenly spaced groups follow each other in turn, as far as they are there."""
        steps_mm = [np.median(np.diff(self.along_mm[group][np.argsort(self.along_mm[group])])) for group in groups]
        expected_mm = len(groups) * np.median(self.gaps_mm)
        return len(groups) > 1 and all(abs(step_mm - expected_mm) <= self.tolerance_mm for step_mm in steps_mm)

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
        turned: list[int] = []
        direction = 0
        for (before, n), step_mm in zip(pairwise(order), steps_mm, strict=True):
            step = int(np.sign(self.place[n] - self.place[before]))
            if step == 0 or step == -direction or step_mm > farthest_mm:
                if step and step_mm <= farthest_mm:
                    turned.append(len(runs))
                runs.append([])
                step = 0
            runs[-1].append(int(n))
            direction = step
        for k in turned:
            if self._turns_before(runs[k - 1], runs[k]):
                runs[k].insert(0, runs[k - 1].pop())
        return runs if min(map(len, runs)) >= SMALLEST_PART else []

    def _turns_before(self, run: list[int], following: list[int]) -> bool:
        """Whether the last slice of a run, where numbers turn back, is the first of the run that follows.

        It belongs where it is a usual step away; if it is from both, to the one that is then as long as the other.
        """
        if len(run) < SMALLEST_PART or len(following) < SMALLEST_PART - 1:
            return False
        before, after = (np.diff(self.along_mm[slices]) for slices in (run, following))
        step_mm = self.along_mm[following[0]] - self.along_mm[run[-1]]
        if step_mm * after[0] <= 0:
            return False
        odd_before = abs(before[-1] - np.median(before[:-1]))
        odd_after = abs(step_mm - np.median(after))
        if abs(odd_before - odd_after) > self.tolerance_mm:
            return bool(odd_after < odd_before)
        return len(run) - 1 == len(following) + 1


def acquisitions(volume: Series, rules: Rules) -> list[Series]:
    """Return the acquisitions that lie in the same place, each as a volume; the volume itself where it holds but one.

    They share positions, or lie between each other: slices of two scans 2.5 mm apart then look like one of 1.25 mm, or
    like one of uneven spacing. Acquisitions that follow each other along the normal are one volume.
    """
    _, *others = {(acquisition(s), s.other, s.frames > 1 and s.path) for s in volume.slices}
    if not others or (layout := _Layout.of(volume, rules)) is None or not len(layout.gaps_mm):
        return [volume]
    everywhere = np.ones(len(layout.gaps_mm), dtype=bool)
    if not layout.repeated and layout.is_even(everywhere, 0) and layout.counted_through():
        found = _best(layout, _candidates(layout, {name: ACQUISITION[name] for name in EXPLICIT}, 1), rules)
        return _told(volume, found[2], found[0], rules) if found else [volume]
    runs = layout.runs()
    if found := _best(layout, _candidates(layout, ACQUISITION, MOST_KEYS if layout.crowded else 1), rules):
        names, groups, parts = found
        if _joins(runs, groups) and (joined := _apart(layout, runs, rules, sharing=layout.crowded)):
            names, parts = (*names, "instance number"), joined
        return _told(volume, parts, names, rules)
    for name in ("acquisition number", "acquisition time"):
        groups = _grouped(volume, [ACQUISITION[name]])
        if _joins(runs, groups) and (parts := _apart(layout, runs, rules, sharing=layout.crowded)):
            return _told(volume, parts, (name, "instance number"), rules)
    found = _best(layout, _candidates(layout, LAST_RESORT | _dimensions(volume), MOST_KEYS), rules, last_resort=True)
    if not found or sum(len(part.slices) for part in found[2]) < len(volume.slices):
        return [volume]
    names, _, parts = found
    parts = _with_their_copies(layout, parts, rules)
    return _told(volume, parts, names, rules) if len(parts) > 1 else [volume]


def _with_their_copies(layout: _Layout, parts: list[Series], rules: Rules) -> list[Series]:
    """Return volumes together with those that hold nothing but copies of their images, which `stack` drops then.

    What varies between copies of an image, as its Content Time, varies between acquisitions too: pixels have to tell.
    """
    place = {id(s): int(place) for s, place in zip(layout.volume.slices, layout.place, strict=True)}
    order = {id(s): n for n, s in enumerate(layout.volume.slices)}
    whole: list[tuple[Series, list[SliceHeader]]] = []
    for part in parts:
        for original, copies in whole:
            lying = {place[id(s)]: s for s in original.slices}
            pairs = [(lying[place[id(s)]], s) for s in part.slices if place[id(s)] in lying]
            if (
                len(pairs) == len(part.slices)
                and _is_accepted(original, rules)
                and _is_accepted(part, rules)
                and are_copies(pairs, (part.rows, part.columns))
            ):
                copies += part.slices
                break
        else:
            whole.append((part, []))
    joined = [
        replace(original, slices=tuple(sorted((*original.slices, *copies), key=lambda s: order[id(s)])))
        for original, copies in whole
    ]
    return sorted(joined, key=lambda part: -len(part.slices))


def _is_accepted(part: Series, rules: Rules) -> bool:
    """Whether the headers of a volume let its pixels be read."""
    try:
        check(part, rules)
    except InputError:
        return False
    return True


Candidate = tuple[tuple[str, ...], Groups]
"""Names of attributes, and the groups that they make."""


def _candidates(layout: _Layout, keys: Mapping[str, Key], most: int) -> Iterator[Candidate]:
    """Yield the groups that each attribute makes, then two of them together, up to `most`."""
    volume = layout.volume
    telling = {name: groups for name, key in keys.items() if len(groups := _grouped(volume, [key])) > 1}
    # More attributes make smaller groups: one that makes groups of a slice or two is of no use.
    useful = [name for name, groups in telling.items() if layout.explained_by(*layout.sorted_out(groups))]
    for count in range(1, most + 1):
        for names in combinations(useful, count):
            yield names, telling[names[0]] if count == 1 else _grouped(volume, [keys[name] for name in names])


def _grouped(volume: Series, keys: Sequence[Key]) -> Groups:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, s in enumerate(volume.slices):
        groups[tuple(key.of(s) for key in keys)].append(n)
    return list(groups.values())


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
        if parts := _apart(layout, groups, rules, sharing=sharing, names=names, last_resort=last_resort):
            if sum(len(part.slices) for part in parts) == len(layout.volume.slices):
                return names, groups, parts
            most = most or (names, groups, parts)
    return most


def _apart(
    layout: _Layout,
    groups: Groups,
    rules: Rules,
    *,
    sharing: bool,
    names: tuple[str, ...] = (),
    last_resort: bool = False,
) -> list[Series]:
    """Return groups of slices as volumes, if that explains them; else none.

    Each has to be a stack. Where slices share positions, most have to be in one: an acquisition that was broken off, or
    lacks slices, must not cost the others; it is left out, or judged by itself. Where they lie between each other, all
    have to, but for a few that lie inside of a regular stack. If slices are evenly spaced together, they may be one
    stack: then groups have to be told by values that are there, and be without gaps or take turns; and slices must not
    be counted through, unless `names` of attributes are explicit.
    """
    volume = layout.volume
    groups = sorted(groups, key=lambda g: (-len(g), min(_rank(volume.slices[n]) for n in g)))
    large, small = layout.sorted_out(groups)
    parts = [
        replace(
            volume, slices=tuple(volume.slices[n] for n in group), left_out=(), left_out_digests=(), irregularities=()
        )
        for group in large
    ]
    if not layout.explained_by(large, small):
        return []
    if last_resort and any(layout.repeats(group) for group in groups):
        return []
    if sharing:
        places = {(int(layout.place[n]), k) for k, group in enumerate(groups) for n in group}
        watched = any(len(group) >= SMALLEST_PART for group in small)
        if not watched and len(places) == len({place for place, _ in places}):
            return []  # they follow each other: something else is doubled
        stacks = [_found(part, rules) is not None for part in parts]
        sound = [group for group, is_stack in zip(large, stacks, strict=True) if is_stack]
        unsound = [group for group, is_stack in zip(large, stacks, strict=True) if not is_stack]
        if sum(map(len, sound)) <= sum(map(len, unsound)) or not layout.explained_by(sound, small):
            return []
    else:
        among = layout.overlapping(groups)
        even = layout.is_even(among, rules.max_missing_share)
        everywhere = np.ones(len(among), dtype=bool)
        explicit = bool(names) and all(name in EXPLICIT for name in names)
        counted = layout.counted_through() and layout.is_even(everywhere, rules.max_missing_share)
        one = last_resort or (counted and not explicit) or not _says(volume, large, names)
        if not among.any() or (even and one):
            return []
        turns = even and layout.take_turns(large)
        if small and ((even and not turns) or not layout.inside(small, large, rules.max_missing_share)):
            return []
        found = [_found(part, rules) for part in parts]
        odd = {"uneven"} if turns else {"gap", "uneven"}
        if None in found or ((even or small) and any(odd & (codes or set()) for codes in found)):
            return []
    kept = tuple(note for note in volume.irregularities if note.code != "left-out")
    first, *more = parts
    first = replace(
        first,
        left_out=volume.left_out,
        left_out_digests=volume.left_out_digests,
        irregularities=volume.irregularities,
    )
    if others := [volume.slices[n] for group in small for n in group]:
        what = f"{len(others)} images are of other acquisitions: {first_few([s.name for s in others])}"
        first = first.without(((s, "other acquisition") for s in others), what)
    return [first, *(replace(part, irregularities=kept) for part in more)]


def _says(volume: Series, groups: Groups, names: tuple[str, ...]) -> bool:
    """Whether every group has a value of every attribute that is one of acquisitions: one that is absent says nothing.

    All slices of a group have the same.
    """
    keys = [key for name in names if (key := ACQUISITION.get(name))]
    return all(key.of(volume.slices[group[0]]) not in (None, "") for group in groups for key in keys)


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
    done = EACH_A_VOLUME if len(parts) > 1 else "one of them is a volume"
    told = []
    for part in parts:
        note = Irregularity("acquisitions", what + _which(part, names), done)
        told.append(replace(part, irregularities=(*part.irregularities, note)))
    # What one attribute tells apart may still be several by another.
    return [piece for part in told for piece in acquisitions(part, rules)] if len(told) > 1 else told


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
