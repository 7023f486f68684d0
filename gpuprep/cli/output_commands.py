"""Defines the commands about an output folder: `status`, `verify`, `retry`, `manifest`, `report` and `merge`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuprep.cli.convert_command import run_conversion
from gpuprep.cli.exit_codes import errors_to_exit_codes, ignore_closed_pipe, print_json
from gpuprep.cli.options import OUTPUT_FLAGS, RUN, RUN_FLAGS, add_flags, select
from gpuprep.cli.parse_flags import display_flags, options_from_flags
from gpuprep.errors import RequestError
from gpuprep.executors.signals import signals_blocked

if TYPE_CHECKING:
    from gpuprep.output.records import RunRecord

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run; a path or URL.")]


@add_flags(select(OUTPUT_FLAGS, "json_"))
def status(out: OutArgument, **flags: Any) -> None:
    """Show progress and results of a run: counts, rate, time left, and rejected and failed series with reasons."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import show_status
            from gpuprep.output.verify import status as status_of

        found = status_of(out)
        if flags["json_"]:
            print_json(asdict(found))
        else:
            show_status(found, out)


@add_flags(select(RUN_FLAGS, "jobs"), select(OUTPUT_FLAGS, "json_"))
def verify(
    out: OutArgument,
    mark: Annotated[
        bool, typer.Option("--mark", help="Record damaged outputs as failed; retry or a run converts them again.")
    ] = False,
    **flags: Any,
) -> None:
    """Read every output again and compare checksums; name damaged, missing, unfinished and stray files."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import CountingBar, show_damage
            from gpuprep.executors.cores import usable_cores
            from gpuprep.executors.processes import ProcessExecutor
            from gpuprep.output.manifest import open_manifest
            from gpuprep.output.object_store import open_out
            from gpuprep.output.verify import mark as mark_damaged
            from gpuprep.output.verify import verify as findings_of

        executor = ProcessExecutor(flags["jobs"] or usable_cores(), preload=("gpuprep.output.verify",))
        try:
            with CountingBar("outputs") as counting:
                found = list(findings_of(out, executor, counting.one_more))
        finally:
            executor.stop()
        if mark and found:
            with open_out(out) as output, closing(open_manifest(output.root)) as manifest:
                mark_damaged(manifest, found)
                manifest.write_csv()
        if flags["json_"]:
            print_json([asdict(f) for f in found])
        else:
            show_damage(found, counting.count)
        raise typer.Exit(1 if found else 0)


def manifest(
    out: OutArgument,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with lists as JSON in cells (the default).")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object per line and series.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet; needs gpuprep\\[parquet].")] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to this file instead of standard output.")
    ] = None,
) -> None:
    """Print the manifest, one row per series, including shards that are not merged yet."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.output.columns import SERIES
            from gpuprep.output.export import write_csv, write_json_lines, write_parquet
            from gpuprep.output.object_store import resolve_out
            from gpuprep.output.verify import AllManifests

        if csv + json_ + parquet > 1:
            raise RequestError("--csv, --json and --parquet: give one of them")
        if parquet and to is None and sys.stdout.isatty():
            raise RequestError("binary Parquet is not written to a terminal: give --to FILE, or redirect with > FILE")
        place = resolve_out(out)
        if to is not None and isinstance(place, Path) and to.resolve().is_relative_to(place.resolve()):
            raise RequestError(f"--to {to} lies in the output folder {out}: choose a file outside of it")
        with closing(AllManifests(out)) as records, ignore_closed_pipe():
            rows = (result.to_dict() for result in records)
            if json_:
                write_json_lines(rows, to)
            else:
                (write_parquet if parquet else write_csv)(rows, SERIES, to)


def report(
    out: OutArgument,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write [OUT/report.html].", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page of all series: a table, previews, distributions, and outliers."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import print_line
            from gpuprep.report.html import write_report

        print_line(f"report in {write_report(out, to)}")


def merge(out: OutArgument) -> None:
    """Merge the manifests of shards in OUT into its manifest. First copy shards that ran elsewhere into OUT."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import print_line
            from gpuprep.core.formatting import format_count
            from gpuprep.output.manifest import Manifest, manifest_path, shards_of
            from gpuprep.output.manifest import merge as merge_manifests
            from gpuprep.output.object_store import open_out, resolve_out

        place = resolve_out(out)
        if isinstance(place, Path) and not place.is_dir():
            raise RequestError(f"{out} is not a folder: give the --out of a run")
        if isinstance(place, Path) and not shards_of(place) and not manifest_path(place).is_file():
            raise RequestError(f"{out} has no manifest: give the --out of a run")
        with open_out(out) as output, closing(Manifest(manifest_path(output.root))) as merged:
            shards = merge_manifests(merged)
            merged.write_csv()
            missing = sorted({n for s in shards for n in range(1, s.count + 1)} - {s.number for s in shards})
            file = output.final_location(merged.path.name)
            print_line(f"{format_count(len(shards), 'shard')} merged into {file}, which has {merged.count()} series")
            if missing and shards:
                numbers = ", ".join(f"{n}/{shards[0].count}" for n in missing)
                print_line(f"missing shards: {numbers}; merge again when they are finished")


@add_flags(
    select(RUN_FLAGS, "backend", "jobs", "gpus", "memory_share", "limit_s", "index"),
    select(OUTPUT_FLAGS, "log", "log_format", "quiet", "json_"),
)
def retry(
    out: OutArgument,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Also convert rejected series again.", rich_help_panel=RUN)
    ] = False,
    **flags: Any,
) -> None:
    """Convert failed series again, with the inputs, masks and recipe of the last run."""
    with errors_to_exit_codes() as stop:
        with signals_blocked():
            from gpuprep.cli.console import print_line
            from gpuprep.core.recipe import Recipe
            from gpuprep.output.manifest import open_manifest
            from gpuprep.output.object_store import open_out
            from gpuprep.output.verify import AllManifests

        states = ("failed", "rejected") if rejected else ("failed",)
        with closing(AllManifests(out)) as records:
            count = sum(state in states for (state,) in records.columns("status"))
        if not count:
            print_line(f"no series {' or '.join(states)} in {out}")
            return
        with open_out(out) as output, closing(open_manifest(output.root)) as known:
            run = known.last_run()
            if run is None:
                raise RequestError(f"the manifest of {out} has no run: use gpuprep convert")
            if known.naming():
                raise RequestError(
                    f"{out} was made with --names hash and does not name its inputs: run gpuprep convert again with "
                    "--names hash and the same --key"
                )
            recipe = Recipe.load(output.root / "recipe.toml")
            if recipe.sha256 != run.recipe_sha256:
                raise RequestError(f"{out}/recipe.toml is not the recipe of the last run: use gpuprep convert --recipe")
        request = _request(run, out)
        options = options_from_flags(
            flags,
            out,
            recipe=recipe,
            masks=request["masks"],
            engine=request["engine"],
            layout=request.get("layout", "folders"),
            select=request.get("select"),
            record=request.get("record", ()),
            only=states,
        )
        run_conversion(request["paths"], out, options, stop, **display_flags(flags))


def _request(run: RunRecord, out: str) -> dict[str, Any]:
    """Return inputs, masks and options of the last run."""
    with suppress(ValueError, RecursionError):
        request: Any = json.loads(run.request)
        if isinstance(request, dict) and {"paths", "masks", "engine"} <= request.keys():
            return request
    raise RequestError(f"the manifest of {out} does not name the inputs of the last run: use gpuprep convert")


OUTPUT_COMMANDS: tuple[Callable[..., None], ...] = (status, verify, retry, manifest, report, merge)
