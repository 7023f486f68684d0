"""Lists the UIDs of transfer syntaxes, how each encodes pixels, and the UIDs of segmentation objects.

References
----------
DICOM PS3.5, A (Transfer Syntax Specifications); PS3.6, A (Registry of DICOM Unique Identifiers).
"""

from __future__ import annotations

import warnings
from typing import Literal

IMPLICIT_VR = "1.2.840.10008.1.2"
EXPLICIT_VR = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
GE_BIG_WORDS = "1.2.840.113619.5.2"
"""Private to GE: implicit VR, little endian, but for the words of pixels, which are big endian."""

PLAIN = (IMPLICIT_VR, EXPLICIT_VR, BIG_ENDIAN, GE_BIG_WORDS)
"""The integers are where the element is."""
NATIVE = (*PLAIN, DEFLATED)
"""… once what follows the meta group is unpacked."""
BIG_WORDS = (BIG_ENDIAN, GE_BIG_WORDS)
"""The words of pixels are big endian."""

DEFLATED_DATA_SETS = (DEFLATED, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")
"""All that follows the meta group is deflated. The others are JPIP: their pixels are at another place."""

UNDEFINED_LENGTH = 0xFFFF_FFFF
"""Length of an element that is a sequence of fragments: encoded pixels."""

Encoding = Literal["JPEG", "JPEG-LS", "JPEG 2000", "JPEG XL", "RLE", "deflate", "none"]
"""How a frame is encoded. JPEG includes the lossless one, JPEG 2000 includes HTJ2K."""

ENCODINGS: dict[str, Encoding] = {
    "1.2.840.10008.1.2.1.98": "none",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.8.1": "deflate",
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG" for n in range(50, 71)},  # retired ones included
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG-LS" for n in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG 2000" for n in (90, 91, 201, 202, 203)},
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG XL" for n in (110, 111, 112)},
}
"""The encapsulated transfer syntaxes of still images that are read."""

READ = frozenset({*NATIVE, *ENCODINGS})
"""Every transfer syntax that is read."""

RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"
SEGMENTATION_CLASSES = (RT_STRUCTURE_SET, SEGMENTATION, LABEL_MAP_SEGMENTATION)
"""SOP classes of segmentations."""

_NAMES = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
    "1.2.840.10008.1.2.20": "Papyrus 3 Implicit VR Little Endian",
    GE_BIG_WORDS: "GE Private Implicit VR Little Endian with Big Endian Pixel Data",
}
"""Names that the dictionary of pydicom lacks."""


def syntax_name(uid: str) -> str:
    """Return the name of a transfer syntax; the UID itself where it has none, as private ones."""
    if uid in _NAMES:
        return _NAMES[uid]
    from pydicom.uid import UID  # pydicom is imported where a file is read

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a UID that cannot be one is its own name
        return UID(uid).name
