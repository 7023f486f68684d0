"""One file to the facts of its header: what it is, where it lies, where its pixels begin. Pixels are not read."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import COARSEST_MM, FINEST_MM
from gpuprep.core.series import MALFORMED, Image, OtherImage, SliceHeader, packed, sop_digest
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.jpeg_markers import frame_info
from gpuprep.dicom.odd_numbers import BINARY, binary_numbers, with_points, written_number
from gpuprep.dicom.uids import (
    BIG_ENDIAN,
    BIG_WORDS,
    EXPLICIT_VR,
    GE_BIG_WORDS,
    IMPLICIT_VR,
    NATIVE,
    SEGMENTATION_CLASSES,
    UNDEFINED_LENGTH,
)
from gpuprep.errors import nested_too_deeply
from gpuprep.files import filesystem
from gpuprep.files.archives import GZIP_MEMBER, ContainerError, kind, members, safe_parts
from gpuprep.files.bounded_reader import open_frugally

if TYPE_CHECKING:
    import pydicom

# pydicom is imported where a file is read: the parent of a cohort has its workers do that, and stays small.

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

TAGS = {
    "MediaStorageSOPClassUID": 0x0002_0002,
    "TransferSyntaxUID": 0x0002_0010,
    "ImageType": 0x0008_0008,
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "SeriesDate": 0x0008_0021,
    "AcquisitionDate": 0x0008_0022,
    "ContentDate": 0x0008_0023,
    "AcquisitionDateTime": 0x0008_002A,
    "SeriesTime": 0x0008_0031,
    "AcquisitionTime": 0x0008_0032,
    "ContentTime": 0x0008_0033,
    "Modality": 0x0008_0060,
    "FrameType": 0x0008_9007,
    "PatientID": 0x0010_0020,
    "ScanOptions": 0x0018_0022,
    "FrameAcquisitionDateTime": 0x0018_9074,
    "KVP": 0x0018_0060,
    "TriggerTime": 0x0018_1060,
    "ConvolutionKernel": 0x0018_1210,
    "MultienergyCTProcessingSequence": 0x0018_9363,
    "MonoenergeticEnergyEquivalent": 0x0018_937C,
    "InstanceNumber": 0x0020_0013,
    "AcquisitionNumber": 0x0020_0012,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "SeriesNumber": 0x0020_0011,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
    "TemporalPositionIdentifier": 0x0020_0100,
    "TemporalPositionIndex": 0x0020_9128,
    "StackID": 0x0020_9056,
    "InStackPositionNumber": 0x0020_9057,
    "NominalCardiacTriggerDelayTime": 0x0020_9153,
    "FrameAcquisitionNumber": 0x0020_9156,
    "DimensionIndexValues": 0x0020_9157,
    "NominalPercentageOfCardiacPhase": 0x0020_9241,
    "NominalPercentageOfRespiratoryPhase": 0x0020_9245,
    "NominalRespiratoryTriggerDelayTime": 0x0020_9255,
    "TemporalPositionTimeOffset": 0x0020_930D,
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "PixelPaddingValue": 0x0028_0120,
    "PixelPaddingRangeLimit": 0x0028_0121,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "RescaleType": 0x0028_1054,
    "ModalityLUTSequence": 0x0028_3000,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
    "PerFrameFunctionalGroupsSequence": 0x5200_9230,
    "ExtendedOffsetTable": 0x7FE0_0001,
}
"""Everything that is read of a header. No name and no free text ever enters the program. Dates, times and Patient ID
enter it only as hashes, which tell images of one series apart."""

PHASES = {
    "TemporalPositionTimeOffset": "offset",
    "NominalPercentageOfRespiratoryPhase": "respiratory",
    "NominalPercentageOfCardiacPhase": "cardiac",
    "NominalCardiacTriggerDelayTime": "delay",
    "NominalRespiratoryTriggerDelayTime": "respiratory-delay",
    "TriggerTime": "trigger",
    "MonoenergeticEnergyEquivalent": "energy",
}
"""Numbers that tell phases and energies apart, and their names in `SliceHeader.phase`."""

FARTHEST_MM = 1e6
"""Positions beyond this are damage."""

MOST_DIMENSIONS = 16
"""Dimensions of a multi-frame image beyond these are damage."""

MOST_FRAMES = 2**16
"""More in one file come from a damaged header."""


@dataclass(slots=True)
class Contents:
    """What one file turned out to be."""

    images: list[Image] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    """What else it holds, counted by kind."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """DICOM in it that cannot be read: (path, reason)."""
    segmentations: list[str] = field(default_factory=list)
    """Itself, if it is a segmentation that says to which series it belongs: RTSTRUCT, SEG or LIDC-IDRI XML."""
    others: list[OtherImage] = field(default_factory=list)
    """Images in it that are no CT."""
    lasting: bool = True
    """Whether the same bytes would give the same answer: not where the system refused to read them."""


def read_headers(files: list[str]) -> list[Contents]:
    """Return what each of some files holds: itself, its frames, or what is packed into it."""
    return [_contents(file) for file in files]


def _contents(file: str) -> Contents:
    try:
        status = filesystem.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Contents(passed_over={"not a regular file": 1}, lasting=False)
        with open_frugally(file, None, HEADER_BYTES) as f:
            packed = kind(f.read(4))
            f.seek(0)
            if packed is None:
                return _image(f, file, None, status, status.st_size)
        if packed == "zip":
            return _archive(file, status)
        with open_frugally(file, GZIP_MEMBER, HEADER_BYTES) as f:
            return _image(f, file, GZIP_MEMBER, status, status.st_size)
    except OSError as exc:
        return Contents(unreadable=[(printable(file), _words(exc))], lasting=False)


def _archive(file: str, status: os.stat_result) -> Contents:
    """Return what a zip archive holds; archives inside it are not opened, and named as unreadable."""
    total = Contents()
    passed_over: Counter[str] = Counter()
    for member in members(file):
        try:
            if member.error:
                raise ContainerError(member.error)
            with open_frugally(file, member.name, HEADER_BYTES) as f:
                found = _image(f, file, member.name, status, member.bytes)
        except OSError as exc:
            total.unreadable.append((_name(file, member.name), _words(exc)))
            continue
        total.images += found.images
        total.others += found.others
        total.unreadable += found.unreadable
        passed_over.update(found.passed_over)
        total.lasting &= found.lasting
    total.passed_over = dict(passed_over)
    return total


class _NotCtError(Exception):
    """The file is no CT image; the text says what it is."""

    def __init__(self, text: str, *, segmentation: bool = False, other: OtherImage | None = None) -> None:
        super().__init__(text)
        self.segmentation = segmentation
        self.other = other


def _image(f: BinaryIO, file: str, member: str | None, status: os.stat_result, size: int) -> Contents:
    """Return what one DICOM file is, as it lies on disk or packed into another."""
    try:
        return Contents(images=_read_header(f, file, member, status, size))
    except _NotCtError as exc:
        # Packed ones are not read as masks, and so are only counted.
        masks = [file] if exc.segmentation and member is None else []
        others = [exc.other] if exc.other else []
        return Contents(passed_over={str(exc): 1}, segmentations=masks, others=others)
    except Exception as exc:  # pydicom raises whatever a broken file provokes
        if nested_too_deeply(exc):
            return Contents(unreadable=[(_name(file, member), "its sequences are nested too deeply")])
        return Contents(unreadable=[(_name(file, member), _words(exc))], lasting=not isinstance(exc, OSError))


def _name(file: str, member: str | None) -> str:
    return printable(f"{file}/{member}" if member else file)


def _words(exc: Exception) -> str:
    return printable(f"{type(exc).__name__}: {exc}")


def _read_header(f: BinaryIO, file: str, member: str | None, status: os.stat_result, size: int) -> list[Image]:
    import pydicom

    if not size and (member or file).lower().endswith(".dcm"):
        raise ValueError("the file is empty")
    head = f.read(132)
    # Without a preamble a data set begins with a group 0008 or 0002 element, in either byte order.
    bare = head[:4] in _FIRST_TAGS
    if head[128:] != b"DICM" and not bare:
        if member is not None and kind(head[:4]):
            raise ValueError("packed twice: unpack the outer archive")
        if b"<" in head[:4] and b"<LidcReadMessage" in head + f.read(1024):
            raise _NotCtError("LIDC-IDRI XML", segmentation=True)
        raise _NotCtError("not DICOM")
    f.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values are dealt with below, one by one
        content, deflated, announced = inflated(f, HEADER_BYTES)
        force = bare or content is not f
        ds = pydicom.dcmread(content, stop_before_pixels=True, specific_tags=_wanted(), force=force)
        meta = _Frame(ds.file_meta)
        announced = announced or _text(meta, "MediaStorageSOPClassUID")
        _check_class(ds, announced, bare)
        if content is not f:
            syntax = deflated
        elif not _UID.fullmatch(syntax := _text(meta, "TransferSyntaxUID")):
            raise ValueError("the Transfer Syntax UID is none")
        elif not syntax:
            implicit, little = ds.original_encoding  # no meta group: what pydicom found by looking
            syntax = IMPLICIT_VR if implicit else EXPLICIT_VR if little else BIG_ENDIAN
        offset, length = _pixels(content, bool(ds.original_encoding[0]), syntax == BIG_ENDIAN)
        if syntax == GE_BIG_WORDS and getattr(ds.get_item(TAGS["BitsAllocated"]), "VR", None):
            offset = None  # an explicit VR, which it never has: the order of bytes of its pixels is doubtful as well
        encoded = stream = None
        if syntax not in NATIVE and (length == UNDEFINED_LENGTH or not _fills(ds, length)):
            if length == UNDEFINED_LENGTH and offset is not None:
                stream = _stream(content, offset)
            # Where a table of other offsets goes before the fragments, it is read with them.
            encoded = offset if TAGS["ExtendedOffsetTable"] not in ds else None
            offset = length = None
        origin = _Origin(file, member, status.st_mtime_ns, size, syntax, offset, length, encoded, stream)
        images = [_facts(frame, origin, n, count) for n, (frame, count) in enumerate(_frames(ds))]
    if len(images) < (count := images[0].header.frames):  # of one frame's place nothing follows for the others
        images = [images[0]._replace(header=images[0].header._replace(position_mm=None, frames=count))]
    return images


@cache
def _wanted() -> list[Any]:
    """Return the tags of `TAGS` as pydicom has them, made once and not for every file."""
    from pydicom.tag import Tag

    return [Tag(tag) for tag in TAGS.values()]


HEADER_BYTES = 16 * 2**20
"""No element of a header is longer, and no deflated header."""

_FIRST_TAGS = {
    group + element
    for group, elements in (
        (b"\x08\x00", (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x12\x00", b"\x16\x00", b"\x18\x00")),
        (b"\x02\x00", (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x10\x00")),
        (b"\x00\x08", (b"\x00\x00", b"\x00\x01", b"\x00\x05", b"\x00\x08", b"\x00\x12", b"\x00\x16", b"\x00\x18")),
    )
    for element in elements
}


def _check_class(ds: pydicom.Dataset, announced: str, bare: bool) -> None:
    """Raise unless the file is a CT image: by its data set, or by its meta group where the data set was cut short."""
    kind = _text(ds, "SOPClassUID") or announced
    if kind in CT_CLASSES:
        return
    if announced in CT_CLASSES:
        raise ValueError("SOP Class UID is damaged: the meta group announces a CT image")
    if not kind:
        if bare:
            raise _NotCtError("not DICOM")
        raise ValueError("no SOP Class UID: cut short or damaged")
    from pydicom.uid import UID

    # In words of the standard, never of the file's own.
    name = UID(kind).name
    name = name if name != kind else "DICOM of an unknown SOP class"
    segmentation = kind in SEGMENTATION_CLASSES
    raise _NotCtError(name, segmentation=segmentation, other=None if segmentation else _other_image(ds))


def _other_image(ds: pydicom.Dataset) -> OtherImage | None:
    """Return what a segmentation may say of an image that is no CT; None for what is no image, or of no series."""
    series_uid = _uid(ds, "SeriesInstanceUID")
    if not series_uid or TAGS["Rows"] not in ds:
        return None
    return OtherImage(series_uid, _term(ds, "Modality") or "", sop_digest(_uid(ds, "SOPInstanceUID")))


def _pixels(f: BinaryIO, implicit: bool, big: bool) -> tuple[int | None, int | None]:
    """Return offset and length of the value of the pixels, from where pydicom stopped; length 0 where there are none.

    The element itself shows whether it has a VR: read as a length, the letters of one that pixels may have would be an
    odd number, which is none. Where they are no VR at all, the rest of the data set decides.

    References
    ----------
    DICOM PS3.5, 7.1.2 and 7.1.3 (Data Element Structure with and without VR).
    """
    start = f.tell()
    head = f.read(12)
    tag = bytes((head[1], head[0], head[3], head[2])) if len(head) >= 8 and not big else head[:4]
    if tag in _FLOAT_PIXELS:
        raise ValueError(f"its pixels are {_FLOAT_PIXELS[tag]}, which are no stored values of CT")
    if tag != b"\x7f\xe0\x00\x10" or len(head) < 8:
        return None, 0
    order: Any = "big" if big else "little"
    vr = head[4:6]
    odd = bool(vr[0] % 2)
    if vr in _SHORT_VRS and (odd or not implicit):
        return start + 8, int.from_bytes(head[6:8], order)
    if vr in _LONG_VRS or (not implicit and (odd or (vr.isalpha() and vr.isupper()))):
        return start + 12, int.from_bytes(head[8:12], order)  # whatever the two reserved bytes hold
    return start + 8, int.from_bytes(head[4:8], order)


def _stream(f: BinaryIO, offset: int) -> str | None:
    """Return sign and bits of the first code stream of encapsulated pixels, if it is JPEG 2000 and says so."""
    f.seek(offset)
    table_bytes = int.from_bytes(f.read(8)[4:], "little")
    f.seek(offset + 8 + table_bytes + 8)
    info = frame_info(f.read(STREAM_BYTES))
    if info is None or info.kind != "JPEG 2000":
        return None
    return f"{'i' if info.signed else 'u'}{info.precision}"


STREAM_BYTES = 512
"""A code stream of JPEG 2000 says its precision within the first of so many, even in a JP2 file."""

_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
"""VRs with two reserved bytes and a length of four."""
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
"""VRs with a length of two bytes, which hold no large image."""
_FLOAT_PIXELS = {
    b"\x7f\xe0\x00\x08": "Float Pixel Data (7FE0,0008)",
    b"\x7f\xe0\x00\x09": "Double Float Pixel Data (7FE0,0009)",
}


def _fills(ds: pydicom.Dataset, length: int | None) -> bool:
    """Whether a value has the length of an image that is not encoded, of all its frames."""
    image = _Frame(ds)
    rows, columns, bits = (_binary(image, k) or 0 for k in ("Rows", "Columns", "BitsAllocated"))
    samples, frames = _binary(image, "SamplesPerPixel") or 1, _integer(image, "NumberOfFrames") or 1
    size = rows * columns * samples * frames * bits // 8
    return size > 0 and length in (size, size + size % 2)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where an image comes from, and where its pixels are."""

    path: str
    member: str | None
    mtime_ns: int
    file_bytes: int
    syntax: str
    offset: int | None
    length: int | None
    encoded_offset: int | None
    stream: str | None


class _Frame:
    """One frame of a multi-frame image: attributes of its own, then shared ones, then those of the image.

    References
    ----------
    DICOM PS3.3, C.7.6.16 (Multi-frame Functional Groups module).
    """

    def __init__(self, *layers: pydicom.Dataset) -> None:
        self.remarks: set[str] = set()
        """What is written in another way than DICOM asks and was understood: see `SliceHeader.remarks`."""
        # By plain integers: pydicom's tags are compared in Python, forty times for every image of a cohort.
        self._elements = {
            int(tag): layer.get_item(tag)
            for layer in reversed(layers)
            for tag in layer.keys()  # noqa: SIM118 - a data set iterates over its elements, and converts them
        }

    def get_item(self, tag: int) -> Any:
        """Return the element of the innermost layer that has it; None where none has."""
        return self._elements.get(tag)


def _frames(ds: pydicom.Dataset) -> list[tuple[_Frame, int]]:
    """Return the frames of an image, each with their number; one alone where nothing says where the others are."""
    image = _Frame(ds)
    binary = getattr(_raw(image, "NumberOfFrames"), "VR", None) in BINARY
    count = _integer(image, "NumberOfFrames") if binary or _text(image, "NumberOfFrames") else 1
    shared_tag, own_tag = TAGS["SharedFunctionalGroupsSequence"], TAGS["PerFrameFunctionalGroupsSequence"]
    if count == 0 and own_tag not in ds:
        image.remarks.add("frames-0")
        count = 1
    if count is None or count < 1:
        raise ValueError(f"Number of Frames is {_text(image, 'NumberOfFrames')[:20]!r}")
    if own_tag not in ds:
        # Of the sequences of a single frame, one says what was computed of several energies.
        return [(_Frame(*energies, ds) if (energies := _energies(ds)) else image, count)]
    shared = [layer for item in ((ds[shared_tag].value or []) if shared_tag in ds else []) for layer in _macros(item)]
    own = list(ds[own_tag].value or [])
    if len(own) != count or count > MOST_FRAMES:
        raise ValueError(f"{len(own)} functional groups for {count} frames")
    shared += _energies(ds)
    return [(_Frame(*_macros(item), *shared, ds), count) for item in own]


def _energies(ds: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Return the first item of the Multi-energy CT Processing Sequence of an image that has it beside its frames."""
    tag = TAGS["MultienergyCTProcessingSequence"]
    return [items[0]] if tag in ds and (items := ds[tag].value) else []


def _macros(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Return what the macros of a functional group hold, each of which is a sequence of one item."""
    return [element.value[0] for element in item if element.VR == "SQ" and element.value]


def _facts(ds: _Frame, origin: _Origin, frame: int, frames: int) -> Image:
    representation = _binary(ds, "PixelRepresentation")
    signed = {0: False, 1: True}.get(representation) if representation is not None else None
    bits = _binary(ds, "BitsAllocated")
    rows, columns = _binary(ds, "Rows") or 0, _binary(ds, "Columns") or 0
    spacing = _decimals(ds, "PixelSpacing", 2)
    position = _decimals(ds, "ImagePositionPatient", 3)
    image_type = _text(ds, "FrameType") or _text(ds, "ImageType")
    kinds = [part.strip() for part in image_type.upper().split("\\")]
    offset, length = origin.offset, origin.length
    if origin.syntax in BIG_WORDS and bits != 16:
        offset = None  # 8 bits may be packed two to a big-endian word: pydicom's business
    if offset is not None and length is not None and frames > 1 and length != UNDEFINED_LENGTH:
        size = rows * columns * (bits or 0) // 8
        rest = max(0, length - frame * size)
        offset, length = offset + frame * size, rest if frame == frames - 1 else min(size, rest)
    header = SliceHeader(
        path=origin.path,
        member=origin.member,
        frame=frame,
        frames=frames,
        file_bytes=origin.file_bytes,
        mtime_ns=origin.mtime_ns,
        sop_instance_uid=_uid(ds, "SOPInstanceUID"),
        instance_number=_integer(ds, "InstanceNumber"),
        position_mm=(position[0], position[1], position[2])
        if position and max(map(abs, position)) <= FARTHEST_MM
        else None,
        localizer="LOCALIZER" in kinds,
        secondary="SECONDARY" in kinds[1:2],
        modality=_term(ds, "Modality"),
        temporal_position=_first(_integer(ds, "TemporalPositionIdentifier"), _binary(ds, "TemporalPositionIndex")),
        acquisition_number=_first(_binary(ds, "FrameAcquisitionNumber"), _integer(ds, "AcquisitionNumber")),
        acquisition_time=_acquisition_time(ds),
        reconstruction=_hash("\n".join([image_type, _text(ds, "ConvolutionKernel"), _text(ds, "KVP")])),
        phase=packed((name, number) for k, name in PHASES.items() if (number := _number(ds, k))),
        rescale_slope=_decimal(ds, "RescaleSlope"),
        rescale_intercept=_decimal(ds, "RescaleIntercept"),
        rescale_type=_rescale_type(ds, kinds),
        photometric=_term(ds, "PhotometricInterpretation"),
        samples_per_pixel=_binary(ds, "SamplesPerPixel") or 1,
        bits_allocated=bits,
        bits_stored=_binary(ds, "BitsStored"),
        high_bit=_binary(ds, "HighBit"),
        signed=signed,
        padding=pixel_value(_binary(ds, "PixelPaddingValue"), bits, signed),
        padding_limit=pixel_value(_binary(ds, "PixelPaddingRangeLimit"), bits, signed),
        transfer_syntax=origin.syntax,
        pixel_offset=offset,
        pixel_bytes=length,
        encoded_offset=origin.encoded_offset,
        stream=origin.stream,
        modality_lut=bool((lut := _raw(ds, "ModalityLUTSequence")) is not None and lut.value),
        stack_id=_stack_id(ds),
        in_stack=_binary(ds, "InStackPositionNumber"),
        other=packed((name, value) for name, value in _other(ds) if value),
    )
    image = Image(
        series_uid=_uid(ds, "SeriesInstanceUID"),
        study_uid=_uid(ds, "StudyInstanceUID"),
        patient=_hash(patient) if (patient := _text(ds, "PatientID")) else "",
        frame_of_reference_uid=_uid(ds, "FrameOfReferenceUID"),
        series_number=_integer(ds, "SeriesNumber"),
        rows=rows,
        columns=columns,
        pixel_spacing_mm=(spacing[0], spacing[1])
        if spacing and FINEST_MM <= min(spacing) <= max(spacing) <= COARSEST_MM
        else None,
        orientation=_decimals(ds, "ImageOrientationPatient", 6),
        folder=_folder(origin.path, origin.member),
        header=header,
    )
    return image._replace(header=header._replace(remarks=" ".join(sorted(ds.remarks)))) if ds.remarks else image


def _folder(path: str, member: str | None) -> str:
    return os.path.join(path, *safe_parts(member)[:-1]) if member else os.path.dirname(path)


def _acquisition_time(ds: _Frame) -> str:
    when = _text(ds, "FrameAcquisitionDateTime") or _text(ds, "AcquisitionDateTime")
    when = when or _text(ds, "AcquisitionDate") + _text(ds, "AcquisitionTime")
    return _hash(when) if when else ""


def _other(ds: _Frame) -> Iterator[tuple[str, str]]:
    """Yield what may tell images at one place apart where nothing better does, as hashes and whole numbers."""
    yield "options", _hash(options) if (options := _text(ds, "ScanOptions")) else ""
    for name, date, time in (("series", "SeriesDate", "SeriesTime"), ("content", "ContentDate", "ContentTime")):
        when = _text(ds, date) + _text(ds, time)
        yield name, _hash(when) if when else ""
    yield "index", ",".join(map(str, _indices(ds)))


def _stack_id(ds: _Frame) -> str:
    """Return Stack ID, which may be any short text: a hash, unless it is a number."""
    text = _text(ds, "StackID")
    return text if not text or (text.isascii() and text.isdigit()) else f"#{_hash(text)}"


def _hash(text: str) -> str:
    """Return 64 bits of SHA-256: no two values of one series have the same."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first(a: int | None, b: int | None) -> int | None:
    return b if a is None else a


def _raw(ds: _Frame, keyword: str) -> Any:
    """Return the bytes of an attribute as they stand in the file, with their byte order; converting them costs more."""
    return ds.get_item(TAGS[keyword])


def _text(ds: _Frame | pydicom.Dataset, keyword: str) -> str:
    element = ds.get_item(TAGS[keyword])
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return "" if value is None else printable(str(value).strip(" \0"))


TERMS = {
    "Modality": "CT MR PT NM CR DX MG XA RF US OT SC SEG RTIMAGE RTDOSE RTSTRUCT RTPLAN PR SR REG",
    "RescaleType": "HU US OD HU_MOD MGML Z_EFF ED EDW PCT",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 RGB PALETTE_COLOR YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT",
}
"""Words that are kept; any other, which might be a name, is "another"."""


def _term(ds: _Frame | pydicom.Dataset, keyword: str) -> str | None:
    word = _text(ds, keyword).upper()
    return None if not word else word if word.replace(" ", "_") in TERMS[keyword].split() else "another"


_HOUNSFIELD = re.compile(r"HU|HOUN[DT]?S?E?F[IE]{1,2}LDS?(UNITS?)?(HU)?|HNSF'U")
"""HU as writers spell it, without blanks and punctuation: some GE workstations write "Houndsfield Unit"; UCUM has
[hnsf'U]."""
_PUNCTUATION = str.maketrans("", "", " ._-()[]")
_CODE = re.compile("[A-Z][A-Z0-9_]{0,15}")


def _unit(written: str, known: str | None) -> str | None:
    """Return "HU" for every spelling of it, any other unit that is written like a code as it is, else "another".

    The standard's own terms are single words in capital letters and digits. Such a word is kept for messages. Text in
    any other form, which might be a name, is not.
    """
    if known != "another":
        return known
    if _HOUNSFIELD.fullmatch(written.upper().translate(_PUNCTUATION)):
        return "HU"
    return written if _CODE.fullmatch(written) else known


MAPS = {"EFF_ATOMIC_NUM": "Z_EFF", "ELECTRON_DENSITY": "ED", "MAT_FRACTIONAL": "PCT", "MAT_SPECIFIC": "MGML"}
"""Rescale types of what the fourth value of *Image Type* or *Frame Type* says of images in several energies."""


def _rescale_type(ds: _Frame, kinds: list[str]) -> str | None:
    """Return what rescaled values are; a map of a material, which may leave that out or call it HU, is none in HU.

    References
    ----------
    DICOM PS3.3, C.11.1.1.2 (Modality LUT and Rescale Type), C.8.15.2.1.1.5 (Multi-energy CT images).
    """
    said = _unit(_text(ds, "RescaleType"), _term(ds, "RescaleType"))
    kind = kinds[3] if len(kinds) > 3 else ""
    if said is None or (said == "HU" and kind != "MAT_SPECIFIC"):  # what a material absorbs may be given in HU
        return MAPS.get(kind, said)
    return said


def _uid(ds: _Frame | pydicom.Dataset, keyword: str) -> str:
    """Return a UID; of one that cannot be one, a hash, since a damaged length lets it swallow what follows it."""
    text = _text(ds, keyword)
    return text if _UID.fullmatch(text) else f"{MALFORMED}{hashlib.sha256(text.encode()).hexdigest()[:16]}"


_UID = re.compile("[0-9A-Fa-f.]{0,64}")  # some write hexadecimal digits, which do no harm


MOST_GROUPED = {
    "RescaleSlope": 0.0,
    "RescaleIntercept": 65536.0,
    "PixelSpacing": 0.0,
    "ImageOrientationPatient": 0.0,
    "ImagePositionPatient": 10_000.0,
}
"""The largest number that could be meant by one with a comma before its thousands. Others have no decimals."""


def _decimals(ds: _Frame, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers, or None: half a position is none."""
    values = binary_numbers(_raw(ds, keyword), short=keyword not in MOST_GROUPED)
    if values is None:
        text = _text(ds, keyword)
        if "," in text and (text := with_points(text, count, MOST_GROUPED.get(keyword, math.inf))):
            ds.remarks.add("comma")
        try:
            values = tuple(float(part.replace("_", "?")) for part in text.split("\\"))  # 1_0 is no number
        except ValueError:
            return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _decimal(ds: _Frame, keyword: str) -> float | None:
    values = _decimals(ds, keyword, 1)
    return values[0] if values else None


def _number(ds: _Frame, keyword: str) -> str:
    """Return one number in floating point (FL, FD) or as text (DS), in six digits; "" where there is none."""
    element = _raw(ds, keyword)
    if element is None:
        return ""
    value = element.value
    if isinstance(value, bytes) and element.VR != "DS" and keyword != "TriggerTime":
        layout = {4: "f", 8: "d"}.get(len(value))
        number = struct.unpack(_order(element) + layout, value)[0] if layout else math.nan
    else:
        number = _decimal(ds, keyword)
    return f"{number:.6g}" if number is not None and math.isfinite(number) else ""


def _indices(ds: _Frame) -> tuple[int, ...]:
    """Return Dimension Index Values (UL, as many as there are dimensions)."""
    element = _raw(ds, "DimensionIndexValues")
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        return struct.unpack(f"{_order(element)}{len(value) // 4}I", value[: len(value) // 4 * 4])[:MOST_DIMENSIONS]
    return () if value is None else (value,) if isinstance(value, int) else tuple(map(int, value))[:MOST_DIMENSIONS]


def _order(element: Any) -> str:
    return "<" if getattr(element, "is_little_endian", True) else ">"


def _integer(ds: _Frame, keyword: str) -> int | None:
    """Return an integer string (IS), which has 32 bits; some write it as a decimal."""
    value = _decimal(ds, keyword)
    return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None


def _binary(ds: _Frame, keyword: str) -> int | None:
    """Return the first 16 bits (US, or SS taken as US); of UL, in either byte order, the low ones."""
    element = _raw(ds, keyword)
    value = element.value if element is not None else None
    if isinstance(value, int):  # pydicom has converted it, to know the sign of padding in a functional group
        return value & 0xFFFF
    if (number := written_number(element)) is not None:  # as text, or as floating point
        return int(number) & 0xFFFF if number == int(number) and abs(number) < 2**16 else None
    if not isinstance(value, bytes) or len(value) < 2:
        return None
    if getattr(element, "is_little_endian", True):
        return int.from_bytes(value[:2], "little")
    return int.from_bytes(value[-2:], "big")


def pixel_value(value: int | None, bits: int | None, signed: bool | None) -> int | None:
    """Return a padding value with the sign of the pixels, whatever VR it was written with: 63536 may mean −2000."""
    if value is None or bits not in (8, 16):
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
