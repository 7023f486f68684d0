"""Declares the columns of the manifest: what each one means, and how SQLite, CSV and Parquet hold it.

Each field of `SeriesResult` and `RunRecord` has its line here, in the order of the fields. A column that is added must
be optional: manifests of earlier versions lack it.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple


class Kind(NamedTuple):
    """How values of one kind are held."""

    sqlite: Literal["TEXT", "INTEGER", "REAL"]
    cell: type
    """Python's type of a cell of SQLite."""
    arrow: str
    """Arrow's type of a value, or of each value of a list."""
    json: type | None = None
    """What the JSON in a cell of SQLite or CSV is, if it is JSON: list or dict."""
    nested: bool = False
    """Whether its parts are objects: Parquet holds it as JSON too."""

    @property
    def is_arrow_list(self) -> bool:
        """Whether a column of Parquet has lists of values."""
        return self.json is list and not self.nested


TEXT = Kind("TEXT", str, "string")
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
    """Whether there may be no value."""
    unit: str = ""
    keyword: str = ""
    """DICOM keyword of the attribute that it repeats, if it does."""

    def to_cell(self, value: Any) -> Any:
        """Return a value as SQLite and CSV hold it."""
        return value if value is None or self.kind.json is None else json.dumps(value)

    def from_cell(self, cell: Any) -> Any:
        """Return the value of a cell.

        Raises
        ------
        ValueError, RecursionError
            If it is no value of this column; SQLite would hold anything.
        """
        if cell is None and self.optional:
            return None
        value = json.loads(cell) if self.kind.json is not None and isinstance(cell, str) else cell
        if not isinstance(value, self.kind.json or self.kind.cell):
            raise ValueError(f"{self.name} is {cell!r}")
        return tuple(value) if isinstance(value, list) else value


def _by_name(*columns: Column) -> dict[str, Column]:
    return {column.name: column for column in columns}


SERIES = _by_name(
    Column("key", TEXT, "Series Instance UID, with #part where one UID stands for several stacks."),
    Column("series_uid", TEXT, "Series Instance UID.", keyword="SeriesInstanceUID"),
    Column("study_uid", TEXT, "Study Instance UID.", keyword="StudyInstanceUID"),
    Column("series_number", WHOLE, "Series Number.", optional=True, keyword="SeriesNumber"),
    Column("source", TEXT, "Folder the slices lie in."),
    Column("status", TEXT, "What became of it: see `Status`."),
    Column("reason", TEXT, 'Why it was rejected or failed: "Error: text".'),
    Column("codes", TEXTS, 'Why it was rejected, or what was irregular, for programs: "gap", "tilt", …'),
    Column("irregularities", TEXTS, "What was irregular and what was done about it, for people."),
    Column("warnings", TEXTS, "What is doubtful and was left as it is, for people."),
    Column("slices", WHOLE, "Slices of the series as found."),
    Column("source_shape", WHOLES, "Slices, rows and columns of the stack.", optional=True),
    Column("source_spacing_mm", NUMBERS, "Spacing of its slices, rows and columns.", optional=True, unit="mm"),
    Column("hu_min", NUMBER, "Least value of the stack, before padding is replaced.", optional=True, unit="HU"),
    Column("hu_max", NUMBER, "Largest value of the stack.", optional=True, unit="HU"),
    Column("hu_mean", NUMBER, "Mean value of the stack.", optional=True, unit="HU"),
    Column("padding_share", NUMBER, "Share of padding in the voxels of the stack.", optional=True),
    Column("quality", OBJECT, "Distribution of the HU of what was measured: `Histogram.to_dict`.", optional=True),
    Column("audit", OBJECT, "What was measured on the headers: `Audit.to_dict`.", optional=True),
    Column(
        "segmentations", OBJECTS, "Files that masks were made of, with format and by what it was recognised.",
        optional=True,
    ),
    Column(
        "labels", OBJECTS, "Structures, each with its value and file, and voxels and ml before and after resampling: "
        "`Label`.", optional=True,
    ),
    Column("folder", TEXT, "Folder of the output, relative to OUT."),
    Column("shape", WHOLES, "Slices, rows and columns of the output.", optional=True),
    Column("spacing_mm", NUMBERS, "Spacing of its slices, rows and columns.", optional=True, unit="mm"),
    Column("files", WHOLE, "Files of the output."),
    Column("bytes", WHOLE, "Size of these files.", unit="bytes"),
    Column("read_s", NUMBER, "Time for reading and decoding.", unit="s"),
    Column("process_s", NUMBER, "Time for computing.", unit="s"),
    Column("write_s", NUMBER, "Time for writing.", unit="s"),
    Column("upload_s", NUMBER, "Time of the device, beside that of the host, for uploads.", optional=True, unit="s"),
    Column("kernels_s", NUMBER, "Time of the device for computing.", optional=True, unit="s"),
    Column("download_s", NUMBER, "Time of the device for downloads.", optional=True, unit="s"),
    Column("masks_s", NUMBER, "Time for masks.", optional=True, unit="s"),
    Column("engine", TEXT, "Engine of the resampling."),
    Column("backend", TEXT, "Backend that computed it: cpu or gpu."),
    Column("device", TEXT, "Device of the backend."),
    Column("fingerprint", TEXT, "Hash of the input: `Series.fingerprint`."),
    Column("recipe_sha256", TEXT, "Hash of the recipe."),
    Column("version", TEXT, "Version of gpuprep."),
    Column(
        "sha256", TEXT, "Hash of volume.json, which has the checksum of every other file of the output.", optional=True
    ),
    Column("host", TEXT, "Machine that converted it.", optional=True),
    Column("finished", TEXT, "When it was done: UTC, ISO 8601."),
)  # fmt: skip
"""The columns of a series, by name: the fields of `SeriesResult`."""

RUNS = _by_name(
    Column("started", TEXT, "When it began: UTC, ISO 8601."),
    Column("ended", TEXT, "When it ended, empty before: UTC, ISO 8601."),
    Column("state", TEXT, "How far it is: see `State`."),
    Column("host", TEXT, "Machine of the parent process."),
    Column("pid", WHOLE, "Its process ID."),
    Column("version", TEXT, "Version of gpuprep."),
    Column("recipe_sha256", TEXT, "Hash of the recipe."),
    Column("device", TEXT, "Device of the backend."),
    Column("series", WHOLE, "Series of the whole cohort, or of the shard."),
    Column("skipped", WHOLE, "Of these, complete and unchanged."),
    Column("todo", WHOLE, "Of these, to be converted or rejected in this run."),
    Column("request", TEXT, "What was asked for, to ask for it again: JSON."),
)
"""The columns of a run, by name: the fields of `RunRecord`."""
