"""Replaces UIDs and patients by keyed hashes, and keeps the crosswalk beside the key.

What leaves has no UID, no path and no free text, which may repeat a file's name: codes say why a series was put right
or left out, and the crosswalk has the words. Names of structures that are in a file are kept, as they are what labels
mean; those that a path gives only if the aliases of the recipe have them.

References
----------
HMAC: RFC 2104. What identifies: DICOM PS3.15, annex E, and 45 CFR 164.514(b)(2), among them UIDs and file names.
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
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.filesystem import given, is_url
from gpuprep.files.replacing import flush, replacing
from gpuprep.output.records import SeriesResult

DIGITS = 20
"""Of a pseudonym: 80 bits, so that no two of a million series share one."""

KEY_BYTES = 32

CROSSWALK = (
    "folder", "series", "patient", "patient_id", "series_uid", "study_uid", "source", "status", "reason",
    "irregularities", "warnings",
)  # fmt: skip


_AS_CSV: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
"""A path may hold any bytes."""

# What may leave is listed, so that what is added to a record elsewhere stays at home until it is added here.
PUBLIC_OF_AUDIT = (
    "slices", "spacing_mm", "spacing_deviation_mm", "gaps", "missing", "duplicates", "tilt_deg", "obliqueness_deg",
    "orientation", "padding", "rescales", "bits_stored", "transfer_syntaxes", "left_out_images",
)  # fmt: skip
PUBLIC_OF_LABELS = ("name", "contours", "slices", "value", "file", "source_voxels", "source_ml", "voxels", "ml")


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Keyed hashes of what identifies a patient.

    Examples
    --------
    >>> from pathlib import Path
    >>> names = gpuprep.Pseudonyms.load(Path("study.key"), "out")  # made if it is not there
    >>> names.of("patient", "4711") == gpuprep.Pseudonyms.load(Path("study.key"), "out").of("patient", "4711")
    True
    """

    key: bytes
    file: Path
    """Where the key is kept."""

    @classmethod
    def load(cls, file: Path, out: str | Path) -> Self:
        """Return those of a key file, which is made if it is not there.

        Raises
        ------
        RequestError
            If it lies in OUT, may be read by others, cannot be read or made, or holds no key.
        """
        if not is_url(place := given(out)):
            top = Path(place).resolve()
            # A link does not help: the crosswalk is written beside it.
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
        """Return the pseudonym of a value, another one for each kind of thing."""
        return hmac.digest(self.key, f"{kind}\0{value}".encode(errors="surrogateescape"), "sha256").hex()[:DIGITS]

    def of_uid(self, kind: str, uid: str) -> str:
        """Return the pseudonym of a UID; one that is absent stays so."""
        return uid and self.of(kind, uid)

    @property
    def check(self) -> str:
        """Say which key this is, without saying the key."""
        return self.of("check", "gpuprep")

    def series(self, series: Series) -> Series:
        """Return a series that goes by its pseudonym."""
        return replace(series, alias=self.of("series", series.key.partition("#")[0]))

    def folder(self, series: Series, patient_id: str) -> str:
        """Return where the output of a series goes: those of one patient together, or of a study that names none."""
        patient = self.of("patient", patient_id) if patient_id else self.of_uid("study", series.study_uid)
        patient = patient or self.of("patient of", series.alias)
        return f"{patient}/{series.alias}" + (f"-part{series.part}" if series.part else "")

    def public(self, result: SeriesResult, series: Series) -> SeriesResult:
        """Return a result as it may leave: without UIDs, paths and texts."""
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
        )

    def paths(self, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return files and what is wrong with them as it may leave."""
        return [(self.of("path", path), _kind(reason)) for path, reason in rows]

    def write_crosswalk(self, rows: Mapping[str, Mapping[str, str]]) -> Path:
        """Write what became of whom beside the key, readable by its owner alone; rows of earlier runs are kept.

        Parameters
        ----------
        rows : mapping
            Of each series, by its key in the manifest: values by the names in `CROSSWALK`; others stay as they were.

        Raises
        ------
        OutputError
            If it cannot be written, or what is there is none.
        """
        file = self.file.with_name(f"{self.file.name}.crosswalk.csv")
        try:
            with FileLock(file.with_name(f"{file.name}.lock"), mode=0o600):  # shards share it
                known = _crosswalk(file)
                for key, row in rows.items():
                    known[key] = {**known.get(key, {}), **row}
                with replacing(file, private=True, errors="surrogateescape") as f:
                    writer = csv.DictWriter(f, CROSSWALK)
                    writer.writeheader()
                    writer.writerows(known.values())
        except (OSError, ValueError) as exc:
            raise OutputError(f"cannot write the crosswalk {file}: {exc}") from exc
        return file


def _crosswalk(file: Path) -> dict[str, dict[str, str]]:
    """Return the lines of a crosswalk by their series."""
    if not file.is_file():
        return {}
    with file.open(**_AS_CSV) as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != CROSSWALK:
            raise ValueError("what is there is none: move it away")
        return {row["series"]: row for row in reader}


def planned_row(series: Series, folder: str, patient_id: str) -> dict[str, str]:
    """Return the line of a series in the crosswalk before it is converted: a run that is killed writes no other."""
    return {
        **_known_before(series),
        "folder": folder,
        "patient": folder.partition("/")[0],
        "patient_id": patient_id,
    }


def crosswalk_row(result: SeriesResult, series: Series) -> dict[str, str]:
    """Return what there is to say of a series in the crosswalk when it is done."""
    row = _known_before(series)
    if result.folder:
        row |= {"folder": result.folder, "patient": result.folder.partition("/")[0]}
    if result.status == "skipped":  # it was not looked into again
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
    """Return the *Patient ID* in each of some files, "" where there is none, None where that cannot be told.

    Runs in a worker. The index of headers has none, but a hash that tells the images of one series apart.
    """
    return [_patient_id(header) for header in headers]


def _patient_id(header: SliceHeader) -> str | None:
    import warnings

    import pydicom

    from gpuprep.dicom.headers import HEADER_BYTES
    from gpuprep.files.bounded_reader import open_frugally

    try:
        with warnings.catch_warnings(), closing(open_frugally(header.path, header.member, HEADER_BYTES)) as f:
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(f, stop_before_pixels=True, force=True, specific_tags=["PatientID"])
            return str(ds.get("PatientID", "") or "").strip()
    except Exception:  # pydicom raises whatever a broken file provokes
        return None


def _make_key(file: Path) -> None:
    """Make a key that is there as a whole or not at all: shards that start together may all want to."""
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
    """Return the name of the error that a reason begins with, "" where it begins with none."""
    match = re.match(r"([A-Za-z]+)(?::|$)", reason)
    return match[1] if match else ""


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _without_names(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the headers show without the names of files."""
    return _only(audit, PUBLIC_OF_AUDIT) | {"gaps": [_only(gap, ("mm", "missing")) for gap in audit["gaps"]]}
