"""Peculiarities of CT files from real scanners and archives, applied to the elements of a valid series.

Each function changes the files of one series, may add files, and returns a description. The standard allows some of the
results; a reader has to expect all of them.
"""

from __future__ import annotations

import copy
import math
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elements import (
    ITEM,
    SEQUENCE_END,
    UNDEFINED,
    Element,
    Parsed,
    as_item,
    dictionary_vr,
    element_of,
    encapsulate,
    everywhere,
    items_of,
    number_of,
    put,
    tag_of,
)

Series = dict[str, Parsed]
"""The files of a series by name."""

JPEG_2000, JPEG_LS, JPEG_XL = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.110"
DEFLATED_FRAMES, UNCOMPRESSED_FRAMES = "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98"

UNUSUAL_SYNTAXES = (
    *(JPEG_XL, "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112", DEFLATED_FRAMES, UNCOMPRESSED_FRAMES),
    *("1.2.840.10008.1.2.4.203", "1.2.840.10008.1.2.4.205", "1.2.840.10008.1.2.7.1", "1.2.840.10008.1.2.4.999"),
    *("1.2.840.113619.5.2", "1.3.46.670589.33.1.4.1", "1.2.826.0.1.3680043.2.682.1.40", "2.25.1", "1.2.3.4.5"),
)
"""Transfer syntaxes that are recent, private or nonexistent."""

TIMES = (
    *("101500", "101500.25", "10:15:00", "1015", "10", "", "240000", "235959.999999", "-1", "101560"),
    "101500.2500000",
)
DATE_TIMES = ("20260102101500", "20260102101500.123456+0100", "2026", "20261301000000", "", "20260102101500&ZZZZ")
RESCALE_TYPES = (
    *("HU", "hu", " HU", "HU ", "Houndsfield Unit", "Hounsfield Units", "HOUNSFIELD", "US", "UNSPECIFIED", "OD", ""),
    "?",
    *("Z_EFF", "ED", "EDW", "HU_MOD", "MGML", "PCT", "Houndsfield\\Unit"),
)


def values_of(file: Parsed) -> Any:
    """Return a copy of the stored values of a file with native pixels, or None, also if earlier changes prevent it."""
    import numpy as np

    pixels, bits = element_of(file.body, "PixelData"), number_of(file, "BitsAllocated")
    shape = (number_of(file, "Rows"), number_of(file, "Columns"))
    if pixels is None or pixels.length is not None or not pixels.value:
        return None
    if len(pixels.value) % (bits // 8 * math.prod(shape)):
        return None
    code = {8: "1", 16: "2"}[bits]
    kind = "i" if number_of(file, "PixelRepresentation") else "u"
    return np.frombuffer(pixels.value, (">" if file.big else "<") + kind + code).reshape(-1, *shape).copy()


def reencoded(file: Parsed, how: str, values: Any) -> None:
    """Set stored values in an encapsulated transfer syntax."""
    import imagecodecs
    import numpy as np

    encoders: dict[str, Callable[[Any], bytes | bytearray]] = {
        JPEG_2000: lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k", reversible=True),
        JPEG_XL: lambda frame: imagecodecs.jpegxl_encode(frame, lossless=True),
        DEFLATED_FRAMES: lambda frame: _deflated(frame.tobytes()),
        UNCOMPRESSED_FRAMES: lambda frame: frame.tobytes(),
    }
    native = values.astype(values.dtype.newbyteorder("<"))
    encapsulate(file, [bytes(encoders[how](np.ascontiguousarray(frame))) for frame in native], how)


def _words(values: Any) -> Any:
    """Return a view of stored values as unsigned integers."""
    return values.view(values.dtype.str.replace("i", "u"))


def _deflated(frame: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(frame) + packer.flush()


def _numbers(element: Element) -> list[float]:
    """Return decimal strings as numbers; an empty list if they are no longer valid."""
    try:
        return [float(part) for part in element.value.decode().replace(",", ".").strip("\0 ").split("\\")]
    except ValueError:
        return []


def _every(file: Parsed, keyword: str) -> list[Element]:
    """Return all elements of an attribute, also in sequences."""
    tag = tag_of(keyword)
    return [home[n] for home, n in everywhere(file.body) if home[n].tag == tag]


def _set_decimals(element: Element, numbers: Sequence[float]) -> None:
    text = "\\".join(f"{number:.10g}" for number in numbers).encode()
    element.value = text + b" " * (len(text) % 2)


def _moved(file: Parsed, z_mm: float) -> None:
    for element in _every(file, "ImagePositionPatient"):
        if len(numbers := _numbers(element)) == 3:
            _set_decimals(element, (*numbers[:2], numbers[2] + z_mm))


def _some(rng: random.Random, series: Series) -> list[Parsed]:
    """Return all files of a series, one, or every second."""
    files = list(series.values())
    return rng.choice((files, files, files, [rng.choice(files)], files[::2]))


def _another(file: Parsed, n: int) -> Parsed:
    """Return a copy of a file with another SOP Instance UID."""
    other = copy.deepcopy(file)
    put(other, "SOPInstanceUID", f"2.25.{n + 1}{zlib.crc32(str(n).encode())}")
    if other.meta:
        put(other, "MediaStorageSOPInstanceUID", f"2.25.{n + 1}{zlib.crc32(str(n).encode())}")
    return other


def _passes(rng: random.Random, series: Series, shift_mm: Callable[[int], float]) -> list[list[Parsed]]:
    """Add one or two passes over the same slices; return all passes, including the first."""
    passes = [list(series.values())]
    for n in range(1, rng.choice((2, 2, 3))):
        added = [_another(file, 1000 * n + k) for k, file in enumerate(passes[0])]
        for file in added:
            _moved(file, shift_mm(n))
        if rng.random() < 0.3:  # an aborted pass
            del added[rng.randint(1, len(added)) :]
        series |= {f"pass-{n}-{k}.dcm": file for k, file in enumerate(added)}
        passes.append(added)
    return passes


# --------------------------------------------------------------------------------------------------------------- pixels


def _pixel_vr(rng: random.Random, series: Series) -> str:
    vr = rng.choice((b"UN", b"OF", b"OL", b"OD", b"OV", b"UT", b"OB", b"OW"))
    reserved = rng.choice((b"\0\0", b"\0\0", b"  ", b"\x01\0", b"\0\xff", rng.randbytes(2)))
    for file in _some(rng, series):
        for pixels in _every(file, "PixelData"):
            pixels.vr, pixels.reserved = vr, reserved
    return f"pixels as {vr.decode()}, reserved {reserved.hex()}"


def _high_bit(rng: random.Random, series: Series) -> str:
    """Shift the stored values within their 16 bits, or change only the header."""
    stored = rng.choice((8, 10, 11, 12, 12, 12, 13, 16))
    high = rng.choice((15, 15, 14, stored, stored - 2, 3, 0))
    shift = rng.choice((0, max(0, high + 1 - stored), 4))
    for file in _some(rng, series):
        put(file, "BitsStored", stored)
        put(file, "HighBit", high)
        values = values_of(file)
        if shift and values is not None and values.itemsize == 2:
            put(file, "PixelData", ((_words(values) & ((1 << stored) - 1)) << shift).tobytes(), vr=b"OW")
    return f"{stored} bits stored, high bit {high}, values shifted by {shift}"


def _codestream_sign(rng: random.Random, series: Series) -> str:
    """Make the signedness of the codestream contradict the header."""
    negative, header = rng.choice((0, 0, 1000)), rng.randrange(2)
    for file in _some(rng, series):
        values = values_of(file)
        if values is None or values.itemsize != 2:
            continue
        values = values.astype("i4") - negative
        put(file, "PixelRepresentation", header)
        put(file, "BitsStored", 16)
        put(file, "HighBit", 15)
        reencoded(file, JPEG_2000, values.astype("u2" if header else "i2"))
    return f"JPEG 2000 {'without' if header else 'with'} a sign, the header says the other, values lower by {negative}"


def _beyond(rng: random.Random, series: Series) -> str:
    """Set bits above Bits Stored, in one value or in a share of them."""
    stored = rng.choice((8, 10, 11, 12, 15))
    bits = rng.choice((0x8000, 0xF000, 1 << min(stored, 15), 0x1000))
    share = rng.choice((0.0, 0.01, 0.5, 1.0))
    for file in _some(rng, series):
        values = values_of(file)
        if values is None or values.itemsize != 2:
            continue
        put(file, "BitsStored", stored)
        put(file, "HighBit", stored - 1)
        words = _words(values).reshape(-1)
        words[0] |= bits
        words[: int(share * words.size)] |= bits
        put(file, "PixelData", values.tobytes(), vr=b"OW")
    return f"{stored} bits stored, and {bits:#x} in {share:.0%} of the values"


def _modality_lut(rng: random.Random, series: Series) -> str:
    entries, first = rng.choice((0, 1, 256, 4096)), rng.choice((0, 1, 0xFC00))
    bits, kind = rng.choice((8, 16, 16)), rng.choice(("HU", "US", "OD", "", "?"))
    have = rng.choice((entries, entries, max(0, entries - 1), 3))
    beside = rng.random() < 0.5
    for file in _some(rng, series):
        lut: list[Element] = []
        put(file, "LUTDescriptor", (entries, first, bits), vr=b"US", home=lut)
        put(file, "ModalityLUTType", kind, home=lut)
        put(file, "LUTData", tuple(range(have)), vr=b"US", home=lut)
        put(file, "ModalityLUTSequence", [lut] * rng.choice((1, 1, 1, 2)))
        if not beside:
            tags = {tag_of("RescaleSlope"), tag_of("RescaleIntercept"), tag_of("RescaleType")}
            file.body[:] = [element for element in file.body if element.tag not in tags]
    return f"a modality LUT of {entries} entries of {bits} bits from {first} on to {kind!r}, {have} there"


def _rescale_type(rng: random.Random, series: Series) -> str:
    """Change the Rescale Type of all files, of some, or of some frames."""
    kind = rng.choice(RESCALE_TYPES)
    for file in _some(rng, series):
        types = _every(file, "RescaleType")
        frames = element_of(file.body, "PerFrameFunctionalGroupsSequence")
        if frames is None or rng.random() < 0.3:
            for element in types:
                element.value = kind.encode() + b" " * (len(kind) % 2)
            continue
        for frame in (frames.items or [])[:: rng.choice((1, 2))]:
            transformation: list[Element] = []
            put(file, "RescaleIntercept", rng.choice(("-1024", "0", "-1024.5")), home=transformation)
            put(file, "RescaleSlope", rng.choice(("1", "0.01")), home=transformation)
            put(file, "RescaleType", kind, home=transformation)
            put(file, "PixelValueTransformationSequence", [transformation], home=frame)
    return f"rescale type {kind!r}"


def _inverse(rng: random.Random, series: Series) -> str:
    shape = rng.choice(("", "INVERSE", "IDENTITY"))
    for file in _some(rng, series):
        put(file, "PhotometricInterpretation", "MONOCHROME1")
        if shape:
            put(file, "PresentationLUTShape", shape)
    return f"MONOCHROME1, presentation {shape or 'unsaid'}"


# -------------------------------------------------------------------------------------------------------------- numbers

DECIMALS = (
    *("ImagePositionPatient", "PixelSpacing", "ImageOrientationPatient", "SliceThickness", "RescaleSlope"),
    "RescaleIntercept",
)


def _commas(rng: random.Random, series: Series) -> str:
    keywords = rng.sample(DECIMALS, rng.choice((1, 1, 3, len(DECIMALS))))
    for file in _some(rng, series):
        for element in (element for keyword in keywords for element in _every(file, keyword)):
            parts = [f"{number:.1f}".replace(".", ",") for number in _numbers(element)]
            element.value = "\\".join(parts).encode()
            element.value += b" " * (len(element.value) % 2)
    return "decimal commas in " + ", ".join(keywords)


def _binary(rng: random.Random, series: Series) -> str:
    """Write decimal strings as binary numbers with a binary VR, like some converters."""
    keywords = rng.sample(DECIMALS, rng.choice((1, 1, 3)))
    vr, code = rng.choice(((b"FD", "d"), (b"FL", "f"), (b"SS", "h"), (b"US", "H"), (b"UL", "I")))
    for file in _some(rng, series):
        for element in (element for keyword in keywords for element in _every(file, keyword)):
            numbers: list[Any] = _numbers(element)
            if code not in "df":
                low, high = {"h": (-(2**15), 2**15 - 1), "H": (0, 2**16 - 1), "I": (0, 2**32 - 1)}[code]
                numbers = [min(max(round(number), low), high) for number in numbers]
            element.vr = vr
            element.value = struct.pack(f"{'>' if file.big else '<'}{len(numbers)}{code}", *numbers)
    return f"{', '.join(keywords)} as {vr.decode()}"


def _tiny(rng: random.Random, series: Series) -> str:
    """Scale all lengths down to those of micro-CT."""
    factor = rng.choice((0.025, 0.01, 0.001, 0.0001))
    for file in series.values():
        for keyword in ("ImagePositionPatient", "PixelSpacing", "SliceThickness"):
            for element in _every(file, keyword):
                _set_decimals(element, [number * factor for number in _numbers(element)])
    return f"lengths × {factor}"


def _frame_count(rng: random.Random, series: Series) -> str:
    count = rng.choice(("0", "", "1", "-1", "1.0", "+1", "2", "1\\1"))
    for file in _some(rng, series):
        put(file, "NumberOfFrames", count)
    return f"number of frames {count!r}"


# ------------------------------------------------------------------------------------------------------------- grouping


def _uids(rng: random.Random, series: Series) -> str:
    keyword = rng.choice(("SeriesInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"))
    how = rng.choice(("one per file", "two", "two halves", "empty", "absent", "some empty", "padded"))
    files = list(series.values())
    for n, file in enumerate(files):
        if how == "absent":
            file.body[:] = [element for element in file.body if element.tag != tag_of(keyword)]
        elif how == "padded":
            put(file, keyword, b"1.2.3.4" + rng.choice((b"\0", b" ", b"\0\0\0", b"  \0")))
        elif how != "some empty" or n % 2:
            part = {"one per file": n, "two": n % 2, "two halves": int(2 * n >= len(files))}.get(how)
            put(file, keyword, "" if part is None else f"1.2.3.{part + 1}")
    return f"{keyword} {how}"


def _people(rng: random.Random, series: Series) -> str:
    """Mix two patients or studies in one series, at different or at the same positions."""
    keywords = rng.choice((("StudyInstanceUID",), ("PatientID",), ("StudyInstanceUID", "PatientID", "PatientName")))
    twice = rng.random() < 0.5
    if twice:
        second = [_another(file, 500 + k) for k, file in enumerate(series.values())]
        series |= {f"other-{k}.dcm": file for k, file in enumerate(second)}
    else:
        files = list(series.values())
        second = rng.choice((files[::2], files[len(files) // 2 :]))
    for file in second:
        for keyword in keywords:
            put(file, keyword, "1.2.3.77" if dictionary_vr(tag_of(keyword)) == b"UI" else "Another")
    return f"another {', '.join(keywords)}, {'at the same places' if twice else 'in some files'}"


DISTINGUISHING = (
    *("AcquisitionNumber", "AcquisitionNumber", "AcquisitionTime", "AcquisitionTime", "AcquisitionDateTime"),
    *("ContentTime", "SeriesTime", "AcquisitionUID", "InstanceNumber", "ImageType", "ConvolutionKernel", "KVP"),
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase", "TriggerTime"),
    *("NominalCardiacTriggerDelayTime", "NominalPercentageOfRespiratoryPhase", "MonoenergeticEnergyEquivalent"),
    *("ImageComments", "StackID", "ContrastBolusAgent"),
)
"""Attributes that may distinguish passes over the same slices."""


def _distinguish(rng: random.Random, file: Parsed, keyword: str, n: int, k: int) -> None:
    """Set the value of an attribute for pass n."""
    vr = dictionary_vr(tag_of(keyword))
    value: object = f"{n + 1}"
    if vr in (b"FD", b"FL"):
        value = (0.0, 30.0, 60.5)[n]
    elif vr in (b"UL", b"US"):
        value = n + 1
    elif vr in (b"TM", b"DT"):
        value = f"{'20260102' if vr == b'DT' else ''}10{15 + n:02}{k:02}.5"
    elif vr == b"UI":
        value = f"1.2.3.{n + 1}"
    elif keyword == "ImageType":
        value = f"ORIGINAL\\PRIMARY\\AXIAL\\{'ABC'[n]}"
    elif keyword == "InstanceNumber":
        value = f"{100 * n + k + 1}"
    if rng.random() > 0.02:  # it may be absent in single files
        put(file, keyword, value)


def _passes_out_of_register(rng: random.Random, series: Series) -> str:
    share = rng.choice((0.5, 0.25, 0.4, 0.02, 0.001, 1.0, 1.5, 2.5))
    keywords = rng.sample(DISTINGUISHING, rng.choice((0, 1, 1, 2)))
    passes = _passes(rng, series, lambda n: n * share * 2.5)
    for n, files in enumerate(passes):
        for k, file in enumerate(files):
            for keyword in keywords:
                _distinguish(rng, file, keyword, n, k)
    return f"{len(passes)} passes {share} slices apart, told apart by {', '.join(keywords) or 'nothing'}"


def _phases(rng: random.Random, series: Series) -> str:
    keywords = rng.sample(DISTINGUISHING, rng.choice((0, 1, 1, 2)))
    passes = _passes(rng, series, lambda _: 0.0)
    for n, files in enumerate(passes):
        for k, file in enumerate(files):
            for keyword in keywords:
                _distinguish(rng, file, keyword, n, k)
            if n and rng.random() < 0.8 and (pixels := element_of(file.body, "PixelData")) and pixels.length is None:
                pixels.value = pixels.value[2:] + pixels.value[:2]  # another image
    return f"{len(passes)} phases at the same places, told apart by {', '.join(keywords) or 'nothing'}"


def _times(rng: random.Random, series: Series) -> str:
    keyword = rng.choice(("AcquisitionTime", "ContentTime", "AcquisitionDateTime", "SeriesTime", "AcquisitionDate"))
    pool = DATE_TIMES if keyword.endswith("DateTime") else TIMES
    how = rng.choice(("rising", "any", "one", "falling"))
    one = rng.choice(pool)
    for n, file in enumerate(series.values()):
        step = n if how == "rising" else len(series) - n
        rising = f"{'20260102' if pool is DATE_TIMES else ''}1015{step:02}.{step}"
        put(file, keyword, {"any": rng.choice(pool), "one": one}.get(how, rising))
    return f"{keyword} {how}" + (f", {one!r}" if how == "one" else "")


# --------------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class _Dimension:
    """Attribute that distinguishes phases of frames, in a sequence of the functional groups."""

    sequence: str
    keyword: str
    values: tuple[Any, Any, Any]


DIMENSIONS = (
    _Dimension("RespiratorySynchronizationSequence", "NominalPercentageOfRespiratoryPhase", (0.0, 30.0, 60.0)),
    _Dimension("RespiratorySynchronizationSequence", "RespiratoryCyclePosition", ("START_RESPIR", "MID", "END_RESPIR")),
    _Dimension("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", (0.0, 40.0, 75.0)),
    _Dimension("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", (0.0, 300.5, 700.0)),
    _Dimension("TemporalPositionSequence", "TemporalPositionTimeOffset", (0.0, 1.5, 3.0)),
    _Dimension("FrameContentSequence", "TemporalPositionIndex", (1, 2, 3)),
    _Dimension("FrameContentSequence", "StackID", ("1", "2", "3")),
    _Dimension("FrameContentSequence", "FrameAcquisitionNumber", (1, 2, 3)),
    _Dimension("FrameContentSequence", "FrameAcquisitionDateTime", ("20260102101500", "20260102101501.5", "2026")),
    _Dimension("FrameContentSequence", "FrameLabel", ("A", "B", "C")),
    _Dimension("FrameContentSequence", "DimensionIndexValues", ((1, 1), (2, 1), (3, 1))),
    _Dimension("CTAdditionalXRaySourceSequence", "KVP", ("80", "140", "100")),
    _Dimension("MultienergyCTProcessingSequence", "MonoenergeticEnergyEquivalent", (40.0, 70.0, 140.0)),
    _Dimension(
        "CTImageFrameTypeSequence", "FrameType", ("ORIGINAL\\PRIMARY", "DERIVED\\PRIMARY", "DERIVED\\PRIMARY\\X")
    ),
)


def _frames_of(file: Parsed) -> list[list[Element]]:
    frames = element_of(file.body, "PerFrameFunctionalGroupsSequence")
    return [] if frames is None else frames.items or []


def _with_frames(file: Parsed, order: Sequence[int], count: str | None = None) -> None:
    """Reorder the frames of a multi-frame file, groups and pixels; frames may be repeated."""
    pixels, groups = element_of(file.body, "PixelData"), _frames_of(file)
    if pixels is None or not groups:
        return
    _table, *images = items_of(pixels.value) or [b""]
    if pixels.length == UNDEFINED and len(images) >= len(groups):
        pixels.value = as_item(b"") + b"".join(as_item(images[n]) for n in order) + SEQUENCE_END
    elif pixels.length is None:
        size = len(pixels.value) // len(groups)
        pixels.value = b"".join(pixels.value[n * size : (n + 1) * size] for n in order)
    put(file, "PerFrameFunctionalGroupsSequence", [copy.deepcopy(groups[n]) for n in order])
    put(file, "NumberOfFrames", count or str(len(order)))


def _labelled(file: Parsed, frame: list[Element], dimension: _Dimension, n: int) -> None:
    sequence = element_of(frame, dimension.sequence)
    inside = sequence.items[0] if sequence is not None and sequence.items else []
    put(file, dimension.keyword, dimension.values[n], home=inside)
    put(file, dimension.sequence, [inside], home=frame)


def four_dimensional(file: Parsed, phases: int, chosen: Sequence[_Dimension], *, interleaved: bool) -> None:
    """Repeat the frames of a multi-frame file, and set the phase of each."""
    slices = len(_frames_of(file))
    pairs = [(n, k) for n in range(phases) for k in range(slices)]
    if interleaved:
        pairs.sort(key=lambda pair: pair[1])
    _with_frames(file, [k for _, k in pairs])
    for frame, (n, _) in zip(_frames_of(file), pairs, strict=True):
        for dimension in chosen:
            _labelled(file, frame, dimension, n)


def _dimensions(rng: random.Random, series: Series) -> str:
    phases, chosen = rng.choice((2, 2, 3)), rng.sample(DIMENSIONS, rng.choice((0, 1, 1, 1, 2)))
    odd = rng.choice(("", "", "", "a frame missing", "a frame without", "a frame too many", "shuffled"))
    for file in series.values():
        four_dimensional(file, phases, chosen, interleaved=rng.random() < 0.5)
        count = len(_frames_of(file))
        if odd == "a frame missing":
            gone = rng.randrange(count)
            _with_frames(file, [n for n in range(count) if n != gone])
        elif odd == "a frame too many":
            _with_frames(file, [*range(count), rng.randrange(count)])
        elif odd == "shuffled":
            _with_frames(file, rng.sample(range(count), count))
        elif odd:
            frame = rng.choice(_frames_of(file))
            gone_tags = {tag_of(dimension.sequence) for dimension in chosen}
            frame[:] = [element for element in frame if element.tag not in gone_tags]
    return f"{phases} phases of frames by {', '.join(d.keyword for d in chosen) or 'nothing'} {odd}".rstrip()


def _stacks(rng: random.Random, series: Series) -> str:
    """Set stack IDs and positions in the stack that contradict the image positions."""
    how = rng.choice(("two stacks", "one per frame", "places reversed", "places equal", "no places", "empty"))
    for file in series.values():
        frames = _frames_of(file)
        for n, frame in enumerate(frames):
            content = element_of(frame, "FrameContentSequence")
            inside = content.items[0] if content is not None and content.items else []
            stack = {"two stacks": str(1 + (2 * n >= len(frames))), "one per frame": str(n), "empty": ""}.get(how, "1")
            place = {"places reversed": len(frames) - n, "places equal": 1}.get(how, n + 1)
            put(file, "StackID", stack, home=inside)
            put(file, "InStackPositionNumber", place, home=inside)
            if how == "no places":
                inside[:] = [element for element in inside if element.tag != tag_of("InStackPositionNumber")]
            put(file, "FrameContentSequence", [inside], home=frame)
    return f"stacks: {how}"


def _instances(rng: random.Random, series: Series) -> str:
    """Distribute the frames of a file over several instances."""
    name, file = next(iter(series.items()))
    count = len(_frames_of(file))
    how = rng.choice(("halves", "alternating", "overlapping", "one each", "twice"))
    parts = {
        "halves": [range(count // 2), range(count // 2, count)],
        "alternating": [range(0, count, 2), range(1, count, 2)],
        "overlapping": [range(count // 2 + 1), range(count // 2, count)],
        "one each": [range(n, n + 1) for n in range(count)],
        "twice": [range(count), range(count)],
    }[how]
    concatenated = rng.random() < 0.5
    for n, part in enumerate(parts[1:], 1):
        other = _another(file, n)
        _with_frames(other, part)
        put(other, "InstanceNumber", str(n + 1))
        series[f"{n}-{name}"] = other
    _with_frames(file, parts[0])
    if concatenated:
        for n, one in enumerate(series.values()):
            put(one, "ConcatenationUID", "1.2.3.9")
            put(one, "InConcatenationNumber", n + 1)
    return f"frames in {len(parts)} instances, {how}" + (", one concatenation" if concatenated else "")


# -------------------------------------------------------------------------------------------------- encapsulated pixels


def _encapsulation(rng: random.Random, series: Series) -> str:
    kinds = ("no delimiter", "zeros for a delimiter", "zeros after", "a table of fragments", "odd fragments")
    kind = rng.choice((*kinds, "padding", "padding", "an empty fragment", "extended offsets"))
    padding = rng.choice((b"\0", b"\0\0", b"\0" * 64, b"\xff\xff", b"\xff\xd9"))
    for file in _some(rng, series):
        pixels = element_of(file.body, "PixelData")
        if pixels is None or pixels.length != UNDEFINED:
            continue
        table, *frames = items_of(pixels.value)
        if kind == "no delimiter":
            pixels.value = pixels.value.removesuffix(SEQUENCE_END)
        elif kind == "zeros for a delimiter":
            pixels.value = pixels.value.removesuffix(SEQUENCE_END) + bytes(8)
        elif kind == "zeros after":
            pixels.value += bytes(rng.choice((1, 2, 8, 512)))
        elif kind == "a table of fragments":
            half = [part for f in frames for part in (f[: len(f) // 4 * 2], f[len(f) // 4 * 2 :])]
            offsets, at = [], 0
            for part in half:
                offsets.append(at)
                at += 8 + len(part)
            pixels.value = as_item(struct.pack(f"<{len(offsets)}I", *offsets))
            pixels.value += b"".join(map(as_item, half)) + SEQUENCE_END
        elif kind == "extended offsets":
            offsets = [sum(8 + len(f) for f in frames[:n]) for n in range(len(frames))]
            put(file, "ExtendedOffsetTable", struct.pack(f"<{len(frames)}Q", *offsets))
            put(file, "ExtendedOffsetTableLengths", struct.pack(f"<{len(frames)}Q", *map(len, frames)))
        else:
            changed = {
                "odd fragments": [f[:-1] if len(f) % 2 == 0 and f.endswith(b"\0") else f + b"\0" for f in frames],
                "padding": [f + padding for f in frames],
                "an empty fragment": [part for f in frames for part in (f, b"")],
            }[kind]
            pixels.value = as_item(table) + b"".join(map(as_item, changed)) + SEQUENCE_END
    return kind + (f" {padding[:4].hex()}" if kind == "padding" else "")


def _wrong_name(rng: random.Random, series: Series) -> str:
    """Change only the transfer syntax UID, to another or to an unknown one."""
    known = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5", JPEG_LS, JPEG_2000, "1.2.840.10008.1.2.4.70")
    syntax = rng.choice((*known, *UNUSUAL_SYNTAXES))
    for file in _some(rng, series):
        if file.meta:
            put(file, "TransferSyntaxUID", syntax)
    return f"pixels called {syntax}"


def _unusual_syntax(rng: random.Random, series: Series) -> str:
    """Encode native pixels correctly in a rarely supported transfer syntax."""
    syntax = rng.choice((JPEG_XL, DEFLATED_FRAMES, UNCOMPRESSED_FRAMES))
    for file in _some(rng, series):
        values = values_of(file)
        if values is not None and (syntax != JPEG_XL or values.dtype.kind == "u"):
            reencoded(file, syntax, values)
    return f"pixels encoded as {syntax}"


def _plain_in_an_item(rng: random.Random, series: Series) -> str:
    """Put native pixels into one item, without changing the transfer syntax."""
    for file in _some(rng, series):
        pixels = element_of(file.body, "PixelData")
        if pixels is not None and pixels.length is None:
            pixels.value = ITEM + struct.pack("<I", len(pixels.value)) + pixels.value + SEQUENCE_END
            pixels.length = UNDEFINED
    return "plain pixels in an item"


PLAIN = ("explicit-signed", "explicit-unsigned", "explicit-8-bits")
FRAMES = ("enhanced", "enhanced-rle", "enhanced-4d")
ENCAPSULATED = (
    *("rle", "jpeg-ls", "jpeg-2000", "jpeg-lossless", "enhanced-rle"),
    *("jpeg-xl", "deflated-frames", "uncompressed-frames"),
)
ANY = ()


@dataclass(frozen=True)
class Oddity:
    """A peculiarity, and the base series to which it applies."""

    name: str
    do: Callable[[random.Random, Series], str]
    bases: tuple[str, ...] = ANY
    """Names of the base series to which it applies; empty: all."""

    def fits(self, base: str) -> bool:
        """Whether it applies to a base series."""
        return not self.bases or base in self.bases


ODDITIES = (
    Oddity("pixel VR", _pixel_vr),
    Oddity("high bit", _high_bit, PLAIN),
    Oddity("sign of the codestream", _codestream_sign, PLAIN),
    Oddity("beyond bits stored", _beyond, PLAIN),
    Oddity("modality LUT", _modality_lut),
    Oddity("rescale type", _rescale_type),
    Oddity("inverse", _inverse),
    Oddity("commas", _commas),
    Oddity("binary numbers", _binary),
    Oddity("tiny", _tiny),
    Oddity("frame count", _frame_count),
    Oddity("UIDs", _uids),
    Oddity("two patients", _people),
    Oddity("passes", _passes_out_of_register),
    Oddity("phases", _phases),
    Oddity("times", _times),
    Oddity("dimensions", _dimensions, FRAMES),
    Oddity("stacks", _stacks, FRAMES),
    Oddity("instances", _instances, FRAMES),
    Oddity("encapsulation", _encapsulation, ENCAPSULATED),
    Oddity("wrong name", _wrong_name),
    Oddity("unusual syntax", _unusual_syntax, PLAIN),
    Oddity("plain in an item", _plain_in_an_item),
)
