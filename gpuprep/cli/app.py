"""The command line: flags to a recipe, events to a progress bar, errors to exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from gpuprep._version import __version__
from gpuprep.cli.convert_command import gpu_numbers, jobs_or_cores, run_conversion
from gpuprep.cli.exit_codes import complain, errors_to_exit_codes, header_index, print_csv, print_json
from gpuprep.cli.inspect_commands import LOOKING
from gpuprep.cli.options import (
    MASKS,
    RUN,
    AntiAlias,
    AssumeHu,
    BackendOption,
    Compression,
    Dtype,
    EngineOption,
    Fit,
    Format,
    Gpus,
    GroupBy,
    Index,
    IndexBase,
    Jobs,
    Json,
    Key,
    LayoutOption,
    LeanTolerance,
    Log,
    LogFormat,
    MaskLayout,
    MaskResampling,
    MaxMissing,
    MaxMissingShare,
    MemoryShare,
    NamesOption,
    NoRoomCheck,
    Order,
    Orient,
    Out,
    Paths,
    PixelBase,
    Policy,
    PositionTolerance,
    Quiet,
    RecipeOption,
    Report,
    Roi,
    Scheduler,
    ShardOption,
    Size,
    SliceFromOption,
    SliceOrderOption,
    Spacing,
    SpacingTolerance,
    TextFormat,
    Threshold,
    TimeLimit,
    UnitsOption,
    Window,
)
from gpuprep.cli.output_commands import KEEPING
from gpuprep.core.formatting import printable
from gpuprep.core.shard import WHOLE, Shard
from gpuprep.core.stacking_rules import texts
from gpuprep.errors import GpuprepError, RecipeError, RequestError
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.signals import held_back

if TYPE_CHECKING:
    from gpuprep.core.recipe import Recipe
    from gpuprep.pipeline.decide import Outlook
    from gpuprep.pipeline.pseudonyms import Pseudonyms

# Everything else is imported where it is used: `--help` must not wait for NumPy.

app = typer.Typer(
    name="gpuprep",
    help="Cohorts of CT DICOM to training-ready volumes, on a GPU or without one.",
    epilog="Exit codes: 0 all done, 1 some series rejected or failed or some file unreadable, 2 bad request, "
    "3 nothing found, 4 backend, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"gpuprep {__version__}")  # noqa: T201
        raise typer.Exit


class _WithMasks(TyperCommand):
    """A command whose option ``--masks`` takes every word up to the next option, as a shell's wildcards give them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        taking = False
        for n, word in enumerate(args):
            if word == "--":
                words += args[n:]
                break
            if word.startswith("-"):
                taking = word == "--masks"
                bare = n + 1 == len(args) or args[n + 1].startswith("-")
                if taking and bare and not ctx.resilient_parsing:  # which it is while a shell completes the line
                    ctx.fail("Option '--masks' takes a path at least, or auto.")
                words += [] if taking else [word]
            else:
                words += ["--masks", word] if taking else [word]
        return super().parse_args(ctx, words)


@app.command(cls=_WithMasks)
def convert(
    paths: Paths,
    out: Out,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEG_PATH...|auto",
            help="Segmentation files, or folders of them, to make masks of beside the "
            "images; auto: RTSTRUCT, SEG and LIDC XML among the inputs.",
            rich_help_panel=MASKS,
        ),
    ] = None,
    recipe: RecipeOption = "default",
    spacing: Spacing = None,
    order: Order = None,
    anti_alias: AntiAlias = None,
    window: Window = None,
    size: Size = None,
    fit: Fit = None,
    dtype: Dtype = None,
    format_: Format = None,
    compression: Compression = None,
    group_by: GroupBy = None,
    policy: Policy = None,
    orient: Orient = None,
    spacing_tolerance: SpacingTolerance = None,
    position_tolerance_mm: PositionTolerance = None,
    lean_tolerance_mm: LeanTolerance = None,
    max_missing: MaxMissing = None,
    max_missing_share: MaxMissingShare = None,
    assume_hu: AssumeHu = None,
    roi: Roi = None,
    mask_layout: MaskLayout = None,
    mask_resampling: MaskResampling = None,
    text_format: TextFormat = None,
    units: UnitsOption = None,
    index_base: IndexBase = None,
    pixel_base: PixelBase = None,
    slice_from: SliceFromOption = None,
    slice_order: SliceOrderOption = None,
    seg_threshold: Threshold = None,
    backend: BackendOption = "auto",
    engine: EngineOption = "operators",
    jobs: Jobs = None,
    gpus: Gpus = None,
    memory_share: MemoryShare = None,
    time_limit: TimeLimit = None,
    shard: ShardOption = None,
    layout: LayoutOption = "folders",
    names: NamesOption = "source",
    key: Key = None,
    scheduler: Scheduler = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Convert at most so many series now.", rich_help_panel=RUN)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would happen, and write nothing to OUT.", rich_help_panel=RUN)
    ] = False,
    no_room_check: NoRoomCheck = False,
    index: Index = None,
    log: Log = None,
    log_format: LogFormat = "text",
    report: Report = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Convert every CT series under DICOM_DIR into a folder of its own under OUT.

    Running it again skips what is complete and unchanged. A bad series never stops the others: it is named, with the
    reason, on the screen and in OUT/manifest.csv.
    """
    with errors_to_exit_codes() as stop:
        wanted = _recipe(
            recipe, spacing_mm=spacing, order=order, anti_alias=anti_alias, window_hu=window, size=size, fit=fit,
            dtype=dtype, format=format_, compression=compression, group_by=group_by, policy=policy, orient=orient,
            spacing_tolerance=spacing_tolerance, position_tolerance_mm=position_tolerance_mm,
            lean_tolerance_mm=lean_tolerance_mm, max_missing=max_missing, max_missing_share=max_missing_share,
            assume_hu=assume_hu, image=True, masks=_masks(
                roi=roi, layout=mask_layout, resampling=mask_resampling, text_format=text_format, units=units,
                index_base=index_base, pixel_base=pixel_base, slice_from=slice_from, slice_order=slice_order,
                threshold=seg_threshold,
            ),
        )  # fmt: skip
        given = _one_or_all(masks)
        part = WHOLE if shard is None else Shard.parse(shard)
        if dry_run:
            _show_scan(
                paths, wanted, out, jobs, index, "json" if json_ else "table", given,
                backend=backend, engine=engine, shard=part, layout=layout, names=_pseudonyms(names, key, out),
                calibrate=True,
            )  # fmt: skip
        else:
            run_conversion(
                paths, out, wanted, given, stop, backend=backend, engine=engine, jobs=jobs, gpus=gpu_numbers(gpus),
                memory_share=memory_share, limit_s=time_limit, shard=part, scheduler=scheduler, limit=limit,
                layout=layout, names=_pseudonyms(names, key, out),
                room_check=not no_room_check, index=index, log=log, log_format=log_format, report=report, quiet=quiet,
                json_=json_,
            )  # fmt: skip


@app.command()
def mask(
    segmentations: Annotated[
        list[str],
        typer.Argument(metavar="SEG...", help="Segmentation files, or folders of them: RTSTRUCT, SEG, XML, text."),
    ],
    series: Annotated[
        list[str],
        typer.Option(metavar="DICOM_DIR", help="The series they belong to. If it is one, all go to it."),
    ],
    out: Out,
    recipe: RecipeOption = "default",
    spacing: Spacing = None,
    size: Size = None,
    fit: Fit = None,
    format_: Format = None,
    compression: Compression = None,
    group_by: GroupBy = None,
    policy: Policy = None,
    orient: Orient = None,
    roi: Roi = None,
    mask_layout: MaskLayout = None,
    mask_resampling: MaskResampling = None,
    text_format: TextFormat = None,
    units: UnitsOption = None,
    index_base: IndexBase = None,
    pixel_base: PixelBase = None,
    slice_from: SliceFromOption = None,
    slice_order: SliceOrderOption = None,
    seg_threshold: Threshold = None,
    backend: BackendOption = "auto",
    jobs: Jobs = None,
    names: NamesOption = "source",
    key: Key = None,
    index: Index = None,
    log: Log = None,
    log_format: LogFormat = "text",
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Make masks alone: on the grid that `convert` with the same flags gives the images."""
    with errors_to_exit_codes() as stop:
        wanted = _recipe(
            recipe, spacing_mm=spacing, size=size, fit=fit, format=format_, compression=compression, group_by=group_by,
            policy=policy, orient=orient, image=False, masks=_masks(
                roi=roi, layout=mask_layout, resampling=mask_resampling, text_format=text_format, units=units,
                index_base=index_base, pixel_base=pixel_base, slice_from=slice_from, slice_order=slice_order,
                threshold=seg_threshold,
            ),
        )  # fmt: skip
        run_conversion(
            series, out, wanted, segmentations, stop, backend=backend, jobs=jobs, index=index, log=log,
            log_format=log_format, quiet=quiet, json_=json_, names=_pseudonyms(names, key, out),
        )  # fmt: skip


@app.command()
def scan(
    paths: Paths,
    recipe: RecipeOption = "default",
    group_by: GroupBy = None,
    policy: Policy = None,
    orient: Orient = None,
    spacing_tolerance: SpacingTolerance = None,
    position_tolerance_mm: PositionTolerance = None,
    lean_tolerance_mm: LeanTolerance = None,
    max_missing: MaxMissing = None,
    max_missing_share: MaxMissingShare = None,
    assume_hu: AssumeHu = None,
    jobs: Jobs = None,
    index: Index = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print a line per series instead of tables.", rich_help_panel=RUN)
    ] = False,
    json_: Json = False,
) -> None:
    """Show what is there, what is irregular about it and what would happen to it; reads headers, never pixels."""
    with errors_to_exit_codes():
        wanted = _recipe(
            recipe, group_by=group_by, policy=policy, orient=orient, spacing_tolerance=spacing_tolerance,
            position_tolerance_mm=position_tolerance_mm, lean_tolerance_mm=lean_tolerance_mm, max_missing=max_missing,
            max_missing_share=max_missing_share, assume_hu=assume_hu,
        )  # fmt: skip
        if csv and json_:
            raise RequestError("--csv and --json: give one of them")
        _show_scan(paths, wanted, None, jobs, index, "csv" if csv else "json" if json_ else "table")


for _command in KEEPING + LOOKING:
    app.command()(_command)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for the demo; made if need be.")],
    backend: BackendOption = "auto",
    jobs: Jobs = None,
) -> None:
    """Write a small synthetic cohort as DICOM, convert it, and say where to look."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import Monitor, say, show_recipe, show_run
            from gpuprep.cli.demo import run_demo
            from gpuprep.compute.backend import get_backend
            from gpuprep.core.recipe import Recipe

        started = time.perf_counter()
        chosen = get_backend(backend)
        show_recipe(Recipe(), chosen.device, "operators")
        with Monitor() as monitor:
            shown = run_demo(out, backend=chosen.name, jobs=jobs_or_cores(jobs, chosen.name), listener=monitor)  # type: ignore[arg-type]
        show_run(shown.run, str(shown.volumes), time.perf_counter() - started)
        if shown.run.counts not in ({"ok": 3, "fixed": 1, "rejected": 1}, {"skipped": 4, "rejected": 1}):
            raise GpuprepError(f"the demo should convert 4 series and reject 1, but gave {shown.run.counts}")
        first = shown.volumes / min(r.folder for r in shown.run.results if r.folder)
        say(f"DICOM in    {shown.dicom}  (on purpose, patient-3 lacks a slice, which is filled, and patient-4 six)")
        say(f"outlines in {shown.masks}  (heart and spine of patient-1, as text)")
        say(f"look at     {first / '0100.tif'}  (float32 in [0, 1]: ImageJ shows it)")
        say(f"            {first / 'labels' / '0100.tif'}  (heart 1, spine 2, elsewhere 0, on the same pixels)")
        say(f"            {first / 'volume.json'}")
        say(f"            {shown.volumes / 'manifest.csv'}")


@app.command()
def doctor(json_: Json = False) -> None:
    """Show backends, devices, decoders and versions; why something is missing and what to install."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import show_findings
            from gpuprep.cli.doctor import examine

        findings = examine()
        if json_:
            print_json([asdict(f) for f in findings])
        else:
            show_findings(findings)


def main() -> None:
    """Run the command line; the console script."""
    logging.basicConfig(level=logging.WARNING, format="gpuprep: %(message)s")
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show every file name
    app()


def _masks(**flags: Any) -> dict[str, Any]:
    """Return the table ``[masks]`` of the flags that were given."""
    return {k: v for k, v in flags.items() if v is not None}


def _pseudonyms(names: str, key: Path | None, out: str) -> Pseudonyms | None:
    """Return what stands for names in OUT, if anything does."""
    if names == "hash" and key is None:
        raise RequestError("--names hash needs --key FILE, which is made if it is not there; keep it outside of --out")
    if names != "hash" and key is not None:
        raise RequestError("--key is for --names hash: give both")
    if key is None:
        return None
    from gpuprep.pipeline.pseudonyms import Pseudonyms

    return Pseudonyms.load(key, out)


def _one_or_all(masks: list[str] | None) -> list[str] | Literal["auto"] | None:
    """Return the words after --masks as `gpuprep.convert` takes them."""
    if masks is None or masks == ["auto"]:
        return None if masks is None else "auto"
    if "auto" in masks:
        raise RequestError("--masks auto stands alone: give it, or paths")
    return masks


def _show_scan(
    paths: list[str], recipe: Recipe, out: str | None, jobs: int | None, index: str | None,
    how: Literal["table", "csv", "json"], masks: list[str] | Literal["auto"] | None = None, **means: Any,
) -> None:  # fmt: skip
    with held_back():
        from gpuprep.cli.console import show_scan
        from gpuprep.pipeline.events import Listener
        from gpuprep.pipeline.match_masks import Matched
        from gpuprep.pipeline.scan import scan as run_scan

    unmatched: list[tuple[str, str]] = []
    unused: list[tuple[str, str]] = []

    class Unmatched(Listener):
        def matched(self, matched: Matched) -> None:
            unmatched.extend(matched.complaints)
            unused.extend(matched.unused)

    found = run_scan(
        paths, recipe, masks=masks, out=out, index=header_index(index), jobs=jobs_or_cores(jobs, "cpu"),
        listener=Unmatched(), **means,
    )  # fmt: skip
    cohort, outlooks = found.cohort, found.outlooks
    if how == "csv":
        print_csv([_outlook(o) for o in outlooks])
        for path, reason in cohort.unreadable:
            complain(f"unreadable: {path}: {reason}")
    elif how == "json":
        print_json(
            {
                "series": [_outlook(o) for o in outlooks],
                "passed_over": cohort.passed_over,
                "unreadable": cohort.unreadable,
                "unmatched": unmatched,
                "unused": unused,
                "total": found.forecast.to_dict(),
            }
        )
    else:
        show_scan(found, unmatched, unused)
    if not cohort:
        complain(f"no CT series under {', '.join(paths)}")
        raise typer.Exit(3)
    raise typer.Exit(1 if cohort.unreadable or unmatched or any(o.action == "reject" for o in outlooks) else 0)


def _outlook(o: Outlook) -> dict[str, Any]:
    plan = o.plan
    return {
        "action": o.action,
        "verdict": o.verdict,
        "codes": o.codes,
        "reason": o.reason,
        "irregularities": list(texts(o.audit.irregularities)) if o.audit else [],
        "warnings": list(texts(o.warnings)),
        "key": o.series.key,
        "series_uid": o.series.series_uid,
        "label": o.series.label,
        "folder": printable(o.series.folder),
        "slices": len(o.series.slices),
        "source_shape": plan and plan.source.shape,
        "source_spacing_mm": plan and plan.source.spacing_mm,
        "shape": plan and plan.target.shape,
        "spacing_mm": plan and plan.target.spacing_mm,
        "output_bytes": plan and plan.output_bytes,
        "segmentations": [
            {"path": printable(g.path), "format": g.format, "why": g.why, "names": g.names, "error": g.error}
            for g in o.segmentations
        ],
        "structures": o.structures,
        "audit": o.audit and o.audit.to_dict(),
    }


def _recipe(name: str, **flags: Any) -> Recipe:
    """Return the named recipe with the flags that were given."""
    with held_back():
        from gpuprep.core.recipe import PRESETS, Recipe

    base = (
        Recipe.load(name)
        if name not in PRESETS and (name.endswith(".toml") or os.path.exists(name))
        else Recipe.preset(name)
    )
    given = {k: _parsed(k, v) for k, v in flags.items() if v is not None}
    known = base.to_dict()
    if "masks" in given:
        given["masks"] = known["masks"] | given["masks"]
    return Recipe.from_dict(known | given)


def _parsed(name: str, value: Any) -> Any:
    """Return the value of a flag as a recipe holds it: "1" and "3,1,1" are numbers, "none" stays."""
    if not isinstance(value, str) or name not in ("spacing_mm", "window_hu", "size") or value == "none":
        return value
    try:
        numbers = [int(part) if name == "size" else float(part) for part in value.split(",")]
    except ValueError:
        raise RecipeError(f"{name} = {value!r}: give numbers separated by commas, or none") from None
    return numbers[0] if len(numbers) == 1 else numbers
