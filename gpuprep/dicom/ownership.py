"""Splits the images of one *Series Instance UID* by study and patient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from gpuprep.core.series import MALFORMED_UID_PREFIX, Image
from gpuprep.core.stacking_rules import MIN_STACK_SLICES, SEVERAL_VOLUMES_ACTION, Irregularity

MISSING_OWNER = ("no Study Instance UID", "no Patient ID")
"""Reasons for leaving out images of which study or patient is unknown, in a series that has several."""

MAX_SMALL_OWNERS = 2
"""More studies of one patient, or patients of one study, with one or two images each, come from an anonymiser."""

Owner = tuple[str, str]
"""*Study Instance UID* and hash of *Patient ID*; "" if absent or ignored."""


def split_by_owner(images: list[Image]) -> tuple[list[list[Image]], list[tuple[Image, str]], tuple[Irregularity, ...]]:
    """Return the images by study and patient, largest group first; images left out, with reasons; and irregularities.

    An image without one of the two identifiers is assigned by the other one, or by its folder, if that is unambiguous.

    Parameters
    ----------
    images : list of Image
        Images of one series, in the order of their paths.

    References
    ----------
    DICOM PS3.3, A.1.2.3 (Series IE): a series is part of one study, and a study of one patient.
    """
    groups: dict[Owner, list[Image]] = {}
    for image in images:
        groups.setdefault((image.study_uid, image.patient), []).append(image)
    if len(groups) == 1:
        return [images], [], ()
    for study, patient in list(groups):
        # A damaged UID counts as absent.
        if study.startswith(MALFORMED_UID_PREFIX) and len(groups[study, patient]) < MIN_STACK_SLICES:
            groups.setdefault(("", patient), []).extend(groups.pop((study, patient)))
    notes = _ignore_identifiers_per_file(groups)
    unassigned = _assign_incomplete(groups)
    for owned in groups.values():
        owned.sort(key=lambda image: image.header.path)
    ordered = sorted(groups, key=lambda owner: (-len(groups[owner]), owner))
    if len(ordered) > 1:
        studies = len({study for study, _ in ordered})
        what = f"{studies} studies" if studies > 1 else f"{len(ordered)} patients"
        notes.append(Irregularity("studies", f"{what} share a series", SEVERAL_VOLUMES_ACTION))
    return [groups[owner] for owner in ordered], unassigned, tuple(notes)


def _ignore_identifiers_per_file(groups: dict[Owner, list[Image]]) -> list[Irregularity]:
    """Ignore studies, or patients, that split a series into groups of one or two images; return an irregularity.

    Some anonymisers give a new *Study Instance UID* or *Patient ID* to every file, or to every few files.
    """
    independent = {owner for owner, matching in _matching_owners(groups).items() if not matching}
    owner_count = len(independent)
    all_small = all(len(groups[owner]) < MIN_STACK_SLICES for owner in independent)
    ignored = []
    for position, name, other in ((1, "study", "patient"), (0, "patient", "study")):
        by_identifier: dict[str, list[Owner]] = defaultdict(list)
        for owner in independent:
            by_identifier[owner[position]].append(owner)
        for kept, small in by_identifier.items():
            # Without Patient ID, join only if all groups are small; without study, never: patients may differ.
            joins = bool(kept) or (position == 1 and all_small)
            if not joins or len(small) <= MAX_SMALL_OWNERS or any(len(groups[o]) >= MIN_STACK_SLICES for o in small):
                continue
            joined = [image for o in small for image in groups.pop(o)]
            owner = ("", kept) if position == 1 else (kept, "")
            groups.setdefault(owner, []).extend(joined)
            independent.difference_update(small)
            independent.add(owner)
            ignored.append(f"one {name}" + (f" of each {other}" if len(by_identifier) > 1 else ""))
    if not ignored:
        return []
    images = sum(map(len, groups.values()))
    what = f"{images} images name {owner_count} studies or patients"
    return [Irregularity("studies", what, f"taken for {' and '.join(dict.fromkeys(ignored))}")]


def _matching_owners(groups: Collection[Owner]) -> dict[Owner, list[Owner]]:
    """Return, for each incomplete owner, the others that it may stand for; none for complete or unmatched owners."""
    by_study: dict[str, list[Owner]] = defaultdict(list)
    by_patient: dict[str, list[Owner]] = defaultdict(list)
    for owner in groups:
        if all(owner):
            by_study[owner[0]].append(owner)
            by_patient[owner[1]].append(owner)
    matching = {
        owner: [] if all(owner) else by_study.get(owner[0], []) if owner[0] else by_patient.get(owner[1], [])
        for owner in groups
    }
    if ("", "") in matching:
        matching["", ""] = [owner for owner in groups if any(owner) and not matching[owner]]
    return matching


def _assign_incomplete(groups: dict[Owner, list[Image]]) -> list[tuple[Image, str]]:
    """Assign images of incomplete owners to complete ones; return those that stay unassigned, with reasons."""
    incomplete = {owner: matching for owner, matching in _matching_owners(groups).items() if matching}
    unassigned: list[tuple[Image, str]] = []
    if not incomplete:
        return unassigned
    owners_in_folder: dict[str, set[Owner]] = defaultdict(set)
    for owner in groups:
        if owner not in incomplete:
            for image in groups[owner]:
                owners_in_folder[image.folder].add(owner)
    for owner, matching in incomplete.items():
        possible = set(matching)
        owners_beside: dict[str, list[Owner]] = {}
        for image in groups.pop(owner):
            if image.folder not in owners_beside:
                owners_beside[image.folder] = (
                    matching if len(matching) == 1 else [o for o in owners_in_folder[image.folder] if o in possible]
                )
            if len(chosen := owners_beside[image.folder]) == 1:
                groups[chosen[0]].append(image)
            else:
                has_study = bool(image.study_uid) and not image.study_uid.startswith(MALFORMED_UID_PREFIX)
                unassigned.append((image, MISSING_OWNER[has_study]))
    return unassigned
