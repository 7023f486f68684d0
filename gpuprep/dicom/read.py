"""Reads the stored integers of a series: plain pixels where the scan found them, encoded ones by decoders."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray

from gpuprep.compute.hu_histogram import Histogram, sampled
from gpuprep.compute.slice_summary import summary
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Irregularity, SeriesWarning, texts
from gpuprep.core.volume import StoredVolume
from gpuprep.dicom import pixel_padding as padded
from gpuprep.dicom.decode import decode_frame, drop_unused_bits
from gpuprep.dicom.deflate import inflated
from gpuprep.dicom.elements import IMAGE_TAGS, TAGS
from gpuprep.dicom.encapsulation import Encapsulated, read_fragments
from gpuprep.dicom.header_checks import warnings as header_warnings
from gpuprep.dicom.hu_range import Extremes
from gpuprep.dicom.stack import Stack, stack
from gpuprep.dicom.stored_words import Meaning, is_coded, whole
from gpuprep.dicom.uids import BIG_WORDS, DEFLATED, NATIVE
from gpuprep.errors import DecodeError, GeometryError, IntensityError
from gpuprep.files import filesystem
from gpuprep.files.bounded_reader import open_frugally


class SeriesReader:
    """The stored values of a series, in spatial order, read as they are asked for.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.
    recipe : Recipe, optional
        Its rules say how irregular the series may be, and its `padding` whether undeclared fill becomes air.
    loops : bool
        Whether compiled loops look at the pixels; they find the same.
    stacked : Stack, optional
        Of the series by the recipe's rules, if it is known already.

    Raises
    ------
    InputError
        As `gpuprep.stack` raises. This and `slab` raise IntensityError where words can be read in two ways and nothing
        tells which is right, and DecodeError, with the file's name, where pixels cannot be read or cannot be true.
    """

    def __init__(
        self, series: Series, recipe: Recipe | None = None, *, loops: bool = False, stacked: Stack | None = None
    ) -> None:
        recipe = recipe or Recipe()
        self.stack = stacked = stacked or stack(series, recipe.rules)
        self._content = Content()
        self._matrix = series.rows, series.columns
        self._twins = stacked.twins
        self._policy = recipe.policy
        twins = tuple(twin for _, twin in stacked.twins)
        self._meaning = Meaning(stacked.slices + twins, self._matrix, self._content.read, recipe.policy)
        self._slices = tuple(map(self._meaning.of, stacked.slices))
        self._find_fill = recipe.padding == "air" and recipe.policy != "keep"
        self.geometry = stacked.geometry
        self.placement = stacked.placement
        # One type that holds every slice: 16 bits, unless signed and unsigned ones are mixed.
        least = np.int16 if all(s.signed for s in self._slices) else np.uint16
        self._dtype = np.result_type(least, *map(_dtype, self._slices))
        # Without a rescale, which only `assume_hu` lets through, stored values are taken as they are.
        self.slope = np.array([_or(s.rescale_slope, 1) for s in self._slices], dtype=np.float64)
        self.intercept = np.array([_or(s.rescale_intercept, 0) for s in self._slices], dtype=np.float64)
        self.padding, self._doubts = padded.declared(self._slices, self._dtype)
        self.statistics = HuStatistics()
        self.histogram = Histogram(recipe.window_hu)
        """Of every n-th row and column so far, without padding and fill."""
        self.padding_voxels = 0
        """Voxels so far that are padding."""
        self.seconds = 0.0
        """Time spent in `slab`."""
        self._loops = loops
        self._fills: dict[float, int] = {}
        self._blank = 0
        self._padded_ends: set[int] = set()
        """Slices at either end of the stack that are padding throughout, as far as they were looked for."""
        self._extremes = Extremes(recipe, len(self._slices) * series.rows * series.columns)

    @property
    def irregularities(self) -> tuple[Irregularity, ...]:
        """What pixels showed so far and was put right."""
        filled = tuple(
            Irregularity(
                "padding", f"{n} slices have {hu:g} HU all around the circle, which nothing declares", "now air"
            )
            for hu, n in self._fills.items()
        )
        return tuple(self._meaning.irregularities) + filled

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """What pixels showed so far that is doubtful and was left as it is."""
        blank = SeriesWarning("blank", f"{self._blank} slices hold one value throughout")
        doubts = self._doubts + tuple(self._meaning.warnings)
        if excess := self._content.excess:
            name, count = next(iter(sorted(excess.items())))
            text = f"more encoded images than frames in {len(excess)} files, {count} in {name}: not read"
            doubts += (SeriesWarning("excess", text),)
        doubts += tuple(
            SeriesWarning("encapsulation", f"{fault} in {len(images)} of the images that were decoded")
            for fault, images in sorted(self._content.faults.items())
        )
        return doubts + ((blank,) if self._blank else ()) + self._extremes.warnings

    def slab(self, start: int, stop: int, empty: Callable[[Any, Any], NDArray[Any]] = np.empty) -> NDArray[Any]:
        """Return the stored values of slices [start, stop): array of integers, shape (stop − start, j, i).

        `empty` makes the array, of that shape and the dtype of the stored values.
        """
        started = time.perf_counter()
        stored = empty((stop - start, *self._matrix), self._dtype)
        for k, values in enumerate(stored, start):
            self._read(self.stack.slices[k], values)
            for _, twin in (t for t in self._twins if t[0] == k):
                self._confirm(k, values, twin)
        for k, values in enumerate(stored, start):
            self._examine(k, values)
        self.seconds += time.perf_counter() - started
        return stored

    def _read(self, header: SliceHeader, values: NDArray[Any]) -> None:
        """Fill `values` with the stored values of an image, as the words of the series are to be read."""
        meant = self._meaning.of(header)
        try:
            beyond = self._content.read(meant, values)
        except DecodeError:
            if not (is_coded(meant) and self._meaning.widen(meant)):
                raise
            again = True
        else:
            again = (beyond and self._meaning.widen(meant)) or self._meaning.settle_sign(meant, values)
        if again:
            self._content.read(self._meaning.of(header), values)

    def _confirm(self, k: int, values: NDArray[Any], twin: SliceHeader) -> None:
        """Raise unless an image that was dropped as a repetition is one."""
        other = np.empty(self._matrix, dtype=np.result_type(self._dtype, _dtype(self._meaning.of(twin))))
        self._read(twin, other)
        same = (_or(twin.rescale_slope, 1), _or(twin.rescale_intercept, 0)) == (self.slope[k], self.intercept[k])
        if not (same and np.array_equal(values, other)):
            raise GeometryError(
                f"{self._slices[k].name} and {twin.name} share a position and differ in their pixels, and nothing in "
                "their headers tells them apart",
                "duplicate",
            )

    def _examine(self, k: int, values: NDArray[Any]) -> None:
        """Raise unless the pixels of a slice can be an image; count its padding, and clear what nobody declared."""
        slope, intercept = float(self.slope[k]), float(self.intercept[k])
        declared = None if self.padding is None else self.padding[k]
        low, high, total, padding_voxels = summary(values, slope, intercept, declared, loops=self._loops)
        self.statistics.add(low, high, total, values.size, slope, intercept)
        self.padding_voxels += padding_voxels
        self._meaning.check_sign(self._slices[k], low, high)
        measured = sampled(values).flatten()
        if low == high:
            if self._policy != "keep" and self._beside_an_image(k, low) and not self._is_padded_end(k, low):
                value = f"{low}, {low * slope + intercept:g} HU"
                raise DecodeError(
                    f"{self._slices[k].name} holds one value ({value}) throughout, unlike the slices "
                    "beside it: half-written or damaged; --policy keep takes it",
                    "blank",
                )
            self._blank += 1
        elif self._find_fill and (hu := padded.replace_fill(values, slope, intercept)) is not None:
            if self._policy == "strict":
                raise IntensityError(
                    f"irregular, which --policy strict rejects: {self._slices[k].name} has {hu:g} HU all around the "
                    "circle, which nothing declares",
                    "padding",
                )
            self._fills[hu] = self._fills.get(hu, 0) + 1
            measured = measured[measured == sampled(values).flatten()]
        self.histogram.add(measured, slope, intercept, declared)
        self._extremes.add(self._slices[k].name, values, (low, high), slope, intercept, declared)
        self._extremes.check(self.padding_voxels)

    def _beside_an_image(self, k: int, value: int) -> bool:
        """Whether a neighbour of a blank slice is an image with little of its value: in a phantom it has much of it."""
        neighbour = np.empty(self._matrix, dtype=self._dtype)
        for n in (k - 1, k + 1):
            if 0 <= n < len(self._slices):
                self._content.read(self._slices[n], neighbour)
                alike = neighbour[padded.circle(*self._matrix)] == value
                if neighbour.min() != neighbour.max() and alike.mean() < 0.5:
                    return True
        return False

    def _is_padded_end(self, k: int, value: int) -> bool:
        """Whether a slice of one value and all slices from it to an end of the stack are declared padding throughout.

        Some programs fill up stacks so. Between images, padding stands for an image that was lost.
        """
        if not padded.is_declared(self._slices[k], value):
            return False
        other = np.empty(self._matrix, dtype=self._dtype)
        for beyond in (range(k - 1, -1, -1), range(k + 1, len(self._slices))):
            passed = {k}
            for n in beyond:
                if n in self._padded_ends:
                    continue
                self._content.read(self._slices[n], other)
                if other.min() != other.max() or not padded.is_declared(self._slices[n], int(other[0, 0])):
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
        As for `SeriesReader`; the default recipe where absent.

    Returns
    -------
    StoredVolume
        Integers of shape (k, j, i), in spatial order, with each slice's rescale and padding.

    Raises
    ------
    InputError
        As `gpuprep.stack` raises; and DecodeError, with the file's name, where pixels cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> stored = gpuprep.read(gpuprep.discover("dicom")[0])
    >>> stored.stored.shape, stored.stored.dtype.name, stored.geometry.spacing_mm
    ((12, 32, 32), 'int16', (3.0, 9.0, 9.0))
    """
    reader = SeriesReader(series, recipe)
    stored = reader.slab(0, len(reader.slope))
    return StoredVolume(
        stored,
        reader.slope,
        reader.intercept,
        reader.padding,
        reader.geometry,
        reader.statistics,
        texts((*header_warnings(series), *reader.warnings, *reader.irregularities)),
        reader.placement,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _dtype(header: SliceHeader) -> np.dtype[Any]:
    order = ">" if header.transfer_syntax in BIG_WORDS else "<"
    return np.dtype(f"{order}{'i' if header.signed else 'u'}{(header.bits_allocated or 16) // 8}")


class Content:
    """The pixels of one image after the other; a file of many frames is unpacked and parsed once."""

    def __init__(self) -> None:
        self.faults: dict[str, set[tuple[str, str | None, int]]] = {}
        """Images so far whose pixels are not encapsulated as DICOM demands, by what is wrong, which did not matter."""
        self._key: tuple[str, str | None] | None = None
        self._data: pydicom.Dataset | Encapsulated | io.BytesIO | None = None
        self.excess: dict[str, int] = {}
        """Files so far with more encoded frames than they announce, by name, and how many they have."""

    def read(self, header: SliceHeader, out: NDArray[Any]) -> bool:
        """Fill `out` with the stored values of an image; return whether its words hold more, above the bits stored."""
        try:
            if filesystem.stat(header.path).st_mtime_ns != header.mtime_ns:
                raise DecodeError(f"{header.name} changed since the scan: run the same command again", "changed")
            if header.pixel_offset is not None:
                return self._read_plain(header, header.pixel_offset, out)
            coded = is_coded(header)
            said = header if coded else whole(header)
            faults: set[str] = set()
            rows, columns = out.shape
            values = decode_frame(self._encoded(header), said, header.frame, rows, columns, faults)
            for fault in faults:
                self.faults.setdefault(fault, set()).add((header.path, header.member, header.frame))
            beyond = not coded and drop_unused_bits(header, values, header.high_bit)
            out[...] = values
            return beyond
        except OSError as exc:
            raise DecodeError(f"{header.name} cannot be read: {exc.strerror or exc}") from exc

    def _read_plain(self, header: SliceHeader, offset: int, out: NDArray[Any]) -> bool:
        """Fill `out` with the integers that lie in the file at the offset the scan found; return what `read` does."""
        dtype = _dtype(header)
        direct = dtype == out.dtype and out.flags.c_contiguous
        values = out if direct else np.empty(out.shape, dtype=dtype)
        view = memoryview(values.data).cast("B")
        if header.member is None and header.transfer_syntax != DEFLATED:
            if filesystem.is_url(header.path):
                data = filesystem.fetched(header.path, offset, offset + len(view))
                done = len(data)
                view[:done] = data
            else:
                with open(header.path, "rb", buffering=0) as f:
                    done = _fill(f, offset, view)
        elif header.frames == 1:
            with _open(header) as f:
                done = _fill(inflated(f, offset + len(view))[0], offset, view)
        else:
            end = offset + (header.frames - header.frame) * len(view)
            done = _fill(self._unpacked(header, end), offset, view)
        if done < len(view):
            raise DecodeError(
                f"{header.name} ends after {done} of {len(view)} bytes of pixels: it is truncated, or changed since "
                "the scan",
                "truncated",
            )
        beyond = drop_unused_bits(header, values, header.high_bit)
        if not direct:
            out[...] = values
        return beyond

    def _unpacked(self, header: SliceHeader, end: int) -> io.BytesIO:
        """Return the first `end` bytes of a packed file of many frames, which may be asked for in any order."""
        if self._key != (header.path, header.member) or not isinstance(self._data, io.BytesIO):
            with _open(header) as f:
                content, *_ = inflated(f, end)
                self._data = content if isinstance(content, io.BytesIO) else io.BytesIO(content.read(end))
            self._key = header.path, header.member
        return self._data

    def _encoded(self, header: SliceHeader) -> pydicom.Dataset | Encapsulated:
        """Return the encoded pixels of a file, or all of it where pydicom is to find them."""
        if self._key != (header.path, header.member) or not isinstance(self._data, pydicom.Dataset | Encapsulated):
            try:
                with warnings.catch_warnings(), _open(header) as f:
                    warnings.simplefilter("ignore")
                    self._data = _fragments(f, header)
                    if isinstance(self._data, Encapsulated) and self._data.images > header.frames:
                        self.excess[header.name] = self._data.images
            except DecodeError as exc:
                raise DecodeError(f"{header.name} {exc}", exc.code) from exc
            except OSError:
                raise
            except Exception as exc:  # pydicom raises whatever a broken file provokes
                raise DecodeError(f"{header.name} cannot be read: {' '.join(str(exc).split())}") from exc
            self._key = header.path, header.member
        return self._data


def are_copies(pairs: Sequence[tuple[SliceHeader, SliceHeader]], matrix: tuple[int, int]) -> bool:
    """Whether the images of every pair have equal stored values and rescale; not, where one cannot be read.

    Parameters
    ----------
    pairs : sequence of (SliceHeader, SliceHeader)
        Images that `gpuprep.dicom.header_checks.check` lets through. Those in the middle are read first, for first
        and last slices may be air in both.
    matrix : tuple of int
        Their rows and columns.
    """
    contents = Content(), Content()
    middle = len(pairs) // 2
    for pair in (*pairs[middle:], *pairs[:middle]):
        one, other = pair
        if (one.rescale_slope, one.rescale_intercept) != (other.rescale_slope, other.rescale_intercept):
            return False
        values = [np.empty(matrix, dtype=_dtype(header)) for header in pair]
        try:
            for content, header, out in zip(contents, pair, values, strict=True):
                content.read(header, out)
        except DecodeError:
            return False
        if not np.array_equal(values[0], values[1]):
            return False
    return True


_PIXEL_TAGS = [*IMAGE_TAGS.values(), TAGS["PixelData"]]
"""Everything that pydicom may need to find native pixels: the header's facts, and the pixels."""

_ELEMENT_BYTES = 12
"""Tag, VR and length before encapsulated pixels, which never have an implicit VR."""


def _fragments(f: BinaryIO, header: SliceHeader) -> pydicom.Dataset | Encapsulated:
    """Return the fragments of an opened file, or its data set where its transfer syntax has none."""
    if header.transfer_syntax in NATIVE:
        return pydicom.dcmread(f, force=True, specific_tags=_PIXEL_TAGS)
    if header.encoded_offset is not None:
        f.seek(header.encoded_offset)
        return read_fragments(f)
    # With a table of other offsets before the pixels, or with pixels that the scan did not find.
    ds = pydicom.dcmread(f, force=True, specific_tags=["ExtendedOffsetTable"], stop_before_pixels=True)
    f.seek(_ELEMENT_BYTES, io.SEEK_CUR)
    return read_fragments(f, ds.get("ExtendedOffsetTable") or b"")


def _open(header: SliceHeader) -> BinaryIO:
    return open_frugally(header.path, header.member)


def _fill(f: BinaryIO | io.FileIO, offset: int, view: memoryview) -> int:
    """Read from `offset` on until `view` is full or the file ends; return the bytes read."""
    f.seek(offset)
    done = 0
    while done < len(view) and (count := f.readinto(view[done:])):  # type: ignore[union-attr]
        done += count
    return done
