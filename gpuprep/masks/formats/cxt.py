r"""Reads contours of plastimatch (.cxt): ``number||points|slice|UID|x\y\z\x\y\z…``, in mm, LPS."""

from __future__ import annotations

import re

from gpuprep.core.formatting import quoted
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Contour, Segmentation, Structure
from gpuprep.masks.text_parsing import is_uid, lines, numbers, refusal, unique_names

FORMAT = "plastimatch CXT"

_NAMES, _END_OF_NAMES = "ROI_NAMES", "END_OF_ROI_NAMES"
_BLOCK = re.compile(rf"(?:\A\ufeff?|[\r\n]){_NAMES}[ \t]*(?:[\r\n]|\Z)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_SERIES = ("CT_SERIES_UID", "SERIES_CT_UID")  # older writers used the second
_FRAME = "CT_FRAME_OF_REFERENCE_UID"


def recognised(text: str) -> str | None:
    """Return the evidence that a text is a CXT file; None if it is not."""
    return f"its line {_NAMES}" if _BLOCK.search(text) else None


def read(text: str, path: str) -> Segmentation:
    """Return the structures of a CXT file.

    Contours are in patient coordinates. The slice that a line may name is not used: some writers omit it, and the
    points give it too. Structures without contours are kept, empty.

    Parameters
    ----------
    text : str
        Content of the file.
    path : str
        Path for messages.

    Returns
    -------
    Segmentation

    Raises
    ------
    SegmentationError
        If the file is damaged.
    """
    rows = lines(text)
    try:
        first = next(i for i, row in enumerate(rows) if row.rstrip() == _NAMES)
    except StopIteration:
        raise SegmentationError(f"there is no line {_NAMES}; is it a CXT file of plastimatch, and whole?") from None
    header = dict(_key_value(row) for row in rows[:first])
    names, at = _names(rows, first + 1)
    contours: dict[int, list[Contour]] = {number: [] for number in names}
    uids, too_short = set(), 0
    for line, row in enumerate(rows[at:], at + 1):
        if not row or row.isspace():
            continue
        number, contour, uid = _contour(row, line, names)
        if uid:
            uids.add(uid)
        if contour is None:
            too_short += 1
        else:
            contours[number].append(contour)
    series = next((header[key] for key in _SERIES if is_uid(header.get(key, ""))), "")
    frame = header.get(_FRAME, "")
    return Segmentation(
        path=path,
        format=FORMAT,
        why=f"its line {_NAMES}",
        structures=tuple(
            Structure(name, tuple(contours[number]))
            for number, name in zip(names, unique_names((name, number) for number, name in names.items()), strict=True)
        ),
        series_uids=(series,) if series else (),
        frame_of_reference_uid=frame if is_uid(frame) else "",
        sop_uids=frozenset(uids),
        notes=(f"{too_short} of its contours have fewer than 3 points: marks, not areas, left out",)
        if too_short
        else (),
    )


def _key_value(row: str) -> tuple[str, str]:
    """Return the key and the value of a header line."""
    key, _, value = row.strip().partition(" ")
    return key, value.strip()


def _names(rows: list[str], first: int) -> tuple[dict[int, str], int]:
    """Return the names of the structures by number, and the index of the line after them."""
    names: dict[int, str] = {}
    for i in range(first, len(rows)):
        row = rows[i].strip()
        if row == _END_OF_NAMES:
            if not names:
                raise refusal(i + 1, 1, "no structure is named before this line; was anything exported?")
            return names, i + 1
        if not row:
            continue
        number, *rest = row.split("|", 2)  # a name may hold the separator
        number = number.strip()
        if not _NUMBER.fullmatch(number):
            # The line is not shown: in a file edited by hand it may be a header line with the patient's name.
            raise refusal(i + 1, 1, "the line does not begin with the number of a structure: number|colour|name")
        if int(number) in names:
            raise refusal(i + 1, 1, f"structure number {quoted(number)} is listed twice; give each its own")
        name = rest[1].strip() if len(rest) == 2 else ""
        names[int(number)] = name or f"ROI {int(number)}"
    raise refusal(len(rows), 1, f"the file ends before {_END_OF_NAMES}: it is cut short; export it again")


def _contour(row: str, line: int, names: dict[int, str]) -> tuple[int, Contour | None, str]:
    """Return structure number, contour (None if it has fewer than 3 points) and image UID ("" if absent) of a line."""
    fields = row.split("|", 5)
    if len(fields) < 6:
        raise refusal(
            line,
            len(row) + 1,
            f"the line ends after {len(fields)} of 6 fields (structure||points|slice|UID|coordinates); export it again",
        )
    number, count, uid = fields[0].strip(), fields[2].strip(), fields[4].strip()
    if not _NUMBER.fullmatch(number) or int(number) not in names:
        raise refusal(line, 1, f"{quoted(number)} is not the number of a structure in {_NAMES}; export the file again")
    column = len(fields[0]) + len(fields[1]) + 3
    if not _NUMBER.fullmatch(count):
        raise refusal(line, column, f"{quoted(count)} is not a number of points; export the file again")
    parts = fields[5].rstrip().split("\\") if not fields[5].isspace() and fields[5] else []
    begin = len(row) - len(fields[5])

    def position(wrong: int) -> tuple[int, int]:
        return line, begin + sum(map(len, parts[:wrong])) + wrong + 1

    values = numbers(parts, position)
    if len(values) != 3 * int(count):
        raise refusal(
            line,
            column,
            f"{int(count)} points are announced, so 3 × {int(count)} coordinates, but {len(values)} follow; "
            "export the file again",
        )
    points = values.reshape(-1, 3)
    contour = Contour(points, "patient") if len(points) >= 3 else None
    return int(number), contour, uid if is_uid(uid) else ""
