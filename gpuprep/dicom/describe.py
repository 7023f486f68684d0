"""Reads what a header tells of the acquisition: kernel, dose, contrast, descriptions. A series is chosen by them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from functools import lru_cache
from statistics import fmean
from typing import Any

from gpuprep.core.series import Description, Dose, Image
from gpuprep.dicom.elements import TAGS, ascii_of, element_of
from gpuprep.dicom.header_values import Frame, decimal_of, floating_of, text_of

LONGEST_TEXT = 64
"""Number of characters of a text that are kept: the longest LO. A damaged length could include other elements."""

MOST_KNOWN = 10_000
"""Number of descriptions that a process keeps, so that the images of a series share one."""

ESCAPE = b"\x1b"
"""Begins another character set, as Japanese in 7 bits needs it (ISO 2022)."""

_KEYWORDS = (
    "SpecificCharacterSet", "AcquisitionUID", "IrradiationEventUID", "StudyDate", "StudyTime", "FrameType", "ImageType",
    "ConvolutionKernel", "SliceThickness", "KVP", "ReconstructionDiameter", "SpiralPitchFactor", "Manufacturer",
    "ManufacturerModelName", "ContrastBolusAgent", "ContrastBolusRoute", "ContrastBolusVolume",
    "ContrastBolusAgentAdministered", "ContrastBolusAgentDetected", "ContrastBolusAgentPhase", "BodyPartExamined",
    "PatientPosition", "ScanOptions", "AcquisitionType", "SeriesDescription", "ProtocolName", "StudyDescription",
)  # fmt: skip
_TAGS = tuple(TAGS[keyword] for keyword in _KEYWORDS)
_known: dict[tuple[Any, ...], tuple[Description, set[str]]] = {}
"""Descriptions by the values of their elements, each with the remarks (see `Frame`) that reading them led to."""


def description_of(ds: Frame) -> Description:
    """Return the description of an image; images whose elements are equal share one."""
    key = tuple(getattr(ds.get_item(tag), "value", None) for tag in _TAGS)
    try:
        known = _known.get(key)
    except TypeError:  # pydicom has converted a value to a list
        return _description_of(ds)
    if known is None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        earlier, ds.remarks = ds.remarks, set()
        known = _known[key] = _description_of(ds), ds.remarks
        ds.remarks = earlier
    description, remarks = known
    ds.remarks |= remarks
    return description


def _description_of(ds: Frame) -> Description:
    return Description(
        acquisition_uid=_text(ds, "AcquisitionUID") or _text(ds, "IrradiationEventUID"),
        study_time=day + _text(ds, "StudyTime") if (day := _text(ds, "StudyDate")) else "",
        image_type=_text(ds, "FrameType") or _text(ds, "ImageType"),
        kernel=_text(ds, "ConvolutionKernel"),
        slice_thickness_mm=decimal_of(ds, "SliceThickness"),
        kvp=decimal_of(ds, "KVP"),
        reconstruction_diameter_mm=decimal_of(ds, "ReconstructionDiameter"),
        pitch=floating_of(ds, "SpiralPitchFactor"),
        manufacturer=_free_text(ds, "Manufacturer"),
        model=_free_text(ds, "ManufacturerModelName"),
        contrast=contrast_of(ds),
        body_part=_text(ds, "BodyPartExamined"),
        patient_position=_text(ds, "PatientPosition"),
        scan_options=_text(ds, "ScanOptions"),
        acquisition_type=_text(ds, "AcquisitionType"),
        series_description=_free_text(ds, "SeriesDescription"),
        protocol_name=_free_text(ds, "ProtocolName"),
        study_description=_free_text(ds, "StudyDescription"),
    )


def _text(ds: Frame, keyword: str) -> str:
    return _tidy(ascii_of(getattr(element_of(ds, keyword), "value", None)))


def _tidy(text: str) -> str:
    """Return the beginning of a text, whose values are without padding; "" if it has other than printable characters.

    Those come from a damaged length, by which the text includes the next elements, which may be names.
    """
    text = "\\".join(part.strip(" \0") for part in text.split("\\"))
    return text[:LONGEST_TEXT] if text.isprintable() else ""


def _free_text(ds: Frame, keyword: str) -> str:
    """Return a text in the character set of the data set."""
    value = getattr(element_of(ds, keyword), "value", None)
    if not isinstance(value, bytes) or (value.isascii() and ESCAPE not in value):
        return _text(ds, keyword)
    from pydicom.charset import convert_encodings, decode_bytes  # few headers need it

    terms = getattr(element_of(ds, "SpecificCharacterSet"), "value", None)
    # pydicom converts several terms to a list.
    charset = ascii_of(terms).split("\\") if isinstance(terms, bytes | str | None) else list(terms)
    try:
        return _tidy(decode_bytes(value, convert_encodings(charset), {0x5C}))
    except (LookupError, ValueError):
        return _text(ds, keyword)


NO_CONTRAST = frozenset(
    ["NONE", "NO", "N", "NON", "0", "-", "NA", "N/A", "W/O", "WITHOUT", "NO CONTRAST", "UNENHANCED", "NATIVE"]
)
"""Words that writers put into *Contrast/Bolus Agent* or *Route* to say that there is none."""

BEFORE_CONTRAST = "PRE_CONTRAST"
"""The only *Contrast/Bolus Agent Phase* without contrast."""


def contrast_of(ds: Frame) -> str:
    """Return "yes", "no" or "unknown": whether there was contrast medium, by its agent, route, volume and phase.

    An empty element tells nothing, although the standard writes these elements only if contrast was used, since many
    scanners always write them.

    References
    ----------
    DICOM PS3.3, C.7.6.4 (Contrast/Bolus), C.7.6.4b (Enhanced Contrast/Bolus), C.7.6.16.2.12 (Contrast/Bolus Usage).
    """
    words = [text_of(ds, keyword).upper() for keyword in ("ContrastBolusAgent", "ContrastBolusRoute")]
    usage = [text_of(ds, f"ContrastBolusAgent{name}").upper() for name in ("Administered", "Detected")]
    phase, volume = text_of(ds, "ContrastBolusAgentPhase").upper(), decimal_of(ds, "ContrastBolusVolume")
    said = [word not in NO_CONTRAST for word in words if word]
    said += [word == "YES" for word in usage if word in ("YES", "NO")]
    said += [phase != BEFORE_CONTRAST] if phase else []
    said += [volume > 0] if volume is not None else []
    if phase == BEFORE_CONTRAST:  # whatever agent is given later
        return "no"
    return "yes" if any(said) else "no" if said else "unknown"


def dose_of(ds: Frame) -> Dose:
    """Return tube current, exposure and dose of an image."""
    current, exposure = decimal_of(ds, "XRayTubeCurrent"), decimal_of(ds, "Exposure")
    return Dose(
        floating_of(ds, "XRayTubeCurrentInmA") if current is None else current,
        floating_of(ds, "ExposureInmAs") if exposure is None else exposure,
        floating_of(ds, "CTDIvol"),
    )


DAY_S = 86_400.0


def acquired_of(ds: Frame) -> float | None:
    """Return the time of the acquisition of an image, in seconds since the beginning of year 1; None if absent."""
    for keyword in ("FrameAcquisitionDateTime", "AcquisitionDateTime"):
        if (when := _seconds(text_of(ds, keyword))) is not None:
            return when
    time = text_of(ds, "AcquisitionTime")
    return _seconds((text_of(ds, "AcquisitionDate") or "00010101") + time) if time else None


def _seconds(when: str) -> float | None:
    """Return the seconds of a date and time since the beginning of year 1; its time zone is left out."""
    match = _DATE_TIME.match(when)
    if match is None:
        return None
    day, hour, minute, second = match.groups()
    start = _day_s(day)
    return None if start is None else start + int(hour) * 3600 + int(minute) * 60 + float(second or 0)


_DATE_TIME = re.compile(r"(\d{4}\.?\d\d\.?\d\d)([01]\d|2[0-3]):?([0-5]\d):?([0-6]\d(?:\.\d{1,6})?)?", re.ASCII)


@lru_cache(maxsize=1000)
def _day_s(day: str) -> float | None:
    digits = day.replace(".", "")
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])).toordinal() * DAY_S
    except ValueError:
        return None


def described(images: Sequence[Image]) -> dict[str, Any]:
    """Return the fields of a `Series` that summarise its images: description, dose and acquisition times.

    Of the description, each attribute is that of most images; of equally frequent ones the first. Absent attributes do
    not count.
    """
    description = images[0].description
    if any(image.description is not description for image in images):
        descriptions = Counter(image.description for image in images)
        fields = zip(*descriptions, strict=True)
        counts = list(descriptions.values())
        description = Description._make(_most_frequent(values, counts) for values in fields)
    times = [image.acquired_s for image in images if image.acquired_s is not None]
    return {
        "description": description,
        "dose": Dose._make(_mean(values) for values in zip(*(image.dose for image in images), strict=True)),
        "acquired_s": (min(times), max(times)) if times else None,
    }


def _most_frequent(values: Sequence[Any], counts: Sequence[int]) -> Any:
    totals: Counter[Any] = Counter()
    for value, count in zip(values, counts, strict=True):
        if value not in (None, "", "unknown"):
            totals[value] += count
    return max(totals, key=totals.__getitem__) if totals else values[0]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    try:
        return fmean(known) if known else None
    except OverflowError:  # damaged values
        return None
