"""Declares the columns of the manifest: their meaning, and their types in SQLite, CSV and Parquet.

Each field of `SeriesResult` and `RunRecord` has a line here, in the order of the fields. A new column must be optional,
because manifests of earlier versions lack it.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal, NamedTuple


class Kind(NamedTuple):
    """Types of a column in SQLite, Python and Arrow."""

    sqlite: Literal["TEXT", "INTEGER", "REAL"]
    cell: type
    """Python type of a cell of SQLite."""
    arrow: str
    """Arrow type of a value, or of each value of a list."""
    json: type | None = None
    """Type of the JSON in a cell of SQLite or CSV: list or dict; None: the cell is no JSON."""
    is_time: bool = False
    """Whether it is a time as ISO 8601, or empty."""
    nested: bool = False
    """Whether it contains objects, so that it is JSON text in Parquet, too."""

    @property
    def is_arrow_list(self) -> bool:
        """Whether the column is a list in Parquet."""
        return self.json is list and not self.nested


TEXT = Kind("TEXT", str, "string")
TIME = Kind("TEXT", str, "string", is_time=True)
WHOLE = Kind("INTEGER", int, "int64")
NUMBER = Kind("REAL", float, "float64")
TEXTS = Kind("TEXT", str, "string", json=list)
WHOLES = Kind("TEXT", str, "int64", json=list)
NUMBERS = Kind("TEXT", str, "float64", json=list)
OBJECT = Kind("TEXT", str, "string", json=dict, nested=True)
OBJECTS = Kind("TEXT", str, "string", json=list, nested=True)


class Column(NamedTuple):
    """One column."""

    name: str
    kind: Kind
    meaning: str
    optional: bool = False
    """Whether the value may be None."""
    unit: str = ""
    keyword: str = ""
    """Keyword of the DICOM attribute that it repeats; "": none."""

    def to_cell(self, value: Any) -> Any:
        """Return a value as a cell of SQLite or CSV."""
        return value if value is None or self.kind.json is None else json.dumps(value)

    def from_cell(self, cell: Any) -> Any:
        """Return the value of a cell.

        Raises
        ------
        ValueError, RecursionError
            If it is no value of this column, which SQLite does not prevent.
        """
        if cell is None and self.optional:
            return None
        value = json.loads(cell) if self.kind.json is not None and isinstance(cell, str) else cell
        if not isinstance(value, self.kind.json or self.kind.cell):
            raise ValueError(f"{self.name} is {cell!r}")
        if self.kind.is_time and value:
            datetime.fromisoformat(str(value))
        return tuple(value) if isinstance(value, list) else value


def _by_name(*columns: Column) -> dict[str, Column]:
    return {column.name: column for column in columns}


FACTS = _by_name(
    Column("study_order", WHOLE, "Number of the study among those of the patient, by date, from 1.", optional=True),
    Column("frame_of_reference_uid", TEXT, "Frame of Reference UID.", optional=True, keyword="FrameOfReferenceUID"),
    Column("group_id", TEXT, "Equal for series of one acquisition, such as several kernels, or phases.", optional=True),
    Column("duplicate_of", TEXT, "Key of another series with equal pixels, of which it is a copy.", optional=True),
    Column("phase", NUMBER, "Phase of a 4D scan.", optional=True),
    Column("phase_unit", TEXT, 'Unit of the phase: "%", "ms", "s", or "index".', optional=True),
    Column("phase_source", TEXT, "Keyword of the DICOM attribute that the phase was read from.", optional=True),
    Column("plane", TEXT, 'Nearest plane: "axial", "coronal" or "sagittal".', optional=True),
    Column("rows", WHOLE, "Rows of a slice.", optional=True, keyword="Rows"),
    Column("columns", WHOLE, "Columns of a slice.", optional=True, keyword="Columns"),
    Column("slice_spacing_mm", NUMBER, "Median distance of neighbouring slices.", optional=True, unit="mm"),
    Column("slice_thickness_mm", NUMBER, "Slice Thickness.", optional=True, unit="mm", keyword="SliceThickness"),
    Column("row_spacing_mm", NUMBER, "Distance of neighbouring rows: Pixel Spacing.", optional=True, unit="mm",
           keyword="PixelSpacing"),
    Column("column_spacing_mm", NUMBER, "Distance of neighbouring columns: Pixel Spacing.", optional=True, unit="mm",
           keyword="PixelSpacing"),
    Column("extent_mm", NUMBER, "Extent of the stack along its normal.", optional=True, unit="mm"),
    Column("fov_rows_mm", NUMBER, "Extent of a slice from the first to the last row.", optional=True, unit="mm"),
    Column("fov_columns_mm", NUMBER, "Extent of a slice from the first to the last column.", optional=True, unit="mm"),
    Column("reconstruction_diameter_mm", NUMBER, "Reconstruction Diameter.", optional=True, unit="mm",
           keyword="ReconstructionDiameter"),
    Column("image_type", TEXT, "Image Type or Frame Type, with backslashes.", optional=True, keyword="ImageType"),
    Column("kernel", TEXT, "Convolution Kernel, with backslashes.", optional=True, keyword="ConvolutionKernel"),
    Column("contrast", TEXT, 'Contrast medium: "yes", "no" or "unknown", by agent, route, volume and phase.',
           optional=True, keyword="ContrastBolusAgent"),
    Column("kvp", NUMBER, "Tube voltage.", optional=True, unit="kV", keyword="KVP"),
    Column("tube_current_ma", NUMBER, "Tube current, mean of the slices.", optional=True, unit="mA",
           keyword="XRayTubeCurrent"),
    Column("exposure_mas", NUMBER, "Exposure, mean of the slices.", optional=True, unit="mAs", keyword="Exposure"),
    Column("ctdivol_mgy", NUMBER, "CTDIvol, mean of the slices.", optional=True, unit="mGy", keyword="CTDIvol"),
    Column("pitch", NUMBER, "Spiral Pitch Factor.", optional=True, keyword="SpiralPitchFactor"),
    Column("manufacturer", TEXT, "Manufacturer.", optional=True, keyword="Manufacturer"),
    Column("model", TEXT, "Manufacturer's Model Name.", optional=True, keyword="ManufacturerModelName"),
    Column("body_part", TEXT, "Body Part Examined.", optional=True, keyword="BodyPartExamined"),
    Column("patient_position", TEXT, "Patient Position.", optional=True, keyword="PatientPosition"),
    Column("scan_options", TEXT, "Scan Options, with backslashes.", optional=True, keyword="ScanOptions"),
    Column("acquisition_type", TEXT, "Acquisition Type.", optional=True, keyword="AcquisitionType"),
    Column("series_description", TEXT, "Series Description; free text.", optional=True, keyword="SeriesDescription"),
    Column("protocol_name", TEXT, "Protocol Name; free text.", optional=True, keyword="ProtocolName"),
    Column("study_description", TEXT, "Study Description; free text.", optional=True, keyword="StudyDescription"),
)  # fmt: skip
"""What is known of a series before its conversion: the fields of `SeriesFacts`, by name."""

FREE_TEXT = ("series_description", "protocol_name", "study_description")
"""Columns that people fill in, so that they may name anybody. They are stored in OUT only if that is asked for."""

SERIES = _by_name(
    Column("key", TEXT, "Series Instance UID, with #part if the series has several volumes."),
    Column("series_uid", TEXT, "Series Instance UID.", keyword="SeriesInstanceUID"),
    Column("study_uid", TEXT, "Study Instance UID.", keyword="StudyInstanceUID"),
    Column("series_number", WHOLE, "Series Number.", optional=True, keyword="SeriesNumber"),
    Column("source", TEXT, "Folder of the slices."),
    Column("status", TEXT, "Status of the conversion: see `Status`."),
    Column("reason", TEXT, 'Reason of a rejection or failure: "Error: text".'),
    Column("codes", TEXTS, 'Codes of the rejection, irregularities and warnings, such as "gap" or "tilt".'),
    Column("irregularities", TEXTS, "Irregularities, and how each was corrected."),
    Column("warnings", TEXTS, "Warnings about properties that were left unchanged."),
    Column("slices", WHOLE, "Number of slices of the series."),
    *FACTS.values(),
    Column("source_shape", WHOLES, "Slices, rows and columns of the stack.", optional=True),
    Column("source_spacing_mm", NUMBERS, "Spacing of slices, rows and columns of the stack.", optional=True, unit="mm"),
    Column("crop", OBJECT, "Box of the stack to which the output is cropped: see `Crop.to_dict`.", optional=True),
    Column("hu_min", NUMBER, "Smallest value of the stack, before padding is replaced.", optional=True, unit="HU"),
    Column("hu_max", NUMBER, "Largest value of the stack.", optional=True, unit="HU"),
    Column("hu_mean", NUMBER, "Mean value of the stack.", optional=True, unit="HU"),
    Column("padding_share", NUMBER, "Fraction of the voxels of the stack that are padding.", optional=True),
    Column("quality", OBJECT, "Distribution of HU: see `Histogram.to_dict`.", optional=True),
    Column("audit", OBJECT, "Measures of the headers: see `Audit.to_dict`.", optional=True),
    Column(
        "segmentations", OBJECTS, "Segmentation files, each with its format and how it was recognised.",
        optional=True,
    ),
    Column(
        "labels", OBJECTS, "Structures, each with label value, file, and volume before and after resampling: "
        "see `Label`.", optional=True,
    ),
    Column("folder", TEXT, "Output folder, relative to OUT."),
    Column("shape", WHOLES, "Slices, rows and columns of the output.", optional=True),
    Column("spacing_mm", NUMBERS, "Spacing of its slices, rows and columns.", optional=True, unit="mm"),
    Column("files", WHOLE, "Number of files of the output."),
    Column("bytes", WHOLE, "Size of the files of the output.", unit="bytes"),
    Column("read_s", NUMBER, "Time for reading and decoding.", unit="s"),
    Column("process_s", NUMBER, "Time for computing.", unit="s"),
    Column("write_s", NUMBER, "Time for writing.", unit="s"),
    Column("upload_s", NUMBER, "Time of the device for uploads, while the host works, too.", optional=True, unit="s"),
    Column("kernels_s", NUMBER, "Time of the device for computing.", optional=True, unit="s"),
    Column("download_s", NUMBER, "Time of the device for downloads.", optional=True, unit="s"),
    Column("masks_s", NUMBER, "Time for masks.", optional=True, unit="s"),
    Column("engine", TEXT, "Engine of the resampling."),
    Column("backend", TEXT, "Backend that computed it: cpu or gpu."),
    Column("device", TEXT, "Device of the backend."),
    Column("fingerprint", TEXT, "Hash of the input: see `Series.fingerprint`."),
    Column("recipe_sha256", TEXT, "Hash of the recipe."),
    Column("version", TEXT, "Version of gpuprep."),
    Column(
        "sha256", TEXT, "SHA-256 of volume.json, which has the checksum of every other file of the output.",
        optional=True,
    ),
    Column("host", TEXT, "Host that converted it.", optional=True),
    Column("finished", TIME, "Time of the end of the conversion: UTC, ISO 8601."),
)  # fmt: skip
"""The columns of a series, by name: the fields of `SeriesResult`."""

RUNS = _by_name(
    Column("started", TIME, "Time of the beginning: UTC, ISO 8601."),
    Column("ended", TIME, "Time of the end: UTC, ISO 8601; empty while it runs."),
    Column("state", TEXT, "State of the run: see `State`."),
    Column("host", TEXT, "Host of the parent process."),
    Column("pid", WHOLE, "Process ID of the parent process."),
    Column("version", TEXT, "Version of gpuprep."),
    Column("recipe_sha256", TEXT, "Hash of the recipe."),
    Column("device", TEXT, "Device of the backend."),
    Column("series", WHOLE, "Number of series of the cohort, or of the shard."),
    Column("skipped", WHOLE, "Number of series that were complete and unchanged."),
    Column("todo", WHOLE, "Number of series to be converted or rejected in this run."),
    Column("request", TEXT, "Inputs and options as JSON, which gpuprep retry uses again."),
)
"""The columns of a run, by name: the fields of `RunRecord`."""
