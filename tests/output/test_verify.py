"""Commands for an output folder: status, verify, retry, and export of the manifest."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cohort import SMALL, add, go, truncate
from typer.testing import CliRunner, Result

from gpuprep.cli.app import app
from gpuprep.core.recipe import Recipe
from gpuprep.core.shard import Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import InProcessExecutor, WorkerDiedError
from gpuprep.output.folder_store import open_output
from gpuprep.output.manifest import Manifest
from gpuprep.output.paths import WORK_FOLDER
from gpuprep.output.records import RunRecord
from gpuprep.output.verify import Finding, status, verify
from gpuprep.pipeline.pseudonyms import Pseudonyms


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """Two regular series, and one that lacks one of eight slices."""
    add(tmp_path / "dicom" / "p1", seed=1)
    add(tmp_path / "dicom" / "p2", seed=2)
    add(tmp_path / "dicom" / "gap", slices=8)[3].unlink()
    return tmp_path / "dicom"


@pytest.fixture
def out(dicom: Path, tmp_path: Path) -> Path:
    """Output folder of a run over these series."""
    run = go(dicom, tmp_path / "out")
    assert run.counts == {"ok": 2, "rejected": 1}
    return tmp_path / "out"


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def findings(out: Path) -> list[tuple[str, str]]:
    return [(f.kind, f.path) for f in verify(out, InProcessExecutor(), lambda: None)]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


# --- status


def test_status_counts_and_names_what_was_left_out(out: Path) -> None:
    found = status(out)
    assert found.counts == {"ok": 2, "rejected": 1}
    assert found.bytes == sum(f.stat().st_size for f in (out / "dicom").rglob("*") if f.is_file())
    (reason,) = found.reasons
    assert (reason.status, reason.codes, reason.series) == ("rejected", "gap", 1)
    assert "dicom/gap: slices are" in reason.examples[0]
    (progress,) = found.progress
    assert (progress.state, progress.done, progress.run.todo, progress.run.skipped) == ("finished", 3, 3, 0)
    assert progress.left_s is None


def run_record(todo: int) -> RunRecord:
    return RunRecord(
        started="2026-01-01T00:00:00.000+00:00", host="node7", pid=1, version="0", recipe_sha256="", device="cpu",
        series=todo, skipped=0, todo=todo, request="{}",
    )  # fmt: skip


def test_status_of_an_active_run_has_a_rate_and_the_time_left(out: Path) -> None:
    # 2 of 10 are done, the last one 4 s after the start: 0.5 per second, and 16 s left.
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM runs")
        db.execute("DELETE FROM series WHERE status = 'rejected'")
        db.execute("UPDATE series SET finished = '2026-01-01T00:00:04.000+00:00'")
    with closing(Manifest(out / "manifest.sqlite")) as manifest:
        manifest.begin_run(run_record(10))
    with open_output(out):
        (running,) = status(out).progress
    assert (running.state, running.done, running.series_per_s, running.left_s) == ("running", 2, 0.5, 16.0)
    (dead,) = status(out).progress
    assert (dead.state, dead.done, dead.left_s) == ("killed", 2, None)


def test_status_on_the_command_line(out: Path, tmp_path: Path) -> None:
    shown = command("status", out)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("last run finished: 3 of 3 series done")
    assert "2 ok, 1 rejected" in shown.stdout
    assert "rejected gap: 1" in shown.stdout
    assert json.loads(command("status", out, "--json").stdout)["counts"] == {"ok": 2, "rejected": 1}
    absent = command("status", tmp_path / "nowhere")
    assert (absent.exit_code, absent.stderr) == (
        2, f"gpuprep: {tmp_path / 'nowhere'} has no manifest: give the --out of a run\n",
    )  # fmt: skip


def test_status_says_how_many_outputs_are_by_another_recipe(dicom: Path, out: Path) -> None:
    assert status(out).other_recipe == 0
    assert "recipe" not in command("status", out).stdout
    finer = replace(SMALL, size=(7, 6))
    go(dicom / "p1", out, finer)
    assert status(out).other_recipe == 1  # p2; the rejected one has no output
    shown = command("status", out)
    assert f"1 output by another recipe than the last run's: convert the inputs with --recipe {out}/recipe.toml" in (
        " ".join(shown.stdout.split())
    )
    assert json.loads(command("status", out, "--json").stdout)["other_recipe"] == 1
    # Following that advice helps.
    go(dicom, out, Recipe.load(str(out / "recipe.toml")))
    assert status(out).other_recipe == 0


def test_status_of_shards_compares_recipes_with_the_last_run(tmp_path: Path) -> None:
    uids = [f"1.2.{n}" for n in range(100)]
    of_first, of_second = ([uid for uid in uids if Shard(n, 2).has(uid)] for n in (1, 2))
    for uid in (*of_first[:2], of_second[0]):
        add(tmp_path / "dicom" / uid, series_uid=uid)
    go(tmp_path / "dicom", tmp_path / "out", shard=Shard(1, 2))
    go(tmp_path / "dicom", tmp_path / "out", replace(SMALL, size=(7, 6)), shard=Shard(2, 2))
    assert status(tmp_path / "out").other_recipe == 2


# --- verify


def test_verify_finds_nothing_in_new_outputs(out: Path) -> None:
    assert findings(out) == []


def lose_the_folder(out: Path) -> list[tuple[str, str]]:
    shutil.rmtree(out / "dicom" / "p1")
    return [("missing", "dicom/p1")]


def three_sites(tmp_path: Path, **options: Any) -> Path:
    """Convert three sites of equal paths into one folder, one after the other; return it."""
    for n in (1, 2, 3):
        add(tmp_path / f"site{n}" / "dicom" / "p1", seed=n)
        assert go(tmp_path / f"site{n}" / "dicom", tmp_path / "all", **options).counts == {"ok": 1}
    return tmp_path / "all"


def test_series_with_equal_paths_are_separate_outputs(tmp_path: Path) -> None:
    out = three_sites(tmp_path)
    assert findings(out) == []
    assert sorted(len(f.relative_to(out).parts) for f in out.rglob("volume.json")) == [3, 3, 3]  # none inside another
    (out / "dicom" / "p1" / "notes.txt").write_text("mine")
    assert findings(out) == [("stray", "dicom/p1/notes.txt")]
    again = {n: go(tmp_path / f"site{n}" / "dicom", out).counts for n in (1, 2, 3)}
    assert again == {n: {"skipped": 1} for n in (1, 2, 3)}


def test_series_with_equal_paths_get_separate_hashed_names(tmp_path: Path) -> None:
    out = three_sites(tmp_path, names=Pseudonyms.load(tmp_path / "key", tmp_path / "all"))
    assert findings(out) == []
    assert len(list(out.glob("*/*/volume.json"))) == 3


def test_outputs_inside_another_output_are_not_stray(out: Path) -> None:
    # Earlier versions of gpuprep put them there.
    (out / "dicom" / "p1" / "deep").mkdir()
    (out / "dicom" / "p2").rename(out / "dicom" / "p1" / "deep" / "p2")
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE series SET folder = 'dicom/p1/deep/p2' WHERE folder = 'dicom/p2'")
    assert findings(out) == []
    for name in ("a.txt", "deep/b.txt", "deep/p2/c.txt"):
        (out / "dicom" / "p1" / name).write_text("mine")
    assert set(findings(out)) == {("stray", f"dicom/p1/{name}") for name in ("a.txt", "deep/b.txt", "deep/p2/c.txt")}
    flip(out / "dicom" / "p1" / "deep" / "p2" / "0000.tif")
    assert ("torn", "dicom/p1/deep/p2/0000.tif") in findings(out)
    # The containing output is no longer in the manifest.
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM series WHERE folder = 'dicom/p1'")
    assert set(findings(out)) == {
        ("unrecorded", "dicom/p1"), ("torn", "dicom/p1/deep/p2/0000.tif"), ("stray", "dicom/p1/deep/b.txt"),
        ("stray", "dicom/p1/deep/p2/c.txt"),
    }  # fmt: skip


def flip_a_bit(out: Path) -> list[tuple[str, str]]:
    flip(out / "dicom" / "p1" / "0001.tif")
    return [("torn", "dicom/p1/0001.tif")]


def flip_a_bit_of_the_sidecar(out: Path) -> list[tuple[str, str]]:
    flip(out / "dicom" / "p1" / "volume.json")
    return [("torn", "dicom/p1/volume.json")]


def cut_a_slice(out: Path) -> list[tuple[str, str]]:
    truncate(out / "dicom" / "p2" / "0000.tif", 1)
    return [("torn", "dicom/p2/0000.tif")]


def lose_a_slice(out: Path) -> list[tuple[str, str]]:
    (out / "dicom" / "p2" / "0000.tif").unlink()
    return [("torn", "dicom/p2/0000.tif")]


def add_a_slice(out: Path) -> list[tuple[str, str]]:
    (out / "dicom" / "p2" / "0777.tif").write_bytes(b"x")
    return [("torn", "dicom/p2/0777.tif")]


def leave_notes(out: Path) -> list[tuple[str, str]]:
    (out / "dicom" / "p2" / "notes.txt").write_text("mine")
    (out / "notes.txt").write_text("mine")
    return [("stray", "dicom/p2/notes.txt"), ("stray", "notes.txt")]


def leave_an_unfinished_folder(out: Path) -> list[tuple[str, str]]:
    (out / WORK_FOLDER / "0123").mkdir()
    return [("unfinished", f"{WORK_FOLDER}/0123")]


def remove_a_row(out: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM series WHERE source LIKE '%p2'")
    return [("unrecorded", "dicom/p2")]


DAMAGE: list[Callable[[Path], list[tuple[str, str]]]] = [
    lose_the_folder, flip_a_bit, flip_a_bit_of_the_sidecar, cut_a_slice, lose_a_slice, add_a_slice, leave_notes,
    leave_an_unfinished_folder, remove_a_row,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_each_kind_of_damage_and_nothing_else(out: Path, damage: Callable[[Path], Any]) -> None:
    expected = damage(out)
    assert sorted(findings(out)) == sorted(expected)


def test_outputs_that_verify_marks_are_converted_again_by_the_next_run(out: Path, dicom: Path) -> None:
    before = (out / "dicom" / "p1" / "0001.tif").read_bytes()
    flip(out / "dicom" / "p1" / "0001.tif")
    assert go(dicom, out).counts == {"skipped": 2, "rejected": 1}  # sizes are as they were
    shown = command("verify", out, "--mark", "--jobs", "1")
    assert shown.exit_code == 1
    assert "torn        dicom/p1/0001.tif" in shown.stdout
    assert "2 outputs read again: 1 torn" in shown.stdout
    assert status(out).counts == {"ok": 1, "failed": 1, "rejected": 1}
    assert command("retry", out, "--backend", "cpu", "--jobs", "1", "-q").exit_code == 0
    assert (out / "dicom" / "p1" / "0001.tif").read_bytes() == before
    assert command("verify", out, "--jobs", "1").exit_code == 0


def test_the_former_output_of_a_series_that_fails_later_is_verified(out: Path, dicom: Path) -> None:
    truncate(sorted((dicom / "p1").iterdir())[2])
    assert go(dicom, out).counts == {"skipped": 1, "rejected": 2}
    assert findings(out) == []
    flip(out / "dicom" / "p1" / "0001.tif")
    assert findings(out) == [("torn", "dicom/p1/0001.tif")]


def test_verify_is_refused_while_a_run_is_active(out: Path) -> None:
    with open_output(out), pytest.raises(RequestError, match=r"a run is writing into .*: verify it afterwards"):
        findings(out)


def test_findings_have_the_key_of_their_series(out: Path) -> None:
    flip_a_bit(out)
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        ((key,),) = db.execute("SELECT key FROM series WHERE source LIKE '%p1'")
    assert list(verify(out, InProcessExecutor(), lambda: None)) == [Finding("torn", "dicom/p1/0001.tif", key)]


# --- retry


def test_retry_converts_failed_series_only(out: Path, dicom: Path) -> None:
    shown = command("retry", out)
    assert (shown.exit_code, shown.stdout) == (0, f"no series failed in {out}\n")
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE series SET status = 'failed' WHERE source LIKE '%p2'")
    tried = command("retry", out, "--backend", "cpu", "--jobs", "1", "--json")
    assert tried.exit_code == 0
    assert [Path(s["source"]).name for s in json.loads(tried.stdout)["series"]] == ["p2"]
    tried = command("retry", out, "--rejected", "--backend", "cpu", "--jobs", "1", "--json")
    assert [(Path(s["source"]).name, s["status"]) for s in json.loads(tried.stdout)["series"]] == [("gap", "rejected")]
    assert Recipe.load(out / "recipe.toml") == SMALL
    assert go(dicom, out).counts == {"skipped": 2, "rejected": 1}


# --- the manifest in other formats


def test_the_manifest_has_the_same_content_in_every_format(out: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    with closing(Manifest(out / "manifest.sqlite", reading=True)) as manifest:
        expected = [result.to_dict() for result in manifest]
    assert len(expected) == 3
    lines = command("manifest", out, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == expected
    rows = list(csv.DictReader(io.StringIO(command("manifest", out).stdout)))
    assert rows == list(csv.DictReader(io.StringIO((out / "manifest.csv").read_text())))
    assert command("manifest", out, "--parquet", "--to", tmp_path / "m.parquet").exit_code == 0
    columns = pyarrow.read_table(tmp_path / "m.parquet").to_pylist()
    for got, want in zip(columns, expected, strict=True):
        within = {
            k: v and json.loads(v) for k, v in got.items() if k in ("audit", "quality", "segmentations", "labels")
        }
        assert got | within == want


def test_two_export_formats_at_once_are_refused(out: Path) -> None:
    shown = command("manifest", out, "--csv", "--json")
    assert (shown.exit_code, shown.stderr) == (2, "gpuprep: --csv, --json and --parquet: give one of them\n")


def test_an_export_into_the_output_folder_is_refused(out: Path) -> None:
    before = (out / "manifest.sqlite").read_bytes()
    shown = command("manifest", out, "--to", out / "manifest.sqlite")
    assert (shown.exit_code, "choose a file outside of it" in shown.stderr) == (2, True)
    assert (out / "manifest.sqlite").read_bytes() == before


def test_retry_refuses_another_recipe_than_that_of_the_last_run(out: Path) -> None:
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE series SET status = 'failed' WHERE source LIKE '%p2'")
    recipe = out / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("float32", "uint8"))
    shown = command("retry", out, "--backend", "cpu", "--jobs", "1")
    assert (shown.exit_code, "is not the recipe of the last run" in shown.stderr) == (2, True)


class Dying(InProcessExecutor):
    """An executor whose worker dies over each task a number of times."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    def run(self, function: Any, tasks: Any, *_: Any, **__: Any) -> Any:
        self.deaths -= 1
        return ((t, WorkerDiedError("the worker was killed") if self.deaths >= 0 else function(t)) for t in tasks)


def test_an_output_whose_check_was_killed_is_checked_again(out: Path) -> None:
    checked: list[None] = []
    assert list(verify(out, Dying(1), lambda: checked.append(None))) == []
    assert len(checked) == 2
    with pytest.raises(OutputError, match=r"cannot read .*/dicom/p1: the worker was killed"):
        list(verify(out, Dying(2), lambda: None))
