"""Defines `Masks` and `Reading`: how to read segmentation files, which structures to use, what to make of them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from gpuprep.core.formatting import printable
from gpuprep.errors import RecipeError, SegmentationError

Units = Literal["px", "mm", "cm"]
SliceFrom = Literal["name", "column", "z", "uid"]
SliceOrder = Literal["stack", "instance"]

TEXT_FORMATS = (
    "imagej-xy", "imagej-text-image", "imagej-values", "points", "polygons", "cxt", "pinnacle", "lidc-xml", "pylidc",
)  # fmt: skip
"""Formats of text files by name: see `gpuprep.masks.formats.number_tables.TABLES` and
`gpuprep.masks.detect_format.TEXTS`."""

Layout = Literal["labels", "per-roi"]
Resampling = Literal["nearest", "smooth"]

Aliases = tuple[tuple[str, tuple[str, ...]], ...]

Hide = Callable[[str, str], str]
"""Kind of thing and its name to what stands for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What people say about a text file that does not say it itself. None: find it out, or refuse."""

    text_format: str | None = None
    """One of `TEXT_FORMATS`."""
    units: Units | None = None
    """Of coordinates in a slice."""
    index_base: Literal[0, 1] | None = None
    """Whether slices are counted from 0 or from 1."""
    pixel_base: Literal[0, 1] = 0
    """Coordinates of the centre of the first pixel, where pixels are meant; ImageJ's outlines count from its corner."""
    slice_from: SliceFrom | None = None
    """What tells the slice: the name of the file, a column of numbers or of UIDs, or z."""
    slice_order: SliceOrder | None = None
    """What numbers of slices count: slices along the normal, or *Instance Number*."""
    threshold: float = 0.5
    """From which share on a voxel of a fractional SEG belongs to its segment."""


@dataclass(frozen=True, kw_only=True)
class Masks(Reading):
    """The table ``[masks]`` of a recipe.

    Raises
    ------
    RecipeError
        If a value is impossible.

    Examples
    --------
    >>> masks = gpuprep.Masks(roi="^lung", aliases={"lung_l": ["Left Lung"]})
    >>> masks.name("left lung"), masks.name("heart")
    ('lung_l', None)
    >>> recipe = gpuprep.Recipe(masks=masks)
    """

    roi: str | None = None
    """Regular expression: only structures in whose name it is found, in any case of letters, are used."""
    aliases: Aliases = ()
    """Name to use, with the names it stands for, in any case of letters; a mapping does as well, and is a table in
    TOML. The first ones get the first label values."""
    layout: Layout = "labels"
    """"labels": one volume, each structure a value of its own; structures that overlap are refused. "per-roi": one
    volume of 0 and 1 for each."""
    resampling: Resampling = "nearest"
    """Of labels: see `gpuprep.compute.resample_labels`."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if (value is None and name in OPTIONAL) or (value in choices and not isinstance(value, bool)):
                continue
            raise RecipeError(f"masks.{name} = {value!r}: choose one of {', '.join(map(str, choices))}")
        threshold = self.threshold
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise RecipeError(f"masks.threshold = {threshold!r}: give a number above 0 and up to 1")
        if self.roi is not None:
            try:
                re.compile(self.roi)
            except (re.error, TypeError, RecursionError, OverflowError) as exc:
                raise RecipeError(f"masks.roi = {self.roi!r} is no regular expression: {exc}") from exc
        object.__setattr__(self, "aliases", _aliases(self.aliases))

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name to use for each one that has another."""
        return {_key(alias): name for name, others in self.aliases for alias in (name, *others)}

    def name(self, found: str) -> str | None:
        """Return under which name a structure is used; None where it is not wanted."""
        name = self._names.get(_key(found), found)
        if self.roi is None or any(re.search(self.roi, n, re.IGNORECASE) for n in (name, found)):
            return name
        return None

    def names(
        self, found: Sequence[tuple[str, str]], hide: Hide | None = None, telling: Container[str] = ()
    ) -> list[str | None]:
        """Return under which name each (file, structure) of one series is used; None for those that are not wanted.

        Equal names of several files are told apart by the file's.

        Parameters
        ----------
        found : sequence of (str, str)
            Files and the structures in them.
        hide : callable, optional
            Kind and text to what stands for it, where paths must not be known.
        telling : container of str
            Structures that have their name from a path; of these only names that the aliases have are not hidden.

        Raises
        ------
        SegmentationError
            If two structures of one file are to have the same name.
        """
        names = [self.name(structure) for _, structure in found]
        if hide is not None:
            names = [
                f"structure-{hide('structure', name)}"
                if name is not None and structure in telling and _key(structure) not in self._names
                else name
                for name, (_, structure) in zip(names, found, strict=True)
            ]
        files: dict[str, dict[str, str]] = defaultdict(dict)
        for name, (file, structure) in zip(names, found, strict=True):
            if name is not None and files[name].setdefault(file, structure) != structure:
                raise SegmentationError(
                    f"{printable(files[name][file])} and {printable(structure)} of one file both stand for "
                    f"{printable(name)}: take one of them out of the aliases"
                )
        told = {name: _told_apart(list(owners), hide) for name, owners in files.items() if len(owners) > 1}
        return [
            f"{name} ({told[name][file]})" if name is not None and name in told else name
            for name, (file, _) in zip(names, found, strict=True)
        ]

    @property
    def first_names(self) -> tuple[str, ...]:
        """Names whose label values come before all others."""
        return tuple(name for name, _ in self.aliases)

    @classmethod
    def from_dict(cls, values: Any, base: Masks) -> Masks:
        """Return the masks of a TOML table: those of `base` with some fields changed."""
        if not isinstance(values, dict):
            raise RecipeError(f"masks = {values!r}: give a table")
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise RecipeError(f"a recipe has no masks.{key}; its keys there: {', '.join(known)}")
        given = {k: None if v == "none" and k in OPTIONAL else v for k, v in values.items()}
        return cls(**{name: getattr(base, name) for name in known} | given)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as TOML and JSON can hold them."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: "none" if v is None else v for k, v in plain.items()}
        return plain | {"aliases": {name: list(others) for name, others in self.aliases}}


OPTIONAL = ("text_format", "units", "index_base", "slice_from", "slice_order", "roi")
"""What may be "none"."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "text_format": TEXT_FORMATS,
    "units": get_args(Units),
    "index_base": (0, 1),
    "pixel_base": (0, 1),
    "slice_from": get_args(SliceFrom),
    "slice_order": get_args(SliceOrder),
    "layout": get_args(Layout),
    "resampling": get_args(Resampling),
}
"""Values of which one has to be given."""


def _told_apart(files: Sequence[str], hide: Hide | None) -> dict[str, str]:
    """Return what tells some files apart: the stem of each, or as much of its path as it takes."""
    if hide is not None:
        return {file: hide("path", file) for file in files}
    parts = {file: file.strip(os.sep).split(os.sep) for file in files}
    ways = [{f: os.path.splitext(p[-1])[0] for f, p in parts.items()}]
    ways += [{f: os.sep.join(p[-n:]) for f, p in parts.items()} for n in range(1, max(map(len, parts.values())) + 1)]
    shown = ({file: printable(way) for file, way in ways_of.items()} for ways_of in ways)
    return next((way for way in shown if len(set(way.values())) == len(files)), {f: printable(f) for f in files})


def _key(name: str) -> str:
    return " ".join(name.split()).casefold()


def _aliases(given: Any) -> Aliases:
    """Return a table of aliases as tuples, checked: no name may stand for two."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise RecipeError(f"masks.aliases = {given!r}: give a table of names, each with a list of others")
    owners: dict[str, str] = {}
    found = []
    for name, others in pairs:
        listed = [others] if isinstance(others, str) else others
        if not isinstance(listed, list | tuple) or not all(isinstance(o, str) and o.strip() for o in (name, *listed)):
            raise RecipeError(
                f"masks.aliases: {name!r} = {others!r}: give a name and a list of the names it stands for"
            )
        for alias in {_key(name), *map(_key, listed)}:
            if owners.setdefault(alias, name) != name:
                raise RecipeError(f"masks.aliases: {alias!r} stands for {owners[alias]!r} and for {name!r}")
        found.append((name, tuple(listed)))
    return tuple(found)
