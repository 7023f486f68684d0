"""Folders to series: every file is looked at, and slices that belong together are grouped."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from gpuprep.errors import RequestError
from gpuprep.headers import Headers, read_headers
from gpuprep.layout import absolute
from gpuprep.series import Series
from gpuprep.text import printable

FILES_PER_TASK = 64

Map = Callable[[Callable[[list[str]], "Headers"], list[list[str]]], Iterable["Headers"]]


@dataclass(frozen=True, slots=True)
class Cohort(Sequence[Series]):
    """The series under some paths, and an account of every other file."""

    series: tuple[Series, ...]
    passed_over: dict[str, int]
    """Files that are no CT images, counted by what they are."""
    unreadable: tuple[tuple[str, str], ...]
    """DICOM files whose header cannot be read: (path, reason). A slice may be missing because of them."""

    @overload
    def __getitem__(self, index: int) -> Series: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Series, ...]: ...
    def __getitem__(self, index: int | slice) -> Series | tuple[Series, ...]:
        return self.series[index]

    def __len__(self) -> int:
        return len(self.series)


def discover(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    exclude: str | os.PathLike[str] | None = None,
    map_: Map = map,
) -> Cohort:
    """Return the CT series under some paths, from their headers alone.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched to any depth, whatever the files are called; or single files.
    exclude : path, optional
        A folder that is not entered: where outputs go.
    map_ : callable, optional
        As the built-in `map`; may run in other processes and in any order.

    Returns
    -------
    Cohort
        Series in the order of their folders and numbers. Slices are in no particular order: `stack` orders them.

    Raises
    ------
    RequestError
        If a path does not exist.

    Notes
    -----
    Series are told apart by Series Instance UID alone, wherever their files lie, and within one UID by matrix, pixel
    spacing and orientation.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    total = Headers([], Counter(), [])
    files = list(_files([Path(p) for p in paths], Path(exclude).resolve() if exclude else None, total.unreadable))
    for headers in map_(read_headers, [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]):
        total.found += headers.found
        total.passed_over += headers.passed_over
        total.unreadable += headers.unreadable
    return Cohort(tuple(_group(total.found)), dict(sorted(total.passed_over.items())), tuple(sorted(total.unreadable)))


def _files(paths: list[Path], exclude: Path | None, unlisted: list[tuple[str, str]]) -> Iterator[str]:
    """Yield every file once, sorted within its folder; links are followed, but no folder is entered twice."""
    singles: set[str] = set()
    for path in paths:
        if not path.exists():
            raise RequestError(f"{path} does not exist")
        if not path.is_dir() and (real := os.path.realpath(path)) not in singles:
            singles.add(real)
            yield absolute(path)
    entered = {str(exclude)}
    for path in filter(Path.is_dir, paths):
        onerror = lambda exc: unlisted.append((printable(str(exc.filename)), f"cannot be listed: {exc.strerror}"))  # noqa: E731
        for folder, below, names in os.walk(absolute(path), followlinks=True, onerror=onerror):
            real = os.path.realpath(folder)
            if real in entered:
                below.clear()
                continue
            entered.add(real)
            below.sort()
            fresh = (n for n in sorted(names) if not singles or os.path.join(real, n) not in singles)
            yield from (os.path.join(folder, n) for n in fresh)


def _group(found: list[tuple[Series, tuple[int, int]]]) -> Iterator[Series]:
    """Yield series: one per UID, several where matrices, spacings or orientations differ within one."""
    by_uid: dict[str, list[Series]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    for single, identity in sorted(found, key=lambda f: f[0].slices[0].path):  # in whatever order headers came
        if identity not in seen:
            seen.add(identity)
            # Without a UID nothing says which files belong together; a folder at least keeps strangers apart.
            by_uid[single.series_uid or f"\0{single.folder}"].append(single)
    series = []
    for singles in by_uid.values():
        stacks: list[list[Series]] = []
        for single in singles:
            for stack in stacks:
                if _same_stack(single, stack[0]):
                    stack.append(single)
                    break
            else:
                stacks.append([single])
        stacks.sort(key=lambda stack: (-len(stack), stack[0].slices[0].path))
        made = [_joined(stack) for stack in stacks]
        series += made if len(made) == 1 else [replace(s, part=n) for n, s in enumerate(made, 1)]
    series.sort(key=lambda s: (s.folder, s.series_number is None, s.series_number or 0, s.key))
    yield from series


def _same_stack(a: Series, b: Series) -> bool:
    """Whether two slices can lie in one stack: equal matrices, spacing within 0.1 %, directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(a.orientation, b.orientation, atol=1e-3)


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, rtol: float = 0.0, atol: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b, strict=True))


def _joined(stack: list[Series]) -> Series:
    """Return series of one slice each as one."""
    folder = os.path.commonpath([s.folder for s in stack])
    return replace(stack[0], folder=folder, slices=tuple(s.slices[0] for s in stack))
