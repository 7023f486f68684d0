"""The flags of the command line, each once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

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
    Literal["tif", "tif-stack", "nifti", "zarr", "npy"] | None,
    typer.Option(
        "--format",
        help="One .tif per slice, one ImageJ stack, NIfTI, OME-Zarr or NumPy \\[tif].",
        rich_help_panel=RECIPE,
    ),
]
Compression = Annotated[
    Literal["none", "zlib", "zstd"] | None,
    typer.Option(help="Lossless; with nifti zlib makes .nii.gz \\[none].", rich_help_panel=RECIPE),
]
GroupBy = Annotated[
    Literal["uid", "folder"] | None,
    typer.Option(
        "--group-by",
        help="Images of one Series Instance UID form a series; or those of one folder, where each file has a UID of "
        "its own, or none \\[uid].",
        rich_help_panel=STACKING,
    ),
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
        min=1, help="Series at a time, a worker process each (default: one per core; on GPUs as their memory allows).",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
Gpus = Annotated[
    str | None,
    typer.Option(metavar="0,1,…", help="GPUs to use; a worker sees one of them [all].", rich_help_panel=RUN),
]
MemoryShare = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of the free memory that series in flight may take together [0.8].",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
TimeLimit = Annotated[
    float | None,
    typer.Option("--time-limit", metavar="S", help="Seconds after which a series is given up.", rich_help_panel=RUN),
]
NoRoomCheck = Annotated[
    bool,
    typer.Option("--no-room-check", help="Begin even if the disk seems too small for it all.", rich_help_panel=RUN),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Convert one of N equal shares, beside others; then gpuprep merge OUT.",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
LayoutOption = Annotated[
    Literal["folders", "nnunet"],
    typer.Option(
        "--layout", help="A folder per series; or, of links to these, what nnU-Net v2 trains on as well.",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
NamesOption = Annotated[
    Literal["source", "hash"],
    typer.Option(
        "--names", help="Folders as those of the source; or keyed hashes, and no UID, path or text in OUT.",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
Key = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The key of --names hash, made if need be; FILE.crosswalk.csv says who is who.",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local", help="Have the workers of a Dask scheduler convert.", rich_help_panel=RUN,
    ),
]  # fmt: skip
Log = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append what happens to a file; no names, paths or texts.", rich_help_panel=RUN),
]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="Lines of the log.", rich_help_panel=RUN)]
Report = Annotated[
    bool, typer.Option("--report", help="Write OUT/report.html afterwards: gpuprep report.", rich_help_panel=RUN)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but what is left out, and errors.", rich_help_panel=RUN)
]
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="OUT", help="Where volumes and the manifest go; a path or URL.")
]
