"""Splits a series into one volume per acquisition where acquisitions share positions or interleave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few
from gpuprep.core.series import Series, SliceHeader, unpacked
from gpuprep.core.stacking_rules import MIN_STACK_SLICES, SEVERAL_VOLUMES_ACTION, Irregularity, Rules
from gpuprep.dicom.acquisition_keys import ACQUISITION, EXPLICIT, LAST_RESORT, Key
from gpuprep.dicom.copies import are_copies
from gpuprep.dicom.header_checks import check
from gpuprep.dicom.slice_positions import position_tolerance_mm
from gpuprep.dicom.stack import acquisition_attributes, along_normal_mm, same_image, stack
from gpuprep.errors import InputError

JUMP_FACTOR = 4.5
"""A run of slices ends at a step of more than this many times the median."""

MAX_COMBINED_KEYS = 3
"""Largest number of attributes that are combined to separate acquisitions."""


Groups = list[list[int]]
"""Indices into the slices of the volume, one list per group."""


@dataclass(frozen=True, slots=True, eq=False)
class _SlicePositions:
    """Positions of the slices of a volume along their normal."""

    volume: Series
    along_mm: NDArray[np.float64]
    """Position of each slice along the normal, in the order of the volume, shape (n,)."""
    position_index: NDArray[np.int_]
    """Ordinal of each slice's position along the normal, from 0; images within the tolerance share one. Shape (n,)."""
    gaps_mm: NDArray[np.float64]
    """Distance from each position to the next, shape (positions − 1,)."""
    tolerance_mm: float
    """Gaps that differ by no more than this count as equal."""
    acquisitions_share_position: bool
    """Whether images of different acquisitions share a position, according to their headers."""
    instances_share_position: bool
    """Whether different instances or frames share a position."""

    @classmethod
    def of(cls, volume: Series, rules: Rules) -> _SlicePositions | None:
        """Return the positions; None if a slice lacks one or the orientation is unusable."""
        if any(s.position_mm is None for s in volume.slices):
            return None
        try:
            along_mm = along_normal_mm(volume)
        except InputError:
            return None
        order = np.argsort(along_mm, kind="stable")
        gaps = np.diff(along_mm[order])
        nearest = position_tolerance_mm(volume, rules)
        new = gaps > nearest
        position_index = np.empty(len(along_mm), dtype=int)
        position_index[order] = np.concatenate([[0], np.cumsum(new)])
        distinct_acquisitions = distinct_instances = False
        for n in np.flatnonzero(~new):
            a, b = volume.slices[order[n]], volume.slices[order[n + 1]]
            distinct_acquisitions = distinct_acquisitions or not same_image(a, b)
            distinct_instances = distinct_instances or (a.sop_instance_uid, a.frame) != (b.sop_instance_uid, b.frame)
        typical = float(np.median(gaps[new])) if new.any() else 0.0
        tolerance_mm = max(nearest, rules.spacing_tolerance * typical)
        return cls(volume, along_mm, position_index, gaps[new], tolerance_mm, distinct_acquisitions, distinct_instances)

    def overlapping(self, groups: Groups) -> NDArray[np.bool_]:
        """Return which gaps lie within the extents of at least two groups: array of bool, shape (gaps,)."""
        covered = np.zeros(len(self.gaps_mm) + 1, dtype=int)
        for group in groups:
            low, high = int(self.position_index[group].min()), int(self.position_index[group].max())
            if low == high:  # the extent of a single slice reaches to its neighbours
                low, high = max(0, low - 1), min(len(self.gaps_mm), high + 1)
            covered[low] += 1
            covered[high] -= 1
        return np.cumsum(covered)[:-1] > 1

    def is_even(self, among: NDArray[np.bool_], fraction: float) -> bool:
        """Whether the selected gaps equal the median of all gaps, apart from a fraction of them."""
        odd = np.abs(self.gaps_mm[among] - np.median(self.gaps_mm)) > self.tolerance_mm
        return bool(odd.sum() <= fraction * len(odd))

    def lie_within(self, small: Groups, large: Groups, fraction: float) -> bool:
        """Whether small groups hold at most a fraction of all slices, all strictly inside extents of large groups."""
        extents = [(self.position_index[group].min(), self.position_index[group].max()) for group in large]
        indices = [self.position_index[n] for group in small for n in group]
        return len(indices) <= fraction * len(self.position_index) and all(
            any(low < index < high for low, high in extents) for index in indices
        )

    def by_size(self, groups: Groups) -> tuple[Groups, Groups]:
        """Return the groups with enough positions for a stack, and the smaller ones."""
        large: Groups = []
        small: Groups = []
        for group in groups:
            (large if len({int(self.position_index[n]) for n in group}) >= MIN_STACK_SLICES else small).append(group)
        return large, small

    def has_mostly_large(self, large: Groups, small: Groups) -> bool:
        """Whether large groups have more images than small ones have positions.

        Many images at one position, as in bolus tracking, count as one slice that belongs to no stack.
        """
        return sum(map(len, large)) > len({int(self.position_index[n]) for group in small for n in group})

    def alternate(self, groups: Groups) -> bool:
        """Whether the groups alternate: the median spacing of each is the number of groups times that of all slices."""
        steps_mm = [np.median(np.diff(self.along_mm[group][np.argsort(self.along_mm[group])])) for group in groups]
        expected_mm = len(groups) * np.median(self.gaps_mm)
        return len(groups) > 1 and all(abs(step_mm - expected_mm) <= self.tolerance_mm for step_mm in steps_mm)

    def repeats(self, group: list[int]) -> bool:
        """Whether different instances or frames of a group share a position."""
        images = {(self.volume.slices[n].sop_instance_uid, self.volume.slices[n].frame) for n in group}
        return len({int(self.position_index[n]) for n in group}) < len(images)

    def numbered_in_order(self) -> bool:
        """Whether *Instance Number* or *In-Stack Position Number* follows the positions, as in a single stack."""
        order = np.argsort(self.position_index, kind="stable")
        for numbers in ([s.instance_number for s in self.volume.slices], [s.in_stack for s in self.volume.slices]):
            if None not in numbers:
                steps = np.diff(np.array(numbers, dtype=np.int64)[order])
                if (steps > 0).all() or (steps < 0).all():
                    return True
        return False

    def runs(self) -> Groups:
        """Return runs of slices in the order of instance numbers.

        A run ends where the direction reverses, the position repeats, or a step is wider than missing slices explain.
        The list is empty if a number is absent or repeated, or if a run is too short for a stack.
        """
        numbers = [s.instance_number for s in self.volume.slices]
        if None in numbers or len(set(numbers)) < len(numbers):
            return []
        order = np.argsort(np.array(numbers, dtype=np.int64))
        steps_mm = np.abs(np.diff(self.along_mm[order]))
        farthest_mm = JUMP_FACTOR * np.median(steps_mm)
        runs: Groups = [[int(order[0])]]
        reversals: list[int] = []
        direction = 0
        for (before, n), step_mm in zip(pairwise(order), steps_mm, strict=True):
            step = int(np.sign(self.position_index[n] - self.position_index[before]))
            if step == 0 or step == -direction or step_mm > farthest_mm:
                if step and step_mm <= farthest_mm:
                    reversals.append(len(runs))
                runs.append([])
                step = 0
            runs[-1].append(int(n))
            direction = step
        for k in reversals:
            if self._last_starts_following(runs[k - 1], runs[k]):
                runs[k].insert(0, runs[k - 1].pop())
        return runs if min(map(len, runs)) >= MIN_STACK_SLICES else []

    def _last_starts_following(self, run: list[int], following: list[int]) -> bool:
        """Whether the last slice before a reversal of direction belongs to the run after it.

        It belongs to the run to which its step fits better; if both fit, to the one that makes the runs equally long.
        """
        if len(run) < MIN_STACK_SLICES or len(following) < MIN_STACK_SLICES - 1:
            return False
        before, after = (np.diff(self.along_mm[slices]) for slices in (run, following))
        step_mm = self.along_mm[following[0]] - self.along_mm[run[-1]]
        if step_mm * after[0] <= 0:
            return False
        deviation_before = abs(before[-1] - np.median(before[:-1]))
        deviation_after = abs(step_mm - np.median(after))
        if abs(deviation_before - deviation_after) > self.tolerance_mm:
            return bool(deviation_after < deviation_before)
        return len(run) - 1 == len(following) + 1


def split_acquisitions(volume: Series, rules: Rules) -> list[Series]:
    """Return one volume per acquisition where acquisitions overlap; otherwise the volume itself.

    Acquisitions overlap if they share positions or interleave: slices of two scans with a spacing of 2.5 mm then look
    like one scan with 1.25 mm, or with uneven spacing. Acquisitions that follow each other along the normal stay one
    volume.
    """
    _, *others = {(acquisition_attributes(s), s.other, s.frames > 1 and s.path) for s in volume.slices}
    if not others or (positions := _SlicePositions.of(volume, rules)) is None or not len(positions.gaps_mm):
        return [volume]
    all_gaps = np.ones(len(positions.gaps_mm), dtype=bool)
    if not positions.instances_share_position and positions.is_even(all_gaps, 0) and positions.numbered_in_order():
        found = _best_split(positions, _groupings(positions, {name: ACQUISITION[name] for name in EXPLICIT}, 1), rules)
        return _annotated(volume, found[2], found[0], rules) if found else [volume]
    runs = positions.runs()
    shared = positions.acquisitions_share_position
    groupings = _groupings(positions, ACQUISITION, MAX_COMBINED_KEYS if shared else 1)
    if found := _best_split(positions, groupings, rules):
        names, groups, parts = found
        if _runs_merge_groups(runs, groups) and (joined := _split(positions, runs, rules, shared=shared)):
            names, parts = (*names, "instance number"), joined
        return _annotated(volume, parts, names, rules)
    for name in ("acquisition number", "acquisition time"):
        groups = _grouped(volume, [ACQUISITION[name]])
        if _runs_merge_groups(runs, groups) and (parts := _split(positions, runs, rules, shared=shared)):
            return _annotated(volume, parts, (name, "instance number"), rules)
    groupings = _groupings(positions, LAST_RESORT | _dimensions(volume), MAX_COMBINED_KEYS)
    found = _best_split(positions, groupings, rules, last_resort=True)
    if not found or sum(len(part.slices) for part in found[2]) < len(volume.slices):
        return [volume]
    names, _, parts = found
    parts = _merge_copies(positions, parts, rules)
    return _annotated(volume, parts, names, rules) if len(parts) > 1 else [volume]


def _merge_copies(positions: _SlicePositions, parts: list[Series], rules: Rules) -> list[Series]:
    """Merge each volume that only repeats images of another into that one; `stack` then drops the repeats.

    Attributes such as Content Time vary between copies and between acquisitions alike, so the pixels are compared.
    """
    index_of = {id(s): int(n) for s, n in zip(positions.volume.slices, positions.position_index, strict=True)}
    order = {id(s): n for n, s in enumerate(positions.volume.slices)}
    whole: list[tuple[Series, list[SliceHeader]]] = []
    for part in parts:
        for original, copies in whole:
            by_index = {index_of[id(s)]: s for s in original.slices}
            pairs = [(by_index[index_of[id(s)]], s) for s in part.slices if index_of[id(s)] in by_index]
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
    """Whether a volume passes the header checks, so that its pixels can be read."""
    try:
        check(part, rules)
    except InputError:
        return False
    return True


Grouping = tuple[tuple[str, ...], Groups]
"""Names of attributes, and the groups of slices with equal values of them."""


def _groupings(positions: _SlicePositions, keys: Mapping[str, Key], max_keys: int) -> Iterator[Grouping]:
    """Yield the groups by each attribute, then by combinations of up to `max_keys` attributes."""
    volume = positions.volume
    separating = {name: groups for name, key in keys.items() if len(groups := _grouped(volume, [key])) > 1}
    # Combinations only make groups smaller, so an attribute that leaves groups of one or two slices is dropped.
    useful = [name for name, groups in separating.items() if positions.has_mostly_large(*positions.by_size(groups))]
    for count in range(1, max_keys + 1):
        for names in combinations(useful, count):
            yield names, separating[names[0]] if count == 1 else _grouped(volume, [keys[name] for name in names])


def _grouped(volume: Series, keys: Sequence[Key]) -> Groups:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, s in enumerate(volume.slices):
        groups[tuple(key.value(s) for key in keys)].append(n)
    return list(groups.values())


def _dimensions(volume: Series) -> dict[str, Key]:
    """Return a key for each of the *Dimension Index Values*; none unless all images have the same number of them."""
    counts = {unpacked(s.other, "index").count(",") for s in volume.slices if s.frames > 1 and "index=" in s.other}
    if len(counts) != 1 or any("index=" not in s.other for s in volume.slices):
        return {}
    return {
        f"dimension index {n + 1}": Key(lambda s, n=n: unpacked(s.other, "index").split(",")[n], "")  # type: ignore[misc]
        for n in range(counts.pop() + 1)
    }


def _runs_merge_groups(runs: Groups, groups: Groups) -> bool:
    """Whether each group lies within one run of instance numbers, and there are several runs but fewer than groups."""
    run_of = {n: k for k, run in enumerate(runs) for n in run}
    return 1 < len(runs) < len(groups) and all(len({run_of[n] for n in group}) == 1 for group in groups)


def _best_split(
    positions: _SlicePositions, groupings: Iterable[Grouping], rules: Rules, *, last_resort: bool = False
) -> tuple[tuple[str, ...], Groups, list[Series]] | None:
    """Return the first grouping that assigns every slice to a volume, else the first that splits the slices at all."""
    best = None
    shared = positions.instances_share_position if last_resort else positions.acquisitions_share_position
    for names, groups in groupings:
        if parts := _split(positions, groups, rules, shared=shared, names=names, last_resort=last_resort):
            if sum(len(part.slices) for part in parts) == len(positions.volume.slices):
                return names, groups, parts
            best = best or (names, groups, parts)
    return best


def _split(
    positions: _SlicePositions,
    groups: Groups,
    rules: Rules,
    *,
    shared: bool,
    names: tuple[str, ...] = (),
    last_resort: bool = False,
) -> list[Series]:
    """Return the groups as volumes if they plausibly are acquisitions; otherwise an empty list.

    If positions are shared, most slices have to be in groups that form stacks. An acquisition that was aborted or lacks
    slices does not spoil the others: it is left out, or judged by itself. If groups interleave, all have to form
    stacks, apart from a few slices inside the extent of a regular stack. Slices that are evenly spaced together may be
    one stack. They are split only if every group has values of the attributes `names`, groups have no gaps or
    alternate, and instance numbers do not follow the positions; explicit attributes override the last condition.
    """
    volume = positions.volume
    groups = sorted(groups, key=lambda g: (-len(g), min(_sort_key(volume.slices[n]) for n in g)))
    large, small = positions.by_size(groups)
    parts = [
        replace(
            volume, slices=tuple(volume.slices[n] for n in group), left_out=(), left_out_digests=(), irregularities=()
        )
        for group in large
    ]
    if not positions.has_mostly_large(large, small):
        return []
    if last_resort and any(positions.repeats(group) for group in groups):
        return []
    if shared:
        occupied = {(int(positions.position_index[n]), k) for k, group in enumerate(groups) for n in group}
        repeated_slice = any(len(group) >= MIN_STACK_SLICES for group in small)
        if not repeated_slice and len(occupied) == len({index for index, _ in occupied}):
            return []  # no position holds two groups: the attributes do not separate the images that share one
        stacks = [_irregularity_codes(part, rules) is not None for part in parts]
        sound = [group for group, is_stack in zip(large, stacks, strict=True) if is_stack]
        unsound = [group for group, is_stack in zip(large, stacks, strict=True) if not is_stack]
        if sum(map(len, sound)) <= sum(map(len, unsound)) or not positions.has_mostly_large(sound, small):
            return []
    else:
        among = positions.overlapping(groups)
        even = positions.is_even(among, rules.max_missing_share)
        all_gaps = np.ones(len(among), dtype=bool)
        explicit = bool(names) and all(name in EXPLICIT for name in names)
        counted = positions.numbered_in_order() and positions.is_even(all_gaps, rules.max_missing_share)
        single_stack = last_resort or (counted and not explicit) or not _has_all_values(volume, large, names)
        if not among.any() or (even and single_stack):
            return []
        alternating = even and positions.alternate(large)
        if small and ((even and not alternating) or not positions.lie_within(small, large, rules.max_missing_share)):
            return []
        found = [_irregularity_codes(part, rules) for part in parts]
        odd = {"uneven"} if alternating else {"gap", "uneven"}
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


def _has_all_values(volume: Series, groups: Groups, names: tuple[str, ...]) -> bool:
    """Whether every group has a value for each named attribute of `ACQUISITION`.

    All slices of a group have equal values, so its first slice stands for it.
    """
    keys = [key for name in names if (key := ACQUISITION.get(name))]
    return all(key.value(volume.slices[group[0]]) not in (None, "") for group in groups for key in keys)


def _sort_key(s: SliceHeader) -> tuple[int, str, int]:
    return s.instance_number or 0, s.path, s.frame


def _irregularity_codes(part: Series, rules: Rules) -> set[str] | None:
    """Return the codes of the irregularities of a volume; None if it cannot be stacked."""
    try:
        return {note.code for note in stack(part, replace(rules, policy="fix")).irregularities}
    except InputError:
        return None


def _annotated(volume: Series, parts: list[Series], names: tuple[str, ...], rules: Rules) -> list[Series]:
    """Add an irregularity that names the separating attributes; unless the policy is "fix", keep the volume whole."""
    count = len(parts) if len(parts) > 1 else "several"
    what = f"{count} acquisitions overlap, separated by {' and '.join(names)}"
    if rules.policy != "fix":
        note = Irregularity("acquisitions", what, "stacked as one")
        return [replace(volume, irregularities=(*volume.irregularities, note))]
    done = SEVERAL_VOLUMES_ACTION if len(parts) > 1 else "one of them is a volume"
    annotated = []
    for part in parts:
        note = Irregularity("acquisitions", what + _distinguishing_values(part, names), done)
        annotated.append(replace(part, irregularities=(*part.irregularities, note)))
    # A part may hold several acquisitions that another attribute separates.
    return (
        [piece for part in annotated for piece in split_acquisitions(part, rules)] if len(annotated) > 1 else annotated
    )


def _distinguishing_values(part: Series, names: tuple[str, ...]) -> str:
    """Return as text the attribute values by which a part differs from the others, without hashes."""
    keys = ACQUISITION | _dimensions(part)
    texts = []
    for name in names:
        key = keys.get(name)
        if key is None or key.unit is None:
            continue
        values = {key.value(s) for s in part.slices}
        if len(values) == 1 and (value := values.pop()) not in (None, ""):
            texts.append(f"{name}{' = ' if name[-1].isdigit() else ' '}{value}{key.unit}")
    return f"; this is {' and '.join(texts)}" if texts else ""
