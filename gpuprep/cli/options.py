"""Declares the flags of the command line, each once, under the name of the field that it sets.

A command takes whole tables of flags, or a selection, with `add_flags`, and receives them as keyword arguments.
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
SELECT = "Choice of series"
RUN = "Run"

Paths = Annotated[
    list[str],
    typer.Argument(metavar="DICOM_DIR...", help="Folders, which are searched recursively, or files; paths or URLs."),
]


def preset_names(begun: str) -> Iterator[tuple[str, str]]:
    """Yield names and descriptions of the presets that begin with a text, for shell completion."""
    from gpuprep.core.recipe import PRESETS  # late, because it imports NumPy

    return ((name, preset.why) for name, preset in PRESETS.items() if name.startswith(begun))


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="Preset (see gpuprep recipes) or TOML file; flags override its values.",
        rich_help_panel=RECIPE, autocompletion=preset_names,
    ),
]  # fmt: skip
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="OUT", help="Output folder for volumes and manifest; a path or URL.")
]


class Flag(NamedTuple):
    """Declaration of a flag for typer, and its default."""

    annotation: Any
    default: Any


def _flag(type_: Any, panel: str, *names: str, default: Any = None, **options: Any) -> Flag:
    return Flag(cast(Any, Annotated)[type_, typer.Option(*names, rich_help_panel=panel, **options)], default)


RECIPE_FLAGS: dict[str, Flag] = {
    "spacing_mm": _flag(
        str | None,
        RECIPE,
        "--spacing",
        metavar="MM",
        help="Target voxel spacing in mm: one number, or slices,rows,columns; none: keep the source spacing [1].",
    ),
    "crop": _flag(
        str | None,
        RECIPE,
        "--crop",
        metavar="none|body|lungs|mask[:NAME,…]",
        help="Crop volumes to the body, the lungs or structures of segmentations \\[none].",
    ),
    "crop_margin_mm": _flag(
        float | None,
        RECIPE,
        "--margin",
        metavar="MM",
        help="Margin of the cropped box on each side, in mm [10].",
    ),
    "crop_missing": _flag(
        Literal["whole", "reject"] | None,
        RECIPE,
        "--crop-missing",
        help="Series in which that part is not found: keep them whole, or reject them \\[whole].",
    ),
    "order": _flag(
        int | None,
        RECIPE,
        "--order",
        metavar="N",
        help="Spline order of the resampling, 0 to 5: 0 nearest, 1 linear, 3 cubic [3].",
    ),
    "anti_alias": _flag(
        Literal["none", "resample", "resize", "both"] | None,
        RECIPE,
        "--anti-alias",
        help="Blur an axis before it shrinks: in resampling to the spacing, in resizing of slices, or both \\[none].",
    ),
    "window_hu": _flag(
        str | None,
        RECIPE,
        "--window",
        metavar="LOW,HIGH",
        help="Window in HU: values are clipped to it and scaled to 0…1; none: keep HU [-1000,400].",
    ),
    "size": _flag(
        str | None,
        RECIPE,
        "--size",
        metavar="N",
        help="Slice size in pixels: one number, or rows,columns; none: keep the resampled size [512].",
    ),
    "fit": _flag(
        Literal["stretch", "pad", "crop"] | None,
        RECIPE,
        "--fit",
        help="Resize slices by interpolation (stretch), add air around them (pad) or cut around the centre (crop) "
        "\\[stretch].",
    ),
    "dtype": _flag(
        Literal["float32", "uint8", "uint16", "int16"] | None,
        RECIPE,
        "--dtype",
        help="Output type; int16 holds HU, without scaling \\[float32].",
    ),
    "format": _flag(
        Literal["tif", "tif-stack", "nifti", "zarr", "npy"] | None,
        RECIPE,
        "--format",
        help="Output format: one TIFF per slice, one TIFF stack for ImageJ, NIfTI, OME-Zarr or NumPy \\[tif].",
    ),
    "compression": _flag(
        Literal["none", "zlib", "zstd"] | None,
        RECIPE,
        "--compression",
        help="Lossless compression; nifti with zlib is .nii.gz \\[none].",
    ),
}
"""Flags by the field of `Recipe` that they set."""

CROP = ("crop", "crop_margin_mm", "crop_missing")
"""Those about cropping."""

STACKING_FLAGS: dict[str, Flag] = {
    "group_by": _flag(
        Literal["uid", "folder"] | None,
        STACKING,
        "--group-by",
        help="Images with one Series Instance UID form a series; or all images of a folder, for files with a different "
        "UID each, or none \\[uid].",
    ),
    "policy": _flag(
        Literal["fix", "strict", "keep"] | None,
        STACKING,
        "--policy",
        help="Irregular series: fix corrects what can be corrected truthfully, strict rejects them, keep stacks slices "
        "as they are. The irregularity is always recorded \\[fix].",
    ),
    "orient": _flag(
        Literal["native", "LPS"] | None,
        STACKING,
        "--orient",
        help="Axes as acquired, or reordered and flipped to the nearest axial orientation (LPS) \\[native].",
    ),
    "spacing_tolerance": _flag(
        float | None,
        STACKING,
        "--spacing-tolerance",
        metavar="SHARE",
        help="Tolerated difference of slice distances from their median, as a share of it [0.01] …",
    ),
    "position_tolerance_mm": _flag(
        float | None,
        STACKING,
        "--position-tolerance-mm",
        metavar="MM",
        help="… or in mm; the larger tolerance applies [0.02].",
    ),
    "lean_tolerance_mm": _flag(
        float | None,
        STACKING,
        "--lean-tolerance-mm",
        metavar="MM",
        help="Tolerated sideways offset of slices from the slice normal; a larger one is a tilt [0.1].",
    ),
    "max_missing": _flag(
        int | None,
        STACKING,
        "--max-missing",
        metavar="N",
        help="Maximum number of consecutive missing slices that are interpolated [3].",
    ),
    "max_missing_share": _flag(
        float | None,
        STACKING,
        "--max-missing-share",
        metavar="SHARE",
        help="Maximum share of missing slices among all slices of a series [0.1].",
    ),
    "assume_hu": _flag(
        bool | None,
        STACKING,
        "--assume-hu",
        help="Treat values as HU even if Rescale Type is not HU, or there is no rescale.",
    ),
}
"""Flags by the field of `Recipe` that they set: rules for stacking slices."""

MASK_FLAGS: dict[str, Flag] = {
    "mask_roi": _flag(
        str | None, MASKS, "--roi", metavar="REGEX", help="Use only structures whose name matches; case is ignored."
    ),
    "mask_layout": _flag(
        Literal["labels", "per-roi"] | None,
        MASKS,
        "--mask-layout",
        help="One label volume for all structures, or one volume of 0 and 1 for each \\[labels].",
    ),
    "mask_resampling": _flag(
        Literal["nearest", "smooth"] | None,
        MASKS,
        "--mask-resampling",
        help="Label of the nearest voxel, or the label with the largest weight among the eight voxels around "
        "\\[nearest].",
    ),
    "mask_text_format": _flag(
        str | None, MASKS, "--text-format", metavar="NAME", help="Format of text files that could have several."
    ),
    "mask_units": _flag(
        Literal["px", "mm", "cm"] | None,
        MASKS,
        "--units",
        help="Unit of coordinates in text files that do not state it.",
    ),
    "mask_index_base": _flag(
        int | None,
        MASKS,
        "--index-base",
        min=0,
        max=1,
        metavar="0|1",
        help="Number of the first slice in text files that do not state it.",
    ),
    "mask_pixel_base": _flag(
        int | None,
        MASKS,
        "--pixel-base",
        min=0,
        max=1,
        metavar="0|1",
        help="Coordinate of the centre of the first pixel in text files [0].",
    ),
    "mask_slice_from": _flag(
        Literal["name", "column", "z", "uid"] | None,
        MASKS,
        "--slice-from",
        help="Source of the slice of a contour in text files: file name, column of numbers, z, or column of UIDs.",
    ),
    "mask_slice_order": _flag(
        Literal["stack", "instance"] | None,
        MASKS,
        "--slice-order",
        help="Meaning of slice numbers: position along the slice normal, or Instance Number.",
    ),
    "mask_threshold": _flag(
        float | None,
        MASKS,
        "--seg-threshold",
        metavar="SHARE",
        help="Minimum fraction for a voxel of a fractional SEG to count [0.5].",
    ),
}
"""Flags by the field of `Masks` that they set, with the prefix ``mask_``."""

SELECT_FLAGS: dict[str, Flag] = {
    "select_where": _flag(
        str | None,
        SELECT,
        "--where",
        metavar="SQL",
        help="Only series for which this condition is true, such as \"kernel LIKE 'B3%' AND slice_thickness_mm <= 2\"; "
        "gpuprep scan --columns lists the columns.",
    ),
    "select_best_per": _flag(
        Literal["study", "patient", "frame-of-reference", "none"] | None,
        SELECT,
        "--best-per",
        help="Only one series of each, the first by --prefer.",
    ),
    "select_prefer": _flag(
        str | None,
        SELECT,
        "--prefer",
        metavar="SQL",
        help='Terms separated by commas, smallest value first, such as "slice_thickness_mm, -slices".',
    ),
    "select_drop_duplicates": _flag(
        bool | None, SELECT, "--drop-duplicates", help="Only one of several series with equal pixels."
    ),
}
"""Flags by the field of `Select` that they set, with the prefix ``select_``."""

RUN_FLAGS: dict[str, Flag] = {
    "select": _flag(
        Path | None,
        SELECT,
        "--select",
        metavar="FILE",
        help="Only the series that a file lists: a CSV of gpuprep scan, or one UID per line.",
    ),
    "record": _flag(
        list[str] | None,
        RUN,
        "--record",
        metavar="COLUMN",
        help="Also store free text in OUT: series_description, protocol_name or study_description; may be repeated.",
    ),
    "backend": _flag(
        Literal["auto", "cpu", "gpu"],
        RUN,
        "--backend",
        default="auto",
        help="auto uses a GPU if one works; gpu never falls back to the CPU.",
    ),
    "engine": _flag(
        Literal["operators", "ndimage"],
        RUN,
        "--engine",
        default="operators",
        help="Resample by banded matrices, or by the library calls of SciPy/CuPy and scikit-image/cuCIM.",
    ),
    "jobs": _flag(
        int | None,
        RUN,
        "--jobs",
        min=1,
        help="Number of worker processes, each for one series at a time (default: one per core; on GPUs as many as "
        "fit into their memory).",
    ),
    "gpus": _flag(str | None, RUN, "--gpus", metavar="0,1,…", help="GPUs to use; each worker uses one \\[all]."),
    "memory_share": _flag(
        float | None,
        RUN,
        "--memory-share",
        metavar="SHARE",
        help="Share of the free memory that all series in flight may use together [0.8].",
    ),
    "limit_s": _flag(
        float | None, RUN, "--time-limit", metavar="S", help="Time limit in seconds; a series that takes longer fails."
    ),
    "shard": _flag(
        str | None,
        RUN,
        "--shard",
        metavar="I/N",
        help="Convert only share I of N of the cohort; other runs may convert the others at the same time. Afterwards, "
        "run gpuprep merge OUT.",
    ),
    "layout": _flag(
        Literal["folders", "nnunet"],
        RUN,
        "--layout",
        default="folders",
        help="A folder for each series; nnunet: also imagesTr, labelsTr and imagesTs for nnU-Net v2, made of links.",
    ),
    "names": _flag(
        Literal["source", "hash"],
        RUN,
        "--names",
        default="source",
        help="Names of output folders: as in the input, or keyed hashes; hash also keeps UIDs, paths and texts out of "
        "OUT.",
    ),
    "key": _flag(
        Path | None,
        RUN,
        "--key",
        metavar="FILE",
        help="Key file for --names hash, created if it does not exist; FILE.crosswalk.csv maps hashes to originals.",
    ),
    "scheduler": _flag(
        str | None,
        RUN,
        "--scheduler",
        metavar="ADDRESS|local",
        help="Convert on the workers of a Dask scheduler; local: start Dask workers on this machine.",
    ),
    "limit": _flag(int | None, RUN, "--limit", min=1, help="Convert at most this many series in this run."),
    "no_room_check": _flag(
        bool, RUN, "--no-room-check", default=False, help="Start even if the disk seems too small for all outputs."
    ),
    "index": _flag(
        str | None,
        RUN,
        "--index",
        metavar="FILE|none",
        help="Cache of DICOM headers, so that unchanged files are not read again; none: no cache "
        "[~/.cache/gpuprep/headers.sqlite].",
    ),
}
"""Flags by the field of `ConvertOptions` that they set. ``key`` belongs to ``names``; ``no_room_check`` sets
``room_check`` to False."""

OUTPUT_FLAGS: dict[str, Flag] = {
    "log": _flag(
        Path | None,
        RUN,
        "--log",
        metavar="FILE",
        help="Append the events of the run to a log file, without file names, paths and messages.",
    ),
    "log_format": _flag(
        Literal["text", "json"], RUN, "--log-format", default="text", help="Format of the lines in the log."
    ),
    "report": _flag(
        bool, RUN, "--report", default=False, help="Write OUT/report.html after the run, as gpuprep report does."
    ),
    "quiet": _flag(
        bool, RUN, "--quiet", "-q", default=False, help="Print only rejected and failed series, and errors."
    ),
    "json_": _flag(bool, RUN, "--json", default=False, help="Print one JSON object instead of tables."),
}
"""Flags for the printed output, log and report of a run."""


def select(flags: Mapping[str, Flag], *names: str) -> dict[str, Flag]:
    """Return the named flags of a table."""
    return {name: flags[name] for name in names}


def add_flags(*tables: Mapping[str, Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that it takes the flags of some tables in its keyword arguments ``**flags``."""

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
