"""The comparison of two builds: worktrees, pairs and equal files. Nothing is timed."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compare import against, builds, cohort, comparison
from bench.compare.comparison import Comparison
from bench.compare.contenders import Contender
from bench.compare.driver import ROOT

in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def worktrees() -> str:
    return subprocess.run(["git", "-C", ROOT, "worktree", "list"], capture_output=True, text=True, check=True).stdout


@in_a_checkout
def test_the_build_of_a_commit_writes_the_same_files_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # because a new checkout has no compiled loops
    monkeypatch.setattr(comparison, "SETTLE_S", 0)
    folders = cohort.phantoms(tmp_path / "dicom", 1, (8, 64, 64))
    with builds.both("HEAD", tmp_path) as (_, head):
        pairs = against.pairs((head, replace(head, name="again")), cores=1, gpu=False)
        pair = [c for c in pairs if c.against == "gpuprep, uint8"]
        compared = Comparison(folders, tmp_path, log=lambda _: None)
        compared.watch_and_check(pair)
        assert (head.root / "gpuprep" / "__pycache__").is_dir()  # it was imported from there
    record = compared.records["gpuprep, uint8, again"]
    assert (record["status"], record["files"], record["equal_files"]) == ("ok", 24, 24)  # 8 slices of 3 mm


@in_a_checkout
def test_the_worktree_is_removed_after_ctrl_c(tmp_path: Path) -> None:
    def run() -> None:
        with builds.both("HEAD", tmp_path) as (this, other):
            assert this.root == ROOT
            assert (other.root / "gpuprep" / "__init__.py").is_file()
            assert str(other.root) in worktrees()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert str(tmp_path) not in worktrees()
    assert list(tmp_path.glob("build-*")) == []


@in_a_checkout
def test_an_unknown_commit_and_a_build_that_cannot_be_imported_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^--against: .* has no commit no-such-commit \(.*\)$"):
        builds.both("no-such-commit", tmp_path).__enter__()
    monkeypatch.setattr(builds, "PUBLIC", "import gpuprep.not_there")
    with pytest.raises(
        SystemExit, match=r"^--against: .* cannot be imported .*: .*No module named 'gpuprep.not_there'$"
    ):
        builds.both("HEAD", tmp_path).__enter__()
    assert str(tmp_path) not in worktrees()


def test_a_folder_that_is_no_git_checkout_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"^--against: .* is not in a git checkout \(.*\)$"):
        builds.both("HEAD", tmp_path).__enter__()


def test_pairs_stand_side_by_side_and_have_caches_of_their_own(tmp_path: Path) -> None:
    this, other = (builds.Build(name, tmp_path / name, tmp_path / f"caches-{name}") for name in ("new", "old"))
    pairs = against.pairs((this, other), cores=2, gpu=False)
    names = [c.name for c in pairs]
    assert names[1::2] == [f"{name}, old" for name in names[::2]]
    assert set(against.USUAL) < set(names)
    assert all(c.against == name for c, name in zip(pairs[1::2], names[::2], strict=True))
    known = [c for c in pairs if c.against == "gpuprep, uint8, headers known"]
    assert [c.options["index"] for c in known] == [str(b.caches / "headers.sqlite") for b in (this, other)]
    assert [c.environment["PYTHONPATH"] for c in known] == [str(tmp_path / "new"), str(tmp_path / "old")]


def test_every_other_round_has_the_reverse_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        Comparison, "_time_once", lambda _self, contender, _record, _round: order.append(contender.name)
    )
    all_ = [Contender(name=name, module="floor", dtype="uint8", rounds=3) for name in "ab"]
    Comparison([], tmp_path, log=lambda _: None).time(all_, until=float("inf"))
    assert "".join(order) == "abbaab"
