"""Checks that headers say what stacking and HU need."""

from __future__ import annotations

from collections.abc import Iterator

from gpuprep.core.formatting import first_few
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules, SeriesWarning
from gpuprep.dicom.uids import GE_BIG_WORDS, NATIVE, PLAIN, READ, UNDEFINED_LENGTH, syntax_name
from gpuprep.errors import DecodeError, GeometryError, IntensityError, MissingTagError

STEEPEST_SLOPE = 100.0
LARGEST_INTERCEPT_HU = 65536.0
"""Beyond these a rescale does not lead to CT numbers."""

LARGEST_SIDE = 8192
"""Rows or columns of a slice. More come from a damaged header, and memory is not taken on its word."""

DAMAGED = ("no Rows and Columns", "no Image Orientation (Patient)", "no Pixel Spacing")
"""Images that lack these may be slices, and a volume without them would be short of some."""

HARMLESS = ("localizer", "colour", "secondary image", "material map", "other acquisition")
"""Images beside the slices of a series that are none, however many."""

PADDING_BYTES = 16
"""So many bytes after the last pixel are padding; more may be pixels that no header announces."""


def check(series: Series, rules: Rules) -> None:
    """Raise unless every slice says where it is, what its numbers mean and that its pixels are there.

    Raises
    ------
    MissingTagError
        If an attribute is absent or unreadable without which the place or the HU of a slice are unknown.
    GeometryError
        If all images are localizers.
    IntensityError
        If the stored values cannot be called HU.
    DecodeError
        If a file is too short for the pixels it announces, the matrix is absurd, or the transfer syntax is not read.
    """
    _check_kind(series)
    _check_syntax(series)
    _check_tags(series, rules)
    _check_intensity(series, rules)
    _check_lengths(series)


def warnings(series: Series) -> tuple[SeriesWarning, ...]:
    """Return what headers say that is doubtful and keeps nothing from being converted."""
    return series.warnings + tuple(_doubts(series))


def _doubts(series: Series) -> Iterator[SeriesWarning]:
    """Yield what is doubtful about what headers say of pixels."""
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
    impossible = [s for s in series.slices if not _possible_high_bit(s)]
    if impossible:
        s = impossible[0]
        text = (
            f"High Bit {s.high_bit} cannot be with Bits Stored {s.bits_stored} in {names(impossible)}: low bits taken"
        )
        yield SeriesWarning("bits", text)
    longer = [(s, excess) for s in series.slices if (excess := _excess_bytes(series, s)) > PADDING_BYTES]
    if longer:
        text = f"{longer[0][1]} bytes of pixels more than announced in {names([s for s, _ in longer])}: not read"
        yield SeriesWarning("excess", text)


def _possible_high_bit(s: SliceHeader) -> bool:
    return s.high_bit is None or (s.bits_stored or 1) - 1 <= s.high_bit < (s.bits_allocated or 16)


def _excess_bytes(series: Series, s: SliceHeader) -> int:
    """Return how many bytes follow the pixels of the last frame in their element; 0 for encoded ones."""
    if s.pixel_bytes is None or s.pixel_bytes == UNDEFINED_LENGTH or s.frame < s.frames - 1:
        return 0
    return s.pixel_bytes - series.rows * series.columns * (s.bits_allocated or 0) // 8


def _check_syntax(series: Series) -> None:
    """Raise unless the pixels of every slice are encoded in a way that is read."""
    unread = [s for s in series.slices if s.transfer_syntax not in READ]
    if unread:
        name = syntax_name(unread[0].transfer_syntax)
        known = "" if name == unread[0].transfer_syntax else f" ({name})"
        raise DecodeError(
            f"transfer syntax {unread[0].transfer_syntax}{known} in {names(unread)} is not one of those that are read: "
            "write the files with another, such as Explicit VR Little Endian",
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
            f"no Series Instance UID in {names(series.slices)}: nothing tells series apart; "
            "--group-by folder takes the images of a folder for one",
            "no-uid",
        )
    strange = [s for s in series.slices if s.modality not in (None, "CT")]
    if strange:
        raise IntensityError(f"Modality is {strange[0].modality}, not CT, in {names(strange)}", "modality")
    if all(s.localizer for s in series.slices):
        raise GeometryError(f"localizers (scouts) only: {names(series.slices)}", "localizer")
    for lack in DAMAGED:
        if damaged := [name for name, why in series.left_out if why == lack]:
            raise MissingTagError(
                f"{lack.removeprefix('no ')} absent, unreadable or impossible in {first_few(damaged)}"
            )
    lost = [name for name, why in series.left_out if why not in HARMLESS]
    if len(lost) >= len(series.slices):
        raise GeometryError(
            f"only {len(series.slices)} images form the largest stack, and {len(lost)} do not belong to it: "
            + first_few(lost),
            "left-out",
        )
    multi = [s for s in series.slices if s.frames > 1 and s.position_mm is None]
    if multi:
        raise MissingTagError(
            f"multi-frame image of {multi[0].frames} frames ({multi[0].name}) that does not say where each of them is",
            "multi-frame",
        )


def _check_tags(series: Series, rules: Rules) -> None:
    said = [] if rules.assume_hu else series.slices
    if lut := [s for s in series.slices if s.modality_lut and None in (s.rescale_slope, s.rescale_intercept)]:
        raise IntensityError(
            f"a Modality LUT Sequence in place of Rescale Slope and Intercept in {names(lut)}: stored values are HU by "
            "no slope, and tables are not applied",
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
        ("Rescale Slope", [s for s in said if s.rescale_slope is None]),
        ("Rescale Intercept", [s for s in said if s.rescale_intercept is None]),
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
    DICOM PS3.3, C.8.2.1 (CT Image module): one sample, Rescale Type HU unless said otherwise; C.7.6.3.1.2: MONOCHROME1
    says that displays show the least value white, after the rescale.
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
            hint = f"; the type is {_units(wrong)}; --assume-hu takes them as HU" if code == "rescale-type" else ""
            raise IntensityError(f"{text} in {names(wrong)}: the values cannot be called HU{hint}", code)


def _units(slices: list[SliceHeader]) -> str:
    """Return the units that slices say instead of HU."""
    return first_few(sorted({s.rescale_type or "" for s in slices}))


def _check_lengths(series: Series) -> None:
    """Raise if plain pixels do not fill the matrix, or the file ends before they do."""
    for s in series.slices:
        if s.pixel_offset is None:
            continue
        if s.pixel_bytes == UNDEFINED_LENGTH:
            raise DecodeError(f"{s.name} holds encoded pixels, which its transfer syntax denies: it is damaged")
        need = series.rows * series.columns * (s.bits_allocated or 0) // 8
        if (s.pixel_bytes or 0) < need:
            raise DecodeError(
                f"{s.name} announces {s.pixel_bytes} bytes of pixels where {need} are needed: it is damaged",
                "truncated",
            )
        if s.member is None and s.transfer_syntax in PLAIN and s.pixel_offset + need > s.file_bytes:
            have = max(0, s.file_bytes - s.pixel_offset)
            raise DecodeError(f"{s.name} ends after {have} of {need} bytes of pixels: it is truncated", "truncated")


def names(slices: tuple[SliceHeader, ...] | list[SliceHeader]) -> str:
    """Return the names of a few slices and the number of the others."""
    return first_few([s.name for s in slices])
