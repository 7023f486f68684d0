"""Reads the headers of one file: its images or frames, and the offsets of their pixels."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import COARSEST_MM, FINEST_MM
from gpuprep.core.series import Image, OtherImage, SliceHeader, packed, sop_digest
from gpuprep.dicom.describe import acquired_of, description_of, dose_of
from gpuprep.dicom.elements import TAGS, UID_PATTERN, DataSet, element_of
from gpuprep.dicom.header_values import (
    Frame,
    binary_of,
    decimal_of,
    decimals_of,
    either,
    frames_of,
    hash_of,
    indices_of,
    integer_of,
    number_of,
    pixel_value,
    rescale_type_of,
    term_of,
    text_of,
    uid_of,
)
from gpuprep.dicom.parse_header import HEADER_BYTES, parse_header
from gpuprep.dicom.pixel_element import is_native_length, jpeg2000_format, locate_pixels
from gpuprep.dicom.uids import (
    BIG_ENDIAN,
    BIG_WORDS,
    GE_BIG_WORDS,
    NATIVE,
    SEGMENTATION_CLASSES,
    UNDEFINED_LENGTH,
)
from gpuprep.errors import nested_too_deeply
from gpuprep.files import filesystem
from gpuprep.files.archives import GZIP_MEMBER, ContainerError, kind, members, safe_parts
from gpuprep.files.bounded_reader import open_bounded

if TYPE_CHECKING:
    pass

# pydicom is imported late: workers read the files, so the parent process of a cohort does not need it.

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}


PHASE_ATTRIBUTES = {
    "TemporalPositionTimeOffset": "offset",
    "NominalPercentageOfRespiratoryPhase": "respiratory",
    "NominalPercentageOfCardiacPhase": "cardiac",
    "NominalCardiacTriggerDelayTime": "delay",
    "NominalRespiratoryTriggerDelayTime": "respiratory-delay",
    "TriggerTime": "trigger",
    "MonoenergeticEnergyEquivalent": "energy",
}
"""Attributes of phases and energies, and their names in `SliceHeader.phase`."""

FARTHEST_MM = 1e6
"""Largest magnitude of a coordinate; larger ones come from a damaged header."""


@dataclass(slots=True)
class Contents:
    """Images and other contents of one file."""

    images: list[Image] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    """Number of other contents, by kind."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Unreadable DICOM objects: (path, reason)."""
    segmentations: list[str] = field(default_factory=list)
    """The file itself, if it is a segmentation that names its series: RTSTRUCT, SEG or LIDC-IDRI XML."""
    others: list[OtherImage] = field(default_factory=list)
    """Images of other SOP classes than CT."""
    cacheable: bool = True
    """Whether the result may be cached; False after an error of the file system."""


def read_headers(files: list[str]) -> list[Contents]:
    """Return the contents of each file, which may be DICOM, gzip'd DICOM, or a zip archive."""
    return [_file_contents(file) for file in files]


def _file_contents(file: str) -> Contents:
    try:
        status = filesystem.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            return Contents(passed_over={"not a regular file": 1}, cacheable=False)
        with open_bounded(file, None, HEADER_BYTES) as f:
            packed = kind(f.read(4))
            f.seek(0)
            if packed is None:
                return _object_contents(f, file, None, status, status.st_size)
        if packed == "zip":
            return _archive_contents(file, status)
        with open_bounded(file, GZIP_MEMBER, HEADER_BYTES) as f:
            return _object_contents(f, file, GZIP_MEMBER, status, status.st_size)
    except OSError as exc:
        return Contents(unreadable=[(printable(file), _error_text(exc))], cacheable=False)


def _archive_contents(file: str, status: os.stat_result) -> Contents:
    """Return the contents of a zip archive; archives inside it are reported as unreadable."""
    total = Contents()
    passed_over: Counter[str] = Counter()
    for member in members(file):
        try:
            if member.error:
                raise ContainerError(member.error)
            with open_bounded(file, member.name, HEADER_BYTES) as f:
                found = _object_contents(f, file, member.name, status, member.bytes)
        except OSError as exc:
            total.unreadable.append((_name(file, member.name), _error_text(exc)))
            continue
        total.images += found.images
        total.others += found.others
        total.unreadable += found.unreadable
        passed_over.update(found.passed_over)
        total.cacheable &= found.cacheable
    total.passed_over = dict(passed_over)
    return total


class _NotCtError(Exception):
    """The file is not a CT image; the text names its kind."""

    def __init__(self, text: str, *, segmentation: bool = False, other: OtherImage | None = None) -> None:
        super().__init__(text)
        self.segmentation = segmentation
        self.other = other


def _object_contents(f: BinaryIO, file: str, member: str | None, status: os.stat_result, size: int) -> Contents:
    """Return the contents of one DICOM file, which may be a member of an archive."""
    try:
        return Contents(images=_read_header(f, file, member, status, size))
    except _NotCtError as exc:
        # Segmentations inside archives are not read as masks, so they are only counted.
        masks = [file] if exc.segmentation and member is None else []
        others = [exc.other] if exc.other else []
        return Contents(passed_over={str(exc): 1}, segmentations=masks, others=others)
    except Exception as exc:  # pydicom raises exceptions of many types for damaged files
        if nested_too_deeply(exc):
            return Contents(unreadable=[(_name(file, member), "its sequences are nested too deeply")])
        return Contents(unreadable=[(_name(file, member), _error_text(exc))], cacheable=not isinstance(exc, OSError))


def _name(file: str, member: str | None) -> str:
    return printable(f"{file}/{member}" if member else file)


def _error_text(exc: Exception) -> str:
    return printable(f"{type(exc).__name__}: {exc}")


def _read_header(f: BinaryIO, file: str, member: str | None, status: os.stat_result, size: int) -> list[Image]:
    if not size and (member or file).lower().endswith(".dcm"):
        raise ValueError("the file is empty")
    head = f.read(132)
    # Without a preamble, the file begins with an element of group 0008 or 0002, in either byte order.
    no_preamble = head[:4] in _FIRST_TAGS
    if head[128:] != b"DICM" and not no_preamble:
        if member is not None and kind(head[:4]):
            raise ValueError("packed twice: unpack the outer archive")
        if b"<" in head[:4] and b"<LidcReadMessage" in head + f.read(1024):
            raise _NotCtError("LIDC-IDRI XML", segmentation=True)
        raise _NotCtError("not DICOM")
    f.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid values are handled below
        parsed = parse_header(f, no_preamble=no_preamble)
        ds, syntax = parsed.dataset, parsed.syntax
        _check_class(ds, parsed.meta_class, no_preamble)
        if not UID_PATTERN.fullmatch(syntax):
            raise ValueError("the Transfer Syntax UID is invalid")
        offset, length = locate_pixels(*parsed.pixel_element(), parsed.implicit, syntax == BIG_ENDIAN)
        if syntax == GE_BIG_WORDS and getattr(ds.get_item(TAGS["BitsAllocated"]), "VR", None):
            offset = None  # this syntax has implicit VRs; with explicit ones, the byte order of the pixels is unknown
        encoded = stream = None
        if syntax not in NATIVE and (length == UNDEFINED_LENGTH or not is_native_length(ds, length)):
            if length == UNDEFINED_LENGTH and offset is not None:
                stream = jpeg2000_format(parsed.content, offset)
            # With an Extended Offset Table, the file is parsed again when its pixels are read.
            encoded = offset if TAGS["ExtendedOffsetTable"] not in ds else None
            offset = length = None
        origin = _Origin(file, member, status.st_mtime_ns, size, syntax, offset, length, encoded, stream)
        images = [_parse_image(frame, origin, n, count) for n, (frame, count) in enumerate(frames_of(ds))]
    if len(images) < (count := images[0].header.frames):  # the position of one frame does not give those of the others
        images = [images[0]._replace(header=images[0].header._replace(position_mm=None, frames=count))]
    return images


_FIRST_TAGS = {
    group + element
    for group, elements in (
        (b"\x08\x00", (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x12\x00", b"\x16\x00", b"\x18\x00")),
        (b"\x02\x00", (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x10\x00")),
        (b"\x00\x08", (b"\x00\x00", b"\x00\x01", b"\x00\x05", b"\x00\x08", b"\x00\x12", b"\x00\x16", b"\x00\x18")),
    )
    for element in elements
}


def _check_class(ds: DataSet, meta_class: str, no_preamble: bool) -> None:
    """Raise unless the file is a CT image by its data set, or by its meta group if the data set is truncated."""
    kind = text_of(ds, "SOPClassUID") or meta_class
    if kind in CT_CLASSES:
        return
    if meta_class in CT_CLASSES:
        raise ValueError("SOP Class UID is damaged: the meta group declares a CT image")
    if not kind:
        if no_preamble:
            raise _NotCtError("not DICOM")
        raise ValueError("no SOP Class UID: cut short or damaged")
    from pydicom.uid import UID

    # The text is a name of the standard, never taken from the file.
    name = UID(kind).name
    name = name if name != kind else "DICOM of an unknown SOP class"
    segmentation = kind in SEGMENTATION_CLASSES
    raise _NotCtError(name, segmentation=segmentation, other=None if segmentation else _other_image(ds))


def _other_image(ds: DataSet) -> OtherImage | None:
    """Return the attributes by which a segmentation refers to a non-CT image; None for objects that are not images."""
    series_uid = uid_of(ds, "SeriesInstanceUID")
    if not series_uid or TAGS["Rows"] not in ds:
        return None
    return OtherImage(series_uid, term_of(ds, "Modality") or "", sop_digest(uid_of(ds, "SOPInstanceUID")))


@dataclass(frozen=True, slots=True)
class _Origin:
    """File of an image, and the offsets of its pixels."""

    path: str
    member: str | None
    mtime_ns: int
    file_bytes: int
    syntax: str
    offset: int | None
    length: int | None
    encoded_offset: int | None
    stream: str | None


def _parse_image(ds: Frame, origin: _Origin, frame: int, frames: int) -> Image:
    representation = binary_of(ds, "PixelRepresentation")
    signed = {0: False, 1: True}.get(representation) if representation is not None else None
    bits = binary_of(ds, "BitsAllocated")
    rows, columns = binary_of(ds, "Rows") or 0, binary_of(ds, "Columns") or 0
    spacing = decimals_of(ds, "PixelSpacing", 2)
    position = decimals_of(ds, "ImagePositionPatient", 3)
    image_type = text_of(ds, "FrameType") or text_of(ds, "ImageType")
    kinds = [part.strip() for part in image_type.upper().split("\\")]
    offset, length = origin.offset, origin.length
    if origin.syntax in BIG_WORDS and bits != 16:
        offset = None  # 8-bit pixels may be packed in pairs into big-endian words: pydicom reads them
    if offset is not None and length is not None and frames > 1 and length != UNDEFINED_LENGTH:
        size = rows * columns * (bits or 0) // 8
        remaining = max(0, length - frame * size)
        offset, length = offset + frame * size, remaining if frame == frames - 1 else min(size, remaining)
    header = SliceHeader(
        path=origin.path,
        member=origin.member,
        frame=frame,
        frames=frames,
        file_bytes=origin.file_bytes,
        mtime_ns=origin.mtime_ns,
        sop_instance_uid=uid_of(ds, "SOPInstanceUID"),
        instance_number=integer_of(ds, "InstanceNumber"),
        position_mm=(position[0], position[1], position[2])
        if position and max(map(abs, position)) <= FARTHEST_MM
        else None,
        localizer="LOCALIZER" in kinds,
        secondary="SECONDARY" in kinds[1:2],
        modality=term_of(ds, "Modality"),
        temporal_position=either(integer_of(ds, "TemporalPositionIdentifier"), binary_of(ds, "TemporalPositionIndex")),
        acquisition_number=either(binary_of(ds, "FrameAcquisitionNumber"), integer_of(ds, "AcquisitionNumber")),
        acquisition_time=_acquisition_time(ds),
        reconstruction=hash_of("\n".join([image_type, text_of(ds, "ConvolutionKernel"), text_of(ds, "KVP")])),
        phase=packed(
            (name, number)
            for k, name in PHASE_ATTRIBUTES.items()
            if element_of(ds, k) is not None and (number := number_of(ds, k))
        ),
        rescale_slope=decimal_of(ds, "RescaleSlope"),
        rescale_intercept=decimal_of(ds, "RescaleIntercept"),
        rescale_type=rescale_type_of(ds, kinds),
        photometric=term_of(ds, "PhotometricInterpretation"),
        samples_per_pixel=binary_of(ds, "SamplesPerPixel") or 1,
        bits_allocated=bits,
        bits_stored=binary_of(ds, "BitsStored"),
        high_bit=binary_of(ds, "HighBit"),
        signed=signed,
        padding=pixel_value(binary_of(ds, "PixelPaddingValue"), bits, signed),
        padding_limit=pixel_value(binary_of(ds, "PixelPaddingRangeLimit"), bits, signed),
        transfer_syntax=origin.syntax,
        pixel_offset=offset,
        pixel_bytes=length,
        encoded_offset=origin.encoded_offset,
        stream=origin.stream,
        modality_lut=bool((lut := element_of(ds, "ModalityLUTSequence")) is not None and lut.value),
        stack_id=_stack_id(ds),
        in_stack=binary_of(ds, "InStackPositionNumber"),
        other=packed((name, value) for name, value in _other_attributes(ds) if value),
    )
    image = Image(
        series_uid=uid_of(ds, "SeriesInstanceUID"),
        study_uid=uid_of(ds, "StudyInstanceUID"),
        patient=hash_of(patient) if (patient := text_of(ds, "PatientID")) else "",
        frame_of_reference_uid=uid_of(ds, "FrameOfReferenceUID"),
        series_number=integer_of(ds, "SeriesNumber"),
        rows=rows,
        columns=columns,
        pixel_spacing_mm=(spacing[0], spacing[1])
        if spacing and FINEST_MM <= min(spacing) <= max(spacing) <= COARSEST_MM
        else None,
        orientation=decimals_of(ds, "ImageOrientationPatient", 6),
        folder=_folder(origin.path, origin.member),
        description=description_of(ds),
        dose=dose_of(ds),
        acquired_s=acquired_of(ds),
        header=header,
    )
    return image._replace(header=header._replace(remarks=" ".join(sorted(ds.remarks)))) if ds.remarks else image


def _folder(path: str, member: str | None) -> str:
    return os.path.join(path, *safe_parts(member)[:-1]) if member else os.path.dirname(path)


def _acquisition_time(ds: Frame) -> str:
    when = text_of(ds, "FrameAcquisitionDateTime") or text_of(ds, "AcquisitionDateTime")
    when = when or text_of(ds, "AcquisitionDate") + text_of(ds, "AcquisitionTime")
    return hash_of(when) if when else ""


def _other_attributes(ds: Frame) -> Iterator[tuple[str, str]]:
    """Yield the attributes of `LAST_RESORT` in `gpuprep.dicom.acquisition_keys`, as hashes and whole numbers."""
    yield "options", hash_of(options) if (options := text_of(ds, "ScanOptions")) else ""
    for name, date, time in (("series", "SeriesDate", "SeriesTime"), ("content", "ContentDate", "ContentTime")):
        when = text_of(ds, date) + text_of(ds, time)
        yield name, hash_of(when) if when else ""
    yield "index", ",".join(map(str, indices_of(ds)))


def _stack_id(ds: Frame) -> str:
    """Return *Stack ID* if it is a number, else a hash of it, as it may be any short text."""
    text = text_of(ds, "StackID")
    return text if not text or (text.isascii() and text.isdigit()) else f"#{hash_of(text)}"
