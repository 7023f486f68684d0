"""The command line: flags to a recipe, events to a progress bar, errors to exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from gpuprep import __version__
from gpuprep.errors import GpuprepError, RecipeError, RequestError
from gpuprep.interruption import held_back
from gpuprep.logs import quiet_libraries
from gpuprep.text import printable

if TYPE_CHECKING:
    from gpuprep.batch import Outlook
    from gpuprep.recipe import Recipe

# Everything else is imported where it is used: `--help` must not wait for NumPy.

app = typer.Typer(
    name="gpuprep",
    help="Cohorts of CT DICOM to training-ready volumes, on a GPU or without one.",
    epilog="Exit codes: 0 all done, 1 some series rejected or failed or some file unreadable, 2 bad request, "
    "3 nothing found, 4 backend, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RECIPE = "Recipe"
STACKING = "Irregular series"
MASKS = "Masks"
RUN = "Run"

Paths = Annotated[
    list[str],
    typer.Argument(metavar="DICOM_DIR...", help="Folders, searched to any depth, or single files; or their URLs."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="A preset (default, classic) or a TOML file; flags override it.",
        rich_help_panel=RECIPE,
    ),
]  # fmt: skip
Spacing = Annotated[
    str | None,
    typer.Option(metavar="MM", help="Target spacing: one number, or z,y,x in mm, or none [1].", rich_help_panel=RECIPE),
]
Order = Annotated[
    int | None,
    typer.Option(metavar="N", help="Spline order, 0 to 5: 0 nearest, 1 linear, 3 cubic [3].", rich_help_panel=RECIPE),
]
AntiAlias = Annotated[
    Literal["none", "resample", "resize", "both"] | None,
    typer.Option(help="Steps that blur an axis before shrinking it \\[none].", rich_help_panel=RECIPE),
]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Clip to these HU and scale to 0…1, or none: keep HU [-1000,400].",
        rich_help_panel=RECIPE,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="N", help="Slice size: one number, or rows,columns, or none [512].", rich_help_panel=RECIPE),
]
Fit = Annotated[
    Literal["stretch", "pad", "crop"] | None,
    typer.Option(
        help="How a slice gets that size: interpolate; air around it; cut about the centre \\[stretch].",
        rich_help_panel=RECIPE,
    ),
]
Dtype = Annotated[
    Literal["float32", "uint8", "uint16", "int16"] | None,
    typer.Option(help="Output type; int16 holds HU, unscaled \\[float32].", rich_help_panel=RECIPE),
]
Format = Annotated[
    Literal["tif", "tif-stack"] | None,
    typer.Option("--format", help="One .tif per slice, or one ImageJ stack \\[tif].", rich_help_panel=RECIPE),
]
Compression = Annotated[
    Literal["none", "zlib", "zstd"] | None, typer.Option(help="Of the .tif \\[none].", rich_help_panel=RECIPE)
]
Policy = Annotated[
    Literal["fix", "strict", "keep"] | None,
    typer.Option(
        help="Irregular series: fix puts right what can be put right truthfully, strict rejects them, keep stacks them "
        "as they are; all say so \\[fix].",
        rich_help_panel=STACKING,
    ),
]
Orient = Annotated[
    Literal["native", "LPS"] | None,
    typer.Option(help="Axes as acquired, or turned to the nearest axial ones \\[native].", rich_help_panel=STACKING),
]
SpacingTolerance = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Slice distances may differ from their median by this share [0.01] …",
        rich_help_panel=STACKING,
    ),
]  # fmt: skip
PositionTolerance = Annotated[
    float | None,
    typer.Option(
        "--position-tolerance-mm", metavar="MM", help="… or by this, whichever is more [0.02].",
        rich_help_panel=STACKING,
    ),
]  # fmt: skip
LeanTolerance = Annotated[
    float | None,
    typer.Option(
        "--lean-tolerance-mm", metavar="MM", help="Slices may lie this far beside the normal; more is tilt [0.1].",
        rich_help_panel=STACKING,
    ),
]  # fmt: skip
MaxMissing = Annotated[
    int | None,
    typer.Option(metavar="N", help="Missing slices in a row that are still filled [3].", rich_help_panel=STACKING),
]
MaxMissingShare = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of all slices that may be missing [0.1].", rich_help_panel=STACKING),
]
AssumeHu = Annotated[
    bool | None,
    typer.Option(
        "--assume-hu", help="Take values as HU although Rescale Type is another, or no rescale is given.",
        rich_help_panel=STACKING,
    ),
]  # fmt: skip
Roi = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Only structures whose name matches.", rich_help_panel=MASKS),
]
MaskLayout = Annotated[
    Literal["labels", "per-roi"] | None,
    typer.Option(help="One volume of labels, or one of 0 and 1 per structure \\[labels].", rich_help_panel=MASKS),
]
MaskResampling = Annotated[
    Literal["nearest", "smooth"] | None,
    typer.Option(help="Label of the nearest voxel, or the one with most of the eight around \\[nearest].",
                 rich_help_panel=MASKS),
]  # fmt: skip
TextFormat = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Format of text files, where they leave it open.", rich_help_panel=MASKS),
]
UnitsOption = Annotated[
    Literal["px", "mm", "cm"] | None,
    typer.Option(help="Unit of coordinates, where text files leave it open.", rich_help_panel=MASKS),
]
IndexBase = Annotated[
    int | None,
    typer.Option(min=0, max=1, metavar="0|1", help="What slices are counted from.", rich_help_panel=MASKS),
]
PixelBase = Annotated[
    int | None,
    typer.Option(min=0, max=1, metavar="0|1", help="What pixels are counted from [0].", rich_help_panel=MASKS),
]
SliceFromOption = Annotated[
    Literal["name", "column", "z", "uid"] | None,
    typer.Option(help="What says to which slice a contour belongs.", rich_help_panel=MASKS),
]
SliceOrderOption = Annotated[
    Literal["stack", "instance"] | None,
    typer.Option(help="What slice numbers count: slices along the normal, or Instance Number.", rich_help_panel=MASKS),
]
Threshold = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Of a fractional SEG, what still is inside [0.5].", rich_help_panel=MASKS),
]
Index = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none", help="Where headers are kept, so that unchanged files are not read again "
        "[~/.cache/gpuprep/headers.sqlite].", rich_help_panel=RUN,
    ),
]  # fmt: skip
BackendOption = Annotated[
    Literal["auto", "cpu", "gpu"],
    typer.Option(help="auto takes a GPU that works; gpu never falls back.", rich_help_panel=RUN),
]
EngineOption = Annotated[
    Literal["operators", "ndimage"],
    typer.Option(help="Banded matrices, or the literal SciPy/CuPy and scikit-image/cuCIM calls.", rich_help_panel=RUN),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Series at a time, a worker process each (default: one per core; on a GPU as its memory allows).",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but what is left out, and errors.", rich_help_panel=RUN)
]


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
                if taking and (n + 1 == len(args) or args[n + 1].startswith("-")):
                    ctx.fail("Option '--masks' takes a path at least, or auto.")
                words += [] if taking else [word]
            else:
                words += ["--masks", word] if taking else [word]
        return super().parse_args(ctx, words)


Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where volumes and the manifest go.")]


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
    limit: Annotated[
        int | None, typer.Option(min=1, help="Convert at most so many series now.", rich_help_panel=RUN)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would happen, and write nothing.", rich_help_panel=RUN)
    ] = False,
    index: Index = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Convert every CT series under DICOM_DIR into a folder of its own under OUT.

    Running it again skips what is complete and unchanged. A bad series never stops the others: it is named, with the
    reason, on the screen and in OUT/manifest.csv.
    """
    with _errors_to_exit_codes():
        wanted = _recipe(
            recipe, spacing_mm=spacing, order=order, anti_alias=anti_alias, window_hu=window, size=size, fit=fit,
            dtype=dtype, format=format_, compression=compression, policy=policy, orient=orient,
            spacing_tolerance=spacing_tolerance, position_tolerance_mm=position_tolerance_mm,
            lean_tolerance_mm=lean_tolerance_mm, max_missing=max_missing, max_missing_share=max_missing_share,
            assume_hu=assume_hu, image=True, masks=_masks(
                roi=roi, layout=mask_layout, resampling=mask_resampling, text_format=text_format, units=units,
                index_base=index_base, pixel_base=pixel_base, slice_from=slice_from, slice_order=slice_order,
                threshold=seg_threshold,
            ),
        )  # fmt: skip
        given = _one_or_all(masks)
        if dry_run:
            _show_scan(paths, wanted, out, jobs, index, "json" if json_ else "table", given)
        else:
            _convert(paths, out, wanted, given, backend, engine, jobs, limit, index, quiet, json_)


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
    index: Index = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Make masks alone: on the grid that `convert` with the same flags gives the images."""
    with _errors_to_exit_codes():
        wanted = _recipe(
            recipe, spacing_mm=spacing, size=size, fit=fit, format=format_, compression=compression, policy=policy,
            orient=orient, image=False, masks=_masks(
                roi=roi, layout=mask_layout, resampling=mask_resampling, text_format=text_format, units=units,
                index_base=index_base, pixel_base=pixel_base, slice_from=slice_from, slice_order=slice_order,
                threshold=seg_threshold,
            ),
        )  # fmt: skip
        _convert(series, out, wanted, segmentations, backend, "operators", jobs, None, index, quiet, json_)


@app.command()
def scan(
    paths: Paths,
    recipe: RecipeOption = "default",
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
    with _errors_to_exit_codes():
        wanted = _recipe(
            recipe, policy=policy, orient=orient, spacing_tolerance=spacing_tolerance,
            position_tolerance_mm=position_tolerance_mm, lean_tolerance_mm=lean_tolerance_mm, max_missing=max_missing,
            max_missing_share=max_missing_share, assume_hu=assume_hu,
        )  # fmt: skip
        if csv and json_:
            raise RequestError("--csv and --json: give one of them")
        _show_scan(paths, wanted, None, jobs, index, "csv" if csv else "json" if json_ else "table")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for the demo; made if need be.")],
    backend: BackendOption = "auto",
    jobs: Jobs = None,
) -> None:
    """Write a small synthetic cohort as DICOM, convert it, and say where to look."""
    with _errors_to_exit_codes():
        with held_back():
            from gpuprep.backend import get_backend
            from gpuprep.console import Monitor, say, show_recipe, show_run
            from gpuprep.demo import run_demo
            from gpuprep.recipe import Recipe

        started = time.perf_counter()
        chosen = get_backend(backend)
        show_recipe(Recipe(), chosen.device, "operators")
        with Monitor() as monitor:
            shown = run_demo(out, backend=chosen.name, jobs=_jobs(jobs, chosen.name), listener=monitor)  # type: ignore[arg-type]
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
    with _errors_to_exit_codes():
        with held_back():
            from gpuprep.console import show_findings
            from gpuprep.doctor import examine

        findings = examine()
        if json_:
            _print_json([asdict(f) for f in findings])
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


def _one_or_all(masks: list[str] | None) -> list[str] | Literal["auto"] | None:
    """Return the words after --masks as `gpuprep.convert` takes them."""
    if masks is None or masks == ["auto"]:
        return None if masks is None else "auto"
    if "auto" in masks:
        raise RequestError("--masks auto stands alone: give it, or paths")
    return masks


def _convert(
    paths: list[str], out: Path, recipe: Recipe, masks: list[str] | Literal["auto"] | None, backend: Any, engine: Any,
    jobs: int | None, limit: int | None, index: str | None, quiet: bool, json_: bool,
) -> None:  # fmt: skip
    with held_back():
        from gpuprep.backend import get_backend
        from gpuprep.batch import Listener
        from gpuprep.batch import convert as run_conversion
        from gpuprep.console import Complaints, Monitor, show_recipe, show_run

    if quiet or json_:
        logging.getLogger("gpuprep").setLevel(logging.ERROR)
    started = time.perf_counter()
    chosen = get_backend(backend)
    monitor: Any = nullcontext(Complaints() if quiet else Listener())
    if not (quiet or json_):
        show_recipe(recipe, chosen.device, engine)
        monitor = Monitor()
    with monitor as listener:
        run = run_conversion(
            paths, out, recipe, masks=masks, backend=chosen.name, engine=engine,  # type: ignore[arg-type]
            jobs=_jobs(jobs, chosen.name), limit=limit, index=_index(index), listener=listener,
        )  # fmt: skip
    if json_:
        _print_json(
            {
                "counts": run.counts,
                "postponed": run.postponed,
                "passed_over": run.passed_over,
                "unreadable": run.unreadable,
                "unmatched": run.unmatched,
                "seconds": round(time.perf_counter() - started, 3),
                "series": [r.to_dict() for r in run.results],
            }
        )
    elif not quiet:
        show_run(run, str(out), time.perf_counter() - started)
    if run.exit_code == 3:
        what = "no CT series" if recipe.image else "no segmentation of a CT series"
        _complain(f"{what} under {', '.join(paths)}")
    raise typer.Exit(run.exit_code)


def _show_scan(
    paths: list[str], recipe: Recipe, out: Path | None, jobs: int | None, index: str | None,
    how: Literal["table", "csv", "json"], masks: list[str] | Literal["auto"] | None = None,
) -> None:  # fmt: skip
    with held_back():
        from gpuprep.batch import Listener
        from gpuprep.batch import scan as run_scan
        from gpuprep.console import show_scan
        from gpuprep.matching import Matched

    unmatched: list[tuple[str, str]] = []

    class Unmatched(Listener):
        def matched(self, matched: Matched) -> None:
            unmatched.extend(matched.complaints)

    cohort, outlooks = run_scan(
        paths, recipe, masks=masks, out=out, index=_index(index), jobs=_jobs(jobs, "cpu"), listener=Unmatched()
    )
    if how == "csv":
        _print_csv([_outlook(o) for o in outlooks])
        for path, reason in cohort.unreadable:
            _complain(f"unreadable: {path}: {reason}")
    elif how == "json":
        _print_json(
            {
                "series": [_outlook(o) for o in outlooks],
                "passed_over": cohort.passed_over,
                "unreadable": cohort.unreadable,
                "unmatched": unmatched,
            }
        )
    else:
        show_scan(cohort, outlooks, unmatched)
    if not cohort:
        _complain(f"no CT series under {', '.join(paths)}")
        raise typer.Exit(3)
    raise typer.Exit(1 if cohort.unreadable or unmatched or any(o.action == "reject" for o in outlooks) else 0)


def _outlook(o: Outlook) -> dict[str, Any]:
    plan = o.plan
    return {
        "action": o.action,
        "verdict": o.verdict,
        "codes": o.codes,
        "reason": o.reason,
        "irregularities": [i.text for i in o.audit.irregularities] if o.audit else [],
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
        from gpuprep.recipe import PRESETS, Recipe

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


def _jobs(jobs: int | None, backend: str) -> int | None:
    """Return one worker per core that this process may use; on a GPU, leave it to `batch`."""
    from gpuprep.executors import usable_cores

    return jobs if jobs is not None or backend == "gpu" else usable_cores()


@contextmanager
def _errors_to_exit_codes() -> Iterator[None]:
    """Turn errors into one clear line and an exit code; SIGTERM does what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        _check_folder()
        yield
    except GpuprepError as exc:
        _complain(str(exc))
        raise typer.Exit(exc.exit_code) from exc
    except OSError as exc:
        _complain(str(exc))
        raise typer.Exit(1) from exc
    except KeyboardInterrupt as exc:
        _complain("interrupted; what is finished stays, and the same command goes on from there")
        raise typer.Exit(130) from exc


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise RequestError("the current folder no longer exists: go to another one") from exc


def _complain(text: str) -> None:
    """Print one line of error; by itself, so that it works in the middle of an import."""
    with suppress(OSError):  # where nobody listens, the exit code has to do
        print(f"gpuprep: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


def _index(given: str | None) -> Path | None:
    """Return where headers are kept between scans; None where that is not wanted."""
    if given == "none":
        return None
    if given is not None:
        return Path(given)
    from gpuprep.index import default_index

    return default_index()


def _print_csv(rows: list[dict[str, Any]]) -> None:
    """Print dicts as lines of a table; what they hold within becomes columns of its own, and lists JSON."""
    import csv

    from gpuprep.console import mute

    flat = [
        {k: v for k, v in row.items() if k != "audit"} | {f"audit_{k}": v for k, v in (row["audit"] or {}).items()}
        for row in rows
    ]
    try:
        writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(k for row in flat for k in row)))
        writer.writeheader()
        for row in flat:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | tuple | dict) else v for k, v in row.items()})
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        mute(sys.stdout)


def _print_json(value: Any) -> None:
    from gpuprep.console import mute

    try:
        print(json.dumps(value, indent=1), flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader has seen enough
        mute(sys.stdout)
