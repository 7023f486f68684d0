"""Reads size and precision from the code stream of a frame, to compare them with the DICOM header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuprep.errors import DecodeError

Kind = Literal["JPEG", "JPEG-LS", "JPEG 2000", "JPEG XL"]
"""Kind of a code stream. JPEG includes lossless JPEG, JPEG 2000 includes HTJ2K."""

START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Start-of-frame markers of JPEG and JPEG-LS; C4, C8 and CC have other meanings."""
JPEG_LS_FRAME = 0xF7

JPEG_2000_START = b"\xff\x4f\xff\x51"
"""SOC marker, and the SIZ marker that always follows."""
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
"""Signature box of a JP2 file, in which some writers wrap the code stream although DICOM forbids it."""

END_MARKER = b"\xff\xd9"
"""End marker of all kinds but JPEG XL; compressed data never contain these two bytes."""

JPEG_XL_START = b"\xff\x0a"
JPEG_XL_FILE = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
"""Signature of the JPEG XL file format, whose boxes hold the code stream, whole or in parts."""
JPEG_XL_HEADER_BYTES = 64
"""Number of bytes to read for size and metadata, which take fewer."""
JPEG_XL_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Aspect ratios (columns, rows) by code, for headers that omit the number of columns."""


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """Header of one code stream."""

    kind: Kind
    rows: int
    columns: int
    samples: int
    precision: int
    """Bits per sample."""
    signed: bool
    """Whether samples are signed; False for all kinds but JPEG 2000, which do not record it."""
    tiles: int
    """Number of JPEG 2000 tiles; 1 for other kinds."""
    start: int
    """Offset in the frame: 0, unless the code stream is wrapped in a JP2 file."""
    end: int | None
    """Offset after the end marker; None if the marker is missing. For JPEG XL, which has no marker, the length of the
    frame: its decoder finds the end."""


def frame_info(frame: bytes) -> FrameInfo | None:
    """Return the header of the code stream of a JPEG, JPEG-LS, JPEG 2000 or JPEG XL frame.

    Parameters
    ----------
    frame : bytes
        All fragments of one frame, joined.

    Returns
    -------
    FrameInfo or None
        None if the frame is of none of these kinds.

    Raises
    ------
    DecodeError
        If a JPEG XL image is rotated, animated, or in floating point.

    References
    ----------
    ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1 (SIZ); ISO/IEC 18181-1 (SizeHeader, ImageMetadata), 18181-2 (boxes).
    """
    if frame.startswith((JPEG_XL_START, JPEG_XL_FILE)):
        return _jpeg_xl(frame)
    start = max(frame.find(JPEG_2000_START), 0) if frame.startswith(JP2_SIGNATURE) else 0
    siz = frame[start + 4 : start + 43]  # from the segment's length field on
    if frame.startswith(JPEG_2000_START, start) and len(siz) == 39:
        right, bottom, left, top, *tile = (int.from_bytes(siz[n : n + 4]) for n in range(4, 36, 4))
        # max() avoids a division by zero; the decoder rejects such a tile size.
        across, down = -((tile[2] - right) // max(tile[0], 1)), -((tile[3] - bottom) // max(tile[1], 1))
        samples, depth = int.from_bytes(siz[36:38]), siz[38]
        signed, precision = depth >= 128, depth % 128 + 1
        end = _end(frame, start + 43)
        return FrameInfo("JPEG 2000", bottom - top, right - left, samples, precision, signed, across * down, start, end)
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 10 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker in START_OF_FRAME:
            rows, columns = (int.from_bytes(frame[n : n + 2]) for n in (at + 5, at + 7))
            kind: Kind = "JPEG-LS" if marker == JPEG_LS_FRAME else "JPEG"
            # Search from here on: an earlier segment may hold a thumbnail with its own end marker.
            end = _end(frame, at + 10)
            return FrameInfo(kind, rows, columns, frame[at + 9], frame[at + 4], False, 1, 0, end)
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])  # FF is a fill byte
    return None


class _Bits:
    """Reader of the bits of a JPEG XL header, lowest bit of each byte first; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        """Return the next bits as a number."""
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value

    def number(self, *choices: tuple[int, int]) -> int:
        """Return a number coded by a two-bit selector among four pairs (offset, number of bits)."""
        offset, count = choices[self.take(2)]
        return offset + self.take(count)

    def size(self) -> tuple[int, int]:
        """Return rows and columns."""
        small = self.take(1)
        rows = self._side(small)
        if ratio := self.take(3):
            across, down = JPEG_XL_RATIOS[ratio - 1]
            return rows, rows * across // down
        return rows, self._side(small)

    def _side(self, small: int) -> int:
        return 8 * (1 + self.take(5)) if small else self.number((1, 9), (1, 13), (1, 18), (1, 30))


def _jpeg_xl(frame: bytes) -> FrameInfo | None:
    head = _jpeg_xl_header(frame)
    if not head.startswith(JPEG_XL_START):
        return None
    bits = _Bits(head[len(JPEG_XL_START) :])
    rows, columns = bits.size()
    precision, samples = 8, 3
    if not bits.take(1):  # 1: all fields have their defaults, which are those of a colour image
        orientation = preview_or_animation = 0
        if bits.take(1):
            orientation = bits.take(3)
            if bits.take(1):
                bits.size()  # intrinsic display size
            preview_or_animation = bits.take(2)  # flags of preview and animation
        floating_point = bits.take(1)
        if orientation or preview_or_animation or floating_point:
            raise DecodeError("its JPEG XL frame is rotated, animated or in floating point, which is not supported")
        precision = bits.number((8, 0), (10, 0), (12, 0), (1, 6))
        bits.take(1)  # modular_16bit_buffers
        extra_channels = bits.number((0, 0), (1, 0), (2, 4), (1, 12))
        if extra_channels:  # more than one sample per pixel
            samples = 1 + extra_channels
        else:
            bits.take(1)  # xyb_encoded
            default_colour = bits.take(1)  # sRGB
            bits.take(1)  # want_icc
            grey = not default_colour and bits.number((0, 0), (1, 0), (2, 4), (18, 6)) == 1
            samples = 1 if grey else 3
    return FrameInfo("JPEG XL", rows, columns, samples, precision, False, 1, 0, len(frame))


def _jpeg_xl_header(frame: bytes) -> bytes:
    """Return the first bytes of the code stream of a JPEG XL frame, which may be in the boxed file format."""
    if frame.startswith(JPEG_XL_START):
        return frame[:JPEG_XL_HEADER_BYTES]
    head, at = b"", 0
    while at + 8 <= len(frame) and len(head) < JPEG_XL_HEADER_BYTES:
        length, kind, start = int.from_bytes(frame[at : at + 4]), frame[at + 4 : at + 8], at + 8
        if length == 1:
            length, start = int.from_bytes(frame[at + 8 : at + 16]), at + 16
        end = at + length if length else len(frame)  # 0: the box extends to the end
        if end < start:
            break
        if kind in (b"jxlc", b"jxlp"):
            start += 4 if kind == b"jxlp" else 0  # skip the part number
            head += frame[start : min(end, start + JPEG_XL_HEADER_BYTES)]
        at = end
    return head


def _end(frame: bytes, start: int) -> int | None:
    at = frame.rfind(END_MARKER, start)
    return None if at < 0 else at + len(END_MARKER)
