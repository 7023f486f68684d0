"""Output folders appear complete or not at all, replace only outputs of their series, and one run writes at a time."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gpuprep.errors import OutputError, RequestError
from gpuprep.output.folder_store import Output, PendingFolder, Written, open_output, remove_output, write_text
from gpuprep.output.own_files import contents
from gpuprep.output.paths import WORK_FOLDER

HOLDER = """
import sys
from pathlib import Path
from gpuprep.output.folder_store import open_output
with open_output(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""
"""Script of another run: it holds OUT open until its standard input is closed."""


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An open output folder."""
    with open_output(tmp_path / "out"):
        yield tmp_path / "out"


@contextmanager
def another_run(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock of `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"inside\n"
        try:
            yield process
        finally:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()


def filled(out: Path, name: str, *files: str) -> PendingFolder:
    """Return a pending folder with files of 1, 2, 3, … bytes."""
    pending = Output(out, out / WORK_FOLDER).pending(name)
    for n, file in enumerate(files):
        (pending.path / file).write_bytes(b"x" * (n + 1))
    return pending


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every file under a folder with its content, and every folder with None, without the work folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if WORK_FOLDER not in p.relative_to(folder).parts
    }


def unfinished_folders(out: Path) -> list[str]:
    return [p.name for p in (out / WORK_FOLDER).iterdir() if p.is_dir()]


def test_a_folder_appears_on_commit_and_not_before(out: Path) -> None:
    # Trap 34.
    pending = filled(out, "cohort/p1", "0000.tif", "0001.tif")
    assert tree(out) == {}
    written = pending.commit({"key": "1.2.3", "warnings": ()})
    sidecar = (out / "cohort" / "p1" / "volume.json").read_bytes()
    assert tree(out) == {
        "cohort": None,
        "cohort/p1": None,
        "cohort/p1/0000.tif": b"x",
        "cohort/p1/0001.tif": b"xx",
        "cohort/p1/volume.json": sidecar,
    }
    assert json.loads(sidecar) == {
        "key": "1.2.3",
        "warnings": [],
        "outputs": {
            "0000.tif": {"bytes": 1, "crc32": f"{zlib.crc32(b'x'):08x}"},
            "0001.tif": {"bytes": 2, "crc32": f"{zlib.crc32(b'xx'):08x}"},
        },
    }
    assert '\n  "0001.tif": {"bytes": 2, ' in sidecar.decode()  # one line for each file
    assert written == Written(3, 1 + 2 + len(sidecar), hashlib.sha256(sidecar).hexdigest())
    assert unfinished_folders(out) == []


def test_two_pending_folders_for_one_path_do_not_interfere(out: Path) -> None:
    one, other = filled(out, "p", "0000.tif"), filled(out, "p", "0000.tif", "0001.tif")
    assert one.path != other.path
    one.commit({"key": "1"})
    other.commit({"key": "1"})
    assert set(tree(out)) == {"p", "p/0000.tif", "p/0001.tif", "p/volume.json"}


def test_a_discarded_folder_leaves_nothing(out: Path) -> None:
    pending = filled(out, "p", "0000.tif")
    pending.discard()
    pending.discard()
    assert tree(out) == {}
    assert unfinished_folders(out) == []


def test_discarding_after_commit_keeps_what_was_committed(out: Path) -> None:
    pending = filled(out, "p", "0000.tif")
    pending.commit({"key": "1"})
    pending.discard()
    assert set(tree(out)) == {"p", "p/0000.tif", "p/volume.json"}


def test_a_number_that_json_cannot_hold_prevents_the_commit(out: Path) -> None:
    pending = filled(out, "p", "0000.tif")
    with pytest.raises(ValueError, match="Out of range float"):
        pending.commit({"key": "1", "hu_mean": float("nan")})
    assert tree(out) == {}


def test_the_former_output_of_the_same_series_is_replaced_completely(out: Path) -> None:
    filled(out, "p", "0000.tif", "0001.tif", "0002.tif").commit({"key": "1", "n": 1})
    filled(out, "p", "volume.tif").commit({"key": "1", "n": 2})
    assert set(tree(out)) == {"p", "p/volume.tif", "p/volume.json"}
    assert json.loads((out / "p" / "volume.json").read_text())["n"] == 2
    assert unfinished_folders(out) == []


def occupy_with_another_series(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "2"})


def occupy_with_strange_files(out: Path) -> None:
    (out / "p").mkdir()
    (out / "p" / "0000.tif").write_text("mine")


def occupy_with_an_empty_folder(out: Path) -> None:
    (out / "p").mkdir()


def occupy_with_a_file(out: Path) -> None:
    (out / "p").write_text("mine")


def occupy_with_a_dangling_link(out: Path) -> None:
    (out / "p").symlink_to(out / "nowhere")


def occupy_with_a_sidecar_that_is_no_json(out: Path) -> None:
    (out / "p").mkdir()
    (out / "p" / "volume.json").write_text("{")


def occupy_with_a_sidecar_of_something_else(out: Path) -> None:
    (out / "p").mkdir()
    (out / "p" / "volume.json").write_text('{"name": "mine"}')


def occupy_with_a_sidecar_that_is_a_list(out: Path) -> None:
    (out / "p").mkdir()
    (out / "p" / "volume.json").write_text("[1]")


def occupy_with_our_output_and_a_folder_in_it(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "1"})
    filled(out, "p/below", "0000.tif").commit({"key": "2"})


@pytest.mark.parametrize(
    ("occupy", "words"),
    [
        (occupy_with_another_series, "holds another series, 2: move it away, or choose another --out"),
        (occupy_with_strange_files, "is in the way and is not an output of gpuprep: move it away"),
        (occupy_with_an_empty_folder, "is in the way and is not an output of gpuprep"),
        (occupy_with_a_file, "is in the way and is not an output of gpuprep"),
        (occupy_with_a_dangling_link, "is in the way and is not an output of gpuprep"),
        (occupy_with_a_sidecar_that_is_no_json, "is in the way and is not an output of gpuprep"),
        (occupy_with_a_sidecar_of_something_else, "is in the way and is not an output of gpuprep"),
        (occupy_with_a_sidecar_that_is_a_list, "is in the way and is not an output of gpuprep"),
        (occupy_with_our_output_and_a_folder_in_it, "also holds below, which gpuprep did not write: move it away"),
    ],
)
def test_a_path_taken_by_anything_but_an_output_of_this_series_is_left_alone(
    out: Path, occupy: Any, words: str
) -> None:
    # Trap 33.
    occupy(out)
    before = tree(out)
    pending = filled(out, "p", "0000.tif", "0001.tif")
    with pytest.raises(OutputError, match=words) as caught:
        pending.commit({"key": "1"})
    assert str(out / "p") in str(caught.value)
    assert tree(out) == before
    assert os.path.lexists(out / "p")
    pending.discard()
    assert unfinished_folders(out) == []


def test_a_foreign_file_in_an_output_is_not_deleted(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "1"})
    (out / "p" / "lesions.nii.gz").write_text("a week of work")
    pending = filled(out, "p", "0000.tif")
    with suppress(OutputError):  # refusing is fine too
        pending.commit({"key": "1"})
    assert (out / "p" / "lesions.nii.gz").read_text() == "a week of work"


def test_a_folder_listed_in_the_manifest_is_replaced_even_without_its_sidecar(out: Path) -> None:
    filled(out, "p", "0000.tif", "0001.tif").commit({"key": "1"})
    (out / "p" / "volume.json").unlink()
    filled(out, "p", "volume.tif").commit({"key": "1"}, known=True)
    assert set(tree(out)) == {"p", "p/volume.tif", "p/volume.json"}


@pytest.mark.parametrize(
    ("occupy", "words"),
    [
        (occupy_with_another_series, "holds another series, 2"),
        (occupy_with_our_output_and_a_folder_in_it, "also holds below"),
        (occupy_with_a_file, "is in the way"),
        (occupy_with_a_dangling_link, "is in the way"),
    ],
)
def test_a_path_listed_in_the_manifest_is_left_alone_if_something_else_took_it(
    out: Path, occupy: Any, words: str
) -> None:
    occupy(out)
    before = tree(out)
    with pytest.raises(OutputError, match=words):
        filled(out, "p", "0000.tif").commit({"key": "1"}, known=True)
    assert tree(out) == before


def test_a_file_where_a_parent_folder_should_be_is_an_output_error(out: Path) -> None:
    (out / "cohort").write_text("mine")
    pending = filled(out, "cohort/p1", "0000.tif")
    with pytest.raises((OutputError, OSError)):
        pending.commit({"key": "1"})
    assert tree(out) == {"cohort": b"mine"}


def test_contents_counts_own_files_and_their_bytes(tmp_path: Path) -> None:
    for name, size in {"0000.tif": 3, "0001.tif": 0, "10000.tif": 5, "volume.tif": 7, "volume.json": 11}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    for name in (".DS_Store", "notes.txt", "mask.tif", "001.tif", "0000.tif.bak"):
        (tmp_path / name).write_bytes(b"not counted")
    (tmp_path / "0002.tif").mkdir()
    assert contents(tmp_path) == (5, 3 + 0 + 5 + 7 + 11)
    assert contents(tmp_path / "absent") == (0, 0)
    assert contents(tmp_path / "0000.tif") == (0, 0)


def test_retire_removes_own_files_and_the_folder(out: Path) -> None:
    filled(out, "p", "0000.tif", "0001.tif").commit({"key": "1"})
    remove_output(out / "p", "1")
    assert tree(out) == {}


def test_retire_keeps_foreign_files_and_other_outputs(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "1"})
    filled(out, "p/below", "0000.tif").commit({"key": "2"})
    (out / "p" / "notes.txt").write_text("mine")
    remove_output(out / "p", "1")
    assert set(tree(out)) == {"p", "p/below", "p/below/0000.tif", "p/below/volume.json", "p/notes.txt"}


@pytest.mark.parametrize("name", ["lesions.tif", "0000-mask.tif"])
def test_retire_keeps_a_tif_with_a_foreign_name(out: Path, name: str) -> None:
    filled(out, "p", "0000.tif", "volume.tif").commit({"key": "1"})
    (out / "p" / name).write_text("a week of work")
    remove_output(out / "p", "1")
    assert tree(out) == {"p": None, f"p/{name}": b"a week of work"}


def test_retire_accepts_a_folder_that_is_named_like_a_file(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "1"})
    filled(out, "p/scan.tif", "0000.tif").commit({"key": "2"})  # source folders may have any name
    remove_output(out / "p", "1")
    assert set(tree(out)) == {"p", "p/scan.tif", "p/scan.tif/0000.tif", "p/scan.tif/volume.json"}


def test_retire_leaves_a_folder_without_a_sidecar_alone(out: Path) -> None:
    (out / "p").mkdir()
    (out / "p" / "0000.tif").write_text("mine")
    remove_output(out / "p", "1")
    remove_output(out / "absent", "1")
    assert set(tree(out)) == {"p", "p/0000.tif"}


def test_unfinished_folders_of_an_interrupted_run_are_removed_by_the_next(tmp_path: Path) -> None:
    # Trap 34.
    out = tmp_path / "out"
    with open_output(out):
        filled(out, "q", "0000.tif").commit({"key": "1"})
    stale = filled(out, "p", "0000.tif")
    (out / WORK_FOLDER / "0123.former").mkdir()
    (out / WORK_FOLDER / "0123.former" / "0000.tif").write_text("x")
    assert stale.path.is_dir()
    with open_output(out):
        assert unfinished_folders(out) == []
        assert set(tree(out)) == {"q", "q/0000.tif", "q/volume.json"}


def test_unfinished_folders_of_a_dead_worker_are_removed_at_the_end_of_the_run(tmp_path: Path) -> None:
    with open_output(tmp_path):
        filled(tmp_path, "p", "0000.tif")
    assert unfinished_folders(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("no space left on device"), sqlite3.OperationalError("disk I/O error")])
def test_a_disk_that_fails_during_the_run_is_an_output_error(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OutputError, match=f"cannot write into {tmp_path}: {error}"), open_output(tmp_path):
        raise error
    with open_output(tmp_path):
        pass


def test_a_text_file_is_replaced_completely_or_not_at_all(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trap 34.
    write_text(out / "recipe.toml", "old = 1")

    def break_off(path: Path) -> None:
        os.truncate(path, 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.files.replacing.flush", break_off)
        with pytest.raises(KeyboardInterrupt):
            write_text(out / "recipe.toml", "new = 2")
    assert (out / "recipe.toml").read_text() == "old = 1"
    write_text(out / "recipe.toml", "new = 2")
    assert tree(out) == {"recipe.toml": b"new = 2"}


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_run(out):
        pending = out / WORK_FOLDER / "in-the-making"
        pending.mkdir()
        words = f"another gpuprep is writing into {out}: wait for it, or choose another --out"
        with pytest.raises(RequestError, match=words), open_output(out):
            pass
        assert pending.is_dir(), "the other run's work was swept away"
    with open_output(out):
        assert unfinished_folders(out) == []


def test_a_killed_run_does_not_block_the_next_one(tmp_path: Path) -> None:
    with another_run(tmp_path) as process:
        process.kill()
        process.wait()
    with open_output(tmp_path):
        pass


def test_a_second_run_in_the_same_process_is_refused(out: Path) -> None:
    with pytest.raises(RequestError, match="another gpuprep is writing"), open_output(out):
        pass


def test_runs_on_different_outputs_do_not_exclude_each_other(tmp_path: Path) -> None:
    with open_output(tmp_path / "one"), open_output(tmp_path / "other"):
        assert (tmp_path / "other" / WORK_FOLDER).is_dir()


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_output(tmp_path):
        raise KeyError
    with open_output(tmp_path):
        pass


def test_an_output_folder_that_cannot_be_made_is_a_bad_request(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        words = rf"cannot write into {out}: .*; choose another --out"
        with pytest.raises(RequestError, match=words), open_output(out):
            pass
    assert file.read_text() == "mine"


def test_retire_leaves_the_output_of_another_series_alone(out: Path) -> None:
    filled(out, "p", "0000.tif").commit({"key": "1"})
    remove_output(out / "p", "2")
    assert set(tree(out)) == {"p", "p/0000.tif", "p/volume.json"}


@pytest.mark.parametrize("folder", ["../victim", "/tmp/victim", "a/../../victim", "", ".gpuprep/x"])  # noqa: S108
def test_a_folder_outside_of_the_output_is_refused_even_if_the_manifest_names_it(out: Path, folder: str) -> None:
    victim = out.parent / "victim"
    victim.mkdir()
    (victim / "volume.json").write_text('{"key": "1"}')
    output = Output(out, out / WORK_FOLDER)
    for method in (output.contents, output.holds, output.intact, output.foreign_names):
        with pytest.raises(OutputError, match="which is no folder in OUT: move the manifest away"):
            method(folder)
    with pytest.raises(OutputError, match="which is no folder in OUT"):
        output.remove_output(folder, "1")
    assert (victim / "volume.json").exists()
