"""Declares the flags of the command line: each stands once, under the name of what it sets.

A command takes whole tables of them, or some of a table, with `takes`; they reach it as keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import typer

RECIPE = "Recipe"
STACKING = "Irregular series"
MASKS = "Masks"
RUN = "Run"

Paths = Annotated[
    list[str],
    typer.Argument(metavar="DICOM_DIR...", help="Folders, searched to any depth, or single files; or their URLs."),
]


def preset_names(begun: str) -> Iterator[tuple[str, str]]:
    """Yield the presets that begin so, each with its reason, for the shell to complete."""
    from gpuprep.core.recipe import PRESETS  # not by `--help`

    return ((name, preset.why) for name, preset in PRESETS.items() if name.startswith(begun))


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="A preset (see gpuprep recipes) or a TOML file; flags override it.",
        rich_help_panel=RECIPE, autocompletion=preset_names,
    ),
]  # fmt: skip
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="OUT", help="Where volumes and the manifest go; a path or URL.")
]


class Flag(NamedTuple):
    """One flag: what typer is told of it, and what it is if it is not given."""

    annotation: Any
    default: Any


def _flag(kind: Any, panel: str, *names: str, default: Any = None, **about: Any) -> Flag:
    return Flag(cast(Any, Annotated)[kind, typer.Option(*names, rich_help_panel=panel, **about)], default)


RECIPE_FLAGS: dict[str, Flag] = {
    "spacing_mm": _flag(
        str | None, RECIPE, "--spacing", metavar="MM", help="Target spacing: one number, or z,y,x in mm, or none [1]."
    ),
    "order": _flag(
        int | None, RECIPE, "--order", metavar="N", help="Spline order, 0 to 5: 0 nearest, 1 linear, 3 cubic [3]."
    ),
    "anti_alias": _flag(
        Literal["none", "resample", "resize", "both"] | None,
        RECIPE,
        "--anti-alias",
        help="Steps that blur an axis before shrinking it \\[none].",
    ),
    "window_hu": _flag(
        str | None,
        RECIPE,
        "--window",
        metavar="LOW,HIGH",
        help="Clip to these HU and scale to 0…1, or none: keep HU [-1000,400].",
    ),
    "size": _flag(
        str | None, RECIPE, "--size", metavar="N", help="Slice size: one number, or rows,columns, or none [512]."
    ),
    "fit": _flag(
        Literal["stretch", "pad", "crop"] | None,
        RECIPE,
        "--fit",
        help="How a slice gets that size: interpolate; air around it; cut about the centre \\[stretch].",
    ),
    "dtype": _flag(
        Literal["float32", "uint8", "uint16", "int16"] | None,
        RECIPE,
        "--dtype",
        help="Output type; int16 holds HU, unscaled \\[float32].",
    ),
    "format": _flag(
        Literal["tif", "tif-stack", "nifti", "zarr", "npy"] | None,
        RECIPE,
        "--format",
        help="One .tif per slice, one ImageJ stack, NIfTI, OME-Zarr or NumPy \\[tif].",
    ),
    "compression": _flag(
        Literal["none", "zlib", "zstd"] | None,
        RECIPE,
        "--compression",
        help="Lossless; with nifti zlib makes .nii.gz \\[none].",
    ),
}
"""By the fields of `Recipe`."""

STACKING_FLAGS: dict[str, Flag] = {
    "group_by": _flag(
        Literal["uid", "folder"] | None,
        STACKING,
        "--group-by",
        help="Images of one Series Instance UID form a series; or those of one folder, where each file has a UID of "
        "its own, or none \\[uid].",
    ),
    "policy": _flag(
        Literal["fix", "strict", "keep"] | None,
        STACKING,
        "--policy",
        help="Irregular series: fix puts right what can be put right truthfully, strict rejects them, keep stacks them "
        "as they are; all say so \\[fix].",
    ),
    "orient": _flag(
        Literal["native", "LPS"] | None,
        STACKING,
        "--orient",
        help="Axes as acquired, or turned to the nearest axial ones \\[native].",
    ),
    "spacing_tolerance": _flag(
        float | None,
        STACKING,
        "--spacing-tolerance",
        metavar="SHARE",
        help="Slice distances may differ from their median by this share [0.01] …",
    ),
    "position_tolerance_mm": _flag(
        float | None, STACKING, "--position-tolerance-mm", metavar="MM", help="… or by this, whichever is more [0.02]."
    ),
    "lean_tolerance_mm": _flag(
        float | None,
        STACKING,
        "--lean-tolerance-mm",
        metavar="MM",
        help="Slices may lie this far beside the normal; more is tilt [0.1].",
    ),
    "max_missing": _flag(
        int | None, STACKING, "--max-missing", metavar="N", help="Missing slices in a row that are still filled [3]."
    ),
    "max_missing_share": _flag(
        float | None,
        STACKING,
        "--max-missing-share",
        metavar="SHARE",
        help="Share of all slices that may be missing [0.1].",
    ),
    "assume_hu": _flag(
        bool | None,
        STACKING,
        "--assume-hu",
        help="Take values as HU although Rescale Type is another, or no rescale is given.",
    ),
}
"""By the fields of `Recipe` that say how slices are stacked."""

MASK_FLAGS: dict[str, Flag] = {
    "mask_roi": _flag(str | None, MASKS, "--roi", metavar="REGEX", help="Only structures whose name matches."),
    "mask_layout": _flag(
        Literal["labels", "per-roi"] | None,
        MASKS,
        "--mask-layout",
        help="One volume of labels, or one of 0 and 1 per structure \\[labels].",
    ),
    "mask_resampling": _flag(
        Literal["nearest", "smooth"] | None,
        MASKS,
        "--mask-resampling",
        help="The label of the nearest voxel, or the one that most of the eight voxels around have \\[nearest].",
    ),
    "mask_text_format": _flag(
        str | None, MASKS, "--text-format", metavar="NAME", help="Format of text files, where they leave it open."
    ),
    "mask_units": _flag(
        Literal["px", "mm", "cm"] | None, MASKS, "--units", help="Unit of coordinates, where text files leave it open."
    ),
    "mask_index_base": _flag(
        int | None,
        MASKS,
        "--index-base",
        min=0,
        max=1,
        metavar="0|1",
        help="Number of the first slice, where text files leave it open.",
    ),
    "mask_pixel_base": _flag(
        int | None,
        MASKS,
        "--pixel-base",
        min=0,
        max=1,
        metavar="0|1",
        help="Coordinate of the centre of the first pixel [0].",
    ),
    "mask_slice_from": _flag(
        Literal["name", "column", "z", "uid"] | None,
        MASKS,
        "--slice-from",
        help="Where a text file says the slice of a contour.",
    ),
    "mask_slice_order": _flag(
        Literal["stack", "instance"] | None,
        MASKS,
        "--slice-order",
        help="What slice numbers count: slices along the normal, or Instance Number.",
    ),
    "mask_threshold": _flag(
        float | None,
        MASKS,
        "--seg-threshold",
        metavar="SHARE",
        help="Share from which a voxel of a fractional SEG belongs to its segment [0.5].",
    ),
}
"""By the fields of `Masks`, with ``mask_`` before each."""

RUN_FLAGS: dict[str, Flag] = {
    "backend": _flag(
        Literal["auto", "cpu", "gpu"],
        RUN,
        "--backend",
        default="auto",
        help="auto takes a GPU that works; gpu never falls back.",
    ),
    "engine": _flag(
        Literal["operators", "ndimage"],
        RUN,
        "--engine",
        default="operators",
        help="Banded matrices, or the literal SciPy/CuPy and scikit-image/cuCIM calls.",
    ),
    "jobs": _flag(
        int | None,
        RUN,
        "--jobs",
        min=1,
        help="Series at a time, a worker process each (default: one per core; on GPUs as their memory allows).",
    ),
    "gpus": _flag(str | None, RUN, "--gpus", metavar="0,1,…", help="GPUs to use; a worker sees one of them [all]."),
    "memory_share": _flag(
        float | None,
        RUN,
        "--memory-share",
        metavar="SHARE",
        help="Share of the free memory that series in flight may take together [0.8].",
    ),
    "limit_s": _flag(float | None, RUN, "--time-limit", metavar="S", help="Seconds after which a series is given up."),
    "shard": _flag(
        str | None,
        RUN,
        "--shard",
        metavar="I/N",
        help="Convert one of N equal shares, beside others; then gpuprep merge OUT.",
    ),
    "layout": _flag(
        Literal["folders", "nnunet"],
        RUN,
        "--layout",
        default="folders",
        help="A folder per series; nnunet: also the folders that nnU-Net v2 trains on, made of links.",
    ),
    "names": _flag(
        Literal["source", "hash"],
        RUN,
        "--names",
        default="source",
        help="source: folders named as in the input; hash: keyed hashes, and no UID, path or text in OUT.",
    ),
    "key": _flag(
        Path | None,
        RUN,
        "--key",
        metavar="FILE",
        help="The key of --names hash, made if need be; FILE.crosswalk.csv says who is who.",
    ),
    "scheduler": _flag(
        str | None, RUN, "--scheduler", metavar="ADDRESS|local", help="Have the workers of a Dask scheduler convert."
    ),
    "limit": _flag(int | None, RUN, "--limit", min=1, help="Convert at most so many series now."),
    "no_room_check": _flag(
        bool, RUN, "--no-room-check", default=False, help="Begin even if the disk seems too small for all outputs."
    ),
    "index": _flag(
        str | None,
        RUN,
        "--index",
        metavar="FILE|none",
        help="Where headers are kept, so that unchanged files are not read again [~/.cache/gpuprep/headers.sqlite].",
    ),
}
"""By the fields of `ConvertOptions`, but for ``key``, which goes with ``names``, and ``no_room_check``."""

OUTPUT_FLAGS: dict[str, Flag] = {
    "log": _flag(
        Path | None, RUN, "--log", metavar="FILE", help="Append what happens to a file; no names, paths or texts."
    ),
    "log_format": _flag(
        Literal["text", "json"], RUN, "--log-format", default="text", help="Form of the lines in the log."
    ),
    "report": _flag(bool, RUN, "--report", default=False, help="Write OUT/report.html afterwards: gpuprep report."),
    "quiet": _flag(
        bool, RUN, "--quiet", "-q", default=False, help="Print only the series that are left out, and errors."
    ),
    "json_": _flag(bool, RUN, "--json", default=False, help="Print one JSON object instead of tables."),
}
"""What a person sees of a run."""


def some(flags: Mapping[str, Flag], *names: str) -> dict[str, Flag]:
    """Return a few flags of a table."""
    return {name: flags[name] for name in names}


def takes(*tables: Mapping[str, Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a command take the flags of some tables: they are added to its own parameters, before ``**flags``."""

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=flag.default, annotation=flag.annotation)
            for table in tables
            for name, flag in table.items()
        ]
        command.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        return command

    return with_flags
