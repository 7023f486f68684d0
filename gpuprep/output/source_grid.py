"""Reads from ``volume.json`` what it takes to bring a prediction back to the slices as acquired."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.plan import MOST_VOXELS
from gpuprep.core.restored import OutputGrid
from gpuprep.errors import GpuprepError, OutputError
from gpuprep.output.label_names import label_names_above
from gpuprep.output.own_files import SIDECAR
from gpuprep.output.read_volume import FinishedOutput, checked_sidecar

IRREGULAR = {"gap", "uneven", "tilt", "shift"}
"""Codes of series whose slices lie beside the regular grid, or would if they had not been kept as they are."""

LONGEST_AXIS = 65535
"""Largest possible number of *Rows* and *Columns*; more slices are treated as damage, too."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceSeries:
    """Series of an output, with the positions of its slices."""

    grid: OutputGrid
    key: str
    series_uid: str
    names: dict[int, str]
    """Names of the values in the label volume, and of those in ``labels.json`` of the output folder."""


def read_source(volume_json: str | os.PathLike[str] | Mapping[str, Any]) -> SourceSeries:
    """Return the series of an output.

    Parameters
    ----------
    volume_json : path or dict
        Folder of an output, or its ``volume.json``, or the content of that.

    Raises
    ------
    OutputError
        If the file is damaged, is of a later version, or of an earlier one that did not record where the slices of an
        irregular series lie.
    """
    if isinstance(volume_json, Mapping):
        return _parsed(checked_sidecar(dict(volume_json), SIDECAR), SIDECAR)
    folder = output_folder(volume_json)
    series = _parsed(FinishedOutput(folder).sidecar, str(folder / SIDECAR))
    # An image without segmentations has no labels of its own, but a model may have learned those of the others.
    return replace(series, names=label_names_above(folder.absolute().parents) | series.names)


def output_folder(place: str | os.PathLike[str]) -> Path:
    """Return the folder of an output, given by its path or that of its ``volume.json``."""
    path = Path(place)
    return path.parent if path.name == SIDECAR else path


def _parsed(sidecar: dict[str, Any], where: str) -> SourceSeries:
    try:
        source = sidecar["source"]
        if "placement" not in source:
            _check_regular(sidecar, where)
        placed = source.get("placement")
        placement = None if placed is None else _checked(Placement.from_dict(placed))
        grid = OutputGrid(_geometry(sidecar), _geometry(source), placement)
        if max(grid.slices_shape) > LONGEST_AXIS or np.prod(grid.slices_shape, dtype=np.float64) > MOST_VOXELS:
            raise ValueError(f"slices of shape {grid.slices_shape}")
        grid.axis_maps()
        labels = sidecar.get("labels") or ()
        values = [int(label["value"]) for label in labels]
        # With a volume for each structure, all have the value 1, which therefore names none.
        per_roi = sidecar.get("recipe", {}).get("masks", {}).get("layout") == "per-roi"
        names = [] if per_roi else [str(label["name"]) for label in labels]
        series = SourceSeries(
            grid, str(sidecar["key"]), str(sidecar["series_uid"]), dict(zip(values, names, strict=False))
        )
    except OutputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, GpuprepError) as exc:
        raise OutputError(
            f"{where} is not as it was written ({type(exc).__name__}: {exc}): see gpuprep verify"
        ) from exc
    return series


def _geometry(values: dict[str, Any]) -> Geometry:
    k, j, i = map(int, values["shape"])
    return Geometry((k, j, i), np.array(values["affine_lps"], dtype=np.float64))


def _checked(placement: Placement) -> Placement:
    """Return a placement whose numbers can be positions; raise ValueError otherwise."""
    along, shift = placement.along, placement.shift
    if along.ndim != 1 or not len(along) or not np.isfinite(along).all() or (np.diff(along) < 0).any():
        raise ValueError("the positions of the slices do not ascend")
    if shift is not None and (shift.shape != (len(along), 2) or not np.isfinite(shift).all()):
        raise ValueError(f"{len(along)} slices have {len(shift)} shifts")
    if min(placement.matrix) < 1:
        raise ValueError(f"slices of {placement.matrix} voxels")
    return placement


def _check_regular(sidecar: dict[str, Any], where: str) -> None:
    """Raise OutputError unless slice k is layer k of the grid, for an output of a version without placements."""
    slices, layers = sidecar["source"]["slices"], sidecar["source"]["shape"][0]
    found = sorted(IRREGULAR.intersection(sidecar["codes"]))
    if slices != layers or found:
        raise OutputError(
            f"{where} was written by an early version of gpuprep, which did not record where the {slices} slices of an "
            f"irregular series ({', '.join(found) or 'other'}) lie in a grid of {layers} layers: convert it again"
        )
