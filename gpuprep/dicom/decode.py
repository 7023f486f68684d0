"""Decodes one frame of an encoded file to stored values.

Decoders are asked for the integers of the code stream alone, and each is given the same bytes. What these integers
mean, which is for *Pixel Representation* and *Bits Stored* to say, is decided here, once for all of them;
`gpuprep.dicom.stored_words` corrects a header that says it wrongly.

GDCM is not among the decoders: what the others report as an error, it answers by ending the process. `ljpeg_decode` and
`dicomrle_decode` of imagecodecs are not either, for the same reason, and `htj2k_decode` invents what damage took away:
OpenJPEG reads the same streams and refuses where a byte is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEG2000, UID, JPEGLSNearLossless

from gpuprep.core.series import SliceHeader
from gpuprep.dicom.deflate import inflated_frame
from gpuprep.dicom.encapsulation import Encapsulated, fragments_of
from gpuprep.dicom.jpeg_markers import FrameInfo, Kind, frame_info
from gpuprep.dicom.uids import ENCODINGS, NATIVE, syntax_name
from gpuprep.errors import DecodeError

CONSTANT_BYTES_PER_PIXEL = 0.25
"""No constant image needs more: lossless JPEG takes 1 bit per pixel at least, the others next to nothing."""
PYDICOM_SAYS = "Unable to decode as exceptions were raised by all available plugins:"
"""Before what the one plugin that it was allowed to ask said."""
PIXELS_PER_TILE = 256
"""At least so many: OpenJPEG takes some 10 KB for each tile, and a few bytes can announce 65535 of them."""
MARKERS_BYTES = 1024
"""Tables and comments, which small images need as well."""
MOST_REST_BYTES = 16
"""More than padding after the last run of a segment is damage."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A library that turns a code stream into integers."""

    name: str
    decode: Callable[[bytes, FrameInfo], NDArray[Any]]
    available: Callable[[], bool]
    """Whether it is installed."""


def _by_imagecodecs(codec: str) -> Decoder:
    # imagecodecs is imported late: it takes its time, and few series need it.
    def decode(stream: bytes, _: FrameInfo) -> NDArray[Any]:
        import imagecodecs

        return np.asarray(getattr(imagecodecs, f"{codec}_decode")(stream))

    def available() -> bool:
        try:
            import imagecodecs
        except ImportError:
            return False
        return bool(getattr(imagecodecs, codec.upper()).available)

    return Decoder(f"imagecodecs {codec}", decode, available)


def _jpeg_xl(stream: bytes, info: FrameInfo) -> NDArray[Any]:
    import imagecodecs

    # Into room of the size that the header announces: another one that it unpacks to is refused.
    out = np.empty((info.rows, info.columns), np.uint8 if info.precision <= 8 else np.uint16)
    values = np.asarray(imagecodecs.jpegxl_decode(stream, keeporientation=True, out=out))
    if int(values.max()) >> info.precision:
        raise DecodeError(f"{values.max()} came out of {info.precision} bits")
    return values


def _by_pydicom(plugin: str, syntax: UID) -> Decoder:
    def decode(stream: bytes, info: FrameInfo) -> NDArray[Any]:
        # The code stream's own precision and sign in place of the header's, so that pydicom corrects nothing.
        options: dict[str, Any] = {
            "pixel_keyword": "PixelData",
            "number_of_frames": 1,
            "rows": info.rows,
            "columns": info.columns,
            "samples_per_pixel": info.samples,
            "photometric_interpretation": "MONOCHROME2",
            "bits_allocated": 8 if info.precision <= 8 else 16,
            "bits_stored": info.precision,
            "pixel_representation": int(info.signed),
            "correct_unused_bits": False,
        }
        source = encapsulate([stream], has_bot=False)
        return get_decoder(syntax).as_array(source, index=0, raw=True, decoding_plugin=plugin, **options)[0]

    return Decoder(plugin, decode, lambda: plugin in get_decoder(syntax).available_plugins)


DECODERS: dict[Kind, tuple[Decoder, ...]] = {
    "JPEG": (_by_imagecodecs("jpeg8"), _by_imagecodecs("jpegsof3")),
    "JPEG-LS": (_by_imagecodecs("jpegls"), _by_pydicom("pyjpegls", JPEGLSNearLossless)),
    "JPEG 2000": (_by_imagecodecs("jpeg2k"), _by_pydicom("pylibjpeg", JPEG2000)),
    "JPEG XL": (replace(_by_imagecodecs("jpegxl"), decode=_jpeg_xl),),
}
"""What is tried for a code stream, in this order. The transfer syntax does not choose: code streams name themselves.

libjpeg-turbo (`jpeg8`) knows every process of JPEG that DICOM ever had, in 8 and 12 bits and lossless in 2 to 16;
`jpegsof3` is for builds of it that lack the odd ones of these. CharLS and OpenJPEG are behind both names of the next
two. libjxl is the only decoder of JPEG XL.
"""
RLE = _by_imagecodecs("packbits")
EXACT = {"RLE": (RLE.name,), "deflate": ("zlib",), "none": ("NumPy",)}
"""What decodes the encodings that are no code streams."""
RUN_ON = "run lengths go on after the frame is full"


def decode_frame(
    source: pydicom.Dataset | Encapsulated,
    header: SliceHeader,
    frame: int,
    rows: int,
    columns: int,
    faults: set[str] | None = None,
) -> NDArray[Any]:
    """Return the stored values of one frame, without what lies in unused bits.

    Parameters
    ----------
    source : pydicom.Dataset or Encapsulated
        The file, opened with its pixels; or, of an encapsulated syntax, its fragments alone.
    header : SliceHeader
        What the scan found in it: transfer syntax, bits and sign are taken from here.
    frame : int
        Index of the frame, from 0.
    rows, columns : int
        The size that the frame must have.
    faults : set of str, optional
        Receives what is not as DICOM demands it, and did not matter.

    Returns
    -------
    ndarray
        Integers of shape (rows, columns) with the sign and the *Bits Allocated* of the header.

    Raises
    ------
    DecodeError
        Where no decoder makes an image of it that can be true, with what each of them said.
    """
    faults = set() if faults is None else faults
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = _dtype(header)
            if isinstance(source, pydicom.Dataset) and header.transfer_syntax in NATIVE:
                return _native(source, header, frame, (rows, columns), dtype)
            stream = _stream(source, header, frame, faults)
            encoding = ENCODINGS.get(header.transfer_syntax)
            if encoding == "RLE":
                return _run_lengths(stream, header, (rows, columns), dtype, faults)
            if encoding in ("deflate", "none"):
                return _words(stream, header, (rows, columns), dtype, deflated=encoding == "deflate")
            return _code_stream(stream, header, (rows, columns), dtype)
    except Exception as exc:  # broken files provoke whatever they like
        name = syntax_name(header.transfer_syntax)
        raise DecodeError(f"{header.name} ({name}) cannot be decoded: {_one_line(exc)}") from exc


def available_decoders(transfer_syntax: str) -> tuple[str, ...]:
    """Return the names of the installed decoders of an encapsulated transfer syntax, in the order they are tried.

    Parameters
    ----------
    transfer_syntax : str
        Its UID.

    Returns
    -------
    tuple of str
        Empty where there is none.
    """
    encoding = ENCODINGS.get(transfer_syntax)
    if encoding is None or (encoding == "RLE" and not RLE.available()):
        return ()
    if encoding == "RLE" or encoding == "deflate" or encoding == "none":
        return EXACT[encoding]
    return tuple(d.name for d in DECODERS[encoding] if d.available())


def drop_unused_bits(header: SliceHeader, values: NDArray[Any], high_bit: int | None) -> bool:
    """Keep *Bits Stored* bits below *High Bit*, in place: others may hold an old overlay, and no sign.

    Return whether bits above the stored ones held anything but a sign, where the stored ones are the low bits.

    Parameters
    ----------
    header : SliceHeader
        Says how many bits are stored.
    values : ndarray
        Whole words; changed.
    high_bit : int or None
        Where the topmost stored bit lies; None for *Bits Stored* − 1.

    References
    ----------
    DICOM PS3.5, 8.1.1 (Pixel Data Encoding of Related Data Elements).
    """
    allocated = values.dtype.itemsize * 8
    kept = header.bits_stored or allocated
    top = kept - 1 if high_bit is None or not kept - 1 <= high_bit < allocated else high_bit
    if kept == allocated:
        return False
    if top == kept - 1:
        low, high = (-(2**top), 2**top - 1) if values.dtype.kind == "i" else (0, 2**kept - 1)
        if (low == 0 or values.min() >= low) and values.max() <= high:
            return False
    values <<= allocated - 1 - top
    values >>= allocated - kept  # arithmetic where signed: the sign is carried along
    return top == kept - 1


def _dtype(header: SliceHeader) -> np.dtype[Any]:
    allocated = header.bits_allocated or 16
    if allocated not in (8, 16):
        raise DecodeError(f"{allocated} bits are allocated to a pixel, not 8 or 16")
    return np.dtype(f"{'i' if header.signed else 'u'}{allocated // 8}")


def _stream(source: pydicom.Dataset | Encapsulated, header: SliceHeader, frame: int, faults: set[str]) -> bytes:
    """Return the bytes of one frame, fragments joined."""
    if isinstance(source, Encapsulated):
        pixels, frames = source, header.frames
    else:
        pixels = fragments_of(source.PixelData, source.get("ExtendedOffsetTable") or b"")
        frames = int(source.get("NumberOfFrames") or 1)
    stream = pixels.frame(frame, frames)
    faults |= pixels.faults
    return stream


def _native(
    ds: pydicom.Dataset, header: SliceHeader, frame: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    said = (ds.Rows, ds.Columns, ds.BitsAllocated)
    if said != (*shape, dtype.itemsize * 8):  # before room is made for what it says
        raise DecodeError(f"it changed since the scan: now {said[0]} × {said[1]} in {said[2]} bits")
    options: dict[str, Any] = {"correct_unused_bits": False}
    values, _ = get_decoder(UID(header.transfer_syntax)).as_array(ds, index=frame, raw=True, **options)
    _check_shape(values, shape)
    values = values.astype(dtype)
    drop_unused_bits(header, values, header.high_bit)
    return values


def _words(
    stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any], *, deflated: bool
) -> NDArray[Any]:
    """Return the values of a frame of plain little-endian words, which may be deflated."""
    size = shape[0] * shape[1] * dtype.itemsize
    data = inflated_frame(stream, size) if deflated else stream
    if not size <= len(data) <= size + size % 2:
        raise DecodeError(f"its frame has {len(data)} bytes, not {size}")
    values = np.frombuffer(data, dtype.newbyteorder("<"), shape[0] * shape[1]).astype(dtype).reshape(shape)
    drop_unused_bits(header, values, header.high_bit)
    return values


def _run_lengths(
    stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any], faults: set[str]
) -> NDArray[Any]:
    """Return the values of run lengths: a segment for each byte of a pixel, the most significant first.

    References
    ----------
    DICOM PS3.5, G.3 to G.5 (RLE segments, header).
    """
    count, *starts = np.frombuffer(stream, "<u4", 16).tolist()
    if count != dtype.itemsize:
        raise DecodeError(f"it has {count} segments, not {dtype.itemsize}")
    segments = [stream[start:end] for start, end in zip(starts, [*starts[1:count], len(stream)], strict=False)]
    planes = _planes(segments, shape[0] * shape[1], faults)
    values: NDArray[Any] = planes[0].astype(f"u{count}")
    for plane in planes[1:]:
        values <<= 8
        values |= plane
    values = values.reshape(shape).astype(dtype, copy=False)
    drop_unused_bits(header, values, header.high_bit)  # whole words, as in native files
    _check_constant(values, len(stream))
    return values


def _planes(segments: list[bytes], size: int, faults: set[str]) -> NDArray[np.uint8]:
    """Return the bytes that segments of run lengths unpack to: shape (segments, size).

    Nothing but the length of its segments tells whether such a frame is whole. So they have to fill the frame exactly,
    save for two zeros at the end, with which some writers pad them: these are one more pixel of 0. More is accepted
    where a run ends exactly with the frame, and either nothing but zeros follows, or all segments go on: damage to one
    run moves the end of one segment alone.
    """
    import imagecodecs

    planes = np.empty((len(segments), size + 1), np.uint8)
    try:
        done = [
            len(imagecodecs.packbits_decode(segment, out=memoryview(plane.data)))
            for segment, plane in zip(segments, planes, strict=True)
        ]
    except imagecodecs.PackbitsError:  # one has no room
        done = []
    if not done or any(n != size and (n != size + 1 or plane[size]) for n, plane in zip(done, planes, strict=True)):
        ends = [_end_of_runs(segment, size) for segment in segments]
        rests = [segment[end:] for segment, end in zip(segments, ends, strict=True)]
        goes_on = len(segments) > 1 and all(rests) and max(map(len, rests)) <= MOST_REST_BYTES
        if not goes_on and any(rest.strip(b"\0\x80") for rest in rests):
            raise DecodeError("its segments go on after the frame is full, each in another way")
        for segment, end, plane in zip(segments, ends, planes, strict=True):
            imagecodecs.packbits_decode(segment[:end], out=memoryview(plane.data))
        faults.add(RUN_ON)
    return planes[:, :size]


def _end_of_runs(segment: bytes, size: int) -> int:
    """Return where the run ends that is the last of `size` bytes; `0x80` stands for nothing."""
    at = done = 0
    while done < size and at < len(segment):
        code = segment[at]
        done += code + 1 if code < 128 else 257 - code if code > 128 else 0
        at += code + 2 if code < 128 else 2 if code > 128 else 1
    if done != size or at > len(segment):
        raise DecodeError(f"a segment holds {done} bytes, not {size}")
    return at


def _code_stream(stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the values of a code stream by the first decoder that gives plausible ones."""
    info = frame_info(stream)
    if info is None:
        raise DecodeError("its frame begins like no JPEG, JPEG-LS, JPEG 2000 or JPEG XL image")
    if (info.rows, info.columns, info.samples) != (*shape, 1):
        raise DecodeError(
            f"its frame is {info.rows} × {info.columns} × {info.samples}, its header says {shape[0]} × {shape[1]}"
        )
    if info.precision > 16:
        raise DecodeError(f"its frame has {info.precision} bits per pixel")
    if info.tiles > max(shape[0] * shape[1] // PIXELS_PER_TILE, 1):
        raise DecodeError(f"its frame has {info.tiles} tiles")
    if info.end is None:
        # libjpeg fills what is missing with grey and says so to nobody. The decoders of the others are strict: without
        # the marker they fail as well, so nothing is lost by refusing here.
        raise DecodeError("its frame lacks the end marker: it is cut off")
    # Without a JP2 file around it, in whose boxes pydicom may look for the code stream for ever.
    stream = stream[info.start : info.end]
    reasons = []
    for decoder in DECODERS[info.kind]:
        try:
            values = decoder.decode(stream, info)
            _check_shape(values, shape)
            values = _stored(values, info, header, dtype)
            _check_constant(values, len(stream))
        except Exception as exc:  # decoders raise whatever a broken stream provokes
            reasons.append(f"{decoder.name}: {_one_line(exc).removeprefix(decoder.name + ': ')}")
        else:
            return values
    raise DecodeError("; ".join(reasons))


def _stored(values: NDArray[Any], info: FrameInfo, header: SliceHeader, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the integers that the header makes of those of the code stream.

    The lowest `info.precision` bits of whatever a decoder returns are the sample: lossless JPEG reckons modulo 65536,
    and decoders leave what that adds above. Where they and the header differ in sign, that of the header is taken (as
    pydicom does since its issues 1149 and 2009).
    """
    stored = min(header.bits_stored or dtype.itemsize * 8, dtype.itemsize * 8)
    result = values.astype(np.uint16)
    result &= np.uint16(2**info.precision - 1)
    top = int(result.max())
    if info.precision < stored and info.signed != (dtype.kind == "i") and top >= 2 ** (info.precision - 1):
        raise DecodeError(
            f"its {stored} bits are {info.precision} of another sign in its frame: {top} may be negative or not"
        )
    low, high = 0, 2**stored - 1
    if dtype.kind == "i":
        low, high = -(2 ** (stored - 1)), 2 ** (stored - 1) - 1
        # Words of 16 bits may hold 12 with nothing above them; then the sign is the 12th.
        bits = stored if info.precision > stored and top < 2**stored else info.precision
        result <<= 16 - bits
        result = result.view(np.int16)
        result >>= 16 - bits
    least, most = int(result.min()), int(result.max())
    if least < low or most > high:
        raise DecodeError(f"its values, {least} to {most}, are not {stored} bits")
    return result.astype(dtype, copy=False)


def _check_shape(values: NDArray[Any], shape: tuple[int, int]) -> None:
    if values.shape != shape or values.dtype.kind not in "iu":
        raise DecodeError(f"{values.dtype} of shape {values.shape} came out, not integers of {shape}")


def _check_constant(values: NDArray[Any], encoded_bytes: int) -> None:
    """Raise where nothing but one value came out of more bytes than that takes."""
    if encoded_bytes > values.size * CONSTANT_BYTES_PER_PIXEL + MARKERS_BYTES and values.min() == values.max():
        raise DecodeError(f"{encoded_bytes} bytes became nothing but {values.flat[0]}")


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split()).removeprefix(PYDICOM_SAYS).lstrip()
    return text or type(exc).__name__
