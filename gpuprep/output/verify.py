"""Reports the state of an output folder, and verifies its files, from its manifests and files alone."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from gpuprep.core.formatting import plain_reason, printable
from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import Executor, WorkerDiedError
from gpuprep.files.filesystem import walk
from gpuprep.output.folder_store import Output
from gpuprep.output.manifest import Manifest, manifest_path, shards_of
from gpuprep.output.nnunet import view_files
from gpuprep.output.object_store import UNFINISHED, Bucket, is_open, local_copies, output_for_reading, resolve_out
from gpuprep.output.own_files import SIDECAR, is_own
from gpuprep.output.paths import RESERVED, WORK_FOLDER, folders_above
from gpuprep.output.records import DONE, RunRecord, SeriesResult, State

EXAMPLES = 3
"""Number of series that are named for each reason."""


class AllManifests:
    """All manifests of an output folder, read as one: that of OUT, and those of shards that are not merged yet.

    Raises
    ------
    RequestError
        If there is no manifest.
    """

    def __init__(self, out: str | Path) -> None:
        with ExitStack() as files:
            top = files.enter_context(local_copies(out))
            paths = shards_of(top)
            if manifest_path(top).is_file():
                paths = {**paths, WHOLE_COHORT: manifest_path(top)}
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
                if self._is_current(shard, result.series_uid):
                    yield result

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the values of some columns, row by row."""
        for shard, manifest in self.manifests.items():
            for uid, *values in manifest.columns("series_uid", *names):
                if self._is_current(shard, uid):
                    yield tuple(values)

    def _is_current(self, shard: Shard, uid: str) -> bool:
        """Return whether the manifest of a shard is the one that counts for a series: that of its own shard, if any."""
        if shard != WHOLE_COHORT:
            return shard.has(uid)
        return not any(other.has(uid) for other in self.manifests if other != WHOLE_COHORT)

    def close(self) -> None:
        """Close the manifests, and remove temporary copies of them."""
        self._files.close()


@dataclass(frozen=True, slots=True)
class Reason:
    """Series that were rejected or failed for one reason."""

    status: str
    codes: str
    """Verdict codes, separated by commas."""
    series: int
    """Number of series."""
    examples: tuple[str, ...]
    """Source folder and message of the first ones."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The last run of an output folder, or of one of its shards."""

    shard: Shard
    run: RunRecord
    state: State | Literal["killed"]
    done: int
    """Number of series finished, out of `run.todo`."""
    series_per_s: float | None
    left_s: float | None
    """Estimated time left in seconds; None if the run is not active, or no series is finished yet."""


@dataclass(frozen=True, slots=True)
class Status:
    """Contents of an output folder, and progress of its runs."""

    counts: dict[str, int]
    """Number of series by status."""
    bytes: int
    """Total size of the outputs."""
    reasons: tuple[Reason, ...]
    unreadable: int
    """Number of files that the last scan could not read."""
    progress: tuple[Progress, ...] = field(default=())
    other_recipe: int = 0
    """Number of outputs made by another recipe than that of the last run."""


def status(out: str | Path) -> Status:
    """Return the contents of an output folder and the progress of its runs, also while a run is active.

    Raises
    ------
    RequestError
        If there is no manifest.
    OutputError
        If a manifest cannot be read.
    """
    counts: Counter[str] = Counter()
    size = 0
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    numbers: Counter[tuple[str, str]] = Counter()
    recipes: Counter[str] = Counter()
    columns = ("status", "codes", "bytes", "reason", "source", "recipe_sha256")
    with closing(AllManifests(out)) as records:
        for state, codes, bytes_, reason, source, recipe_sha256 in records.columns(*columns):
            counts[state] += 1
            size += bytes_
            if state in DONE:
                recipes[recipe_sha256] += 1
            else:
                kind = state, ", ".join(codes)
                numbers[kind] += 1
                if len(left_out[kind]) < EXAMPLES:
                    left_out[kind].append(f"{source}: {plain_reason(reason)}")
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
    """A difference between the manifest and the files of an output folder."""

    kind: Fault
    """missing: an output folder does not exist. torn: a file of an output is missing, additional, or has changed.
    stray: a file that belongs to no output. unfinished: left by a run that was killed. unrecorded: an output that is
    not in the manifest; a run recognises it if it is complete."""
    path: str
    """Path relative to OUT."""
    key: str = ""
    """Key of the series that the path belongs to; "" if none."""


@dataclass(frozen=True, slots=True)
class _Check:
    """An output that a worker reads again."""

    output: Output
    key: str
    folder: str
    sha256: str


def verify(out: str | Path, executor: Executor, checked: Callable[[], None]) -> Iterator[Finding]:
    """Read every output again, and yield its differences from what was written.

    Parameters
    ----------
    out : path
        Output folder, a path or a URL.
    executor : Executor
        Executor of the tasks that read files.
    checked : callable
        Called after each output.

    Yields
    ------
    Finding
        One difference. First those of recorded outputs, then stray, unfinished and unrecorded paths.

    Raises
    ------
    RequestError
        If there is no manifest, or a run is writing into OUT.
    OutputError
        If the outputs cannot be read.
    """
    output = output_for_reading(out)
    with closing(AllManifests(out)) as records:
        if any(is_open(out, shard) for shard in (WHOLE_COHORT, *records.manifests)):
            raise RequestError(f"a run is writing into {out}: verify it afterwards")
        checks = {
            folder: _Check(output, key, folder, sha256 or "")
            for key, folder, sha256, state in records.columns("key", "folder", "sha256", "status")
            if folder and (state in DONE or output.holds(folder))
        }
    again: list[_Check] = []
    for tries in (list(checks.values()), again):
        for check, outcome in executor.run(_check_output, tries):
            if isinstance(outcome, WorkerDiedError) and tries is not again:
                again.append(check)  # which says nothing about the output
                continue
            if isinstance(outcome, OSError | WorkerDiedError):
                raise OutputError(f"cannot read {out}/{check.folder}: {outcome}") from outcome
            yield from outcome
            checked()
    place = resolve_out(out)
    if isinstance(place, Path):
        yield from _strays(place, set(checks))
    elif isinstance(output, Bucket):
        yield from _stray_objects(output, set(checks))


def _check_output(check: _Check) -> list[Finding] | OSError:
    """Return the findings about an output, or the error that prevented reading it; runs in a worker."""
    try:
        if not check.output.holds(check.folder):
            return [Finding("missing", check.folder, check.key)]
        damaged = check.output.damaged_files(check.folder, check.sha256)
    except OSError as exc:
        return exc
    return [Finding("torn", f"{check.folder}/{name}", check.key) for name in damaged]


def _strays(out: Path, folders: set[str]) -> Iterator[Finding]:
    """Yield files that belong to no output, unrecorded outputs, and folders that a killed run left behind."""
    arranged = view_files(out)
    # Earlier versions put outputs into the folders of other outputs, so the walk enters those too.
    with_parents = folders.union(*map(folders_above, folders))
    for folder, subfolders, names in os.walk(out):
        here = os.path.relpath(folder, out)
        to_outputs = [name for name in sorted(subfolders) if os.path.normpath(f"{here}/{name}") in with_parents]
        if here == WORK_FOLDER:
            unfinished = [name for name in subfolders if "-of-" not in name]
            yield from (Finding("unfinished", printable(f"{WORK_FOLDER}/{name}")) for name in sorted(unfinished))
            subfolders[:] = [name for name in subfolders if name not in unfinished]
            continue
        if here.startswith(WORK_FOLDER + os.sep):
            yield from (Finding("unfinished", printable(f"{here}/{name}")) for name in sorted(subfolders))
            subfolders.clear()
            continue
        if here in folders:  # its own files are checked by `_check_output`
            foreign_names = [name for name in Output(out, out).foreign_names(here) if name not in to_outputs]
            yield from (Finding("stray", printable(f"{here}/{name}")) for name in foreign_names)
            subfolders[:] = to_outputs
            continue
        if SIDECAR in names and f"{here}/{SIDECAR}" not in arranged:
            yield Finding("unrecorded", printable(here))
            subfolders[:] = to_outputs
            continue
        subfolders.sort()
        own = RESERVED if here == "." else ()
        for name in sorted(names):
            if not (own and name.startswith(own)) and f"{here}/{name}" not in arranged:
                yield Finding("stray", printable(name if here == "." else f"{here}/{name}"))


def _stray_objects(bucket: Bucket, folders: set[str]) -> Iterator[Finding]:
    """Yield objects that belong to no output, unrecorded outputs, and interrupted uploads."""
    unrecorded: set[str] = set()
    for url, files in walk(bucket.url):
        here = url[len(bucket.url) + 1 :]
        names = [os.path.basename(path) for path, _ in files]
        above = (here, *(parent.as_posix() for parent in Path(here).parents))
        owner = next((folder for folder in above if folder in folders), None)
        if here.split("/", 1)[0] == WORK_FOLDER or (owner is None and unrecorded.intersection(above)):
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
    """Record damaged outputs as failed, so that the next run converts them again; return their number."""
    keys = {finding.key for finding in findings if finding.key}
    for key in keys:
        result = manifest.get(key)
        if result is not None:
            manifest.put(replace(result, status="failed", reason="found damaged by gpuprep verify", codes=("damaged",)))
    return len(keys)
