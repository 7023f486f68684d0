"""Inspects one series, DICOM or a finished output: verdict, grid, HU, middle planes, some slices."""

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
from gpuprep.output.preview import Planes, picture
from gpuprep.output.read_volume import Finished
from gpuprep.pipeline.load import one_series

AS_ACQUIRED = Recipe(spacing_mm=None, size=None, dtype="uint8")
"""Put right where it has to be, shown in the default window, and nothing else."""

DISPLAY_HU = (-1000.0, 400.0)
"""Where an output has no window of its own."""

SLICES = 20
"""That are kept of a series, at equal distances."""

NAMED = 5
"""Outputs that a complaint lists."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glance:
    """What can be seen of one series."""

    title: str
    verdict: str
    codes: tuple[str, ...]
    notes: tuple[str, ...]
    """Why it is rejected, or what is irregular about it, for people."""
    grid: Geometry | None = None
    """Of what is shown; None where nothing could be stacked."""
    hu: tuple[float, float, float] | None = None
    """Lowest, mean and highest of the stack, padding included."""
    padding_share: float | None = None
    quality: dict[str, Any] | None = None
    """See `gpuprep.compute.hu_histogram.Histogram.to_dict`."""
    structures: tuple[str, ...] = ()
    planes: NDArray[np.uint8] | None = None
    """See `gpuprep.output.preview.picture`; shape (rows, columns, 3)."""
    slices: tuple[tuple[int, NDArray[np.uint8]], ...] = ()
    """Number of each slice, and what it shows, shape (j, i)."""


def glance(path: str, series_uid: str | None = None, group_by: GroupBy = "uid") -> Glance:
    """Return what can be seen of one series.

    Parameters
    ----------
    path : str
        The folder of a finished output; or DICOM, as `gpuprep.discover` takes it.
    series_uid : str, optional
        Which one, where there are several.
    group_by : {"uid", "folder"}
        Whether images of one UID or of one folder form a series.

    Raises
    ------
    RequestError
        If there are several series.
    NothingFoundError
        If there is none.
    InputError
        If pixels cannot be read.
    OutputError
        If an output is not as it was written.
    """
    if os.path.isfile(os.path.join(path, SIDECAR)):
        return _of_output(Path(path))
    if os.path.isdir(path) and manifest_path(Path(path)).is_file():
        with closing(Manifest(manifest_path(Path(path)), reading=True)) as manifest:
            made = [os.path.join(path, folder) for (folder,) in manifest.columns("folder") if folder]
        if len(made) != 1:
            raise RequestError(f"{path} is the --out of a run that made {_listed(made)}: choose one")
        return _of_output(Path(made[0]))
    return _of_series(one_series(path, replace(AS_ACQUIRED.rules, group_by=group_by), series_uid))


def _listed(things: Sequence[str]) -> str:
    return first_few([printable(t) for t in things], NAMED) or "nothing"


def _of_series(series: Series) -> Glance:
    judged = audit(series, AS_ACQUIRED.rules)
    title = f"{printable(series.folder)}: series {series.label}, {len(series.slices)} images"
    if judged.stack is None:
        return Glance(title=title, verdict=judged.verdict, codes=judged.codes, notes=(plain_reason(judged.reason),))
    source = SeriesReader(series, AS_ACQUIRED, stacked=judged.stack)
    plan = make_plan(source.geometry, AS_ACQUIRED, source.placement)
    planes = Planes(plan.target.shape)
    wanted = set(spread(plan.target.shape[0]))
    kept: list[tuple[int, NDArray[np.uint8]]] = []
    k = 0
    for chunk in planes.passing(host_chunks(source, plan, NumpyBackend("matmul"))):
        kept += [(n, values.copy()) for n, values in enumerate(chunk, k) if n in wanted]
        k += len(chunk)
    irregularities, warnings = judged.irregularities + source.irregularities, judged.warnings + source.warnings
    return Glance(
        title=title,
        verdict="fixed" if irregularities else judged.verdict,
        codes=codes((*irregularities, *warnings)),
        notes=texts((*irregularities, *warnings)),
        grid=plan.target,
        hu=(source.statistics.low, source.statistics.mean, source.statistics.high),
        padding_share=source.padding_voxels / source.statistics.voxels,
        quality=source.histogram.to_dict(),
        planes=picture(planes, plan.target, 0, 255),
        slices=tuple(kept),
    )


def _of_output(folder: Path) -> Glance:
    output = Finished(folder)
    told, image = output.sidecar, output.recipe.image
    try:
        source = told["source"]
        return Glance(
            title=f"{folder}: {'image' if image else 'masks'} of a series of {source['slices']} images",
            verdict=told["verdict"],
            codes=tuple(told["codes"]),
            notes=tuple(told["irregularities"]) + tuple(told["warnings"]),
            grid=output.geometry,
            hu=(source["hu_min"], source["hu_mean"], source["hu_max"]) if image else None,
            padding_share=source.get("padding_share"),
            quality=source.get("quality"),
            structures=tuple(output.files),
            planes=_preview(folder / PREVIEW),
            slices=tuple(_slices(output)) if image else (),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise OutputError(f"{folder / SIDECAR} is not as it was written ({exc}): see gpuprep verify") from exc


def spread(count: int) -> list[int]:
    """Return the numbers of at most `SLICES` slices of so many."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, SLICES))})


def _preview(file: Path) -> NDArray[np.uint8] | None:
    if not file.exists():  # of an earlier version
        return None
    from imagecodecs import jpeg8_decode

    return np.asarray(jpeg8_decode(file.read_bytes()), dtype=np.uint8)


def _slices(output: Finished) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield some slices of an output, shown in its window."""
    slope, intercept = output.hu
    low_hu, high_hu = output.recipe.window_hu or DISPLAY_HU
    slices, rows, columns = output.geometry.shape
    for k in spread(slices):
        stored = output.image((slice(k, k + 1), slice(0, rows), slice(0, columns)))[0]
        hu = stored.astype(np.float32) * slope + intercept
        yield k, np.rint(np.clip((hu - low_hu) / (high_hu - low_hu), 0, 1) * 255).astype(np.uint8)
