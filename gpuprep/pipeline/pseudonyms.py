"""Pseudonymises outputs: keyed hashes replace UIDs and patient IDs; the crosswalk is stored beside the key.

The output folder then has no UID, no path and no free text, which may repeat the name of a file. Codes give the reasons
for verdicts, and the crosswalk has their texts. Names of structures are kept if a segmentation file gives them, since
they define the labels; a name that is taken from a path is kept only if it is among the aliases of the recipe.

References
----------
HMAC: RFC 2104. Identifying attributes: DICOM PS3.15, annex E, and 45 CFR 164.514(b)(2).
"""

from __future__ import annotations

import csv
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from gpuprep.core.series import Series, SliceHeader
from gpuprep.dicom.known_terms import known_terms
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.filesystem import is_url, normalised_path
from gpuprep.files.replacing import atomic_writer, flush
from gpuprep.output.columns import FREE_TEXT
from gpuprep.output.records import SeriesResult

DIGITS = 20
"""Hexadecimal digits of a pseudonym: 80 bits, enough to distinguish a million series."""

KEY_BYTES = 32

CROSSWALK = (
    "folder", "series", "patient", "patient_id", "series_uid", "study_uid", "source", "status", "reason",
    "irregularities", "warnings",
)  # fmt: skip


_AS_CSV: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
"""A path may hold any bytes."""

# Lists of what is allowed, so that a new field of a record is not stored in OUT before it is added here.
CODED = (
    "image_type", "kernel", "manufacturer", "body_part", "patient_position", "scan_options", "acquisition_type",
)  # fmt: skip
"""Columns of codes, of which only known ones are stored."""
PUBLIC_OF_AUDIT = (
    "slices", "spacing_mm", "spacing_deviation_mm", "gaps", "missing", "duplicates", "tilt_deg", "obliqueness_deg",
    "orientation", "padding", "rescales", "bits_stored", "transfer_syntaxes", "left_out_images",
)  # fmt: skip
PUBLIC_OF_LABELS = ("name", "contours", "slices", "value", "file", "source_voxels", "source_ml", "voxels", "ml")


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Keyed hashes of UIDs, patient IDs and paths.

    Examples
    --------
    >>> from pathlib import Path
    >>> names = gpuprep.Pseudonyms.load(Path("study.key"), "out")  # a missing key file is made
    >>> names.of("patient", "4711") == gpuprep.Pseudonyms.load(Path("study.key"), "out").of("patient", "4711")
    True
    """

    key: bytes
    file: Path
    """File of the key."""

    @classmethod
    def load(cls, file: Path, out: str | Path) -> Self:
        """Return the pseudonyms of a key file, which is made if it is missing.

        Raises
        ------
        RequestError
            If it lies in OUT, is readable by other users, cannot be read or made, or holds no key.
        """
        if not is_url(place := normalised_path(out)):
            top = Path(place).resolve()
            # The crosswalk is written beside the key, so a link in OUT to a key elsewhere is refused too.
            if any(p.is_relative_to(top) for p in (file.resolve(), file.parent.resolve())):
                raise RequestError(f"the key {file} would leave with {out}: keep it elsewhere")
        try:
            if not file.exists():
                _make_key(file)
        except OSError as exc:
            raise RequestError(f"the key {file} cannot be made: {exc.strerror}") from exc
        try:
            open_to_others = stat.S_IMODE(file.stat().st_mode) & 0o077
            key = bytes.fromhex(file.read_text("ascii"))
        except OSError as exc:
            raise RequestError(f"the key {file} cannot be read: {exc.strerror}") from exc
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise RequestError(f"{file} holds no key: give the file of an earlier run, or a name that is free")
        if open_to_others:
            raise RequestError(f"the key {file} may be read by others than you: chmod 600 {file}")
        return cls(key, file)

    def of(self, kind: str, value: str) -> str:
        """Return the pseudonym of a value; equal values of different kinds have different pseudonyms."""
        return hmac.digest(self.key, f"{kind}\0{value}".encode(errors="surrogateescape"), "sha256").hex()[:DIGITS]

    def of_uid(self, kind: str, uid: str) -> str:
        """Return the pseudonym of a UID; "" for an absent UID."""
        return uid and self.of(kind, uid)

    @property
    def check(self) -> str:
        """Pseudonym of a constant, which identifies the key without revealing it."""
        return self.of("check", "gpuprep")

    def series(self, series: Series) -> Series:
        """Return a series with its pseudonym as alias."""
        return replace(series, alias=self.of("series", series.key.partition("#")[0]))

    def folder(self, series: Series, patient_id: str) -> str:
        """Return the output folder of a series, within that of its patient, or of its study if no patient is named."""
        patient = self.of("patient", patient_id) if patient_id else self.of_uid("study", series.study_uid)
        patient = patient or self.of("patient of", series.alias)
        return f"{patient}/{series.alias}" + (f"-part{series.part}" if series.part else "")

    def public(self, result: SeriesResult, series: Series) -> SeriesResult:
        """Return a result as it may be stored in OUT: without UIDs, paths and texts."""
        facts: dict[str, Any] = {name: known_terms(name, getattr(result, name)) for name in CODED}
        facts |= dict.fromkeys(("model", *FREE_TEXT))
        return replace(
            result,
            series_uid=series.alias,
            study_uid=self.of_uid("study", series.study_uid),
            source="",
            reason=_kind(result.reason),
            irregularities=(),
            warnings=(),
            audit=result.audit and _without_names(result.audit),
            segmentations=result.segmentations and tuple(_only(s, ("format",)) for s in result.segmentations),
            labels=result.labels and tuple(_only(label, PUBLIC_OF_LABELS) for label in result.labels),
            frame_of_reference_uid=self.of_uid("frame", result.frame_of_reference_uid or "") or None,
            **facts,
        )

    def paths(self, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return unreadable files with pseudonyms, each with the kind of its error."""
        return [(self.of("path", path), _kind(reason)) for path, reason in rows]

    def write_crosswalk(self, rows: Mapping[str, Mapping[str, str]]) -> Path:
        """Write the crosswalk beside the key, readable by its owner only; rows of earlier runs are kept.

        Parameters
        ----------
        rows : mapping
            Row of each series, by its key: values by the names in `CROSSWALK`; absent ones keep their former value.

        Raises
        ------
        OutputError
            If it cannot be written, or the file there is no crosswalk.
        """
        file = self.file.with_name(f"{self.file.name}.crosswalk.csv")
        try:
            with FileLock(file.with_name(f"{file.name}.lock"), mode=0o600):  # shards write the same file
                known = _crosswalk(file)
                for key, row in rows.items():
                    known[key] = {**known.get(key, {}), **row}
                with atomic_writer(file, private=True, errors="surrogateescape") as f:
                    writer = csv.DictWriter(f, CROSSWALK)
                    writer.writeheader()
                    writer.writerows(known.values())
        except (OSError, ValueError) as exc:
            raise OutputError(f"cannot write the crosswalk {file}: {exc}") from exc
        return file


def _crosswalk(file: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a crosswalk by the key of the series."""
    if not file.is_file():
        return {}
    with file.open(**_AS_CSV) as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != CROSSWALK:
            raise ValueError("the file there is no crosswalk: move it away")
        return {row["series"]: row for row in reader}


def planned_row(series: Series, folder: str, patient_id: str) -> dict[str, str]:
    """Return the row of a series before its conversion; a run that is killed leaves this row."""
    return {
        **_known_before(series),
        "folder": folder,
        "patient": folder.partition("/")[0],
        "patient_id": patient_id,
    }


def crosswalk_row(result: SeriesResult, series: Series) -> dict[str, str]:
    """Return the row of a series after its conversion."""
    row = _known_before(series)
    if result.folder:
        row |= {"folder": result.folder, "patient": result.folder.partition("/")[0]}
    if result.status == "skipped":  # it keeps the texts of the run that converted it
        return row
    return row | {
        "status": result.status,
        "reason": result.reason,
        "irregularities": json.dumps(result.irregularities) if result.irregularities else "",
        "warnings": json.dumps(result.warnings) if result.warnings else "",
    }


def _known_before(series: Series) -> dict[str, str]:
    return {
        "series": series.key,
        "series_uid": series.series_uid,
        "study_uid": series.study_uid,
        "source": series.folder,
    }


def patient_ids(headers: list[SliceHeader]) -> list[str | None]:
    """Return the *Patient ID* in each of some files, "" where it is absent, None where the file cannot be read.

    Runs in a worker. The index of headers has only a hash of it, which distinguishes the images of one series.
    """
    return [_patient_id(header) for header in headers]


def _patient_id(header: SliceHeader) -> str | None:
    import warnings

    import pydicom

    from gpuprep.dicom.parse_header import HEADER_BYTES
    from gpuprep.files.bounded_reader import open_bounded

    try:
        with warnings.catch_warnings(), closing(open_bounded(header.path, header.member, HEADER_BYTES)) as f:
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(f, stop_before_pixels=True, force=True, specific_tags=["PatientID"])
            return str(ds.get("PatientID", "") or "").strip()
    except Exception:  # pydicom raises whatever a broken file provokes
        return None


def _make_key(file: Path) -> None:
    """Make a key file atomically, since shards that start together may all make it."""
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(secrets.token_hex(KEY_BYTES) + "\n")
        flush(part)
        with suppress(FileExistsError):
            os.link(part, file)
    finally:
        part.unlink(missing_ok=True)


def _kind(reason: str) -> str:
    """Return the name of the error with which a reason begins, "" where there is none."""
    match = re.match(r"([A-Za-z]+)(?::|$)", reason)
    return match[1] if match else ""


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _without_names(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return an audit without the names of files."""
    return _only(audit, PUBLIC_OF_AUDIT) | {"gaps": [_only(gap, ("mm", "missing")) for gap in audit["gaps"]]}
