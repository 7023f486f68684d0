"""Brings a prediction on the grid of an output back to the slices as acquired, from ``volume.json`` alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.restore_slices import restore_slices
from gpuprep.core.restored import Restored
from gpuprep.errors import PredictionError
from gpuprep.output.read_prediction import ending_of, read_prediction
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.output.source_grid import output_folder, read_source


def restore(
    prediction: Any, volume_json: str | os.PathLike[str] | Mapping[str, Any], *, threshold: float | None = None
) -> Restored:
    """Return a prediction as labels on the slices as acquired.

    Labels are those of the nearest voxel; probabilities are interpolated linearly first. Slices and voxels outside the
    output, which a recipe may crop, are background.

    Parameters
    ----------
    prediction : array_like or path
        Labels, shape (k, j, i), as integers or as whole numbers in floats; or the probability of one structure, shape
        (k, j, i); or a probability for each class, shape (classes, k, j, i), where class 0 is background. Or a file of
        these: see `gpuprep.output.read_prediction.read_prediction`.
    volume_json : path or dict
        Folder of the output, or its ``volume.json``, or the content of that.
    threshold : float, optional
        Smallest probability that counts, for the probability of one structure; 0.5 by default. With classes the largest
        probability decides.

    Returns
    -------
    Restored
        Labels in uint8 or uint16, shape (slices, rows, columns), with the positions of the slices. The labels have the
        names of the output, unless the prediction is of one of several structures, or has another number of classes.

    Raises
    ------
    PredictionError
        If the prediction cannot be read, has not the grid of the output, or holds neither labels nor probabilities.
    OutputError
        If ``volume.json`` is damaged, is of a later version, or of an early version and an irregular series.
    RequestError
        If the threshold is no probability, or the package of a format is not installed.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> run = gpuprep.convert("dicom", "out", gpuprep.Recipe(size=(64, 64), format="npy"), backend="cpu")
    >>> output = Path("out") / next(iter(run.results)).folder

    >>> import numpy
    >>> volume = numpy.load(output / "volume.npy")
    >>> bone = volume > 0.9  # in place of a model
    >>> restored = gpuprep.restore(bone, output)
    >>> volume.shape, restored.values.shape, restored.values.dtype
    ((36, 64, 64), (12, 32, 32), dtype('uint8'))
    """
    series = read_source(volume_json)
    grid = series.grid
    if isinstance(prediction, str | os.PathLike) and isinstance(volume_json, str | os.PathLike):
        _check_no_image(Path(prediction), output_folder(volume_json))
    values = read_prediction(prediction, grid.target) if isinstance(prediction, str | os.PathLike) else prediction
    try:
        values = np.asarray(values)
    except ValueError as exc:
        raise PredictionError(f"the prediction is no array: {exc}") from exc
    labels = restore_slices(values, grid, threshold)
    names = series.names if _has_all_labels(values, labels, series.names) else {}
    restored = Restored(labels, grid.source, grid.placement, names, series.key, series.series_uid)
    if isinstance(prediction, str | os.PathLike):
        restored = named_by_file(restored, prediction, series.names)
    return restored


def named_by_file(restored: Restored, prediction: str | os.PathLike[str], names: Mapping[int, str]) -> Restored:
    """Return labels of which label 1 has the name of its file, if that is a name of a structure and 1 the only label.

    Models that write a file for each structure give all of them the value 1, whatever their values are elsewhere.
    """
    name = Path(prediction).name
    stem = name[: len(name) - len(ending_of(name))].casefold()
    own = next((found for found in names.values() if found.casefold() == stem), None)
    return restored if own is None or restored.values.max() > 1 else replace(restored, names={1: own})


def _check_no_image(prediction: Path, folder: Path) -> None:
    """Raise PredictionError if a prediction is the image of the output: values from 0 to 1 look like probabilities."""
    image = folder / f"volume{FinishedOutput(folder).recipe.ending}"
    if prediction.resolve() == image.resolve():
        raise PredictionError(f"{prediction} is the image of the output, not a prediction of it")


def _has_all_labels(prediction: NDArray[Any], labels: NDArray[Any], names: Mapping[int, str]) -> bool:
    """Return whether the labels of a prediction can be those of the output.

    Otherwise its label 1 is any one of several structures, or its classes are others.
    """
    if prediction.ndim > 3 and prediction.shape[-4] > 1:
        return bool(prediction.shape[-4] == max(names, default=0) + 1)
    one_structure = prediction.dtype.kind == "b" or (prediction.dtype.kind == "f" and labels.max() <= 1)
    return not one_structure or len(names) <= 1
