"""Reads single DICOM elements as they stand in the file: tags by keyword, text, UIDs and numbers of 16 bits.

pydicom converts an element that is asked for by name, in Python, which takes longer than all else for the headers of a
cohort, or for the millions of numbers of a structure set. So values are taken from the bytes of an element. What images
mean by them is read in `gpuprep.dicom.header_values`, and what segmentations do in `gpuprep.masks.formats`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

_SHARED = {
    "MediaStorageSOPClassUID": 0x0002_0002,
    "TransferSyntaxUID": 0x0002_0010,
    "SOPClassUID": 0x0008_0016,
    "SliceThickness": 0x0018_0050,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
    "SamplesPerPixel": 0x0028_0002,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "BitsAllocated": 0x0028_0100,
    "PixelPaddingValue": 0x0028_0120,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
    "PerFrameFunctionalGroupsSequence": 0x5200_9230,
    "ExtendedOffsetTable": 0x7FE0_0001,
}

_OF_IMAGES = {
    "ImageType": 0x0008_0008,
    "AcquisitionUID": 0x0008_0017,
    "SOPInstanceUID": 0x0008_0018,
    "StudyDate": 0x0008_0020,
    "SeriesDate": 0x0008_0021,
    "AcquisitionDate": 0x0008_0022,
    "ContentDate": 0x0008_0023,
    "AcquisitionDateTime": 0x0008_002A,
    "StudyTime": 0x0008_0030,
    "SeriesTime": 0x0008_0031,
    "AcquisitionTime": 0x0008_0032,
    "ContentTime": 0x0008_0033,
    "Modality": 0x0008_0060,
    "Manufacturer": 0x0008_0070,
    "StudyDescription": 0x0008_1030,
    "SeriesDescription": 0x0008_103E,
    "ManufacturerModelName": 0x0008_1090,
    "IrradiationEventUID": 0x0008_3010,
    "FrameType": 0x0008_9007,
    "PatientID": 0x0010_0020,
    "ContrastBolusAgent": 0x0018_0010,
    "BodyPartExamined": 0x0018_0015,
    "ScanOptions": 0x0018_0022,
    "KVP": 0x0018_0060,
    "ProtocolName": 0x0018_1030,
    "ContrastBolusRoute": 0x0018_1040,
    "ContrastBolusVolume": 0x0018_1041,
    "TriggerTime": 0x0018_1060,
    "ReconstructionDiameter": 0x0018_1100,
    "XRayTubeCurrent": 0x0018_1151,
    "Exposure": 0x0018_1152,
    "ConvolutionKernel": 0x0018_1210,
    "PatientPosition": 0x0018_5100,
    "FrameAcquisitionDateTime": 0x0018_9074,
    "AcquisitionType": 0x0018_9302,
    "SpiralPitchFactor": 0x0018_9311,
    "XRayTubeCurrentInmA": 0x0018_9330,
    "ExposureInmAs": 0x0018_9332,
    "ContrastBolusAgentAdministered": 0x0018_9342,
    "ContrastBolusAgentDetected": 0x0018_9343,
    "ContrastBolusAgentPhase": 0x0018_9344,
    "CTDIvol": 0x0018_9345,
    "MultienergyCTProcessingSequence": 0x0018_9363,
    "MonoenergeticEnergyEquivalent": 0x0018_937C,
    "SeriesNumber": 0x0020_0011,
    "AcquisitionNumber": 0x0020_0012,
    "InstanceNumber": 0x0020_0013,
    "TemporalPositionIdentifier": 0x0020_0100,
    "StackID": 0x0020_9056,
    "InStackPositionNumber": 0x0020_9057,
    "TemporalPositionIndex": 0x0020_9128,
    "NominalCardiacTriggerDelayTime": 0x0020_9153,
    "FrameAcquisitionNumber": 0x0020_9156,
    "DimensionIndexValues": 0x0020_9157,
    "NominalPercentageOfCardiacPhase": 0x0020_9241,
    "NominalPercentageOfRespiratoryPhase": 0x0020_9245,
    "NominalRespiratoryTriggerDelayTime": 0x0020_9255,
    "TemporalPositionTimeOffset": 0x0020_930D,
    "PhotometricInterpretation": 0x0028_0004,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "PixelPaddingRangeLimit": 0x0028_0121,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "RescaleType": 0x0028_1054,
    "ModalityLUTSequence": 0x0028_3000,
}

_OF_SEGMENTATIONS = {
    "SpecificCharacterSet": 0x0008_0005,
    "CodeValue": 0x0008_0100,
    "CodingSchemeDesignator": 0x0008_0102,
    "ReferencedSeriesSequence": 0x0008_1115,
    "ReferencedInstanceSequence": 0x0008_114A,
    "ReferencedSOPInstanceUID": 0x0008_1155,
    "ReferencedFrameNumber": 0x0008_1160,
    "SourceImageSequence": 0x0008_2112,
    "DerivationImageSequence": 0x0008_9124,
    "SpacingBetweenSlices": 0x0018_0088,
    "PlanePositionSequence": 0x0020_9113,
    "PlaneOrientationSequence": 0x0020_9116,
    "DimensionOrganizationType": 0x0020_9311,
    "PixelMeasuresSequence": 0x0028_9110,
    "SegmentationType": 0x0062_0001,
    "SegmentSequence": 0x0062_0002,
    "SegmentNumber": 0x0062_0004,
    "SegmentLabel": 0x0062_0005,
    "SegmentIdentificationSequence": 0x0062_000A,
    "ReferencedSegmentNumber": 0x0062_000B,
    "MaximumFractionalValue": 0x0062_000E,
    "SegmentedPropertyTypeCodeSequence": 0x0062_000F,
    "ReferencedFrameOfReferenceSequence": 0x3006_0010,
    "RTReferencedStudySequence": 0x3006_0012,
    "RTReferencedSeriesSequence": 0x3006_0014,
    "ContourImageSequence": 0x3006_0016,
    "StructureSetROISequence": 0x3006_0020,
    "ROINumber": 0x3006_0022,
    "ReferencedFrameOfReferenceUID": 0x3006_0024,
    "ROIName": 0x3006_0026,
    "ROIContourSequence": 0x3006_0039,
    "ContourSequence": 0x3006_0040,
    "ContourGeometricType": 0x3006_0042,
    "ContourOffsetVector": 0x3006_0045,
    "NumberOfContourPoints": 0x3006_0046,
    "ContourData": 0x3006_0050,
    "ReferencedROINumber": 0x3006_0084,
    "ExtendedOffsetTableLengths": 0x7FE0_0002,
    "PixelData": 0x7FE0_0010,
}

IMAGE_TAGS = _SHARED | _OF_IMAGES
"""Every element that is read of the header of an image. Names of people are never read. *Patient ID* is kept only as a
hash. Dates and times put studies and scans in order, and the three descriptions serve a choice of series; none of them
goes into the output folder, unless the user asks for a description."""

SEGMENTATION_TAGS = _SHARED | _OF_SEGMENTATIONS
"""Every element that is read of a segmentation: neither patient nor date."""

TAGS = IMAGE_TAGS | SEGMENTATION_TAGS

LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
"""VRs with two reserved bytes and a length of four."""
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
"""VRs with a length of two bytes, which hold no large image."""

UID_PATTERN = re.compile("[0-9A-Fa-f.]{0,64}")
"""A UID; some writers use hexadecimal digits, which do no harm."""


class Elements(Protocol):
    """A data set, or a frame with the attributes of its functional groups."""

    def get_item(self, tag: int) -> Any:
        """Return the element of a tag as it stands in the file; None where it is absent."""
        ...


class DataSet(Elements, Protocol):
    """A data set of pydicom, or a table of elements without functional groups."""

    def keys(self) -> Iterable[int]:
        """Return the tags of all elements."""
        ...

    def __contains__(self, tag: int) -> bool: ...

    def __getitem__(self, tag: int) -> Any: ...


class Element:
    """An element as it stands in the file, with the attributes of pydicom's `RawDataElement` that are needed."""

    __slots__ = ("VR", "value")
    is_little_endian = True

    def __init__(self, vr: str | None, value: bytes) -> None:
        self.VR = vr
        self.value = value


class ElementTable(dict[int, Element]):
    """Elements by tag, with the methods of a data set of pydicom that are needed."""

    get_item = dict.get


def element_of(ds: Elements, keyword: str) -> Any:
    """Return an element as it stands in the file, its value as bytes; None where it is absent."""
    return ds.get_item(TAGS[keyword])


def ascii_of(value: Any) -> str:
    """Return a value that is written in ASCII, without padding; "" for None."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str("" if value is None else value)
    return text.strip(" \0")


def first_16_bits(element: Any) -> int:
    """Return the first 16 bits of a value of at least two bytes as an unsigned number (US); of UL the low ones."""
    if getattr(element, "is_little_endian", True):
        return int.from_bytes(element.value[:2], "little")
    return int.from_bytes(element.value[-2:], "big")
