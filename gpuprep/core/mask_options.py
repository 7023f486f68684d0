"""Defines `Masks` and `ReadingOptions`: how segmentations are read, which structures are used, how masks are stored."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from gpuprep.core.coded_concepts import Code, checked_code
from gpuprep.core.formatting import printable
from gpuprep.core.recipe_table import fields_of_table
from gpuprep.errors import RecipeError, SegmentationError

Units = Literal["px", "mm", "cm"]
SliceFrom = Literal["name", "column", "z", "uid"]
SliceOrder = Literal["stack", "instance"]

TEXT_FORMATS = (
    "imagej-xy", "imagej-text-image", "imagej-values", "points", "polygons", "cxt", "pinnacle", "lidc-xml", "pylidc",
)  # fmt: skip
"""Names of the text formats: `TABLES` of `gpuprep.masks.formats.number_tables`, and `TEXTS` of
`gpuprep.masks.detect_format`."""

Layout = Literal["labels", "per-roi"]
Resampling = Literal["nearest", "smooth"]

Aliases = tuple[tuple[str, tuple[str, ...]], ...]
Codes = tuple[tuple[str, Code], ...]

Pseudonymise = Callable[[str, str], str]
"""Function from a kind ("path", "structure") and a text of that kind to its pseudonym."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """Facts that a segmentation file leaves open. None: gpuprep determines them from the file, or refuses it."""

    text_format: str | None = None
    """Format of text files: one of `TEXT_FORMATS`."""
    units: Units | None = None
    """Unit of in-plane coordinates."""
    index_base: Literal[0, 1] | None = None
    """Number of the first slice."""
    pixel_base: Literal[0, 1] = 0
    """Coordinate of the centre of the first pixel, for units of pixels; ImageJ's outlines count from its corner."""
    slice_from: SliceFrom | None = None
    """Source of the slice: the name of the file, a column of slice numbers, the z coordinate, or a column of UIDs."""
    slice_order: SliceOrder | None = None
    """Meaning of slice numbers: position in the stack along the normal, or *Instance Number*."""
    threshold: float = 0.5
    """Minimum fraction at which a voxel of a fractional SEG belongs to its segment."""


@dataclass(frozen=True, kw_only=True)
class Masks(ReadingOptions):
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
    """Regular expression, case-insensitive: only structures whose name contains a match are used."""
    aliases: Aliases = ()
    """Each name to use with the names it replaces, case-insensitive: pairs or a mapping in Python, a table in TOML.
    Label values are assigned in this order, before those of other names."""
    layout: Layout = "labels"
    """"labels": one volume with a value per structure; overlapping structures are refused. "per-roi": one volume of 0
    and 1 per structure."""
    resampling: Resampling = "nearest"
    """Method of resampling labels: see `gpuprep.compute.resample_labels`."""
    codes: Codes = ()
    """Names of structures with their codes in DICOM SEG: a text such as "SCT:10200004" (SNOMED CT), or a table of
    scheme, value, meaning and side. They do not affect volumes. Common names need none: see
    `gpuprep.masks.structure_codes`."""

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
        object.__setattr__(self, "aliases", _checked_aliases(self.aliases))
        object.__setattr__(self, "codes", _checked_codes(self.codes))

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name to use by normalised alias."""
        return {normalised(alias): name for name, others in self.aliases for alias in (name, *others)}

    def name(self, found: str) -> str | None:
        """Return the name under which a structure is used; None if it is not used."""
        name = self._names.get(normalised(found), found)
        if self.roi is None or any(re.search(self.roi, n, re.IGNORECASE) for n in (name, found)):
            return name
        return None

    def names(
        self, found: Sequence[tuple[str, str]], hide: Pseudonymise | None = None, names_from_paths: Container[str] = ()
    ) -> list[str | None]:
        """Return the name under which each structure of one series is used; None for structures that are not used.

        Equal names from several files get the name of their file appended.

        Parameters
        ----------
        found : sequence of (str, str)
            File and structure.
        hide : callable, optional
            Returns the pseudonym of a kind and a text; given if paths must not be disclosed.
        names_from_paths : container of str
            Structures named after a path. `hide` replaces these names, except those with an alias.

        Raises
        ------
        SegmentationError
            If two structures of one file get the same name.
        """
        names = [self.name(structure) for _, structure in found]
        if hide is not None:
            names = [
                f"structure-{hide('structure', name)}"
                if name is not None and structure in names_from_paths and normalised(structure) not in self._names
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
        suffixes = {name: _distinct_file_names(list(owners), hide) for name, owners in files.items() if len(owners) > 1}
        return [
            f"{name} ({suffixes[name][file]})" if name is not None and name in suffixes else name
            for name, (file, _) in zip(names, found, strict=True)
        ]

    def code(self, name: str) -> Code | None:
        """Return the code that is given to a structure, by its name in any case; None if there is none."""
        return next((code for known, code in self.codes if normalised(known) == normalised(name)), None)

    @property
    def first_names(self) -> tuple[str, ...]:
        """Names that get the first label values, in this order."""
        return tuple(name for name, _ in self.aliases)

    @classmethod
    def from_dict(cls, values: Any, base: Masks) -> Masks:
        """Return the options of a TOML table; `base` provides the fields that the table leaves out."""
        return cls(**fields_of_table("masks", values, base, OPTIONAL))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a table for TOML and JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: "none" if v is None else v for k, v in plain.items()}
        return plain | {
            "aliases": {name: list(others) for name, others in self.aliases},
            "codes": {name: code.to_dict() for name, code in self.codes},
        }


OPTIONAL = ("text_format", "units", "index_base", "slice_from", "slice_order", "roi")
"""Fields that may be "none"."""

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
"""Allowed values by field."""


def _distinct_file_names(files: Sequence[str], hide: Pseudonymise | None) -> dict[str, str]:
    """Return a distinct name for each file: its stem, or as many trailing parts of its path as necessary."""
    if hide is not None:
        return {file: hide("path", file) for file in files}
    parts = {file: file.strip(os.sep).split(os.sep) for file in files}
    candidates = [{f: os.path.splitext(p[-1])[0] for f, p in parts.items()}]
    longest = max(map(len, parts.values()))
    candidates += [{f: os.sep.join(p[-n:]) for f, p in parts.items()} for n in range(1, longest + 1)]
    escaped = ({file: printable(name) for file, name in names.items()} for names in candidates)
    return next(
        (names for names in escaped if len(set(names.values())) == len(files)), {f: printable(f) for f in files}
    )


def normalised(name: str) -> str:
    """Return a name of a structure without regard to case and repeated spaces."""
    return " ".join(name.split()).casefold()


def _checked_codes(given: Any) -> Codes:
    """Return a table of codes as tuples; raise if a name stands there twice."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise RecipeError(f"masks.codes = {given!r}: give a table of names, each with a code")
    found: dict[str, tuple[str, Code]] = {}
    for name, code in pairs:
        if not isinstance(name, str) or not name.strip():
            raise RecipeError(f"masks.codes: {name!r} is no name of a structure")
        if normalised(name) in found:
            raise RecipeError(f"masks.codes: {name!r} stands there twice")
        found[normalised(name)] = name, checked_code(name, code)
    return tuple(found.values())


def _checked_aliases(given: Any) -> Aliases:
    """Return a table of aliases as tuples; raise if a name is an alias of two names."""
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
        for alias in {normalised(name), *map(normalised, listed)}:
            if owners.setdefault(alias, name) != name:
                raise RecipeError(f"masks.aliases: {alias!r} stands for {owners[alias]!r} and for {name!r}")
        found.append((name, tuple(listed)))
    return tuple(found)
