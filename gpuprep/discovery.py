"""Folders to series: every file is looked at, headers are read, pixels are not."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import pydicom
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from gpuprep.errors import RequestError
from gpuprep.series import Series, SliceHeader, printable

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

KEYWORDS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "SeriesNumber", "InstanceNumber", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient",
    "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "RescaleType", "PhotometricInterpretation",
    "SamplesPerPixel", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
]  # fmt: skip
"""Everything that is read of a header. No name, no date, no free text ever enters the program."""

PLAIN_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)

FILES_PER_TASK = 64

Map = Callable[[Callable[[list[str]], "Headers"], list[list[str]]], Iterable["Headers"]]


@dataclass(frozen=True, slots=True)
class Found:
    """One CT header, with the attributes by which slices are grouped."""

    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    series_number: int | None
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    orientation: tuple[float, ...] | None
    header: SliceHeader


@dataclass(slots=True)
class Headers:
    """What a list of files turned out to be."""

    found: list[Found]
    passed_over: Counter[str]
    unreadable: list[tuple[str, str]]


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
            yield os.path.abspath(path)
    entered = {str(exclude)}
    for path in filter(Path.is_dir, paths):
        onerror = lambda exc: unlisted.append((printable(str(exc.filename)), f"cannot be listed: {exc.strerror}"))  # noqa: E731
        for folder, below, names in os.walk(os.path.abspath(path), followlinks=True, onerror=onerror):
            real = os.path.realpath(folder)
            if real in entered:
                below.clear()
                continue
            entered.add(real)
            below.sort()
            fresh = (n for n in sorted(names) if not singles or os.path.join(real, n) not in singles)
            yield from (os.path.join(folder, n) for n in fresh)


def read_headers(files: list[str]) -> Headers:
    """Return what each of some files is."""
    headers = Headers([], Counter(), [])
    for file in files:
        try:
            found = _read_header(file)
        except _NotCtError as exc:
            headers.passed_over[str(exc)] += 1
        except Exception as exc:  # pydicom raises whatever a broken file provokes
            headers.unreadable.append((printable(file), printable(f"{type(exc).__name__}: {exc}")))
        else:
            headers.found.append(found)
    return headers


class _NotCtError(Exception):
    """The file is no CT image; the text says what it is."""


def _read_header(file: str) -> Found:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise _NotCtError("not a regular file")
    with open(file, "rb") as f:
        head = f.read(132)
        # Without a preamble a data set begins with a group 0008 or 0002 element, in either byte order.
        bare = head[:4] and head[:4] in _FIRST_TAGS
        if head[128:] != b"DICM" and not bare:
            raise _NotCtError("not DICOM")
        f.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values are dealt with below, one by one
            ds = pydicom.dcmread(f, stop_before_pixels=True, specific_tags=KEYWORDS, force=bool(bare))
            sop_class = str(ds.get("SOPClassUID", "") or "")
            if sop_class not in CT_CLASSES:
                raise _NotCtError(_kind(sop_class))
            syntax = str(getattr(ds.file_meta, "TransferSyntaxUID", "") or "")
            if not syntax:  # no meta group: what pydicom found by looking
                syntax = str(ImplicitVRLittleEndian if ds.original_encoding[0] else ExplicitVRLittleEndian)
            offset, length = _pixels(f, syntax)
            return _facts(ds, file, status, syntax, offset, length)


_FIRST_TAGS = {
    group + element
    for group, elements in (
        (b"\x08\x00", (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x12\x00", b"\x16\x00", b"\x18\x00")),
        (b"\x02\x00", (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x10\x00")),
        (b"\x00\x08", (b"\x00\x00", b"\x00\x01", b"\x00\x05", b"\x00\x08", b"\x00\x12", b"\x00\x16", b"\x00\x18")),
    )
    for element in elements
}


def _kind(sop_class: str) -> str:
    """Name what is not a CT image, in words of the standard and never of the file's own."""
    if not sop_class:
        return "DICOM without SOP Class UID"
    name = UID(sop_class).name
    return name if name != sop_class else "DICOM of an unknown SOP class"


def _pixels(f: Any, syntax: str) -> tuple[int | None, int | None]:
    """Return offset and length of plain pixel bytes, from where pydicom stopped; None where they are encoded."""
    if syntax not in PLAIN_SYNTAXES:
        return None, None
    start = f.tell()
    explicit = syntax == ExplicitVRLittleEndian
    head = f.read(12 if explicit else 8)
    if len(head) < (12 if explicit else 8) or head[:4] != b"\xe0\x7f\x10\x00":
        return None, 0  # no Pixel Data at all
    return start + len(head), int.from_bytes(head[-4:], "little")


def _facts(
    ds: pydicom.Dataset, file: str, status: os.stat_result, syntax: str, offset: int | None, length: int | None
) -> Found:
    signed = _integer(ds, "PixelRepresentation") == 1
    bits = _integer(ds, "BitsAllocated")
    spacing = _decimals(ds, "PixelSpacing", 2)
    position = _decimals(ds, "ImagePositionPatient", 3)
    header = SliceHeader(
        path=file,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sop_instance_uid=_text(ds, "SOPInstanceUID"),
        instance_number=_integer(ds, "InstanceNumber"),
        position_mm=(position[0], position[1], position[2]) if position else None,
        rescale_slope=_decimal(ds, "RescaleSlope"),
        rescale_intercept=_decimal(ds, "RescaleIntercept"),
        rescale_type=_text(ds, "RescaleType") or None,
        photometric=_text(ds, "PhotometricInterpretation") or None,
        samples_per_pixel=_integer(ds, "SamplesPerPixel") or 1,
        frames=_integer(ds, "NumberOfFrames") or 1,
        bits_allocated=bits,
        bits_stored=_integer(ds, "BitsStored"),
        high_bit=_integer(ds, "HighBit"),
        signed=signed,
        padding=_pixel_value(_integer(ds, "PixelPaddingValue"), bits, signed),
        padding_limit=_pixel_value(_integer(ds, "PixelPaddingRangeLimit"), bits, signed),
        transfer_syntax=syntax,
        pixel_offset=offset,
        pixel_bytes=length,
    )
    return Found(
        series_uid=_text(ds, "SeriesInstanceUID"),
        study_uid=_text(ds, "StudyInstanceUID"),
        frame_of_reference_uid=_text(ds, "FrameOfReferenceUID"),
        series_number=_integer(ds, "SeriesNumber"),
        rows=_integer(ds, "Rows") or 0,
        columns=_integer(ds, "Columns") or 0,
        pixel_spacing_mm=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        orientation=_decimals(ds, "ImageOrientationPatient", 6),
        header=header,
    )


def _text(ds: pydicom.Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    return "" if value is None else printable(str(value).strip(" \0"))


def _decimals(ds: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers, or None: half a position is none."""
    try:
        value = ds.get(keyword)
        values = tuple(float(v) for v in (value if isinstance(value, Iterable) else [value]))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _decimal(ds: pydicom.Dataset, keyword: str) -> float | None:
    values = _decimals(ds, keyword, 1)
    return values[0] if values else None


def _integer(ds: pydicom.Dataset, keyword: str) -> int | None:
    try:
        value = ds.get(keyword)
        return None if value is None else int(value)
    except (TypeError, ValueError):
        return None


def _pixel_value(value: int | None, bits: int | None, signed: bool) -> int | None:
    """Return a padding value with the sign of the pixels, whatever VR it was written with: 63536 may mean −2000."""
    if value is None or bits is None:
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def _group(found: list[Found]) -> Iterator[Series]:
    """Yield series: one per UID, several where matrices, spacings or orientations differ within one."""
    by_uid: dict[str, list[Found]] = defaultdict(list)
    for f in found:
        # Without a UID nothing says which files belong together; a folder at least keeps strangers apart.
        by_uid[f.series_uid or f"\0{os.path.dirname(f.header.path)}"].append(f)
    series = []
    for group in by_uid.values():
        stacks: list[list[Found]] = []
        for f in group:
            for stack in stacks:
                if _same_stack(f, stack[0]):
                    stack.append(f)
                    break
            else:
                stacks.append([f])
        stacks.sort(key=lambda stack: (-len(stack), stack[0].header.path))
        made = [_series(stack) for stack in stacks]
        series += made if len(made) == 1 else [replace(s, part=n) for n, s in enumerate(made, 1)]
    series.sort(key=lambda s: (s.folder, s.series_number is None, s.series_number or 0, s.key))
    yield from series


def _same_stack(a: Found, b: Found) -> bool:
    """Whether two slices can lie in one stack: equal matrices, spacing within 0.1 %, directions within 0.06°."""
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return _close(a.pixel_spacing_mm, b.pixel_spacing_mm, rtol=1e-3) and _close(a.orientation, b.orientation, atol=1e-3)


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, rtol: float = 0.0, atol: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b, strict=True))


def _series(stack: list[Found]) -> Series:
    first = stack[0]
    return Series(
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        series_number=first.series_number,
        rows=first.rows,
        columns=first.columns,
        pixel_spacing_mm=first.pixel_spacing_mm,
        orientation=first.orientation,
        part=0,
        folder=os.path.commonpath([os.path.dirname(f.header.path) for f in stack]),
        slices=tuple(f.header for f in stack),
    )
