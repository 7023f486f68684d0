"""Reads encapsulated pixel data: the offset table, the fragments, and the assignment of fragments to frames.

Frames are located by the offset table. If the table is wrong, the fragments decide where only one assignment is
possible: one fragment per frame, a single frame, or fragments that begin and end like code streams.

References
----------
DICOM PS3.5, A.4 (Transfer syntaxes for encapsulation of encoded pixel data).
"""

from __future__ import annotations

import io
import struct
from itertools import pairwise
from typing import BinaryIO

from gpuprep.errors import DecodeError

ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
"""Tags of an item and of the delimiter after the last one."""
ACCEPTED_FOLLOWERS = (b"\xfe\xff\x0d\xe0", b"\xfa\xff\xfa\xff", b"\xfc\xff\xfc\xff", bytes(4))
"""Accepted in place of the delimiter: Item Delimitation Item, Digital Signatures Sequence, Data Set Trailing Padding,
zeros."""

CODE_STREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51")
"""First bytes of JPEG and JPEG-LS, and of JPEG 2000."""
END_MARKER = b"\xff\xd9"
"""End marker of the same encodings."""
PADDING = b"\0\xff "
"""Bytes that writers put after the end marker."""
FILE_STARTS = (b"\x00\x00\x00\x0cjP  ", b"\x00\x00\x00\x0cJXL ")
"""First bytes of the file formats of JPEG 2000 and JPEG XL."""

NO_DELIMITER = "no sequence delimiter follows the fragments"
NO_TABLE = "no offset table precedes the fragments, not even an empty one"
WRONG_TABLE = "the offset table does not fit the fragments"
WRONG_LENGTH = "the length of a fragment is wrong by one byte"


class Encapsulated:
    """Offset table and fragments of the pixel data of one file.

    Parameters
    ----------
    fragments : list of bytes
        Fragments in the order of the file.
    starts : list of int
        Offset of the item of each fragment, relative to the first one.
    table : list of int
        Offset of the first fragment of each frame, from the offset table; empty if the table is.
    faults : set of str
        Harmless violations of DICOM.
    """

    def __init__(self, fragments: list[bytes], starts: list[int], table: list[int], faults: set[str]) -> None:
        self._fragments, self._starts, self._table, self._faults = fragments, starts, table, faults
        self._frames = 0
        self._first: list[int] = []

    @property
    def faults(self) -> frozenset[str]:
        """Harmless violations of DICOM found in the frames returned so far."""
        return frozenset(self._faults)

    @property
    def image_count(self) -> int:
        """Number of fragments that begin like an image, whatever the offset table says."""
        return sum(map(_looks_like_start, self._fragments))

    def count(self, frames: int) -> int:
        """Return the number of frames in the fragments, given *Number of Frames*."""
        if frames != self._frames:
            self._first = self._frame_starts(frames)
            self._frames = frames
        return len(self._first)

    def frame(self, index: int, frames: int) -> bytes:
        """Return the fragments of one frame, joined.

        Parameters
        ----------
        index : int
            Index of the frame, from 0.
        frames : int
            *Number of Frames*.

        Raises
        ------
        DecodeError
            If there is no such frame, or the fragments that belong to it are not known.
        """
        if not 0 <= index < frames:
            raise DecodeError(f"it has no frame {index + 1} of {frames}")
        if (count := self.count(frames)) <= index:
            raise DecodeError(f"its {len(self._fragments)} fragments make up {count} frames, not {frames}")
        stop = self._first[index + 1] if index + 1 < count else len(self._fragments)
        return b"".join(self._fragments[self._first[index] : stop])

    def _frame_starts(self, frames: int) -> list[int]:
        """Return the index of the first fragment of each frame."""
        numbers = {start: n for n, start in enumerate(self._starts)}
        if self._table:
            known = set(self._table) <= numbers.keys()
            ascends = all(a < b for a, b in pairwise(self._table))
            if known and ascends and len(self._table) == frames and self._table[0] == 0:
                return [numbers[offset] for offset in self._table]
            if known and not ascends and frames == len(self._table) == len(set(self._table)):
                raise DecodeError("its offset table does not ascend, so the order of its frames is not known")
            self._faults.add(WRONG_TABLE)
        if len(self._fragments) == frames:
            return list(range(frames))
        later = [n for n, pair in enumerate(pairwise(self._fragments), 1) if _begins_new_frame(*pair)]
        return [0, *later] if self._fragments else []


def read_fragments(f: BinaryIO, extended_table: bytes = b"") -> Encapsulated:
    """Read an offset table, fragments, and the sequence delimiter.

    Parameters
    ----------
    f : binary stream
        Positioned at the first item.
    extended_table : bytes
        Value of *Extended Offset Table*, which takes precedence over the table in the first item.

    Raises
    ------
    DecodeError
        If the file ends within an item, or an item is followed by anything but an item or a delimiter.
    """
    lookahead = b""

    def take(count: int) -> bytes:
        nonlocal lookahead
        buffered, lookahead = lookahead[:count], lookahead[count:]
        return buffered + f.read(count - len(buffered)) if buffered else f.read(count)

    values: list[bytes] = []
    starts: list[int] = []
    faults: set[str] = set()
    offset = 0
    while (head := take(8))[:4] == ITEM:
        length = int.from_bytes(head[4:], "little")
        value = take(length)
        if len(head) < 8 or len(value) < length:
            raise _truncated()
        starts.append(offset)
        values.append(value)
        offset += 8 + length
        lookahead = take(5)
        if lookahead[:4] not in (ITEM, DELIMITER):
            if length % 2 and lookahead[1:] in (ITEM, DELIMITER):  # the padding byte is not counted in the length
                lookahead, shift = lookahead[1:], 1
            elif length and value[-1:] + lookahead[:3] in (
                ITEM,
                DELIMITER,
            ):  # the padding byte is counted in the length, but absent
                lookahead, shift = value[-1:] + lookahead, -1
                values[-1] = value[:-1]
            else:
                continue
            offset += shift
            faults.add(WRONG_LENGTH)
    table = b""
    if values and _looks_like_start(values[0]):
        faults.add(NO_TABLE)
    elif values:
        table, *values = values
        starts = [start - starts[1] for start in starts[1:]]
    if head[:4] != DELIMITER or len(head) < 8:
        if len(head) < 8 and not (values and (DELIMITER.startswith(head[:4]) or not any(head))):
            raise _truncated()
        if not values or not (len(head) < 8 or head.startswith(ACCEPTED_FOLLOWERS)):
            raise DecodeError(
                f"has no fragment where one should be, {offset} bytes into its pixels: it is damaged, or changed since "
                "the scan"
            )
        faults.add(NO_DELIMITER)
    size = 8 if extended_table else 4
    table = extended_table or table
    frame_offsets = [int.from_bytes(table[n : n + size], "little") for n in range(0, len(table), size)]
    return Encapsulated(values, starts, frame_offsets, faults)


def fragments_of(value: bytes, extended_table: bytes = b"") -> Encapsulated:
    """Return the fragments in a value of *Pixel Data* from pydicom, which omits the delimiter."""
    return read_fragments(io.BytesIO(value + DELIMITER + bytes(4)), extended_table)


def _truncated() -> DecodeError:
    return DecodeError("ends within its pixels: it is truncated, or changed since the scan", "truncated")


def _looks_like_start(fragment: bytes) -> bool:
    """Whether the first bytes of a fragment are those of a frame."""
    return fragment.startswith(CODE_STREAM_STARTS) or _is_certain_start(fragment)


def _is_certain_start(fragment: bytes) -> bool:
    """Whether a fragment begins with an RLE header or a file signature: no compressed data begin so by chance."""
    if fragment.startswith(FILE_STARTS):
        return True
    count, first, *others = struct.unpack_from("<16I", fragment) if len(fragment) >= 64 else (0, 0)
    return count in (1, 2) and first >= 64 and not any(others[count - 1 :])  # one segment per byte of a pixel


def _begins_new_frame(before: bytes, after: bytes) -> bool:
    """Whether the second of two fragments begins a new frame."""
    return _is_certain_start(after) or (
        after.startswith(CODE_STREAM_STARTS) and before.rstrip(PADDING).endswith(END_MARKER)
    )
