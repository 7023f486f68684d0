"""Discovers the series in folders: each file is looked at once, and images are grouped into series."""

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
from gpuprep.files.filesystem import absolute, folders_at, given, is_requested_folder, is_url, resolved, stat, walk

FILES_PER_TASK = 64

Map = Callable[[Callable[[list[str]], list[Contents]], list[list[str]]], Iterable[tuple[list[str], list[Contents]]]]


@dataclass(frozen=True, slots=True)
class OtherSeries:
    """A series that is no CT: it is not converted, and segmentations may belong to it."""

    modality: str
    """As `OtherImage.modality`."""
    sop_digests: array[int]
    """Of its images: see `gpuprep.core.series.sop_digest`."""


@dataclass(frozen=True, slots=True)
class Cohort(Sequence[Series]):
    """The series under some paths, and an account of every other file."""

    series: tuple[Series, ...]
    passed_over: dict[str, int]
    """Files that are no CT images, counted by what they are."""
    unreadable: tuple[tuple[str, str], ...]
    """DICOM files whose header cannot be read: (path, reason). A slice may be missing because of them."""
    segmentations: tuple[str, ...] = ()
    """Files among those passed over that are segmentations and say to which series they belong."""
    others: Mapping[str, OtherSeries] = field(default_factory=dict)
    """Series of images among those passed over, by *Series Instance UID*."""

    @overload
    def __getitem__(self, index: int) -> Series: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Series, ...]: ...
    def __getitem__(self, index: int | slice) -> Series | tuple[Series, ...]:
        return self.series[index]

    def __len__(self) -> int:
        return len(self.series)


def _one_by_one(
    function: Callable[[list[str]], list[Contents]], tasks: list[list[str]]
) -> Iterator[tuple[list[str], list[Contents]]]:
    return ((task, function(task)) for task in tasks)


def discover(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    rules: Rules | None = None,
    *,
    exclude: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    map_: Map = _one_by_one,
) -> Cohort:
    """Return the CT series under some paths, from their headers alone.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched to any depth, whatever the files are called; or single files. Files may be gzip'd, and zip
        archives count as folders. Of a DICOMDIR, the folder it lies in is searched. URLs such as
        ``s3://bucket/folder`` are opened with fsspec.
    rules : Rules, optional
        Whether a UID or a folder makes a series, and whether images that share positions are split into volumes; the
        default where absent.
    exclude : path, optional
        A folder that is not entered: where outputs go.
    index : path, optional
        A file in which to keep what headers say: those of files that have not changed are not read again.
    map_ : callable, optional
        Yields (task, result) of a function for every task; may run in other processes and in any order.

    Returns
    -------
    Cohort
        Series by folder, series number and UID.

    Raises
    ------
    RequestError
        If a path does not exist, or cannot be reached.

    Notes
    -----
    Images belong together by *Series Instance UID*, wherever their files lie (or by folder, if the rules say so), and
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
    places = [given(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    images: list[Image] = []
    passed_over: Counter[str] = Counter()
    unreadable: list[tuple[str, str]] = []
    segmentations: list[str] = []
    modalities: dict[str, str] = {}
    sop_digests: dict[str, array[int]] = defaultdict(lambda: array("Q"))

    def take(contents: Contents) -> None:
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
        excluded = resolved(exclude) if exclude else None
        with _no_collection():
            for folder, files, whole in _listed(places, excluded, unreadable, passed_over):
                fresh = [f for f in files if f.identity not in identities]
                identities.update(f.identity for f in fresh)
                known = headers.known(folder, fresh, whole=whole) if headers else {}
                for contents in known.values():
                    take(contents)
                unknown.update((f.path, f) for f in fresh if f.path not in known)
        names = list(unknown)
        tasks = [names[i : i + FILES_PER_TASK] for i in range(0, len(names), FILES_PER_TASK)]
        for task, found in map_(read_headers, tasks):
            for contents in found:
                take(contents)
            if headers:
                headers.add([unknown[name] for name in task], found)
    with _no_collection():
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
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from searching millions of facts that all stay: it takes half of a second scan."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _listed(
    paths: list[str], excluded: str | None, unlisted: list[tuple[str, str]], passed_over: Counter[str]
) -> Iterator[tuple[str, list[File], bool]]:
    """Yield folders with their files, sorted, and whether these are all; no folder is entered twice."""
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
            _examine(name, files, unlisted, passed_over)
            yield os.path.dirname(name), files, False
    for folder in folders:
        if is_url(folder):
            yield from _walked_url(folder, excluded, entered, unlisted)
        else:
            yield from _walked(folder, entered, unlisted, passed_over)


def _walked(
    top: str, entered: set[str | None], unlisted: list[tuple[str, str]], passed_over: Counter[str]
) -> Iterator[tuple[str, list[File], bool]]:
    def cannot_list(folder: str, exc: OSError) -> None:
        unlisted.append((printable(folder), f"cannot be listed: {exc.strerror}"))

    for folder, paths in folders_at(top, entered, cannot_list):
        files: list[File] = []
        for path in paths:
            _examine(path, files, unlisted, passed_over)
        yield folder, files, True


def _walked_url(
    top: str, excluded: str | None, entered: set[str | None], unlisted: list[tuple[str, str]]
) -> Iterator[tuple[str, list[File], bool]]:
    try:
        for folder, files in walk(top, excluded):
            if folder not in entered:
                entered.add(folder)
                yield folder, [_file(path, status) for path, status in files], True
    except OSError as exc:
        unlisted.append((printable(top), f"cannot be listed: {exc.strerror}"))


def _examine(path: str, files: list[File], unlisted: list[tuple[str, str]], passed_over: Counter[str]) -> None:
    """Put a file where it belongs by what the system says of it."""
    try:
        status = stat(path)
    except OSError as exc:
        unlisted.append((printable(path), printable(f"{type(exc).__name__}: {exc}")))
        return
    if modes.S_ISREG(status.st_mode):
        files.append(_file(path, status))
    else:  # opening a pipe would wait for ever
        passed_over["not a regular file"] += 1


def _file(path: str, status: os.stat_result) -> File:
    return File(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))
