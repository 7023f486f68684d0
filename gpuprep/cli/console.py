"""Prints recipes, progress, tables and lines about series to the terminal.

Text from files is never interpreted as markup. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.color import Color
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gpuprep.compute.hu_histogram import BANDS
from gpuprep.core.formatting import first_few, format_bytes, format_count, plain_reason, printable
from gpuprep.core.recipe import Preset, Recipe
from gpuprep.dicom.discover import Cohort
from gpuprep.dicom.elements import TAGS
from gpuprep.output.columns import Column
from gpuprep.output.records import SeriesFacts, SeriesResult
from gpuprep.output.verify import Finding as Damage
from gpuprep.output.verify import Status
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run
from gpuprep.pipeline.match_masks import Matched
from gpuprep.pipeline.scan import Scan

if TYPE_CHECKING:
    from gpuprep.cli.doctor import Finding
    from gpuprep.report.inspect_series import SeriesSummary

STATES = {"running": "green", "finished": "", "interrupted": "yellow", "killed": "red"}
STYLES = {"ok": "green", "fixed": "cyan", "skipped": "dim", "excluded": "dim", "rejected": "yellow"}
PIPE_WIDTH = 160
"""Width in columns if the output is not a terminal."""

MAX_UNUSED_LINES = 20
"""Maximum number of printed lines about segmentations that ``--masks auto`` found and that belong to no series."""

HISTOGRAM_WIDTH = 96
"""Maximum width of a histogram in columns."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continue silently if the reader has closed the pipe: files and exit code are still needed."""
        self.quiet = True
        discard_output(self.file)


def discard_output(stream: IO[str]) -> None:
    """Redirect a stream whose reader is gone to the null device, so that writing and flushing raise no error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _console(stderr: bool) -> Console:
    console = _Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def show_recipe(recipe: Recipe, backend: str, engine: str) -> None:
    """Print the resolved recipe, the backend and the engine."""
    masks = {f"masks.{k}": v for k, v in recipe.masks.to_dict().items() if v not in ("none", {})}
    choice = {f"select.{k}": v for k, v in recipe.select.to_dict().items() if v not in ("none", False)}
    values = {k: v for k, v in recipe.to_dict().items() if k not in ("masks", "select")} | masks | choice
    values = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    _console(stderr=True).print(
        "recipe  " + "  ".join(f"{k}={v}" for k, v in values.items()) + f"\nrun     backend={backend}  engine={engine}",
        style="dim",
    )


class ProblemPrinter(Listener):
    """Listener that prints a line for each unreadable file, unmatched segmentation, and rejected or failed series."""

    def __init__(self) -> None:
        self._console = _console(stderr=True)

    def scanned(self, cohort: Cohort) -> None:
        _show_unreadable(self._console, cohort)

    def matched(self, matched: Matched) -> None:
        _show_unmatched(self._console, matched.complaints)
        _show_unused(self._console, matched.unused)

    def finished(self, result: SeriesResult) -> None:
        if result.status in ("rejected", "failed"):
            self._print(result, f"{result.codes[0]}: {plain_reason(result.reason)}")

    def _print(self, result: SeriesResult, text: str) -> None:
        style = STYLES.get(result.status, "red")
        self._console.print(f"{result.status:8}  {result.source}: {text}", style=style)


class Monitor(ProblemPrinter):
    """Listener that shows a progress bar of series, and also prints irregularities and warnings of converted series."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(
            TextColumn("series"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._slices = 0
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def scanned(self, cohort: Cohort) -> None:
        slices = sum(len(s.slices) for s in cohort)
        self._console.print(f"found   {len(cohort)} series with {slices} slices" + _passed_over(cohort.passed_over))
        super().scanned(cohort)

    def matched(self, matched: Matched) -> None:
        used = {g.path: g.format or "read with its series" for found in matched.by_key.values() for g in found}
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(used.values()).items()))
        others = len(matched.unmatched) - len(matched.complaints) - len(matched.unused)
        self._console.print(
            f"masks   {format_count(len(used), 'segmentation')} of {len(matched.by_key)} series ({kinds or 'none'})"
            + (f"; {format_count(others, 'other file')} skipped" if others else "")
        )
        super().matched(matched)

    def planned(self, forecast: Forecast) -> None:
        self._task = self._progress.add_task("", total=forecast.series, rate="")
        self._started = time.perf_counter()

    def finished(self, result: SeriesResult) -> None:
        super().finished(result)
        if result.status in ("ok", "fixed") and (notes := result.irregularities + result.warnings):
            self._print(result, "; ".join(notes))
        if result.status in ("ok", "fixed"):
            self._slices += result.slices
        if self._task is not None:
            rate = self._slices / (time.perf_counter() - self._started)
            self._progress.update(self._task, advance=1, rate=f"{rate:.0f} slices/s")


def show_run(run: Run, out: str, seconds: float) -> None:
    """Print the table at the end of a run."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("status")
    for heading in ("series", "slices in", "files out", "GB out"):
        table.add_column(heading, justify="right")
    for status in ("ok", "fixed", "skipped", "excluded", "rejected", "failed"):
        if (tally := run.tallies.get(status)) is not None:
            table.add_row(
                status, str(tally.series), str(tally.slices), str(tally.files), f"{tally.bytes / 1e9:.2f}",
                style=STYLES.get(status, "red"),
            )  # fmt: skip
    console = _console(stderr=False)
    console.print(table)
    notes = f"{seconds:.1f} s; volumes and manifest in {printable(out)}" + _passed_over(run.passed_over)
    if run.postponed:
        notes += f"; {run.postponed} series not converted because of --limit"
    if run.unlisted:
        notes += f"; {run.unlisted}"
    if run.stopped:
        notes += f"; {run.stopped} series not started"
    if cropped := sum(tally.cropped for tally in run.tallies.values()):
        percent = 100 * sum(tally.cropped_shares for tally in run.tallies.values()) / cropped
        notes += f"; {cropped} series cropped, on average to {percent:.2g} % of their voxels"
    if not_cropped := sum(tally.not_cropped for tally in run.tallies.values()):
        notes += f"; {not_cropped} series not cropped (crop-not-found)"
    if run.arranged is not None:
        training, others, apart = run.arranged
        notes += f"; for nnU-Net {format_count(training, 'training case')}, {others} in imagesTs"
        notes += f" ({apart} series left out: made by another recipe, or with leaning slices)" if apart else ""
    if without := len(run.unmatched) + len(run.unused):
        notes += f"; {format_count(without, 'segmentation')} without a series"
    if run.unreadable:
        notes += f"; {len(run.unreadable)} DICOM files or folders unreadable"
    console.print(notes)


def show_scan(scan: Scan, unmatched: Iterable[tuple[str, str]] = (), unused: Sequence[tuple[str, str]] = ()) -> None:
    """Print the series that a scan found, their irregularities, and what a conversion would do."""
    cohort, planned = scan.cohort, scan.planned
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("verdict", "series", "folder"):
        table.add_column(heading, overflow="fold")
    table.add_column("plane", no_wrap=True)
    at_most = "at most " if any(o.plan is not None and o.plan.recipe.crop for o in planned) else ""
    for heading in ("slices", "spacing mm", f"becomes {at_most}".rstrip(), "GB"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("kernel", "description", "group"):
        table.add_column(heading, overflow="fold")
    counts: Counter[str] = Counter()
    groups = Counter(o.facts.group_id for o in planned)
    total = 0
    for o in planned:
        counts[o.verdict] += 1
        shape = size = ""
        between = o.audit.measures.spacing_mm if o.audit else None
        spacing = "" if between is None else f"{between:.4g}"
        if o.plan is not None:
            spacing = " × ".join(f"{s:.4g}" for s in o.plan.source.spacing_mm)
            shape = " × ".join(map(str, o.plan.target.shape))
            size = f"{o.plan.output_bytes / 1e9:.2f}"
            total += o.plan.output_bytes
        table.add_row(
            o.verdict, o.series.label, printable(o.series.folder), o.audit.measures.orientation if o.audit else "",
            str(len(o.series.slices)), spacing, shape, size, o.facts.kernel or "", _described(o.facts),
            (o.facts.group_id or "") if groups[o.facts.group_id] > 1 else "", style=STYLES[o.verdict],
        )  # fmt: skip
    console = _console(stderr=False)
    console.print(table)
    for o in planned:
        if o.action == "exclude":
            console.print(f"excluded  {o.series.label}  {o.reason}", style=STYLES["excluded"])
        elif o.reason:
            text = f"{o.codes[0]}: {plain_reason(o.reason)}"
            console.print(f"rejected  {o.series.label}  {text}", style=STYLES["rejected"])
        for g in o.segmentations:
            text = f"unreadable: {g.error}" if g.error else f"{g.format} ({g.why}) with {_names(g.names)}"
            console.print(f"masks     {o.series.label}  {printable(g.path)}: {text}", soft_wrap=True)
        if o.segmentations and o.action == "convert":
            console.print(f"masks     {o.series.label}  used: {_names(o.structures)}", soft_wrap=True)
        for irregularity in o.audit.irregularities if o.audit and not o.reason else ():
            style = STYLES[o.verdict]
            console.print(f"{o.verdict:8}  {o.series.label}  {irregularity.code}: {irregularity.text}", style=style)
        for warning in () if o.reason else o.warnings:
            console.print(f"warning   {o.series.label}  {warning.code}: {warning.text}", style="yellow")
    _show_unreadable(console, cohort)
    _show_unmatched(console, unmatched)
    _show_unused(console, unused)
    sums = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    size = f"{at_most}{total / 1e9:.2f} GB to write"
    console.print(f"{len(cohort)} series: {sums or 'none'}; {size}" + _passed_over(cohort.passed_over))
    if scan.forecast.free_disk_bytes is not None:
        show_forecast(scan.forecast)


def _described(facts: SeriesFacts) -> str:
    """Return the description of a series, with phase and contrast."""
    phase = f"phase {facts.phase:g} {facts.phase_unit}" if facts.phase is not None else ""
    contrast = {"yes": "contrast", "no": "no contrast"}.get(facts.contrast or "", "")
    return ", ".join(text for text in (facts.series_description or "", phase, contrast) if text)


def show_columns(columns: Iterable[Column]) -> None:
    """Print the columns by which series can be chosen."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("column", "type", "unit", "DICOM"):
        table.add_column(heading, no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for column in columns:
        tag = f"({TAGS[column.keyword] >> 16:04X},{TAGS[column.keyword] & 0xFFFF:04X})" if column.keyword else ""
        table.add_row(column.name, column.kind.sqlite.lower(), column.unit, tag, column.meaning)
    _console(stderr=False).print(table)


def show_presets(presets: Mapping[str, Preset]) -> None:
    """Print the named recipes."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("for", overflow="fold")
    table.add_column("source", overflow="fold", style="dim")
    for name, preset in presets.items():
        table.add_row(name, preset.why, preset.source)
    _console(stderr=False).print(table)


def show_series_summary(seen: SeriesSummary) -> None:
    """Print the overview of one series; with three planes if the terminal has colours."""
    from gpuprep.report.montage import LETTERS, grid_lines, text_histogram

    console = _console(stderr=False)
    console.print(seen.title, soft_wrap=True)
    console.print(" ".join([seen.verdict, *seen.codes]), style=STYLES.get(seen.verdict, "red"))
    for line in (*seen.notes, *grid_lines(seen)):
        console.print(printable(line), soft_wrap=True)
    if seen.quality is not None:
        console.print()
        for line in text_histogram(seen.quality, min(console.width - 6, HISTOGRAM_WIDTH)):
            console.print(line, soft_wrap=True)
        for bands in (BANDS[:4], BANDS[4:]):
            shares = ((b, f"{seen.quality['bands'][b.name]:.1%}") for b in bands)
            entries = (f"{LETTERS[b.name]} {b.name:6} {share:>5} of {b.low_hu}…{b.high_hu}" for b, share in shares)
            console.print("".join(f"{entry:31}" for entry in entries).rstrip(), soft_wrap=True)
    if seen.planes is not None and console.is_terminal and console.color_system is not None:
        console.print()
        for row in _half_blocks(seen.planes, min(console.width - 1, seen.planes.shape[1])):
            console.print(row)


def _half_blocks(pixels: NDArray[np.uint8], width: int) -> Iterator[Text]:
    """Yield the lines of a picture, shape (rows, columns, 3): each character shows two pixels, one above the other."""
    from PIL import Image

    height = max(2, round(pixels.shape[0] * width / pixels.shape[1]) // 2 * 2)
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        line = Text(no_wrap=True)
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        yield line


def show_forecast(forecast: Forecast) -> None:
    """Print the disk space, memory and time that a run would need."""
    console = _console(stderr=False)
    disk = forecast.disk_bytes
    most = "" if disk is not None else "at most "
    free = f" of {format_bytes(forecast.free_disk_bytes)} free" if forecast.free_disk_bytes is not None else ""
    console.print(f"disk    {most}{format_bytes(forecast.output_bytes if disk is None else disk)}{free}")
    console.print(
        f"memory  {format_bytes(forecast.memory_bytes)} at the peak of {format_count(forecast.workers, 'worker')}; "
        f"{format_bytes(forecast.largest_bytes)} for the largest series"
    )
    if forecast.expected_s is not None and forecast.experience is not None:
        conversions = format_count(forecast.experience.series, "conversion")
        console.print(f"time    {_duration(forecast.expected_s)}, estimated from {conversions}")
    if forecast.misfit:
        console.print(f"does not fit: {forecast.misfit}", style="red")


def show_status(status: Status, out: str) -> None:
    """Print the contents of an output folder and the progress of its runs."""
    console = _console(stderr=False)
    for p in status.progress:
        shard = f"shard {p.shard.number}/{p.shard.count}, " if p.shard.name else ""
        rate = f", {p.series_per_s:.3g} series/s" if p.series_per_s is not None else ""
        left = f", {_duration(p.left_s)} left" if p.left_s is not None else ""
        # The counts below are of all shards; this line may be of one.
        last = "" if p.state == "running" else "last run "
        console.print(
            f"{last}{p.state}: {shard}{p.done} of {p.run.todo} series done{rate}{left} "
            f"({p.run.skipped} skipped; since {p.run.started} on {p.run.host}, {p.run.device})",
            style=STATES[p.state],
        )
    counts = ", ".join(f"{n} {state}" for state, n in sorted(status.counts.items())) or "no series"
    console.print(f"{counts}; {format_bytes(status.bytes)}")
    for reason in status.reasons:
        console.print(f"{reason.status} {reason.codes}: {reason.series}", style=STYLES.get(reason.status, "red"))
        for example in reason.examples:
            console.print(f"  {example}", soft_wrap=True)
    if status.unreadable:
        console.print(f"{status.unreadable} DICOM files or folders unreadable", style="red")
    if status.other_recipe:
        console.print(
            f"{format_count(status.other_recipe, 'output')} by another recipe than the last run's: convert the inputs "
            f"with --recipe {printable(out)}/recipe.toml to make all outputs alike; gpuprep manifest {printable(out)} "
            "shows which they are in its column recipe_sha256",
            style="yellow",
            soft_wrap=True,
        )


class CountingBar:
    """Progress display with a counter; work of known length, see `expect`, also has a bar and the time left."""

    def __init__(self, label: str, *, hidden: bool = False) -> None:
        self._console = console = _console(stderr=True)
        columns, disable = (TextColumn(label), MofNCompleteColumn()), hidden or not console.is_terminal
        self._progress = Progress(*columns, console=console, disable=disable)
        self._task = self._progress.add_task("", total=None)
        self.count = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, total: int) -> None:
        """Set the length of the work."""
        self._progress.columns = (*self._progress.columns, BarColumn(), TimeRemainingColumn())
        self._progress.update(self._task, total=total)

    def one_more(self) -> None:
        """Count one."""
        self.count += 1
        self._progress.update(self._task, advance=1)


def show_damage(findings: Sequence[Damage], outputs: int) -> None:
    """Print the findings about the files of an output folder."""
    console = _console(stderr=False)
    for f in findings:
        style = "red" if f.kind in ("missing", "torn") else "yellow"
        console.print(f"{f.kind:10}  {f.path}", style=style, soft_wrap=True)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(f.kind for f in findings).items()))
    console.print(f"{format_count(outputs, 'output')} read again: {counts or 'all as they were written'}")


def _duration(seconds: float) -> str:
    """Return a duration as text in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_findings(findings: Iterable[Finding]) -> None:
    """Print the doctor's report."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for f in findings:
        table.add_row("ok" if f.ok else "no", f.topic, f.name, f.detail, style="" if f.ok else "yellow")
    _console(stderr=False).print(table)


def print_line(text: str) -> None:
    """Print one line to standard output."""
    _console(stderr=False).print(printable(text), soft_wrap=True)


def _show_unreadable(console: Console, cohort: Cohort) -> None:
    for path, reason in cohort.unreadable:
        console.print(f"unreadable  {path}: {reason}", style="red")


def _show_unmatched(console: Console, unmatched: Iterable[tuple[str, str]]) -> None:
    for path, why in unmatched:
        console.print(f"unmatched  {path}: {why}", style="yellow", soft_wrap=True)


def _show_unused(console: Console, unused: Sequence[tuple[str, str]]) -> None:
    _show_unmatched(console, unused[:MAX_UNUSED_LINES])
    if len(unused) > MAX_UNUSED_LINES:
        more = f"{len(unused) - MAX_UNUSED_LINES} more: a run lists all in the table segmentations of manifest.sqlite"
        console.print(f"unmatched  {more}", style="yellow", soft_wrap=True)


def _passed_over(passed_over: Mapping[str, int]) -> str:
    """Return a phrase with the number of other files by kind; "" if there are none."""
    if not passed_over:
        return ""
    kinds = ", ".join(f"{n} {kind}" for kind, n in passed_over.items())
    return f"; passed over {format_count(sum(passed_over.values()), 'other file')} ({kinds})"


def _names(names: Iterable[str]) -> str:
    """Return the first few names of structures as text."""
    return first_few([printable(name) for name in names], 8) or "nothing"
