"""Defines `ConvertOptions`: the options of a run, without its inputs and its output folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from gpuprep.compute.backend import Backend, BackendName, Engine, checked_engine
from gpuprep.compute.memory_estimate import USABLE_SHARE
from gpuprep.core.recipe import Recipe
from gpuprep.core.select_options import Select
from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import RequestError
from gpuprep.files.filesystem import normalised_path
from gpuprep.output.columns import FREE_TEXT
from gpuprep.output.nnunet import Layout
from gpuprep.output.records import Status
from gpuprep.pipeline.pseudonyms import Pseudonyms
from gpuprep.pipeline.selection_file import SelectionFile
from gpuprep.pipeline.series_query import check_select

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def as_list(paths: Paths) -> list[str]:
    """Return one path, or several, as a list of text."""
    return [normalised_path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of a run, without its inputs and its output folder.

    Raises
    ------
    RequestError
        If a value is invalid, or a package that the recipe needs is not installed.

    Examples
    --------
    >>> options = gpuprep.ConvertOptions(recipe=gpuprep.Recipe(dtype="uint8"), jobs=2)
    >>> options.backend, options.engine, options.masks
    ('auto', 'operators', None)
    """

    recipe: Recipe = field(default_factory=Recipe)
    """With ``image=False`` only masks are made."""
    masks: Sequence[str] | Literal["auto"] | None = None
    """Segmentation files, or folders of them, from which masks are made; "auto": DICOM objects and LIDC XML among the
    inputs. None: no masks."""
    backend: BackendName | Backend = "auto"
    """Computes the volumes: "auto", "cpu", "gpu", or an open backend."""
    engine: Engine = "operators"
    """Arithmetic that resamples: "operators" or "ndimage"."""
    jobs: int | None = None
    """Number of series converted at the same time, each in a process. None: on the CPU one after the other in this
    process, on a GPU as many as its memory and the cores allow; a few of them compute on it while the others read and
    write."""
    gpus: Sequence[int] | None = None
    """GPUs to use; None: all. A process sees one of them."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers convert, or "local" for `jobs` Dask workers on this machine. All must
    see the same paths."""
    shard: Shard = WHOLE_COHORT
    """The part of the cohort that this run converts. Runs of other shards may write into the same output folder at the
    same time. Each shard has a manifest of its own until all are merged."""
    layout: Layout = "folders"
    """"nnunet": at its end, unless it is stopped, the run also arranges all outputs of this recipe as a dataset of
    nnU-Net v2: see `gpuprep.output.nnunet`."""
    names: Pseudonyms | None = None
    """Pseudonyms of UIDs, patients and paths in the output folder; the crosswalk is written beside their key. None:
    folders are named like those of the input, and the manifest has UIDs and paths."""
    select: str | os.PathLike[str] | SelectionFile | None = None
    """File that lists the series to convert, and may name their outputs: see `gpuprep.pipeline.selection_file`. It is
    read at once. The recipe's table `Select` chooses among them."""
    record: Collection[str] = ()
    """Columns of free text that are stored in the output folder: of `gpuprep.output.columns.FREE_TEXT`."""
    only: Collection[Status] | None = None
    """Convert only series with one of these statuses in the manifest."""
    limit: int | None = None
    """Maximum number of series converted in this run."""
    limit_s: float | None = None
    """Time limit of one series in s; a series that takes longer fails. Needs `jobs`."""
    memory_share: float = USABLE_SHARE
    """Share of the free memory that concurrent series may take, by prediction."""
    room_check: bool = True
    """Whether to begin only if all outputs are predicted to fit on the disk."""
    index: str | os.PathLike[str] | None = None
    """File of the index of headers, as for `gpuprep.discover`."""

    def __post_init__(self) -> None:
        self.recipe.check_installed()
        if self.layout not in get_args(Layout):
            raise RequestError(f"layout = {self.layout!r}: choose one of {', '.join(get_args(Layout))}")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"limit = {self.limit}: give at least 1")
        if self.jobs is not None and self.jobs < 1:
            raise RequestError(f"jobs = {self.jobs}: give at least 1")
        if self.limit_s is not None and not 0 < self.limit_s < float("inf"):
            raise RequestError(f"time limit = {self.limit_s:g} s: give more than 0, and no infinity")
        if self.limit_s is not None and self.jobs is None and self.scheduler is None:
            raise RequestError("a time limit needs jobs: nothing can end a series in this process")
        if not 0 < self.memory_share <= 1:
            raise RequestError(f"memory share = {self.memory_share:g}: give more than 0, and at most 1")
        if self.recipe.crop_kind == "mask" and self.masks is None:
            raise RequestError(f"crop = {self.recipe.crop!r} needs segmentations: give --masks, such as --masks auto")
        checked_engine(self.engine)
        check_select(self.recipe.select)
        if isinstance(self.select, str | os.PathLike):
            object.__setattr__(self, "select", SelectionFile.read(self.select))
        if isinstance(self.record, str):
            object.__setattr__(self, "record", (self.record,))
        if unknown := set(self.record).difference(FREE_TEXT):
            raise RequestError(f"record = {', '.join(sorted(unknown))!r}: choose of {', '.join(FREE_TEXT)}")
        if self.record and self.names is not None:
            raise RequestError("record stores free text, which may name anybody: leave it out with --names hash")
        if self.masks is not None and self.masks != "auto":
            object.__setattr__(self, "masks", tuple(as_list(self.masks)))

    @property
    def stored_recipe(self) -> Recipe:
        """Recipe as it is stored in OUT: with pseudonyms without the choice of series, whose words may name anybody."""
        return self.recipe if self.names is None else replace(self.recipe, select=Select())


def options_with(recipe: Recipe | None, given: Mapping[str, Any]) -> ConvertOptions:
    """Return options of the Python interface: those of `ConvertOptions`, and fields of `Select` for the recipe."""
    choice = {f.name: given[f.name] for f in fields(Select) if f.name in given}
    recipe = recipe or Recipe()
    if choice:
        recipe = replace(recipe, select=replace(recipe.select, **choice))
    return ConvertOptions(recipe=recipe, **{name: value for name, value in given.items() if name not in choice})
