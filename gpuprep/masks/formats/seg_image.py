"""Checks the header of a segmentation image (SEG) and decodes its frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.deflate import inflated_frame
from gpuprep.dicom.encapsulation import fragments_of
from gpuprep.dicom.uids import ENCODINGS, UNDEFINED_LENGTH, syntax_name
from gpuprep.errors import DecodeError, SegmentationError
from gpuprep.masks.formats.segmentation_values import binary, integer, raw, text

if TYPE_CHECKING:
    import pydicom


BITS = {"BINARY": (1, 8), "FRACTIONAL": (8, 16), "LABELMAP": (8, 16)}
"""Accepted *Bits Allocated* by *Segmentation Type*. The standard allows only 1 for BINARY and 8 for FRACTIONAL."""


MOST_PIXELS = 2**26
"""Limit of the pixels of a frame: 8192 × 8192. A code stream of a few bytes can announce any size."""


MOST_PAINTED = 2**32
"""Limit of the pixels in the bounding rectangles of all frames together; each pixel takes a byte."""


@dataclass(frozen=True, slots=True)
class SegImage:
    """Pixel description in the header of a segmentation image."""

    path: str
    type: str
    rows: int
    columns: int
    bits: int
    frames: int
    encapsulated: bool
    syntax: str

    @staticmethod
    def of(ds: pydicom.Dataset, path: str) -> SegImage:
        """Return the pixel description of a data set, checked before memory is allocated for pixels."""
        kind = text(ds, "SegmentationType").upper()
        if kind not in BITS:
            raise SegmentationError(f"its Segmentation Type is {quoted(kind)}, not one of {', '.join(BITS)}")
        if text(ds, "DimensionOrganizationType").upper().startswith("TILED"):
            raise SegmentationError("it consists of tiles, as in microscopy: only whole slices can be read")
        rows, columns, bits = (binary(ds, k) or 0 for k in ("Rows", "Columns", "BitsAllocated"))
        frames = 1 if (count := integer(ds, "NumberOfFrames")) is None else count
        if not 1 <= rows * columns <= MOST_PIXELS or frames < 1:
            raise SegmentationError(f"the header announces {frames} frames of {rows} × {columns} pixels: it is damaged")
        if (binary(ds, "SamplesPerPixel") or 1) != 1 or bits not in BITS[kind]:
            raise SegmentationError(
                f"its pixels have {binary(ds, 'SamplesPerPixel')} samples of {bits} bits: {kind} needs one sample of "
                f"{' or '.join(map(str, BITS[kind]))} bits"
            )
        pixels = ds.get_item(0x7FE0_0010)
        if pixels is None or not isinstance(raw(ds, "PixelData"), bytes):
            raise SegmentationError("it has no Pixel Data: the file is cut short; get a whole copy")
        encapsulated = getattr(pixels, "length", None) == UNDEFINED_LENGTH
        return SegImage(path, kind, rows, columns, bits, frames, encapsulated, text(ds.file_meta, "TransferSyntaxUID"))

    def decoded(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        """Yield the values of one frame after the other, shape (rows, columns)."""
        return self._encapsulated(ds) if self.encapsulated else self._native(ds)

    def _native(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        data = raw(ds, "PixelData")
        size = self.rows * self.columns
        need = -(-size * self.frames * self.bits // 8)
        if not need <= len(data) <= need + 1:
            raise SegmentationError(
                f"its pixels have {len(data)} bytes, and {self.frames} frames of {self.rows} × {self.columns} in "
                f"{self.bits} bits take {need}: the file is cut short, or its header is damaged"
            )
        _, little = ds.original_encoding
        if not little and self.bits != 16:  # 8-bit values may be swapped in pairs, as big-endian words
            raise SegmentationError("its pixels are big-endian: write it with another transfer syntax")
        for frame in range(self.frames):
            if self.bits == 1:
                yield self._bits(data, frame * size)
            else:
                dtype = np.dtype("u1" if self.bits == 8 else "<u2" if little else ">u2")
                values = np.frombuffer(data, dtype, size, frame * size * dtype.itemsize)
                yield values.reshape(self.rows, self.columns)

    def _bits(self, data: bytes, start: int) -> NDArray[Any]:
        """Return the frame that begins at bit `start`: frames of single bits are not padded (PS3.5, 8.1.1)."""
        size = self.rows * self.columns
        packed = np.frombuffer(data, np.uint8, (start % 8 + size + 7) // 8, start // 8)
        return np.unpackbits(packed, bitorder="little")[start % 8 :][:size].reshape(self.rows, self.columns)

    def _encapsulated(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        from gpuprep.dicom.decode import decode_frame

        table = raw(ds, "ExtendedOffsetTable")
        try:
            pixels = fragments_of(raw(ds, "PixelData"), table if isinstance(table, bytes) else b"")
            if (count := pixels.count(self.frames)) != self.frames:
                raise SegmentationError(f"its pixels have {count} frames, its header says {self.frames}: it is damaged")
            for frame in range(self.frames):
                if self.bits == 1:
                    yield self._bits(self._single_bits(pixels.frame(frame, self.frames)), 0)
                else:
                    yield decode_frame(pixels, self._header(frame), frame, self.rows, self.columns)
        except DecodeError as exc:
            raise SegmentationError(str(exc)) from exc

    def _single_bits(self, stream: bytes) -> bytes:
        """Return the bytes of an encapsulated frame of single bits; each such frame begins at a byte."""
        size = -(-self.rows * self.columns // 8)
        encoding = ENCODINGS.get(self.syntax)
        if encoding == "deflate":
            return inflated_frame(stream, size)
        if encoding != "none":
            name = "run lengths" if encoding == "RLE" else syntax_name(self.syntax)
            raise SegmentationError(f"its pixels are {name} of single bits: write it with another transfer syntax")
        if len(stream) < size:
            raise SegmentationError(f"a frame has {len(stream)} bytes, not {size}: it is damaged")
        return stream

    def _header(self, frame: int) -> SliceHeader:
        """Return a header with the fields that `gpuprep.dicom.decode` reads; the others are empty."""
        return SliceHeader(
            path=self.path,
            mtime_ns=0,
            member=None,
            frame=frame,
            frames=self.frames,
            file_bytes=0,
            sop_instance_uid="",
            instance_number=None,
            position_mm=None,
            localizer=False,
            secondary=False,
            modality=None,
            temporal_position=None,
            acquisition_number=None,
            acquisition_time="",
            reconstruction="",
            phase="",
            rescale_slope=None,
            rescale_intercept=None,
            rescale_type=None,
            photometric=None,
            samples_per_pixel=1,
            bits_allocated=max(self.bits, 8),
            bits_stored=max(self.bits, 8),
            high_bit=max(self.bits, 8) - 1,
            signed=False,
            padding=None,
            padding_limit=None,
            transfer_syntax=self.syntax,
            pixel_offset=None,
            pixel_bytes=None,
        )
