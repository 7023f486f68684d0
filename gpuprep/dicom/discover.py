"""Discovers the series in folders: reads each header once and groups the images into series."""

from __future__ import annotations

import gc
import os
import stat as modes
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import overload

from gpuprep.core.formatting import printable
from gpuprep.core.series import Image, Series
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.header_cache import File, HeaderIndex
from gpuprep.dicom.headers import Contents, read_headers
from gpuprep.dicom.split_volumes import partition
from gpuprep.files.filesystem import (
    absolute,
    is_requested_folder,
    is_url,
    normalised_path,
    real_path,
    stat,
    walk,
    walk_folders,
)

FILES_PER_TASK = 64

Map = Callable[[Callable[[list[str]], list[Contents]], list[list[str]]], Iterable[tuple[list[str], list[Contents]]]]


@dataclass(frozen=True, slots=True)
class OtherSeries:
    """A series of another modality than CT. It is not converted; segmentations may refer to it."""

    modality: str
    """Modality, as in `OtherImage.modality`."""
    sop_digests: array[int]
    """Digests of its SOP Instance UIDs: see `gpuprep.core.series.sop_digest`."""


@dataclass(frozen=True, slots=True)
class Cohort(Sequence[Series]):
    """The series found under some paths, and a record of every other file."""

    series: tuple[Series, ...]
    passed_over: dict[str, int]
    """Number of files that are not CT images, by kind."""
    unreadable: tuple[tuple[str, str], ...]
    """DICOM files whose header cannot be read: (path, reason). A slice may be missing because of them."""
    segmentations: tuple[str, ...] = ()
    """Segmentation files that name the series they belong to; they are counted in `passed_over` too."""
    others: Mapping[str, OtherSeries] = field(default_factory=dict)
    """Series of other modalities, by *Series Instance UID*; their files are counted in `passed_over` too."""

    @overload
    def __getitem__(self, index: int) -> Series: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Series, ...]: ...
    def __getitem__(self, index: int | slice) -> Series | tuple[Series, ...]:
        return self.series[index]

    def __len__(self) -> int:
        return len(self.series)


def _map_serially(
    function: Callable[[list[str]], list[Contents]], tasks: list[list[str]]
) -> Iterator[tuple[list[str], list[Contents]]]:
    return ((task, function(task)) for task in tasks)


def discover(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    rules: Rules | None = None,
    *,
    exclude: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    map_: Map = _map_serially,
) -> Cohort:
    """Return the CT series under some paths, reading headers only.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched recursively whatever the files are called; or single files. Files may be gzip'd, and zip
        archives count as folders. A DICOMDIR stands for the folder that contains it. URLs such as
        ``s3://bucket/folder`` are opened with fsspec.
    rules : Rules, optional
        Whether images are grouped by UID or by folder, and whether images that share positions are split into
        volumes; `Rules()` by default.
    exclude : path, optional
        A folder that is not searched, such as the output folder.
    index : path, optional
        File of an index that keeps headers, so that unchanged files are not read again.
    map_ : callable, optional
        Called with a function and tasks; yields (task, result) for every task, in any order. It may use other
        processes.

    Returns
    -------
    Cohort
        Series sorted by folder, series number and UID.

    Raises
    ------
    RequestError
        If a path does not exist or cannot be accessed.

    Notes
    -----
    Images are grouped by *Series Instance UID*, wherever their files are (or by folder, if the rules say so), and
    within one UID by study, patient, matrix, pixel spacing, orientation and acquisition: see
    `gpuprep.dicom.split_volumes`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> cohort = gpuprep.discover("dicom")
    >>> len(cohort), len(cohort[0].slices), cohort.passed_over
    (1, 12, {})
    """
    requested = [normalised_path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    images: list[Image] = []
    passed_over: Counter[str] = Counter()
    unreadable: list[tuple[str, str]] = []
    segmentations: list[str] = []
    modalities: dict[str, str] = {}
    sop_digests: dict[str, array[int]] = defaultdict(lambda: array("Q"))

    def collect(contents: Contents) -> None:
        images.extend(contents.images)
        if contents.passed_over:
            passed_over.update(contents.passed_over)
        unreadable.extend(contents.unreadable)
        segmentations.extend(contents.segmentations)
        for image in contents.others:
            modalities.setdefault(image.series_uid, image.modality)
            sop_digests[image.series_uid].append(image.sop_digest)

    with closing(HeaderIndex(index)) if index is not None else nullcontext() as headers:
        unknown: dict[str, File] = {}
        identities: set[tuple[int, int]] = set()
        excluded = real_path(exclude) if exclude else None
        with _gc_disabled():
            for folder, files, complete in _files_by_folder(requested, excluded, unreadable, passed_over):
                unseen = [f for f in files if f.identity not in identities]
                identities.update(f.identity for f in unseen)
                known = headers.known(folder, unseen, complete=complete) if headers else {}
                for contents in known.values():
                    collect(contents)
                unknown.update((f.path, f) for f in unseen if f.path not in known)
        names = list(unknown)
        tasks = [names[i : i + FILES_PER_TASK] for i in range(0, len(names), FILES_PER_TASK)]
        for task, found in map_(read_headers, tasks):
            for contents in found:
                collect(contents)
            if headers:
                headers.add([unknown[name] for name in task], found)
    with _gc_disabled():
        series = tuple(partition(images, rules or Rules()))
    return Cohort(
        series=series,
        passed_over=dict(sorted(passed_over.items())),
        unreadable=tuple(sorted(unreadable)),
        segmentations=tuple(sorted(segmentations)),
        others={
            uid: OtherSeries(modality, array("Q", sorted(sop_digests[uid]))) for uid, modality in modalities.items()
        },
    )


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection: with millions of live objects it would take half the time of a rescan."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _files_by_folder(
    paths: list[str], excluded: str | None, unreadable: list[tuple[str, str]], passed_over: Counter[str]
) -> Iterator[tuple[str, list[File], bool]]:
    """Yield (folder, files, complete) for each folder once; `complete`: `files` are all files of the folder."""
    entered = {excluded}
    folders = []
    for path in paths:
        name = absolute(path)
        if is_requested_folder(path):
            folders.append(name)
        elif os.path.basename(path).upper() == "DICOMDIR":
            folders.append(os.path.dirname(name))
        else:
            files: list[File] = []
            _add_file(name, files, unreadable, passed_over)
            yield os.path.dirname(name), files, False
    for folder in folders:
        if is_url(folder):
            yield from _walk_url(folder, excluded, entered, unreadable)
        else:
            yield from _walk_folder(folder, entered, unreadable, passed_over)


def _walk_folder(
    top: str, entered: set[str | None], unreadable: list[tuple[str, str]], passed_over: Counter[str]
) -> Iterator[tuple[str, list[File], bool]]:
    def cannot_list(folder: str, exc: OSError) -> None:
        unreadable.append((printable(folder), f"cannot be listed: {exc.strerror}"))

    for folder, paths in walk_folders(top, entered, cannot_list):
        files: list[File] = []
        for path in paths:
            _add_file(path, files, unreadable, passed_over)
        yield folder, files, True


def _walk_url(
    top: str, excluded: str | None, entered: set[str | None], unreadable: list[tuple[str, str]]
) -> Iterator[tuple[str, list[File], bool]]:
    try:
        for folder, files in walk(top, excluded):
            if folder not in entered:
                entered.add(folder)
                yield folder, [_file(path, status) for path, status in files], True
    except OSError as exc:
        unreadable.append((printable(top), f"cannot be listed: {exc.strerror}"))


def _add_file(path: str, files: list[File], unreadable: list[tuple[str, str]], passed_over: Counter[str]) -> None:
    """Append a regular file to `files`; record any other one as unlisted or passed over."""
    try:
        status = stat(path)
    except OSError as exc:
        unreadable.append((printable(path), printable(f"{type(exc).__name__}: {exc}")))
        return
    if modes.S_ISREG(status.st_mode):
        files.append(_file(path, status))
    else:  # opening a pipe would block
        passed_over["not a regular file"] += 1


def _file(path: str, status: os.stat_result) -> File:
    return File(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))
