"""Brings a prediction on the grid of an output back to the slices as acquired, from ``volume.json`` alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpuprep.compute.restore_slices import restore_slices
from gpuprep.core.restored import Restored
from gpuprep.output.read_prediction import read_prediction
from gpuprep.output.source_grid import read_source


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
        Labels in uint8 or uint16, shape (slices, rows, columns), with the positions of the slices.

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
    values = read_prediction(prediction, grid.target) if isinstance(prediction, str | os.PathLike) else prediction
    labels = restore_slices(np.asarray(values), grid, threshold)
    return Restored(labels, grid.source, grid.placement, series.names, series.key, series.series_uid)
