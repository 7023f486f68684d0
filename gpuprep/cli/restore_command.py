"""Defines the command `restore`, for one prediction or a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gpuprep.cli.exit_codes import INTERRUPTED, errors_to_exit_codes, print_error, print_json
from gpuprep.cli.options import OUTPUT_FLAGS, RUN_FLAGS, add_flags, select
from gpuprep.errors import RequestError
from gpuprep.executors.signals import Stop, signals_blocked

if TYPE_CHECKING:
    from gpuprep.pipeline.restore_seg import SegRequest

SEG = "DICOM SEG"


@add_flags(select(RUN_FLAGS, "jobs"), select(OUTPUT_FLAGS, "quiet", "json_"))
def restore(
    prediction: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTION",
            help="Labels or probabilities on the grid of an output: .nii, .nii.gz, .npy, .npz, .tif, .ome.zarr, or a "
            "folder of slices; or a folder of such predictions, named like their outputs or nnU-Net cases.",
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="OUT/SERIES|OUT", help="Folder of the output; for many predictions, OUT.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE|FOLDER", help="Result; for many predictions, a folder of them.")
    ],
    as_: Annotated[
        Literal["nifti", "npy", "seg"] | None,
        typer.Option("--as", help="Format of results (default: by the ending of --out; nifti in a folder)."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON with the value of each structure: labels.json, or dataset.json of nnU-Net "
            "\\[dataset.json beside PREDICTION, else the labels of OUT].",
        ),
    ] = None,
    dicom: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR", help="Original images, to which a SEG refers; may be repeated.", rich_help_panel=SEG
        ),
    ] = None,
    seg_kind: Annotated[
        Literal["binary", "labelmap"],
        typer.Option(help="A frame for each structure and slice, or one with label values.", rich_help_panel=SEG),
    ] = "binary",
    algorithm: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the model that predicted the labels.", rich_help_panel=SEG)
    ] = "unknown",
    algorithm_version: Annotated[
        str, typer.Option(metavar="TEXT", help="Version of the model.", rich_help_panel=SEG)
    ] = "unknown",
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recipe whose table masks.codes has the codes of structures \\[that of the output].",
            rich_help_panel=SEG,
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key file of outputs made with --names hash.", rich_help_panel=SEG),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Smallest probability that counts, for the probability of one structure [0.5]."
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Bring predictions on converted grids back to the slices of the original DICOM.

    Of a folder, complete and unchanged results are skipped, and FOLDER/restored.csv lists every prediction.
    """
    with errors_to_exit_codes() as stop:
        with signals_blocked():
            from gpuprep.output.label_names import label_names_beside, read_label_names
            from gpuprep.output.own_files import SIDECAR
            from gpuprep.output.source_grid import output_folder
            from gpuprep.output.write_restored import check_installed, format_of

        folder = output_folder(to)
        if not prediction.exists():
            raise RequestError(f"there is no prediction {prediction}")
        many = prediction.is_dir() and not (folder / SIDECAR).exists()
        beside = label_names_beside(prediction if many else prediction.parent)
        names = beside if labels is None else (labels, read_label_names(labels))
        chosen = as_ or ("nifti" if many else format_of(out.name))
        if chosen is not None:
            check_installed(chosen)
        seg = None
        if chosen == "seg":
            seg = _seg_request(dicom, to, seg_kind, algorithm, algorithm_version, recipe, key)
        elif dicom or recipe or key or seg_kind != "binary" or {algorithm, algorithm_version} != {"unknown"}:
            raise RequestError(
                "--dicom, --recipe, --key, --seg-kind, --algorithm and --algorithm-version are for --as seg"
            )
        if many and format_of(out.name) is not None:
            raise RequestError(f"--out {out}: give a folder for the results, as {prediction} is a folder")
        if many:
            _restore_many(prediction, to, out, chosen or "nifti", threshold, names, seg, stop, **flags)
        else:
            shown = {"quiet": flags["quiet"], "json_": flags["json_"]}
            _restore_one(prediction, folder, out, chosen, threshold, names, seg, **shown)


def _seg_request(
    dicom: list[str] | None,
    to: Path,
    kind: Literal["binary", "labelmap"],
    algorithm: str,
    algorithm_version: str,
    recipe: Path | None,
    key: Path | None,
) -> SegRequest:
    """Return what a SEG needs, as the flags give it."""
    with signals_blocked():
        from gpuprep.core.recipe import Recipe
        from gpuprep.output.dicom_seg import SegOptions, imported_highdicom
        from gpuprep.pipeline.pseudonyms import Pseudonyms
        from gpuprep.pipeline.restore_seg import SegRequest

    if not dicom:
        raise RequestError("--as seg needs the original images: give --dicom DIR")
    imported_highdicom()  # its absence should not be noticed at the first of many predictions
    options = SegOptions(kind=kind, algorithm=algorithm, algorithm_version=algorithm_version)
    masks = None if recipe is None else Recipe.load(recipe).masks
    if key is not None and not key.is_file():
        raise RequestError(f"there is no key {key}: give that of the run by which {to} was made")
    names = None if key is None else Pseudonyms.load(key, to)
    return SegRequest(tuple(dicom), options, masks, names)


def _restore_one(
    prediction: Path,
    folder: Path,
    out: Path,
    chosen: str | None,
    threshold: float | None,
    names: tuple[Path, dict[int, str]] | None,
    seg: SegRequest | None,
    *,
    quiet: bool,
    json_: bool,
) -> None:
    """Restore one prediction, and print what the result has."""
    with signals_blocked():
        import numpy as np

        from gpuprep.cli.console import print_line
        from gpuprep.core.formatting import format_count
        from gpuprep.output.own_files import SIDECAR
        from gpuprep.output.write_restored import RESTORED_FORMATS, format_of
        from gpuprep.pipeline.restore_cohort import check_apart
        from gpuprep.pipeline.restore_file import restore_file

    if chosen is None or chosen != format_of(out.name):
        formats = [RESTORED_FORMATS[chosen]] if chosen else RESTORED_FORMATS.values()
        wanted = [ending for f in formats for ending in f.endings]
        several = "; for a folder of predictions, --to is the OUT of the conversion" if prediction.is_dir() else ""
        raise RequestError(f"--out {out}: give a file that ends in {' or '.join(wanted)}{several}")
    if not (folder / SIDECAR).is_file():
        raise RequestError(
            f"{folder} has no {SIDECAR}: give the folder of the output that {prediction} was made of, or a folder of "
            "predictions and the --out of their conversion"
        )
    place = out.resolve()
    if place.is_relative_to(prediction.resolve()) or any((above / SIDECAR).exists() for above in place.parents):
        raise RequestError(f"--out {out} would change the prediction or an output: choose another file")
    for path in seg.paths if seg is not None else ():
        check_apart(out, Path(path), "original images")
    if not out.parent.is_dir():
        raise RequestError(f"there is no folder {out.parent} for --out {out.name}")
    restored, notes = restore_file(prediction, folder, out, chosen, threshold, names and names[1], seg)
    length = int(restored.values.max()) + 1
    counts = np.zeros(length, np.int64)
    for plane in restored.values:  # one by one, because bincount converts them to int64
        counts += np.bincount(plane.ravel(), minlength=length)
    labels = [(n, restored.names.get(n), int(counts[n])) for n in range(1, length) if counts[n]]
    shape = restored.values.shape
    if json_:
        listed = [dict(zip(("value", "name", "voxels"), label, strict=True)) for label in labels]
        print_json({"result": str(out), "key": restored.key, "shape": shape, "labels": listed, "notes": notes})
    elif not quiet:
        for value, name, voxels in labels:
            print_line(f"label {value}{f' ({name})' if name else ''}: {format_count(voxels, 'voxel')}")
        for note in notes:
            print_line(note)
        if names is not None:
            print_line(f"labels have the names in {names[0]}")
        found = format_count(len(labels), "label")
        print_line(f"{out} has {found} on {shape[0]} slices of {shape[1]} × {shape[2]}")


def _restore_many(
    predictions: Path,
    to: Path,
    out: Path,
    as_: str,
    threshold: float | None,
    names: tuple[Path, dict[int, str]] | None,
    seg: SegRequest | None,
    stop: Stop,
    *,
    jobs: int | None,
    quiet: bool,
    json_: bool,
) -> None:
    """Restore a folder of predictions, print what became of them, and exit with the code of that."""
    with signals_blocked():
        from gpuprep.cli.restore_display import RestoreBar, show_restored
        from gpuprep.executors.cores import usable_cores
        from gpuprep.executors.processes import ProcessExecutor
        from gpuprep.pipeline.restore_cohort import restore_cohort

    executor = ProcessExecutor(jobs or usable_cores(), preload=("gpuprep.pipeline.restore_cohort",))
    try:
        with RestoreBar(hidden=quiet or json_) as bar, stop.in_flight():
            ended = restore_cohort(
                predictions, to, out, as_, threshold, executor, names=names and names[1], seg=seg,
                found=bar.expect, finished=bar.finished, stopped=lambda: stop.asked,
            )  # fmt: skip
    finally:
        executor.stop()
    if json_:
        print_json(
            {
                "counts": ended.counts,
                "without_prediction": ended.without_prediction,
                "stopped": ended.stopped,
                "predictions": [row.public() for row in ended.rows],
            }
        )
    elif not quiet:
        show_restored(ended, str(out), names and str(names[0]))
    if ended.stopped:
        print_error(INTERRUPTED)
        raise typer.Exit(130)
    raise typer.Exit(1 if {"failed", "unmatched"} & ended.counts.keys() else 0)
