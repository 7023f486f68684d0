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

from gpuprep.cli.asked import asked_options, shown
from gpuprep.cli.convert_command import run_conversion
from gpuprep.cli.exit_codes import errors_to_exit_codes, print_json, readers_may_leave
from gpuprep.cli.options import OUTPUT_FLAGS, RUN, RUN_FLAGS, some, takes
from gpuprep.errors import RequestError
from gpuprep.executors.signals import held_back

if TYPE_CHECKING:
    from gpuprep.output.records import RunRecord

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="The --out of a run.")]


@takes(some(OUTPUT_FLAGS, "json_"))
def status(out: OutArgument, **flags: Any) -> None:
    """Show how far a run is, or how the last one ended: counts, rate, time left, what was left out and why."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import show_status
            from gpuprep.output.verify import status as status_of

        found = status_of(out)
        if flags["json_"]:
            print_json(asdict(found))
        else:
            show_status(found, out)


@takes(some(RUN_FLAGS, "jobs"), some(OUTPUT_FLAGS, "json_"))
def verify(
    out: OutArgument,
    mark: Annotated[
        bool, typer.Option("--mark", help="Record damaged outputs as failed: retry, or a run, makes them again.")
    ] = False,
    **flags: Any,
) -> None:
    """Read every output again and compare checksums; name what is damaged, missing, unfinished or of no output."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import Counting, show_damage
            from gpuprep.executors.cores import usable_cores
            from gpuprep.executors.processes import Processes
            from gpuprep.output.manifest import open_manifest
            from gpuprep.output.object_store import open_out
            from gpuprep.output.verify import mark as mark_damaged
            from gpuprep.output.verify import verify as findings_of

        executor = Processes(flags["jobs"] or usable_cores(), preload=("gpuprep.output.verify",))
        try:
            with Counting("outputs") as counting:
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
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, lists as JSON in their cells (the default).")] = False,
    json_: Annotated[bool, typer.Option("--json", help="As JSON, a line per series.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="As Parquet; needs gpuprep\\[parquet].")] = False,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; standard output if absent.")] = None,
) -> None:
    """Print the manifest, one row per series; shards that are not merged yet are in it."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.output.export import write_csv, write_json_lines, write_parquet
            from gpuprep.output.object_store import place_of
            from gpuprep.output.verify import Records

        if csv + json_ + parquet > 1:
            raise RequestError("--csv, --json and --parquet: give one of them")
        if parquet and to is None and sys.stdout.isatty():
            raise RequestError("Parquet is nothing for a terminal: give --to FILE, or > FILE")
        place = place_of(out)
        if to is not None and isinstance(place, Path) and to.resolve().is_relative_to(place.resolve()):
            raise RequestError(f"{to} lies in {out}: choose a place outside of it")
        write: Callable[..., None] = write_parquet if parquet else write_json_lines if json_ else write_csv
        with closing(Records(out)) as records, readers_may_leave():
            write(records, to)


def report(
    out: OutArgument,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; report.html in OUT if absent.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page of all series: a table, a picture of each, distributions, and what stands out."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import say
            from gpuprep.report.html import write_report

        say(f"report in {write_report(out, to)}")


def merge(out: OutArgument) -> None:
    """Merge the manifests of shards into that of OUT. Shards that ran elsewhere are first copied into OUT."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import say
            from gpuprep.core.formatting import numbered
            from gpuprep.output.manifest import Manifest, manifest_path, shards_of
            from gpuprep.output.manifest import merge as merge_manifests
            from gpuprep.output.object_store import open_out, place_of

        place = place_of(out)
        if isinstance(place, Path) and not place.is_dir():
            raise RequestError(f"{out} is no folder: give the --out of a run")
        if isinstance(place, Path) and not shards_of(place) and not manifest_path(place).is_file():
            raise RequestError(f"{out} has no manifest: give the --out of a run")
        with open_out(out) as output, closing(Manifest(manifest_path(output.root))) as merged:
            shards = merge_manifests(merged)
            merged.write_csv()
            missing = sorted({n for s in shards for n in range(1, s.count + 1)} - {s.number for s in shards})
            all_of_them = output.lasting(merged.path.name)
            say(f"{numbered(len(shards), 'shard')} merged into {all_of_them}, which has {merged.count()} series")
            if missing and shards:
                numbers = ", ".join(f"{n}/{shards[0].count}" for n in missing)
                say(f"not among them: {numbers}; merge again when they are there")


@takes(
    some(RUN_FLAGS, "backend", "jobs", "gpus", "memory_share", "limit_s", "index"),
    some(OUTPUT_FLAGS, "log", "log_format", "quiet", "json_"),
)
def retry(
    out: OutArgument,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Those that were rejected too.", rich_help_panel=RUN)
    ] = False,
    **flags: Any,
) -> None:
    """Convert again what failed, with the inputs, masks and recipe of the last run."""
    with errors_to_exit_codes() as stop:
        with held_back():
            from gpuprep.cli.console import say
            from gpuprep.core.recipe import Recipe
            from gpuprep.output.manifest import open_manifest
            from gpuprep.output.object_store import open_out
            from gpuprep.output.verify import Records

        states = ("failed", "rejected") if rejected else ("failed",)
        with closing(Records(out)) as records:  # is there anything?
            count = sum(state in states for (state,) in records.columns("status"))
        if not count:
            say(f"nothing {' or '.join(states)} in {out}")
            return
        with open_out(out) as output, closing(open_manifest(output.root)) as known:
            run = known.last_run()
            if run is None:
                raise RequestError(f"{out} knows of no run: use gpuprep convert")
            if known.naming():
                raise RequestError(
                    f"{out} was made with --names hash, and does not say what was read: run gpuprep convert again, "
                    "with --names hash and its --key"
                )
            recipe = Recipe.load(output.root / "recipe.toml")
            if recipe.sha256 != run.recipe_sha256:
                raise RequestError(f"{out}/recipe.toml is not what the last run did: use gpuprep convert --recipe")
        asked = _request(run, out)
        options = asked_options(
            flags,
            out,
            recipe=recipe,
            masks=asked["masks"],
            engine=asked["engine"],
            layout=asked.get("layout", "folders"),
            only=states,
        )
        run_conversion(asked["paths"], out, options, stop, **shown(flags))


def _request(run: RunRecord, out: str) -> dict[str, Any]:
    """Return what the last run was asked for."""
    with suppress(ValueError, RecursionError):
        asked: Any = json.loads(run.request)
        if isinstance(asked, dict) and {"paths", "masks", "engine"} <= asked.keys():
            return asked
    raise RequestError(f"the manifest of {out} does not say what the last run read: use gpuprep convert")


KEEPING: tuple[Callable[..., None], ...] = (status, verify, retry, manifest, report, merge)
