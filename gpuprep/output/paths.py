"""Names the folder under OUT that each series gets, after its source folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from gpuprep.core.series import Series
from gpuprep.files.filesystem import absolute, isfile, rooted

WORKSHOP = ".gpuprep"
"""Folder inside OUT for what is not finished; no series is ever put there."""

LONGEST_NAME = 255
"""Bytes that a file system allows for one name."""

REPORT = "report.html"

RESERVED = ("recipe.toml", "labels.json", "manifest.", REPORT, "dataset.json", "imagesTr", "labelsTr", "imagesTs")
"""Names at the top of OUT that are gpuprep's own."""


def layout(series: Iterable[Series], inputs: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """Return the output folder of each series, relative to OUT.

    Parameters
    ----------
    series : iterable of Series
        The whole cohort: whether a folder holds several series depends on all of them.
    inputs : iterable of str
        The folders and files the cohort was found under. Paths are kept from their common parent on.
    taken : mapping of str to str
        Folders that earlier runs gave away, with the key of the series in them.

    Returns
    -------
    dict of str to str
        Folder of each series key. No two are equal, none lies in another one or in one of `taken`, and none lies
        outside OUT.
    """
    series = list(series)
    roots = [absolute(p) for p in inputs]
    parents = [os.path.dirname(rooted(os.path.dirname(r) if isfile(r) else r)) for r in roots]
    top = os.path.commonpath(parents) if parents else "/"
    bases = {s.key: _base(s.folder, top) for s in series}
    shared = Counter(bases.values())
    above = {parent for base in shared for parent in folders_above(base)}
    folders: dict[str, str] = {}
    used = _Used(taken)
    for s in series:
        base = bases[s.key]
        digest = hashlib.sha256(s.key.encode()).hexdigest()
        alone = shared[base] == 1 and base not in above
        # A series that has the folder from an earlier run keeps it, whatever has come beside it since.
        names = [base] if base and (alone or taken.get(base) == s.key) else []
        names += [os.path.join(base, s.label), os.path.join(base, f"{s.label}-{digest}")]
        # Where that lies in the output of another series, beside it.
        names += [_beside(folder, s.label) for folder in (base, *folders_above(base)) if folder]
        names.append(f"{s.label}-{digest}")
        folders[s.key] = next(name for name in names if used.free(name, s.key))
        used.give(folders[s.key], s.key)
    return folders


class _Used:
    """Folders that are given away. None is given that holds another one: replacing it would cost that one."""

    def __init__(self, taken: Mapping[str, str]) -> None:
        self._owners: dict[str, str] = {}
        self._holding: set[str] = set()
        """Folders that hold one of these."""
        for folder, key in taken.items():
            self.give(folder, key)

    def give(self, folder: str, key: str) -> None:
        self._owners[folder] = key
        self._holding.update(folders_above(folder))

    def free(self, folder: str, key: str) -> bool:
        """Whether no other series stands at `folder`, and none at all below or above it.

        Not even a former output of the same series, which goes only when the new one is there.
        """
        alone = folder not in self._holding and not any(parent in self._owners for parent in folders_above(folder))
        return alone and self._owners.get(folder, key) == key


def _beside(folder: str, label: str) -> str:
    """Return a name beside a folder for a series that cannot be put into it."""
    parent, name = os.path.split(folder)
    return os.path.join(parent, harmless(f"{name}-{label}"))


def _base(folder: str, top: str) -> str:
    """Return `folder` relative to `top`, in harmless names; "" where it does not lie below."""
    relative = os.path.relpath(rooted(folder), top)
    parts = [] if relative == "." else relative.split(os.sep)
    if ".." in parts:
        return ""
    names = [harmless(part) for part in parts]
    if names and (names[0].startswith((WORKSHOP, *RESERVED))):
        names[0] = f"%{ord(names[0][0]):02X}{names[0][1:]}"
    return os.path.join("", *names)


def harmless(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a file name with whatever does not print, is no UTF-8 or no name, as %XX of its bytes; not too long."""
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
    """Yield the folders that a relative path lies in, the deepest first."""
    while path := os.path.dirname(path):
        yield path
