"""Provides builds of gpuprep to compare: this one, and the one of another commit in a temporary git worktree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.compare.driver import ROOT

GIT = shutil.which("git") or "git"

PUBLIC = "import gpuprep; gpuprep.convert, gpuprep.Recipe"
"""What the contenders use of a build. The names are imported when they are used."""


@dataclass(frozen=True, slots=True)
class Build:
    """A folder with the package gpuprep and with this package bench."""

    name: str
    """Commit, and whether there are changes."""
    root: Path
    caches: Path
    """Folder for the header index of the build, whose format may differ."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of processes that run this build. All builds keep their bytecode, as installed ones do."""
        return {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "", "XDG_CACHE_HOME": str(self.caches)}


@contextmanager
def both(revision: str, scratch: Path) -> Iterator[tuple[Build, Build]]:
    """Yield this build, with its uncommitted changes, and the build of a revision.

    Both run in this environment, with the same dependencies.

    Raises
    ------
    SystemExit
        With one line, if this is no git checkout, the revision is unknown, or its build cannot be imported here.
    """
    if Path(_git("is not in a git checkout", "rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
        raise SystemExit(f"--against {revision}: {ROOT} is not the top of a git checkout")
    commit = _git(f"has no commit {revision}", "rev-parse", "--verify", "--short", revision + "^{commit}")
    this = Build(_git("has no commit", "describe", "--always", "--dirty", "--exclude=*"), ROOT, scratch / "caches")
    other = Build(commit, scratch / f"build-{commit}", scratch / f"caches-{commit}")
    try:
        _git("gives no worktree", "worktree", "add", "--detach", "--no-checkout", str(other.root), commit)
        _git(f"has no gpuprep in {revision}", "-C", str(other.root), "checkout", commit, "--", "gpuprep")
        (other.root / "bench").symlink_to(ROOT / "bench")
        _check(other)
        yield this, other
    finally:
        subprocess.run([GIT, "-C", ROOT, "worktree", "remove", "--force", other.root], capture_output=True, check=False)


def _git(problem: str, *arguments: str) -> str:
    """Return the output of a git command in this checkout; if it fails, say what the problem is."""
    try:
        done = subprocess.run([GIT, "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit("--against needs git, which is not installed") from None
    if done.returncode != 0:
        raise SystemExit(f"--against: {ROOT} {problem} ({_last_line(done.stderr)})")
    return done.stdout.strip()


def _check(build: Build) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PUBLIC],
        cwd=build.root,
        env=os.environ | dict(build.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"--against: {build.name} cannot be imported with the packages of this environment, which both builds use: "
            + _last_line(done.stderr)
        )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
