"""Finds segmentation files under some paths, and summarises each."""

from __future__ import annotations

import logging
import os
import stat as modes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gpuprep.core.formatting import printable
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.errors import NotASegmentationError, RequestError, SegmentationError
from gpuprep.files.filesystem import (
    absolute,
    is_requested_folder,
    is_url,
    isdir,
    isfile,
    real_path,
    stat,
    walk,
    walk_folders,
)
from gpuprep.masks.model import ImageFrame, Plane
from gpuprep.masks.read import read_segmentation

log = logging.getLogger(__name__)


NOT_ONE = NotASegmentationError.code
"""Code of the error for a file that is no segmentation."""


class SummaryRequest(NamedTuple):
    """A segmentation file, and what is needed to read it."""

    path: str
    reading: ReadingOptions
    plane: Plane | None = None


@dataclass(frozen=True, slots=True)
class SegmentationSummary:
    """A segmentation file: its format, structures and references, without its contours."""

    path: str
    bytes: int = 0
    mtime_ns: int = 0
    format: str = ""
    why: str = ""
    names: tuple[str, ...] = ()
    """Names of its structures."""
    series_uids: tuple[str, ...] = ()
    study_uids: frozenset[str] = frozenset()
    frame_of_reference_uid: str = ""
    sop_uids: frozenset[str] = frozenset()
    drawn_on: frozenset[ImageFrame] = frozenset()
    per_slice: bool = False
    beside: tuple[tuple[str, int, int], ...] = ()
    """Other files that were read with it: path, bytes and time of change in ns."""
    error: str = ""
    """Why it cannot be read; some text files can be read once the pixel spacing of their series is known."""
    code: str = ""
    """Code of that error."""
    volumes: int = 1
    """Number of volumes with one Series Instance UID that get it, because it names none of their images."""

    @property
    def warning(self) -> SeriesWarning | None:
        """Warning if it goes to several volumes."""
        if self.volumes == 1:
            return None
        return SeriesWarning(
            "mask-volumes",
            f"{printable(os.path.basename(self.path))} names the series and none of its images: its structures are on "
            f"each of the {self.volumes} volumes of the series",
        )


def summaries(requests: list[SummaryRequest]) -> list[SegmentationSummary]:
    """Return the summary of each file; every error is in the summary."""
    return [_summary(q) for q in requests]


def _summary(request: SummaryRequest) -> SegmentationSummary:
    path = request.path
    try:
        status = stat(path)
        s = read_segmentation(path, request.reading, request.plane)
        beside = tuple((other, (found := stat(other)).st_size, found.st_mtime_ns) for other in s.beside)
    except SegmentationError as exc:
        return SegmentationSummary(
            path,
            status.st_size,
            status.st_mtime_ns,
            series_uids=exc.series_uids,
            frame_of_reference_uid=exc.frame_of_reference_uid,
            sop_uids=exc.sop_uids,
            error=str(exc),
            code=exc.code,
        )
    except OSError as exc:
        return SegmentationSummary(path, error=f"cannot be read: {exc.strerror}", code="mask")
    except Exception as exc:  # a bug that one file provokes must not stop the others
        log.exception("reading %s crashed", path)
        return SegmentationSummary(path, error=printable(f"{type(exc).__name__}: {exc}"), code="mask")
    return SegmentationSummary(
        path=path,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        format=s.format,
        why=s.why,
        names=tuple(structure.name for structure in s.structures),
        series_uids=s.series_uids,
        study_uids=s.study_uids,
        frame_of_reference_uid=s.frame_of_reference_uid,
        sop_uids=s.sop_uids,
        drawn_on=s.drawn_on,
        per_slice=s.per_slice,
        beside=beside,
    )


def files_under(paths: Iterable[str], exclude: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the files at some paths, folders searched to any depth, without names that begin with a dot.

    Links are followed, and a file that two paths lead to is returned once.

    Parameters
    ----------
    paths : iterable of str
        Files or folders.
    exclude : path, optional
        The output folder, which is not searched.

    Raises
    ------
    RequestError
        If a path does not exist, or is neither a file nor a folder.
    """
    files: dict[object, str] = {}
    excluded = real_path(exclude) if exclude else None
    entered = {excluded}

    def take(file: str) -> None:
        try:
            status = stat(file)
        except OSError:
            files[file] = file  # reading it reports the error
        else:
            if modes.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                files.setdefault((status.st_dev, status.st_ino), file)

    for path in paths:
        if is_url(path) and is_requested_folder(path):
            for _, found in walk(path, excluded):
                for file, status in found:
                    if os.path.basename(file)[0] != ".":
                        files.setdefault((status.st_dev, status.st_ino), file)
        elif isdir(path):
            for _, found_here in walk_folders(absolute(path), entered):
                for file in found_here:
                    if os.path.basename(file)[0] != ".":
                        take(file)
        elif isfile(path):
            take(absolute(path))
        elif os.path.exists(path):
            raise RequestError(f"the segmentation {path} is neither a file nor a folder")
        else:
            raise RequestError(f"the segmentation {path} does not exist")
    return list(files.values())


def below(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, at any depth."""
    return path.startswith(os.path.join(folder, ""))
