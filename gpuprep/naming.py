"""Names that tell nobody who it is: keyed hashes in place of UIDs and patients, and a crosswalk that stays at home.

What leaves has no UID, no path and no free text, which may repeat a file's name: codes say why a series was put right
or left out, and the crosswalk has the words. Names of structures are kept, as they are what labels mean.

References
----------
HMAC: RFC 2104. What identifies: DICOM PS3.15, annex E, and 45 CFR 164.514(b)(2), among them UIDs and file names.
"""

from __future__ import annotations

import csv
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from gpuprep.errors import RequestError
from gpuprep.manifest import SeriesResult
from gpuprep.output import flush
from gpuprep.places import given, is_url
from gpuprep.series import Series, SliceHeader

DIGITS = 20
"""Of a pseudonym: 80 bits, so that no two of a million series share one."""

KEY_BYTES = 32

CROSSWALK = (
    "folder", "series", "patient", "patient_id", "series_uid", "study_uid", "source", "status", "reason",
    "irregularities", "warnings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Keyed hashes of what identifies a patient."""

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
        if not is_url(place := given(out)) and file.resolve().is_relative_to(Path(place).resolve()):
            raise RequestError(f"the key {file} would leave with {out}: keep it elsewhere")
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(secrets.token_hex(KEY_BYTES) + "\n")
            flush(file)
        except FileExistsError:
            pass
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

    @property
    def check(self) -> str:
        """Say which key this is, without saying the key."""
        return self.of("check", "gpuprep")

    def series(self, series: Series) -> Series:
        """Return a series that goes by its pseudonym."""
        return replace(series, alias=self.of("series", series.key.partition("#")[0]))

    def folder(self, series: Series, patient_id: str) -> str:
        """Return where the output of a series goes: those of one patient together, or of a study that names none."""
        patient = self.of("patient", patient_id) if patient_id else self.of("study", series.study_uid)
        return f"{patient}/{series.alias}" + (f"-part{series.part}" if series.part else "")

    def public(self, result: SeriesResult, series: Series) -> SeriesResult:
        """Return a result as it may leave: without UIDs, paths and texts."""
        return replace(
            result,
            series_uid=series.alias,
            study_uid=self.of("study", series.study_uid),
            source="",
            reason=result.reason.partition(":")[0],
            irregularities=(),
            warnings=(),
            audit=result.audit and _without_names(result.audit),
            segmentations=result.segmentations and tuple({"format": s["format"]} for s in result.segmentations),
            labels=result.labels
            and tuple({k: v for k, v in label.items() if k != "source"} for label in result.labels),
        )

    def paths(self, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return files and what is wrong with them as it may leave."""
        return [(self.of("path", path), reason.partition(":")[0]) for path, reason in rows]

    def write_crosswalk(self, rows: Mapping[str, Mapping[str, str]]) -> Path:
        """Write what became of whom beside the key, readable by its owner alone; rows of earlier runs are kept.

        Parameters
        ----------
        rows : mapping
            Of each series, by its key in the manifest: its values by the names in `CROSSWALK`.
        """
        file = self.file.with_name(f"{self.file.name}.crosswalk.csv")
        known: dict[str, Mapping[str, str]] = {}
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as f:
                known = {row["series"]: row for row in csv.DictReader(f)}
        for key, row in rows.items():
            former = known.get(key, {})
            # What is skipped is not looked into again.
            known[key] = {**former, **{name: value for name, value in row.items() if value or name not in former}}
        part = file.with_name(f"{file.name}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", newline="", encoding="utf-8"
        ) as f:
            writer = csv.DictWriter(f, CROSSWALK)
            writer.writeheader()
            writer.writerows(known.values())
        flush(part)
        part.replace(file)
        return file


def who_is(series: Series, folder: str, patient_id: str) -> dict[str, str]:
    """Return the line of a series in the crosswalk, before anything has become of it."""
    return {
        "folder": folder,
        "series": series.key,
        "patient": folder.partition("/")[0],
        "patient_id": patient_id,
        "series_uid": series.series_uid,
        "study_uid": series.study_uid,
        "source": series.folder,
        "status": "",
        "reason": "",
        "irregularities": "",
        "warnings": "",
    }


def what_became(result: SeriesResult) -> dict[str, str]:
    """Return what that line says of a result."""
    return {
        "status": result.status,
        "reason": result.reason,
        "irregularities": json.dumps(result.irregularities) if result.irregularities else "",
        "warnings": json.dumps(result.warnings) if result.warnings else "",
    }


def patient_ids(headers: list[SliceHeader]) -> list[str]:
    """Return the *Patient ID* in each of some files, "" where there is none; runs in a worker.

    Nothing else reads it, and the index of headers has none.
    """
    return [_patient_id(header) for header in headers]


def _patient_id(header: SliceHeader) -> str:
    import warnings

    import pydicom

    from gpuprep.streams import open_frugally

    try:
        with warnings.catch_warnings(), closing(open_frugally(header.path, header.member)) as f:
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(f, stop_before_pixels=True, force=True, specific_tags=["PatientID"])
            return str(ds.get("PatientID", "") or "").strip()
    except Exception:  # whatever is wrong with it, the series is going to say so
        return ""


def _without_names(audit: dict[str, Any]) -> dict[str, Any]:
    """Return what the headers show without the names of files."""
    gaps = [{k: v for k, v in gap.items() if k != "after"} for gap in audit["gaps"]]
    return {k: v for k, v in audit.items() if k != "left_out"} | {"gaps": gaps}
