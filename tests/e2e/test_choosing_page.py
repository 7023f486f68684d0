"""The page about choosing series: its commands choose what they should, and its tables are complete."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from choosing_cohort import SERIES, uid, write_cohort
from cohort import gpuprep as run_here
from pydicom import Dataset
from test_docs import DOCS, blocks, inline_code

from gpuprep.output.columns import FREE_TEXT
from gpuprep.pipeline.selection_file import PATH_COLUMNS, UID_COLUMNS
from gpuprep.pipeline.series_facts import PHASES
from gpuprep.pipeline.series_query import FUNCTIONS, KNOWN_COLUMNS
from gpuprep.testing import write_series

PAGE = DOCS / "choosing.md"
TINY = ("--size", "8", "--spacing", "none", "--dtype", "uint8", "--format", "tif-stack", "--backend", "cpu")

PATIENTS = 4
"""Patients of the ordinary cohort. In the last one, soft-1 and its twin lack slices and are rejected."""

FOUR_D: tuple[tuple[str, str, str, int | None, float], ...] = (
    # Name, day of the study, image type, phase in %, slice thickness in mm.
    ("phase-0", "20200101", "ORIGINAL\\PRIMARY\\AXIAL", 0, 3.0),
    ("phase-25", "20200101", "ORIGINAL\\PRIMARY\\AXIAL", 25, 3.0),
    ("phase-50", "20200101", "ORIGINAL\\PRIMARY\\AXIAL", 50, 3.0),
    ("average", "20200101", "DERIVED\\SECONDARY\\AVERAGE", None, 5.0),
    ("later", "20210101", "ORIGINAL\\PRIMARY\\AXIAL", None, 1.0),
)
"""Series of one more patient, p04: a 4D scan with its average, and a thinner scan of a later study."""

NAMES = {uid(patient, made.name): f"p0{patient} {made.name}" for patient in range(PATIENTS) for made in SERIES} | {
    f"1.2.826.0.2.{n}": f"p04 {name}" for n, (name, *_) in enumerate(FOUR_D, 1)
}

EXAMPLES: dict[str, tuple[int, set[str]]] = {
    # Exit code, and the series that are converted.
    # In p03 the thinnest one is rejected, so the next is taken; p04 states no body part.
    "Thin chest CT with a soft kernel": (0, {"p00 soft-1", "p01 soft-1", "p02 soft-1", "p03 soft-2"}),
    # sharp-1, soft-1 and the twin are equally thin. Of p04, the later study would be thinner.
    "One series per patient": (0, {"p00 sharp-1", "p01 sharp-1", "p02 sharp-1", "p03 sharp-1", "p04 phase-0"}),
    "All phases of a 4D scan": (0, {"p04 phase-0", "p04 phase-25", "p04 phase-50"}),
    # The rejected series of p03 fit, so the exit code is 1.
    "No reformats, scouts and secondary images": (
        1,
        {
            f"p0{patient} {name}"
            for patient in range(PATIENTS)
            for name in (
                "arterial", "venous", "sharp-1", "sharp-2", "sharp-5", "soft-1", "soft-2", "soft-5", "twin",
            )
        }
        - {"p03 soft-1", "p03 twin"}
        | {"p04 phase-0", "p04 phase-25", "p04 phase-50", "p04 later"},
    ),
    "A list of UIDs from TCIA or IDC": (0, {"p00 soft-5", "p02 venous"}),
}  # fmt: skip
MANIFEST = "downloadServerUrl=https://example.org\nmanifestVersion=3.0\nListOfSeriesToDownload=\n{}\n{}\n"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cohort(tmp_path_factory.mktemp("cohort"), PATIENTS)

    def change(day: str, image_type: str, phase: int | None, ds: Dataset, _: int) -> None:
        ds.PatientID, ds.StudyInstanceUID = "P04", f"1.2.826.0.2.{day}"
        ds.FrameOfReferenceUID = f"{ds.StudyInstanceUID}.0"
        ds.StudyDate = ds.AcquisitionDate = day
        ds.StudyTime = ds.AcquisitionTime = "100000"
        ds.ImageType = image_type.split("\\")
        if phase is not None:
            ds.NominalPercentageOfRespiratoryPhase = phase

    for n, (name, day, image_type, phase, thickness_mm) in enumerate(FOUR_D, 1):
        write_series(
            root / "p04" / name,
            np.random.default_rng(n).integers(0, 2000, (6, 8, 8)).astype(np.int16),
            (thickness_mm, 2.5, 2.5),
            series_uid=f"1.2.826.0.2.{n}",
            series_number=n,
            change=partial(change, day, image_type, phase),
        )
    return root


@pytest.fixture
def folder(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of a reader of the page, who has the cohort in DICOM."""
    (tmp_path / "DICOM").symlink_to(cohort)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cohort.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(text: str) -> list[list[str]]:
    """Return the words of the commands of a block, without the name of the program."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ gpuprep ")) for line in lines if line.startswith("$ gpuprep ")]


def examples() -> dict[str, list[list[str]]]:
    """Return the commands of each section with an example, by its heading."""
    found = re.findall(r"(?ms)^### ([^\n]+)$(?:(?!^#).)*?^```console\n(.*?)^```$", PAGE.read_text("utf-8"))
    return {heading: commands(text) for heading, text in found}


def manifest_rows(out: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the manifest by the name of the series."""
    with (out / "manifest.csv").open(newline="") as f:
        return {NAMES[row["series_uid"]]: row for row in csv.DictReader(f)}


def converted(out: Path) -> set[str]:
    return {name for name, row in manifest_rows(out).items() if row["status"] in ("ok", "fixed")}


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_converts_the_series_that_its_heading_names(heading: str, folder: Path) -> None:
    (words,) = examples()[heading]
    (folder / "manifest.tcia").write_text(MANIFEST.format(uid(0, "soft-5"), uid(2, "venous")))
    code, wanted = EXAMPLES[heading]
    ended = run_here(*words, *TINY, "--quiet")
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert converted(folder / "OUT") == wanted


def test_every_example_is_run() -> None:
    assert list(examples()) == list(EXAMPLES)


def test_a_table_of_scan_is_cut_and_given_back(folder: Path) -> None:
    *_, block = [b for b in blocks(PAGE) if b.kind == "console"]
    scan, convert = commands("\n".join(block.lines))
    assert run_here(*scan).returncode == 1  # it shows the rejected series of p03
    with (folder / "choice.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(NAMES) - PATIENTS  # all but the dose pages, which are no CT images
    kept = [row for row in rows if row["source"].endswith(("p01/soft-1", "p02/soft-5"))]
    with (folder / "choice.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], "split", "case"])
        writer.writeheader()
        writer.writerows([kept[0] | {"split": "train", "case": "case_1"}, kept[1] | {"split": "train"}])
    assert run_here(*convert, *TINY).returncode == 0
    folders = {name: row["folder"] for name, row in manifest_rows(folder / "OUT").items() if row["folder"]}
    assert folders == {"p01 soft-1": "train/case_1", "p02 soft-5": "train/DICOM/p02/soft-5"}


def test_the_example_in_python_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [b for b in blocks(PAGE) if b.kind == "python"]
    (folder / "choice.csv").write_text("\n".join(["series_uid", uid(0, "soft-5"), uid(0, "soft-2"), uid(1, "coronal")]))
    (folder / "example.py").write_text("\n".join(block.lines), "utf-8")
    runpy.run_path(str(folder / "example.py"))
    *_, counts = capsys.readouterr().out.splitlines()
    assert counts == str({"excluded": len(NAMES) - PATIENTS - 1, "ok": 1})
    assert converted(folder / "OUT") == {"p00 soft-2"}


def test_the_recipe_of_the_page_chooses_and_another_choice_converts_nothing_twice(folder: Path) -> None:
    (block,) = [b for b in blocks(PAGE) if b.kind == "toml"]
    (folder / "recipe.toml").write_text("\n".join(block.lines), "utf-8")
    words = ("convert", "DICOM", "--out", "OUT", "--recipe", "recipe.toml", *TINY)
    assert run_here(*words).returncode == 0
    assert converted(folder / "OUT") == {"p00 soft-1", "p01 soft-1", "p02 soft-1", "p03 soft-2"}
    more = run_here(*words, "--best-per", "none", "--prefer", "none", "--json")
    # Of four patients soft-1, soft-2 and soft-5 fit; soft-1 and the twin of p03 are rejected.
    counts = json.loads(more.stdout)["counts"]
    assert counts == {"skipped": 4, "ok": 7, "rejected": 2, "excluded": len(NAMES) - PATIENTS - 13}


def test_the_tables_of_the_page_are_complete() -> None:
    text = PAGE.read_text("utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)` \|[^|]*\| ?(\S*) ?\| ?(\w*) ?\|$", text)
    assert rows == [(column.name, column.unit, column.keyword) for column in KNOWN_COLUMNS.values()]
    assert re.findall(r"(?m)^\| ([A-Z]\w+) \| (%|ms|s|index) \|$", text) == [(word, unit) for word, unit, _ in PHASES]
    assert {*FUNCTIONS, *UID_COLUMNS, *PATH_COLUMNS, *FREE_TEXT} <= set(inline_code(PAGE))
