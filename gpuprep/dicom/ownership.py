"""Parts the images of one *Series Instance UID* by study and patient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from gpuprep.core.series import MALFORMED, Image
from gpuprep.core.stacking_rules import EACH_A_VOLUME, SMALLEST_PART, Irregularity

ABSENT = ("no Study Instance UID", "no Patient ID")
"""Images of a series of several studies or patients that do not say to which they belong."""

MOST_OWNERS = 2
"""More studies than this of a patient, or patients of a study, of an image or two each are made by an anonymiser."""

Owner = tuple[str, str]
"""Study Instance UID, and the hash of a Patient ID; "" where there is none, or where it says nothing."""


def owners(images: list[Image]) -> tuple[list[list[Image]], list[tuple[Image, str]], tuple[Irregularity, ...]]:
    """Return the images of each study and patient, largest first; those that say of neither; and what is to be told.

    An image that lacks one of both belongs where the other one, or its folder, leaves but one choice.

    Parameters
    ----------
    images : list of Image
        Of one series, in the order of their paths.

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
        # A damaged UID says as little as none.
        if study.startswith(MALFORMED) and len(groups[study, patient]) < SMALLEST_PART:
            groups.setdefault(("", patient), []).extend(groups.pop((study, patient)))
    notes = _without_what_says_nothing(groups)
    lost = _assigned(groups)
    for owned in groups.values():
        owned.sort(key=lambda image: image.header.path)
    ordered = sorted(groups, key=lambda owner: (-len(groups[owner]), owner))
    if len(ordered) > 1:
        studies = len({study for study, _ in ordered})
        what = f"{studies} studies" if studies > 1 else f"{len(ordered)} patients"
        notes.append(Irregularity("studies", f"{what} share a series", EACH_A_VOLUME))
    return [groups[owner] for owner in ordered], lost, tuple(notes)


def _without_what_says_nothing(groups: dict[Owner, list[Image]]) -> list[Irregularity]:
    """Join what parts a patient, or else a study, into images or pairs of them; return what is to be told of it.

    Some anonymisers give every file, or every few, a Study Instance UID of its own, or a Patient ID.
    """
    whole = {owner for owner, fitting in _fitting(groups).items() if not fitting}
    named = len(whole)
    every = all(len(groups[owner]) < SMALLEST_PART for owner in whole)
    ignored = []
    for half, name, other in ((1, "study", "patient"), (0, "patient", "study")):
        of: dict[str, list[Owner]] = defaultdict(list)
        for owner in whole:
            of[owner[half]].append(owner)
        for kept, small in of.items():
            # Images without a Patient ID may be of several patients where others are whole; without a study, always.
            joins = bool(kept) or (half == 1 and every)
            if not joins or len(small) <= MOST_OWNERS or any(len(groups[o]) >= SMALLEST_PART for o in small):
                continue
            joined = [image for o in small for image in groups.pop(o)]
            owner = ("", kept) if half == 1 else (kept, "")
            groups.setdefault(owner, []).extend(joined)
            whole.difference_update(small)
            whole.add(owner)
            ignored.append(f"one {name}" + (f" of each {other}" if len(of) > 1 else ""))
    if not ignored:
        return []
    images = sum(map(len, groups.values()))
    what = f"{images} images name {named} studies or patients"
    return [Irregularity("studies", what, f"taken for {' and '.join(dict.fromkeys(ignored))}")]


def _fitting(groups: Collection[Owner]) -> dict[Owner, list[Owner]]:
    """Return the pairs of study and patient of which a pair may be one that lacks something; none for a whole one."""
    of_study: dict[str, list[Owner]] = defaultdict(list)
    of_patient: dict[str, list[Owner]] = defaultdict(list)
    for owner in groups:
        if all(owner):
            of_study[owner[0]].append(owner)
            of_patient[owner[1]].append(owner)
    fitting = {
        owner: [] if all(owner) else of_study.get(owner[0], []) if owner[0] else of_patient.get(owner[1], [])
        for owner in groups
    }
    if ("", "") in fitting:
        fitting["", ""] = [owner for owner in groups if any(owner) and not fitting[owner]]
    return fitting


def _assigned(groups: dict[Owner, list[Image]]) -> list[tuple[Image, str]]:
    """Put the images of pairs that lack something where they belong; return those that belong nowhere, and why."""
    lacking = {owner: fitting for owner, fitting in _fitting(groups).items() if fitting}
    lost: list[tuple[Image, str]] = []
    if not lacking:
        return lost
    lying: dict[str, set[Owner]] = defaultdict(set)
    for owner in groups:
        if owner not in lacking:
            for image in groups[owner]:
                lying[image.folder].add(owner)
    for owner, fitting in lacking.items():
        possible = set(fitting)
        beside: dict[str, list[Owner]] = {}
        for image in groups.pop(owner):
            if image.folder not in beside:
                beside[image.folder] = (
                    fitting if len(fitting) == 1 else [o for o in lying[image.folder] if o in possible]
                )
            if len(chosen := beside[image.folder]) == 1:
                groups[chosen[0]].append(image)
            else:
                lost.append((image, ABSENT[bool(image.study_uid) and not image.study_uid.startswith(MALFORMED)]))
    return lost
