"""Reads values of RTSTRUCT and SEG objects: text, names, UIDs, numbers and sequences; damaged ones raise an error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from gpuprep.core.formatting import quoted
from gpuprep.dicom.elements import TAGS, UID_PATTERN, Elements, ascii_of, element_of, first_16_bits
from gpuprep.dicom.sequence_items import Item, ordinary_items
from gpuprep.dicom.uids import UNDEFINED_LENGTH
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import ImageFrame

if TYPE_CHECKING:
    import pydicom

_BINARY_VRS = (None, "US", "SS", "UL", "SL", "UN")
_WORDS = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(keyword: str) -> str:
    """Return the name of an attribute as the standard writes it: "ROI Contour Sequence"."""
    return _WORDS.sub(" ", keyword)


def raw(ds: Elements, keyword: str) -> Any:
    """Return the value of an element, usually as bytes; None where it is absent.

    Raises
    ------
    SegmentationError
        If the element is longer than what is left of the file, or of the sequence it is in.
    """
    element = element_of(ds, keyword)
    value = None if element is None else element.value
    if isinstance(value, bytes):
        length = getattr(element, "length", UNDEFINED_LENGTH)
        if length not in (len(value), UNDEFINED_LENGTH):
            raise SegmentationError(
                f"its {words(keyword)} announces {length} bytes and has {len(value)}: the file is cut short or "
                "damaged; get a whole copy"
            )
    return value


def items(ds: pydicom.Dataset, keyword: str) -> Sequence[pydicom.Dataset]:
    """Return the items of a sequence; none where it is absent or empty."""
    import pydicom

    if raw(ds, keyword) is None:
        return ()
    value = ds[TAGS[keyword]].value
    if isinstance(value, pydicom.Sequence):
        return value
    if not value:
        return ()
    raise SegmentationError(f"its {words(keyword)} is no sequence: the file is damaged")


def items_without_names(ds: Elements, keyword: str) -> Sequence[Elements]:
    """Return the items of a sequence; none where it is absent or empty.

    Text that depends on the character set cannot be read in these items. If the sequence is ordinary, this is several
    times as fast as `items`.
    """
    if isinstance(ds, Item):
        found = ds.items(TAGS[keyword])
        return items(ds.as_dataset(), keyword) if found is None else found
    element = element_of(ds, keyword)
    if element is not None and (found := ordinary_items(element)) is not None:
        return found
    return items(cast("pydicom.Dataset", ds), keyword)


def text(ds: Elements, keyword: str) -> str:
    """Return a value that is written in ASCII; "" where it is absent."""
    return ascii_of(raw(ds, keyword))


def name(ds: pydicom.Dataset, keyword: str) -> str:
    """Return text in the character set of the file; "" where it is absent."""
    if raw(ds, keyword) is None:
        return ""
    value = ds[TAGS[keyword]].value
    if isinstance(value, bytes):  # its VR is unknown
        value = value.decode("utf-8", "replace")
    parts = [value] if isinstance(value, str) else list(value)
    return "\\".join(map(str, parts)).strip(" \0")


def uid(ds: Elements, keyword: str) -> str:
    """Return a UID; "" where it is absent or malformed."""
    found = text(ds, keyword)
    return found if UID_PATTERN.fullmatch(found) else ""


def image_frames(item: Elements) -> set[ImageFrame]:
    """Return the image, or its frames, that an item of a sequence refers to; empty without a UID."""
    sop_uid = uid(item, "ReferencedSOPInstanceUID")
    numbers = text(item, "ReferencedFrameNumber").split("\\")
    frames = {int(n) for n in numbers if re.fullmatch(r" *0*[1-9][0-9]{0,8} *", n)}
    return {ImageFrame(sop_uid, n) for n in frames or (0,)} if sop_uid else set()


def binary(ds: Elements, keyword: str) -> int | None:
    """Return an unsigned number of 16 bits (US); None where it is absent."""
    element, value = element_of(ds, keyword), raw(ds, keyword)
    if value is None or value == b"":
        return None
    if not isinstance(value, bytes) or element is None or element.VR not in _BINARY_VRS or len(value) < 2:
        raise SegmentationError(f"its {words(keyword)} is no number of 16 bits: the file is damaged")
    return first_16_bits(element)


def integer(ds: Elements, keyword: str) -> int | None:
    """Return an integer string (IS); None where it is absent."""
    found = text(ds, keyword)
    if not found:
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", found):
        raise SegmentationError(f"its {words(keyword)} is {quoted(found)}, no whole number")
    return int(found)


def decimals(ds: Elements, keyword: str, count: int, most: float) -> tuple[float, ...] | None:
    """Return `count` decimal strings (DS) of magnitude up to `most`; None where they are absent."""
    found = text(ds, keyword)
    if not found:
        return None
    try:
        values = tuple(float(part.replace("_", "?")) for part in found.split("\\"))  # 1_0 is no number
    except ValueError:
        values = ()
    if len(values) != count or not all(math.isfinite(v) and abs(v) <= most for v in values):
        some = f"{count} numbers" if count > 1 else "a number"
        raise SegmentationError(f"its {words(keyword)} is {quoted(found)}, not {some} of at most {most:g}")
    return values
