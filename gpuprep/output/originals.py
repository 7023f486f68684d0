"""Finds the original DICOM images of a finished output, and stacks them as they were stacked for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpuprep.core.formatting import first_few, format_count, printable
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.series import Series
from gpuprep.dicom.discover import discover
from gpuprep.dicom.stack import Stack, stack
from gpuprep.errors import GeometryError, InputError, NothingFoundError, OutputError, RequestError
from gpuprep.output.own_files import SIDECAR
from gpuprep.output.read_volume import FinishedOutput

POSITION_ATOL_MM = 1e-4
"""Largest distance of slices that are the same; positions have no more than 16 digits."""

_PSEUDONYM = re.compile(r"[0-9a-f]{20}(#\d+)?")


def originals(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: FinishedOutput,
    pseudonymise: Callable[[Series], Series] | None = None,
) -> Stack:
    """Return the original slices of a finished output, in its order and on its grid.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, files, zip archives or URLs, as for `gpuprep.discover`.
    output : FinishedOutput
        Output of the series.
    pseudonymise : callable, optional
        Returns a series with its pseudonym as alias: `gpuprep.Pseudonyms.series` of the key of the run. Needed for an
        output that has a pseudonym instead of a UID.

    Returns
    -------
    Stack
        Slices and grid, equal to those in ``volume.json``.

    Raises
    ------
    NothingFoundError
        If the series is not there.
    RequestError
        If the output has a pseudonym, and there is no key.
    InputError
        If the slices cannot be stacked, or not on the grid of the output: images are missing, new, or changed.
    OutputError
        If ``volume.json`` is not as it was written.

    Notes
    -----
    A series is found by its UID alone. Another reconstruction of the same scan has the same grid, and so may the scan
    of another patient: a grid does not prove that images are the originals.
    """
    found = discover(paths, output.recipe.rules)
    return originals_among([pseudonymise(s) if pseudonymise is not None else s for s in found], output)


def originals_among(series: Sequence[Series], output: FinishedOutput) -> Stack:
    """Return the original slices of a finished output, as `originals` does, from series that are found already.

    Parameters
    ----------
    series : sequence of Series
        Series under the rules of the output's recipe; with pseudonyms, if the output has one.
    output : FinishedOutput
        Output of the series.
    """
    rules = output.recipe.rules
    key, grid, placement = _recorded(output)
    matching = [s for s in series if s.key == key]
    if not matching:
        if not any(s.alias for s in series) and _PSEUDONYM.fullmatch(key):
            raise RequestError(
                f"{output.folder} names its series by a pseudonym, {key}: give the key file of the run, by which its "
                "originals can be recognised"
            )
        others = first_few([printable(s.key) for s in series])
        raise NothingFoundError(
            f"the originals of {output.folder}, series {printable(key)}, are not there"
            + (f"; there are {others}" if others else "")
        )
    (only,) = matching
    try:
        stacked = stack(only, rules)
    except InputError as exc:
        raise type(exc)(f"the originals of {output.folder} cannot be stacked: {exc}", exc.code) from exc
    if difference := _difference(stacked, grid, placement):
        raise GeometryError(
            f"{format_count(len(only.slices), 'image')} of series {printable(key)} do not form the grid of "
            f"{output.folder / SIDECAR}: {difference}: give all its images, unchanged, and no others"
        )
    return stacked


def _recorded(output: FinishedOutput) -> tuple[str, Geometry, Placement | None]:
    """Return key, grid and placement of the originals as ``volume.json`` has them."""
    try:
        key, source = output.sidecar["key"], output.sidecar["source"]
        grid = Geometry(tuple(source["shape"]), np.array(source["affine_lps"], dtype=np.float64))
        placement = source["placement"]
        return str(key), grid, placement and Placement.from_dict(placement)
    except (KeyError, TypeError, ValueError, GeometryError) as exc:
        missing = f"has no {exc.args[0]!r}" if isinstance(exc, KeyError) else f"is not as it was written ({exc})"
        raise OutputError(
            f"{output.folder / SIDECAR} {missing}: convert the series again with this version of gpuprep"
        ) from exc


def _difference(stacked: Stack, grid: Geometry, placement: Placement | None) -> str:
    """Return what distinguishes a stack from a grid with placement; "" if nothing does."""
    if stacked.geometry.shape != grid.shape:
        return f"{_by(stacked.geometry.shape)} voxels instead of {_by(grid.shape)}"
    if not stacked.geometry.is_close(grid, POSITION_ATOL_MM):
        return "they lie elsewhere"
    mine = stacked.placement
    if (mine is None) != (placement is None):
        return "slices are spaced otherwise"
    if mine is None or placement is None:
        return ""
    if mine.matrix != placement.matrix or len(mine.along) != len(placement.along):
        expected = f"{len(placement.along)} of {_by(placement.matrix)}"
        return f"{len(mine.along)} slices of {_by(mine.matrix)} instead of {expected}"
    step_mm, row_mm, column_mm = grid.spacing_mm
    if np.abs(mine.along - placement.along).max() * step_mm > POSITION_ATOL_MM:
        return "slices are spaced otherwise"
    if (mine.shift is None) != (placement.shift is None):
        return "slices are shifted otherwise"
    if mine.shift is not None and placement.shift is not None:
        shift_mm = np.abs(mine.shift - placement.shift) * (row_mm, column_mm)
        if shift_mm.max() > POSITION_ATOL_MM:
            return "slices are shifted otherwise"
    return ""


def _by(numbers: Iterable[int]) -> str:
    return " × ".join(map(str, numbers))
