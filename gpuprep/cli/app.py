"""Defines the commands `convert`, `mask`, `scan`, `demo` and `doctor`, and starts the command line."""

from __future__ import annotations

import gc
import io
import logging
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from gpuprep._version import __version__
from gpuprep.cli.convert_command import run_conversion
from gpuprep.cli.exit_codes import errors_to_exit_codes, ignore_closed_pipe, print_error, print_json
from gpuprep.cli.inspect_commands import INSPECT_COMMANDS
from gpuprep.cli.options import (
    CROP,
    MASK_FLAGS,
    MASKS,
    OUTPUT_FLAGS,
    RECIPE_FLAGS,
    RUN,
    RUN_FLAGS,
    SELECT,
    SELECT_FLAGS,
    STACKING_FLAGS,
    Out,
    Paths,
    RecipeOption,
    add_flags,
    select,
)
from gpuprep.cli.output_commands import OUTPUT_COMMANDS
from gpuprep.cli.parse_flags import display_flags, jobs_or_cores, options_from_flags, recipe_from_flags
from gpuprep.cli.restore_command import restore
from gpuprep.core.formatting import printable
from gpuprep.errors import GpuprepError, RequestError
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.signals import signals_blocked

if TYPE_CHECKING:
    from gpuprep.pipeline.options import ConvertOptions
    from gpuprep.pipeline.planned_series import PlannedSeries

# Everything else is imported where it is used, so that `--help` does not wait for NumPy.

app = typer.Typer(
    name="gpuprep",
    help="Convert cohorts of CT DICOM to training-ready volumes, on a GPU or without one.",
    epilog="Exit codes: 0 all done, 1 some series rejected or failed or some file unreadable, 2 bad request, "
    "3 nothing found, 4 backend does not work, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


STANDARD_OUTPUT = Path("-")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"gpuprep {__version__}")  # noqa: T201
        raise typer.Exit


class _WithMasks(TyperCommand):
    """A command of which ``--masks A B`` means ``--masks A --masks B``, as a shell's wildcards give several words."""

    # An option of click takes a fixed number of words, and nothing public in its parser changes that. So the option is
    # put before each further word here, and click parses an ordinary line.

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        repeated: list[str] = []
        option = ""
        for word, following in pairwise([*args[:end], "--"]):
            if word.startswith("-"):
                option = word
                bare = word == "--masks" and following.startswith("-")
                if bare and not ctx.resilient_parsing:  # which it is while a shell completes the line
                    ctx.fail("Option '--masks' takes a path at least, or auto.")
            elif option == "--masks" and repeated[-1] != option:
                repeated.append(option)
            repeated.append(word)
        return super().parse_args(ctx, repeated + args[end:])


@app.command(cls=_WithMasks)
@add_flags(RECIPE_FLAGS, STACKING_FLAGS, MASK_FLAGS, SELECT_FLAGS, RUN_FLAGS, OUTPUT_FLAGS)
def convert(
    paths: Paths,
    out: Out,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEG_PATH|auto",
            help="A segmentation file, or a folder of them, to convert to masks; may be repeated. auto: RTSTRUCT, SEG "
            "and LIDC XML among the inputs.",
            rich_help_panel=MASKS,
        ),
    ] = None,
    recipe: RecipeOption = "default",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what a run would do and need; write nothing to OUT.", rich_help_panel=RUN),
    ] = False,
    **flags: Any,
) -> None:
    """Convert every CT series under DICOM_DIR; each gets its own folder under OUT.

    Running the command again skips complete and unchanged series. A rejected or failed series does not stop the
    others: it is listed with the reason on the screen and in OUT/manifest.csv.
    """
    with errors_to_exit_codes() as stop:
        resolved = recipe_from_flags(recipe, flags, image=True)
        options = options_from_flags(flags, out, recipe=resolved, masks=_mask_paths(masks))
        if dry_run:
            _show_scan(paths, options, json_=flags["json_"], out=out, calibrate=True)
        else:
            run_conversion(paths, out, options, stop, **display_flags(flags))


@app.command()
@add_flags(
    select(RECIPE_FLAGS, *CROP, "spacing_mm", "size", "fit", "format", "compression"),
    select(STACKING_FLAGS, "group_by", "policy", "orient"),
    MASK_FLAGS,
    SELECT_FLAGS,
    select(RUN_FLAGS, "select", "backend", "jobs", "names", "key", "index"),
    select(OUTPUT_FLAGS, "log", "log_format", "quiet", "json_"),
)
def mask(
    segmentations: Annotated[
        list[str],
        typer.Argument(
            metavar="SEG...", help="Segmentation files, or folders of them: RTSTRUCT, SEG, LIDC XML or text."
        ),
    ],
    series: Annotated[
        list[str],
        typer.Option(
            metavar="DICOM_DIR",
            help="CT series that the segmentations belong to. A single series gets all of them.",
        ),
    ],
    out: Out,
    recipe: RecipeOption = "default",
    **flags: Any,
) -> None:
    """Convert segmentations alone, on the grid that `convert` with the same flags gives the images."""
    with errors_to_exit_codes() as stop:
        resolved = recipe_from_flags(recipe, flags, image=False)
        options = options_from_flags(flags, out, recipe=resolved, masks=segmentations)
        run_conversion(series, out, options, stop, **display_flags(flags))


def _show_columns(asked: bool) -> None:
    if asked:
        from gpuprep.cli.console import show_columns
        from gpuprep.pipeline.series_query import KNOWN_COLUMNS

        show_columns(KNOWN_COLUMNS.values())
        raise typer.Exit


@app.command()
@add_flags(STACKING_FLAGS, SELECT_FLAGS, select(RUN_FLAGS, "select", "jobs", "index"), select(OUTPUT_FLAGS, "json_"))
def scan(
    paths: Paths,
    recipe: RecipeOption = "default",
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write CSV with a row per series, instead of tables; -: print it.", rich_help_panel=RUN
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write Parquet; needs gpuprep\\[parquet].", rich_help_panel=RUN),
    ] = None,
    columns: Annotated[  # noqa: ARG001 - it prints them and exits
        bool,
        typer.Option(
            "--columns",
            help="List the columns of --where and --prefer.",
            is_eager=True,
            callback=_show_columns,
            rich_help_panel=SELECT,
        ),
    ] = False,
    **flags: Any,
) -> None:
    """List series, their irregularities and what `convert` would do; reads headers only.

    With --drop-duplicates, it also reads the pixels of three slices of series that may be copies.
    """
    with errors_to_exit_codes():
        resolved = recipe_from_flags(recipe, flags)
        if sum(map(bool, (csv, parquet, flags["json_"]))) > 1:
            raise RequestError("--csv, --parquet and --json: give one of them")
        for flag, file in (("--csv", csv), ("--parquet", parquet)):
            if file is not None and file.name.startswith("-") and file != STANDARD_OUTPUT:
                raise RequestError(f"{flag} {file}: give a name of a file, or - for the terminal")
        options = options_from_flags(flags | {"backend": "cpu"}, None, recipe=resolved)
        _show_scan(paths, options, json_=flags["json_"], csv=csv, parquet=parquet)


for _command in (*OUTPUT_COMMANDS, restore, *INSPECT_COMMANDS):
    app.command()(_command)


@app.command()
@add_flags(select(RUN_FLAGS, "backend", "jobs"))
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the demo, created if it does not exist.")],
    **flags: Any,
) -> None:
    """Write a small synthetic cohort as DICOM, convert it, and print the paths of the results."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import Monitor, print_line, show_recipe, show_run
            from gpuprep.cli.demo import run_demo
            from gpuprep.compute.backend import get_backend
            from gpuprep.core.recipe import Recipe

        started = time.perf_counter()
        chosen = get_backend(flags["backend"])
        show_recipe(Recipe(), chosen.device, "operators")
        with Monitor() as monitor:
            jobs = jobs_or_cores(flags["jobs"], chosen.name)
            result = run_demo(out, backend=chosen.name, jobs=jobs, listener=monitor)  # type: ignore[arg-type]
        show_run(result.run, str(result.volumes), time.perf_counter() - started)
        if result.run.counts not in ({"ok": 3, "fixed": 1, "rejected": 1}, {"skipped": 4, "rejected": 1}):
            raise GpuprepError(f"the demo should convert 4 series and reject 1, but the result is {result.run.counts}")
        first = result.volumes / min(r.folder for r in result.run.results if r.folder)
        gaps = "on purpose, patient-3 lacks one slice, which is interpolated, and patient-4 lacks six"
        print_line(f"DICOM in    {result.dicom}  ({gaps})")
        print_line(f"outlines in {result.masks}  (heart and spine of patient-1, as text)")
        print_line(f"look at     {first / '0100.tif'}  (float32 in [0, 1]: ImageJ shows it)")
        print_line(f"            {first / 'labels' / '0100.tif'}  (0 background, 1 heart, 2 spine, on the same pixels)")
        print_line(f"            {first / 'volume.json'}")
        print_line(f"            {result.volumes / 'manifest.csv'}")


@app.command()
@add_flags(select(OUTPUT_FLAGS, "json_"))
def doctor(
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Examine GPUs only: versions, settings, results compared with the host, speed."),
    ] = False,
    **flags: Any,
) -> None:
    """Show backends, devices, decoders and versions, and what to install for those that do not work.

    With --gpu, exit code 0 says that results of the GPU can be trusted, 1 that a check failed, 4 that no GPU works.
    """
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import print_line, show_findings
            from gpuprep.cli.doctor import examine, examine_gpu, gpu_lines, gpu_verdict

        if not gpu:
            findings = examine()
            if flags["json_"]:
                print_json([asdict(f) for f in findings])
            else:
                show_findings(findings)
            return
        report = examine_gpu()
        if flags["json_"]:
            print_json(report.to_dict())
        else:
            show_findings(gpu_lines(report))
        if report.exit_code:
            print_error(gpu_verdict(report))
            raise typer.Exit(report.exit_code)
        if not flags["json_"]:
            print_line(gpu_verdict(report))


def main() -> None:
    """Run the command line; the console script."""
    logging.basicConfig(level=logging.WARNING, format="gpuprep: %(message)s")
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show every file name
    try:
        app()
    finally:
        gc.freeze()  # at its end, Python would search all objects for garbage, which takes as long as many imports


def _mask_paths(masks: list[str] | None) -> list[str] | Literal["auto"] | None:
    """Return the values of ``--masks`` as the option `masks` of `gpuprep.convert`."""
    if masks is None or masks == ["auto"]:
        return None if masks is None else "auto"
    if "auto" in masks:
        raise RequestError("--masks auto excludes paths: give either auto or paths")
    return masks


def _show_scan(
    paths: list[str],
    options: ConvertOptions,
    *,
    json_: bool,
    csv: Path | None = None,
    parquet: Path | None = None,
    out: str | None = None,
    calibrate: bool = False,
) -> None:
    with signals_blocked():
        from gpuprep.cli.console import print_line, show_scan
        from gpuprep.output.export import write_csv, write_parquet
        from gpuprep.pipeline.events import Listener
        from gpuprep.pipeline.match_masks import Matched
        from gpuprep.pipeline.scan import scan_cohort
        from gpuprep.pipeline.scan_rows import SCAN_COLUMNS

    unmatched: list[tuple[str, str]] = []
    unused: list[tuple[str, str]] = []

    class UnmatchedCollector(Listener):
        def matched(self, matched: Matched) -> None:
            unmatched.extend(matched.complaints)
            unused.extend(matched.unused)

    found = scan_cohort(paths, options, out, UnmatchedCollector(), calibrate=calibrate)
    cohort, planned = found.cohort, found.planned
    if file := csv or parquet:
        with ignore_closed_pipe():
            write = write_csv if csv else write_parquet
            write(found.rows(), SCAN_COLUMNS, None if file == STANDARD_OUTPUT else file)
        for path, reason in cohort.unreadable:
            print_error(f"unreadable: {path}: {reason}")
        if file != STANDARD_OUTPUT:
            print_line(f"{len(planned)} series in {file}")
    elif json_:
        print_json(
            {
                "series": [_scan_entry(o, row) for o, row in zip(planned, found.rows(), strict=True)],
                "passed_over": cohort.passed_over,
                "unreadable": cohort.unreadable,
                "unmatched": unmatched,
                "unused": unused,
                "unlisted": found.unlisted,
                "total": found.forecast.to_dict(),
            }
        )
    else:
        show_scan(found, unmatched, unused)
    if found.unlisted and not json_:
        print_error(found.unlisted)
    if not cohort:
        print_error(f"no CT series under {', '.join(paths)}")
        raise typer.Exit(3)
    bad = cohort.unreadable or unmatched or found.unlisted or any(o.action == "reject" for o in planned)
    raise typer.Exit(1 if bad else 0)


def _scan_entry(o: PlannedSeries, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a series, with its segmentations."""
    return row | {
        "label": o.series.label,
        "segmentations": [
            {"path": printable(g.path), "format": g.format, "why": g.why, "names": g.names, "error": g.error}
            for g in o.segmentations
        ],
        "structures": o.structures,
    }
