"""Shards of a cohort, converted concurrently and merged, equal the output of a single run."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cohort import (
    TIMES,
    Running,
    command,
    done,
    findings,
    gpuprep,
    marks,
    other_tables,
    rows,
    run_words,
    tree,
    unfinished_outputs,
    whole,
    write_cohort,
)
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import RequestError
from gpuprep.output.folder_store import open_output
from gpuprep.output.manifest import Manifest, manifest_path

SERIES = 24
SHARDS = 4


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cohort with faults: a series with a truncated slice, one with a single slice, and a file that is not DICOM."""
    root = write_cohort(tmp_path_factory.mktemp("sharding") / "dicom", SERIES)
    cut = root / "s003" / "S1-0002.dcm"
    os.truncate(cut, cut.stat().st_size - 50)
    for n in range(2, 7):
        (root / "s007" / f"S1-000{n}.dcm").unlink()
    (root / "notes.txt").write_text("not DICOM")
    return root


@pytest.fixture(scope="module")
def one_run(dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a single run over the whole cohort."""
    out = tmp_path_factory.mktemp("one") / "out"
    ran = gpuprep(*run_words(dicom, out))
    assert ran.returncode == 1, ran.stderr
    assert [name for name, row in rows(out).items() if row["status"] != "ok"] == ["s003", "s007"]
    return out


@pytest.fixture(scope="module")
def sharded(dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of four concurrent shards, not merged."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Running(command(dicom, out, "--shard", f"{n}/{SHARDS}", jobs=1)))
            for n in range(1, SHARDS + 1)
        ]
        codes = [run.end() for run in runs]
    assert [run.stderr for run in runs if "Traceback" in run.stderr or "another gpuprep" in run.stderr] == []
    assert set(codes) <= {0, 1}
    assert 1 in codes
    return out


@pytest.fixture
def out(sharded: Path, tmp_path: Path) -> Path:
    """Copy of that output, including modification times."""
    return Path(shutil.copytree(sharded, tmp_path / "out"))


def csv_rows(out: Path, name: str = "manifest.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="", encoding="utf-8") as f:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]


def check_merged(out: Path, like: Path) -> None:
    assert whole(out) == whole(like)
    assert csv_rows(out) == csv_rows(like)
    assert sorted(path.name for path in out.glob("manifest.*")) == ["manifest.csv", "manifest.sqlite"]
    assert unfinished_outputs(out) == []
    for n in range(1, SHARDS + 1):
        assert unfinished_outputs(out, f"{n}-of-{SHARDS}") == []
    assert findings(out) == []


# --- assignment of series to shards


@given(st.text(), st.integers(1, 40))
def test_every_series_is_in_exactly_one_shard(uid: str, count: int) -> None:
    shards = [Shard.parse(f"{n}/{count}") for n in range(1, count + 1)]
    assert sum(shard.has(uid) for shard in shards) == 1
    assert len({shard.name for shard in shards}) == count


def test_shards_are_the_same_in_every_release() -> None:
    # The first eight bytes of SHA-256, from sha256sum, modulo 4: the last two bits of the last hexadecimal digit.
    digests = {
        "1.2.840.1": "f9a13599155b7052",
        "1.2.840.2": "d1383cc2458669f5",
        "1.3.6.1.4.1.14519.5": "66ac72bd34978168",
    }
    for uid, digest in digests.items():
        expected = int(digest[-1], 16) % 4 + 1
        assert [n for n in range(1, 5) if Shard(n, 4).has(uid)] == [expected]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "1/4/2", "-1/4", "", "1 /4", "²/4"])
def test_an_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"shard = {text!r}: give i/n with i from 1 to n, such as 1/4")):
        Shard.parse(text)


# --- merging


def test_shards_divide_the_series(out: Path, one_run: Path) -> None:
    assert not (out / "manifest.sqlite").exists()
    parts = [rows(out, f"manifest.{n}-of-{SHARDS}.sqlite") for n in range(1, SHARDS + 1)]
    assert sum(map(len, parts)) == SERIES
    assert {name: row for part in parts for name, row in part.items()} == rows(one_run)
    assert tree(out) == tree(one_run)


def test_merged_shards_equal_a_single_run(out: Path, one_run: Path) -> None:
    merged = gpuprep("merge", out)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert f"{SHARDS} shards merged" in " ".join(merged.stdout.split())
    check_merged(out, one_run)
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (SHARDS,)
    again = gpuprep("merge", out)
    assert again.returncode == 0
    check_merged(out, one_run)


def test_verify_and_manifest_read_unmerged_shards_as_one(out: Path, one_run: Path) -> None:
    assert findings(out) == []
    here, there = (gpuprep("manifest", folder, "--json").stdout.splitlines() for folder in (out, one_run))
    assert len(here) == len(there) == SERIES


def test_a_resumed_shard_skips_its_finished_series(dicom: Path, out: Path) -> None:
    before, known = marks(out), rows(out, f"manifest.2-of-{SHARDS}.sqlite")
    again = gpuprep(*run_words(dicom, out, "--shard", f"2/{SHARDS}", "--json"))
    assert "Traceback" not in again.stderr
    assert f'"skipped": {sum(row["status"] == "ok" for row in known.values())}' in again.stdout
    assert '"ok"' not in again.stdout.split('"postponed"')[0]
    assert marks(out) == before
    assert rows(out, f"manifest.2-of-{SHARDS}.sqlite") == known


def test_a_run_over_the_whole_cohort_merges_shards_and_skips_their_series(
    dicom: Path, out: Path, one_run: Path
) -> None:
    before = marks(out)
    assert before.keys() == done(one_run)
    run = gpuprep(*run_words(dicom, out))
    assert run.returncode == 1  # two series are still faulty
    assert "Traceback" not in run.stderr
    assert marks(out) == before
    check_merged(out, one_run)


def test_shards_of_another_division_are_refused(dicom: Path, out: Path) -> None:
    refused = gpuprep(*run_words(dicom, out, "--shard", "1/3"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (f"gpuprep: {out} holds 1-of-4, a shard of another division: gpuprep merge {out} first\n")
    # A manifest of another division was copied there.
    (out / "manifest.1-of-4.sqlite").rename(out / "manifest.1-of-3.sqlite")
    names = "1-of-3, 2-of-4, 3-of-4, 4-of-4"
    before = sorted(out.glob("manifest.*"))
    for words in (("merge", out), ("status", out), ("verify", out), ("manifest", out)):
        said = gpuprep(*words)
        assert (said.returncode, said.stderr) == (
            2,
            f"gpuprep: {out} holds shards of different divisions ({names}): keep those of one\n",
        )
    assert sorted(out.glob("manifest.*")) == before


def test_shards_after_a_merge_may_be_of_another_division(dicom: Path, out: Path, one_run: Path) -> None:
    assert gpuprep("merge", out).returncode == 0
    before = marks(out)
    for n in (1, 2):
        run = gpuprep(*run_words(dicom, out, "--shard", f"{n}/2"))
        assert run.returncode in (0, 1)
        assert "Traceback" not in run.stderr
    assert marks(out) == before
    assert gpuprep("merge", out).returncode == 0
    assert whole(out) == whole(one_run)


def test_shards_merged_one_by_one_give_the_same_result(out: Path, one_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for n in (2, 4):
        (out / f"manifest.{n}-of-{SHARDS}.sqlite").rename(elsewhere / f"manifest.{n}-of-{SHARDS}.sqlite")
    first = gpuprep("merge", out)
    assert first.returncode == 0
    assert "missing shards: 2/4, 4/4; merge again when they are finished" in " ".join(first.stdout.split())
    for path in elsewhere.iterdir():
        path.rename(out / path.name)
    assert gpuprep("merge", out).returncode == 0
    check_merged(out, one_run)


def test_a_damaged_shard_is_named_and_not_merged(out: Path) -> None:
    bad = out / "manifest.3-of-4.sqlite"
    content = bytes(range(256)) * 64
    bad.write_bytes(content)
    merged = gpuprep("merge", out)
    assert merged.returncode == 1
    assert merged.stderr.startswith(f"gpuprep: {bad} cannot be used as manifest (")
    assert len(merged.stderr.splitlines()) == 1
    assert bad.read_bytes() == content
    names = {path.name for path in out.glob("manifest.*.sqlite")}
    assert names >= {"manifest.3-of-4.sqlite", "manifest.4-of-4.sqlite"}
    left = sum(len(rows(out, name)) for name in names - {bad.name})
    assert left + len(rows(out)) >= SERIES - 12
    assert findings_are_unreadable(out, bad)


def findings_are_unreadable(out: Path, bad: Path) -> bool:
    verified = gpuprep("verify", out)
    return verified.returncode == 1 and str(bad) in verified.stderr and "Traceback" not in verified.stderr


def test_merge_refuses_a_folder_that_is_no_output(tmp_path: Path) -> None:
    merged = gpuprep("merge", tmp_path)
    assert (merged.returncode, merged.stderr) == (2, f"gpuprep: {tmp_path} has no manifest: give the --out of a run\n")
    assert list(tmp_path.iterdir()) == []


def test_concurrent_shards_can_write_the_same_file(tmp_path: Path) -> None:
    # Every shard writes recipe.toml, and those that start together write it at the same time.
    def write(n: int) -> None:
        with open_output(tmp_path, Shard(n, 4)) as output:
            begin.wait()
            for _ in range(100):
                output.write_text("recipe.toml", "the same\n" * 1000)

    begin = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for written in [threads.submit(write, n) for n in range(1, 5)]:
            written.result()
    assert (tmp_path / "recipe.toml").read_text() == "the same\n" * 1000
    assert sorted(path.name for path in tmp_path.rglob("*.part")) == []


def test_a_partial_text_file_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    with open_output(tmp_path, Shard(1, 2)) as output:
        part = output.work_folder / "recipe.toml.part"
    part.write_text("half")
    with open_output(tmp_path):
        assert not part.exists()


# --- label values


def with_labels(path: Path, values: dict[str, int]) -> None:
    with closing(Manifest(path)):
        pass
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT INTO label_values VALUES (?, ?)", values.items())


@pytest.mark.parametrize("shard", [Shard(1, 2), WHOLE_COHORT])
def test_a_structure_with_two_label_values_is_named(tmp_path: Path, shard: Shard) -> None:
    ours, theirs = tmp_path / "manifest.sqlite", tmp_path / "manifest.1-of-2.sqlite"
    with_labels(ours, {"heart": 1, "lung": 2})
    with_labels(theirs, {"heart": 1, "lung": 3})
    message = (
        f"{theirs}: lung has label value 3, and 2 in manifest.sqlite: shards of one cohort must see all of it, and "
        "the same --masks; convert again into another --out"
    )
    with closing(Manifest(ours)) as manifest, pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        manifest.take_over(theirs, shard)
    assert other_tables(tmp_path)["label_values"] == [("heart", 1), ("lung", 2)]
    merged = gpuprep("merge", tmp_path)
    assert (merged.returncode, merged.stderr) == (2, f"gpuprep: {message}\n")
    assert theirs.exists()


def test_a_label_value_of_two_structures_is_named(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "manifest.sqlite", tmp_path / "manifest.1-of-2.sqlite"
    with_labels(ours, {"heart": 1, "lung": 2})
    with_labels(theirs, {"heart": 1, "spine": 2})
    merged = gpuprep("merge", tmp_path)
    assert merged.returncode == 2
    assert merged.stderr == (
        f"gpuprep: {theirs}: spine has label value 2, and so has lung in manifest.sqlite: shards of one cohort must "
        "see all of it, and the same --masks; convert again into another --out\n"
    )
    assert theirs.exists()
    assert other_tables(tmp_path)["label_values"] == [("heart", 1), ("lung", 2)]


def test_label_values_that_agree_are_joined(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "manifest.sqlite", tmp_path / "manifest.2-of-2.sqlite"
    with_labels(ours, {"heart": 1})
    with_labels(theirs, {"heart": 1, "lung": 2})
    merged = gpuprep("merge", tmp_path)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert other_tables(tmp_path)["label_values"] == [("heart", 1), ("lung", 2)]
    assert not theirs.exists()
    assert manifest_path(tmp_path) == ours


def test_a_shard_without_series_has_exit_code_0(tmp_path: Path) -> None:
    dicom = write_cohort(tmp_path / "dicom", 1)
    codes = [gpuprep(*run_words(dicom, tmp_path / "out", "--shard", f"{n}/2")).returncode for n in (1, 2)]
    assert codes == [0, 0]
    (tmp_path / "empty").mkdir()
    assert gpuprep(*run_words(tmp_path / "empty", tmp_path / "out2", "--shard", "1/2")).returncode == 3
