"""Reports the state of an output folder, and verifies it, from its manifests and files alone."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from gpuprep.core.formatting import printable
from gpuprep.core.shard import WHOLE, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import Executor, WorkerDiedError
from gpuprep.files.filesystem import walk
from gpuprep.output.folder_store import Output
from gpuprep.output.manifest import Manifest, manifest_path, shards_of
from gpuprep.output.nnunet import made
from gpuprep.output.object_store import UNFINISHED, Bucket, at_hand, is_open, output_at, place_of
from gpuprep.output.own_files import SIDECAR, is_own
from gpuprep.output.paths import RESERVED, WORKSHOP, folders_above
from gpuprep.output.records import DONE, RunRecord, SeriesResult, State

EXAMPLES = 3
"""Series of one reason that are named."""


class Records:
    """All manifests of an output folder, to be read as one: that of OUT, and those of shards that are not merged yet.

    Raises
    ------
    RequestError
        If there is none.
    """

    def __init__(self, out: str | Path) -> None:
        with ExitStack() as files:
            top = files.enter_context(at_hand(out))
            paths = shards_of(top)
            if manifest_path(top).is_file():
                paths = {**paths, WHOLE: manifest_path(top)}
            if not paths:
                raise RequestError(f"{out} has no manifest: give the --out of a run")
            self.manifests = {
                shard: files.enter_context(closing(Manifest(path, reading=True))) for shard, path in paths.items()
            }
            self._files = files.pop_all()

    def __iter__(self) -> Iterator[SeriesResult]:
        """Yield every result."""
        for shard, manifest in self.manifests.items():
            for result in manifest:
                if self._counts(shard, result.series_uid):
                    yield result

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield some columns of every row."""
        for shard, manifest in self.manifests.items():
            for uid, *values in manifest.columns("series_uid", *names):
                if self._counts(shard, uid):
                    yield tuple(values)

    def _counts(self, shard: Shard, uid: str) -> bool:
        """Whether the manifest of a shard has the last word on a series."""
        if shard != WHOLE:
            return shard.has(uid)
        return not any(other.has(uid) for other in self.manifests if other != WHOLE)

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()


@dataclass(frozen=True, slots=True)
class Reason:
    """Series that were left out for one reason."""

    status: str
    codes: str
    series: int
    examples: tuple[str, ...]
    """What is said of the first ones."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The last run of an output folder, or of one of its shards."""

    shard: Shard
    run: RunRecord
    state: State | Literal["killed"]
    done: int
    """Of the series that it had to do."""
    series_per_s: float | None
    left_s: float | None
    """Until it is finished; None where there is nothing to judge by, or it is not running."""


@dataclass(frozen=True, slots=True)
class Status:
    """What an output folder holds, and what is going on in it."""

    counts: dict[str, int]
    bytes: int
    reasons: tuple[Reason, ...]
    unreadable: int
    progress: tuple[Progress, ...] = field(default=())
    other_recipe: int = 0
    """Outputs that were made by another recipe than that of the last run."""


def status(out: str | Path) -> Status:
    """Return what an output folder holds and how far its runs are; may be asked at any time.

    Raises
    ------
    RequestError
        If there is no manifest.
    OutputError
        If it cannot be read.
    """
    counts: Counter[str] = Counter()
    size = 0
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    numbers: Counter[tuple[str, str]] = Counter()
    recipes: Counter[str] = Counter()
    columns = ("status", "codes", "bytes", "reason", "source", "recipe_sha256")
    with closing(Records(out)) as records:
        for state, codes, bytes_, reason, source, recipe_sha256 in records.columns(*columns):
            counts[state] += 1
            size += bytes_
            if state in DONE:
                recipes[recipe_sha256] += 1
            else:
                kind = state, ", ".join(codes)
                numbers[kind] += 1
                if len(left_out[kind]) < EXAMPLES:
                    left_out[kind].append(f"{source}: {reason}")
        reasons = tuple(Reason(*kind, n, tuple(left_out[kind])) for kind, n in numbers.most_common())
        unreadable = max(manifest.unreadable() for manifest in records.manifests.values())
        progress = tuple(
            _progress(out, shard, run, manifest)
            for shard, manifest in records.manifests.items()
            if (run := manifest.last_run()) is not None
        )
    last = max((p.run for p in progress), key=lambda run: run.started, default=None)
    other_recipe = recipes.total() - recipes[last.recipe_sha256] if last is not None else 0
    return Status(dict(counts), size, reasons, unreadable, progress, other_recipe)


def _progress(out: str | Path, shard: Shard, run: RunRecord, manifest: Manifest) -> Progress:
    state: State | Literal["killed"] = run.state
    if state == "running" and not is_open(out, shard):
        state = "killed"
    done, last = manifest.finished_since(run.started)
    rate = left = None
    if done and (spent_s := (datetime.fromisoformat(last) - datetime.fromisoformat(run.started)).total_seconds()) > 0:
        rate = done / spent_s
        left = max(0, run.todo - done) / rate if state == "running" else None
    return Progress(shard, run, state, min(done, run.todo), rate, left)


Fault = Literal["missing", "torn", "stray", "unfinished", "unrecorded"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the files of an output folder that is not as the manifest says."""

    kind: Fault
    """missing: an output is gone. torn: a file of it is gone, or has other bytes. stray: a file that is of no output.
    unfinished: left by a run that was killed. unrecorded: an output without a record, which a run recognises if it is
    whole."""
    path: str
    """Relative to OUT."""
    key: str = ""
    """Of the series it belongs to."""


@dataclass(frozen=True, slots=True)
class _Check:
    """An output to be read again; travels to workers."""

    output: Output
    key: str
    folder: str
    sha256: str


def verify(out: str | Path, executor: Executor, checked: Callable[[], None]) -> Iterator[Finding]:
    """Read every output again, and yield what is not as it was written.

    Parameters
    ----------
    out : path
        An output folder.
    executor : Executor
        Reads the files.
    checked : callable
        Called after each output.

    Raises
    ------
    RequestError
        If there is no manifest, or a run is on.
    """
    output = output_at(out)
    with closing(Records(out)) as records:
        if any(is_open(out, shard) for shard in (WHOLE, *records.manifests)):
            raise RequestError(f"a run is writing into {out}: verify it afterwards")
        checks = {
            folder: _Check(output, key, folder, sha256 or "")
            for key, folder, sha256, state in records.columns("key", "folder", "sha256", "status")
            if folder and (state in DONE or output.holds(folder))
        }
    for check, outcome in executor.run(_verified, checks.values()):
        if isinstance(outcome, WorkerDiedError):
            outcome = [Finding("torn", check.folder, check.key)]
        if isinstance(outcome, OSError):
            raise OutputError(f"cannot read {out}: {outcome}") from outcome
        yield from outcome
        checked()
    place = place_of(out)
    if isinstance(place, Path):
        yield from _strays(place, set(checks))
    elif isinstance(output, Bucket):
        yield from _stray_objects(output, set(checks))


def _verified(check: _Check) -> list[Finding] | OSError:
    """Return what is wrong with an output, or why that cannot be said; runs in a worker."""
    try:
        if not check.output.holds(check.folder):
            return [Finding("missing", check.folder, check.key)]
        torn = check.output.torn(check.folder, check.sha256)
    except OSError as exc:
        return exc
    return [Finding("torn", f"{check.folder}/{name}", check.key) for name in torn]


def _strays(out: Path, folders: set[str]) -> Iterator[Finding]:
    """Yield files that belong to nothing, and folders of a run that did not end."""
    arranged = made(out)
    # Earlier versions put outputs into the folders of others; these are walked into, whatever holds them.
    leading = folders.union(*map(folders_above, folders))
    for folder, below, names in os.walk(out):
        here = os.path.relpath(folder, out)
        onwards = [name for name in sorted(below) if os.path.normpath(f"{here}/{name}") in leading]
        if here == WORKSHOP:
            unfinished = [name for name in below if "-of-" not in name]
            yield from (Finding("unfinished", printable(f"{WORKSHOP}/{name}")) for name in sorted(unfinished))
            below[:] = [name for name in below if name not in unfinished]
            continue
        if here.startswith(WORKSHOP + os.sep):
            yield from (Finding("unfinished", printable(f"{here}/{name}")) for name in sorted(below))
            below.clear()
            continue
        if here in folders:  # looked at as a whole
            strangers = [name for name in Output(out, out).strangers(here) if name not in onwards]
            yield from (Finding("stray", printable(f"{here}/{name}")) for name in strangers)
            below[:] = onwards
            continue
        if SIDECAR in names and f"{here}/{SIDECAR}" not in arranged:
            yield Finding("unrecorded", printable(here))
            below[:] = onwards
            continue
        below.sort()
        own = RESERVED if here == "." else ()
        for name in sorted(names):
            if not (own and name.startswith(own)) and f"{here}/{name}" not in arranged:
                yield Finding("stray", printable(name if here == "." else f"{here}/{name}"))


def _stray_objects(bucket: Bucket, folders: set[str]) -> Iterator[Finding]:
    """Yield objects that belong to nothing, and what is left of uploads that broke off."""
    unrecorded: set[str] = set()
    for place, files in walk(bucket.url):
        here = place[len(bucket.url) + 1 :]
        names = [os.path.basename(path) for path, _ in files]
        above = (here, *(parent.as_posix() for parent in Path(here).parents))
        owner = next((folder for folder in above if folder in folders), None)
        if here.split("/", 1)[0] == WORKSHOP or (owner is None and unrecorded.intersection(above)):
            continue
        if owner is None and {SIDECAR, UNFINISHED} & set(names):
            unrecorded.add(here)
            yield Finding("unrecorded" if SIDECAR in names else "unfinished", printable(here))
            continue
        for name in names:
            path = f"{here}/{name}" if here else name
            if owner is not None:
                if name == UNFINISHED and here == owner:
                    yield Finding("unfinished", printable(path))
                elif path != f"{owner}/{SIDECAR}" and not is_own(path[len(owner) + 1 :]):
                    yield Finding("stray", printable(path))
            elif here or not name.startswith(RESERVED):
                yield Finding("stray", printable(path))


def mark(manifest: Manifest, findings: Iterable[Finding]) -> int:
    """Record outputs that are not as they were as failed, so that the next run makes them again; return how many."""
    keys = {finding.key for finding in findings if finding.key}
    for key in keys:
        result = manifest.get(key)
        if result is not None:
            manifest.put(replace(result, status="failed", reason="found damaged by gpuprep verify", codes=("damaged",)))
    return len(keys)
