"""Decides which bits of stored words hold the value, and whether it is signed, where headers are doubtful.

Slices are read as their headers declare. If there is evidence against that, two readings of the same words are
compared by their pixels: neighbours differ little in the right reading, and by a power of two in the wrong one. All
slices that declare the same format are read alike.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few
from gpuprep.core.hounsfield import HIGHEST_HU
from gpuprep.core.series import SliceHeader
from gpuprep.core.stacking_rules import Irregularity, Policy, SeriesWarning
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.header_values import pixel_value
from gpuprep.dicom.parse_header import HEADER_BYTES
from gpuprep.dicom.uids import ENCODINGS
from gpuprep.dicom.word_evidence import (
    MIN_DISTINCT_VALUES,
    BitStatistics,
    Pair,
    PixelFormat,
    Readings,
    has_no_negative_tissue,
    low_bits,
    rescale_of,
    signed_from,
)
from gpuprep.errors import DecodeError, IntensityError
from gpuprep.files.bounded_reader import open_bounded

LOWEST_FILL_HU = -4096.0
"""Lowest HU for values read with the sign that is not declared: fill of scanners is −2048 or −3024 HU."""

SAMPLED_SLICES = 5
"""Number of slices, at equal distances, that are examined before all slices are."""


NO_AIR_HU = -500.0
"""If the lowest possible value of a header lies above this, the header has no room for lung and air."""


def pixel_format(header: SliceHeader) -> PixelFormat:
    """Return the pixel format that the header of a slice declares."""
    allocated = header.bits_allocated or 16
    stored = header.bits_stored or allocated
    high = header.high_bit
    if high is None or not stored - 1 <= high < allocated:
        high = stored - 1
    return PixelFormat(is_coded(header), allocated, stored, high, bool(header.signed), header.stream)


def is_coded(header: SliceHeader) -> bool:
    """Whether the pixels of a slice are a code stream, and not words, RLE or deflated words."""
    return header.pixel_offset is None and ENCODINGS.get(header.transfer_syntax, "none") not in (
        "none",
        "deflate",
        "RLE",
    )


def with_all_bits(header: SliceHeader) -> SliceHeader:
    """Return the header with *Bits Stored* set to *Bits Allocated*."""
    bits = header.bits_allocated or 16
    return header._replace(bits_stored=bits, high_bit=bits - 1)


def overlay_bits(header: SliceHeader) -> int:
    """Return the mask of the bits in which the file of a slice declares overlays.

    References
    ----------
    DICOM PS3.3-2004, C.9.2 (Overlay Plane module): *Overlay Bits Allocated*, *Overlay Bit Position*; retired since.
    """
    allocated, position = ([(0x6000 + 2 * n) << 16 | element for n in range(16)] for element in (0x0100, 0x0102))
    import pydicom

    try:
        with warnings.catch_warnings(), open_bounded(header.path, header.member) as f:
            warnings.simplefilter("ignore")
            content, *_ = inflated(f, HEADER_BYTES)
            ds = pydicom.dcmread(content, force=True, stop_before_pixels=True, specific_tags=[*allocated, *position])
            within = [p for a, p in zip(allocated, position, strict=True) if p in ds and a in ds and ds[a].value > 1]
            return sum({1 << int(ds[p].value) for p in within})
    except Exception as exc:  # pydicom raises exceptions of many types for damaged files
        raise DecodeError(f"{header.name} cannot be read: {' '.join(str(exc).split())}") from exc


def _all_overlay_bits(group: list[SliceHeader]) -> int:
    """Return the mask of the bits in which any file of a group declares overlays."""
    files = {(header.path, header.member): header for header in group}
    return reduce(or_, map(overlay_bits, files.values()), 0)


class FormatCorrections:
    """Corrections of bits and sign that the headers of a series declare.

    Parameters
    ----------
    slices : tuple of SliceHeader
        Slices in any order.
    matrix : tuple of int
        Rows and columns.
    read : callable
        ``read(header, out)`` fills an array with the stored values of a slice.
    policy : {"fix", "strict", "keep"}
        With "keep", words are read as headers declare, whatever the evidence.

    Raises
    ------
    IntensityError
        If both readings are possible and the evidence is insufficient, or with policy "strict" if a header is wrong.
    DecodeError
        As `read` raises.

    References
    ----------
    DICOM PS3.5, 8.1.1 (Pixel Data Encoding of Related Data Elements).
    """

    def __init__(
        self,
        slices: tuple[SliceHeader, ...],
        matrix: tuple[int, int],
        read: Callable[[SliceHeader, NDArray[Any]], Any],
        policy: Policy,
    ) -> None:
        self._matrix, self._read, self._policy = matrix, read, policy
        self._groups: dict[PixelFormat, list[SliceHeader]] = defaultdict(list)
        for header in slices:
            self._groups[pixel_format(header)].append(header)
        self._changes: dict[PixelFormat, dict[str, Any]] = {}
        self._decided: set[tuple[str, PixelFormat]] = set()
        self.irregularities: list[Irregularity] = []
        self.warnings: list[SeriesWarning] = []
        for declared, group in self._groups.items():
            if not declared.coded and declared.high_bit >= declared.stored:
                self._decide_bits(declared, group)
            elif self._is_sign_doubtful(declared, group):
                self._decide_sign(declared, group)

    def corrected(self, header: SliceHeader) -> SliceHeader:
        """Return the header with corrected bits, sign and padding."""
        changes = self._changes.get(pixel_format(header))
        if not changes:
            return header
        if "signed" in changes:
            bits, signed = header.bits_allocated or 16, changes["signed"]
            changes = changes | {
                "padding": pixel_value(header.padding, bits, signed),
                "padding_limit": pixel_value(header.padding_limit, bits, signed),
            }
        return header._replace(**changes)

    def settle_sign(self, header: SliceHeader, values: NDArray[Any]) -> bool:
        """Decide the sign at the first slice with negative values whose JPEG 2000 stream is unsigned.

        Return whether the header is now corrected. Slices without negative values are equal in both readings.
        """
        declared = pixel_format(header)
        group = self._groups.get(declared)
        if group is None or not (declared.signed and _sign_contradicted(declared)):
            return False
        if ("sign", declared) in self._decided or values.min() >= 0:
            return False
        self._decide_sign(declared, group)
        if declared in self._changes and declared.stored > 15:
            raise IntensityError(f"{self.irregularities[-1].what}: no type of 16 bits holds both", "sign")
        return declared in self._changes

    def check_sign(self, header: SliceHeader, low: int, high: int) -> None:
        """Raise if a slice, with the given lowest and highest value, shows that the sign is wrong.

        It is too late for a correction: slices before it may have been read with the declared sign.
        """
        if low >= 0 and high < 2 ** ((header.bits_stored or 16) - 1):
            return
        declared = pixel_format(header)
        group = self._groups.get(declared)
        if group is None or _sign_contradicted(declared) or ("sign", declared) in self._decided:
            return
        if not (_may_sign_be_wrong(declared, header) and _is_sign_evidence(declared, *self._by_both_signs(header))):
            return
        self._decided.add(("sign", declared))
        readings = self._survey(group, self._by_both_signs)
        if self._policy != "keep" and _chosen_sign(declared, readings) != 0:
            raise IntensityError(
                f"{_name_of(group)} {_sign_text(declared, readings)}, as a few slices show and others do not", "sign"
            )

    def widen(self, header: SliceHeader) -> bool:
        """Decide whether bits above *Bits Stored* belong to the values; return whether the header is now corrected.

        Slices without data in these bits are equal in both readings.
        """
        declared = pixel_format(header)
        group = self._groups.get(declared)
        if group is None or ("beyond", declared) in self._decided or declared.high_bit >= declared.stored:
            return False
        self._decided.add(("beyond", declared))
        readings = self._survey(group, self._without_and_with_bits_beyond)
        bits = declared.allocated
        changes = {"bits_stored": bits, "high_bit": bits - 1}
        if not readings.differ:  # only declared padding differs, and it is right only in whole words
            self._changes[declared] = changes
            return True
        if _all_overlay_bits(group) >> declared.stored:
            return False
        finding = f"{_name_of(group)} hold more than their {declared.stored} bits stored"
        if not declared.signed and readings.first_is_smooth is False and not readings.is_plausible(1):
            readings = self._survey(group, self._without_and_with_sign_beyond)
            if readings.is_plausible(1):
                without, signed = readings.span(0), readings.span(1)
                finding += f": values are {without} without the bits beyond, {signed} as signed numbers"
                self._reject_or_keep("sign", finding)
                return False
        lacks_extension = declared.signed and readings.max_magnitude < 2**declared.stored and not readings.sign_extended
        if lacks_extension:  # DICOM does not require sign extension
            may_be_air = readings.many_words_differ and all(map(has_no_negative_tissue, group))
            against = readings.clearly_smoother != 1 and not may_be_air
        else:
            extended = readings.sign_extended and not readings.is_one_plane_above(declared.stored)
            against = readings.clearly_smoother == 0 and not extended
        if (
            readings.first_is_smooth
            or not readings.is_plausible(1)
            or (against and (lacks_extension or readings.conclusive))
        ):
            if declared.coded:  # a code stream holds no overlay
                return False
            if not lacks_extension:
                text = f"{finding}, in bits that do not continue the image, as an overlay: they are dropped"
                self.warnings.append(SeriesWarning("bits", text))
            return False
        finding += f": without the bits beyond, values are {readings.span(0)}, with them {readings.span(1)}"
        if readings.first_is_smooth is None or against:
            self._reject_or_keep("bits", finding)
            return False
        return self._change(declared, "bits", finding, "whole words taken", changes)

    def _decide_bits(self, declared: PixelFormat, group: list[SliceHeader]) -> None:
        """Decide where the values are if *High Bit* is not *Bits Stored* − 1."""
        shift = declared.high_bit - declared.stored + 1
        statistics = BitStatistics(declared)
        for header in group:
            statistics.add(header, self._unsigned_words(header))
        if not statistics.varying:
            return
        low, high = statistics.above_is_constant, statistics.below_is_constant
        if not low and not high and _all_overlay_bits(group) % 2**shift:
            return
        if not low and not high:
            low, high = statistics.above_is_graphic, statistics.below_is_graphic
        if high and not low:
            return
        finding = (
            f"High Bit {declared.high_bit} of {_name_of(group)} puts {declared.stored} bits stored {shift} bits up"
        )
        if low and not high:
            finding += f", and the words vary in the low {declared.stored} bits"
            self._change(declared, "bits", finding, "low bits taken", {"high_bit": declared.stored - 1})
        else:
            readings = statistics.readings
            finding += f": so read, values are {readings.span(0)}; by the low bits, {readings.span(1)}"
            self._reject_or_keep("bits", finding)

    def _decide_sign(self, declared: PixelFormat, group: list[SliceHeader]) -> None:
        """Decide whether values are signed."""
        self._decided.add(("sign", declared))
        readings = self._survey(group, self._by_both_signs)
        if not readings.differ:
            return
        finding = f"{_name_of(group)} {_sign_text(declared, readings)}"
        chosen = _chosen_sign(declared, readings)
        if chosen is None:
            self._reject_or_keep("sign", finding)
        elif chosen == 1:
            done = "read as signed" if not declared.signed else "read as unsigned"
            self._change(declared, "sign", finding, done, {"signed": not declared.signed})
        elif not _sign_contradicted(declared) and _is_sign_suspicious(declared, readings):
            self.warnings.append(SeriesWarning("sign", f"{finding}; read as the header says"))

    def _change(self, declared: PixelFormat, code: str, finding: str, done: str, changes: dict[str, Any]) -> bool:
        """Correct a declared format if the policy allows it; return whether it does."""
        if self._policy == "strict":
            raise IntensityError(f"irregular, which --policy strict rejects: {finding}", code)
        if self._policy == "keep":
            self.irregularities.append(Irregularity(code, finding, "read as the header says"))
            return False
        self._changes[declared] = changes
        self.irregularities.append(Irregularity(code, finding, done))
        return True

    def _reject_or_keep(self, code: str, finding: str) -> None:
        """Raise as both readings are possible; with policy "keep", record that the header is followed."""
        if self._policy != "keep":
            raise IntensityError(f"{finding}; it is unclear which: --policy keep takes the first", code)
        self.irregularities.append(Irregularity(code, finding, "read as the header says"))

    def _unsigned_words(self, header: SliceHeader) -> NDArray[Any]:
        """Return the words of a slice, or the samples of its code stream, as unsigned numbers."""
        allocated = header.bits_allocated or 16
        bits = min(int(header.stream[1:]), allocated) if header.stream else allocated
        words = np.empty(self._matrix, f"u{allocated // 8}")
        self._read(header._replace(signed=False, bits_stored=bits, high_bit=bits - 1), words)
        return words

    def _is_sign_doubtful(self, declared: PixelFormat, group: list[SliceHeader]) -> bool:
        """Whether the sign has to be decided before slices are read, judged by a few of them."""
        if _sign_contradicted(declared):
            if not declared.signed:
                return True
        elif not any(_may_sign_be_wrong(declared, header) for header in group):
            return False
        return any(_is_sign_evidence(declared, *read_pair) for read_pair in map(self._by_both_signs, _sampled(group)))

    def _survey(self, group: list[SliceHeader], read_pair: Callable[[SliceHeader], Pair]) -> Readings:
        """Return the comparison of two readings, over a few slices if that is conclusive, else over all."""
        readings = Readings()
        for slices in (_sampled(group), group):
            readings = Readings()
            for header in slices:
                readings.add(header, *read_pair(header))
            if readings.conclusive or len(slices) == len(group):
                break
        return readings

    def _by_both_signs(self, header: SliceHeader) -> Pair:
        """Return the samples of a slice with the declared sign, and with the other one."""
        words = self._unsigned_words(header)
        stored = header.bits_stored or 16
        bits = int(header.stream[1:]) if header.stream else stored
        if bits > stored and words.max() < 2**stored:
            bits = stored
        unsigned, signed = words.astype(np.int32), signed_from(words, bits)
        return (signed, unsigned) if header.signed else (unsigned, signed)

    def _without_and_with_bits_beyond(self, header: SliceHeader) -> Pair:
        """Return the values of a slice in the declared bits, and in all bits of its words."""
        words = np.empty(self._matrix, f"{'i' if header.signed else 'u'}{(header.bits_allocated or 16) // 8}")
        self._read(with_all_bits(header), words)
        return low_bits(words, header.bits_stored or 16, bool(header.signed)), words.astype(np.int32)

    def _without_and_with_sign_beyond(self, header: SliceHeader) -> Pair:
        """Return the values of a slice in the declared bits, and in all bits of its words as signed numbers."""
        without, words = self._without_and_with_bits_beyond(header)
        return without, signed_from(words, header.bits_allocated or 16)


def _sign_contradicted(declared: PixelFormat) -> bool:
    return declared.stream is not None and (declared.stream[0] == "i") != declared.signed


def _may_sign_be_wrong(declared: PixelFormat, header: SliceHeader) -> bool:
    """Whether the pixels of a slice may show that its sign is wrong, if its code stream does not.

    Negative values that are air or lower may be large unsigned ones, if these are CT numbers. Large unsigned values may
    be negative ones, if values fill the words, or if the header has no room for air.
    """
    slope, intercept = rescale_of(header)
    if declared.signed:
        # In other words, a wrong sign shows as data above the bits stored, which `widen` handles.
        fills_words = declared.stream is None and (declared.coded or declared.stored == declared.allocated)
        highest_hu = 2 ** (declared.stored - 1) * slope + intercept
        return fills_words and has_no_negative_tissue(header) and highest_hu <= HIGHEST_HU
    lowest_hu = min(intercept, (2**declared.stored - 1) * slope + intercept)
    return declared.stored == declared.allocated == 16 or lowest_hu > NO_AIR_HU


def _is_sign_evidence(declared: PixelFormat, first: NDArray[np.int32], second: NDArray[np.int32]) -> bool:
    """Whether a slice has values that depend on the sign and are not only fill or saturated metal."""
    differ = first != second
    if _sign_contradicted(declared):
        return bool(differ.any())
    words = first[differ]
    if declared.signed:
        return np.unique(words).size >= MIN_DISTINCT_VALUES
    fits_bits_stored = declared.coded or declared.stored == declared.allocated or int(first.max()) < 2**declared.stored
    return bool(fits_bits_stored and (words != 2**declared.stored - 1).any())


def _chosen_sign(declared: PixelFormat, readings: Readings) -> int | None:
    """Return 0 if the declared sign is right, 1 if the other one is, None if the evidence is insufficient."""
    smoother = readings.smoother_reading
    if _sign_contradicted(declared):
        if smoother == 0 or (smoother == 1 and readings.is_plausible(1)):
            return smoother
        if readings.is_plausible(0) != readings.is_plausible(1):
            return int(readings.is_plausible(1))
        return None
    if not readings.is_plausible(1, LOWEST_FILL_HU):
        return 0
    if declared.signed:
        return 0 if readings.first_is_smooth or smoother is None else smoother or None
    if not readings.is_plausible(0):
        return int(smoother == 1)
    if smoother == 1 and readings.gains_air:
        return 1 if readings.conclusive else None
    return 0


def _is_sign_suspicious(declared: PixelFormat, readings: Readings) -> bool:
    """Whether the declared sign gets a warning: the evidence suffices for neither correction nor rejection."""
    inconclusive = readings.smoother_reading is None and (declared.signed or not readings.is_plausible(0))
    may_be_signed = not declared.signed and readings.gains_air and readings.is_plausible(1, LOWEST_FILL_HU)
    return inconclusive or (may_be_signed and not readings.first_is_smooth)


def _sign_text(declared: PixelFormat, readings: Readings) -> str:
    names = ("signed", "unsigned") if declared.signed else ("unsigned", "signed")
    other = f"{names[1]} by their JPEG 2000 streams" if _sign_contradicted(declared) else f"may be {names[1]} numbers"
    return f"are {names[0]} by Pixel Representation and {other}: so values are {readings.span(0)} or {readings.span(1)}"


def _sampled(group: list[SliceHeader]) -> list[SliceHeader]:
    """Return a few slices at equal distances."""
    chosen = sorted({round(n) for n in np.linspace(0, len(group) - 1, min(len(group), SAMPLED_SLICES))})
    return [group[n] for n in chosen]


def _name_of(group: list[SliceHeader]) -> str:
    return first_few([header.name for header in group], 1)
