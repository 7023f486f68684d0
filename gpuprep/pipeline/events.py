"""Defines `Run`, the result of a run, and `Listener`, whose methods are called during a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import overload

from gpuprep.dicom.discover import Cohort
from gpuprep.output.manifest import Manifest
from gpuprep.output.nnunet import NnunetCases
from gpuprep.output.object_store import local_copies
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.match_masks import Matched


@dataclass(frozen=True, slots=True)
class Results(Sequence[SeriesResult]):
    """The results of all series of a run; each is read from the manifest when used, since there may be 100,000."""

    manifest: str
    keys: tuple[str, ...]
    skipped: frozenset[str] = frozenset()
    """Keys of series that were skipped as complete and unchanged."""

    @overload
    def __getitem__(self, index: int) -> SeriesResult: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SeriesResult, ...]: ...
    def __getitem__(self, index: int | slice) -> SeriesResult | tuple[SeriesResult, ...]:
        if isinstance(index, int):
            return next(self._read((self.keys[index],)))
        return tuple(self._read(self.keys[index]))

    def __iter__(self) -> Iterator[SeriesResult]:
        return self._read(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def _read(self, keys: tuple[str, ...]) -> Iterator[SeriesResult]:
        out, name = os.path.split(self.manifest)
        with local_copies(out, name) as top, closing(Manifest(top / name, reading=True)) as manifest:
            for key in keys:
                result = manifest.get(key)
                if result is None:
                    raise KeyError(f"{key} is no longer in {self.manifest}")
                yield replace(result, status="skipped") if key in self.skipped else result


@dataclass(slots=True)
class Tally:
    """Sums over the series of one status."""

    series: int = 0
    slices: int = 0
    files: int = 0
    bytes: int = 0
    cropped: int = 0
    """Number of series that were cropped."""
    cropped_shares: float = 0.0
    """Sum of the shares of their voxels that were kept."""
    not_cropped: int = 0
    """Number of converted series in which the part to crop to was not found."""


@dataclass(frozen=True, slots=True)
class Run:
    """Result of a run.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> run = gpuprep.convert("dicom", "out", gpuprep.Recipe(size=(64, 64)), backend="cpu")
    >>> run.exit_code, [(result.status, result.shape) for result in run.results]
    (0, [('ok', (36, 64, 64))])
    """

    results: Sequence[SeriesResult]
    """Result of every series, read from the manifest when used."""
    passed_over: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...]
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    """Sums by status."""
    found: int = 0
    """Number of series under the paths, in all shards together."""
    postponed: int = 0
    """Number of series that `limit` left for a later run."""
    unlisted: str = ""
    """Phrase about lines of the file of the selection without a series; "" if there are none."""
    unmatched: tuple[tuple[str, str], ...] = ()
    """(path, reason) of segmentations without a series that the user named, or that lie in a folder the user named."""
    unused: tuple[tuple[str, str], ...] = ()
    """(path, reason) of segmentations without a series that ``masks="auto"`` found among the inputs."""
    stopped: int | None = None
    """Number of series that were not begun because the run was stopped; None: it was not stopped."""
    arranged: NnunetCases | None = None
    """Number of cases in the nnU-Net dataset; None: none was made."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of series by status."""
        return {status: tally.series for status, tally in self.tallies.items()}

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some series or files left out, 3 nothing found, 130 stopped."""
        if self.stopped is not None:
            return 130
        bad = bool(self.unreadable or self.unmatched or self.unlisted)
        if not self.found:
            return 1 if bad else 3
        return 1 if bad or {"rejected", "failed"} & self.tallies.keys() else 0


class Listener:
    """Base class of objects that a run reports to; override the methods of interest.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> class Printer(gpuprep.Listener):
    ...     def finished(self, result):
    ...         print(result.status, result.slices)
    >>> run = gpuprep.convert("dicom", "out", gpuprep.Recipe(size=(64, 64)), backend="cpu", listener=Printer())
    ok 12
    """

    def scanned(self, cohort: Cohort) -> None:
        """All headers are read."""

    def matched(self, matched: Matched) -> None:
        """All segmentations are matched to series."""

    def planned(self, forecast: Forecast) -> None:
        """Every series is planned; conversion begins."""

    def finished(self, result: SeriesResult) -> None:
        """One series is finished."""

    def ended(self, run: Run) -> None:
        """All series are finished, or the run was stopped and those in flight are."""
