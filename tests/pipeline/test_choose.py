"""Tests of the choice of series: conditions, preferences, duplicates and lists, on a cohort of 60 patients."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choosing_cohort import PATIENTS, SERIES, is_broken, study_uid, uid, write_cohort
from pydicom import Dataset
from typer.testing import CliRunner

import gpuprep
from gpuprep.cli.app import app
from gpuprep.core.recipe import Recipe
from gpuprep.errors import RequestError
from gpuprep.output.columns import FREE_TEXT
from gpuprep.output.records import SeriesFacts
from gpuprep.pipeline.scan import Scan
from gpuprep.pipeline.series_query import KNOWN_COLUMNS, SeriesTable, order_terms
from gpuprep.testing import write_series

NAMES = [made.name for made in SERIES if made.name != "dose"]
"""All series but the dose page, which is no CT image."""
SMALL = Recipe(size=(8, 8), spacing_mm=None, dtype="uint8", format="tif-stack")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, so that all choices after the first open no file."""
    return tmp_path_factory.mktemp("index") / "headers.sqlite"


def codes(found: Scan) -> list[dict[str, str]]:
    """Return what is done with each series of each patient, by name: "" for a conversion, else a code."""
    names = {uid(patient, name): (patient, name) for patient in range(PATIENTS) for name in NAMES}
    by_patient: list[dict[str, str]] = [{} for _ in range(PATIENTS)]
    for planned in found.planned:
        patient, name = names[planned.series.series_uid]
        by_patient[patient][name] = "" if planned.action == "convert" else planned.codes[0]
    return by_patient


WHOLE = {"scout": "localizer"}
"""What is done without a choice: only the scout is rejected."""


def all_but(code: str, *kept: str) -> dict[str, str]:
    return {name: code for name in NAMES if name not in kept}


CHOICES: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]] = {
    # Options, codes by series, and those of patients whose soft-1 and its copy are rejected.
    "thinnest and softest of each study": (
        {"best_per": "study", "prefer": "slice_thickness_mm, kernel"},
        all_but("best-per", "soft-1"),
        all_but("best-per", "sharp-1"),
    ),
    "thick soft kernel": (
        {"where": "kernel = 'B30f' AND slice_thickness_mm = 5"},
        all_but("where", "soft-5"),
        all_but("where", "soft-5"),
    ),
    "axial series without contrast, longest first": (
        {
            "where": "plane = 'axial' AND contrast = 'unknown' AND kernel LIKE 'B3%'",
            "best_per": "patient",
            "prefer": "-slices",
        },
        all_but("where", "soft-1", "soft-2", "soft-5", "twin")
        | {"soft-2": "best-per", "soft-5": "best-per", "twin": "best-per"},
        # soft-1, its copy and soft-2 have 8 slices there, and soft-2 alone is sound.
        all_but("where", "soft-1", "soft-2", "soft-5", "twin")
        | {"soft-1": "best-per", "soft-5": "best-per", "twin": "best-per"},
    ),
    "all with contrast": (
        {"where": "contrast = 'yes'"},
        all_but("where", "arterial", "venous"),
        all_but("where", "arterial", "venous"),
    ),
    "no reformats and scouts, no copies": (
        {"where": "image_type LIKE 'ORIGINAL%' AND image_type NOT LIKE '%LOCALIZER%'", "drop_duplicates": True},
        {"scout": "where", "coronal": "where", "twin": "duplicate-series"},
        # Rejected series are not compared.
        {"scout": "where", "coronal": "where", "soft-1": "gap", "twin": "gap"},
    ),
    "by description": (
        {"where": "series_description LIKE '% 2.5 %' COLLATE NOCASE AND verdict <> 'rejected'"},
        all_but("where", "soft-2", "sharp-2"),
        all_but("where", "soft-2", "sharp-2"),
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_keeps_the_series_in_the_table_and_gives_every_other_one_its_code(
    name: str, cohort: Path, index: Path
) -> None:
    options, intact, broken = CHOICES[name]
    found = codes(gpuprep.scan(cohort, index=index, **options))
    for patient in range(PATIENTS):
        given = broken if is_broken(patient) else intact
        # A rejected series that nothing is preferred to stays rejected.
        wanted = {series: given.get(series, "") for series in NAMES}
        assert found[patient] == wanted, patient
    assert sum(map(is_broken, range(PATIENTS))) == 6


def test_without_a_choice_only_scouts_and_broken_series_are_left_out(cohort: Path, index: Path) -> None:
    found = gpuprep.scan(cohort, index=index)
    gaps = {"soft-1": "gap", "twin": "gap"}
    for patient, given in enumerate(codes(found)):
        assert given == dict.fromkeys(NAMES, "") | WHOLE | (gaps if is_broken(patient) else {})
    assert found.cohort.passed_over == {"Secondary Capture Image Storage": PATIENTS}


def test_series_of_one_acquisition_share_a_group(cohort: Path, index: Path) -> None:
    by_group: dict[str, set[str]] = {}
    names = {uid(7, name): name for name in NAMES}
    for row in gpuprep.scan(cohort, index=index).rows():
        if row["series_uid"] in names:
            by_group.setdefault(row["group_id"], set()).add(names[row["series_uid"]])
    # The coronal reformat covers the same 20 mm along the patient's axis.
    same = {"soft-1", "soft-2", "soft-5", "sharp-1", "sharp-2", "sharp-5", "twin", "coronal"}
    assert sorted(map(sorted, by_group.values())) == sorted(map(sorted, [same, {"arterial"}, {"venous"}, {"scout"}]))


def test_the_reason_names_what_was_preferred_or_what_the_condition_read(cohort: Path, index: Path) -> None:
    def reasons(**options: Any) -> dict[str, str]:
        planned = gpuprep.scan(cohort / "p00", index=index, **options).planned
        names = {uid(0, name): name for name in NAMES}
        return {names[o.series.series_uid]: o.reason for o in planned}

    best = reasons(best_per="study", prefer="slice_thickness_mm, kernel")
    assert best["soft-5"] == "best-per: 5 mm B30f, series 4: 1.25 mm B30f, series 2 of the same study was preferred"
    assert best["scout"] == (
        "best-per: 1 mm T20s, series 1, rejected: 1.25 mm B30f, series 2 of the same study was preferred"
    )
    where = reasons(where="kernel LIKE 'B3%' AND slice_thickness_mm < 2 AND series_description > ''")
    assert where["sharp-5"] == "where: slice_thickness_mm is 5, kernel is B70f, series_description does not fit"
    (unknown,) = {text for name, text in reasons(where="pitch > 1").items() if name != "scout"}
    assert unknown == "where: pitch is not known (so the condition is unknown)"
    twice = reasons(drop_duplicates=True)
    assert twice["twin"] == f"duplicate-series: its pixels equal those of {uid(0, 'soft-1')}"


# Runs


def manifest_rows(out: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the manifest by UID."""
    with (out / "manifest.csv").open(newline="") as f:
        return {row["series_uid"]: row for row in csv.DictReader(f)}


def test_a_run_records_what_it_leaves_out_and_that_is_no_failure(cohort: Path, index: Path, tmp_path: Path) -> None:
    run = gpuprep.convert(
        cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index,
        where="image_type NOT LIKE '%LOCALIZER%'", best_per="study", prefer="slice_thickness_mm, kernel",
    )  # fmt: skip
    assert (run.exit_code, run.counts) == (0, {"excluded": 10, "ok": 1})
    rows = manifest_rows(tmp_path / "out")
    chosen, scout = rows[uid(0, "soft-1")], rows[uid(0, "scout")]
    assert (chosen["status"], chosen["kernel"], chosen["slice_thickness_mm"]) == ("ok", "B30f", "1.25")
    assert (chosen["contrast"], chosen["extent_mm"], chosen["fov_rows_mm"]) == ("unknown", "20.0", "20.0")
    assert (scout["status"], json.loads(scout["codes"])) == ("excluded", ["where"])
    assert {row["group_id"] for row in rows.values() if row["kernel"] == "B70f"} == {chosen["group_id"]}
    assert all(row[text] == "" for row in rows.values() for text in FREE_TEXT)
    recipe = Recipe.load(tmp_path / "out" / "recipe.toml")
    assert (recipe.select.best_per, recipe.select.prefer) == ("study", "slice_thickness_mm, kernel")


def test_another_choice_converts_only_what_is_new_and_keeps_former_outputs(
    cohort: Path, index: Path, tmp_path: Path
) -> None:
    convert = partial(gpuprep.convert, cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index)
    assert convert(where="kernel = 'B30f' AND plane = 'axial'").counts == {"ok": 4, "excluded": 7}
    second = convert(where="slice_thickness_mm = 5")
    assert second.counts == {"skipped": 1, "ok": 1, "excluded": 9}
    kept = [r for r in second.results if r.status == "excluded" and r.folder]
    assert len(kept) == 3
    assert all(any("output of an earlier run is still in" in w for w in r.warnings) for r in kept)
    modified = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*/*/volume.tif")}
    assert len(modified) == 5
    # They are found complete, and not converted again.
    assert convert(where="kernel = 'B30f' AND plane = 'axial'").counts == {"skipped": 1, "ok": 3, "excluded": 7}
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*/*/volume.tif")} == modified


def test_free_text_is_recorded_only_where_that_is_asked_for(cohort: Path, index: Path, tmp_path: Path) -> None:
    run = gpuprep.convert(
        cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index, where="series_number = 2",
        record=["series_description"],
    )  # fmt: skip
    assert {r.series_description for r in run.results} == {made.description for made in SERIES} - {"Patient Protocol"}
    assert {r.study_description for r in run.results} == {None}
    with pytest.raises(RequestError, match="record = 'kernel': choose of series_description, protocol"):
        gpuprep.convert(cohort, tmp_path / "other", record=["kernel"])


# Lists


def test_a_table_of_scan_can_be_cut_and_given_back_with_names(cohort: Path, index: Path, tmp_path: Path) -> None:
    rows = [row for row in gpuprep.scan(cohort / "p00", index=index).rows() if row["kernel"] == "B30f"]
    with (tmp_path / "choice.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["split", "case", "key", "kernel"])
        writer.writerows([["train", f"case_{n}", row["key"], "?"] for n, row in enumerate(rows)])
    run = gpuprep.convert(
        cohort, tmp_path / "out", SMALL, backend="cpu", index=index, select=tmp_path / "choice.csv",
        where="plane = 'axial'",
    )  # fmt: skip
    assert run.exit_code == 0
    assert run.counts == {"excluded": 60 * 11 - 4, "ok": 4}
    assert Counter(r.codes for r in run.results) == {("select",): 60 * 11 - 5, ("where",): 1, (): 4}
    made = sorted(p.parent.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("volume.json"))
    assert made == [f"train/case_{n}" for n, row in enumerate(rows) if row["plane"] == "axial"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.tcia", "downloadServerUrl=https://example.org\nListOfSeriesToDownload=\n{0}\n{1}\n"),
        ("idc.csv", "PatientID,SeriesInstanceUID\nP00,{0}\nP01,{1}\n"),
        ("tcia.tsv", "Series UID\tModality\n{0}\tCT\n{1}\tCT\n"),
        ("bom.csv", "\ufeffseries_uid\r\n{0}\r\n{1}\r\n"),
        ("pandas.csv", ',series_uid,note\n0,{0},a\n1,{1},"b\u2028c"\n'),
        ("twice.csv", "key,series_uid\n{0},{0}\n,{0}\n{1},{1}\n"),
    ],
)
def test_a_list_of_uids_chooses_those_series(
    name: str, content: str, cohort: Path, index: Path, tmp_path: Path
) -> None:
    wanted = [uid(0, "soft-5"), uid(1, "venous")]
    (tmp_path / name).write_text(content.format(*wanted), "utf-8")
    found = gpuprep.scan(cohort, index=index, select=tmp_path / name)
    assert [o.series.series_uid for o in found.planned if o.action == "convert"] == wanted
    assert found.unlisted == ""


def test_folders_choose_all_series_below_them(cohort: Path, index: Path, tmp_path: Path) -> None:
    file = tmp_path / "folders.csv"
    file.write_text(f"path\n{cohort / 'p05'}\n{cohort / 'p05' / 'venous'}\n{cohort / 'p06' / 'venous'}\n")
    found = gpuprep.scan(cohort, index=index, select=file)
    assert found.unlisted == ""
    assert [o.series.series_uid for o in found.planned if o.action != "exclude"] == [
        *(o.series.series_uid for o in found.planned if o.series.study_uid == study_uid(5)), uid(6, "venous"),
    ]  # fmt: skip


def test_lines_without_a_series_are_reported(cohort: Path, index: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"{uid(0, 'soft-5')}\n1.2.3.4\n")
    run = gpuprep.convert(cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index, select=file)
    assert run.exit_code == 1
    assert run.unlisted == f"1 line of {file} without a series: 1.2.3.4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no series"),
        ("kernel\nB30f\n", "lists no series"),
        ("key,case\n1.2.3,a\n1.2.3,b\n", "lists 1.2.3 twice, with different names"),
        ("key\n\xff", "is no text in UTF-8"),
        ("key,split,case\n1.2.3,train,/\n", "'/' is no name for the output of 1.2.3"),
        ("key,split,case\n1.2.3,..,a\n", "'..' is no name for the output of 1.2.3"),
    ],
)
def test_a_list_that_is_none_is_refused(content: str, message: str, cohort: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match=message):
        gpuprep.scan(cohort / "p00", index=index, select=tmp_path / "list")


def test_a_list_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(RequestError, match="give a file of up to"):
            gpuprep.scan(tmp_path, select=place)


def test_two_series_of_one_name_are_refused(cohort: Path, index: Path, tmp_path: Path) -> None:
    file = tmp_path / "choice.csv"
    file.write_text(f"key,case\n{uid(0, 'soft-1')},a\n{uid(0, 'soft-2')},a\n")
    with pytest.raises(RequestError, match="its output cannot be named a, which is the output of another series"):
        gpuprep.convert(cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index, select=file)


def test_names_of_a_list_stay_inside_out(cohort: Path, index: Path, tmp_path: Path) -> None:
    file = tmp_path / "choice.csv"
    rows_ = [f"{uid(0, 'soft-5')},..x,../x", f"{uid(0, 'soft-2')},,manifest.sqlite", f"{uid(0, 'soft-1')},train,/y"]
    file.write_text("\n".join(["key,split,case", *rows_]))
    gpuprep.convert(cohort / "p00", tmp_path / "out", SMALL, backend="cpu", index=index, select=file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["choice.csv", "out"]
    assert {p.parent.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("volume.json")} == {
        "..x/%2E%2E/x", "%6Danifest.sqlite", "train/y",
    }  # fmt: skip


# Expressions


@pytest.fixture
def table() -> Iterator[SeriesTable]:
    empty: dict[str, Any] = dict.fromkeys([*KNOWN_COLUMNS, "group"]) | {"codes": ()}
    rows: list[Mapping[str, Any]] = [
        empty
        | {"key": f"s{n}", "kernel": kernel, "slice_thickness_mm": mm, "verdict": verdict, "group": "g", "codes": ()}
        for n, (kernel, mm, verdict) in enumerate(
            [("B30f", 5.0, "ok"), ("B30f", None, "ok"), ("B70f", 1.0, "rejected"), (None, 2.0, "fixed")]
        )
    ]
    with closing(SeriesTable(rows)) as found:
        yield found


@pytest.mark.parametrize(
    ("expression", "true"),
    [
        ("kernel = 'B30f'", {"s0": True, "s1": True, "s2": False, "s3": None}),
        ("slice_thickness_mm < 3", {"s0": False, "s1": None, "s2": True, "s3": True}),
        ("coalesce(slice_thickness_mm, 1) < 3", {"s0": False, "s1": True, "s2": True, "s3": True}),
        ("kernel IS NULL OR verdict = 'rejected'", {"s0": False, "s1": False, "s2": True, "s3": True}),
        (
            "slice_thickness_mm = (SELECT min(slice_thickness_mm) FROM series)",
            {"s0": False, "s1": None, "s2": True, "s3": False},
        ),
        ("1 -- always", dict.fromkeys(["s0", "s1", "s2", "s3"], True)),
    ],
)
def test_conditions_mean_what_they_mean_in_sql(
    table: SeriesTable, expression: str, true: dict[str, bool | None]
) -> None:
    assert dict(table.values(expression, "--where")) == true


def test_a_quoted_name_is_a_column_and_quotes_in_text_are_text(table: SeriesTable) -> None:
    assert dict(table.values("\"kernel\" = 'B30f'", "--where"))["s0"] is True
    assert dict(table.values("kernel <> 'a\"b\"'", "--where"))["s0"] is True


def test_a_text_cannot_be_negated(table: SeriesTable) -> None:
    with pytest.raises(RequestError, match="--prefer 'slices, -kernel': kernel is text: give kernel DESC"):
        table.check_order("slices, -kernel", "--prefer")


def test_unknown_values_and_rejected_series_come_last(table: SeriesTable) -> None:
    assert {key for key, _ in table.worse_ones("slice_thickness_mm", "--prefer")} == {"s0", "s1", "s2"}
    assert {best for _, best in table.worse_ones("slice_thickness_mm DESC", "--prefer")} == {"s0"}
    assert {best for _, best in table.worse_ones("kernel IS NULL, slice_thickness_mm", "--prefer")} == {"s0"}
    assert {best for _, best in table.worse_ones("slice_thickness_mm NULLS FIRST", "--prefer")} == {"s1"}
    assert {best for _, best in table.worse_ones("slices -- nothing", "--prefer")} == {"s0"}
    table.keep(["s1", "s2"])
    assert table.worse_ones("slice_thickness_mm", "--prefer") == [("s2", "s1")]


@pytest.mark.parametrize(
    ("terms", "parts"),
    [
        ("a, -b , c DESC", ["a", "-b", "c DESC"]),
        ("coalesce(a, b), 'x,y' = d", ["coalesce(a, b)", "'x,y' = d"]),
        ("a NULLS FIRST, b -- c, d", ["a NULLS FIRST", "b"]),
        ("a /* b, c */, 'x -- y'", ["a", "'x -- y'"]),
    ],
)
def test_terms_are_parted_by_commas_outside_of_parentheses_and_quotes(terms: str, parts: list[str]) -> None:
    assert order_terms(terms) == parts


HOSTILE = {
    "kernal = 'B30f'": "there is no column 'kernal'; the nearest are kernel (gpuprep scan --columns lists them all)",
    '"kernal" = 1': "there is no column 'kernal'; the nearest are kernel",
    "candidate = 1": "it may only read the columns of series",
    "rowid = 1": "it may only read the columns of series",
    "ATTACH 'x' AS y": "it is no expression of SQL",
    "1; DROP TABLE series": "it is no expression of SQL",
    "1) OR (1": "it is no expression of SQL",
    "1 ORDER BY key": "it is no expression of SQL",
    "1 UNION SELECT 1": "it is no expression of SQL",
    "": "it is no expression of SQL",
    "load_extension('x')": "it may not call load_extension, only abs, ",
    "readfile('/etc/passwd') > ''": "it may not call readfile, only abs, ",
    "randomblob(1000000000) > ''": "it may not call randomblob, only abs, ",
    "EXISTS (SELECT 1 FROM sqlite_master)": "it may only read the columns of series",
    "EXISTS (SELECT 1 FROM pragma_database_list)": "it may only read the columns of series",
    "EXISTS (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n)": "it may only read",
    "(SELECT count(*) FROM series a, series b, series c, series d, series e, series f, series g, series h, series i, "
    "series j, series k, series l, series m, series n, series o, series p) > 0": "it takes too many steps",
    "key = 1 AND " * 300 + "1": "",
    "kernel = 'B30f\0'": "",
}


@pytest.mark.parametrize("expression", HOSTILE)
def test_an_expression_can_do_nothing_but_read_the_table(table: SeriesTable, expression: str) -> None:
    with pytest.raises(RequestError) as caught:
        list(table.values(expression, "--where"))
    assert str(caught.value).startswith("--where ")
    assert HOSTILE[expression] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(table.values("1", "--where"))) == 4


def test_a_wrong_expression_ends_the_run_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no column 'kernal'"):
        gpuprep.convert(tmp_path / "absent", tmp_path / "out", where="kernal = 1")
    with pytest.raises(RequestError, match="there is no column 'thick'"):
        gpuprep.scan(tmp_path / "absent", best_per="study", prefer="thick")
    assert list(tmp_path.iterdir()) == []


# Facts


def test_the_columns_of_a_choice_are_the_facts_of_a_series_and_its_verdict() -> None:
    own = {"key", "series_uid", "study_uid", "series_number", "source", "slices", "verdict", "codes"}
    assert set(KNOWN_COLUMNS) == own | {f.name for f in fields(SeriesFacts)}


def test_studies_are_numbered_by_date_within_their_patient(tmp_path: Path) -> None:
    def change(patient: str, day: str, ds: Dataset, _: int) -> None:
        ds.PatientID, ds.StudyDate = patient, day

    stored = np.zeros((3, 8, 8), np.int16)
    for n, (patient, day) in enumerate([("a", "20210101"), ("a", "20200101"), ("b", "20220101"), ("a", "20200201")]):
        write_series(tmp_path / str(n), stored, (3, 1, 1), change=partial(change, patient, day))
    rows = gpuprep.scan(tmp_path).rows()
    assert [row["study_order"] for row in rows] == [3, 1, 1, 2]


def test_shards_make_one_choice_together(cohort: Path, index: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"best_per": "study", "prefer": "slice_thickness_mm, kernel"}
    options |= {"backend": "cpu", "index": index}
    for number in (1, 2, 3):
        shard = gpuprep.Shard.parse(f"{number}/3")
        gpuprep.convert([cohort / "p00", cohort / "p03"], tmp_path / "out", SMALL, shard=shard, **options)
    assert CliRunner().invoke(app, ["merge", str(tmp_path / "out")]).exit_code == 0
    with closing(sqlite3.connect(tmp_path / "out" / "manifest.sqlite")) as db:
        found = db.execute("SELECT series_uid FROM series WHERE status = 'ok' ORDER BY series_uid").fetchall()
        counts = dict(db.execute("SELECT status, count(*) FROM series GROUP BY status"))
    assert found == [(uid(0, "soft-1"),), (uid(3, "sharp-1"),)]
    assert counts == {"ok": 2, "excluded": 20}


def test_status_and_exit_code_know_exclusions(cohort: Path, index: Path, tmp_path: Path) -> None:
    words = ["convert", str(cohort / "p01"), "--out", str(tmp_path / "out"), "--size", "8", "--spacing", "none"]
    more = ["--where", "kernel = 'none such'", "--index", str(index), "--jobs", "1", "--backend", "cpu", "--report"]
    run = CliRunner().invoke(app, [*words, *more])
    assert run.exit_code == 0, run.output
    assert "excluded" in run.stdout
    status = CliRunner().invoke(app, ["status", str(tmp_path / "out"), "--json"])
    assert json.loads(status.stdout)["counts"] == {"excluded": 11}
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    assert "kernel is B30f" in (tmp_path / "out" / "report.html").read_text()


def test_a_series_that_the_recipe_rejects_is_not_preferred(tmp_path: Path) -> None:
    def of_one_study(ds: Dataset, _: int) -> None:
        ds.StudyInstanceUID = "1.2.3"

    for n, pixel_mm in enumerate((1.0, 5.0)):
        stored = np.zeros((4, 8, 8), np.int16)
        write_series(tmp_path / str(n), stored, (2.0, pixel_mm, pixel_mm), change=of_one_study, series_number=n)
    found = gpuprep.scan(tmp_path, Recipe(fit="pad", size=(16, 16)), best_per="study", prefer="-fov_rows_mm")
    assert [(o.action, o.codes) for o in found.planned] == [("convert", ()), ("exclude", ("best-per",))]
    assert "rejected" in found.planned[1].reason
