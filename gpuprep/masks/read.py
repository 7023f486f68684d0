"""Reads one segmentation file of any known format."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable

from gpuprep.core.formatting import printable
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.errors import NotASegmentationError, SegmentationError
from gpuprep.files import filesystem
from gpuprep.files.archives import kind
from gpuprep.masks.detect_format import TEXTS, UNKNOWN_FORMAT, recognise
from gpuprep.masks.filename_hints import path_names
from gpuprep.masks.formats.number_tables import TABLES, Source
from gpuprep.masks.model import Plane, Segmentation

LARGEST_BYTES = 1 << 30
"""Size of the largest segmentation file; larger files are refused."""

DAMAGED_OBJECT = "mask-damaged"
"""Error code: a DICOM file cannot be read. If its UIDs are lost too, its series is unknown."""

_BARE_DICOM = re.compile(rb"(?s)[\x02\x08]\x00.\x00|\x00[\x02\x08]\x00.")
"""First bytes of a data set without a preamble: an element of group 0002 or 0008, in either byte order."""

_BINARY_FORMATS = (
    (b"NRRD", "NRRD"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89HDF", "HDF5"),
    (b"\x93NUMPY", "NumPy"),
    (b"%PDF", "PDF"),
    (b"MATLAB 5.0", "MATLAB"),
    (b"\x5c\x01\0\0", "NIfTI"),
    (b"\0\0\x01\x5c", "NIfTI"),
    (b"\x1c\x02\0\0", "NIfTI"),
    (b"SQLite format 3", "SQLite"),
)

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def read_segmentation(
    path: str | os.PathLike[str], reading: ReadingOptions | None = None, plane: Plane | None = None
) -> Segmentation:
    """Return the structures of a segmentation file.

    Parameters
    ----------
    path : str or path
        DICOM file (RTSTRUCT or SEG), or text in any format of `gpuprep.core.mask_options.TEXT_FORMATS`. The content
        decides the format, not the name. The name gives the slice and the structure if the text does not.
    reading : Reading, optional
        Options for text that is ambiguous by itself, and the threshold of fractional SEG.
    plane : Plane, optional
        Matrix and pixel spacing of the series, if known. Some texts are ambiguous without them.

    Raises
    ------
    SegmentationError
        If the file cannot be read, is no segmentation, or is ambiguous.

    Examples
    --------
    >>> from pathlib import Path
    >>> with Path("heart.txt").open("w") as file:
    ...     for line in ("x_mm y_mm z_mm", "0 0 30", "0 20 30", "20 20 30", "20 0 30"):
    ...         print(line, file=file)
    >>> found = gpuprep.read_segmentation("heart.txt")
    >>> [(s.name, len(s.contours)) for s in found.structures]
    [('heart', 1)]
    """
    path = filesystem.normalised_path(path)
    reading = reading or ReadingOptions()
    data = _content(path)
    if data[128:132] == b"DICM" or _BARE_DICOM.match(data):
        from gpuprep.masks.formats.dicom_objects import read_object

        try:
            return read_object(path, reading)
        except NotASegmentationError:
            raise
        except SegmentationError as exc:
            exc.code = DAMAGED_OBJECT
            raise
    text = _text(data)
    del data
    recognised = recognise(text, os.path.basename(path), reading, plane)
    if recognised.table is None:
        return TEXTS[recognised.format].read(text, path)
    source = Source(path, recognised.table, recognised.columns, reading, plane)
    return TABLES[recognised.format].read(source, recognised.why)


def names_by_path(files: Iterable[tuple[str, str]]) -> set[str]:
    """Return all structure names that the paths of files, given as (path, format), can yield."""
    titles = {known.title for known in TABLES.values()}
    return {name for path, format_ in files if format_ in titles for name in path_names(path)}


def _content(path: str) -> bytes:
    try:
        status = filesystem.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise SegmentationError("is not a regular file")
        if status.st_size > LARGEST_BYTES:
            raise SegmentationError(f"has {status.st_size / 2**30:.1f} GiB: no segmentation is that large")
        with io.BufferedReader(filesystem.opened(path)) as f:
            return f.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise SegmentationError(f"cannot be opened: {printable(why)}") from exc


def _text(data: bytes) -> str:
    """Return the text of a file, with line feeds as line ends and without a byte order mark."""
    if data.startswith(b"Iout"):
        raise SegmentationError("is an ImageJ .roi: in ImageJ, save it with Save As > XY Coordinates")
    if packed := kind(data[:4]):
        hint = " (a RoiSet of ImageJ: save each ROI with Save As > XY Coordinates)" if packed == "zip" else ""
        raise NotASegmentationError(f"is binary: packed with {packed}; unpack it{hint}", UNKNOWN_FORMAT)
    for magic, name in _BINARY_FORMATS:
        if data.startswith(magic):
            raise NotASegmentationError(f"is binary: {name}, which is not read as a segmentation")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if found := _CONTROL_CHARACTERS.search(text):
        line = len(re.findall(r"\r\n|\r|\n", text[: found.start()])) + 1
        raise NotASegmentationError(f"is binary: character {ord(found[0]):#04x} in line {line}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
