"""What a compressed frame says of itself; decoders do not compare it with the header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["JPEG", "JPEG-LS", "JPEG 2000"]
"""Which family of decoders a code stream needs. JPEG includes the lossless one, JPEG 2000 includes HTJ2K."""

START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS after which size and number of components stand; the three others mean other things."""
JPEG_LS_FRAME = 0xF7

JPEG_2000_START = b"\xff\x4f\xff\x51"
"""Start of code stream, and the marker of SIZ, which always follows."""
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
"""Of a JP2 file, in which some writers wrap the code stream although DICOM forbids it."""

END = b"\xff\xd9"
"""The last marker of all three: compressed data never hold these two bytes."""

STREAM_STARTS = (b"\xff\xd8\xff", JPEG_2000_START, JP2_SIGNATURE)
"""What code streams begin with; compressed data never hold the first two."""


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
    """Always False for JPEG and JPEG-LS, which know no sign: there the header alone says."""
    tiles: int
    """Of JPEG 2000; 1 for the others, which have none."""
    start: int
    """Where it begins in the frame: 0, unless it is wrapped in a JP2 file."""
    end: int | None
    """Where it ends, end marker included and padding not; None where that marker is missing."""


def frame_info(frame: bytes) -> FrameInfo | None:
    """Return what a JPEG, JPEG-LS or JPEG 2000 frame says of itself.

    Parameters
    ----------
    frame : bytes
        All fragments of one frame.

    Returns
    -------
    FrameInfo or None
        None where the frame does not begin like any of the three.

    References
    ----------
    ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1 (SIZ).
    """
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


def _end(frame: bytes, start: int) -> int | None:
    at = frame.rfind(END, start)
    return None if at < 0 else at + len(END)
