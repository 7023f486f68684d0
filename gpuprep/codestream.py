"""What a compressed frame says of its own size; decoders do not compare it with the header."""

from __future__ import annotations

START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS after which size and number of components stand; the three others mean other things."""


def frame_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and samples per pixel of a JPEG, JPEG-LS or JPEG 2000 frame; None where it is neither.

    References
    ----------
    ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1 (SIZ).
    """
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 42:
        width, height, left, top = (int.from_bytes(frame[n : n + 4]) for n in (8, 12, 16, 20))
        return height - top, width - left, int.from_bytes(frame[40:42])
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 10 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in START_OF_FRAME:
            return int.from_bytes(frame[at + 5 : at + 7]), int.from_bytes(frame[at + 7 : at + 9]), frame[at + 9]
        at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])  # FF may fill the gap
    return None
