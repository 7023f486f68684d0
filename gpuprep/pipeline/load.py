"""Loads DICOM as a volume in memory, without files."""

from __future__ import annotations

import os

from gpuprep.compute.backend import Backend, BackendName, Engine
from gpuprep.compute.process import process
from gpuprep.core.formatting import first_few, printable
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import Rules
from gpuprep.core.volume import Volume
from gpuprep.dicom.discover import discover
from gpuprep.dicom.read import read
from gpuprep.errors import NothingFoundError, RequestError

NAMED = 5
"""Number of series that a message names."""


def load(
    path: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    series_uid: str | None = None,
    backend: Backend | BackendName = "auto",
    engine: Engine = "operators",
) -> Volume:
    """Return the only series under a path, converted by a recipe.

    Parameters
    ----------
    path : path
        A folder, file, zip archive or URL, as for `gpuprep.discover`.
    recipe : Recipe, optional
        The default recipe where absent. Its fields about files and masks are ignored.
    series_uid : str, optional
        *Series Instance UID*, with ``#part`` if it has several volumes; needed if there are several series.
    backend : {"auto", "cpu", "gpu"} or Backend
        Computes the volume. On a GPU the values stay there: ``torch.from_dlpack(volume)`` takes them without a copy.
    engine : {"operators", "ndimage"}
        Arithmetic that resamples.

    Returns
    -------
    Volume
        Values in the recipe's dtype, as a NumPy or CuPy array of shape (k, j, i), with their grid.

    Raises
    ------
    RequestError
        If there is no such series, or there are several.
    InputError
        If its slices cannot be stacked or read.
    PlanError
        If the recipe cannot be applied to it.
    BackendError
        If the backend cannot run here, or its memory is exhausted.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import gpuprep
    >>> from gpuprep.testing import thorax, write_series
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_series(Path(folder), thorax((8, 64, 64), (3.0, 5.0, 5.0)), (3.0, 5.0, 5.0))
    ...     volume = gpuprep.load(folder, gpuprep.Recipe(size=(128, 128)), backend="cpu")
    >>> volume.shape, volume.spacing_mm
    ((24, 128, 128), (1.0, 2.5, 2.5))
    """
    recipe = recipe or Recipe()
    return process(read(one_series(path, recipe.rules, series_uid), recipe), recipe, backend=backend, engine=engine)


def one_series(path: str | os.PathLike[str], rules: Rules, series_uid: str | None = None) -> Series:
    """Return the only series under a path, or the one with a UID.

    Raises
    ------
    NothingFoundError
        If there is no such series.
    RequestError
        If there are several.
    """
    cohort = discover(path, rules)
    found = [s for s in cohort if series_uid in (None, s.series_uid, s.key)]
    if not found:
        what = f"series {series_uid}" if series_uid else "CT series"
        raise NothingFoundError(f"there is no {what} in {path}{_beside(len(cohort), len(cohort.unreadable))}")
    if len(found) > 1:
        keys = first_few([f"{printable(s.key)} ({len(s.slices)} slices)" for s in found], NAMED)
        raise RequestError(
            f"there are {len(found)} CT series in {path}: choose one by series_uid (--series-uid): {keys}"
        )
    return found[0]


def _beside(series: int, unreadable: int) -> str:
    others = [f"{series} others" if series else "", f"{unreadable} files that cannot be read" if unreadable else ""]
    return f", but {' and '.join(filter(None, others))}" if any(others) else ""
