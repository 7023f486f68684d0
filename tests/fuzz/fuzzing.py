"""Fuzzer: damages valid CT series (headers, pixels, files, archives). Each case must lead to a verdict.

    PYTHONPATH=. python tests/fuzz/fuzzing.py [--cases 20000] [--seed 0] [--jobs 2] [--only N] [--keep DIR]
        [--out FILE.json]

A case is a small valid series with one or more faults, or with peculiarities of files from real scanners, and an intact
small series beside it (the witness). A child process runs `gpuprep.pipeline.scan.scan` and `gpuprep.convert` on it. It
is a violation if

* anything is raised: the run should convert the witness in any case;
* a series is "failed" for another reason than its output or a dead worker: that is a bug that was caught late;
* a reason is absent or has more than one line, or no damaged file is reported;
* the witness is not "ok", or its output differs from the output of the witness alone;
* a series is "ok" and its values are not numbers in [0, 1];
* files of the input are changed, or files appear outside the output folder;
* a traceback is printed by Python or C;
* the child dies, takes longer than --limit seconds, grows by more than 1.5 GB or runs out of memory.

Case n of a seed is reproducible and independent of other cases: --only repeats one and keeps its files. A case that
cannot be made, because of a bug in this generator, is skipped and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from elements import (
    PIXEL_DATA,
    SEQUENCE_END,
    UNDEFINED,
    VRS,
    Element,
    Parsed,
    as_item,
    built,
    dictionary_vr,
    encoded,
    everywhere,
    keyword_of,
    parsed,
    tag_of,
)
from oddities import (
    DEFLATED_FRAMES,
    DIMENSIONS,
    JPEG_XL,
    ODDITIES,
    UNCOMPRESSED_FRAMES,
    four_dimensional,
    reencoded,
    values_of,
)

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.errors import GpuprepError
from gpuprep.pipeline.events import Run
from gpuprep.pipeline.scan import scan

LIMIT_S = 10.0
"""Default time limit of a case."""

GROWTH_BYTES = 1_500_000_000
"""Growth of a child during a case above which it is a violation."""

ADDRESS_SPACE_BYTES = 4 << 30
"""Limit of the address space of a child, so that the machine stays usable."""

START_S = 180.0
"""Time limit for the start of a child, which imports everything first."""

ALLOWED_FAILURES = ("OutputError", "WorkerDiedError", "WorkerDied")
STATUSES = ("ok", "fixed", "skipped", "rejected", "failed")
OUT_OF_MEMORY = re.compile("MemoryError|Unable to allocate|bad_alloc|Cannot allocate memory")
PROGRAMMING_ERROR = re.compile(
    r"\b(Assertion|Attribute|Index|Key|Name|Type|UnboundLocal|Recursion|ZeroDivision)Error\b"
)
"""Errors that mean nothing to a user if they appear in a reason."""

RECIPES = (
    Recipe(spacing_mm=None, size=(16, 16), format="tif-stack"),
    Recipe(spacing_mm=(2.0, 2.0, 2.0), size=(16, 16), format="tif-stack"),
)

Subject = Callable[[Path, Path, Recipe], Run]


def convert_case(folder: Path, out: Path, recipe: Recipe) -> Run:
    """Scan and convert a folder like a user: the code under test."""
    scan([folder], recipe)
    return gpuprep.convert([folder], out, recipe, backend="cpu", jobs=None)


# ---------------------------------------------------------------------------------------------------- valid base series


@dataclass(frozen=True)
class Base:
    """A valid series: names and content of its files, and the kind of archive."""

    name: str
    files: tuple[tuple[str, bytes], ...]
    wrap: str = ""
    """"", "gzip" or "zip"."""


WITNESS_UID = "2.25.99999999999999999999"


def bases(folder: Path) -> tuple[Base, ...]:
    """Write valid series into a folder and return them, the witness first; their bytes are reproducible."""
    import numpy as np
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    )

    def values(name: str, shape: tuple[int, int, int]) -> Any:
        """Return smooth values with noise, within 12 bits, so that all encoders and both signs can represent them."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        ramp = np.add.outer(np.add.outer(np.arange(shape[0]) * 50, np.arange(shape[1]) * 20), np.arange(shape[2]) * 9)
        return (ramp + rng.integers(0, 200, shape)) % 2000

    made = [_series(folder, "witness", values("witness", (2, 16, 16)).astype(np.int16), ExplicitVRLittleEndian)]
    for name, shape, dtype, syntax in (
        ("explicit-signed", (4, 16, 16), np.int16, ExplicitVRLittleEndian),
        ("explicit-unsigned", (3, 24, 20), np.uint16, ExplicitVRLittleEndian),
        ("explicit-8-bits", (3, 16, 16), np.uint8, ExplicitVRLittleEndian),
        ("implicit", (4, 16, 18), np.int16, ImplicitVRLittleEndian),
        ("big-endian", (3, 16, 16), np.int16, ExplicitVRBigEndian),
        ("deflated", (3, 16, 16), np.int16, DeflatedExplicitVRLittleEndian),
        ("rle", (3, 16, 16), np.int16, RLELossless),
        ("jpeg-ls", (3, 32, 32), np.uint16, JPEGLSLossless),
        ("jpeg-2000", (3, 32, 32), np.uint16, JPEG2000Lossless),
        ("jpeg-lossless", (3, 32, 32), np.uint16, JPEGLosslessSV1),
    ):
        stored = values(name, shape)
        made.append(_series(folder, name, (stored // 8 if dtype == np.uint8 else stored).astype(dtype), syntax))
    for name, stem in (("bare-implicit", "implicit"), ("bare-explicit", "explicit-signed")):
        like = next(b for b in made if b.name == stem)
        bare = []
        for file, data in like.files:
            apart = parsed(data)
            apart.head, apart.meta = b"", []
            bare.append((file, built(apart)))
        made.append(Base(name, tuple(bare)))
    for name, syntax in (("enhanced", ExplicitVRLittleEndian), ("enhanced-rle", RLELossless)):
        made.append(_enhanced(folder, name, values(name, (4, 16, 16)).astype(np.int16), syntax))
    plain = next(b for b in made if b.name == "explicit-unsigned")
    for name, how in (
        ("jpeg-xl", JPEG_XL),
        ("deflated-frames", DEFLATED_FRAMES),
        ("uncompressed-frames", UNCOMPRESSED_FRAMES),
    ):
        changed = []
        for file, data in plain.files:
            apart = parsed(data)
            reencoded(apart, how, values_of(apart))
            changed.append((file, built(apart)))
        made.append(Base(name, tuple(changed)))
    ((file, data),) = next(b for b in made if b.name == "enhanced").files
    apart = parsed(data)
    four_dimensional(apart, 2, DIMENSIONS[:1], interleaved=False)
    made.append(Base("enhanced-4d", ((file, built(apart)),)))
    made.append(Base("gzip", next(b for b in made if b.name == "explicit-unsigned").files, "gzip"))
    made.append(Base("zip", next(b for b in made if b.name == "implicit").files, "zip"))
    return tuple(made)


def _uid(*parts: object) -> Any:
    from pydicom.uid import generate_uid

    return generate_uid(prefix="2.25.", entropy_srcs=[str(p) for p in parts])


def _series(folder: Path, name: str, stored: Any, syntax: Any) -> Base:
    import numpy as np
    from pydicom import Dataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

    from gpuprep.testing import write_series

    big = syntax == ExplicitVRBigEndian

    def change(ds: Dataset, k: int) -> None:
        ds.StudyInstanceUID, ds.FrameOfReferenceUID = _uid(name, "study"), _uid(name, "frame")
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = _uid(name, k)
        if stored.dtype == np.uint16:  # the depth that the encoders use
            ds.BitsStored, ds.HighBit = 12, 11
        _encode(ds, stored[k : k + 1], ExplicitVRLittleEndian if big else syntax)

    uid: str = WITNESS_UID if name == "witness" else _uid(name)
    # Stored values of phantoms are HU + 1024.
    files = write_series(folder / name, stored, (2.5, 0.8, 0.7), series_uid=uid, series_number=3, change=change)
    return Base(name, tuple((f.name, _swapped(f) if big else f.read_bytes()) for f in files))


def _swapped(file: Path) -> bytes:
    """Return a little-endian file as big-endian; pydicom refuses this for the original data set, hence the copy."""
    import numpy as np
    from pydicom import Dataset, dcmread, dcmwrite
    from pydicom.uid import ExplicitVRBigEndian

    ds, plain, buffer = dcmread(file), Dataset(), io.BytesIO()
    for element in ds:
        plain.add(element)
    plain.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    plain.file_meta = ds.file_meta
    plain.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dcmwrite(buffer, plain, enforce_file_format=True)
    return buffer.getvalue()


def _encode(ds: Any, frames: Any, syntax: Any) -> None:
    """Set the pixels of a data set in a transfer syntax."""
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

    encoders: dict[Any, Callable[[Any], bytes | bytearray]] = {
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(
            frame, level=0, codecformat="j2k", reversible=True, bitspersample=12
        ),
        JPEGLosslessSV1: lambda frame: imagecodecs.ljpeg_encode(frame, bitspersample=12),
    }
    if syntax == RLELossless:
        ds.PixelData = frames.tobytes()
        ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax in encoders:
        ds.PixelData = encapsulate([bytes(encoders[syntax](frame)) for frame in frames])
        ds["PixelData"].VR = "OB"
    else:
        ds.PixelData = frames.astype(frames.dtype.newbyteorder("<")).tobytes()
        ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = syntax


def _enhanced(folder: Path, name: str, stored: Any, syntax: Any) -> Base:
    """Return one enhanced CT image of several frames: positions per frame, other attributes shared."""
    from pydicom import Dataset, FileDataset, dcmread
    from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

    def group(**attributes: Any) -> list[Dataset]:
        ds = Dataset()
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        return [ds]

    one = _series(folder / "single", name, stored[:1], ExplicitVRLittleEndian)
    ds: FileDataset = dcmread(io.BytesIO(one.files[0][1]))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in (
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
        *("RescaleSlope", "RescaleIntercept", "RescaleType"),
    ):
        delattr(ds, keyword)
    ds.NumberOfFrames = len(stored)
    ds.SharedFunctionalGroupsSequence = group(
        PixelMeasuresSequence=group(PixelSpacing=[0.8, 0.7], SliceThickness=2.5),
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelValueTransformationSequence=group(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU"),
        CTImageFrameTypeSequence=group(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
    )
    ds.PerFrameFunctionalGroupsSequence = [
        group(
            FrameContentSequence=group(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1]),
            PlanePositionSequence=group(ImagePositionPatient=[-100, -120, -300 + 2.5 * k]),
        )[0]
        for k in range(len(stored))
    ]
    _encode(ds, stored, syntax)
    file = folder / name / "enhanced.dcm"
    file.parent.mkdir()
    ds.save_as(file, enforce_file_format=True)
    return Base(name, ((file.name, file.read_bytes()),))


# ------------------------------------------------------------------------------------------------------- hostile values

FOCUS = (
    *("SOPClassUID", "SOPInstanceUID", "InstanceNumber", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber"),
    *("ImagePositionPatient", "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "NumberOfFrames"),
    *("Rows", "Rows", "Columns", "Columns", "PixelSpacing", "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleIntercept"),
    *("RescaleSlope", "RescaleSlope", "RescaleType", "PixelData", "TransferSyntaxUID", "TransferSyntaxUID"),
    *("MediaStorageSOPClassUID", "FileMetaInformationGroupLength", "ImageType", "SliceThickness"),
    *("SpecificCharacterSet", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence"),
    *("PixelMeasuresSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence"),
)
"""Attributes that affect the conversion; more important ones occur twice."""

NUMBERS = (
    *("", "0", "-0", "-1", "1", "2", "1e308", "-1e308", "1e400", "NaN", "inf", "-inf", "1e-300", "5e-324", "1_0"),
    *("0x10", "+1", "1,5", "1.0.0", "--1", "e5", "\\", "\\\\\\", "1\\2", "\0", " 1 ", "٣", "99999999999999999999"),
    *("4294967296", "2147483648", "-2147483648", "65536", "32768", "100000", "0.0001", "1e6", "1e5", "%s", "\x1b[31m"),
    *("1\n2", "9" * 5000, "A" * 70000, "1\\" * 3000, "-", ".", "1e", "0.3333333333333333333333333333333333"),
)
SHORTS = (0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 64, 127, 128, 255, 256, 1024, 32767, 32768, 65534, 65535)
WORDS = (
    *("", "HU", "US", "HU\\US", "MONOCHROME1", "MONOCHROME2", "monochrome2", "RGB", "PALETTE COLOR", "YBR_FULL"),
    *("YBR_FULL_422", "\0" * 4, "\x1b[2J", "\r\n", "../../x", "é", "ISO_IR 192", "ISO 2022 IR 87", "A" * 70000),
)
UIDS = (
    *("", "0", "1", ".", "..", "...", "/", "../..", "1.2.3", "1..2", "1." * 40, "9" * 64, "9" * 65, "a b", "\0" * 8),
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"),
    *("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.3.10", "é", "\x1b[31m", "A" * 70000, "con", "-rf", "1.2\\3.4"),
)
SYNTAXES = (
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"),
    *("1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.98", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.94"),
    *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 92, 93, 100, 102, 103, 201, 202, 203)),
)
NAMES = (
    *("a.txt", "a.zip", "a.gz", "a.dcm.gz", "a.jpg", "a", ".dcm", "A.DCM", "a b.dcm", "-rf", "a\nb.dcm"),
    *(
        "\udcff\udcfe.dcm",
        "…",
        "DICOMDIR",
        "%s%n.dcm",
        "x" * 251 + ".dcm",
        "volume.json",
        "0000.tif",
        "a\\b.dcm",
        "\x1b[31m",
    ),
    *(".gpuprep", "manifest.sqlite", "a:b", "*.dcm", "a.dcm.part", "a.tar.gz", "sub/a.dcm", "sub/" * 40 + "a.dcm"),
)
BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x01, 0x20, 0x5C)


def hostile(rng: random.Random, element: Element, big: bool) -> str:
    """Give an element an invalid or slightly different value; return a description."""
    vr, order = element.vr, ">" if big else "<"
    if element.tag == 0x0002_0010 and rng.random() < 0.8:
        value = rng.choice(SYNTAXES).encode()
    elif vr in (b"DS", b"IS") and rng.random() < 0.6 and (text := element.value.decode("latin-1")).strip("\0 "):
        parts = text.strip("\0 ").split("\\")
        n = rng.randrange(len(parts))
        change = rng.choice(("scale", "scale", "add", "add", "replace", "replace", "drop", "repeat", "all"))
        scale = rng.choice((-1, 0, 0.5, 1.0001, 1.01, 2, 10, 1000, 1e-3, 1e6))
        add = rng.choice((1e-3, 0.02, -0.5, 1, 1e4))
        other = rng.choice(NUMBERS)
        with contextlib.suppress(ValueError):
            number = float(parts[n])
            if change == "scale":
                parts[n] = f"{number * scale:.10g}"
            elif change == "add":
                parts[n] = f"{number + add:.10g}"
        if change == "replace":
            parts[n] = other
        elif change == "drop":
            del parts[n]
        elif change == "repeat":
            parts *= rng.choice((2, 3, 100))
        elif change == "all":
            parts = [other] * len(parts)
        value = "\\".join(parts).encode("utf-8", "surrogateescape")
    elif vr in (b"DS", b"IS"):
        value = rng.choice(NUMBERS).encode()
    elif vr in (b"US", b"SS") or (element.tag >> 16 == 0x0028 and vr in (b"OW", b"UN")):
        chosen = [rng.choice(SHORTS) for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 1, 0, 2, 3)))]
        value = b"".join(struct.pack(order + "H", number) for number in chosen)
        if rng.random() < 0.05:
            value = value[:-1]
    elif vr == b"UI":
        value = rng.choice(UIDS).encode()
    elif vr in (b"UL", b"SL"):
        value = struct.pack(order + "I", rng.choice((0, 1, 4, 8, 100, 65535, 0x7FFF_FFFF, 0x8000_0000, UNDEFINED)))
    elif vr in (b"FD", b"FL", b"OD", b"OF", b"OV", b"UV"):
        number = rng.choice((0.0, math.nan, math.inf, -math.inf, 1e300, -1.0))
        value = struct.pack(order + "d", number) * rng.choice((1, 2, 3))
    elif vr == b"SQ":
        items = element.items or [[]]
        kind = rng.choice(("none", "empty item", "twice", "garbage", "half", "many"))
        value = rng.randbytes(40)
        choices: dict[str, list[list[Element]] | None] = {
            "none": [],
            "empty item": [[]],
            "twice": items * 2,
            "garbage": None,
            "half": items[: len(items) // 2],
            "many": items * 200,
        }
        element.items, element.value = choices[kind], value
        return f"sequence {kind}"
    elif element.tag == PIXEL_DATA:
        kind = rng.choice(("empty", "odd", "half", "twice", "zeros", "noise", "megabyte"))
        have = element.value
        element.value = {
            "empty": b"",
            "odd": have[:-1],
            "half": have[: len(have) // 2],
            "twice": have * 2,
            "zeros": bytes(len(have)),
            "noise": rng.randbytes(len(have)),
            "megabyte": bytes(1 << 20),
        }[kind]
        return f"pixels {kind}"
    else:
        value = rng.choice(WORDS + NUMBERS).encode()
    if len(value) % 2 and rng.random() < 0.95:
        value += b"\0" if vr == b"UI" else b" "
    element.value, element.items = value, None
    shown = value if len(value) <= 40 else value[:30] + b"..."
    return f"= {shown!r}" + (f" ({len(value)} bytes)" if shown is not value else "")


def _again(seed: int | str) -> random.Random:
    """Return a random generator with a seed, for reproducible choices or equal choices in several files."""
    return random.Random(seed)  # noqa: S311 - no secrets


def _pick(rng: random.Random, file: Parsed) -> tuple[list[Element], int]:
    """Return list and index of an element, usually of one of FOCUS, which is added if it is absent."""
    places = [*everywhere(file.meta), *everywhere(file.body)]
    if rng.random() < 0.15:
        return rng.choice(places)
    tag = tag_of(rng.choice(FOCUS))
    found = [place for place in places if place[0][place[1]].tag == tag]
    if found:
        return rng.choice(found)
    home = file.meta if tag >> 16 == 2 else file.body
    at = sum(e.tag < tag for e in home)
    vr = dictionary_vr(tag)
    home.insert(at, Element(tag, vr, items=[] if vr == b"SQ" else None))
    return home, at


# ------------------------------------------------------------------------------------------------- damage to elements


def _set(rng: random.Random, file: Parsed) -> str:
    home, n = _pick(rng, file)
    return f"{keyword_of(home[n].tag)} {hostile(rng, home[n], file.big and home is not file.meta)}"


def _set_all(rng: random.Random, file: Parsed) -> str:
    """Change all elements of an attribute, in every frame alike."""
    home, n = _pick(rng, file)
    tag, seed = home[n].tag, rng.getrandbits(32)
    done = ""
    for place, k in [*everywhere(file.meta), *everywhere(file.body)]:
        if place[k].tag == tag:
            done = hostile(_again(seed), place[k], file.big and place is not file.meta)
    return f"every {keyword_of(tag)} {done}"


def _delete(rng: random.Random, file: Parsed) -> str:
    home, n = _pick(rng, file)
    return f"{keyword_of(home.pop(n).tag)} deleted"


def _double(rng: random.Random, file: Parsed) -> str:
    home, n = _pick(rng, file)
    first = home[n]
    second = Element(first.tag, first.vr, first.value, first.items)
    how = hostile(rng, second, file.big) if rng.random() < 0.5 else "as it is"
    home.insert(n + rng.randrange(2), second)
    return f"{keyword_of(first.tag)} a second time, {how}"


def _misplace(rng: random.Random, file: Parsed) -> str:
    home, n = _pick(rng, file)
    element = home.pop(n)
    home.insert(rng.randrange(len(home) + 1), element)
    return f"{keyword_of(element.tag)} out of order"


def _retype(rng: random.Random, file: Parsed) -> str:
    """Write an element with another VR and an unchanged value."""
    home, n = _pick(rng, file)
    element = home[n]
    value = encoded(element, file.implicit, file.big)[-len(element.value) :] if element.items else element.value
    element.vr, element.value, element.items = rng.choice(VRS), value, None
    return f"{keyword_of(element.tag)} as {element.vr.decode()}"


def _misspell(rng: random.Random, file: Parsed) -> str:
    """Change only the letters of a VR."""
    home, n = _pick(rng, file)
    home[n].letters = rng.choice((rng.choice(VRS), rng.randbytes(2), b"\0\0", b"??", b"  ", b"ow"))
    return f"{keyword_of(home[n].tag)} with the VR {home[n].letters!r}"


def _mislength(rng: random.Random, file: Parsed) -> str:
    home, n = _pick(rng, file)
    element = home[n]
    true = len(element.value)
    near = (0, 1, 2, true + 1, true + 2, true + 8, max(0, true - 1), max(0, true - 2))
    far = (255, 0x7FFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, UNDEFINED)
    element.length = rng.choice(near + far)
    return f"{keyword_of(element.tag)} announces {element.length:#x} bytes"


def _nest(rng: random.Random, file: Parsed) -> str:
    """Insert deeply nested sequences."""
    depth = rng.choice((1, 2, 10, 100, 300, 990, 1000, 2000, 5000))
    tag = tag_of(rng.choice(("ReferencedImageSequence", "PerFrameFunctionalGroupsSequence", "ModalityLUTSequence")))
    tag = rng.choice((tag, tag, 0x0009_1010))
    order = ">" if file.big else "<"
    opened = rng.random() < 0.6
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    value = b""
    if opened:
        start = struct.pack(order + "HHI", 0xFFFE, 0xE000, UNDEFINED)
        inner = head + (b"" if file.implicit else b"SQ\0\0") + struct.pack(order + "I", UNDEFINED)
        ends = struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0) + struct.pack(order + "HHI", 0xFFFE, 0xE0DD, 0)
        closed = rng.random() < 0.7
        value = start + (inner + start) * (depth - 1) + (ends * depth if closed else b"")
        length: int | None = UNDEFINED
    else:
        for _ in range(depth - 1):
            item = struct.pack(order + "HHI", 0xFFFE, 0xE000, len(value)) + value
            value = head + (b"" if file.implicit else b"SQ\0\0") + struct.pack(order + "I", len(item)) + item
        value = struct.pack(order + "HHI", 0xFFFE, 0xE000, len(value)) + value
        length = None
    at = sum(e.tag < tag for e in file.body)
    file.body.insert(at, Element(tag, b"SQ", value, length=length))
    return f"{keyword_of(tag)} nested {depth} deep, lengths {'undefined' if opened else 'defined'}"


AGREED: tuple[dict[str, int | str], ...] = (
    {"Rows": 1},
    {"Columns": 1},
    {"Rows": 1, "Columns": 1},
    {"Rows": 65535, "Columns": 65535},
    {"Rows": 65535, "Columns": 1},
    {"Rows": 8, "Columns": 8},
    {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
    {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
    {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0},
    {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11},
    {"BitsStored": 1, "HighBit": 0},
    {"BitsStored": 12, "HighBit": 15},
    {"BitsStored": 12, "HighBit": 3},
    {"PixelRepresentation": 0},
    {"PixelRepresentation": 1},
    {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
    {"NumberOfFrames": "1"},
    {"NumberOfFrames": "2"},
    {"NumberOfFrames": "2147483647"},
    {"NumberOfFrames": "100000"},
    {"NumberOfFrames": "0"},
    {"PixelSpacing": "0.001\\0.001"},
    {"PixelSpacing": "100\\100"},
    {"PixelSpacing": "50\\0.01"},
    {"RescaleSlope": "1e-9"},
    {"RescaleSlope": "-1"},
    {"RescaleSlope": "100", "RescaleIntercept": "65536"},
    {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 65535},
    {"PixelPaddingValue": 63536},
    {"ImageOrientationPatient": "0\\1\\0\\0\\0\\-1"},
    {"ImageOrientationPatient": "0\\0\\0\\0\\0\\0"},
    {"ImagePositionPatient": "0\\0\\0"},
    {"SeriesInstanceUID": ""},
    {"StudyInstanceUID": ""},
    {"SOPInstanceUID": ""},
    {"SOPInstanceUID": "1.2.3"},
    {"SeriesInstanceUID": WITNESS_UID},
)
"""Consistent attributes, with which a file passes the first checks."""


def _agree(rng: random.Random, file: Parsed) -> str:
    chosen = rng.choice(AGREED)
    for keyword, wanted in chosen.items():
        tag = tag_of(keyword)
        if isinstance(wanted, int):
            value = struct.pack(">H" if file.big else "<H", wanted)
        else:
            value = wanted.encode() + b" " * (len(wanted) % 2)
        found = [place[n] for place, n in everywhere(file.body) if place[n].tag == tag]
        if not found:
            at = sum(e.tag < tag for e in file.body)
            found = [Element(tag, dictionary_vr(tag))]
            file.body[at:at] = found
        for element in found:
            element.value = value
    return ", ".join(f"{k} = {v}" for k, v in chosen.items())


def _fragments(rng: random.Random, file: Parsed) -> str:
    """Damage the encapsulation of pixels; native pixels are encapsulated first."""
    pixels = next((e for e in file.body if e.tag == PIXEL_DATA), None)
    if pixels is None:
        return "no pixels"
    value = pixels.value
    encapsulated = pixels.length == UNDEFINED
    kind = rng.choice(("no end", "no table", "table lies", "empty", "item too long", "split", "many", "defined length"))
    if not encapsulated:
        value = as_item(b"") + as_item(value) + SEQUENCE_END
        pixels.length = UNDEFINED
    # Earlier damage may have left less than an offset table.
    table = struct.unpack_from("<I", value, 4)[0] if len(value) >= 8 else 0
    rest = value[8 + table :]
    if kind == "no end":
        value = value.removesuffix(SEQUENCE_END)
    elif kind == "no table":
        value = rest
    elif kind == "table lies":
        offsets = [rng.choice((0, 1, 8, 1000, UNDEFINED, 0x8000_0000)) for _ in range(rng.choice((1, 2, 5)))]
        value = as_item(struct.pack(f"<{len(offsets)}I", *offsets)) + rest
    elif kind == "empty":
        value = as_item(b"") + rng.choice((b"", as_item(b""))) + SEQUENCE_END
    elif kind == "item too long":
        value = value[: 8 + table + 4] + struct.pack("<I", rng.choice((0x7FFF_FFFF, UNDEFINED, 65536))) + rest[8:]
    elif kind == "split":
        frame = rest[8:-8]
        half = len(frame) // 4 * 2
        parts = (frame[:half], frame[half:])
        value = as_item(b"") + b"".join(map(as_item, parts)) + SEQUENCE_END
    elif kind == "many":
        value = as_item(b"") + as_item(b"\xff\xd8") * rng.choice((10, 1000, 20000)) + SEQUENCE_END
    else:
        pixels.length = None
    pixels.value = value
    return f"fragments: {kind}" + ("" if encapsulated else ", of plain pixels")


def _codestream(rng: random.Random, file: Parsed) -> str:
    """Damage only the pixel data, the input of decoders."""
    pixels = next((e for e in file.body if e.tag == PIXEL_DATA), None)
    if pixels is None or not pixels.value:
        return "no pixels"
    begin = 16 if pixels.length == UNDEFINED else 0
    if rng.random() < 0.5:  # the head of a codestream contains its size
        stop = min(len(pixels.value), begin + 80)
        part, what = mangle(rng, pixels.value[begin:stop], b"")
        pixels.value = pixels.value[:begin] + part + pixels.value[stop:]
        return f"head of the pixels: {what}"
    part, what = mangle(rng, pixels.value[begin:], b"")
    pixels.value = pixels.value[:begin] + part
    return f"pixels: {what}"


# ----------------------------------------------------------------------------------------------------- damage to bytes


def mangle(rng: random.Random, data: bytes, other: bytes) -> tuple[bytes, str]:
    """Return damaged bytes, and a description of the damage."""
    if not data:
        return data, "nothing to damage"
    changed = bytearray(data)
    at = rng.randrange(len(data))
    length = min(len(data) - at, rng.choice((1, 1, 2, 2, 4, 8, 16, 64, 256, 1024)))
    gentle = ("flip", "flip", "flip", "flip", "set", "set", "set", "number", "number")
    kind = rng.choice((*gentle, "delete", "double", "insert", "truncate", "swap", "splice" if other else "flip"))
    if kind == "flip":
        count = rng.choice((1, 1, 1, 2, 4, 16))
        for _ in range(count):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), f"{count} bits flipped"
    if kind == "set":
        byte = rng.choice(BYTES)
        changed[at : at + length] = bytes([byte]) * length
        return bytes(changed), f"{length} bytes at {at} set to {byte:02x}"
    if kind == "number":
        code = rng.choice(("<H", ">H", "<I", ">I"))
        number = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF))
        packed = struct.pack(code, number if code[1] == "I" else number & 0xFFFF)
        changed[at : at + len(packed)] = packed
        return bytes(changed), f"{packed.hex()} at {at}"
    if kind == "delete":
        del changed[at : at + length]
        return bytes(changed), f"{length} bytes at {at} deleted"
    if kind == "double":
        changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 10))
        return bytes(changed), f"{length} bytes at {at} doubled"
    if kind == "insert":
        changed[at:at] = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
        return bytes(changed), f"{length} bytes inserted at {at}"
    if kind == "truncate":
        keep = at if rng.random() < 0.5 else max(0, len(data) - length)
        return data[:keep], f"cut after {keep} bytes"
    if kind == "swap":
        to = rng.randrange(len(data))
        length = min(length, len(data) - to)
        changed[at : at + length], changed[to : to + length] = data[to : to + length], data[at : at + length]
        return bytes(changed), f"{length} bytes at {at} and {to} swapped"
    cut = rng.randrange(len(other) + 1)
    return data[:at] + other[cut:], f"{at} bytes, then another file from {cut} on"


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass
class File:
    """A file of a case, by its path in the case."""

    path: str
    data: bytes
    kind: str = "file"
    """"file"; or "fifo", "link" (data is the target), "folder"."""


@dataclass
class Case:
    """Input of one run of gpuprep."""

    number: int
    base: str
    done: list[str]
    """Descriptions of the damage; each begins with its kind."""
    files: list[File]
    recipe: int
    """Index into RECIPES."""
    shares_uid: bool
    """Whether damaged slices got the UID of the witness on purpose."""


ELEMENT_DAMAGE: tuple[tuple[str, Callable[[random.Random, Parsed], str], int], ...] = (
    ("value", _set, 26),
    ("values", _set_all, 12),
    ("agreed", _agree, 14),
    ("deleted", _delete, 8),
    ("doubled", _double, 4),
    ("misplaced", _misplace, 2),
    ("retyped", _retype, 4),
    ("misspelt", _misspell, 4),
    ("mislength", _mislength, 6),
    ("nested", _nest, 3),
    ("fragments", _fragments, 4),
    ("codestream", _codestream, 13),
)


def make_case(stock: tuple[Base, ...], seed: int, number: int) -> Case:
    """Return the case of a seed and number."""
    rng = _again(f"{seed}-{number}")
    witness, *others = stock
    base = rng.choice(others)
    files = [File(name, data) for name, data in base.files]
    done: list[str] = []
    rounds = rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 5))
    levels = ("oddities", "elements", "bytes", "files", "container", "bomb")
    level = rng.choices(levels, (30, 44, 16, 6, 4, 0.1))[0]
    if base.wrap and rng.random() < 0.4:
        level = "container"
    elif level == "container" and not base.wrap:
        level = "bytes"
    if level == "oddities":
        first = rng.choice(ODDITIES)
        base = rng.choice([b for b in others if first.fits(b.name)])
        series = {name: parsed(data) for name, data in base.files}
        fitting = [oddity for oddity in ODDITIES if oddity.fits(base.name)]
        chosen_oddities = (first, *rng.choices(fitting, k=rng.choice((0, 0, 0, 1, 2))))
        done += [f"{oddity.name}: {oddity.do(rng, series)}" for oddity in chosen_oddities]
        files = [File(name, b"") for name in series]
        _damage_elements(rng, files, series, rng.choice((0, 0, 0, 0, 1)), done)
    elif level == "elements":
        _damage_elements(rng, files, {name: parsed(data) for name, data in base.files}, rounds, done)
    elif level == "bytes":
        donor = rng.choice(rng.choice(others).files)[1]
        for _ in range(rounds):
            chosen = _chosen(rng, files)
            for file in chosen:
                file.data, what = mangle(rng, file.data, donor)
            done.append(f"bytes: {what} in {len(chosen)} of {len(files)}")
    elif level == "files":
        done += ["files: " + _damage_files(rng, files) for _ in range(rounds)]
    elif level == "bomb":
        done.append("bomb: " + _bomb(rng, base, files))
    if base.wrap:
        _wrap(rng, base, files, done, level == "container")
    folder = [File("damaged/" + f.path, f.data, f.kind) for f in files]
    # Two files with one name, or a file below another file, are impossible: the first is kept.
    kept: dict[str, File] = {}
    for file in folder:
        parents = {file.path.rsplit("/", n)[0] for n in range(1, file.path.count("/") + 1)}
        if file.path not in kept and not parents & kept.keys():
            kept[file.path] = file
    shares = any(WITNESS_UID in what for what in done)
    recipe = 1 if rng.random() < 0.25 else 0
    all_files = [*kept.values(), *(File("witness/" + name, data) for name, data in witness.files)]
    return Case(number, base.name, done, all_files, recipe, shares)


def _damage_elements(
    rng: random.Random, files: list[File], apart: dict[str, Parsed], rounds: int, done: list[str]
) -> None:
    """Damage elements of files, and assemble the files."""
    for _ in range(rounds):
        name, damage, _weight = rng.choices(ELEMENT_DAMAGE, [w for *_, w in ELEMENT_DAMAGE])[0]
        sub = rng.getrandbits(32)
        chosen = files if name == "agreed" and rng.random() < 0.9 else _chosen(rng, files)
        what = ""
        for file in chosen:
            parts = apart[file.path]
            parts.meta_length = parts.meta_length and sub % 5 > 0
            what = damage(_again(sub), parts)
        done.append(f"{name}: {what} in {len(chosen)} of {len(files)}")
    for file in files:
        file.data = built(apart[file.path])


def _chosen(rng: random.Random, files: list[File]) -> list[File]:
    """Return one file, some, or all."""
    if rng.random() < 0.5:
        return [rng.choice(files)]
    return files if rng.random() < 0.8 else rng.sample(files, rng.randrange(1, len(files) + 1))


def _damage_files(rng: random.Random, files: list[File]) -> str:
    often = ("rename", "rename", "copy", "copy", "empty", "magic only", "remove", "stranger", "permuted")
    kind = rng.choice((*often, "fifo", "link", "loop", "dangling", "folder"))
    real = [f for f in files if f.kind == "file"]
    file = rng.choice(real)
    if kind == "empty":
        for f in _chosen(rng, real):
            f.data = b""
    elif kind == "rename":
        for n, f in enumerate(_chosen(rng, real)):
            name = rng.choice(NAMES)
            f.path = name if n == 0 else f"{n}-{name[-200:]}" if "/" not in name else f"{n}/{name}"
    elif kind == "magic only":
        file.data = bytes(128) + b"DICM" + rng.choice((b"", b"\x02", b"\x02\0\0\0UL\x04\0", rng.randbytes(64)))
    elif kind == "copy":
        files += [File(f"copy-{n}.dcm", file.data) for n in range(rng.choice((1, 1, 3)))]
    elif kind == "remove":
        if len(real) > 1:
            files.remove(file)
    elif kind == "fifo":
        files.append(File("pipe.dcm", b"", "fifo"))
    elif kind == "link":
        files.append(File("link.dcm", os.fsencode(os.path.basename(file.path)), "link"))
    elif kind == "loop":
        files += [File("loop", b".", "link"), File("self.dcm", b"self.dcm", "link")]
    elif kind == "dangling":
        files.append(File("dangling.dcm", b"nowhere", "link"))
    elif kind == "folder":
        files.append(File("folder.dcm", b"", "folder"))
    elif kind == "stranger":
        files.append(File(rng.choice(NAMES), rng.randbytes(rng.choice((0, 1, 131, 132, 133, 5000)))))
    else:
        data = [f.data for f in real]
        rng.shuffle(data)
        for f, d in zip(real, data, strict=True):
            f.data = d
    return kind


BOMB_BLOCK = 1 << 26


def _bomb(rng: random.Random, base: Base, files: list[File]) -> str:
    """Make a small file that unpacks into two gigabytes of zeros."""
    count = (2 << 30) // BOMB_BLOCK
    file = files[0]
    if base.wrap == "gzip" or rng.random() < 0.5:
        file.data = gzip.compress(file.data, mtime=0) + gzip.compress(bytes(BOMB_BLOCK), mtime=0) * count
        if base.wrap != "gzip":
            file.path += ".gz"
        return "gzip"
    data = base.files[0][1]
    apart = parsed(data)
    if not apart.head:
        return "none, for want of a meta group"
    for element in apart.meta:
        if element.tag == 0x0002_0010:
            element.value = b"1.2.840.10008.1.2.1.99"
    apart.deflated = False
    body = b"".join(encoded(e, False, apart.big) for e in apart.body)
    whole = built(Parsed(apart.head, apart.meta, [], False, False, False))
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    start = packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(BOMB_BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)  # independent of earlier blocks
    file.data = whole + start + block * count + packer.flush()
    return "deflated"


def _wrap(rng: random.Random, base: Base, files: list[File], done: list[str], damaged: bool) -> None:
    """Put files into the archive of the base, in place; with `damaged`, damage the archive."""
    if base.wrap == "gzip":
        for f in files:
            if f.kind == "file" and not f.data.startswith(b"\x1f\x8b"):
                f.data = gzip.compress(f.data, mtime=0)
                f.path += ".gz"
        if damaged:
            file = rng.choice(files)
            file.data, what = mangle(rng, file.data, files[0].data)
            done.append(f"container: gzip, {what}")
        return
    tricks = ("bytes", "bytes", "bytes", "names", "doubles", "in itself", "stored", "encrypted")
    trick = rng.choice(tricks) if damaged else ""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED if trick == "stored" else zipfile.ZIP_DEFLATED) as archive:
        for n, f in enumerate(f for f in files if f.kind == "file"):
            name = f.path.encode("utf-8", "replace").decode()
            if trick == "names":
                name = rng.choice(("../../../escaped.dcm", "/escaped.dcm", "a/../../b.dcm", "\\..\\c", "con", "", name))
            elif trick == "doubles":
                name = "same.dcm"
            info = zipfile.ZipInfo(name or f"{n}")
            info.compress_type = archive.compression
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about duplicate names
                archive.writestr(info, f.data)
    data = packed.getvalue()
    if trick == "in itself":
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as archive:
            archive.writestr(zipfile.ZipInfo("inner.zip"), data)
        data = outer.getvalue()
    elif trick == "encrypted":
        at = data.find(b"PK\x01\x02") + 8
        data = data[:6] + b"\x01" + data[7:at] + b"\x01" + data[at + 1 :]
    elif trick == "bytes":
        data, what = mangle(rng, data, files[0].data)
        trick = what
    if trick:
        done.append(f"container: zip, {trick}")
    files[:] = [File("series.zip", data), *(f for f in files if f.kind != "file")]


def write_case(case: Case, folder: Path) -> None:
    """Write the files of a case."""
    for file in case.files:
        below, name = os.path.split(str(folder) + "/" + file.path)
        path = os.fsencode(below) + b"/" + os.fsencode(name)[-255:]  # an archive suffix may have made it too long
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            if file.kind == "fifo":
                os.mkfifo(path)
            elif file.kind == "link":
                os.symlink(file.data, path)
            elif file.kind == "folder":
                os.mkdir(path)
            else:
                Path(os.fsdecode(path)).write_bytes(file.data)


# ------------------------------------------------------------------------------------------------- check of the results


@dataclass
class Violation:
    """Forbidden behaviour in a case."""

    case: int
    kind: str
    """exception, failed, reason, silence, witness, values, input, traceback, death, hang or memory."""
    detail: str
    base: str
    done: list[str]


@dataclass
class Reply:
    """Result of a case, sent by a child."""

    number: int
    violations: list[Violation] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    """Kinds of damage."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss: int = 0
    shown: list[str] = field(default_factory=list)
    """All messages about the case, for people."""
    skipped: str = ""
    """Reason why the case could not be made; the other fields are then empty."""


@dataclass
class Summary:
    """Results of many cases."""

    seed: int
    cases: int = 0
    """Number of cases that were run."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Reasons of the cases that could not be made, by number."""
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    """Duration in s and number of the slowest case."""
    peak_rss: int = 0
    violations: list[Violation] = field(default_factory=list)

    def add(self, reply: Reply) -> None:
        if reply.skipped:
            self.skipped[reply.number] = reply.skipped
            return
        self.cases += 1
        self.outcomes.update(reply.outcomes)
        self.damage.update(reply.kinds)
        self.notes.update(reply.notes)
        self.slowest = max(self.slowest, (reply.seconds, reply.number))
        self.peak_rss = max(self.peak_rss, reply.peak_rss)
        self.violations += reply.violations

    def to_dict(self) -> dict[str, Any]:
        statuses: Counter[str] = Counter()
        for outcome, count in self.outcomes.items():
            statuses[outcome.split(":")[0]] += count
        return {
            "seed": self.seed,
            "cases": self.cases,
            "skipped": {str(number): reason for number, reason in sorted(self.skipped.items())},
            "seconds": round(self.seconds, 1),
            "cases_per_second": round(self.cases / self.seconds, 1) if self.seconds else None,
            "statuses": dict(statuses.most_common()),
            "outcomes": dict(self.outcomes.most_common()),
            "damage": dict(self.damage.most_common()),
            "notes": dict(self.notes.most_common()),
            "slowest": {"case": self.slowest[1], "seconds": round(self.slowest[0], 3)},
            "peak_rss_bytes": self.peak_rss,
            "violations": [asdict(v) for v in self.violations],
        }


def judge(case: Case, run: Run, out: Path, expected: str | None) -> Reply:
    """Check the results of a case, and return a reply with its violations."""
    import numpy as np
    import tifffile

    reply = Reply(case.number)
    names = sorted({os.path.basename(f.path) for f in case.files} | {f.path for f in case.files}, key=len, reverse=True)

    def wrong(kind: str, detail: str) -> None:
        reply.violations.append(Violation(case.number, kind, detail, case.base, case.done))

    witness = None
    for result in run.results:
        status, reason = result.status, result.reason
        if result.series_uid == WITNESS_UID and witness is None:
            witness = result
            if not case.shares_uid:
                continue
        reply.outcomes.append(label(status, reason, names))
        reply.shown.append(f"{status} {reason} {result.warnings or ''}")
        if status not in STATUSES:
            wrong("reason", f"status {status!r}")
        elif status in ("rejected", "failed"):
            if not reason.strip() or "\n" in reason or "\r" in reason:
                wrong("reason", f"{status} for the reason {reason!r}")
            if status == "failed" and reason.split(":")[0] not in ALLOWED_FAILURES:
                wrong("failed", reason)
        elif status in ("ok", "fixed"):
            values = tifffile.imread(out / result.folder / "volume.tif")
            if not values.size or not bool(np.all((values >= 0) & (values <= 1))):
                wrong("values", f"{status}, from {np.min(values)} to {np.max(values)}")
    for path, reason in run.unreadable:
        reply.outcomes.append(label("unreadable", reason, names))
        reply.shown.append(f"unreadable {path}: {reason}")
        if not reason.strip() or "\n" in reason:
            wrong("reason", f"{path} unreadable for the reason {reason!r}")
    for kind, count in run.passed_over.items():
        reply.outcomes += [f"passed over: {kind}"] * count
        reply.shown.append(f"passed over {count} {kind}")
    if not reply.outcomes and any(f.path.startswith("damaged/") and f.kind == "file" for f in case.files):
        wrong("silence", "nothing is said of any damaged file")
    for said in [r.reason for r in run.results] + [reason for _, reason in run.unreadable]:
        if OUT_OF_MEMORY.search(said):
            wrong("memory", said)
        if len(said) > 1000:
            reply.notes.append("a reason of more than 1000 characters")
        if match := PROGRAMMING_ERROR.search(said):
            reply.notes.append(f"a reason that reads like a bug: {match[0]}")
    if not case.shares_uid:
        if witness is None or witness.status != "ok":
            wrong("witness", "missing" if witness is None else f"{witness.status}: {witness.reason}")
        elif expected is not None and (found := digest(out / witness.folder)) != expected:
            wrong("witness", f"its output is another one: {found}")
    return reply


def digest(folder: Path) -> str:
    """Return a hash of the images in an output folder."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.tif")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:16]


def label(status: str, reason: str, names: list[str]) -> str:
    """Return a status with the first words of its reason, without file names and numbers."""
    if not reason:
        return status
    for name in names:
        if len(name) > 3:  # shorter names also occur as parts of words
            reason = reason.replace(name, "…")
    words = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason, flags=re.IGNORECASE).split()
    return f"{status}: {' '.join(words[:7])}"[:100]


# ------------------------------------------------------------------------------------------------------------- children


def _child(connection: Connection, stock: tuple[Base, ...], seed: int, root: Path, subject: Subject) -> None:
    """Run cases until the parent closes the connection, then end the process."""
    os.setsid()  # so that it can be killed together with its children
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said = os.open(root / "said", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)  # prints the stack of a hanging child

    inside, out = root / "in", root / "out"
    expected = []
    for recipe in RECIPES:  # this also imports everything, so that memory is at its usual level
        for name, data in stock[0].files:
            (inside / "witness").mkdir(parents=True, exist_ok=True)
            (inside / "witness" / name).write_bytes(data)
        (result,) = convert_case(inside, out, recipe).results
        expected.append(digest(out / result.folder))
        _clear(inside, out)
    connection.send(expected)
    with contextlib.suppress(EOFError, OSError):
        while True:
            number = connection.recv()
            _clear(root / "in", root / "out")
            try:
                case = make_case(stock, seed, number)
                write_case(case, root / "in")
            except Exception as exc:
                connection.send(unmade(number, exc))
            else:
                connection.send(_run_case(case, root, said, expected, subject))
    os._exit(0)


def _run_case(case: Case, root: Path, said: int, expected: list[str], subject: Subject) -> Reply:
    """Run a case whose files are written."""
    inside, out = root / "in", root / "out"
    os.ftruncate(said, 0)
    before, around = _listing(inside), set(os.listdir(root))
    usual = _memory(reset=True)
    reply = Reply(case.number)
    started = time.perf_counter()
    try:
        run = subject(inside, out, RECIPES[case.recipe])
    except BaseException as exc:
        reply.seconds = time.perf_counter() - started
        text = f"{type(exc).__name__}: {exc}"
        reply.outcomes.append(label("raised", text, []))
        reply.shown.append(f"raised {text}")
        place = _place(exc)
        kind = "memory" if isinstance(exc, MemoryError) else "exception"
        detail = f"{text} {'(ends the run)' if isinstance(exc, GpuprepError) else ''} at {place}"
        reply.violations.append(Violation(case.number, kind, detail, case.base, case.done))
    else:
        seconds = time.perf_counter() - started
        reply = judge(case, run, out, expected[case.recipe])
        reply.seconds = seconds
    reply.peak_rss = _memory()
    reply.kinds = [case.base, *(what.split(":")[0] for what in case.done)]

    def wrong(kind: str, detail: str) -> None:
        reply.violations.append(Violation(case.number, kind, detail, case.base, case.done))

    if reply.peak_rss - usual > GROWTH_BYTES:
        wrong("memory", f"grew by {(reply.peak_rss - usual) / 1e6:.0f} MB")
    if _listing(inside) != before or not set(os.listdir(root)) <= around | {"out"}:
        wrong("input", "files of the input changed, or files appeared beside the output")
    sys.stdout.flush()
    sys.stderr.flush()
    printed = os.pread(said, 1 << 20, 0).decode("utf-8", "replace")
    if printed.strip():
        reply.shown.append(f"printed:\n{printed[:4000]}")
        if "Traceback" in printed:
            places = [line.strip() for line in printed.splitlines() if line.startswith('  File "')]
            wrong("traceback", " … ".join((*places[-1:], printed.strip().splitlines()[-1]))[:600])
        else:
            reply.notes.append(label("printed", printed.strip().splitlines()[0], []))
    return reply


def unmade(number: int, exc: Exception) -> Reply:
    """Return the reply for a case that could not be made."""
    return Reply(number, skipped=f"{type(exc).__name__}: {exc} at {_place(exc)}")


def _clear(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of everything in a folder."""
    found = []
    for at, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(at, name))
            found.append((os.fsdecode(os.path.join(at, name)), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _memory(process: int | str = "self", *, reset: bool = False) -> int:
    """Return the peak memory of a process since the last reset, in bytes; with `reset`, its current memory."""
    try:
        if reset:
            with open(f"/proc/{process}/clear_refs", "w") as f:
                f.write("5")
        with open(f"/proc/{process}/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # the process has ended; or not Linux, where only the total peak is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 if process == "self" else 0


def _place(exc: BaseException) -> str:
    """Return the innermost line of gpuprep, and the innermost line, in the traceback of an error."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = [f for f in frames if "gpuprep" in f.filename]
    places = [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in (*ours[-1:], *frames[-1:])]
    return ", ".join(dict.fromkeys(places))


class _Child:
    """A process that runs cases one after the other."""

    def __init__(self, stock: tuple[Base, ...], seed: int, root: Path, subject: Subject) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.said = root / "said"
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, stock, seed, root, subject))
        self._process.start()
        theirs.close()
        self.number: int | None = None
        self.peak_rss = 0
        self.deadline = time.monotonic() + START_S
        self.expected: list[str] | None = None

    def give(self, number: int, limit_s: float) -> None:
        self.number, self.deadline = number, time.monotonic() + limit_s
        with contextlib.suppress(OSError):  # it died while idle, which `wait` will detect
            self.connection.send(number)

    def complain(self) -> str:
        """Print the stack of a hanging child, then end it."""
        self.peak_rss = _memory(self._process.pid or 0)
        with contextlib.suppress(OSError):
            os.kill(self._process.pid or 0, signal.SIGUSR1)
            time.sleep(0.3)
        return self.end()

    def end(self, *, dying: bool = False) -> str:
        """End the child and its children; return its exit status and last messages."""
        if dying:  # its pipe closes before the process ends
            self._process.join(5)
        code = self._process.exitcode
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()
        how = f"exit code {code}" if code is not None else "ended by the harness"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        try:
            lines = self.said.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{how}; " + " … ".join([line.strip() for line in lines if "ile " in line or "rror" in line][:8])[:900]


def fuzz(
    numbers: Iterable[int],
    *,
    seed: int = 0,
    jobs: int = 1,
    limit_s: float = LIMIT_S,
    subject: Subject = convert_case,
    keep: Path | None = None,
    on_reply: Callable[[Summary, Reply], None] | None = None,
) -> Summary:
    """Run cases and return a summary.

    Parameters
    ----------
    numbers : iterable of int
        The cases.
    seed, jobs, limit_s
        As on the command line.
    subject : callable
        Function under test; a new process must be able to import it.
    keep : path, optional
        Folder for the files of cases with violations.
    on_reply : callable, optional
        Called after every case.
    """
    shm = Path("/dev/shm")  # noqa: S108 - in memory, if the system has it
    scratch = Path(tempfile.mkdtemp(prefix="gpuprep-fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
    summary = Summary(seed)
    started = time.monotonic()
    former = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its buffers, one per core, would fill the address space of the children
    children: list[_Child] = []

    def start() -> _Child:
        child = _Child(stock, seed, scratch / f"child-{len(children)}-{time.monotonic_ns()}", subject)
        children.append(child)
        return child

    def finish(reply: Reply) -> None:
        summary.add(reply)
        summary.seconds = time.monotonic() - started
        if keep is not None and reply.violations:
            folder = keep / f"case-{seed}-{reply.number}"
            _clear(folder)
            write_case(make_case(stock, seed, reply.number), folder)
            said = [f"{v.kind}: {v.detail}" for v in reply.violations] + reply.shown
            (folder / "said.txt").write_text("\n".join(said), "utf-8", "backslashreplace")
        if on_reply is not None:
            on_reply(summary, reply)

    def lost(child: _Child, kind: str, detail: str, seconds: float) -> Reply:
        assert child.number is not None
        try:
            case = make_case(stock, seed, child.number)
        except Exception as exc:
            return unmade(child.number, exc)
        reply = Reply(child.number, outcomes=[kind], kinds=[case.base, *(d.split(":")[0] for d in case.done)])
        reply.violations = [Violation(child.number, kind, detail, case.base, case.done)]
        reply.seconds, reply.peak_rss = seconds, child.peak_rss
        return reply

    try:
        stock = bases(scratch / "bases")
        queue = deque(numbers)
        for _ in range(min(jobs, len(queue))):
            start()
        while children:
            nearest = min(child.deadline for child in children) - time.monotonic()
            ready = wait([child.connection for child in children], max(0.0, nearest))
            for child in list(children):
                gone = None
                if child.connection in ready:
                    try:
                        answer = child.connection.recv()
                    except (EOFError, OSError):
                        gone = ("death", child.end(dying=True))
                    else:
                        if child.expected is None:
                            child.expected = answer
                        else:
                            if answer.seconds > limit_s:
                                gone = ("hang", f"{answer.seconds:.1f} s")
                            finish(answer) if gone is None else child.end()
                elif time.monotonic() > child.deadline:
                    gone = ("hang", child.complain())
                if gone is not None:
                    children.remove(child)
                    if child.expected is None:
                        raise RuntimeError(f"a child did not start ({gone[0]}): {gone[1]}")
                    finish(lost(child, *gone, limit_s if gone[0] == "hang" else 0.0))
                    if queue:
                        start()
                elif child.connection in ready:
                    if queue:
                        child.give(queue.popleft(), limit_s)
                    else:
                        child.end()
                        children.remove(child)
    finally:
        for child in children:
            child.end()
        if former is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = former
        shutil.rmtree(scratch, ignore_errors=True)
    summary.seconds = time.monotonic() - started
    return summary


# --------------------------------------------------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(description="damaged CT series through gpuprep")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds a case may take")
    parser.add_argument("--only", type=int, metavar="N", help="run only this case, print everything and keep its files")
    parser.add_argument("--keep", type=Path, help="folder for the files of cases with violations")
    parser.add_argument("--out", type=Path, help="write the summary here as JSON")
    args = parser.parse_args()
    if args.only is not None:
        return only(args.seed, args.only, args.keep or Path.cwd(), args.limit)

    printed_s = time.monotonic()

    def on_reply(summary: Summary, reply: Reply) -> None:
        nonlocal printed_s
        for v in reply.violations:
            print(f"case {v.case} ({v.base}; {'; '.join(v.done)})\n  {v.kind}: {v.detail}", file=sys.stderr, flush=True)
        if time.monotonic() - printed_s > 5:
            printed_s = time.monotonic()
            so_far = f"{summary.cases} cases, {summary.cases / summary.seconds:.0f}/s"
            print(f"{so_far}, {len(summary.violations)} violations", file=sys.stderr, flush=True)

    numbers = range(args.first, args.first + args.cases)
    summary = fuzz(numbers, seed=args.seed, jobs=args.jobs, limit_s=args.limit, keep=args.keep, on_reply=on_reply)
    result = summary.to_dict()
    for title in ("statuses", "outcomes", "damage", "notes"):
        print(f"\n{title}")
        for name, count in result[title].items():
            print(f"{count:8}  {name.encode('unicode_escape').decode() if not name.isprintable() else name}")
    print(f"\n{summary.cases} cases in {summary.seconds:.0f} s, {result['cases_per_second']} per second")
    print(f"slowest: case {summary.slowest[1]}, {summary.slowest[0]:.2f} s")
    print(f"peak of a child: {summary.peak_rss / 1e6:.0f} MB")
    print(f"skipped, since they could not be made: {len(summary.skipped)}")
    for number, reason in sorted(summary.skipped.items()):
        print(f"  case {number}: {reason}")
    print(f"violations: {len(summary.violations)}")
    for v in summary.violations:
        print(f"  case {v.case} ({v.base}; {'; '.join(v.done)}): {v.kind}: {v.detail}")
    if args.out:
        from bench.measure import machine
        from gpuprep.core.versions import versions

        command = "PYTHONPATH=. python tests/fuzz/fuzzing.py " + " ".join(sys.argv[1:])
        head = {"command": command, "machine": machine(), "versions": versions()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(head | result, indent=1) + "\n")
    return 1 if summary.violations else 0


def only(seed: int, number: int, keep: Path, limit_s: float) -> int:
    """Run one case, print everything about it and keep its files."""
    with tempfile.TemporaryDirectory() as scratch:
        stock = bases(Path(scratch))
    try:
        case = make_case(stock, seed, number)
    except Exception as exc:
        print(f"case {number} of seed {seed} cannot be made: {unmade(number, exc).skipped}")
        return 1
    folder = keep / f"case-{seed}-{number}"
    _clear(folder)
    write_case(case, folder)
    print(f"case {number} of seed {seed}: {case.base}, {RECIPES[case.recipe]}")
    for line in case.done:
        print(f"  {line}")
    for file in case.files:
        print(f"  {file.kind:6} {len(file.data):8}  {file.path!r}")

    def on_reply(_: Summary, reply: Reply) -> None:
        print("\n".join(reply.shown))
        print(f"{reply.seconds:.3f} s, peak {reply.peak_rss / 1e6:.0f} MB; files in {folder}")

    summary = fuzz([number], seed=seed, limit_s=limit_s, on_reply=on_reply)
    for v in summary.violations:
        print(f"violation: {v.kind}: {v.detail}")
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())
