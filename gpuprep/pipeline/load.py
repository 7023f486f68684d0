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
"""Series that are named where there are too many."""


def load(
    path: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    series_uid: str | None = None,
    backend: Backend | BackendName = "auto",
    engine: Engine = "operators",
) -> Volume:
    """Return the one series under a path as the recipe wants it.

    Parameters
    ----------
    path : path
        A folder, file, zip archive or URL, as for `gpuprep.discover`.
    recipe : Recipe, optional
        The default recipe where absent. What is said of files and masks in it does not matter.
    series_uid : str, optional
        *Series Instance UID*, with ``#part`` where one UID stands for several stacks; needed where there are several.
    backend : {"auto", "cpu", "gpu"} or Backend
        Where to compute. On a GPU the values stay there: ``torch.from_dlpack(volume)`` takes them without a copy.
    engine : {"operators", "ndimage"}
        How to compute.

    Returns
    -------
    Volume
        Values in the recipe's dtype, as a NumPy or CuPy array of shape (k, j, i), and their grid.

    Raises
    ------
    RequestError
        If there is no such series, or there are several.
    InputError
        If its slices cannot be stacked or read.
    PlanError
        If it does not fit the recipe.
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
    """Return the one series under a path, or the one that is asked for.

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
