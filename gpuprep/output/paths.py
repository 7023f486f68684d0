"""Names the output folder of each series under OUT after its source folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from gpuprep.core.series import Series
from gpuprep.errors import RequestError
from gpuprep.files.filesystem import absolute, isfile, rooted

WORK_FOLDER = ".gpuprep"
"""Folder inside OUT for unfinished outputs and locks; never the output folder of a series."""

LONGEST_NAME = 255
"""Maximum length of a file name in bytes, as file systems allow."""

REPORT = "report.html"

RESERVED = ("recipe.toml", "labels.json", "manifest.", REPORT, "dataset.json", "imagesTr", "labelsTr", "imagesTs")
"""Beginnings of names at the top of OUT that gpuprep uses itself."""


def assign_folders(
    series: Iterable[Series],
    inputs: Iterable[str],
    taken: Mapping[str, str],
    wanted: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, str]:
    """Return the output folder of each series, relative to OUT.

    Parameters
    ----------
    series : iterable of Series
        The whole cohort, because a folder may hold several of its series.
    inputs : iterable of str
        Folders and files in which the cohort was found. Output paths are relative to their common parent.
    taken : mapping of str to str
        Output folders of earlier runs, each with the key of its series.
    wanted : mapping of str to (str, str), optional
        A folder to contain the output of a series, and a name for the output, by its key; "" for none.

    Returns
    -------
    dict of str to str
        Output folder by series key. No two are equal, none lies inside another one or inside one of `taken`, and none
        lies outside OUT.

    Raises
    ------
    RequestError
        If a wanted name is that of another output.
    """
    wanted = wanted or {}
    series = sorted(series, key=lambda s: not any(wanted.get(s.key, ())))  # wanted names first
    roots = [absolute(p) for p in inputs]
    parents = [os.path.dirname(rooted(os.path.dirname(r) if isfile(r) else r)) for r in roots]
    top = os.path.commonpath(parents) if parents else "/"
    bases = {s.key: _base(s.folder, top) for s in series}
    shared = Counter(bases.values())
    parents_of_bases = {parent for base in shared for parent in folders_above(base)}
    folders: dict[str, str] = {}
    assigned = _AssignedFolders(taken)
    for s in series:
        base = bases[s.key]
        digest = hashlib.sha256(s.key.encode()).hexdigest()
        alone = shared[base] == 1 and base not in parents_of_bases
        # A series keeps its folder from an earlier run, even if the source folder holds other series by now.
        names = [base] if base and (alone or taken.get(base) == s.key) else []
        names += [os.path.join(base, s.label), os.path.join(base, f"{s.label}-{digest}")]
        # If these lie inside the output of another series: a sibling of that output.
        names += [_sibling(folder, s.label) for folder in (base, *folders_above(base)) if folder]
        names.append(f"{s.label}-{digest}")
        split, case = wanted.get(s.key, ("", ""))
        if split or case:
            names = [_harmless(f"{split}/{name}".split("/")) for name in ([case] if case else names)]
        folder = next((name for name in names if assigned.is_free(name, s.key)), None)
        if folder is None:
            raise RequestError(
                f"{s.label}: its output cannot be named {names[0]}, which is the output of another series in this run "
                "or an earlier one: give each series, and each volume of a series by its key, a name of its own"
            )
        folders[s.key] = folder
        assigned.add(folders[s.key], s.key)
    return folders


class _AssignedFolders:
    """Output folders that are taken. No folder is assigned that contains another, since it is replaced as a whole."""

    def __init__(self, taken: Mapping[str, str]) -> None:
        self._owners: dict[str, str] = {}
        self._parents: set[str] = set()
        """All folders that contain one of these."""
        for folder, key in taken.items():
            self.add(folder, key)

    def add(self, folder: str, key: str) -> None:
        self._owners[folder] = key
        self._parents.update(folders_above(folder))

    def is_free(self, folder: str, key: str) -> bool:
        """Return whether `folder` belongs to no other series, and no output lies inside or above it.

        This includes a former output of the same series, which is removed only after the new one is complete.
        """
        alone = folder not in self._parents and not any(parent in self._owners for parent in folders_above(folder))
        return alone and self._owners.get(folder, key) == key


def _sibling(folder: str, label: str) -> str:
    """Return the name of a sibling of a folder, for a series whose output cannot lie inside that folder."""
    parent, name = os.path.split(folder)
    return os.path.join(parent, safe_file_name(f"{name}-{label}"))


def _base(folder: str, top: str) -> str:
    """Return `folder` relative to `top`, with harmless names; "" if it does not lie inside `top`."""
    relative = os.path.relpath(rooted(folder), top)
    parts = [] if relative == "." else relative.split(os.sep)
    if ".." in parts:
        return ""
    return _harmless(parts)


def _harmless(parts: Iterable[str]) -> str:
    """Return a relative path of harmless names."""
    names = [safe_file_name(part) for part in parts if part]
    if names and (names[0].startswith((WORK_FOLDER, *RESERVED))):
        names[0] = f"%{ord(names[0][0]):02X}{names[0][1:]}"
    return os.path.join("", *names)


def safe_file_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a file name of at most `longest` bytes in which unprintable, invalid and "/" characters are %XX of bytes.

    The names "." and ".." are escaped too. A name that is too long is cut and ends in a digest.
    """
    bad = "/." if name in (".", "..") else "/"
    text = "".join(c if c.isprintable() and c not in bad else _percent(c) for c in name) or "%00"
    encoded = text.encode()
    if len(encoded) <= longest:
        return text
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return encoded[: longest - len(digest) - 1].decode(errors="ignore") + "~" + digest


def _percent(character: str) -> str:
    return "".join(f"%{b:02X}" for b in os.fsencode(character))


def folders_above(path: str) -> Iterable[str]:
    """Yield the folders that contain a relative path, the deepest first."""
    while path := os.path.dirname(path):
        yield path
