"""Restores one prediction and writes the result, in any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpuprep.core.restored import Restored
from gpuprep.core.series import Series
from gpuprep.files.replacing import make_folder
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.output.write_restored import write_result
from gpuprep.pipeline.restore import named_by_file, restore
from gpuprep.pipeline.restore_seg import SegRequest, time_of, write_restored_seg


def restore_file(
    prediction: Path,
    folder: Path,
    file: Path,
    as_: str,
    threshold: float | None,
    names: dict[int, str] | None,
    seg: SegRequest | None,
    originals: Sequence[Series] | None = None,
) -> tuple[Restored, tuple[str, ...]]:
    """Restore a prediction, write the result, and return it with notes.

    Parameters
    ----------
    prediction : Path
        See `gpuprep.restore`, also for `threshold`.
    folder : Path
        Folder of the output of the series.
    file : Path
        The result; it appears when it is complete.
    as_ : str
        Format, a key of `gpuprep.output.write_restored.RESTORED_FORMATS`.
    threshold : float, optional
        Smallest probability that counts.
    names : dict of int to str, optional
        Names of the labels; by default those of the output.
    seg : SegRequest, optional
        Needed for the format "seg".
    originals : sequence of Series, optional
        Series among which the original is, for a SEG; by default they are searched.

    Raises
    ------
    GpuprepError
        As `gpuprep.restore`, `write_result` and `write_restored_seg` raise.
    """
    restored = restore(prediction, folder, threshold=threshold)
    make_folder(file.parent)
    if names is not None:
        restored = named_by_file(replace(restored, names=names), prediction, names)
    if seg is None:
        return restored, write_result(as_, restored, file)
    output = FinishedOutput(folder)
    found = seg.series(output.recipe.rules) if originals is None else originals
    return restored, write_restored_seg(restored, output, found, seg, time_of(prediction), file)
