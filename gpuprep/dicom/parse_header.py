"""Parses the header of a DICOM file: an ordinary one from its bytes, any other one with pydicom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

from gpuprep.dicom import element_stream
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.element_stream import OrdinaryHeader
from gpuprep.dicom.elements import IMAGE_TAGS, DataSet
from gpuprep.dicom.header_values import Frame, text_of
from gpuprep.dicom.uids import BIG_ENDIAN, EXPLICIT_VR, IMPLICIT_VR

# pydicom is imported late: workers read the files, so the parent process of a cohort does not need it.

HEADER_BYTES = 16 * 2**20
"""Limit on the length of a header element and of an inflated header."""


@dataclass(frozen=True, slots=True)
class ParsedHeader:
    """The wanted elements of a file before *Pixel Data*."""

    content: BinaryIO
    """The file, or the inflated data set of a deflated file."""
    dataset: DataSet
    """The elements; sequences of functional groups only in a data set of pydicom."""
    implicit: bool
    """Whether the elements have no VR, whatever the transfer syntax says."""
    syntax: str
    """Transfer syntax, which may be any text."""
    meta_class: str
    """SOP class of the meta group."""
    ordinary: OrdinaryHeader | None = None
    """The header, if it was read without pydicom."""

    def pixel_element(self) -> tuple[int, bytes]:
        """Return the offset where reading stopped, and the next 12 bytes: of *Pixel Data*, if the file has it."""
        if self.ordinary is not None:
            return self.ordinary.pixels, self.ordinary.pixels_head
        return self.content.tell(), self.content.read(12)


def parse_header(f: BinaryIO, *, no_preamble: bool) -> ParsedHeader:
    """Return the elements of `IMAGE_TAGS` of a file that is positioned at its beginning.

    pydicom warns about invalid values, and raises exceptions of many types for damaged files.
    """
    if (header := element_stream.read_ordinary_header(f)) is not None:
        meta_class = text_of(header.meta, "MediaStorageSOPClassUID")
        return ParsedHeader(f, header.dataset, header.syntax == IMPLICIT_VR, header.syntax, meta_class, header)
    f.seek(0)
    return _parse_with_pydicom(f, no_preamble)


def _parse_with_pydicom(f: BinaryIO, no_preamble: bool) -> ParsedHeader:
    import pydicom

    content, deflated, meta_class = inflated(f, HEADER_BYTES)
    force = no_preamble or content is not f
    ds = pydicom.dcmread(content, stop_before_pixels=True, specific_tags=_pydicom_tags(), force=force)
    meta = Frame(ds.file_meta)
    implicit, little = ds.original_encoding
    syntax = deflated if content is not f else text_of(meta, "TransferSyntaxUID")
    if not syntax:  # no meta group: pydicom detects the encoding
        syntax = IMPLICIT_VR if implicit else EXPLICIT_VR if little else BIG_ENDIAN
    return ParsedHeader(content, ds, bool(implicit), syntax, meta_class or text_of(meta, "MediaStorageSOPClassUID"))


@cache
def _pydicom_tags() -> list[Any]:
    """Return `IMAGE_TAGS` as pydicom's tags, created once per process."""
    from pydicom.tag import Tag

    return [Tag(tag) for tag in IMAGE_TAGS.values()]
