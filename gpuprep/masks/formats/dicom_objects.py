"""Opens DICOM objects that hold a segmentation: structure sets (RTSTRUCT) and segmentation images (SEG).

References
----------
DICOM PS3.4, B.5 (Standard SOP Classes).
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from gpuprep.core.formatting import printable
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.elements import SEGMENTATION_TAGS, TAGS
from gpuprep.dicom.sequence_items import DELIMITER_BYTES, ordinary_length
from gpuprep.dicom.uids import LABEL_MAP_SEGMENTATION, RT_STRUCTURE_SET, SEGMENTATION, UNDEFINED_LENGTH
from gpuprep.errors import NotASegmentationError, SegmentationError, nested_too_deeply
from gpuprep.files import filesystem
from gpuprep.files.bounded_reader import BoundedReader
from gpuprep.masks.formats import rtstruct, seg
from gpuprep.masks.formats.segmentation_values import text
from gpuprep.masks.model import References, Segmentation

if TYPE_CHECKING:
    import pydicom
    from pydicom.tag import BaseTag

# pydicom is imported only when a file is read, because its import is slow.


CONTOURS = TAGS["ROIContourSequence"]
"""Tag of the element that is nearly all of a structure set."""

LAST_REFERENCE = TAGS["ReferencedFrameOfReferenceSequence"]
"""Tag of the last element that says to which series an object belongs."""

MOST_READS = 20_000_000
"""Limit of read calls on a file; files with several hundred thousand contours or frames need fewer."""

MOST_INFLATED_BYTES = 2**30
"""Limit of the size of a deflated file after unpacking into memory; a few megabytes can expand to any size."""


class ObjectFormat(NamedTuple):
    """A kind of DICOM object that holds a segmentation."""

    read: Callable[[pydicom.Dataset, str, ReadingOptions], Segmentation]
    """Returns the segmentation of an object, given its path."""
    references: Callable[[pydicom.Dataset], References]
    """Returns the UIDs that a damaged object refers to, as far as it can be read."""


OBJECTS = {
    RT_STRUCTURE_SET: ObjectFormat(rtstruct.read, rtstruct.references),
    SEGMENTATION: ObjectFormat(seg.read, seg.references),
    LABEL_MAP_SEGMENTATION: ObjectFormat(seg.read, seg.references),
}
"""Formats by SOP Class UID."""


class _InflatedReader(BoundedReader):
    """Reader of the unpacked content of a deflated file."""

    name = ""  # attribute that pydicom reads

    def __init__(self, content: io.BytesIO) -> None:
        # BytesIO is no RawIOBase, but has the methods that a buffered reader calls.
        super().__init__(cast(io.RawIOBase, content), most_reads=MOST_READS)


def read_object(path: str, reading: ReadingOptions) -> Segmentation:
    """Read a structure set or a segmentation image.

    Parameters
    ----------
    path : str
        Path of the file, which may lack preamble and meta group.
    reading : Reading
        Options; only `threshold` is used, for fractional segmentations.

    Raises
    ------
    SegmentationError
        If the file is neither, or is damaged.
    """
    ds: pydicom.Dataset | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of irregular values, which are checked here
            ds = _dataset(path)
            return _read(ds, path, reading)
    except NotASegmentationError:
        raise
    except SegmentationError as exc:
        _references(ds, path).attach_to(exc)
        raise
    except Exception as exc:  # damaged files make pydicom raise exceptions of any class
        if nested_too_deeply(exc):
            error = SegmentationError("its sequences are nested too deeply: the file is damaged")
            raise _references(ds, path).attach_to(error) from None
        if isinstance(exc, OSError) and exc.strerror:
            raise SegmentationError(f"it cannot be read: {exc.strerror}") from exc
        detail = " ".join(printable(str(exc)).split())
        error = SegmentationError(f"it cannot be read as DICOM: {type(exc).__name__}: {detail[:200]}")
        raise _references(ds, path).attach_to(error) from exc


def _references(ds: pydicom.Dataset | None, path: str) -> References:
    """Return the UIDs that a damaged file refers to; if it could not be parsed, those before the damage."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        ds = _dataset(path, until=LAST_REFERENCE) if ds is None else ds
        return OBJECTS.get(_kind(ds), OBJECTS[SEGMENTATION]).references(ds)
    return References()


def _dataset(path: str, until: int | None = None) -> pydicom.Dataset:
    """Return the data set of a file, or its elements up to the tag `until`."""
    if not stat.S_ISREG(filesystem.stat(path).st_mode):  # opening a pipe would wait for ever
        raise SegmentationError("not a regular file")
    with BoundedReader(filesystem.opened(path), most_reads=MOST_READS) as file:
        return _parsed(file, until)


def _parsed(file: BinaryIO, until: int | None) -> pydicom.Dataset:
    """Return the elements of `dicom_elements.TAGS` in a file; pydicom leaves most values as bytes."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    content, _, announced = inflated(file, MOST_INFLATED_BYTES)
    if isinstance(content, io.BytesIO):
        if content.getbuffer().nbytes >= MOST_INFLATED_BYTES:
            raise SegmentationError(
                f"unpacked it is larger than {MOST_INFLATED_BYTES} bytes: write it with another transfer syntax"
            )
        content = _InflatedReader(content)
    wanted: list[BaseTag | int] = [Tag(tag) for tag in SEGMENTATION_TAGS.values()]
    if until is not None:
        ds = read_partial(content, lambda tag, _vr, _length: tag > until, force=True, specific_tags=wanted)
    elif (found := _with_contours_as_bytes(content, wanted)) is not None:
        ds = found
    else:
        content.seek(0)
        ds = read_partial(content, None, force=True, specific_tags=wanted)
    if announced:
        ds.file_meta.add_new(TAGS["MediaStorageSOPClassUID"], "UI", announced)
    return ds


def _with_contours_as_bytes(file: BinaryIO, wanted: list[BaseTag | int]) -> pydicom.FileDataset | None:
    """Return the elements of a file with *ROI Contour Sequence* as bytes, even if its length is undefined.

    pydicom parses sequences of undefined length to find their end.

    Returns
    -------
    FileDataset or None
        None if the file is not ordinary.
    """
    from pydicom.dataelem import RawDataElement
    from pydicom.filereader import data_element_generator, read_partial
    from pydicom.tag import BaseTag

    stopped_at: list[str | None] = []

    def is_undefined(tag: int, vr: str | None, length: int) -> bool:
        found = tag == CONTOURS and length == UNDEFINED_LENGTH
        if found:
            stopped_at.append(vr)
        return found

    try:
        ds = read_partial(file, is_undefined, force=True, specific_tags=wanted)
        if not stopped_at:
            return ds
        encoding: Any = ds.get_item(TAGS["SOPClassUID"])
        vr, implicit = stopped_at[0], encoding.is_implicit_VR
        start = file.tell() + (8 if implicit else 12)
        if vr != (None if implicit else "SQ") or not encoding.is_little_endian:
            return None
        file.seek(start)
        content = file.read()
        length = ordinary_length(content, implicit)
        if length is None:
            return None
        value = content[:length]
        del content
        file.seek(start + length + DELIMITER_BYTES)
        if any(data_element_generator(file, implicit, True, specific_tags=wanted)):
            return None
    except Exception:  # pydicom comes upon it again, and the caller reports it
        return None
    ds[BaseTag(CONTOURS)] = RawDataElement(BaseTag(CONTOURS), vr, UNDEFINED_LENGTH, value, start, implicit, True)
    return ds


def _read(ds: pydicom.Dataset, path: str, reading: ReadingOptions) -> Segmentation:
    kind = _kind(ds)
    if kind in OBJECTS:
        return OBJECTS[kind].read(ds, path, reading)
    if not kind:
        raise SegmentationError("not DICOM, or cut short: it has no SOP Class UID")
    from pydicom.uid import UID

    # The message has the name in the standard, and no text of the file.
    known = UID(kind).name
    name = known if known != kind else "an object of an unknown SOP class"
    raise NotASegmentationError(f"{name} cannot be read as a segmentation: give an RT Structure Set or a Segmentation")


def _kind(ds: pydicom.Dataset) -> str:
    """Return the SOP Class UID of an object."""
    return text(ds, "SOPClassUID") or text(ds.file_meta, "MediaStorageSOPClassUID")
