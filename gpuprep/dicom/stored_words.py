"""Decides which bits of stored words hold the value, and which sign it has, where headers leave doubt.

Slices are read as their headers say. Where something speaks against that, there are two readings of the same words,
and the pixels decide: neighbours differ little in the right reading, and by a power of two in the wrong one. All slices
whose headers say the same are read alike.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few
from gpuprep.core.hounsfield import HIGHEST_HU
from gpuprep.core.series import SliceHeader
from gpuprep.core.stacking_rules import Irregularity, Policy, SeriesWarning
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.header_values import pixel_value
from gpuprep.dicom.headers import HEADER_BYTES
from gpuprep.dicom.uids import ENCODINGS
from gpuprep.dicom.word_evidence import (
    FEW_VALUES,
    Bits,
    Claim,
    Pair,
    Readings,
    has_no_negative_tissue,
    low_bits,
    rescale_of,
    signed_from,
)
from gpuprep.errors import DecodeError, IntensityError
from gpuprep.files.bounded_reader import open_frugally

LOWEST_FILL_HU = -4096.0
"""Values whose sign every header and stream denies are believed down to here: fill of scanners is −2048 or −3024 HU."""

LOOKED_AT = 5
"""Slices, at equal distances, that are looked at before all are."""


NO_AIR_HU = -500.0
"""A header whose lowest value lies above this HU leaves no room for lung and air."""


def claim(header: SliceHeader) -> Claim:
    """Return what the header of a slice says of its words."""
    allocated = header.bits_allocated or 16
    stored = header.bits_stored or allocated
    high = header.high_bit
    if high is None or not stored - 1 <= high < allocated:
        high = stored - 1
    return Claim(is_coded(header), allocated, stored, high, bool(header.signed), header.stream)


def is_coded(header: SliceHeader) -> bool:
    """Whether the pixels of a slice are a code stream, and not words or their bytes, packed or not."""
    return header.pixel_offset is None and ENCODINGS.get(header.transfer_syntax, "none") not in (
        "none",
        "deflate",
        "RLE",
    )


def whole(header: SliceHeader) -> SliceHeader:
    """Return a header that says that all bits of its words are stored."""
    bits = header.bits_allocated or 16
    return header._replace(bits_stored=bits, high_bit=bits - 1)


def overlay_bits(header: SliceHeader) -> int:
    """Return the bits of the words of a slice in which its file says that overlays lie.

    References
    ----------
    DICOM PS3.3-2004, C.9.2 (Overlay Plane module): *Overlay Bits Allocated*, *Overlay Bit Position*; retired since.
    """
    allocated, position = ([(0x6000 + 2 * n) << 16 | element for n in range(16)] for element in (0x0100, 0x0102))
    try:
        with warnings.catch_warnings(), open_frugally(header.path, header.member) as f:
            warnings.simplefilter("ignore")
            content, *_ = inflated(f, HEADER_BYTES)
            ds = pydicom.dcmread(content, force=True, stop_before_pixels=True, specific_tags=[*allocated, *position])
            within = [p for a, p in zip(allocated, position, strict=True) if p in ds and a in ds and ds[a].value > 1]
            return sum({1 << int(ds[p].value) for p in within})
    except Exception as exc:  # pydicom raises whatever a broken file provokes
        raise DecodeError(f"{header.name} cannot be read: {' '.join(str(exc).split())}") from exc


def _all_overlay_bits(group: list[SliceHeader]) -> int:
    """Return the bits in which any file of some slices says that overlays lie."""
    files = {(header.path, header.member): header for header in group}
    return reduce(or_, map(overlay_bits, files.values()), 0)


class Meaning:
    """How the words of a series are read.

    Parameters
    ----------
    slices : tuple of SliceHeader
        In any order.
    matrix : tuple of int
        Rows and columns.
    read : callable
        ``read(header, out)`` fills an array with the stored values of a slice.
    policy : {"fix", "strict", "keep"}
        With "keep", words are read as headers say, whatever speaks against that.

    Raises
    ------
    IntensityError
        Where two readings are possible and nothing tells which is right, or with policy "strict" where the headers' own
        is wrong.
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
        self._groups: dict[Claim, list[SliceHeader]] = defaultdict(list)
        for header in slices:
            self._groups[claim(header)].append(header)
        self._changes: dict[Claim, dict[str, Any]] = {}
        self._settled: set[tuple[str, Claim]] = set()
        self.irregularities: list[Irregularity] = []
        self.warnings: list[SeriesWarning] = []
        for said, group in self._groups.items():
            if not said.coded and said.high_bit >= said.stored:
                self._decide_bits(said, group)
            elif self._is_sign_doubtful(said, group):
                self._decide_sign(said, group)

    def of(self, header: SliceHeader) -> SliceHeader:
        """Return a header that says how its words are to be read."""
        changes = self._changes.get(claim(header))
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
        """Settle the sign of the first slice that has values below 0, where its stream denies that it has a sign.

        Return whether its header now reads otherwise. Slices without such values are the same either way.
        """
        said = claim(header)
        group = self._groups.get(said)
        if group is None or not (said.signed and _sign_contradicted(said)) or ("sign", said) in self._settled:
            return False
        if values.min() >= 0:
            return False
        self._decide_sign(said, group)
        if said in self._changes and said.stored > 15:
            raise IntensityError(f"{self.irregularities[-1].what}: no type of 16 bits holds both", "sign")
        return said in self._changes

    def check_sign(self, header: SliceHeader, low: int, high: int) -> None:
        """Raise if a slice, of these ends, shows that the sign was taken wrongly.

        Its neighbours, which may have been read before it, had no value that the sign changes.
        """
        if low >= 0 and high < 2 ** ((header.bits_stored or 16) - 1):
            return
        said = claim(header)
        group = self._groups.get(said)
        if group is None or _sign_contradicted(said) or ("sign", said) in self._settled:
            return
        if not (_sign_deniable(said, header) and _speaks(said, *self._by_both_signs(header))):
            return
        self._settled.add(("sign", said))
        found = self._survey(group, self._by_both_signs)
        if self._policy != "keep" and _sign(said, found) != 0:
            raise IntensityError(
                f"{_named(group)} {_signs(said, found)}, as a few slices show and others do not", "sign"
            )

    def widen(self, header: SliceHeader) -> bool:
        """Settle what lies beyond *Bits Stored* in a slice; return whether its header now reads otherwise.

        Slices that hold nothing there are the same either way.
        """
        said = claim(header)
        group = self._groups.get(said)
        if group is None or ("beyond", said) in self._settled or said.high_bit >= said.stored:
            return False
        self._settled.add(("beyond", said))
        found = self._survey(group, self._without_and_with_bits_beyond)
        bits = said.allocated
        changes = {"bits_stored": bits, "high_bit": bits - 1}
        if not found.differ:  # but for declared padding, which is itself in whole words only
            self._changes[said] = changes
            return True
        if _all_overlay_bits(group) >> said.stored:
            return False
        what = f"{_named(group)} hold more than their {said.stored} bits stored"
        if not said.signed and found.undisturbed is False and not found.possible(1):
            found = self._survey(group, self._without_and_with_sign_beyond)
            if found.possible(1):
                what += f": values are {found.span(0)} without the bits beyond, {found.span(1)} as signed numbers"
                self._leave("sign", what)
                return False
        unextended = said.signed and found.top < 2**said.stored and not found.extended
        if unextended:  # as DICOM allows
            against = found.agreed != 1 and not (found.varied and all(map(has_no_negative_tissue, group)))
        else:
            against = found.agreed == 0 and not (found.extended and not found.is_one_plane_above(said.stored))
        if found.undisturbed or not found.possible(1) or (against and (unextended or found.settled)):
            if said.coded:  # nothing but the image is in a code stream
                return False
            if not unextended:
                text = f"{what}, in bits that do not continue the image, as an overlay: they are dropped"
                self.warnings.append(SeriesWarning("bits", text))
            return False
        what += f": without the bits beyond, values are {found.span(0)}, with them {found.span(1)}"
        if found.undisturbed is None or against:
            self._leave("bits", what)
            return False
        return self._change(said, "bits", what, "whole words taken", changes)

    def _decide_bits(self, said: Claim, group: list[SliceHeader]) -> None:
        """Settle where values lie whose topmost bit is said to lie higher than they are long."""
        shift = said.high_bit - said.stored + 1
        look = Bits(said)
        for header in group:
            look.add(header, self._raw(header))
        if not look.varying:
            return
        low, high = look.above_is_constant, look.below_is_constant
        if not low and not high and _all_overlay_bits(group) % 2**shift:
            return
        if not low and not high:
            low, high = look.above_is_graphic, look.below_is_graphic
        if high and not low:
            return
        what = f"High Bit {said.high_bit} of {_named(group)} puts {said.stored} bits stored {shift} bits up"
        if low and not high:
            what += f", and the words vary in the low {said.stored} bits"
            self._change(said, "bits", what, "low bits taken", {"high_bit": said.stored - 1})
        else:
            what += f": so read, values are {look.readings.span(0)}; by the low bits, {look.readings.span(1)}"
            self._leave("bits", what)

    def _decide_sign(self, said: Claim, group: list[SliceHeader]) -> None:
        """Settle whether values are signed."""
        self._settled.add(("sign", said))
        found = self._survey(group, self._by_both_signs)
        if not found.differ:
            return
        what = f"{_named(group)} {_signs(said, found)}"
        taken = _sign(said, found)
        if taken is None:
            self._leave("sign", what)
        elif taken == 1:
            done = "read as signed" if not said.signed else "read as unsigned"
            self._change(said, "sign", what, done, {"signed": not said.signed})
        elif not _sign_contradicted(said) and _is_strange(said, found):
            self.warnings.append(SeriesWarning("sign", f"{what}; read as the header says"))

    def _change(self, said: Claim, code: str, what: str, done: str, changes: dict[str, Any]) -> bool:
        """Have slices read otherwise than they say, if the policy lets them be; return whether it does."""
        if self._policy == "strict":
            raise IntensityError(f"irregular, which --policy strict rejects: {what}", code)
        if self._policy == "keep":
            self.irregularities.append(Irregularity(code, what, "read as the header says"))
            return False
        self._changes[said] = changes
        self.irregularities.append(Irregularity(code, what, done))
        return True

    def _leave(self, code: str, what: str) -> None:
        """Raise where nothing tells which of two readings is right, unless words are read as headers say anyway."""
        if self._policy != "keep":
            raise IntensityError(f"{what}; nothing tells which: --policy keep takes the first", code)
        self.irregularities.append(Irregularity(code, what, "read as the header says"))

    def _raw(self, header: SliceHeader) -> NDArray[Any]:
        """Return the words of a slice, or the samples of its code stream, without sign."""
        allocated = header.bits_allocated or 16
        bits = min(int(header.stream[1:]), allocated) if header.stream else allocated
        words = np.empty(self._matrix, f"u{allocated // 8}")
        self._read(header._replace(signed=False, bits_stored=bits, high_bit=bits - 1), words)
        return words

    def _is_sign_doubtful(self, said: Claim, group: list[SliceHeader]) -> bool:
        """Whether the sign of slices has to be settled before any of them is read, by a look at a few."""
        if _sign_contradicted(said):
            if not said.signed:
                return True
        elif not any(_sign_deniable(said, header) for header in group):
            return False
        return any(_speaks(said, *both) for both in map(self._by_both_signs, _some(group)))

    def _survey(self, group: list[SliceHeader], both: Callable[[SliceHeader], Pair]) -> Readings:
        """Return how two readings compare, from a few slices if that settles it, else from all."""
        found = Readings()
        for slices in (_some(group), group):
            found = Readings()
            for header in slices:
                found.add(header, *both(header))
            if found.settled or len(slices) == len(group):
                break
        return found

    def _by_both_signs(self, header: SliceHeader) -> Pair:
        """Return the samples of a slice as its header says, and with the other sign."""
        words = self._raw(header)
        stored = header.bits_stored or 16
        bits = int(header.stream[1:]) if header.stream else stored
        if bits > stored and words.max() < 2**stored:
            bits = stored
        unsigned, signed = words.astype(np.int32), signed_from(words, bits)
        return (signed, unsigned) if header.signed else (unsigned, signed)

    def _without_and_with_bits_beyond(self, header: SliceHeader) -> Pair:
        """Return the words of a slice as its header says, and with all their bits."""
        words = np.empty(self._matrix, f"{'i' if header.signed else 'u'}{(header.bits_allocated or 16) // 8}")
        self._read(whole(header), words)
        return low_bits(words, header.bits_stored or 16, bool(header.signed)), words.astype(np.int32)

    def _without_and_with_sign_beyond(self, header: SliceHeader) -> Pair:
        """Return the words of a slice as its header says, and with all their bits as signed numbers."""
        without, words = self._without_and_with_bits_beyond(header)
        return without, signed_from(words, header.bits_allocated or 16)


def _sign_contradicted(said: Claim) -> bool:
    return said.stream is not None and (said.stream[0] == "i") != said.signed


def _sign_deniable(said: Claim, header: SliceHeader) -> bool:
    """Whether the pixels of a slice may show that its sign is wrong, which no code stream denies.

    Negative values that would be air or lower may be large ones, if those are CT numbers. Large values may be negative
    ones, if they fill the words or if the header leaves no room for air.
    """
    slope, intercept = rescale_of(header)
    if said.signed:
        # Other words hold more than their bits stored, if they are wrong.
        whole = said.stream is None and (said.coded or said.stored == said.allocated)
        return whole and has_no_negative_tissue(header) and 2 ** (said.stored - 1) * slope + intercept <= HIGHEST_HU
    lowest_hu = min(intercept, (2**said.stored - 1) * slope + intercept)
    return said.stored == said.allocated == 16 or lowest_hu > NO_AIR_HU


def _speaks(said: Claim, first: NDArray[np.int32], second: NDArray[np.int32]) -> bool:
    """Whether a slice holds values that differ by the sign, and are more than fill or saturated metal."""
    differ = first != second
    if _sign_contradicted(said):
        return bool(differ.any())
    words = first[differ]
    if said.signed:
        return np.unique(words).size >= FEW_VALUES
    fits = said.coded or said.stored == said.allocated or int(first.max()) < 2**said.stored
    return bool(fits and (words != 2**said.stored - 1).any())


def _sign(said: Claim, found: Readings) -> int | None:
    """Return which sign is right: 0 for that of the header, 1 for the other, None where nothing tells."""
    favours = found.favours
    if _sign_contradicted(said):
        if favours == 0 or (favours == 1 and found.possible(1)):
            return favours
        if found.possible(0) != found.possible(1):
            return int(found.possible(1))
        return None
    if not found.possible(1, LOWEST_FILL_HU):
        return 0
    if said.signed:
        return 0 if found.undisturbed or favours is None else favours or None
    if not found.possible(0):
        return int(favours == 1)
    if favours == 1 and found.airy:
        return 1 if found.settled else None
    return 0


def _is_strange(said: Claim, found: Readings) -> bool:
    """Whether values are doubtful with the sign of the header, though not so much as to take the other or to refuse."""
    unsettled = found.favours is None and (said.signed or not found.possible(0))
    return unsettled or (not said.signed and found.airy and not found.undisturbed and found.possible(1, LOWEST_FILL_HU))


def _signs(said: Claim, found: Readings) -> str:
    names = ("signed", "unsigned") if said.signed else ("unsigned", "signed")
    by = f"and {names[1]} by their JPEG 2000 streams" if _sign_contradicted(said) else f"and may be {names[1]} numbers"
    return f"are {names[0]} by Pixel Representation {by}: so values are {found.span(0)} or {found.span(1)}"


def _some(group: list[SliceHeader]) -> list[SliceHeader]:
    """Return a few slices at equal distances."""
    chosen = sorted({round(n) for n in np.linspace(0, len(group) - 1, min(len(group), LOOKED_AT))})
    return [group[n] for n in chosen]


def _named(group: list[SliceHeader]) -> str:
    return first_few([header.name for header in group], 1)
