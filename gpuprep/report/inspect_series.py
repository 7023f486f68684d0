"""Inspects one series, from DICOM or a finished output: verdict, grid, HU, middle planes and some slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.core.formatting import first_few, plain_reason, printable
from gpuprep.core.geometry import Geometry
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import GroupBy, codes, texts
from gpuprep.dicom.audit import audit
from gpuprep.dicom.read import SeriesReader
from gpuprep.errors import OutputError, RequestError
from gpuprep.output.manifest import Manifest, manifest_path
from gpuprep.output.own_files import PREVIEW, SIDECAR
from gpuprep.output.preview import MiddlePlanes, draw_preview
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.pipeline.load import one_series

AS_ACQUIRED = Recipe(spacing_mm=None, size=None, dtype="uint8")
"""Recipe for DICOM: irregularities are fixed and the default window is applied, without resampling or resizing."""

DISPLAY_HU = (-1000.0, 400.0)
"""Display window of outputs whose recipe has no window."""

MAX_SLICES = 20
"""Maximum number of slices kept of a series, at equal distances."""

MAX_LISTED = 5
"""Maximum number of outputs listed in an error message."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeriesSummary:
    """Summary of one series for display."""

    title: str
    verdict: str
    codes: tuple[str, ...]
    notes: tuple[str, ...]
    """Reason of the rejection, or irregularities and warnings, as text."""
    grid: Geometry | None = None
    """Geometry of the volume shown; None if the series could not be stacked."""
    hu: tuple[float, float, float] | None = None
    """Lowest, mean and highest HU of the stack, padding included."""
    padding_share: float | None = None
    """Share of padding among the voxels of the stack."""
    quality: dict[str, Any] | None = None
    """HU metrics: see `gpuprep.compute.hu_histogram.Histogram.to_dict`."""
    structures: tuple[str, ...] = ()
    """Names of the structures in the label volumes of an output."""
    planes: NDArray[np.uint8] | None = None
    """Picture of the middle planes, shape (rows, columns, 3): see `gpuprep.output.preview.draw_preview`."""
    slices: tuple[tuple[int, NDArray[np.uint8]], ...] = ()
    """Index and grey values, shape (j, i), of some slices."""


def summarise_series(path: str, series_uid: str | None = None, group_by: GroupBy = "uid") -> SeriesSummary:
    """Return a summary of one series.

    Parameters
    ----------
    path : str
        Folder of a finished output, or DICOM as for `gpuprep.discover`.
    series_uid : str, optional
        Series Instance UID; needed if there are several series.
    group_by : {"uid", "folder"}
        Whether images with one Series Instance UID or in one folder form a series.

    Returns
    -------
    SeriesSummary
        Summary; also of a series that is rejected.

    Raises
    ------
    RequestError
        If there are several series or outputs and none is chosen.
    NothingFoundError
        If there is no CT series, or none with this UID.
    InputError
        If pixels cannot be read.
    OutputError
        If an output was modified or damaged.
    """
    if os.path.isfile(os.path.join(path, SIDECAR)):
        return _of_output(Path(path))
    if os.path.isdir(path) and manifest_path(Path(path)).is_file():
        with closing(Manifest(manifest_path(Path(path)), reading=True)) as manifest:
            folders = [os.path.join(path, folder) for (folder,) in manifest.columns("folder") if folder]
        if len(folders) != 1:
            raise RequestError(f"{path} is the --out of a run that made {_listed(folders)}: choose one")
        return _of_output(Path(folders[0]))
    return _of_series(one_series(path, replace(AS_ACQUIRED.rules, group_by=group_by), series_uid))


def _listed(folders: Sequence[str]) -> str:
    return first_few([printable(f) for f in folders], MAX_LISTED) or "nothing"


def _of_series(series: Series) -> SeriesSummary:
    audited = audit(series, AS_ACQUIRED.rules)
    title = f"{printable(series.folder)}: series {series.label}, {len(series.slices)} images"
    if audited.stack is None:
        return SeriesSummary(
            title=title, verdict=audited.verdict, codes=audited.codes, notes=(plain_reason(audited.reason),)
        )
    source = SeriesReader(series, AS_ACQUIRED, stacked=audited.stack)
    plan = make_plan(source.geometry, AS_ACQUIRED, source.placement)
    planes = MiddlePlanes(plan.target.shape)
    selected = set(slice_indices(plan.target.shape[0]))
    slices: list[tuple[int, NDArray[np.uint8]]] = []
    start = 0
    for chunk in planes.collecting(host_chunks(source, plan, NumpyBackend("matmul"))):
        slices += [(k, values.copy()) for k, values in enumerate(chunk, start) if k in selected]
        start += len(chunk)
    irregularities, warnings = audited.irregularities + source.irregularities, audited.warnings + source.warnings
    return SeriesSummary(
        title=title,
        verdict="fixed" if irregularities else audited.verdict,
        codes=codes((*irregularities, *warnings)),
        notes=texts((*irregularities, *warnings)),
        grid=plan.target,
        hu=(source.statistics.low, source.statistics.mean, source.statistics.high),
        padding_share=source.padding_voxels / source.statistics.voxels,
        quality=source.histogram.to_dict(),
        planes=draw_preview(planes, plan.target, 0, 255),
        slices=tuple(slices),
    )


def _of_output(folder: Path) -> SeriesSummary:
    output = FinishedOutput(folder)
    sidecar, image = output.sidecar, output.recipe.image
    try:
        source = sidecar["source"]
        return SeriesSummary(
            title=f"{folder}: {'image' if image else 'masks'} of a series of {source['slices']} images",
            verdict=sidecar["verdict"],
            codes=tuple(sidecar["codes"]),
            notes=tuple(sidecar["irregularities"]) + tuple(sidecar["warnings"]),
            grid=output.geometry,
            hu=(source["hu_min"], source["hu_mean"], source["hu_max"]) if image else None,
            padding_share=source.get("padding_share"),
            quality=source.get("quality"),
            structures=tuple(output.files),
            planes=_preview(folder / PREVIEW),
            slices=tuple(_slices(output)) if image else (),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise OutputError(
            f"{folder / SIDECAR} is not as it was written ({type(exc).__name__}: {exc}): see gpuprep verify"
        ) from exc


def slice_indices(count: int) -> list[int]:
    """Return the indices of at most `MAX_SLICES` of `count` slices, at equal distances."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, MAX_SLICES))})


def _preview(file: Path) -> NDArray[np.uint8] | None:
    if not file.exists():  # outputs of earlier versions have none
        return None
    from imagecodecs import jpeg8_decode

    return np.asarray(jpeg8_decode(file.read_bytes()), dtype=np.uint8)


def _slices(output: FinishedOutput) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield index and grey values of some slices of an output, in its window."""
    slope, intercept = output.hu
    low_hu, high_hu = output.recipe.window_hu or DISPLAY_HU
    slices, rows, columns = output.geometry.shape
    for k in slice_indices(slices):
        stored = output.image((slice(k, k + 1), slice(0, rows), slice(0, columns)))[0]
        hu = stored.astype(np.float32) * slope + intercept
        yield k, np.rint(np.clip((hu - low_hu) / (high_hu - low_hu), 0, 1) * 255).astype(np.uint8)
