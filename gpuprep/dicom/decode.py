"""Decodes one frame of an encoded file to stored values.

All decoders get the same bytes and return the integers of the code stream. This module alone interprets these integers
by *Pixel Representation* and *Bits Stored*; `gpuprep.dicom.stored_words` corrects headers in which these are wrong.

GDCM is not used: on damaged data it aborts the process where other decoders report an error. `ljpeg_decode` and
`dicomrle_decode` of imagecodecs are not used for the same reason. `htj2k_decode` is not used because it makes up pixels
for missing data; OpenJPEG reads the same streams and rejects truncated ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.series import SliceHeader
from gpuprep.dicom.deflate import inflated_frame
from gpuprep.dicom.encapsulation import Encapsulated, fragments_of
from gpuprep.dicom.jpeg_markers import FrameInfo, Kind, frame_info
from gpuprep.dicom.uids import ENCODINGS, NATIVE, syntax_name
from gpuprep.errors import DecodeError

if TYPE_CHECKING:
    import pydicom
    from pydicom.pixels.decoders.base import Decoder as PydicomDecoder

# pydicom and imagecodecs are imported late: the imports are slow, and few series need them.

CONSTANT_BYTES_PER_PIXEL = 0.25
"""Upper limit for a constant image: lossless JPEG takes at least 1 bit per pixel, other encodings nearly nothing."""
PYDICOM_PREFIX = "Unable to decode as exceptions were raised by all available plugins:"
"""Text before the error of the plugin in messages of pydicom."""
PIXELS_PER_TILE = 256
"""Lower limit: OpenJPEG allocates about 10 KB per tile, and a few bytes can declare 65535 tiles."""
TABLES_BYTES = 1024
"""Allowance for tables and comments, which do not shrink with the image."""
MAX_RLE_PADDING_BYTES = 16
"""Largest number of bytes after the last run of a segment that count as padding; more is damage."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decoder function of a library."""

    name: str
    decode: Callable[[bytes, FrameInfo], NDArray[Any]]
    available: Callable[[], bool]
    """Returns whether the decoder is installed."""


def _by_imagecodecs(codec: str) -> Decoder:
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

    # The output has the size from the code stream's header; the decoder rejects any other size.
    out = np.empty((info.rows, info.columns), np.uint8 if info.precision <= 8 else np.uint16)
    values = np.asarray(imagecodecs.jpegxl_decode(stream, keeporientation=True, out=out))
    if int(values.max()) >> info.precision:
        raise DecodeError(f"{values.max()} is not a value of {info.precision} bits")
    return values


def _by_pydicom(plugin: str, syntax: str) -> Decoder:
    def decode(stream: bytes, info: FrameInfo) -> NDArray[Any]:
        from pydicom.encaps import encapsulate

        # Precision and sign of the code stream instead of the header's, so that pydicom corrects nothing.
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
        return _pydicom_decoder(syntax).as_array(source, index=0, raw=True, decoding_plugin=plugin, **options)[0]

    return Decoder(plugin, decode, lambda: plugin in _pydicom_decoder(syntax).available_plugins)


def _pydicom_decoder(syntax: str) -> PydicomDecoder:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    return get_decoder(UID(syntax))


DECODERS: dict[Kind, tuple[Decoder, ...]] = {
    "JPEG": (_by_imagecodecs("jpeg8"), _by_imagecodecs("jpegsof3")),
    "JPEG-LS": (_by_imagecodecs("jpegls"), _by_pydicom("pyjpegls", "1.2.840.10008.1.2.4.81")),
    "JPEG 2000": (_by_imagecodecs("jpeg2k"), _by_pydicom("pylibjpeg", "1.2.840.10008.1.2.4.91")),
    "JPEG XL": (replace(_by_imagecodecs("jpegxl"), decode=_jpeg_xl),),
}
"""Decoders in the order they are tried, by kind of code stream. The kind is read from the stream, not from the transfer
syntax.

libjpeg-turbo (`jpeg8`) supports every JPEG process of DICOM, with 8 and 12 bits and lossless with 2 to 16; `jpegsof3`
is for builds of it without some of these. Both decoders of JPEG-LS are CharLS, both of JPEG 2000 are OpenJPEG. libjxl
is the only decoder of JPEG XL.
"""
RLE_DECODER = _by_imagecodecs("packbits")
OTHER_DECODERS = {"RLE": (RLE_DECODER.name,), "deflate": ("zlib",), "none": ("NumPy",)}
"""Names of the decoders of encodings that are not code streams."""
RLE_TOO_LONG = "run lengths go on after the frame is full"


def decode_frame(
    source: pydicom.Dataset | Encapsulated,
    header: SliceHeader,
    frame: int,
    rows: int,
    columns: int,
    faults: set[str] | None = None,
) -> NDArray[Any]:
    """Return the stored values of one frame, without the contents of unused bits.

    Parameters
    ----------
    source : pydicom.Dataset or Encapsulated
        The data set with its pixels; or its fragments, for an encapsulated transfer syntax.
    header : SliceHeader
        Header from the scan; its transfer syntax, bits and sign are used.
    frame : int
        Index of the frame, from 0.
    rows, columns : int
        Expected size of the frame.
    faults : set of str, optional
        Harmless violations of DICOM are added to it.

    Returns
    -------
    ndarray
        Integers of shape (rows, columns) with the sign and the *Bits Allocated* of the header.

    Raises
    ------
    DecodeError
        If no decoder returns a plausible image; the message has the error of each.
    """
    faults = set() if faults is None else faults
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = _dtype(header)
            if not isinstance(source, Encapsulated) and header.transfer_syntax in NATIVE:
                return _native_frame(source, header, frame, (rows, columns), dtype)
            stream = _frame_bytes(source, header, frame, faults)
            encoding = ENCODINGS.get(header.transfer_syntax)
            if encoding == "RLE":
                return _rle_frame(stream, header, (rows, columns), dtype, faults)
            if encoding in ("deflate", "none"):
                return _uncompressed_frame(stream, header, (rows, columns), dtype, deflated=encoding == "deflate")
            return _code_stream_frame(stream, header, (rows, columns), dtype)
    except Exception as exc:  # decoders raise exceptions of many types for damaged files
        name = syntax_name(header.transfer_syntax)
        raise DecodeError(f"{header.name} ({name}) cannot be decoded: {_one_line(exc)}") from exc


def available_decoders(transfer_syntax: str) -> tuple[str, ...]:
    """Return the names of the installed decoders of an encapsulated transfer syntax, in the order they are tried.

    Parameters
    ----------
    transfer_syntax : str
        UID of the transfer syntax.

    Returns
    -------
    tuple of str
        Empty if there is none.
    """
    encoding = ENCODINGS.get(transfer_syntax)
    if encoding is None or (encoding == "RLE" and not RLE_DECODER.available()):
        return ()
    if encoding == "RLE" or encoding == "deflate" or encoding == "none":
        return OTHER_DECODERS[encoding]
    return tuple(d.name for d in DECODERS[encoding] if d.available())


def drop_unused_bits(header: SliceHeader, values: NDArray[Any], high_bit: int | None) -> bool:
    """Reduce words, in place, to the *Bits Stored* bits up to *High Bit*; the others may hold a retired overlay.

    Return whether the stored bits are the low ones and the bits above them held anything but a sign extension.

    Parameters
    ----------
    header : SliceHeader
        Header with *Bits Stored*.
    values : ndarray
        Whole words, modified in place.
    high_bit : int or None
        Index of the highest stored bit; None for *Bits Stored* − 1.

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
    values >>= allocated - kept  # arithmetic shift for signed types: extends the sign
    return top == kept - 1


def _dtype(header: SliceHeader) -> np.dtype[Any]:
    allocated = header.bits_allocated or 16
    if allocated not in (8, 16):
        raise DecodeError(f"{allocated} bits are allocated to a pixel, not 8 or 16")
    return np.dtype(f"{'i' if header.signed else 'u'}{allocated // 8}")


def _frame_bytes(source: pydicom.Dataset | Encapsulated, header: SliceHeader, frame: int, faults: set[str]) -> bytes:
    """Return the bytes of one frame, fragments joined."""
    if isinstance(source, Encapsulated):
        pixels, frames = source, header.frames
    else:
        pixels = fragments_of(source.PixelData, source.get("ExtendedOffsetTable") or b"")
        frames = int(source.get("NumberOfFrames") or 1)
    stream = pixels.frame(frame, frames)
    faults |= pixels.faults
    return stream


def _native_frame(
    ds: pydicom.Dataset, header: SliceHeader, frame: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    found = (ds.Rows, ds.Columns, ds.BitsAllocated)
    if found != (*shape, dtype.itemsize * 8):  # before memory is allocated for it
        raise DecodeError(f"it changed since the scan: now {found[0]} × {found[1]} in {found[2]} bits")
    options: dict[str, Any] = {"correct_unused_bits": False}
    values, _ = _pydicom_decoder(header.transfer_syntax).as_array(ds, index=frame, raw=True, **options)
    _check_shape(values, shape)
    values = values.astype(dtype)
    drop_unused_bits(header, values, header.high_bit)
    return values


def _uncompressed_frame(
    stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any], *, deflated: bool
) -> NDArray[Any]:
    """Return the values of an encapsulated frame of little-endian words, which may be deflated."""
    size = shape[0] * shape[1] * dtype.itemsize
    data = inflated_frame(stream, size) if deflated else stream
    if not size <= len(data) <= size + size % 2:
        raise DecodeError(f"its frame has {len(data)} bytes, not {size}")
    values = np.frombuffer(data, dtype.newbyteorder("<"), shape[0] * shape[1]).astype(dtype).reshape(shape)
    drop_unused_bits(header, values, header.high_bit)
    return values


def _rle_frame(
    stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any], faults: set[str]
) -> NDArray[Any]:
    """Return the values of an RLE frame, which has one segment per byte of a pixel, most significant byte first.

    References
    ----------
    DICOM PS3.5, G.3 to G.5 (RLE segments, header).
    """
    count, *starts = np.frombuffer(stream, "<u4", 16).tolist()
    if count != dtype.itemsize:
        raise DecodeError(f"it has {count} segments, not {dtype.itemsize}")
    segments = [stream[start:end] for start, end in zip(starts, [*starts[1:count], len(stream)], strict=False)]
    planes = _decode_rle_segments(segments, shape[0] * shape[1], faults)
    values: NDArray[Any] = planes[0].astype(f"u{count}")
    for plane in planes[1:]:
        values <<= 8
        values |= plane
    values = values.reshape(shape).astype(dtype, copy=False)
    drop_unused_bits(header, values, header.high_bit)  # RLE holds whole words, as native files do
    _check_constant(values, len(stream))
    return values


def _decode_rle_segments(segments: list[bytes], size: int, faults: set[str]) -> NDArray[np.uint8]:
    """Return the decoded bytes of RLE segments, shape (segments, size).

    The decoded length is the only check that RLE data are intact, so segments have to fill the frame exactly. Two zero
    bytes of padding at the end, which decode to one more pixel of 0, are accepted. Longer segments are accepted if a
    run ends exactly with the frame and either only zeros follow or all segments go on: damage to one run would move
    the end of that segment only.
    """
    import imagecodecs

    planes = np.empty((len(segments), size + 1), np.uint8)
    try:
        decoded = [
            len(imagecodecs.packbits_decode(segment, out=memoryview(plane.data)))
            for segment, plane in zip(segments, planes, strict=True)
        ]
    except imagecodecs.PackbitsError:  # a segment decodes to more than fits
        decoded = []
    if not decoded or any(
        n != size and (n != size + 1 or plane[size]) for n, plane in zip(decoded, planes, strict=True)
    ):
        ends = [_rle_end(segment, size) for segment in segments]
        rests = [segment[end:] for segment, end in zip(segments, ends, strict=True)]
        all_go_on = len(segments) > 1 and all(rests) and max(map(len, rests)) <= MAX_RLE_PADDING_BYTES
        if not all_go_on and any(rest.strip(b"\0\x80") for rest in rests):
            raise DecodeError("its segments go on after the frame is full, and not all alike")
        for segment, end, plane in zip(segments, ends, planes, strict=True):
            imagecodecs.packbits_decode(segment[:end], out=memoryview(plane.data))
        faults.add(RLE_TOO_LONG)
    return planes[:, :size]


def _rle_end(segment: bytes, size: int) -> int:
    """Return the offset after the run that completes `size` decoded bytes; code `0x80` is a no-op."""
    offset = decoded = 0
    while decoded < size and offset < len(segment):
        code = segment[offset]
        decoded += code + 1 if code < 128 else 257 - code if code > 128 else 0
        offset += code + 2 if code < 128 else 2 if code > 128 else 1
    if decoded != size or offset > len(segment):
        raise DecodeError(f"a segment holds {decoded} bytes, not {size}")
    return offset


def _code_stream_frame(
    stream: bytes, header: SliceHeader, shape: tuple[int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return the values of a code stream from the first decoder with a plausible result."""
    info = frame_info(stream)
    if info is None:
        raise DecodeError("its frame is not a JPEG, JPEG-LS, JPEG 2000 or JPEG XL code stream")
    if (info.rows, info.columns, info.samples) != (*shape, 1):
        raise DecodeError(
            f"its frame is {info.rows} × {info.columns} × {info.samples}, its header says {shape[0]} × {shape[1]}"
        )
    if info.precision > 16:
        raise DecodeError(f"its frame has {info.precision} bits per pixel")
    if info.tiles > max(shape[0] * shape[1] // PIXELS_PER_TILE, 1):
        raise DecodeError(f"its frame has {info.tiles} tiles")
    if info.end is None:
        # libjpeg fills missing data with grey without an error. The other decoders fail without the marker anyway, so
        # rejecting the frame here loses nothing.
        raise DecodeError("its frame lacks the end marker: it is truncated")
    # Strip the JP2 boxes: pydicom may loop forever when it searches them for the code stream.
    stream = stream[info.start : info.end]
    reasons = []
    for decoder in DECODERS[info.kind]:
        try:
            values = decoder.decode(stream, info)
            _check_shape(values, shape)
            values = _stored_values(values, info, header, dtype)
            _check_constant(values, len(stream))
        except Exception as exc:  # decoders raise exceptions of many types for damaged streams
            reasons.append(f"{decoder.name}: {_one_line(exc).removeprefix(decoder.name + ': ')}")
        else:
            return values
    raise DecodeError("; ".join(reasons))


def _stored_values(values: NDArray[Any], info: FrameInfo, header: SliceHeader, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the samples of a code stream as stored values, with the sign that the header declares.

    Only the lowest `info.precision` bits of a decoded value are the sample: lossless JPEG predicts modulo 65536, and
    decoders may leave a carry above them. Where code stream and header differ in sign, the header is followed, as
    pydicom does since its issues 1149 and 2009.
    """
    stored = min(header.bits_stored or dtype.itemsize * 8, dtype.itemsize * 8)
    result = values.astype(np.uint16)
    result &= np.uint16(2**info.precision - 1)
    top = int(result.max())
    if info.precision < stored and info.signed != (dtype.kind == "i") and top >= 2 ** (info.precision - 1):
        raise DecodeError(
            f"its frame has {info.precision} bits with another sign than the {stored} bits of its header: {top} "
            "is ambiguous"
        )
    low, high = 0, 2**stored - 1
    if dtype.kind == "i":
        low, high = -(2 ** (stored - 1)), 2 ** (stored - 1) - 1
        # A code stream of 16 bits may hold 12-bit values without sign extension; then bit 11 is the sign.
        bits = stored if info.precision > stored and top < 2**stored else info.precision
        result <<= 16 - bits
        result = result.view(np.int16)
        result >>= 16 - bits
    lowest, highest = int(result.min()), int(result.max())
    if lowest < low or highest > high:
        raise DecodeError(f"its values, {lowest} to {highest}, are not {stored} bits")
    return result.astype(dtype, copy=False)


def _check_shape(values: NDArray[Any], shape: tuple[int, int]) -> None:
    if values.shape != shape or values.dtype.kind not in "iu":
        raise DecodeError(f"the decoder returned {values.dtype} of shape {values.shape}, not integers of shape {shape}")


def _check_constant(values: NDArray[Any], encoded_bytes: int) -> None:
    """Raise if a frame decodes to a constant although it has more bytes than a constant image needs."""
    if encoded_bytes > values.size * CONSTANT_BYTES_PER_PIXEL + TABLES_BYTES and values.min() == values.max():
        raise DecodeError(f"its {encoded_bytes} bytes were decoded to a constant image of {values.flat[0]}")


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split()).removeprefix(PYDICOM_PREFIX).lstrip()
    return text or type(exc).__name__
