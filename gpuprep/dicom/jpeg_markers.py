"""Reads the header of a compressed frame, which decoders do not compare with the DICOM header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuprep.errors import DecodeError

Kind = Literal["JPEG", "JPEG-LS", "JPEG 2000", "JPEG XL"]
"""Which family of decoders a code stream needs. JPEG includes the lossless one, JPEG 2000 includes HTJ2K."""

START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS after which size and number of components stand; the three others mean other things."""
JPEG_LS_FRAME = 0xF7

JPEG_2000_START = b"\xff\x4f\xff\x51"
"""Start of code stream, and the marker of SIZ, which always follows."""
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
"""Of a JP2 file, in which some writers wrap the code stream although DICOM forbids it."""

END = b"\xff\xd9"
"""The last marker of all but JPEG XL, which has none: compressed data never hold these two bytes."""

JPEG_XL_START = b"\xff\x0a"
JPEG_XL_FILE = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
"""Of the file format, in whose boxes the code stream lies, whole or in parts."""
JPEG_XL_HEADER_BYTES = 64
"""Size and metadata take fewer."""
JPEG_XL_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Columns to rows, where the number of columns is not written."""


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """The facts of one code stream."""

    kind: Kind
    rows: int
    columns: int
    samples: int
    precision: int
    """Bits per sample."""
    signed: bool
    """Always False but for JPEG 2000, as the others know no sign: there the header alone says."""
    tiles: int
    """Of JPEG 2000; 1 for the others, which have none."""
    start: int
    """Where it begins in the frame: 0, unless it is wrapped in a JP2 file."""
    end: int | None
    """Where it ends, end marker included and padding not; None where that marker is missing. JPEG XL has none, and its
    decoder knows where it ends."""


def frame_info(frame: bytes) -> FrameInfo | None:
    """Return what a JPEG, JPEG-LS, JPEG 2000 or JPEG XL frame says of itself.

    Parameters
    ----------
    frame : bytes
        All fragments of one frame.

    Returns
    -------
    FrameInfo or None
        None where the frame does not begin like any of these.

    Raises
    ------
    DecodeError
        If it is a JPEG XL image that is turned, animated, or of floating point.

    References
    ----------
    ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1 (SIZ); ISO/IEC 18181-1 (SizeHeader, ImageMetadata), 18181-2 (boxes).
    """
    if frame.startswith((JPEG_XL_START, JPEG_XL_FILE)):
        return _jpeg_xl(frame)
    start = max(frame.find(JPEG_2000_START), 0) if frame.startswith(JP2_SIGNATURE) else 0
    siz = frame[start + 4 : start + 43]  # from its length on
    if frame.startswith(JPEG_2000_START, start) and len(siz) == 39:
        right, bottom, left, top, *tile = (int.from_bytes(siz[n : n + 4]) for n in range(4, 36, 4))
        # Each side of a tile is at least 1; 0 is for the decoder to refuse.
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
            # Only from here on: what precedes may hold a thumbnail with an end of its own.
            end = _end(frame, at + 10)
            return FrameInfo(kind, rows, columns, frame[at + 9], frame[at + 4], False, 1, 0, end)
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])  # FF may fill the gap
    return None


class _Bits:
    """Bits of a JPEG XL header, the lowest of each byte first; zeros where they are at an end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        """Return the next bits as a number."""
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value

    def number(self, *choices: tuple[int, int]) -> int:
        """Return a number that is written as one of four choices of (offset, bits)."""
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
    if not bits.take(1):  # else everything has its default, which is colour
        turned = moving = 0
        if bits.take(1):
            turned = bits.take(3)
            if bits.take(1):
                bits.size()  # at which it is meant to be shown
            moving = bits.take(2)  # has a preview before it, or is animated
        floating = bits.take(1)
        if turned or moving or floating:
            raise DecodeError("its JPEG XL frame is turned, animated or of floating point, which no slice is")
        precision = bits.number((8, 0), (10, 0), (12, 0), (1, 6))
        bits.take(1)  # whether 16 bits are enough to decode it
        more = bits.number((0, 0), (1, 0), (2, 4), (1, 12))
        if more:  # channels beside those of colour, which are described next
            samples = 1 + more
        else:
            bits.take(1)  # whether it is lossy, in a colour space of its own
            usual = bits.take(1)  # sRGB
            bits.take(1)  # whether there is an ICC profile
            grey = not usual and bits.number((0, 0), (1, 0), (2, 4), (18, 6)) == 1
            samples = 1 if grey else 3
    return FrameInfo("JPEG XL", rows, columns, samples, precision, False, 1, 0, len(frame))


def _jpeg_xl_header(frame: bytes) -> bytes:
    """Return the first bytes of the code stream in a JPEG XL frame, which may be a file of boxes."""
    if frame.startswith(JPEG_XL_START):
        return frame[:JPEG_XL_HEADER_BYTES]
    head, at = b"", 0
    while at + 8 <= len(frame) and len(head) < JPEG_XL_HEADER_BYTES:
        length, kind, start = int.from_bytes(frame[at : at + 4]), frame[at + 4 : at + 8], at + 8
        if length == 1:
            length, start = int.from_bytes(frame[at + 8 : at + 16]), at + 16
        end = at + length if length else len(frame)  # 0: all that follows
        if end < start:
            break
        if kind in (b"jxlc", b"jxlp"):
            start += 4 if kind == b"jxlp" else 0  # its number
            head += frame[start : min(end, start + JPEG_XL_HEADER_BYTES)]
        at = end
    return head


def _end(frame: bytes, start: int) -> int | None:
    at = frame.rfind(END, start)
    return None if at < 0 else at + len(END)
