"""Series to stored integers: plain pixels are read where the scan found them, encoded ones are decoded."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, RLELossless

from gpuprep.codestream import frame_size
from gpuprep.errors import DecodeError
from gpuprep.intensity import LOWEST_HU, TISSUE_HU, HuStatistics
from gpuprep.series import Series, SliceHeader
from gpuprep.stacking import stack
from gpuprep.volume import StoredVolume


class SeriesReader:
    """The stored values of a series, in spatial order, read as they are asked for.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.

    Raises
    ------
    InputError
        As `gpuprep.stack` raises. `slab` raises DecodeError, with the file's name, where pixels cannot be read.
    """

    def __init__(self, series: Series) -> None:
        stacked = stack(series)
        self._slices = stacked.slices
        self.geometry = stacked.geometry
        # One type that holds every slice: 16 bits, unless signed and unsigned ones are mixed.
        least = np.int16 if all(s.signed for s in self._slices) else np.uint16
        self._dtype = np.result_type(least, *map(_dtype, self._slices))
        self.slope = np.array([s.rescale_slope for s in self._slices], dtype=np.float64)
        self.intercept = np.array([s.rescale_intercept for s in self._slices], dtype=np.float64)
        self.padding, self.warnings = _padding(self._slices, self._dtype)
        self.statistics = HuStatistics()
        self.seconds = 0.0
        """Time spent in `slab`."""

    def slab(self, start: int, stop: int) -> NDArray[Any]:
        """Return the stored values of slices [start, stop): array of integers, shape (stop − start, j, i)."""
        started = time.perf_counter()
        rows, columns = self.geometry.shape[1:]
        stored = np.empty((stop - start, rows, columns), dtype=self._dtype)
        for values, header in zip(stored, self._slices[start:stop], strict=True):
            if header.pixel_offset is not None:
                _read_plain(header, values)
            else:
                values[...] = _decode(header, rows, columns)
        self.statistics.add(stored, self.slope[start:stop], self.intercept[start:stop])
        self.seconds += time.perf_counter() - started
        return stored


def read(series: Series) -> StoredVolume:
    """Return the stacked stored values of a series.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.

    Returns
    -------
    StoredVolume
        Integers of shape (k, j, i), in spatial order, with each slice's rescale and padding.

    Raises
    ------
    InputError
        As `gpuprep.stack` raises; and DecodeError, with the file's name, where pixels cannot be read.
    """
    reader = SeriesReader(series)
    stored = reader.slab(0, reader.geometry.shape[0])
    return StoredVolume(
        stored, reader.slope, reader.intercept, reader.padding, reader.geometry, reader.statistics, reader.warnings
    )


def _dtype(header: SliceHeader) -> np.dtype[Any]:
    return np.dtype(f"<{'i' if header.signed else 'u'}{(header.bits_allocated or 16) // 8}")


def _read_plain(header: SliceHeader, out: NDArray[Any]) -> None:
    """Fill `out` with the little-endian integers that lie in the file at the offset the scan found."""
    dtype = _dtype(header)
    need = out.size * dtype.itemsize
    direct = dtype == out.dtype and out.flags.c_contiguous
    values = out if direct else np.empty(out.shape, dtype=dtype)
    try:
        with open(header.path, "rb", buffering=0) as f:
            f.seek(header.pixel_offset or 0)
            view = memoryview(values.data).cast("B")
            done = 0
            while done < need and (count := f.readinto(view[done:])):
                done += count
    except OSError as exc:
        raise DecodeError(f"{header.name} cannot be read: {exc.strerror}") from exc
    if done < need:
        raise DecodeError(f"{header.name} ends after {done} of {need} bytes of pixels: it changed since the scan")
    _drop_unused_bits(header, values, header.high_bit)
    if not direct:
        out[...] = values


PREFERRED_DECODERS = ("pyjpegls", "pylibjpeg", "pydicom", "pillow")
LAST_DECODER = "gdcm"
"""Used only where there is no other: what the others report as an error, it answers by ending the process."""


def _decode(header: SliceHeader, rows: int, columns: int) -> NDArray[Any]:
    """Return the pixels of an encoded file by the first decoder that manages."""
    syntax = UID(header.transfer_syntax)
    reasons = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(header.path, force=True)
            if "TransferSyntaxUID" not in ds.file_meta:
                ds.file_meta.TransferSyntaxUID = syntax
            if syntax.is_encapsulated:
                size = frame_size(next(generate_frames(ds.PixelData, number_of_frames=1)))
                if size is not None and size != (rows, columns, 1):
                    raise DecodeError(
                        f"its frame is {size[0]} × {size[1]} × {size[2]}, its header says {rows} × {columns}"
                    )
            for plugin in _plugins(syntax):
                try:
                    values = np.array(pixel_array(ds, raw=True, correct_unused_bits=False, decoding_plugin=plugin))
                    break
                except Exception as exc:  # decoders raise whatever a broken stream provokes
                    reasons.append(f"{plugin or 'pydicom'}: {_one_line(exc)}")
            else:
                raise DecodeError("; ".join(reasons))
    except Exception as exc:  # and so does a broken file
        raise DecodeError(f"{header.name} ({syntax.name}) cannot be decoded: {_one_line(exc)}") from exc
    if values.shape != (rows, columns):
        raise DecodeError(f"{header.name} decodes to {values.shape}, but its header says {rows} × {columns}")
    # A JPEG holds the stored bits alone; anything else whole words, with High Bit where the header says.
    whole_words = syntax == RLELossless or not syntax.is_encapsulated
    _drop_unused_bits(header, values, header.high_bit if whole_words else None)
    return values


def _plugins(syntax: UID) -> list[str]:
    """Return the decoders to try, in order; "" for pydicom's own of syntaxes without plugins."""
    available = get_decoder(syntax).available_plugins
    return sorted((p for p in available if p != LAST_DECODER), key=_preference) or [*available] or [""]


def _preference(plugin: str) -> int:
    return PREFERRED_DECODERS.index(plugin) if plugin in PREFERRED_DECODERS else -1


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _drop_unused_bits(header: SliceHeader, values: NDArray[Any], high_bit: int | None) -> None:
    """Keep *Bits Stored* bits below *High Bit*, in place: others may hold an old overlay, and no sign.

    References
    ----------
    DICOM PS3.5, 8.1.1 (Pixel Data Encoding of Related Data Elements).
    """
    allocated = values.dtype.itemsize * 8
    kept = header.bits_stored or allocated
    top = kept - 1 if high_bit is None or not kept - 1 <= high_bit < allocated else high_bit
    if kept < allocated:
        values <<= allocated - 1 - top
        values >>= allocated - kept  # arithmetic where signed: the sign is carried along


def _padding(slices: tuple[SliceHeader, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
    """Return the declared padding of each slice as (lowest, highest), and what was not believed."""
    limits = np.iinfo(dtype)
    padding = np.tile(np.array([limits.max, limits.min], dtype=dtype), (len(slices), 1))
    doubted: list[tuple[int, list[float]]] = []
    for k, s in enumerate(slices):
        if s.padding is None:
            continue
        low, high = sorted((s.padding, s.padding if s.padding_limit is None else s.padding_limit))
        hu = sorted(v * (s.rescale_slope or 1) + (s.rescale_intercept or 0) for v in (low, high))
        if hu[0] <= TISSUE_HU[1] and hu[1] >= TISSUE_HU[0]:
            doubted.append((s.padding, hu))
        elif hu[1] >= LOWEST_HU and limits.min <= low and high <= limits.max:  # what is lower becomes air anyway
            padding[k] = low, high
    notes: tuple[str, ...] = ()
    if doubted:
        value, (hu_low, hu_high) = doubted[0]
        span = f"{hu_low:g} HU" if hu_low == hu_high else f"{hu_low:g} to {hu_high:g} HU with its range limit"
        notes = (
            f"Pixel Padding Value {value} is {span}, which tissue has, in {len(doubted)} slices: it is "
            "not treated as padding",
        )
    return (padding if (padding[:, 0] <= padding[:, 1]).any() else None), notes
