"""Defines the command `restore`, for one prediction or a folder of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gpuprep.cli.exit_codes import INTERRUPTED, errors_to_exit_codes, print_error, print_json
from gpuprep.cli.options import OUTPUT_FLAGS, RUN_FLAGS, add_flags, select
from gpuprep.errors import RequestError
from gpuprep.executors.signals import Stop, signals_blocked


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
        Literal["nifti", "npy"] | None,
        typer.Option("--as", help="Format of results (default: by the ending of --out; nifti in a folder)."),
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
            from gpuprep.output.own_files import SIDECAR
            from gpuprep.output.source_grid import output_folder

        folder = output_folder(to)
        if not prediction.exists():
            raise RequestError(f"there is no prediction {prediction}")
        if prediction.is_dir() and not (folder / SIDECAR).exists():
            _restore_many(prediction, to, out, as_ or "nifti", threshold, stop, **flags)
        else:
            _restore_one(prediction, folder, out, as_, threshold, quiet=flags["quiet"], json_=flags["json_"])


def _restore_one(
    prediction: Path, folder: Path, out: Path, as_: str | None, threshold: float | None, *, quiet: bool, json_: bool
) -> None:
    """Restore one prediction, and print what the result has."""
    with signals_blocked():
        import numpy as np

        from gpuprep.cli.console import print_line
        from gpuprep.core.formatting import format_count
        from gpuprep.output.own_files import SIDECAR
        from gpuprep.output.write_restored import RESTORED_FORMATS, format_of
        from gpuprep.pipeline.restore import restore as restored_from

    chosen = as_ or format_of(out.name)
    if chosen is None or chosen != format_of(out.name):
        formats = [RESTORED_FORMATS[chosen]] if chosen else RESTORED_FORMATS.values()
        wanted = [ending for f in formats for ending in f.endings]
        raise RequestError(f"--out {out}: give a file that ends in {' or '.join(wanted)}")
    if not (folder / SIDECAR).is_file():
        raise RequestError(
            f"{folder} has no {SIDECAR}: give the folder of the output that {prediction} was made of, or a folder of "
            "predictions and the --out of their conversion"
        )
    if out.resolve() == prediction.resolve() or out.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"--out {out} would change the prediction or its output: choose another file")
    if not out.parent.is_dir():
        raise RequestError(f"there is no folder {out.parent} for --out {out.name}")
    restored = restored_from(prediction, folder, threshold=threshold)
    notes = RESTORED_FORMATS[chosen].write(restored, out)
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
        found = format_count(len(labels), "label")
        print_line(f"{out} has {found} on {shape[0]} slices of {shape[1]} × {shape[2]}")


def _restore_many(
    predictions: Path,
    to: Path,
    out: Path,
    as_: str,
    threshold: float | None,
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
                predictions, to, out, as_, threshold, executor,
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
                "predictions": [asdict(row) for row in ended.rows],
            }
        )
    elif not quiet:
        show_restored(ended, str(out))
    if ended.stopped:
        print_error(INTERRUPTED)
        raise typer.Exit(130)
    raise typer.Exit(1 if {"failed", "unmatched"} & ended.counts.keys() else 0)
