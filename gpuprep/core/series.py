"""Defines `Series` and `SliceHeader`: what the headers of a series say, without pixels, cheap to pickle for workers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import Vector3
from gpuprep.core.stacking_rules import Irregularity, SeriesWarning


class SliceHeader(NamedTuple):
    """The facts of one CT image: a file, or one frame of it. A value of None means: absent or unreadable.

    A tuple, because cohorts have millions of them, and an index of headers makes them again at every scan.
    """

    path: str
    mtime_ns: int
    member: str | None
    """Name inside the zip archive at `path`, "" for what a gzip'd file holds; None where the file is DICOM itself."""
    frame: int
    """Which frame of the file, from 0."""
    frames: int
    """*Number of Frames* of the file."""
    file_bytes: int
    sop_instance_uid: str
    instance_number: int | None
    position_mm: Vector3 | None
    """*Image Position (Patient)*: centre of the first voxel as (x, y, z), LPS."""
    localizer: bool
    secondary: bool
    """*Image Type* says so: made after the examination, from other images."""
    modality: str | None
    temporal_position: int | None
    acquisition_number: int | None
    acquisition_time: str
    """A hash of date and time; "" where there are none."""
    reconstruction: str
    """A hash of *Image Type*, kernel and tube voltage."""
    phase: str
    """Numbers of cardiac and respiratory phase, time offset and energy, as `packed`; "" where there are none."""
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str | None
    photometric: str | None
    samples_per_pixel: int
    bits_allocated: int | None
    bits_stored: int | None
    high_bit: int | None
    signed: bool | None
    padding: int | None
    """*Pixel Padding Value* as stored, with the sign of the pixels."""
    padding_limit: int | None
    """*Pixel Padding Range Limit*: padding is everything between it and `padding`."""
    transfer_syntax: str
    pixel_offset: int | None
    """Where the frame begins in the (unpacked) file, when its pixels lie there as plain integers."""
    pixel_bytes: int | None
    """How many bytes the file announces for the frame, when they are plain integers; for the last, all that follow."""
    encoded_offset: int | None = None
    """Where offset table and fragments begin in the (unpacked) file, when its pixels are encoded."""
    stream: str | None = None
    """Sign and bits of the file's first JPEG 2000 code stream, as in "i16" and "u12"; None where it has none."""
    modality_lut: bool = False
    """Whether it has a *Modality LUT Sequence*."""
    stack_id: str = ""
    """*Stack ID*: a number, or "#" and a hash."""
    in_stack: int | None = None
    """*In-Stack Position Number*."""
    other: str = ""
    """Hashes of *Scan Options*, series and content time, and *Dimension Index Values*, as `packed`."""
    remarks: str = ""
    """What is written in another way than DICOM asks, and was understood: "frames-0" where *Number of Frames* is 0,
    "comma" where decimals have a comma; several are parted by blanks."""

    @property
    def name(self) -> str:
        """File name for messages."""
        name = Path(self.path).name + (f"/{self.member}" if self.member else "")
        return printable(name) + (f" frame {self.frame + 1}" if self.frames > 1 else "")


def packed(values: Iterable[tuple[str, str]]) -> str:
    """Return named values in one short text, as a slice keeps them: "cardiac=40 energy=70"."""
    return " ".join(f"{name}={value}" for name, value in values)


def unpacked(text: str, name: str) -> str:
    """Return a value by its name; "" where there is none."""
    return next((part[len(name) + 1 :] for part in text.split(" ") if part.startswith(f"{name}=")), "")


MALFORMED = "malformed-"
"""What begins so is a hash in place of a UID that cannot be one."""

FOLDER_UID = "folder-"
"""A UID that begins so was made of the path of a folder, whose images form the series."""


class Image(NamedTuple):
    """One CT image with what it says of its series."""

    series_uid: str
    study_uid: str
    patient: str
    """A hash of *Patient ID*; "" where there is none. It never leaves discovery."""
    frame_of_reference_uid: str
    series_number: int | None
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    orientation: tuple[float, ...] | None
    folder: str
    """Folder it lies in; an archive is the folder of its members."""
    header: SliceHeader


class OtherImage(NamedTuple):
    """An image that is no CT: a segmentation may belong to it."""

    series_uid: str
    modality: str
    """*Modality*, "" where there is none; "another" for an unusual word, which might be a name."""
    sop_digest: int
    """Of the *SOP Instance UID*: see `sop_digest`."""


def sop_digest(sop_uid: str) -> int:
    """Return 64 bits that stand for a SOP Instance UID, of which a cohort has millions."""
    return int.from_bytes(hashlib.blake2b(sop_uid.encode(), digest_size=8).digest())


def image_digest(sop_uid: str, number: int = 0) -> int:
    """Return 64 bits that stand for an image, or for a frame of one that has several, counted from 1."""
    return sop_digest(f"{sop_uid} {number}") if number else sop_digest(sop_uid)


@dataclass(frozen=True, slots=True)
class Series:
    """Slices that share a *Series Instance UID*, an orientation, a matrix and a pixel spacing.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> (series,) = gpuprep.discover("dicom")
    >>> series.series_number, len(series.slices), series.label.startswith("series-1-")
    (1, 12, True)
    """

    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    series_number: int | None
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    """*Pixel Spacing*: between rows, between columns."""
    orientation: tuple[float, ...] | None
    """*Image Orientation (Patient)*: cosines of a row, then of a column."""
    part: int
    """0 where the UID stands for one volume; else 1, 2, … by falling number of slices."""
    folder: str
    """Deepest folder that holds every slice."""
    slices: tuple[SliceHeader, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """Images of the series that are no slices of its volume: (file name, why)."""
    left_out_digests: tuple[int, ...] = ()
    """Of the same images: see `image_digest`. A segmentation may be drawn on one of them."""
    irregularities: tuple[Irregularity, ...] = ()
    """What had to be done to get from the images of one UID to these slices."""
    warnings: tuple[SeriesWarning, ...] = ()
    """What is doubtful about these slices as a group, and was left as it is."""
    alone: int = 0
    """Of a series of one image: how many such series lie in its folder."""
    alias: str = ""
    """By what it goes where its UID must not be known: see `gpuprep.pipeline.pseudonyms`."""

    def without(self, images: Iterable[tuple[SliceHeader, str]], what: str) -> Series:
        """Return the series with images named that were left out of it, and why; `what` they are, for people."""
        headers, why = zip(*images, strict=True)
        numbers = [header.frame + 1 if header.frames > 1 else 0 for header in headers]
        digests = (image_digest(h.sop_instance_uid, number) for h, number in zip(headers, numbers, strict=True))
        return replace(
            self,
            left_out=(*self.left_out, *zip((header.name for header in headers), why, strict=True)),
            left_out_digests=(*self.left_out_digests, *digests),
            irregularities=(*self.irregularities, Irregularity("left-out", what, "left out of the volume")),
        )

    @property
    def public_uid(self) -> str:
        """UID, or what stands for it."""
        return self.alias or self.series_uid

    @property
    def key(self) -> str:
        """Identity in the manifest: the UID, and the part where one UID stands for several volumes."""
        uid = self.public_uid or f"no-uid-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"
        return f"{uid}#{self.part}" if self.part else uid

    @property
    def label(self) -> str:
        """Short name for folders and messages: series number, six hex digits of the UID's SHA-256, part."""
        number = "x" if self.series_number is None else str(self.series_number)
        digest = hashlib.sha256(self.series_uid.encode()).hexdigest()[:6]
        return f"series-{number}-{digest}" + (f"-part{self.part}" if self.part else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over each slice's SOP Instance UID, frame, size and time of change: what "unchanged" means."""
        lines = sorted(f"{s.sop_instance_uid} {s.frame} {s.file_bytes} {s.mtime_ns}" for s in self.slices)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
