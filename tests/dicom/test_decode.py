"""Tests of `gpuprep.dicom.decode`: equal stored values from every encoding, and errors for damaged frames."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, fragment_frame, generate_frames
from pydicom.uid import (
    MPEG2MPML,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from gpuprep.core.series import SliceHeader
from gpuprep.dicom.decode import DECODERS, Decoder, available_decoders, decode_frame
from gpuprep.dicom.jpeg_markers import FrameInfo, Kind, frame_info
from gpuprep.errors import DecodeError

Stored = NDArray[Any]
ROWS, COLUMNS = 34, 41
JPEG_XL, JPEG_XL_OF_JPEG, JPEG_XL_LOSSY = (UID(f"1.2.840.10008.1.2.4.{n}") for n in (110, 111, 112))
DEFLATED_FRAMES, UNCOMPRESSED = UID("1.2.840.10008.1.2.8.1"), UID("1.2.840.10008.1.2.1.98")
PROCESS_6, PROCESS_10 = UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55")


def noise(bits: int, signed: bool, seed: int = 0) -> Stored:
    """Return noise that contains the lowest and highest value of the given bits."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = np.random.default_rng(seed).integers(low, high + 1, (ROWS, COLUMNS))
    values[0, :2] = low, high
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def smooth(bits: int) -> Stored:
    """Return a smooth unsigned image, which lossy encodings change little."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    values: Stored = ((np.sin(x / 9) + np.cos(y / 7) + 2.1) / 4.2 * (2**bits - 1)).astype("u1" if bits <= 8 else "u2")
    return values


def low_bits(stored: Stored, bits: int) -> Stored:
    """Return the lowest bits as unsigned integers."""
    unsigned: Stored = stored.view(f"u{stored.itemsize}")
    return np.asarray(unsigned & (2**bits - 1))


def dataset(syntax: UID, stored: Stored, bits: int) -> Dataset:
    """Return a data set that describes an image, without pixels."""
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    return ds


def encapsulated(syntax: UID, stored: Stored, bits: int, *streams: bytes) -> Dataset:
    """Return a data set with one or several encoded frames."""
    ds = dataset(syntax, stored, bits)
    if len(streams) > 1:
        ds.NumberOfFrames = len(streams)
    ds.PixelData = encapsulate(list(streams))
    return ds


def decoded(ds: Dataset, frame: int = 0, **changes: Any) -> Stored:
    facts: dict[str, Any] = {
        "name": "a.dcm",
        "transfer_syntax": str(ds.file_meta.TransferSyntaxUID),
        "bits_allocated": ds.BitsAllocated,
        "bits_stored": ds.BitsStored,
        "high_bit": ds.HighBit,
        "signed": bool(ds.PixelRepresentation),
    }
    size = {"rows": ds.Rows, "columns": ds.Columns}
    for key, value in changes.items():
        (size if key in size else facts)[key] = value
    return decode_frame(ds, cast(SliceHeader, SimpleNamespace(**facts)), frame, **size)


def opened(file: Path) -> Dataset:
    """Read a data set with deferred conversion of values, as for reading pixels."""
    return pydicom.dcmread(file, defer_size=1024)


def assert_same(ours: Stored, expected: Stored) -> None:
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


# Encoders


def lossless_jpeg(stored: Stored, bits: int, rows_per_restart: int = 0, *, wrap: bool = False) -> bytes:
    """Encode unsigned integers by ITU-T T.81, annex H, predictor 1, with one code of 5 bits per category.

    `wrap` writes each difference the other way round the circle of `bits` bits, as some ultrasound devices do.
    """
    rows, columns = stored.shape
    pixels = stored.astype(int)
    segments, code = [], ""
    for r in range(rows):
        restart = r == 0 or (rows_per_restart > 0 and r % rows_per_restart == 0)
        if restart and r:
            segments.append(code)
            code = ""
        for c in range(columns):
            predicted = pixels[r, c - 1] if c else 2 ** (bits - 1) if restart else pixels[r - 1, 0]
            difference = int(pixels[r, c] - predicted)
            if wrap and difference:
                difference -= 2**bits if difference > 0 else -(2**bits)
            difference = (difference + 2**15) % 2**16 - 2**15
            category = 16 if difference == -(2**15) else abs(difference).bit_length()
            code += f"{category:05b}"
            if 0 < category < 16:
                code += f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}"
    segments.append(code)
    frame = b"\xff\xd8"
    frame += b"\xff\xc4" + struct.pack(">HB16B", 36, 0, *[0] * 4, 17, *[0] * 11) + bytes(range(17))
    frame += b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, bits, rows, columns, 1, 1, 0x11, 0)
    if rows_per_restart:
        frame += b"\xff\xdd" + struct.pack(">HH", 4, rows_per_restart * columns)
    frame += b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    for n, segment in enumerate(segments):
        filled = segment + "1" * (-len(segment) % 8)
        packed = int(filled, 2).to_bytes(len(filled) // 8)
        frame += (b"\xff" + bytes([0xD0 + (n - 1) % 8]) if n else b"") + packed.replace(b"\xff", b"\xff\x00")
    return frame + b"\xff\xd9"


def j2k(stored: Stored, bits: int | None = None, container: str = "j2k") -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat=container, reversible=True, bitspersample=bits))


def jxl(stored: Stored, bits: int | None = None, **options: Any) -> bytes:
    return bytes(imagecodecs.jpegxl_encode(stored, lossless=True, bitspersample=bits, **options))


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def by_pydicom(syntax: UID) -> Callable[[Stored, int], bytes]:
    def encode(stored: Stored, bits: int) -> bytes:
        ds = dataset(ExplicitVRLittleEndian, stored, bits)
        ds.SOPClassUID = ds.SOPInstanceUID = "1.2.3"
        ds.compress(syntax, stored, generate_instance_uid=False)
        return next(generate_frames(ds.PixelData, number_of_frames=1))

    return encode


LOSSLESS: dict[str, tuple[UID, Callable[[Stored, int], bytes | bytearray]]] = {
    "JPEG by hand": (JPEGLosslessSV1, lambda v, b: lossless_jpeg(low_bits(v, b), b)),
    "JPEG with restarts": (JPEGLosslessSV1, lambda v, b: lossless_jpeg(low_bits(v, b), b, 5)),
    "JPEG by imagecodecs": (JPEGLosslessSV1, lambda v, b: imagecodecs.ljpeg_encode(low_bits(v, b), bitspersample=b)),
    "JPEG of whole words": (JPEGLosslessSV1, lambda v, _: lossless_jpeg(v.view(f"u{v.itemsize}"), v.itemsize * 8)),
    "JPEG, predictor 6": (
        JPEGLossless,
        lambda v, b: imagecodecs.jpeg8_encode(low_bits(v, b), lossless=True, predictor=6, bitspersample=b),
    ),
    "JPEG-LS by pydicom": (JPEGLSLossless, by_pydicom(JPEGLSLossless)),
    "JPEG-LS of whole words": (JPEGLSLossless, lambda v, _: imagecodecs.jpegls_encode(v.view(f"u{v.itemsize}"))),
    "JPEG-LS of words with nothing above": (JPEGLSLossless, lambda v, b: imagecodecs.jpegls_encode(low_bits(v, b))),
    "JPEG 2000 by pydicom": (JPEG2000Lossless, by_pydicom(JPEG2000Lossless)),
    "JPEG 2000 by imagecodecs": (JPEG2000Lossless, lambda v, b: j2k(v, b)),
    "JPEG 2000 of whole words": (JPEG2000Lossless, lambda v, _: j2k(v)),
    "JPEG 2000 without sign": (JPEG2000Lossless, lambda v, b: j2k(low_bits(v, b), b)),
    "JPEG 2000 with sign": (JPEG2000Lossless, lambda v, b: j2k(sign_at(v, b), b)),
    "JPEG 2000 as a JP2 file": (JPEG2000Lossless, lambda v, b: j2k(v, b, "jp2")),
    "HTJ2K": (HTJ2KLossless, lambda v, _: imagecodecs.htj2k_encode(v, reversible=True)),
    "RLE": (RLELossless, by_pydicom(RLELossless)),
    "JPEG XL": (JPEG_XL, lambda v, b: jxl(low_bits(v, b), b)),
    "JPEG XL as a file": (JPEG_XL, lambda v, b: jxl(low_bits(v, b), b, usecontainer=True)),
    "JPEG XL of whole words": (JPEG_XL, lambda v, _: jxl(v.view(f"u{v.itemsize}"))),
    "deflated": (DEFLATED_FRAMES, lambda v, _: deflated(v.astype(v.dtype.newbyteorder("<")).tobytes())),
    "uncompressed": (UNCOMPRESSED, lambda v, _: v.astype(v.dtype.newbyteorder("<")).tobytes()),
}


SIMPLE_ENCODERS = {"JPEG by hand", "JPEG with restarts", "JPEG of whole words"}
"""Encodings by an encoder that spends 5 bits per code where 1 is enough."""


def sign_at(stored: Stored, bits: int) -> Stored:
    """Return the same bits as two's complement."""
    unsigned = low_bits(stored, bits).astype(np.int32)
    return np.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned).astype(f"i{stored.itemsize}")


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [8, 12, 15, 16])
@pytest.mark.parametrize("encoding", LOSSLESS)
def test_every_lossless_encoding_gives_the_same_integers(encoding: str, bits: int, signed: bool) -> None:
    # Traps 24, 25, 30: both ends of the range; pydicom issues 1149 and 2009.
    syntax, encode = LOSSLESS[encoding]
    stored = noise(bits, signed)
    assert_same(decoded(encapsulated(syntax, stored, bits, bytes(encode(stored, bits)))), stored)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("predictor", range(1, 8))
def test_lossless_jpeg_of_any_precision_and_predictor(bits: int, predictor: int) -> None:
    stored = noise(bits, False)
    stream = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=predictor, bitspersample=bits)
    assert_same(decoded(encapsulated(JPEGLossless, stored, bits, bytes(stream))), stored)


@pytest.mark.parametrize("bits", [8, 12, 15])
@pytest.mark.parametrize("signed", [True, False])
def test_lossless_jpeg_predicts_modulo_65536(bits: int, signed: bool) -> None:
    # T.81, H.1.2.1: 52 − 180 is 65408, which is 128 in 8 bits; libjpeg-turbo leaves the 65408 in 16-bit output.
    stored = noise(bits, signed)
    stream = lossless_jpeg(low_bits(stored, bits), bits, wrap=True)
    assert_same(decoded(encapsulated(JPEGLosslessSV1, stored, bits, stream)), stored)


@pytest.mark.parametrize("bits", [6, 8])
def test_eight_bits_stored_in_words_of_sixteen_are_decoded(bits: int) -> None:
    # pydicom issue 2010.
    stored = noise(bits, False)
    for stream in (lossless_jpeg(stored, bits), imagecodecs.jpegls_encode(stored), j2k(stored, bits)):
        ds = encapsulated(JPEGLSLossless, stored.astype(np.uint16), bits, bytes(stream))
        assert_same(decoded(ds), stored.astype(np.uint16))


@pytest.mark.parametrize(
    ("syntax", "bits"),
    [(JPEGBaseline8Bit, 8), (JPEGExtended12Bit, 8), (JPEGExtended12Bit, 12), (PROCESS_6, 12), (PROCESS_10, 12)],
)
def test_lossy_jpeg_keeps_a_smooth_image(syntax: UID, bits: int) -> None:
    stored = smooth(bits)
    stream = imagecodecs.jpeg8_encode(stored, level=100, bitspersample=bits)
    ours = decoded(encapsulated(syntax, stored, bits, bytes(stream)))
    assert ours.dtype == stored.dtype
    assert np.abs(ours.astype(int) - stored).max() <= 2


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGBaseline8Bit, JPEG2000Lossless])
def test_the_code_stream_and_not_the_transfer_syntax_selects_the_decoder(syntax: UID) -> None:
    stored = noise(12, True)
    for stream in (
        lossless_jpeg(low_bits(stored, 12), 12),
        j2k(stored, 12),
        imagecodecs.jpegls_encode(stored.view("u2")),
    ):
        assert_same(decoded(encapsulated(syntax, stored, 12, bytes(stream))), stored)


@pytest.mark.parametrize("high_bit", [11, 13, 15])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRBigEndian, ExplicitVRLittleEndian])
def test_bits_outside_bits_stored_are_dropped(syntax: UID, high_bit: int, signed: bool) -> None:
    # Trap 24; PS3.5, 8.1.1.
    stored = noise(12, signed)
    shift = high_bit - 11
    mask = np.uint16(0xFFF << shift)
    raw = (stored.view(np.uint16) << shift) & mask | noise(16, False, 1) & ~mask
    ds = dataset(syntax, stored, 12)
    if syntax == RLELossless:
        ds.PixelData = encapsulate([by_pydicom(RLELossless)(raw, 16)])
    else:
        ds.PixelData = raw.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
        ds["PixelData"].VR = "OW"
        ds.set_original_encoding(False, syntax != ExplicitVRBigEndian)
    assert_same(decoded(ds, high_bit=high_bit), stored)


# JPEG XL


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (8, 8), (64, 256), (264, 264), (300, 200), (200, 300), (120, 100), (9, 5000)]
)
@pytest.mark.parametrize("bits", [2, 8, 9, 10, 12, 13, 16])
def test_size_and_precision_are_read_from_a_jpeg_xl_header(bits: int, size: tuple[int, int]) -> None:
    # All codings of the size (multiples of 8, numbers of four lengths, ratios) and of the precision.
    stored = np.zeros(size, np.uint8 if bits <= 8 else np.uint16)
    for options in ({}, {"usecontainer": True}):
        info = frame_info(jxl(stored, bits, **options))
        assert info is not None
        assert (info.kind, info.rows, info.columns, info.samples, info.precision) == ("JPEG XL", *size, 1, bits)


@pytest.mark.parametrize("shape", [(6, 5, 2), (6, 5, 3), (6, 5, 4)])
def test_jpeg_xl_with_several_samples_per_pixel_is_rejected(shape: tuple[int, ...]) -> None:
    stream = bytes(imagecodecs.jpegxl_encode(np.zeros(shape, np.uint8), lossless=True))
    with pytest.raises(DecodeError, match=r"its frame is 6 × 5 × [23], its header says 6 × 5"):
        decoded(encapsulated(JPEG_XL, np.zeros((6, 5), np.uint8), 8, stream))


def test_rotated_animated_and_floating_point_jpeg_xl_is_rejected() -> None:
    floating = bytes(imagecodecs.jpegxl_encode(np.zeros((6, 5), np.float32), lossless=True))
    animated = bytes(imagecodecs.jpegxl_encode(np.zeros((3, 6, 5), np.uint8), lossless=True, photometric="gray"))
    for stream in (floating, animated):
        with pytest.raises(DecodeError, match="rotated, animated or in floating point"):
            decoded(encapsulated(JPEG_XL, np.zeros((6, 5), np.uint8), 8, stream))


def test_a_jpeg_xl_code_stream_in_several_boxes_is_decoded() -> None:
    stored = noise(12, False)
    stream = jxl(stored, 12)
    signature = b"\0\0\0\x0cJXL \r\n\x87\n"
    for cuts in ([0, len(stream)], [0, 3, 200, len(stream)], [0, 1, 2, 5, len(stream)]):
        parts = [stream[a:b] for a, b in pairwise(cuts)]
        boxes = signature + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
        for n, part in enumerate(parts):
            number = n | (n == len(parts) - 1) << 31
            boxes += struct.pack(">I4sI", 12 + len(part), b"jxlp", number) + part
        assert_same(decoded(encapsulated(JPEG_XL, stored, 12, boxes)), stored)
    for last in (b"\0\0\0\0jxlc", b"\0\0\0\1jxlc" + struct.pack(">Q", 16 + len(stream))):
        assert_same(
            decoded(encapsulated(JPEG_XL, stored, 12, signature + b"\0\0\0\x14ftypjxl \0\0\0\0jxl " + last + stream)),
            stored,
        )


@pytest.mark.parametrize(
    "boxes",
    [b"", b"\0\0\0\0", b"\0\0\0\0ftyp", b"\0\0\0\7jxlc", b"\0\0\0\1jxlc" + bytes(8), b"\xff" * 40, b"\0\0\0\0jxlc\xff"],
)
def test_a_jpeg_xl_file_without_code_stream_is_rejected(boxes: bytes) -> None:
    stored = noise(12, False)
    with pytest.raises(DecodeError, match="is not a JPEG"):
        decoded(encapsulated(JPEG_XL, stored, 12, b"\0\0\0\x0cJXL \r\n\x87\n" + boxes))


def test_recompressed_jpeg_in_jpeg_xl_keeps_its_values() -> None:
    stored = smooth(8)
    jpeg = bytes(imagecodecs.jpeg8_encode(stored, level=90))
    ours = decoded(encapsulated(JPEG_XL_OF_JPEG, stored, 8, bytes(imagecodecs.jpegxl_encode_jpeg(jpeg))))
    # ITU-T T.81 does not specify the rounding of the inverse transform.
    assert np.abs(ours.astype(int) - imagecodecs.jpeg8_decode(jpeg)).max() <= 1


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossy_jpeg_xl_keeps_a_smooth_image(bits: int) -> None:
    stored = smooth(bits)
    stream = bytes(imagecodecs.jpegxl_encode(stored, distance=0.05, lossless=False, bitspersample=bits))
    ours = decoded(encapsulated(JPEG_XL_LOSSY, stored, bits, stream))
    assert ours.dtype == stored.dtype
    assert np.abs(ours.astype(int) - stored).max() <= 2**bits / 100


# Uncompressed words in fragments


@pytest.mark.parametrize("change", [-2, -1, 1, 2, 1000])
@pytest.mark.parametrize("syntax", [DEFLATED_FRAMES, UNCOMPRESSED], ids=["deflated", "uncompressed"])
def test_a_frame_with_a_wrong_number_of_words_is_rejected(syntax: UID, change: int) -> None:
    stored = noise(12, True)
    data = stored.tobytes()
    data = data[:change] if change < 0 else data + bytes(change)
    frame = deflated(data) if syntax == DEFLATED_FRAMES else data
    ds = encapsulated(syntax, stored, 12)
    ds.PixelData = encapsulate([frame], has_bot=False)
    if change == 1 and syntax == DEFLATED_FRAMES:
        assert_same(decoded(ds), stored)  # the padding byte was added before deflating
    elif change == -1 and syntax == UNCOMPRESSED:  # padded to an even length with the missing byte
        assert_same(decoded(ds).ravel()[:-1], stored.ravel()[:-1])
    else:
        with pytest.raises(DecodeError, match=rf"\d+ bytes.*, not {stored.nbytes}"):
            decoded(ds)


def test_an_odd_number_of_bytes_is_padded() -> None:
    stored = noise(8, False)[:33]
    assert stored.size % 2
    for syntax, frame in ((UNCOMPRESSED, stored.tobytes()), (DEFLATED_FRAMES, deflated(stored.tobytes() + b"\0"))):
        assert_same(decoded(encapsulated(syntax, stored, 8, frame)), stored)


def test_a_deflated_frame_is_not_inflated_beyond_its_size() -> None:
    stored = noise(12, False)
    bomb = deflated(bytes(200 * 2**20))
    tracemalloc.start()
    with pytest.raises(DecodeError, match=rf"unpacks to {stored.nbytes + 2} bytes and does not end there"):
        decoded(encapsulated(DEFLATED_FRAMES, stored, 12, bomb))
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


# Frames


FRAMES = [noise(12, True, seed) for seed in range(3)]


def with_extended_table(streams: list[bytes]) -> Dataset:
    ds = encapsulated(JPEG2000Lossless, FRAMES[0], 12, *streams)
    ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    return ds


def in_fragments(streams: list[bytes], has_bot: bool) -> Dataset:
    ds = encapsulated(JPEG2000Lossless, FRAMES[0], 12, *streams)
    ds.PixelData = encapsulate(streams, fragments_per_frame=4, has_bot=has_bot)
    return ds


@pytest.mark.parametrize(
    "wrap",
    [
        lambda streams: encapsulated(JPEG2000Lossless, FRAMES[0], 12, *streams),
        lambda streams: in_fragments(streams, True),
        lambda streams: in_fragments(streams, False),
        with_extended_table,
    ],
    ids=["basic offset table", "fragments, table", "fragments, no table", "extended offset table"],
)
def test_each_of_several_encapsulated_frames_is_found(wrap: Callable[[list[bytes]], Dataset]) -> None:
    ds = wrap([j2k(f, 12) for f in FRAMES])
    for k, stored in enumerate(FRAMES):
        assert_same(decoded(ds, k), stored)
    for k in (-1, 3):
        with pytest.raises(DecodeError, match=rf"a\.dcm.*no frame {k + 1} of 3"):
            decoded(ds, k)


def test_one_frame_in_many_fragments(tmp_path: Path) -> None:
    stored = noise(12, True)
    ds = dataset(JPEG2000Lossless, stored, 12)
    fragments = list(fragment_frame(j2k(stored, 12), 7))
    ds.PixelData = encapsulate(fragments, has_bot=False)
    assert_same(decoded(ds), stored)
    ds.SOPClassUID = ds.SOPInstanceUID = "1.2.3"
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert_same(decoded(opened(tmp_path / "a.dcm")), stored)


def test_each_of_several_native_frames_is_read() -> None:
    ds = dataset(ExplicitVRBigEndian, FRAMES[0], 12)
    ds.NumberOfFrames = 3
    ds.PixelData = b"".join(f.astype(">i2").tobytes() for f in FRAMES)
    ds["PixelData"].VR = "OW"
    ds.set_original_encoding(False, False)
    for k, stored in enumerate(FRAMES):
        assert_same(decoded(ds, k), stored)


# Frames that are rejected


@pytest.fixture
def replace_decoders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the decoders of a kind; None keeps the original one."""

    real = dict(DECODERS)

    def put(kind: Kind, *decodes: Callable[[bytes, FrameInfo], Any] | None) -> None:
        pairs = zip(real[kind], decodes, strict=True)
        faked = tuple(replace(d, decode=f) if f else d for d, f in pairs)
        monkeypatch.setitem(DECODERS, kind, faked)

    return put


def raising(_: bytes, __: FrameInfo) -> Stored:
    raise RuntimeError("no\nidea")


def zeros(_: bytes, info: FrameInfo) -> Stored:
    return np.zeros((info.rows, info.columns), np.uint16)


def transposed(_: bytes, info: FrameInfo) -> Stored:
    return np.zeros((info.columns, info.rows), np.uint16)


def floating(_: bytes, info: FrameInfo) -> Stored:
    return np.random.default_rng(0).random((info.rows, info.columns))


def out_of_range(_: bytes, info: FrameInfo) -> Stored:
    return np.full((info.rows, info.columns), 4096, np.uint16)


KINDS: dict[Kind, tuple[UID, Callable[[Stored], bytes]]] = {
    "JPEG": (JPEGLosslessSV1, lambda v: lossless_jpeg(v, 16)),
    "JPEG-LS": (JPEGLSLossless, lambda v: bytes(imagecodecs.jpegls_encode(v))),
    "JPEG 2000": (JPEG2000Lossless, j2k),
    "JPEG XL": (JPEG_XL, jxl),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [raising, zeros, transposed, floating, out_of_range], ids=lambda f: f.__name__)
def test_the_next_decoder_is_tried_after_a_failure(kind: Kind, bad: Any, replace_decoders: Callable[..., None]) -> None:
    syntax, encode = KINDS[kind]
    stored = noise(12, False)
    stream = encode(stored)
    assert len(stream) > stored.size / 4 + 1024
    if len(DECODERS[kind]) == 1:
        replace_decoders(kind, bad)
        with pytest.raises(DecodeError, match=DECODERS[kind][0].name):
            decoded(encapsulated(syntax, stored, 12, stream))
        return
    replace_decoders(kind, bad, None)
    assert_same(decoded(encapsulated(syntax, stored, 12, stream)), stored)
    replace_decoders(kind, None, bad)
    assert_same(decoded(encapsulated(syntax, stored, 12, stream)), stored)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if len(DECODERS[kind]) == 2])
def test_the_error_contains_the_message_of_each_decoder(kind: Kind, replace_decoders: Callable[..., None]) -> None:
    syntax, encode = KINDS[kind]
    stored = noise(12, False)
    ds = encapsulated(syntax, stored, 12, encode(stored))
    first, second = (d.name for d in DECODERS[kind])
    replace_decoders(kind, raising, transposed)
    with pytest.raises(DecodeError) as caught:
        decoded(ds)
    text = str(caught.value)
    assert text.startswith(f"a.dcm ({syntax.name}) cannot be decoded: ")
    assert f"{first}: no idea; {second}: the decoder returned uint16 of shape (41, 34)" in text
    assert "\n" not in text
    replace_decoders(kind, zeros, out_of_range)
    with pytest.raises(
        DecodeError, match=rf"{first}: its \d+ bytes .* constant image of 0; {second}: .*4096.* not 12 bits"
    ):
        decoded(ds)


def test_both_wrappers_of_a_decoder_library_give_the_same_result() -> None:
    stored = noise(12, True)
    unsigned = low_bits(stored, 12)
    for stream in (
        lossless_jpeg(unsigned, 12),
        by_pydicom(JPEGLSLossless)(stored, 12),
        j2k(stored, 12),
        j2k(unsigned, 12),
    ):
        info = frame_info(stream)
        assert info is not None
        for decoder in DECODERS[info.kind]:
            np.testing.assert_array_equal(decoder.decode(stream, info).astype(np.uint16) & 0xFFF, unsigned)


@pytest.mark.parametrize("value", [0, 1, -1000])
@pytest.mark.parametrize("encoding", sorted(LOSSLESS.keys() - SIMPLE_ENCODERS))
def test_a_constant_image_is_decoded(encoding: str, value: int) -> None:
    syntax, encode = LOSSLESS[encoding]
    stored = np.full((256, 256), value, np.int16)
    assert_same(decoded(encapsulated(syntax, stored, 16, bytes(encode(stored, 16)))), stored)


@pytest.mark.parametrize(
    "encoding",
    [
        "JPEG by imagecodecs", "JPEG-LS by pydicom", "JPEG 2000 by pydicom", "HTJ2K", "JPEG XL", "JPEG XL as a file",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS + 1), (COLUMNS, ROWS), (ROWS // 2, COLUMNS * 2)])
def test_a_frame_of_another_size_is_rejected_before_decoding(
    encoding: str, rows: int, columns: int, replace_decoders: Callable[..., None]
) -> None:
    syntax, encode = LOSSLESS[encoding]
    stored = noise(12, False)
    ds = encapsulated(syntax, stored, 12, bytes(encode(stored, 12)))

    def never(*_: Any) -> Stored:
        pytest.fail("decoded")

    for kind, decoders in DECODERS.items():
        replace_decoders(kind, *[never] * len(decoders))
    with pytest.raises(DecodeError, match=rf"its frame is 34 × 41 × 1, its header says {rows} × {columns}"):
        decoded(ds, rows=rows, columns=columns)


def test_a_colour_frame_is_rejected() -> None:
    stored = noise(8, False)
    stream = bytes(imagecodecs.jpeg8_encode(np.stack([stored] * 3, axis=-1)))
    with pytest.raises(DecodeError, match="34 × 41 × 3"):
        decoded(encapsulated(JPEGBaseline8Bit, stored, 8, stream))


def test_a_frame_with_too_many_tiles_is_rejected() -> None:
    stored = np.zeros((512, 512), np.uint16)
    stream = bytearray(j2k(stored))
    stream[24:32] = struct.pack(">II", 2, 3)
    with pytest.raises(DecodeError, match="43776 tiles"):
        decoded(encapsulated(JPEG2000Lossless, stored, 16, bytes(stream)))
    stream[24:32] = struct.pack(">II", 64, 64)
    info = frame_info(bytes(stream))
    assert info is not None
    assert info.tiles == 64


@pytest.mark.parametrize(("bits", "signed"), [(12, False), (12, True), (11, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_beyond_bits_stored_are_rejected(kind: Kind, bits: int, signed: bool) -> None:
    syntax, encode = KINDS[kind]
    stored = noise(16, signed)
    with pytest.raises(DecodeError, match=rf"are not {bits} bits"):
        decoded(encapsulated(syntax, stored, bits, encode(stored.view(np.uint16))))


def test_a_frame_with_an_ambiguous_sign_is_rejected() -> None:
    # 12 unsigned bits in the code stream, 16 signed ones in the header: 4095 may be −1.
    stored = noise(12, False)
    for stream in (lossless_jpeg(stored, 12), j2k(stored, 12)):
        with pytest.raises(DecodeError, match="12 bits with another sign than the 16 bits"):
            decoded(encapsulated(JPEGLosslessSV1, stored.astype(np.int16), 16, stream))
    low = stored // 2
    assert_same(
        decoded(encapsulated(JPEGLosslessSV1, low.astype(np.int16), 16, lossless_jpeg(low, 12))), low.astype(np.int16)
    )


@pytest.mark.parametrize("allocated", [1, 12, 32, 64])
def test_other_bits_allocated_are_rejected(allocated: int) -> None:
    stored = noise(12, False)
    with pytest.raises(DecodeError, match=f"{allocated} bits are allocated"):
        decoded(encapsulated(JPEG2000Lossless, stored, 12, j2k(stored, 12)), bits_allocated=allocated)


def test_a_native_file_that_changed_since_the_scan_is_rejected() -> None:
    stored = noise(12, False)
    ds = dataset(ExplicitVRBigEndian, stored, 12)
    ds.PixelData = bytes(stored.nbytes)
    with pytest.raises(DecodeError, match="changed since the scan: now 34 × 41 in 16 bits"):
        decoded(ds, rows=ROWS - 1)


@pytest.mark.parametrize(
    "content", [b"\0\0", b"\xff\xd8", b"\xff\xd8\xff\xe0\0\0\xff", bytes(100), b"\xff\x4f\xff\x51" * 10]
)
def test_data_that_are_not_a_code_stream_are_rejected(content: bytes) -> None:
    stored = noise(12, False)
    with pytest.raises(DecodeError, match=r"a\.dcm \(JPEG 2000.*cannot be decoded: \S"):
        decoded(encapsulated(JPEG2000Lossless, stored, 12, content))


def test_a_video_is_rejected() -> None:
    stored = noise(12, False)
    with pytest.raises(DecodeError, match="is not a JPEG"):
        decoded(encapsulated(MPEG2MPML, stored, 12, b"\0\0\1\xb3" * 20))


def test_a_data_set_without_pixels_is_rejected() -> None:
    stored = noise(12, False)
    for syntax in (JPEG2000Lossless, RLELossless, ExplicitVRBigEndian):
        with pytest.raises(DecodeError, match=r"a\.dcm"):
            decoded(dataset(syntax, stored, 12))


def test_the_end_marker_of_a_thumbnail_does_not_end_the_image() -> None:
    stored = noise(12, False)
    stream = lossless_jpeg(stored, 12)
    thumbnail = b"\xff\xd8\xff\xd9"
    stream = stream[:2] + b"\xff\xe0" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + stream[2:]
    assert_same(decoded(encapsulated(JPEGLosslessSV1, stored, 12, stream)), stored)
    with pytest.raises(DecodeError, match="lacks the end marker"):
        decoded(encapsulated(JPEGLosslessSV1, stored, 12, stream[:-300]))


@pytest.mark.parametrize("padding", [b"\0", b"\xff", b"\0" * 5, b"\x20\x20", b"\0" * 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_after_the_end_marker_is_ignored(kind: Kind, padding: bytes) -> None:
    syntax, encode = KINDS[kind]
    stored = noise(12, False)
    assert_same(decoded(encapsulated(syntax, stored, 12, encode(stored) + padding)), stored)


# Damage


DAMAGEABLE = {
    **{name: encoding for name, encoding in LOSSLESS.items() if name != "uncompressed"},  # any words are valid
    "lossy JPEG": (
        JPEGExtended12Bit,
        lambda v, b: imagecodecs.jpeg8_encode(low_bits(v, b), level=95, bitspersample=min(b, 12)),
    ),
}


@pytest.mark.parametrize("encoding", DAMAGEABLE)
def test_a_truncated_stream_is_rejected(encoding: str) -> None:
    # Trap 30: libjpeg fills the rest with grey.
    syntax, encode = DAMAGEABLE[encoding]
    stored = noise(12, False)
    stream = bytes(encode(stored, 12))
    whole = decoded(encapsulated(syntax, stored, 12, stream))
    lengths = {*range(len(stream) - 12, len(stream)), *range(2, len(stream), 37), len(stream) // 2}
    refused = 0
    for length in sorted(lengths):
        for rest in (b"", bytes(len(stream) - length)):  # an interrupted copy leaves zeros
            try:
                ours = decoded(encapsulated(syntax, stored, 12, stream[:length] + rest))
            except DecodeError:
                refused += 1
            else:
                # RLE has no end marker, and zeros within the last run (up to 128 bytes) are valid pixels. JPEG XL has
                # no end marker either, and its decoder does not notice zeros in the last three bytes.
                certain = ours.size - {RLELossless: 128, JPEG_XL: 24}.get(syntax, 0)
                assert np.array_equal(ours.flat[:certain], whole.flat[:certain]), (length, len(rest))
    assert refused >= len(lengths)


@pytest.mark.parametrize("encoding", DAMAGEABLE)
def test_a_damaged_stream_gives_an_array_or_a_decode_error(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    # Trap 30: decoded in this process, so a decoder that aborts it fails the test.
    caplog.set_level(logging.CRITICAL, "pydicom")
    syntax, encode = DAMAGEABLE[encoding]
    stored = noise(12, True)
    stream = bytes(encode(stored, 12))
    rng = np.random.default_rng(500)
    errors = []
    for case in range(500):
        damaged = bytearray(stream)
        reach = len(stream) if case % 2 else 200  # every other case damages the header
        for at in rng.integers(0, min(reach, len(stream)), rng.integers(1, 4)):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            ours = decoded(encapsulated(syntax, stored, 12, bytes(damaged)))
        except DecodeError as exc:
            errors.append(str(exc))
        else:
            assert ours.shape == stored.shape
            assert ours.dtype == stored.dtype
            assert -2048 <= ours.min() <= ours.max() <= 2047
    assert len(errors) > 10
    assert all(e.startswith("a.dcm (") and "\n" not in e for e in errors)


def test_damaged_fragments_give_an_array_or_a_decode_error() -> None:
    stored = noise(12, True)
    whole = encapsulate([j2k(stored, 12)], fragments_per_frame=3)
    rng = np.random.default_rng(7)
    for _ in range(200):
        ds = encapsulated(JPEG2000Lossless, stored, 12, b"\0\0")
        damaged = bytearray(whole)
        damaged[int(rng.integers(0, 60))] ^= int(rng.integers(1, 256))
        ds.PixelData = bytes(damaged)
        with suppress(DecodeError):
            assert decoded(ds).shape == stored.shape


def segments(*planes: bytes, starts: list[int] | None = None, count: int | None = None) -> bytes:
    """Return an RLE frame of segments: PS3.5, G.5."""
    starts = starts or [64 + sum(map(len, planes[:n])) for n in range(len(planes))]
    return struct.pack("<16L", count or len(planes), *starts, *[0] * (15 - len(starts))) + b"".join(planes)


def literal_runs(values: bytes) -> bytes:
    """Return a segment of literal runs: PS3.5, G.3.1."""
    return b"".join(bytes([len(r) - 1]) + r for r in (values[n : n + 128] for n in range(0, len(values), 128)))


def test_rle_segments_may_be_padded() -> None:
    stored = noise(16, False)
    high, low = literal_runs((stored >> 8).astype("u1").tobytes()), literal_runs(stored.astype("u1").tobytes())
    for padding in (
        b"", b"\0", b"\0\0", b"\x80", b"\x80\x80\0", b"\0\0\0", bytes(4), bytes(5), bytes(1000), b"\x80" * 9 + bytes(9)
    ):  # fmt: skip
        for frame in (
            segments(high + padding, low + padding),
            segments(high + padding, low),
            segments(high, low + padding),
        ):
            assert_same(decoded(encapsulated(RLELossless, stored, 16, frame)), stored)
    eight = noise(8, False)
    for padding in (b"\0", bytes(4), bytes(1000)):
        frame = segments(literal_runs(eight.tobytes()) + padding)
        assert_same(decoded(encapsulated(RLELossless, eight, 8, frame)), eight)


def test_rle_segments_that_all_go_on_are_read_up_to_the_end_of_the_frame() -> None:
    # Some encoders append a few bytes from their buffer. pydicom drops them as well.
    stored = noise(16, False)
    high, low = literal_runs((stored >> 8).astype("u1").tobytes()), literal_runs(stored.astype("u1").tobytes())
    for first, second in ((b"\0\x55", b"\0\x55"), (b"\x55", b"\x55"), (b"\xff\7", b"\1\2\3"), (b"\0\0\x55", b"\0\x55")):
        ds = encapsulated(RLELossless, stored, 16, segments(high + first, low + second))
        assert_same(decoded(ds), stored)
        if len(first) == 2:
            with pytest.warns(UserWarning, match="non-conformant padding"):
                assert_same(ds.pixel_array, stored)
    for first, second in ((b"\0\x55" * 9, b"\0\x55"), (b"\xff\7", b""), (b"\xff\7", b"\0")):
        frame = segments(high + first, low[:-2] + second if not second.strip(b"\0") else low + second)
        with pytest.raises(DecodeError, match=r"a\.dcm \(RLE Lossless\) cannot be decoded: \S"):
            decoded(encapsulated(RLELossless, stored, 16, frame))
    single = noise(8, False)
    with pytest.raises(DecodeError, match="go on after the frame is full"):
        decoded(encapsulated(RLELossless, single, 8, segments(literal_runs(single.tobytes()) + b"\xff\7")))


def test_rle_segments_that_do_not_fill_the_frame_exactly_are_rejected() -> None:
    # RLE has no other check of completeness.
    stored = noise(16, False)
    high, low = literal_runs((stored >> 8).astype("u1").tobytes()), literal_runs(stored.astype("u1").tobytes())
    short, long = literal_runs(stored.astype("u1").tobytes()[:-1]), low + b"\xff\x07"
    out_of_range = 64 + len(high) + len(low)
    for frame in (
        segments(short, low), segments(high, short), segments(long, low), segments(high, long),
        segments(high, low + b"\0\1"),
        segments(high, low[:-2]), segments(high), segments(high, low, low), segments(high, low, count=2**32 - 1),
        segments(high, low, starts=[64, 2**31]), segments(high, low, starts=[64, 64]), segments(high, low)[:60],
        segments(high, low, starts=[64 + len(high), 64]), segments(high, low, starts=[out_of_range, out_of_range]),
        segments(high, low, starts=[2**32 - 1, 64 + len(high)]),
    ):  # fmt: skip
        with pytest.raises(DecodeError, match=r"a\.dcm \(RLE Lossless\) cannot be decoded: \S"):
            decoded(encapsulated(RLELossless, stored, 16, frame))


# Available decoders


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [
        (JPEGBaseline8Bit, "JPEG"), (JPEGExtended12Bit, "JPEG"), (PROCESS_6, "JPEG"), (JPEGLosslessSV1, "JPEG"),
        (JPEGLSLossless, "JPEG-LS"), (JPEG2000Lossless, "JPEG 2000"), (HTJ2KLossless, "JPEG 2000"),
    ],
)  # fmt: skip
def test_available_decoders_lists_the_installed_ones(
    syntax: UID, expected: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = DECODERS[expected]
    assert available_decoders(syntax) == (first.name, second.name)
    gone: Decoder = replace(first, available=lambda: False)
    monkeypatch.setitem(DECODERS, expected, (gone, second))
    assert available_decoders(syntax) == (second.name,)


def test_available_decoders_is_empty_for_an_unsupported_syntax() -> None:
    assert available_decoders(RLELossless) == ("imagecodecs packbits",)
    assert [available_decoders(uid) for uid in (JPEG_XL, JPEG_XL_OF_JPEG, JPEG_XL_LOSSY)] == [
        ("imagecodecs jpegxl",)
    ] * 3
    assert [available_decoders(uid) for uid in (DEFLATED_FRAMES, UNCOMPRESSED)] == [("zlib",), ("NumPy",)]
    assert [available_decoders(uid) for uid in (MPEG2MPML, ExplicitVRLittleEndian, "", "1.2.840.10008.1.2.4.x")] == [
        ()
    ] * 4


def test_decoder_libraries_are_imported_only_when_needed() -> None:
    check = "import sys, gpuprep.dicom.decode; print({'imagecodecs', 'jpeg_ls', '_openjpeg'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "imagecodecs" not in run.stdout


# Real files


def hu(ds: Dataset, frame: int = 0) -> NDArray[np.float64]:
    stored = decoded(ds, frame).astype(np.float64)
    return stored * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))


LOSSY_TOLERANCES_HU = {
    "1.2.840.10008.1.2.4.50.": 65.0,  # half a step of 8 bits is 16 HU already
    "1.2.840.10008.1.2.4.51.": 36.0,
    "1.2.840.10008.1.2.4.53.": 36.0,
    "1.2.840.10008.1.2.4.55.": 36.0,
    "1.2.840.10008.1.2.4.81.": 1.0,
    "1.2.840.10008.1.2.4.91.": 5.0,
}
"""Largest error in HU of the lossy files, by part of the file name; all others are lossless."""


def test_one_slice_in_every_syntax_has_the_same_hu(data: Path) -> None:
    native = opened(data / "codec-ctimage" / "CTImage.dcm")
    expected = native.pixel_array
    files = sorted((data / "codec-ctimage").glob("CTImage.dcm_*"))
    assert len(files) == 15
    for file in files:
        lost = next((v for k, v in LOSSY_TOLERANCES_HU.items() if k in file.name), 0.0)
        ds = opened(file)
        if not lost:
            assert_same(decoded(ds), expected)
        difference = hu(ds) - (expected.astype(np.float64) - 1024)
        assert np.abs(difference).max() <= lost, file.name


@pytest.mark.parametrize(
    ("coded", "native"),
    [
        ("codec-ctimage/CT1_J2KR", "codec-htj2k/dicomp10/CT1_UNC"),
        ("codec-ctimage/CT2_J2KR", "codec-htj2k/dicomp10/CT2_UNC"),
        ("codec-htj2k/htj2k/CT1_JPH", "codec-htj2k/dicomp10/CT1_UNC"),
        ("codec-htj2k/htj2k/CT2_JPH", "codec-htj2k/dicomp10/CT2_UNC"),
        ("pydicom-odd/693_J2KI.dcm", "pydicom-odd/693_UNCI.dcm"),
        ("pydicom-odd/J2K_pixelrep_mismatch.dcm", "pydicom-odd/J2K_pixelrep_mismatch.dcm"),
    ],
)
def test_coded_files_equal_the_native_ones(data: Path, coded: str, native: str) -> None:
    # The last file has no native version: it is compared with pydicom (issue 1149).
    assert_same(decoded(opened(data / coded)), pydicom.dcmread(data / native).pixel_array)


def test_all_files_of_ct1_have_the_same_pixels(data: Path) -> None:
    folder = data / "codec-ct1-ct0012"
    expected = pydicom.dcmread(folder / "CT1_UNC.explicit_little_endian.dcm").pixel_array
    files = [*folder.glob("*.dcm"), *(folder / "encapsulated" / "single-frame").glob("*.dcm")]
    assert len(files) == 8
    for file in files:
        assert_same(decoded(opened(file)), expected)


def test_all_files_of_ct0012_have_the_same_two_frames(data: Path) -> None:
    folder = data / "codec-ct1-ct0012" / "encapsulated" / "multi-frame"
    expected = pydicom.dcmread(folder / "CT0012.explicit_little_endian.dcm").pixel_array
    assert expected.shape == (2, 512, 512)
    assert not np.array_equal(*expected)
    files = sorted(folder.glob("*.dcm"))
    assert len(files) == 10
    for file in files:
        ds = opened(file)
        for k in (0, 1):
            ours = decoded(ds, k)
            if "baseline.51" in file.name:  # its encoder added 1023 and left the rescale as it was
                assert np.abs(ours.astype(int) - 1023 - expected[k]).max() <= 14
            elif "ls.81" in file.name:
                assert np.abs(ours.astype(int) - expected[k]).max() <= 2
            else:
                assert_same(ours, expected[k])
