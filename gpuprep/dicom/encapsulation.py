"""Reads the offset table and fragments of encapsulated pixel data, and which fragments make up each frame.

Every frame is looked for where the offset table says. Where the table cannot be true, the fragments decide if only one
answer is possible: one fragment for each frame, one frame alone, or fragments that begin and end like code streams.

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
FOLLOWING = (b"\xfe\xff\x0d\xe0", b"\xfa\xff\xfa\xff", b"\xfc\xff\xfc\xff", bytes(4))
"""Seen in place of the delimiter: the delimiter of an item, Digital Signatures Sequence, Data Set Trailing Padding,
zeros."""

STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51")
"""First bytes of JPEG and JPEG-LS, and of JPEG 2000."""
END = b"\xff\xd9"
"""End marker of these."""
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
        In the order of the file.
    starts : list of int
        Offset of the item of each fragment, measured from that of the first.
    table : list of int
        Offset of the first fragment of each frame as the file announces it; empty where it announces none.
    faults : set of str
        What in the file is not as DICOM demands it, and does not matter.
    """

    def __init__(self, fragments: list[bytes], starts: list[int], table: list[int], faults: set[str]) -> None:
        self._fragments, self._starts, self._table, self._faults = fragments, starts, table, faults
        self._frames = 0
        self._first: list[int] = []

    @property
    def faults(self) -> frozenset[str]:
        """What is not as DICOM demands it, and did not matter for the frames that were asked for so far."""
        return frozenset(self._faults)

    @property
    def images(self) -> int:
        """How many fragments begin as an image does, whatever the offset table says."""
        return sum(map(_begins, self._fragments))

    def count(self, frames: int) -> int:
        """Return how many frames the fragments make up, where `frames` are announced."""
        if frames != self._frames:
            self._first = self._split(frames)
            self._frames = frames
        return len(self._first)

    def frame(self, index: int, frames: int) -> bytes:
        """Return the fragments of one frame, joined.

        Parameters
        ----------
        index : int
            The frame, from 0.
        frames : int
            *Number of Frames*.

        Raises
        ------
        DecodeError
            Where there is no such frame, or nothing tells which fragments belong to it.
        """
        if not 0 <= index < frames:
            raise DecodeError(f"it has no frame {index + 1} of {frames}")
        if (count := self.count(frames)) <= index:
            raise DecodeError(f"its {len(self._fragments)} fragments make up {count} frames, not {frames}")
        stop = self._first[index + 1] if index + 1 < count else len(self._fragments)
        return b"".join(self._fragments[self._first[index] : stop])

    def _split(self, frames: int) -> list[int]:
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
        parts = [n for n, pair in enumerate(pairwise(self._fragments), 1) if _parted(*pair)]
        return [0, *parts] if self._fragments else []


def read_fragments(f: BinaryIO, extended_table: bytes = b"") -> Encapsulated:
    """Read an offset table, fragments, and the delimiter that has to follow them.

    Parameters
    ----------
    f : binary stream
        At the first item.
    extended_table : bytes
        Value of *Extended Offset Table*, which precedes the table among the items.

    Raises
    ------
    DecodeError
        Where the file ends within an item, or something follows that cannot.
    """
    held = b""

    def take(count: int) -> bytes:
        nonlocal held
        got, held = held[:count], held[count:]
        return got + f.read(count - len(got)) if got else f.read(count)

    values: list[bytes] = []
    starts: list[int] = []
    faults: set[str] = set()
    at = 0
    while (head := take(8))[:4] == ITEM:
        length = int.from_bytes(head[4:], "little")
        value = take(length)
        if len(head) < 8 or len(value) < length:
            raise _truncated()
        starts.append(at)
        values.append(value)
        at += 8 + length
        held = take(5)
        if held[:4] not in (ITEM, DELIMITER):
            if length % 2 and held[1:] in (ITEM, DELIMITER):  # filled up to an even length, and that is not counted
                held, shift = held[1:], 1
            elif length and value[-1:] + held[:3] in (ITEM, DELIMITER):  # not filled up, although that is counted
                held, shift = value[-1:] + held, -1
                values[-1] = value[:-1]
            else:
                continue
            at += shift
            faults.add(WRONG_LENGTH)
    table = b""
    if values and _begins(values[0]):
        faults.add(NO_TABLE)
    elif values:
        table, *values = values
        starts = [start - starts[1] for start in starts[1:]]
    if head[:4] != DELIMITER or len(head) < 8:
        if len(head) < 8 and not (values and (DELIMITER.startswith(head[:4]) or not any(head))):
            raise _truncated()
        if not values or not (len(head) < 8 or head.startswith(FOLLOWING)):
            raise DecodeError(
                f"has no fragment where one should be, {at} bytes into its pixels: it is damaged, or changed since the "
                "scan"
            )
        faults.add(NO_DELIMITER)
    size = 8 if extended_table else 4
    table = extended_table or table
    offsets = [int.from_bytes(table[n : n + size], "little") for n in range(0, len(table), size)]
    return Encapsulated(values, starts, offsets, faults)


def fragments_of(value: bytes, extended_table: bytes = b"") -> Encapsulated:
    """Return the fragments in a value of *Pixel Data* as pydicom gives it, without the delimiter."""
    return read_fragments(io.BytesIO(value + DELIMITER + bytes(4)), extended_table)


def _truncated() -> DecodeError:
    return DecodeError("ends within its pixels: it is truncated, or changed since the scan", "truncated")


def _begins(fragment: bytes) -> bool:
    """Whether a fragment is the first of its frame, by its first bytes."""
    return fragment.startswith(STARTS) or _begins_certainly(fragment)


def _begins_certainly(fragment: bytes) -> bool:
    """Whether a fragment begins with what compressed data do not contain by chance: an RLE header, a file's mark."""
    if fragment.startswith(FILE_STARTS):
        return True
    count, first, *others = struct.unpack_from("<16I", fragment) if len(fragment) >= 64 else (0, 0)
    return count in (1, 2) and first >= 64 and not any(others[count - 1 :])  # a segment for each byte of a pixel


def _parted(before: bytes, after: bytes) -> bool:
    """Whether a new frame begins between two fragments."""
    return _begins_certainly(after) or (after.startswith(STARTS) and before.rstrip(PADDING).endswith(END))
