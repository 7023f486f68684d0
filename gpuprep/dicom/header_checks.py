"""Checks that headers have the attributes that stacking and conversion to HU need."""

from __future__ import annotations

from collections.abc import Iterator

from gpuprep.core.formatting import first_few
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules, SeriesWarning
from gpuprep.dicom.uids import GE_BIG_WORDS, NATIVE, PLAIN, READ, UNDEFINED_LENGTH, syntax_name
from gpuprep.errors import DecodeError, GeometryError, IntensityError, MissingTagError

STEEPEST_SLOPE = 100.0
LARGEST_INTERCEPT_HU = 65536.0
"""Largest magnitudes of *Rescale Slope* and *Rescale Intercept* that lead to CT numbers."""

LARGEST_SIDE = 8192
"""Largest number of rows or columns; more come from a damaged header, and no memory is allocated for them."""

MISSING_GEOMETRY = ("no Rows and Columns", "no Image Orientation (Patient)", "no Pixel Spacing")
"""Reasons for leaving out images that may be slices: the volume would lack them, so the series is rejected."""

NOT_SLICES = ("localizer", "colour", "secondary image", "material map", "other acquisition")
"""Reasons for leaving out images that are certainly not slices, however many there are."""

PADDING_BYTES = 16
"""Up to this many bytes after the last pixel are padding; more may be undeclared pixels."""


def check(series: Series, rules: Rules) -> None:
    """Raise unless every slice has valid geometry and rescale attributes and complete pixels.

    Raises
    ------
    MissingTagError
        If an attribute that position or HU depend on is absent or unreadable.
    GeometryError
        If all images are localizers, or the largest stack has no more images than were left out.
    IntensityError
        If the stored values cannot be called HU.
    DecodeError
        If a file is too short for its pixels, the matrix is absurd, or the transfer syntax is not supported.
    """
    _check_kind(series)
    _check_syntax(series)
    _check_tags(series, rules)
    _check_intensity(series, rules)
    _check_lengths(series)


def warnings(series: Series) -> tuple[SeriesWarning, ...]:
    """Return warnings about doubtful attributes that do not prevent conversion."""
    return series.warnings + tuple(_pixel_warnings(series))


def _pixel_warnings(series: Series) -> Iterator[SeriesWarning]:
    """Yield warnings about attributes that describe the pixels."""
    for code, text, slices in (
        (
            "monochrome1",
            "Photometric Interpretation MONOCHROME1, which is for displays: HU are taken as they are",
            [s for s in series.slices if s.photometric == "MONOCHROME1"],
        ),
        (
            "encapsulation",
            "pixels that are not encoded, although the transfer syntax says so",
            [s for s in series.slices if s.pixel_offset is not None and s.transfer_syntax not in NATIVE],
        ),
        (
            "encapsulation",
            "Number of Frames 0, taken as 1",
            [s for s in series.slices if "frames-0" in s.remarks],
        ),
        (
            "decimal-comma",
            "decimal commas, read as points",
            [s for s in series.slices if "comma" in s.remarks],
        ),
    ):
        if slices:
            yield SeriesWarning(code, f"{text}, in {names(slices)}")
    if lut := [s for s in series.slices if s.modality_lut]:
        text = f"a Modality LUT Sequence beside the rescale in {names(lut)}: the rescale is applied, and no table"
        yield SeriesWarning("modality-lut", text)
    impossible = [s for s in series.slices if not _is_high_bit_valid(s)]
    if impossible:
        s = impossible[0]
        text = f"High Bit {s.high_bit} is impossible with Bits Stored {s.bits_stored} in {names(impossible)}"
        yield SeriesWarning("bits", f"{text}: low bits taken")
    oversized = [(s, excess) for s in series.slices if (excess := _excess_bytes(series, s)) > PADDING_BYTES]
    if oversized:
        text = f"{oversized[0][1]} bytes of pixels more than declared in {names([s for s, _ in oversized])}: not read"
        yield SeriesWarning("excess", text)


def _is_high_bit_valid(s: SliceHeader) -> bool:
    return s.high_bit is None or (s.bits_stored or 1) - 1 <= s.high_bit < (s.bits_allocated or 16)


def _excess_bytes(series: Series, s: SliceHeader) -> int:
    """Return how many bytes of *Pixel Data* follow the last frame; 0 for encoded pixels."""
    if s.pixel_bytes is None or s.pixel_bytes == UNDEFINED_LENGTH or s.frame < s.frames - 1:
        return 0
    return s.pixel_bytes - series.rows * series.columns * (s.bits_allocated or 0) // 8


def _check_syntax(series: Series) -> None:
    """Raise unless the transfer syntax of every slice is supported."""
    unsupported = [s for s in series.slices if s.transfer_syntax not in READ]
    if unsupported:
        name = syntax_name(unsupported[0].transfer_syntax)
        known = "" if name == unsupported[0].transfer_syntax else f" ({name})"
        raise DecodeError(
            f"transfer syntax {unsupported[0].transfer_syntax}{known} in {names(unsupported)} is not supported: write "
            "the files with another one, such as Explicit VR Little Endian",
            "syntax",
        )
    doubtful = [s for s in series.slices if s.transfer_syntax == GE_BIG_WORDS and s.pixel_offset is None]
    if doubtful:
        raise DecodeError(
            f"transfer syntax {GE_BIG_WORDS} ({syntax_name(GE_BIG_WORDS)}) in {names(doubtful)}: the data set has an "
            "explicit VR or other than 16 bits allocated, so the order of bytes of its pixels is not known",
            "syntax",
        )


def _check_kind(series: Series) -> None:
    if not series.series_uid:
        raise MissingTagError(
            f"no Series Instance UID in {names(series.slices)}: images cannot be grouped; "
            "--group-by folder makes one series of each folder",
            "no-uid",
        )
    not_ct = [s for s in series.slices if s.modality not in (None, "CT")]
    if not_ct:
        raise IntensityError(f"Modality is {not_ct[0].modality}, not CT, in {names(not_ct)}", "modality")
    if all(s.localizer for s in series.slices):
        raise GeometryError(f"localizers (scouts) only: {names(series.slices)}", "localizer")
    for reason in MISSING_GEOMETRY:
        if damaged := [name for name, why in series.left_out if why == reason]:
            raise MissingTagError(
                f"{reason.removeprefix('no ')} absent, unreadable or impossible in {first_few(damaged)}"
            )
    left_out = [name for name, why in series.left_out if why not in NOT_SLICES]
    if len(left_out) >= len(series.slices):
        raise GeometryError(
            f"only {len(series.slices)} images form the largest stack, and {len(left_out)} do not belong to it: "
            + first_few(left_out),
            "left-out",
        )
    multi = [s for s in series.slices if s.frames > 1 and s.position_mm is None]
    if multi:
        raise MissingTagError(
            f"multi-frame image of {multi[0].frames} frames ({multi[0].name}) without a position for each of them",
            "multi-frame",
        )


def _check_tags(series: Series, rules: Rules) -> None:
    needs_rescale = [] if rules.assume_hu else series.slices
    if lut := [s for s in series.slices if s.modality_lut and None in (s.rescale_slope, s.rescale_intercept)]:
        raise IntensityError(
            f"a Modality LUT Sequence in place of Rescale Slope and Intercept in {names(lut)}: lookup tables are "
            "not applied, so HU are unknown",
            "rescale",
        )
    for name, slices in (
        ("Image Orientation (Patient)", series.slices if series.orientation is None else ()),
        ("Pixel Spacing", series.slices if series.pixel_spacing_mm is None else ()),
        ("Rows and Columns", series.slices if not (series.rows and series.columns) else ()),
        ("Image Position (Patient)", [s for s in series.slices if s.position_mm is None]),
        ("Bits Allocated", [s for s in series.slices if s.bits_allocated is None]),
        ("Bits Stored", [s for s in series.slices if not s.bits_stored]),
        ("Pixel Representation", [s for s in series.slices if s.signed is None]),
        ("Rescale Slope", [s for s in needs_rescale if s.rescale_slope is None]),
        ("Rescale Intercept", [s for s in needs_rescale if s.rescale_intercept is None]),
        ("Pixel Data", [s for s in series.slices if s.pixel_bytes == 0]),
    ):
        if slices:
            code = "rescale" if name.startswith("Rescale") else "missing-tag"
            raise MissingTagError(f"{name} absent, unreadable or impossible in {names(slices)}", code)
    if max(series.rows, series.columns) > LARGEST_SIDE:
        raise DecodeError(
            f"{series.rows} × {series.columns} pixels a slice, more than {LARGEST_SIDE} a side: the header is damaged",
            "size",
        )


def _check_intensity(series: Series, rules: Rules) -> None:
    """Raise unless stored value times slope plus intercept is a CT number in HU.

    References
    ----------
    DICOM PS3.3, C.8.2.1 (CT Image module): one sample, Rescale Type HU by default; C.7.6.3.1.2: MONOCHROME1 makes
    displays show the lowest value white, after the rescale.
    """
    slices = series.slices
    other_type = [] if rules.assume_hu else [s for s in slices if s.rescale_type not in (None, "HU")]
    for code, text, wrong in (
        ("colour", "several samples per pixel", [s for s in slices if s.samples_per_pixel != 1]),
        (
            "photometric",
            "Photometric Interpretation not MONOCHROME2 or MONOCHROME1",
            [s for s in slices if s.photometric not in ("MONOCHROME1", "MONOCHROME2")],
        ),
        ("rescale-type", "Rescale Type not HU", other_type),
        ("rescale", "Rescale Slope 0", [s for s in slices if s.rescale_slope == 0]),
        ("rescale", "Rescale Slope absurd", [s for s in slices if abs(s.rescale_slope or 0) > STEEPEST_SLOPE]),
        (
            "rescale",
            "Rescale Intercept absurd",
            [s for s in slices if abs(s.rescale_intercept or 0) > LARGEST_INTERCEPT_HU],
        ),
        ("bits", "Bits Allocated neither 8 nor 16", [s for s in slices if s.bits_allocated not in (8, 16)]),
        (
            "bits",
            "Bits Stored above Bits Allocated",
            [s for s in slices if (s.bits_stored or 0) > (s.bits_allocated or 0)],
        ),
    ):
        if wrong:
            hint = (
                f"; the type is {_rescale_types(wrong)}; --assume-hu takes them as HU" if code == "rescale-type" else ""
            )
            raise IntensityError(f"{text} in {names(wrong)}: the values cannot be called HU{hint}", code)


def _rescale_types(slices: list[SliceHeader]) -> str:
    """Return the Rescale Types of slices as text."""
    return first_few(sorted({s.rescale_type or "" for s in slices}))


def _check_lengths(series: Series) -> None:
    """Raise if native pixels do not fill the matrix, or the file ends before they do."""
    for s in series.slices:
        if s.pixel_offset is None:
            continue
        if s.pixel_bytes == UNDEFINED_LENGTH:
            raise DecodeError(f"{s.name} holds encoded pixels, which its transfer syntax denies: it is damaged")
        needed = series.rows * series.columns * (s.bits_allocated or 0) // 8
        if (s.pixel_bytes or 0) < needed:
            raise DecodeError(
                f"{s.name} declares {s.pixel_bytes} bytes of pixels where {needed} are needed: it is damaged",
                "truncated",
            )
        if s.member is None and s.transfer_syntax in PLAIN and s.pixel_offset + needed > s.file_bytes:
            present = max(0, s.file_bytes - s.pixel_offset)
            raise DecodeError(
                f"{s.name} ends after {present} of {needed} bytes of pixels: it is truncated", "truncated"
            )


def names(slices: tuple[SliceHeader, ...] | list[SliceHeader]) -> str:
    """Return the names of the first slices and the number of the others."""
    return first_few([s.name for s in slices])
