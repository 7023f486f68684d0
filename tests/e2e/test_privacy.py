"""Output files and messages contain nothing that identifies a patient: every byte of every file is searched."""

from __future__ import annotations

import logging
import os
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless, RLELossless
from typer.testing import CliRunner

from gpuprep.cli.app import app
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.discover import discover
from gpuprep.pipeline.cohort import convert
from gpuprep.testing import write_series

IDENTITY = {
    "PatientName": "Zauberfrau^Ottilie^Q",
    "PatientID": "MRN-00471199",
    "IssuerOfPatientID": "Kantonsregister-XQ",
    "OtherPatientIDs": "ALTID-88-00-77",
    "PatientBirthDate": "19511231",
    "PatientBirthTime": "042317",
    "PatientSex": "O",
    "PatientAge": "074Y",
    "PatientAddress": "Kirschgasse 9, Hintertupfingen",
    "PatientComments": "walks with a crimson stick",
    "PatientBirthName": "Hexenmeister^Ottilie",
    "InstitutionName": "Sankt-Nirgendwo-Spital",
    "InstitutionAddress": "Nirgendstrasse 1",
    "InstitutionalDepartmentName": "Radiologie Sued-Nord",
    "ReferringPhysicianName": "Quacksalber^Igor",
    "PerformingPhysicianName": "Pillendreher^Ida",
    "OperatorsName": "Knopfdruecker^Udo",
    "StationName": "CTSTATION77",
    "DeviceSerialNumber": "SN-31415926",
    "StudyID": "STUDY-0815-XY",
    "AccessionNumber": "ACC-60221407",
    "StudyDescription": "Thorax for Walpurga",
    "SeriesDescription": "Lung kernel, call her son",
    "ProtocolName": "ProtocolOfHers",
    "ImageComments": "hidden tattoo on slice",
    "RequestedProcedureDescription": "rule out dragons",
    "AdditionalPatientHistory": "bitten by a basilisk",
    "StudyDate": "20290317",
    "AcquisitionDate": "20290318",
    "StudyTime": "031415.926",
}
"""Values by keyword. Short values, which occur in any file by chance, are written but not searched for."""

DESCRIPTIONS = ("StudyDescription", "SeriesDescription", "ProtocolName")
"""Free text that `scan` prints, and by which series can be chosen."""
TIMES = ("StudyDate", "StudyTime", "AcquisitionDate")
"""Dates and times by which studies and scans are put in order."""

SECRETS = [value for value in IDENTITY.values() if len(value) >= 8] + ["Zauberfrau", "Ottilie", "PHANTOM"]


def identify(ds: Dataset, k: int) -> None:
    for keyword, value in IDENTITY.items():
        setattr(ds, keyword, value)
    ds.ImageComments = f"{IDENTITY['ImageComments']} {k}"
    block = ds.private_block(0x0009, "Sankt-Nirgendwo-Spital", create=True)
    block.add_new(0x01, "LO", "Zauberfrau in private")


def identify_and_garble(ds: Dataset, k: int) -> None:
    """Put the name into pixel data that cannot be decoded."""
    identify(ds, k)
    ds.file_meta.TransferSyntaxUID = RLELossless if k % 2 else JPEGLSLossless
    ds.PixelData = encapsulate([b"Zauberfrau^Ottilie" * 20])
    ds["PixelData"].is_undefined_length = True


def identify_and_misuse(ds: Dataset, k: int) -> None:
    """Put the name into attributes that should contain codes."""
    identify(ds, k)
    ds.RescaleType = "Zauberfrau"
    ds.PhotometricInterpretation = "ZAUBERFRAU"


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cohort with the name in many attributes: valid series, faulty series of several kinds, and damaged headers."""
    stored = np.random.default_rng(0).integers(0, 3000, (5, 12, 10)).astype(np.int16)
    root, spacing = tmp_path_factory.mktemp("privacy") / "dicom", (2.5, 0.8, 0.7)
    write_series(root / "good", stored, spacing, change=identify)
    write_series(root / "good", stored, spacing, change=identify, series_number=2)
    write_series(root / "gap", stored, spacing, change=identify)[2].unlink()
    os.truncate(write_series(root / "short", stored, spacing, change=identify)[1], 2000)
    write_series(root / "garbled", stored, spacing, change=identify_and_garble)
    write_series(root / "misused", stored, spacing, change=identify_and_misuse)
    whole = write_series(root / "other", stored, spacing, change=identify)[0].read_bytes()
    header = whole.index(b"\xe0\x7f\x10\x00")
    mangled = root / "mangled"
    mangled.mkdir()
    for cut in range(132, header, 29):  # headers truncated at many positions
        (mangled / f"cut-{cut}.dcm").write_bytes(whole[:cut])
    generator = random.Random(0)  # noqa: S311
    for n in range(40):  # headers with random damage
        content = bytearray(whole)
        for _ in range(8):
            content[generator.randrange(132, header)] = generator.randrange(256)
        (mangled / f"damaged-{n}.dcm").write_bytes(content)
    (mangled / "unreadable.dcm").write_bytes(whole.replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x10\x00ZA"))
    return root


def found_in(content: bytes) -> list[str]:
    return [s for s in SECRETS if s.encode() in content or s.encode("utf-16-le") in content]


def values_of(*keywords: str) -> set[str]:
    return {IDENTITY[keyword] for keyword in keywords}


def leaks(out: Path) -> dict[str, list[str]]:
    """Return the secrets in each file, and in the name of each file and folder, under OUT."""
    found = {}
    for path in out.rglob("*"):
        secrets = found_in(str(path.relative_to(out)).encode())
        if path.is_file():
            secrets += found_in(path.read_bytes())
        if secrets:
            found[str(path.relative_to(out))] = secrets
    return found


def test_the_phantoms_contain_the_name_of_the_patient(dicom: Path) -> None:
    # Otherwise the tests below would search for nothing.
    everything = b"".join(p.read_bytes() for p in (dicom / "good").iterdir())
    assert found_in(everything) == [s for s in SECRETS if s != "PHANTOM"]
    assert pydicom.dcmread(next((dicom / "good").iterdir())).PatientName == "Zauberfrau^Ottilie^Q"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(spacing_mm=None, size=(6, 5)),
        Recipe(spacing_mm=None, size=(6, 5), format="tif-stack", dtype="uint16", compression="zlib"),
    ],
    ids=["slices", "stack"],
)
def test_no_output_file_identifies_the_patient(dicom: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    run = convert(dicom, out, recipe, backend="cpu")
    assert run.counts["ok"] >= 2
    assert run.counts["rejected"] >= 4
    assert run.unreadable
    kinds = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert kinds >= {".tif", ".json", ".sqlite", ".csv", ".toml"}
    assert leaks(out) == {}
    assert found_in(repr(run).encode()) == []


def test_outputs_of_worker_processes_do_not_identify_the_patient(dicom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(dicom, out, Recipe(spacing_mm=None, size=(6, 5)), backend="cpu", jobs=1)
    assert leaks(out) == {}


def test_the_header_index_has_descriptions_and_dates_but_no_names_and_is_private(dicom: Path, tmp_path: Path) -> None:
    assert discover(dicom, index=tmp_path / "index" / "headers.sqlite").series
    (file,) = (tmp_path / "index").iterdir()
    assert file.stat().st_size > 10_000
    assert set(leaks(tmp_path / "index")[file.name]) == values_of(*DESCRIPTIONS, *TIMES[:2])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_name_in_place_of_the_modality_is_not_recorded(tmp_path: Path) -> None:
    def misuse(ds: Dataset, _: int) -> None:
        ds.Modality = "PHANTOM"  # the Patient ID

    write_series(tmp_path / "dicom", np.zeros((3, 4, 5), np.int16), (2.5, 0.8, 0.7), change=misuse)
    out = tmp_path / "out"
    (result,) = convert(tmp_path / "dicom", out, backend="cpu").results
    assert (result.status, result.codes) == ("rejected", ("modality",))
    assert leaks(out) == {}


@pytest.mark.parametrize("tag", [b"\x0d\x00", b"\x0e\x00"], ids=["Study Instance UID", "Series Instance UID"])
def test_a_damaged_uid_that_includes_the_next_elements_is_not_recorded(tmp_path: Path, tag: bytes) -> None:
    # UIDs are recorded, and an element with a wrong length extends into the comments.
    def comment(ds: Dataset, _: int) -> None:
        ds.ImageComments = IDENTITY["ImageComments"]

    for file in write_series(tmp_path / "dicom", np.zeros((3, 4, 5), np.int16), (2.5, 0.8, 0.7), change=comment):
        content = file.read_bytes()
        start = content.index(b"\x20\x00" + tag + b"UI") + 6
        length = content.index(b"hidden tattoo on slice") + 22 - (start + 2)
        file.write_bytes(content[:start] + length.to_bytes(2, "little") + content[start + 2 :])
    out = tmp_path / "out"
    assert convert(tmp_path / "dicom", out, backend="cpu").results
    assert leaks(out) == {}


@pytest.mark.parametrize("command", ["scan", "convert"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_messages_on_the_screen_do_not_identify_the_patient(
    dicom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str, options: list[str]
) -> None:
    caplog.set_level(logging.WARNING)  # the level that the command line shows
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    target = ["--out", str(tmp_path / "out"), "--size", "6", "--jobs", "1"] if command == "convert" else []
    result: Any = CliRunner().invoke(app, [command, str(dicom), *target, *options])
    assert result.exit_code == 1
    assert "missing in" in result.stdout + result.stderr
    shown = values_of(*DESCRIPTIONS) if command == "scan" else set()
    assert set(found_in(result.stdout.encode())) <= shown
    assert found_in(result.stderr.encode()) == []
    assert found_in(caplog.text.encode()) == []
