"""Lists UIDs: transfer syntaxes, with their encoding of pixels, and SOP classes of segmentations.

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
"""Private transfer syntax of GE: implicit VR little endian, with big-endian words in *Pixel Data*."""

PLAIN = (IMPLICIT_VR, EXPLICIT_VR, BIG_ENDIAN, GE_BIG_WORDS)
"""*Pixel Data* holds plain integers, at its offset in the file."""
NATIVE = (*PLAIN, DEFLATED)
"""*Pixel Data* holds plain integers, in the file or in the inflated data set."""
BIG_WORDS = (BIG_ENDIAN, GE_BIG_WORDS)
"""The words of *Pixel Data* are big endian."""

DEFLATED_DATA_SETS = (DEFLATED, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")
"""Everything after the meta group is deflated. The last two are JPIP, whose pixels are on a server."""

UNDEFINED_LENGTH = 0xFFFF_FFFF
"""Length of *Pixel Data* that is encapsulated: a sequence of fragments."""

Encoding = Literal["JPEG", "JPEG-LS", "JPEG 2000", "JPEG XL", "RLE", "deflate", "none"]
"""Encoding of a frame. JPEG includes lossless JPEG, JPEG 2000 includes HTJ2K."""

ENCODINGS: dict[str, Encoding] = {
    "1.2.840.10008.1.2.1.98": "none",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.8.1": "deflate",
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG" for n in range(50, 71)},  # including retired ones
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG-LS" for n in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG 2000" for n in (90, 91, 201, 202, 203)},
    **{f"1.2.840.10008.1.2.4.{n}": "JPEG XL" for n in (110, 111, 112)},
}
"""Encoding of each supported encapsulated transfer syntax."""

READ = frozenset({*NATIVE, *ENCODINGS})
"""All supported transfer syntaxes."""

RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"
SEGMENTATION_CLASSES = (RT_STRUCTURE_SET, SEGMENTATION, LABEL_MAP_SEGMENTATION)
"""SOP classes of segmentations."""

_NAMES = {
    IMPLICIT_VR: "Implicit VR Little Endian",
    EXPLICIT_VR: "Explicit VR Little Endian",
    BIG_ENDIAN: "Explicit VR Big Endian",
    DEFLATED: "Deflated Explicit VR Little Endian",
    "1.2.840.10008.1.2.4.50": "JPEG Baseline (Process 1)",
    "1.2.840.10008.1.2.4.51": "JPEG Extended (Process 2 and 4)",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless, Non-Hierarchical (Process 14)",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless, Non-Hierarchical, First-Order Prediction "
    "(Process 14 [Selection Value 1])",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless Image Compression",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Lossy (Near-Lossless) Image Compression",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Image Compression (Lossless Only)",
    "1.2.840.10008.1.2.4.91": "JPEG 2000 Image Compression",
    "1.2.840.10008.1.2.4.201": "High-Throughput JPEG 2000 Image Compression (Lossless Only)",
    "1.2.840.10008.1.2.4.203": "High-Throughput JPEG 2000 Image Compression",
    "1.2.840.10008.1.2.5": "RLE Lossless",
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
    "1.2.840.10008.1.2.20": "Papyrus 3 Implicit VR Little Endian",
    GE_BIG_WORDS: "GE Private Implicit VR Little Endian with Big Endian Pixel Data",
}
"""Names of common transfer syntaxes, for which pydicom need not be imported, and names missing in its dictionary."""


def syntax_name(uid: str) -> str:
    """Return the name of a transfer syntax; the UID itself if the name is not known."""
    if uid in _NAMES:
        return _NAMES[uid]
    from pydicom.uid import UID

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about an invalid UID, and returns it as its name
        return UID(uid).name
