"""With ``--names hash`` OUT contains no identifying value: every byte and every file name is searched."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from segmentations import write_rtstruct
from test_privacy import IDENTITY, identify
from typer.testing import CliRunner, Result

import gpuprep
from gpuprep.cli.app import app
from gpuprep.core.mask_options import Masks
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.audit import audit
from gpuprep.dicom.discover import discover
from gpuprep.errors import OutputError, RequestError
from gpuprep.output.columns import FREE_TEXT, SERIES
from gpuprep.output.manifest import Manifest
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline import cohort, prepare
from gpuprep.pipeline.convert_masks import Label
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.pseudonyms import CODED, PUBLIC_OF_AUDIT, PUBLIC_OF_LABELS, Pseudonyms
from gpuprep.testing import write_series

SPACING = (2.5, 0.8, 0.7)
PATH = "MRN-00471199 Zauberfrau"
"""Name of the folder with the series of the patient."""


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series of one patient and one of another, a gap, a corrected series, a damaged file, two RTSTRUCTs."""
    stored = np.random.default_rng(0).integers(0, 3000, (6, 12, 10)).astype(np.int16)
    root = tmp_path_factory.mktemp("naming") / "klinik"
    for n, name in enumerate(("thorax", "abdomen")):
        rename(write_series(root / PATH / name, stored, SPACING, change=identify, series_number=n))

    def somebody_else(ds: pydicom.Dataset, k: int) -> None:
        identify(ds, k)
        ds.PatientID = "MRN-99887766"

    rename(write_series(root / "Igor Nachbar" / "ct", stored, SPACING, change=somebody_else))
    files = rename(write_series(root / PATH / "gap", stored, SPACING, change=identify))
    files[2].unlink()
    twelve = np.concatenate([stored, stored + 1])
    rename(write_series(root / PATH / "filled", twelve, SPACING, change=identify))[5].unlink()
    (root / PATH / "thorax" / "broken Zauberfrau.dcm").write_bytes(files[0].read_bytes()[:200])
    first = pydicom.dcmread(sorted((root / PATH / "thorax").glob("IM*"))[0])
    (root / PATH / "konturen").mkdir()
    uids = str(first.SeriesInstanceUID), str(first.FrameOfReferenceUID)
    for name, left in (("RS Zauberfrau.dcm", 0), ("RS Nachbar.dcm", 3)):  # distinguished by file name
        write_rtstruct(
            root / PATH / "konturen" / name, {"heart": [square(first, left)]}, series_uid=uids[0], frame_uid=uids[1],
            change=lambda ds: identify(ds, 0),
        )  # fmt: skip
    return root


def rename(files: list[Path]) -> list[Path]:
    return [f.rename(f.with_name(f"IM Zauberfrau {n:03}.dcm")) for n, f in enumerate(files)]


def square(ds: pydicom.Dataset, left: float) -> Any:
    x, y, z = map(float, ds.ImagePositionPatient)
    x += left
    return [(x + 1, y + 1, z), (x + 3, y + 1, z), (x + 3, y + 5, z), (x + 1, y + 5, z)]


def secrets(dicom: Path) -> list[str]:
    """Return every identifying value in the files and in their paths."""
    found = {value for value in IDENTITY.values() if len(value) >= 8} | {"MRN-99887766", "Zauberfrau", "Nachbar"}
    for file in dicom.rglob("*.dcm"):
        found |= {part for part in file.relative_to(dicom.parent).parts if len(part) > 4}
        ds = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        for element in ds.iterall():
            if element.VR == "UI" and str(element.value).count(".") > 5 and "1.2.840.10008" not in str(element.value):
                found.add(str(element.value))
    return sorted(found)


def convert(dicom: Path, out: Path, key: Path | None, *words: str) -> Result:
    names = [] if key is None else ["--names", "hash", "--key", str(key)]
    recipe = ["--size", "16", "--backend", "cpu", "--jobs", "1", "--index", "none"]
    return CliRunner().invoke(app, ["convert", str(dicom), "--out", str(out), *names, *recipe, *words])


@pytest.fixture(scope="module")
def made(dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return output and key of a run with masks and a log."""
    home = tmp_path_factory.mktemp("home")
    run = convert(dicom, home / "out", home / "key", "--masks", "auto", "--log", str(home / "out" / "run.log"))
    assert run.exit_code == 2, "a log in an OUT that is not there yet"
    (home / "out").mkdir()
    log = str(home / "out" / "run.log")
    run = convert(dicom, home / "out", home / "key", "--masks", "auto", "--report", "--log", log)
    assert run.exit_code == 1, run.output
    assert (home / "out" / "report.html").is_file()
    return home / "out", home / "key"


def search(out: Path, dicom: Path) -> int:
    """Search every byte of every file, and every file name; return the number of files."""
    values, searched = secrets(dicom), 0
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        assert [v for v in values if v in name] == []
        if path.is_file():
            content = path.read_bytes()
            assert [v for v in values if v.encode() in content or v.encode("utf-16-le") in content] == [], name
            searched += 1
    return searched


def test_the_output_contains_no_identifying_value(made: tuple[Path, Path], dicom: Path) -> None:
    out, _ = made
    assert len(secrets(dicom)) > 40
    assert search(out, dicom) > 40
    # The crosswalk does contain the values.
    crosswalk = (out.parent / "key.crosswalk.csv").read_text()
    assert "Zauberfrau" in crosswalk
    assert "MRN-00471199" in crosswalk


def test_the_output_of_the_command_mask_contains_no_identifying_value(dicom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "Zauberfrau.txt").write_text("1\t1\n3\t1\n3\t4\n1\t4\n")  # matches no series, so it is reported
    words = ["mask", str(dicom / PATH / "konturen"), str(tmp_path / "Zauberfrau.txt"), "--series", str(dicom)]
    names = ["--names", "hash", "--key", str(tmp_path / "key"), "--out", str(out), "--backend", "cpu", "--jobs", "1"]
    run = CliRunner().invoke(app, [*words, *names, "--size", "16", "--index", "none"])
    assert run.exit_code == 1, run.output
    assert "Zauberfrau.txt" in run.output
    assert search(out, dicom) > 5


def test_every_text_of_a_result_is_either_harmless_or_replaced(made: tuple[Path, Path]) -> None:
    # A new column must be added to one of these sets.
    harmless = {
        "status", "reason", "codes", "engine", "backend", "device", "recipe_sha256", "version", "sha256", "host",
        "finished", "fingerprint", "labels", "segmentations", "audit", "quality", "shape", "source_shape", "spacing_mm",
        "source_spacing_mm", "group_id", "phase_unit", "phase_source", "plane", "contrast",
        "crop",
    }  # fmt: skip
    replaced = {"key", "series_uid", "study_uid", "folder", "frame_of_reference_uid", "duplicate_of"}
    empty = {"source", "irregularities", "warnings", "model", *FREE_TEXT}
    texts = {name for name, column in SERIES.items() if column.kind.sqlite == "TEXT"}
    assert texts == harmless | replaced | empty | set(CODED)
    with closing(Manifest(made[0] / "manifest.sqlite", reading=True)) as manifest:
        results = list(manifest)
    assert len(results) == 6
    for r in results:
        assert (r.source, r.irregularities, r.warnings) == ("", (), ())
        assert re.fullmatch("[0-9a-f]{20}", r.key)
        assert re.fullmatch("([0-9a-f]{20}/[0-9a-f]{20})?", r.folder)
        assert re.fullmatch("[A-Za-z]*", r.reason)
        assert re.fullmatch("([0-9a-f]{20})?", r.frame_of_reference_uid or "")
        assert {r.model, *(getattr(r, name) for name in FREE_TEXT)} == {None}
    ok = [("ok", ())] * 3
    assert sorted((r.status, r.codes) for r in results) == [
        ("fixed", ("gap",)), *ok, ("rejected", ("gap",)), ("rejected", ("no-uid",)),
    ]  # fmt: skip


def test_names_in_place_of_codes_and_the_words_of_a_choice_stay_out(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 3000, (4, 12, 10)).astype(np.int16)

    def misuse(ds: pydicom.Dataset, k: int) -> None:
        identify(ds, k)
        ds.ConvolutionKernel, ds.Manufacturer, ds.ManufacturerModelName = (
            ["Br40d", "Zauberfrau"],
            "Zauberfrau",
            "Ottilie 7",
        )
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "ZAUBERFRAU"]
        ds.BodyPartExamined = ds.PatientPosition = ds.ScanOptions = ds.AcquisitionType = "ZAUBERFRAU"
        ds.ContrastBolusAgent = "for Zauberfrau"

    for n in range(3):
        rename(
            write_series(tmp_path / "klinik" / PATH / f"series {n}", stored, SPACING, change=misuse, series_number=n)
        )
    choice = ["--where", "series_description LIKE '%call her son%' AND series_number > 0", "--drop-duplicates"]
    best = ["--best-per", "patient", "--prefer", "series_description = 'Lung kernel, call her son'"]
    run = convert(tmp_path / "klinik", tmp_path / "out", tmp_path / "key", *choice, *best, "--report")
    assert run.exit_code == 0, run.output
    assert search(tmp_path / "out", tmp_path / "klinik") > 5
    with closing(Manifest(tmp_path / "out" / "manifest.sqlite", reading=True)) as manifest:
        results = sorted(manifest, key=lambda r: r.series_number or 0)
    assert [(r.status, r.codes) for r in results] == [
        ("excluded", ("where",)), ("ok", ()), ("excluded", ("duplicate-series",)),
    ]  # fmt: skip
    one = results[1]
    assert (one.kernel, one.manufacturer, one.image_type) == (
        "Br40d\\another",
        "another",
        "ORIGINAL\\PRIMARY\\AXIAL\\another",
    )
    assert (one.body_part, one.patient_position, one.contrast, one.model) == ("another", "another", "yes", None)
    assert results[2].duplicate_of == one.key


def test_series_of_a_patient_share_a_folder(made: tuple[Path, Path]) -> None:
    out, key = made
    with (key.parent / "key.crosswalk.csv").open(newline="") as f:
        rows = {os.path.basename(row["source"]): row for row in csv.DictReader(f) if row["series_uid"]}
    assert set(rows) == {"thorax", "abdomen", "filled", "gap", "ct"}
    folders = {name: row["folder"].partition("/")[0] for name, row in rows.items()}
    assert folders["thorax"] == folders["abdomen"] == folders["filled"] == rows["thorax"]["patient"]
    assert folders["ct"] not in ("", folders["thorax"])
    assert (folders["gap"], rows["gap"]["status"]) == ("", "rejected")
    assert "IM Zauberfrau 001.dcm" in rows["gap"]["reason"]
    assert "IM Zauberfrau 004.dcm" in rows["filled"]["irregularities"]
    assert rows["ct"]["patient_id"] == "MRN-99887766"
    sidecar = json.loads((out / rows["thorax"]["folder"] / "volume.json").read_text())
    assert sidecar["key"] == rows["thorax"]["series"]
    assert len(sidecar["labels"]) == 2
    assert all(re.fullmatch(r"heart \([0-9a-f]{20}\)", label["name"]) for label in sidecar["labels"])
    assert sidecar["labels"][0].keys() == set(PUBLIC_OF_LABELS)
    assert sidecar["segmentations"] == [{"format": "RTSTRUCT"}] * 2
    for file in (key, key.parent / "key.crosswalk.csv"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_crosswalk_lists_a_volume_before_the_volume_exists(dicom: Path, tmp_path: Path) -> None:
    class Reader(Listener):
        def finished(self, result: SeriesResult) -> None:
            with (tmp_path / "key.crosswalk.csv").open(newline="") as f:
                rows = {row["series"]: row for row in csv.DictReader(f)}
            if result.folder:
                assert rows[result.key]["series_uid"].count(".") > 5
                assert rows[result.key]["patient_id"].startswith("MRN-")
                assert rows[result.key]["folder"] == result.folder

    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    run = gpuprep.convert(
        dicom, tmp_path / "out", gpuprep.Recipe(size=(16, 16)), backend="cpu", names=names, listener=Reader()
    )
    assert run.counts == {"ok": 3, "fixed": 1, "rejected": 2}


def test_a_run_with_the_same_key_resumes_and_another_key_is_refused(
    made: tuple[Path, Path], dicom: Path, tmp_path: Path
) -> None:
    out, key = made
    crosswalk = (key.parent / "key.crosswalk.csv").read_text()
    again = convert(dicom, out, key, "--masks", "auto", "--json")
    assert json.loads(again.stdout)["counts"] == {"skipped": 4, "rejected": 2}
    assert (key.parent / "key.crosswalk.csv").read_text() == crosswalk, "skipped series do not change the crosswalk"
    for names, words in (
        (None, f"{out} was made with --names hash: give it again with its --key, or choose another --out"),
        (tmp_path / "k2", f"{out} was made with another --key than {tmp_path / 'k2'}: give that, or choose another"),
    ):
        refused = convert(dicom, out, names, "--masks", "auto")
        assert refused.exit_code == 2
        assert words in refused.stderr
    retried = CliRunner().invoke(app, ["retry", str(out), "--rejected"])
    assert retried.exit_code == 2
    assert "run gpuprep convert again with --names hash and the same --key" in retried.stderr
    looked = convert(dicom, out, tmp_path / "k2", "--dry-run")
    assert (looked.exit_code, "was made with another --key" in looked.stderr) == (2, True)


def test_an_output_with_plain_names_is_refused_with_a_key(small_series: Path, tmp_path: Path) -> None:
    assert convert(small_series, tmp_path / "out", None).exit_code == 0
    refused = convert(small_series, tmp_path / "out", tmp_path / "key")
    assert refused.exit_code == 2
    assert "was made without --names hash: choose another --out, or leave it out" in refused.stderr


def test_another_key_gives_other_names(tmp_path: Path) -> None:
    one, other = (Pseudonyms.load(tmp_path / name, tmp_path / "out") for name in ("a", "b"))
    assert one.of("series", "1.2.3") != other.of("series", "1.2.3")
    assert one.of("series", "1.2.3") != one.of("patient", "1.2.3")
    assert one == Pseudonyms.load(tmp_path / "a", tmp_path / "out")


def test_pseudonyms_are_hmac_sha_256(tmp_path: Path) -> None:
    # Computed by the definition in RFC 2104.
    names = Pseudonyms(bytes([0x0B] * 20), tmp_path / "key")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in bytes([0x0B] * 20).ljust(64, b"\0")) + b"series\x001.2.3").digest()
    outer = hashlib.sha256(bytes(b ^ 0x5C for b in bytes([0x0B] * 20).ljust(64, b"\0")) + inner).hexdigest()
    assert names.of("series", "1.2.3") == outer[:20]


def readable(key: Path) -> None:
    key.write_text("00" * 32)
    key.chmod(0o640)


def no_key(key: Path) -> None:
    key.write_text("swordfish")
    key.chmod(0o600)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (readable, "may be read by others than you: chmod 600"),
        (no_key, "holds no key: give the file of an earlier run"),
    ],
)
def test_an_invalid_key_or_a_key_readable_by_others_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(tmp_path / "key")
    with pytest.raises(RequestError, match=words):
        Pseudonyms.load(tmp_path / "key", tmp_path / "out")


def test_a_key_inside_the_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the key .* would leave with .*: keep it elsewhere"):
        Pseudonyms.load(tmp_path / "out" / "key", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "key").write_text("00" * 32)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "key")  # its crosswalk would be written beside the link
    with pytest.raises(RequestError, match=r"the key .* would leave with .*: keep it elsewhere"):
        Pseudonyms.load(tmp_path / "out" / "link", tmp_path / "out")


def test_names_hash_and_key_must_be_given_together(small_series: Path, tmp_path: Path) -> None:
    alone = CliRunner().invoke(app, ["convert", str(small_series), "--out", str(tmp_path / "o"), "--names", "hash"])
    assert (alone.exit_code, "needs --key FILE" in alone.stderr) == (2, True)
    useless = CliRunner().invoke(app, ["convert", str(small_series), "--out", str(tmp_path / "o"), "--key", "k"])
    assert (useless.exit_code, "--key is only for --names hash: give both" in useless.stderr) == (2, True)


def test_only_listed_fields_of_audits_and_labels_are_written(dicom: Path) -> None:
    # A new field is not written until it is added to the list, or to this test.
    measured = audit(discover(dicom, index=None).series[0]).to_dict()
    assert measured.keys() - set(PUBLIC_OF_AUDIT) == {"left_out"}
    assert {f.name for f in fields(Label)} - set(PUBLIC_OF_LABELS) == {"source"}


def test_fingerprints_cannot_be_matched_with_those_of_the_files(made: tuple[Path, Path], dicom: Path) -> None:
    plain = {s.fingerprint for s in discover(dicom, index=None).series}
    with closing(Manifest(made[0] / "manifest.sqlite", reading=True)) as manifest:
        kept = {r.fingerprint for r in manifest}
    assert not {p[:20] for p in plain} & {k[:20] for k in kept}


def test_structure_names_from_paths_are_hashed_unless_an_alias_lists_them(small_series: Path, tmp_path: Path) -> None:
    ids = [pydicom.dcmread(f).SOPInstanceUID for f in sorted(small_series.rglob("*.dcm"))][:2]
    masks = tmp_path / "Frau Zauberfrau"
    masks.mkdir()
    for n, name in enumerate(("Zauberfrau", "Herz", "")):  # the last structure is named after the folder
        for uid in ids:
            (masks / f"{name}_{uid}.txt").write_text(f"{3 * n}\t1\n{3 * n + 2}\t1\n{3 * n + 2}\t4\n{3 * n}\t4\n")
    recipe = Recipe(
        spacing_mm=None, size=None, masks=Masks(units="px", text_format="imagej-xy", aliases=(("heart", ("herz",)),))
    )
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    run = cohort.convert(small_series, tmp_path / "out", recipe, masks=masks, backend="cpu", names=names)
    (result,) = run.results
    assert (result.status, run.unmatched) == ("ok", ())
    assert result.labels is not None
    expected = {"heart"} | {f"structure-{names.of('structure', n)}" for n in ("Zauberfrau", "Frau Zauberfrau")}
    assert {label["name"] for label in result.labels} == expected
    assert set(json.loads((tmp_path / "out" / "labels.json").read_text())) == expected
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"Zauberfrau" in p.read_bytes()] == []
    again = cohort.convert(small_series, tmp_path / "out", recipe, masks=masks, backend="cpu", names=names)
    assert again.counts == {"skipped": 1}


def test_an_output_is_recognised_without_its_manifest(small_series: Path, tmp_path: Path) -> None:
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    recipe = Recipe(spacing_mm=None, size=None)
    (first,) = cohort.convert(small_series, tmp_path / "out", recipe, backend="cpu", names=names).results
    (tmp_path / "out" / "manifest.sqlite").unlink()
    (again,) = cohort.convert(small_series, tmp_path / "out", recipe, backend="cpu", names=names).results
    assert (again.status, again.sha256, again.read_s) == ("ok", first.sha256, 0.0)


def test_a_refused_run_with_plain_names_leaves_no_path_in_the_manifest(small_series: Path, tmp_path: Path) -> None:
    # Otherwise a later run with hashed names would keep it.
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    with pytest.raises(RequestError, match="does not exist"):
        cohort.convert([small_series], tmp_path / "out", masks=tmp_path / "Zauberfrau", backend="cpu")
    with pytest.raises(RequestError, match="was made without --names hash"):
        cohort.convert(small_series, tmp_path / "out", backend="cpu", names=names)


@pytest.mark.parametrize("packed", ["gz", "zip"])
def test_the_patient_id_is_also_read_from_packed_files(small_series: Path, tmp_path: Path, packed: str) -> None:
    files = sorted(small_series.rglob("*.dcm"))
    (tmp_path / "packed").mkdir()
    for file in files:
        ds = pydicom.dcmread(file)
        ds.PatientID, ds.SpecificCharacterSet = " Müller-17 ", "ISO_IR 100"
        ds.save_as(file)
        if packed == "gz":
            (tmp_path / "packed" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    if packed == "zip":
        with zipfile.ZipFile(tmp_path / "packed" / "all.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    recipe = Recipe(spacing_mm=None, size=None)
    (result,) = cohort.convert(tmp_path / "packed", tmp_path / "out", recipe, backend="cpu", names=names).results
    assert result.folder.partition("/")[0] == names.of("patient", "Müller-17")
    assert ",Müller-17," in (tmp_path / "key.crosswalk.csv").read_text("utf-8")


@pytest.mark.parametrize("study", [True, False])
def test_a_series_without_patient_id_is_grouped_by_study_or_alone(
    small_series: Path, tmp_path: Path, study: bool
) -> None:
    for file in small_series.rglob("*.dcm"):
        ds = pydicom.dcmread(file)
        ds.PatientID = " "
        if not study:
            del ds.StudyInstanceUID
        ds.save_as(file)
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    recipe = Recipe(spacing_mm=None, size=None)
    (result,) = cohort.convert(small_series, tmp_path / "out", recipe, backend="cpu", names=names).results
    patient = names.of("study", str(ds.StudyInstanceUID)) if study else names.of("patient of", result.key)
    assert result.folder == f"{patient}/{result.key}"
    assert bool(result.study_uid) == study


def test_a_series_whose_patient_id_cannot_be_read_is_rejected(
    small_series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "patient_ids", lambda headers: [None for _ in headers])
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    (result,) = cohort.convert(small_series, tmp_path / "out", backend="cpu", names=names).results
    assert (result.status, result.codes, result.folder) == ("rejected", ("changed",), "")
    assert result.audit is not None
    assert result.audit["slices"] == result.slices == 6
    assert "its Patient ID cannot be read" in (tmp_path / "key.crosswalk.csv").read_text()


def test_the_crosswalk_is_written_before_conversion_starts(small_series: Path, tmp_path: Path) -> None:
    class Killed(Listener):
        def planned(self, _: Any) -> None:
            raise MemoryError

    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    with pytest.raises(MemoryError):
        cohort.convert(small_series, tmp_path / "out", backend="cpu", names=names, listener=Killed())
    with (tmp_path / "key.crosswalk.csv").open(newline="") as f:
        (row,) = csv.DictReader(f)
    assert (row["patient_id"], row["status"], row["source"]) == ("PHANTOM", "", str(small_series / "ct"))


def test_the_crosswalk_has_the_latest_state_of_each_series(tmp_path: Path) -> None:
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    path = os.fsdecode(b"/data/M\xfcller")  # not UTF-8
    names.write_crosswalk({"a": {"series": "a", "source": path, "status": "failed", "reason": "OSError: gone"}})
    names.write_crosswalk({"b": {"series": "b", "status": "ok"}})
    file = names.write_crosswalk({"a": {"series": "a", "status": "ok", "reason": ""}})
    lines = file.read_bytes().splitlines()
    assert lines[1:] == [b",a,,,,,/data/M\xfcller,ok,,,", b",b,,,,,,ok,,,"]
    file.write_text("mine,yours\n")
    with pytest.raises(
        OutputError, match=r"cannot write the crosswalk .*: the file there is no crosswalk: move it away"
    ):
        names.write_crosswalk({})
    assert file.read_text() == "mine,yours\n"


def test_concurrent_starts_create_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: Pseudonyms.load(tmp_path / "key", tmp_path / "out"), range(8)))
    assert len({names.key for names in made}) == 1
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: made[0].write_crosswalk({str(n): {"series": str(n)}}), range(8)))
    assert len((tmp_path / "key.crosswalk.csv").read_text().splitlines()) == 9
    assert {p.name for p in tmp_path.iterdir()} == {"key", "key.crosswalk.csv", "key.crosswalk.csv.lock"}


def test_shards_with_different_keys_are_refused(small_series: Path, tmp_path: Path) -> None:
    out, one, other = (tmp_path / name for name in ("out", "one", "other"))
    assert convert(small_series, out, one, "--shard", "1/2").exit_code in (0, 3)
    for key, words in ((other, "was made with another --key"), (None, "was made with --names hash")):
        refused = convert(small_series, out, key, "--shard", "2/2")
        assert (refused.exit_code, words in refused.stderr) == (2, True)
    # A shard made on another machine, where the other shards are not visible:
    assert convert(small_series, tmp_path / "elsewhere", other, "--shard", "2/2").exit_code in (0, 3)
    (tmp_path / "elsewhere" / "manifest.2-of-2.sqlite").replace(out / "manifest.2-of-2.sqlite")
    merged = CliRunner().invoke(app, ["merge", str(out)])
    assert merged.exit_code == 2
    assert "was made with other --names or another --key than" in merged.stderr


def test_merged_shards_equal_a_single_run(dicom: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    out, key = made
    for part in ("1/2", "2/2"):
        convert(dicom, tmp_path / "out", key, "--masks", "auto", "--shard", part)
    assert CliRunner().invoke(app, ["merge", str(tmp_path / "out")]).exit_code == 0
    volumes = {p.relative_to(out): p.read_bytes() for p in out.glob("[0-9a-f]*/*/**/*") if p.is_file()}
    assert {
        p.relative_to(tmp_path / "out"): p.read_bytes()
        for p in (tmp_path / "out").glob("[0-9a-f]*/*/**/*")
        if p.is_file()
    } == volumes
    rows: list[NDArray[Any] | list[tuple[str, str]]] = []
    for place in (out, tmp_path / "out"):
        with closing(Manifest(place / "manifest.sqlite", reading=True)) as manifest:
            rows.append(sorted((r.key, r.status) for r in manifest))
    assert rows[0] == rows[1]
