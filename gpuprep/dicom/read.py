"""Reads the stored values of a series: plain pixels directly from the file, encoded ones with decoders."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.hu_histogram import Histogram, sampled
from gpuprep.compute.slice_summary import summary
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Irregularity, SeriesWarning, texts
from gpuprep.core.volume import StoredVolume
from gpuprep.dicom import pixel_padding
from gpuprep.dicom.decode import decode_frame, drop_unused_bits
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.elements import IMAGE_TAGS, TAGS
from gpuprep.dicom.encapsulation import Encapsulated, read_fragments
from gpuprep.dicom.header_checks import warnings as header_warnings
from gpuprep.dicom.hu_range import HuRangeCheck
from gpuprep.dicom.stack import Stack, stack
from gpuprep.dicom.stored_words import FormatCorrections, is_coded, with_all_bits
from gpuprep.dicom.uids import BIG_WORDS, DEFLATED, NATIVE
from gpuprep.errors import DecodeError, GeometryError, IntensityError
from gpuprep.files import filesystem
from gpuprep.files.bounded_reader import open_bounded

if TYPE_CHECKING:
    import pydicom


class SeriesReader:
    """Reader of the stored values of a series, in spatial order, by ranges of slices.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.
    recipe : Recipe, optional
        Its rules limit the irregularities of the series, and its `padding` says whether undeclared fill becomes air.
    loops : bool
        Whether compiled loops examine the pixels; the results are the same.
    stacked : Stack, optional
        The stack of the series by the recipe's rules, if it exists already.

    Raises
    ------
    InputError
        As `gpuprep.stack` raises. The constructor and `slab` also raise IntensityError if bits or sign of the stored
        values are ambiguous, and DecodeError, with the file's name, if pixels are unreadable or implausible.
    """

    def __init__(
        self, series: Series, recipe: Recipe | None = None, *, loops: bool = False, stacked: Stack | None = None
    ) -> None:
        recipe = recipe or Recipe()
        self.stack = stacked = stacked or stack(series, recipe.rules)
        self._pixels = PixelReader()
        self._matrix = series.rows, series.columns
        self._duplicates = stacked.duplicates
        self._policy = recipe.policy
        duplicates = tuple(header for _, header in stacked.duplicates)
        self._corrections = FormatCorrections(
            stacked.slices + duplicates, self._matrix, self._pixels.read, recipe.policy
        )
        self._slices = tuple(map(self._corrections.corrected, stacked.slices))
        self._replace_fill = recipe.padding == "air" and recipe.policy != "keep"
        self.geometry = stacked.geometry
        self.placement = stacked.placement
        # One type for all slices: 16 bits, unless signed and unsigned slices are mixed.
        smallest = np.int16 if all(s.signed for s in self._slices) else np.uint16
        self._dtype = np.result_type(smallest, *map(stored_dtype, self._slices))
        # Slices without a rescale pass the header checks only with `assume_hu`: their stored values are HU.
        self.slope = np.array([_value_or(s.rescale_slope, 1) for s in self._slices], dtype=np.float64)
        self.intercept = np.array([_value_or(s.rescale_intercept, 0) for s in self._slices], dtype=np.float64)
        self.padding, self._padding_warnings = pixel_padding.declared_padding(self._slices, self._dtype)
        self.statistics = HuStatistics()
        self.histogram = Histogram(recipe.window_hu)
        """Histogram of every n-th row and column of the slices so far, without padding and fill."""
        self.padding_voxels = 0
        """Number of padding voxels in the slices so far."""
        self.seconds = 0.0
        """Time spent in `slab`, in seconds."""
        self._loops = loops
        self._slices_by_fill_hu: dict[float, int] = {}
        self._blank = 0
        self._padded_ends: set[int] = set()
        """Slices known to be padding throughout, at either end of the stack."""
        self._hu_range = HuRangeCheck(recipe, len(self._slices) * series.rows * series.columns)

    @property
    def irregularities(self) -> tuple[Irregularity, ...]:
        """Irregularities found in the pixels so far."""
        filled = tuple(
            Irregularity(
                "padding", f"{n} slices have {hu:g} HU all around the circle, not declared as padding", "now air"
            )
            for hu, n in self._slices_by_fill_hu.items()
        )
        return tuple(self._corrections.irregularities) + filled

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """Warnings about the pixels so far."""
        blank = SeriesWarning("blank", f"{self._blank} slices hold one value throughout")
        found = self._padding_warnings + tuple(self._corrections.warnings)
        if excess := self._pixels.excess:
            name, count = next(iter(sorted(excess.items())))
            text = f"more encoded images than frames in {len(excess)} files, {count} in {name}: not read"
            found += (SeriesWarning("excess", text),)
        found += tuple(
            SeriesWarning("encapsulation", f"{fault} in {len(images)} of the images that were decoded")
            for fault, images in sorted(self._pixels.faults.items())
        )
        return found + ((blank,) if self._blank else ()) + self._hu_range.warnings

    def slab(self, start: int, stop: int, empty: Callable[[Any, Any], NDArray[Any]] = np.empty) -> NDArray[Any]:
        """Return the stored values of slices [start, stop): array of integers, shape (stop − start, j, i).

        `empty` allocates the array, given this shape and the dtype of the stored values.
        """
        started = time.perf_counter()
        stored = empty((stop - start, *self._matrix), self._dtype)
        for k, values in enumerate(stored, start):
            self._read(self.stack.slices[k], values)
            for _, duplicate in (t for t in self._duplicates if t[0] == k):
                self._confirm(k, values, duplicate)
        for k, values in enumerate(stored, start):
            self._examine(k, values)
        self.seconds += time.perf_counter() - started
        return stored

    def whole(self, before: Iterable[SeriesWarning] = ()) -> StoredVolume:
        """Return the stored values of all slices; `before` are warnings that come before those about pixels."""
        stored = self.slab(0, len(self.slope))
        return StoredVolume(
            stored,
            self.slope,
            self.intercept,
            self.padding,
            self.geometry,
            self.statistics,
            texts((*before, *self.warnings, *self.irregularities)),
            self.placement,
        )

    def _read(self, header: SliceHeader, values: NDArray[Any]) -> None:
        """Fill `values` with the stored values of an image, with corrected bits and sign."""
        corrected = self._corrections.corrected(header)
        try:
            has_bits_beyond = self._pixels.read(corrected, values)
        except DecodeError:
            if not (is_coded(corrected) and self._corrections.widen(corrected)):
                raise
            read_again = True
        else:
            read_again = has_bits_beyond and self._corrections.widen(corrected)
            read_again = read_again or self._corrections.settle_sign(corrected, values)
        if read_again:
            self._pixels.read(self._corrections.corrected(header), values)

    def _confirm(self, k: int, values: NDArray[Any], dropped: SliceHeader) -> None:
        """Raise unless an image that was dropped as a duplicate has equal pixels and rescale."""
        dtype = np.result_type(self._dtype, stored_dtype(self._corrections.corrected(dropped)))
        other = np.empty(self._matrix, dtype)
        self._read(dropped, other)
        rescale = _value_or(dropped.rescale_slope, 1), _value_or(dropped.rescale_intercept, 0)
        if not (rescale == (self.slope[k], self.intercept[k]) and np.array_equal(values, other)):
            raise GeometryError(
                f"{self._slices[k].name} and {dropped.name} share a position and differ in their pixels, but "
                "not in their headers",
                "duplicate",
            )

    def _examine(self, k: int, values: NDArray[Any]) -> None:
        """Check that the pixels of a slice are plausible, count its padding, and replace undeclared fill."""
        slope, intercept = float(self.slope[k]), float(self.intercept[k])
        declared_padding = None if self.padding is None else self.padding[k]
        low, high, total, padding_voxels = summary(values, slope, intercept, declared_padding, loops=self._loops)
        self.statistics.add(low, high, total, values.size, slope, intercept)
        self.padding_voxels += padding_voxels
        self._corrections.check_sign(self._slices[k], low, high)
        sampled_values = sampled(values).flatten()
        if low == high:
            if self._policy != "keep" and self._beside_an_image(k, low) and not self._is_padded_end(k, low):
                value = f"{low}, {low * slope + intercept:g} HU"
                raise DecodeError(
                    f"{self._slices[k].name} holds one value ({value}) throughout, unlike the slices "
                    "beside it: half-written or damaged; --policy keep accepts it",
                    "blank",
                )
            self._blank += 1
        elif self._replace_fill and (hu := pixel_padding.replace_fill(values, slope, intercept)) is not None:
            if self._policy == "strict":
                raise IntensityError(
                    f"irregular, which --policy strict rejects: {self._slices[k].name} has {hu:g} HU all around the "
                    "circle, not declared as padding",
                    "padding",
                )
            self._slices_by_fill_hu[hu] = self._slices_by_fill_hu.get(hu, 0) + 1
            sampled_values = sampled_values[sampled_values == sampled(values).flatten()]
        self.histogram.add(sampled_values, slope, intercept, declared_padding)
        self._hu_range.add(self._slices[k].name, values, (low, high), slope, intercept, declared_padding)
        self._hu_range.check(self.padding_voxels)

    def _beside_an_image(self, k: int, value: int) -> bool:
        """Whether a neighbour of a blank slice is an image with little of its value, unlike in a phantom."""
        neighbour = np.empty(self._matrix, dtype=self._dtype)
        for n in (k - 1, k + 1):
            if 0 <= n < len(self._slices):
                self._pixels.read(self._slices[n], neighbour)
                alike = neighbour[pixel_padding.circle(*self._matrix)] == value
                if neighbour.min() != neighbour.max() and alike.mean() < 0.5:
                    return True
        return False

    def _is_padded_end(self, k: int, value: int) -> bool:
        """Whether a blank slice and all slices between it and an end of the stack consist of declared padding.

        Some programs extend stacks with such slices. Between images, a slice of padding is a lost image.
        """
        if not pixel_padding.is_declared(self._slices[k], value):
            return False
        other = np.empty(self._matrix, dtype=self._dtype)
        for outward in (range(k - 1, -1, -1), range(k + 1, len(self._slices))):
            passed = {k}
            for n in outward:
                if n in self._padded_ends:
                    continue
                self._pixels.read(self._slices[n], other)
                if other.min() != other.max() or not pixel_padding.is_declared(self._slices[n], int(other[0, 0])):
                    break
                passed.add(n)
            else:
                self._padded_ends |= passed
                return True
        return False


def read(series: Series, recipe: Recipe | None = None) -> StoredVolume:
    """Return the stacked stored values of a series.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.
    recipe : Recipe, optional
        As for `SeriesReader`; `Recipe()` by default.

    Returns
    -------
    StoredVolume
        Integers of shape (k, j, i), in spatial order, with rescale and padding of each slice.

    Raises
    ------
    InputError
        As `SeriesReader` raises.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> stored = gpuprep.read(gpuprep.discover("dicom")[0])
    >>> stored.stored.shape, stored.stored.dtype.name, stored.geometry.spacing_mm
    ((12, 32, 32), 'int16', (3.0, 9.0, 9.0))
    """
    return SeriesReader(series, recipe).whole(header_warnings(series))


def _value_or(value: float | None, default: float) -> float:
    return default if value is None else value


def stored_dtype(header: SliceHeader) -> np.dtype[Any]:
    """Return the type of the words of an image."""
    order = ">" if header.transfer_syntax in BIG_WORDS else "<"
    return np.dtype(f"{order}{'i' if header.signed else 'u'}{(header.bits_allocated or 16) // 8}")


class PixelReader:
    """Reader of the pixels of single images. Data of the last file are kept for its other frames."""

    def __init__(self) -> None:
        self.faults: dict[str, set[tuple[str, str | None, int]]] = {}
        """Images read so far with a harmless violation of DICOM, by violation."""
        self._key: tuple[str, str | None] | None = None
        self._data: pydicom.Dataset | Encapsulated | io.BytesIO | None = None
        self.excess: dict[str, int] = {}
        """Number of encoded frames by file name, for files read so far that have more than they declare."""

    def read(self, header: SliceHeader, out: NDArray[Any]) -> bool:
        """Fill `out` with the stored values of an image; return whether its words have data above *Bits Stored*."""
        try:
            if filesystem.stat(header.path).st_mtime_ns != header.mtime_ns:
                raise DecodeError(f"{header.name} changed since the scan: run the same command again", "changed")
            if header.pixel_offset is not None:
                return self._read_plain(header, header.pixel_offset, out)
            coded = is_coded(header)
            source_header = header if coded else with_all_bits(header)
            faults: set[str] = set()
            rows, columns = out.shape
            values = decode_frame(self._encoded(header), source_header, header.frame, rows, columns, faults)
            for fault in faults:
                self.faults.setdefault(fault, set()).add((header.path, header.member, header.frame))
            has_bits_beyond = not coded and drop_unused_bits(header, values, header.high_bit)
            out[...] = values
            return has_bits_beyond
        except OSError as exc:
            raise DecodeError(f"{header.name} cannot be read: {exc.strerror or exc}") from exc

    def _read_plain(self, header: SliceHeader, offset: int, out: NDArray[Any]) -> bool:
        """Fill `out` with plain integers from `offset` in the file; return the same as `read`."""
        dtype = stored_dtype(header)
        direct = dtype == out.dtype and out.flags.c_contiguous
        values = out if direct else np.empty(out.shape, dtype=dtype)
        view = memoryview(values.data).cast("B")
        if header.member is None and header.transfer_syntax != DEFLATED:
            if filesystem.is_url(header.path):
                data = filesystem.fetched(header.path, offset, offset + len(view))
                bytes_read = len(data)
                view[:bytes_read] = data
            else:
                with open(header.path, "rb", buffering=0) as f:
                    bytes_read = _fill(f, offset, view)
        elif header.frames == 1:
            with _open(header) as f:
                bytes_read = _fill(inflated(f, offset + len(view))[0], offset, view)
        else:
            end = offset + (header.frames - header.frame) * len(view)
            bytes_read = _fill(self._unpacked(header, end), offset, view)
        if bytes_read < len(view):
            raise DecodeError(
                f"{header.name} ends after {bytes_read} of {len(view)} bytes of pixels: it is truncated, or changed "
                "since the scan",
                "truncated",
            )
        has_bits_beyond = drop_unused_bits(header, values, header.high_bit)
        if not direct:
            out[...] = values
        return has_bits_beyond

    def _unpacked(self, header: SliceHeader, end: int) -> io.BytesIO:
        """Return the first `end` bytes of an unpacked multi-frame file; they are kept for its other frames."""
        if self._key != (header.path, header.member) or not isinstance(self._data, io.BytesIO):
            with _open(header) as f:
                content, *_ = inflated(f, end)
                self._data = content if isinstance(content, io.BytesIO) else io.BytesIO(content.read(end))
            self._key = header.path, header.member
        return self._data

    def _encoded(self, header: SliceHeader) -> pydicom.Dataset | Encapsulated:
        """Return the fragments of a file, or its data set if pydicom has to extract the pixels."""
        if self._key != (header.path, header.member) or self._data is None or isinstance(self._data, io.BytesIO):
            try:
                with warnings.catch_warnings(), _open(header) as f:
                    warnings.simplefilter("ignore")
                    self._data = _fragments(f, header)
                    if isinstance(self._data, Encapsulated) and self._data.image_count > header.frames:
                        self.excess[header.name] = self._data.image_count
            except DecodeError as exc:
                raise DecodeError(f"{header.name} {exc}", exc.code) from exc
            except OSError:
                raise
            except Exception as exc:  # pydicom raises exceptions of many types for damaged files
                raise DecodeError(f"{header.name} cannot be read: {' '.join(str(exc).split())}") from exc
            self._key = header.path, header.member
        return self._data


_PIXEL_TAGS = [*IMAGE_TAGS.values(), TAGS["PixelData"]]
"""Tags that pydicom needs to extract native pixels."""

_ELEMENT_BYTES = 12
"""Length of tag, VR and length of encapsulated pixels, which always have an explicit VR."""


def _fragments(f: BinaryIO, header: SliceHeader) -> pydicom.Dataset | Encapsulated:
    """Return the fragments of an opened file, or its data set if its transfer syntax is native."""
    if header.encoded_offset is not None and header.transfer_syntax not in NATIVE:
        f.seek(header.encoded_offset)
        return read_fragments(f)
    import pydicom  # the import is slow, and ordinary files do not need it

    if header.transfer_syntax in NATIVE:
        return pydicom.dcmread(f, force=True, specific_tags=_PIXEL_TAGS)
    # The file has an Extended Offset Table, or the scan did not find its pixels.
    ds = pydicom.dcmread(f, force=True, specific_tags=["ExtendedOffsetTable"], stop_before_pixels=True)
    f.seek(_ELEMENT_BYTES, io.SEEK_CUR)
    return read_fragments(f, ds.get("ExtendedOffsetTable") or b"")


def _open(header: SliceHeader) -> BinaryIO:
    return open_bounded(header.path, header.member)


def _fill(f: BinaryIO | io.FileIO, offset: int, view: memoryview) -> int:
    """Read from `offset` on until `view` is full or the file ends; return the number of bytes read."""
    f.seek(offset)
    bytes_read = 0
    while bytes_read < len(view) and (count := f.readinto(view[bytes_read:])):  # type: ignore[union-attr]
        bytes_read += count
    return bytes_read
