"""Defines `Series` and `SliceHeader`: header attributes of a series, without pixels, cheap to pickle for workers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import Vector3
from gpuprep.core.stacking_rules import Irregularity, SeriesWarning


class SliceHeader(NamedTuple):
    """Header attributes of one CT image: a file, or one frame of a file. None means absent or unreadable.

    This is a tuple because a cohort has millions of slices, and the header index recreates them at every scan.
    """

    path: str
    mtime_ns: int
    member: str | None
    """Name inside the zip archive at `path`, "" for the content of a gzip'd file; None for a plain DICOM file."""
    frame: int
    """Index of the frame in the file, from 0."""
    frames: int
    """*Number of Frames* of the file."""
    file_bytes: int
    sop_instance_uid: str
    instance_number: int | None
    position_mm: Vector3 | None
    """*Image Position (Patient)*: centre of the first voxel as (x, y, z) in mm, LPS."""
    localizer: bool
    """Whether *Image Type* names a localizer."""
    secondary: bool
    """Whether *Image Type* is SECONDARY: made after the examination, from other images."""
    modality: str | None
    temporal_position: int | None
    acquisition_number: int | None
    acquisition_time: str
    """Hash of acquisition date and time; "" if absent."""
    reconstruction: str
    """Hash of *Image Type*, kernel and tube voltage."""
    phase: str
    """Cardiac and respiratory phase, time offset and energy, as `packed`; "" if absent."""
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
    """*Pixel Padding Range Limit*: all values between it and `padding` are padding."""
    transfer_syntax: str
    pixel_offset: int | None
    """Offset in bytes of the frame in the (unpacked) file; for native pixels only."""
    pixel_bytes: int | None
    """Declared size in bytes of the frame, or of all that follow for the last one; for native pixels only."""
    encoded_offset: int | None = None
    """Offset in bytes of offset table and fragments in the (unpacked) file; for encoded pixels only."""
    stream: str | None = None
    """Sign and bits of the file's first JPEG 2000 code stream, as "i16" or "u12"; None without such a stream."""
    modality_lut: bool = False
    """Whether there is a *Modality LUT Sequence*."""
    stack_id: str = ""
    """*Stack ID* if it is a number, else "#" and its hash."""
    in_stack: int | None = None
    """*In-Stack Position Number*."""
    other: str = ""
    """Hashes of *Scan Options*, series and content time, and *Dimension Index Values*, as `packed`."""
    remarks: str = ""
    """Deviations from DICOM that were understood, separated by blanks: "frames-0" for a *Number of Frames* of 0,
    "comma" for decimals with a comma."""

    @property
    def name(self) -> str:
        """File name, with archive member and frame, for messages."""
        name = os.path.basename(self.path) + (f"/{self.member}" if self.member else "")
        return printable(name) + (f" frame {self.frame + 1}" if self.frames > 1 else "")


def packed(values: Iterable[tuple[str, str]]) -> str:
    """Return named values as one short text for `SliceHeader`: "cardiac=40 energy=70"."""
    return " ".join(f"{name}={value}" for name, value in values)


def unpacked(text: str, name: str) -> str:
    """Return the value of a name in a `packed` text; "" if absent."""
    return next((part[len(name) + 1 :] for part in text.split(" ") if part.startswith(f"{name}=")), "")


MALFORMED_UID_PREFIX = "malformed-"
"""Prefix of the hash that replaces a malformed UID."""

FOLDER_UID_PREFIX = "folder-"
"""Prefix of a series UID made from the path of a folder whose images form the series."""


class Description(NamedTuple):
    """What a header tells of the acquisition, for a choice of series. "" and None mean absent or unreadable.

    Nearly all images of a series have the same, and share one object.
    """

    acquisition_uid: str = ""
    """*Acquisition UID*, else *Irradiation Event UID*."""
    study_time: str = ""
    """*Study Date* and *Study Time*, which put the studies of a patient in order; "" without a date."""
    image_type: str = ""
    """*Frame Type* or *Image Type*."""
    kernel: str = ""
    """*Convolution Kernel*; several values are separated by backslashes."""
    slice_thickness_mm: float | None = None
    kvp: float | None = None
    """Tube voltage in kV."""
    reconstruction_diameter_mm: float | None = None
    pitch: float | None = None
    """*Spiral Pitch Factor*."""
    manufacturer: str = ""
    model: str = ""
    contrast: str = "unknown"
    """"yes", "no" or "unknown": see `gpuprep.dicom.describe.contrast_of`."""
    body_part: str = ""
    patient_position: str = ""
    scan_options: str = ""
    acquisition_type: str = ""
    series_description: str = ""
    protocol_name: str = ""
    study_description: str = ""


class Dose(NamedTuple):
    """What differs between the images of one acquisition; None means absent or unreadable."""

    tube_current_ma: float | None = None
    exposure_mas: float | None = None
    ctdivol_mgy: float | None = None


class Image(NamedTuple):
    """One CT image with the attributes of its series."""

    series_uid: str
    study_uid: str
    patient: str
    """Hash of *Patient ID*, "" if absent."""
    frame_of_reference_uid: str
    series_number: int | None
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    orientation: tuple[float, ...] | None
    folder: str
    """Folder of the file; the path of the archive for its members."""
    description: Description
    dose: Dose
    acquired_s: float | None
    """Time of the acquisition, in seconds since the beginning of year 1."""
    header: SliceHeader


class OtherImage(NamedTuple):
    """An image of another modality than CT, to which a segmentation may belong."""

    series_uid: str
    modality: str
    """*Modality*, "" if absent; "another" for an unusual word, which could be a name."""
    sop_digest: int
    """`sop_digest` of its *SOP Instance UID*."""


def sop_digest(sop_uid: str) -> int:
    """Return a 64-bit hash of a SOP Instance UID; shorter than the UID, as a cohort has millions."""
    return int.from_bytes(hashlib.blake2b(sop_uid.encode(), digest_size=8).digest())


def image_digest(sop_uid: str, number: int = 0) -> int:
    """Return a 64-bit hash of an image, or of frame `number` (from 1) of a multi-frame image."""
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
    """*Pixel Spacing* in mm: between rows, between columns."""
    orientation: tuple[float, ...] | None
    """*Image Orientation (Patient)*: direction cosines of a row, then of a column."""
    part: int
    """0 if the UID has one volume; else 1, 2, … by descending number of slices."""
    folder: str
    """Deepest folder that holds all slices."""
    slices: tuple[SliceHeader, ...]
    """Headers of the slices."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images of the series that are not slices of its volume: (file name, reason)."""
    left_out_digests: tuple[int, ...] = ()
    """`image_digest` of the same images. A segmentation may be drawn on one of them."""
    irregularities: tuple[Irregularity, ...] = ()
    """Irregularities handled when the images of one UID were sorted into volumes."""
    warnings: tuple[SeriesWarning, ...] = ()
    """Warnings about these slices as a group."""
    alone: int = 0
    """For a series of one image: the number of such series in its folder, if there are several; else 0."""
    patient: str = ""
    """Hash of *Patient ID*, "" if absent. It is stored nowhere."""
    description: Description = Description()  # noqa: RUF009 - immutable
    """Each attribute as most slices have it."""
    dose: Dose = Dose()  # noqa: RUF009 - immutable
    """Mean over the slices."""
    acquired_s: tuple[float, float] | None = None
    """Time of the first and of the last acquisition, as `Image.acquired_s`; None if no slice has one."""
    alias: str = ""
    """Pseudonym of the UID, "" without pseudonymisation: see `gpuprep.pipeline.pseudonyms`."""

    def without(self, images: Iterable[tuple[SliceHeader, str]], what: str) -> Series:
        """Return the series with a record of images that were left out of it.

        `images` are headers with the reason for each; `what` describes them in the irregularity.
        """
        headers, reasons = zip(*images, strict=True)
        numbers = [header.frame + 1 if header.frames > 1 else 0 for header in headers]
        digests = (image_digest(h.sop_instance_uid, number) for h, number in zip(headers, numbers, strict=True))
        return replace(
            self,
            left_out=(*self.left_out, *zip((header.name for header in headers), reasons, strict=True)),
            left_out_digests=(*self.left_out_digests, *digests),
            irregularities=(*self.irregularities, Irregularity("left-out", what, "left out of the volume")),
        )

    @property
    def public_uid(self) -> str:
        """UID, or its pseudonym if there is one."""
        return self.alias or self.series_uid

    @property
    def key(self) -> str:
        """Key in the manifest: the public UID, with "#" and the part if the UID has several volumes."""
        return self._key_of(self.public_uid)

    @property
    def own_key(self) -> str:
        """Key without pseudonym."""
        return self._key_of(self.series_uid)

    def _key_of(self, uid: str) -> str:
        uid = uid or f"no-uid-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"
        return f"{uid}#{self.part}" if self.part else uid

    @property
    def label(self) -> str:
        """Short name for folders and messages: series number, six hex digits of the UID's SHA-256, part."""
        number = "x" if self.series_number is None else str(self.series_number)
        digest = hashlib.sha256(self.series_uid.encode()).hexdigest()[:6]
        return f"series-{number}-{digest}" + (f"-part{self.part}" if self.part else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of SOP Instance UID, frame, file size and modification time of all slices, to detect changes."""
        lines = sorted(f"{s.sop_instance_uid} {s.frame} {s.file_bytes} {s.mtime_ns}" for s in self.slices)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
